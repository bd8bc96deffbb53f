"""Checkpoint files, and where client states wait in the meantime.

A folder ``round_<r>`` holds ``shared.pt`` (what the server saw: ``sent``, the ``clients`` that uploaded, and their
``uploads`` or, with secure aggregation, the ``sum`` as a weighted mean), ``client_<k>.pt`` (what stayed with
client k) and ``server.pt`` (the new shared parameters, and the server's memory): an adversary's access to files is
its threat model. All are read with ``weights_only=True``, so a foreign file cannot run code.
"""
import mmap
import os
import shutil
import warnings
from argparse import Namespace
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from runs import configs
from server.base import State, is_finite
from update import ClientState
from utils import InputError, write_whole

MEMORY = 2 * 2**30    # bytes of client states kept in memory; the rest waits in files
SMALL = 2**16         # bytes: a smaller state is kept on the heap
MOST_STEPS = 10**12   # of a client: more than any run makes, and still exact as a float


def load_plain(path: Path) -> Any:
    """Return ``torch.load`` of tensors and plain values only, on the CPU; whatever fails raises."""
    with warnings.catch_warnings(action="ignore"):   # of old pickles, which are refused
        return torch.load(path, map_location="cpu", weights_only=True)


def load_checked(path: Path) -> dict[str, Any]:
    """Return ``torch.load`` of a dictionary of tensors and plain values only, on the CPU.

    Raises:
        InputError: the file is missing, damaged, or holds anything that would have to be executed.
    """
    try:
        content = load_plain(path)
        if not isinstance(content, dict):
            raise ValueError("no dictionary")
        return content
    except Exception as error:   # damage can make the unpickler raise nearly anything
        why = "holds objects other than tensors and was not opened" if "weights_only" in str(error).lower() \
            else "is missing or damaged"
        raise InputError(f"checkpoint {path} {why}; remove that round's folder to go on from an earlier one, "
                         "or start again with --overwrite") from error


def same_layout(value: object, expected: object) -> bool:
    """Return whether a value has the expected type, in dictionaries the names, and in tensors shape and dtype."""
    if isinstance(expected, dict):
        return isinstance(value, dict) and value.keys() == expected.keys() and all(
            same_layout(value[name], inner) for name, inner in expected.items())
    if isinstance(expected, torch.Tensor):
        return isinstance(value, torch.Tensor) and (value.shape, value.dtype, value.layout, value.device) == (
            expected.shape, expected.dtype, torch.strided, torch.device("cpu"))
    return type(value) is type(expected)


def same_memory(memory: object, expected: dict) -> bool:
    """Return whether a value can be a server's memory; numbers may be added to it, such as NbAFL's clip."""
    return isinstance(memory, dict) and same_layout(memory, {**memory, **expected}) and all(
        bool(torch.as_tensor(value).isfinite().all()) for value in memory.values())


def require(valid: bool, path: Path) -> None:
    """Raise InputError if the content of a checkpoint's file is not valid."""
    if not valid:
        raise InputError(f"checkpoint {path} is not of this run, or is damaged; start again with --overwrite")


def checked_state(state: Any, expected: State, path: Path) -> State:
    """Return a state dict read from ``path``; InputError if it has another layout, or is not finite."""
    require(same_layout(state, expected) and is_finite(state), path)
    return state


def read_shared(path: Path, shared: State, clients: int) -> dict:
    """Read a ``shared.pt`` whose states are like ``shared``; what arrived, not what was sent, may hold NaN."""
    content = load_checked(path)
    total, present = content.get("sum"), content.get("clients")
    require(isinstance(present, list) and all(k in range(clients) for k in present)
            and same_layout(content.get("uploads"), {} if total else dict.fromkeys(present, shared))
            and same_layout(total, shared if total else {}), path)
    return {**content, "sent": checked_state(content.get("sent"), shared, path)}


def read_client(path: Path, private: State, shared: State | None = None) -> ClientState:
    """Read a ``client_<k>.pt`` with parameters like ``private``, and other tensors like ``shared``, if given."""
    content = {"trained_shared": {}, **load_checked(path)}
    trained_shared = content["trained_shared"]
    expected = {"parameters": private, "steps": 0,
                "trained_shared": trained_shared if shared is None or not trained_shared else shared}
    require(same_layout(content, expected) and 0 <= content["steps"] <= MOST_STEPS
            and is_finite({**content["parameters"], **trained_shared}), path)
    return ClientState(**content)


def write_client(path: Path, state: ClientState) -> None:
    """Write a ``client_<k>.pt``."""
    content = {"parameters": {name: value.cpu() for name, value in state.parameters.items()}, "steps": state.steps}
    if state.trained_shared:
        content["trained_shared"] = state.trained_shared
    write_whole(path, lambda file: torch.save(content, file))


def off_heap(state: State) -> State:
    """Return a copy in memory of its own, which the kernel gets back when the copy is dropped.

    On the heap, tensors that live for a round would split the blocks that every training step reuses: the process
    would grow with every round. Small states stay there, since the kernel allows 65,530 mappings at most.
    """
    starts, size = {}, 0
    for name, value in state.items():
        starts[name], size = size, size + -(-value.nbytes // 64) * 64
    if size < SMALL:
        return {name: value.to("cpu", copy=True) for name, value in state.items()}
    place = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return {name: torch.frombuffer(place, dtype=value.dtype, count=value.numel(), offset=starts[name]).as_strided(
        value.shape, value.stride()).copy_(value) for name, value in state.items()}


class ClientStore:
    """The clients' states between their turns.

    They are kept in main memory, up to ``memory`` bytes, then in files. ``put`` takes effect at ``commit``: an
    interrupted round changes no client. A file is never written twice, so a checkpoint can hard-link it.

    Args:
        initial: every client's state before its first turn, but for its own start.
        own_start: client -> parameters that it alone begins with; drawn when asked for, and not kept.
    """

    def __init__(self, folder: Path, initial: ClientState, memory: int = MEMORY,
                 own_start: Callable[[int], State] = lambda client: {}):
        self.folder, self.initial, self.own_start, self.free = folder, initial, own_start, memory
        self.kept: dict[int, ClientState | Path] = {}
        self.new: dict[int, ClientState | Path] = {}
        self.new_initial = initial
        self.serial = 0

    def get(self, client: int) -> ClientState:
        """Return the client's latest state."""
        entry = self.new.get(client, self.kept.get(client)) or self._first(self.new_initial, client)
        return read_client(entry, self.new_initial.parameters) if isinstance(entry, Path) else entry

    def _first(self, initial: ClientState, client: int) -> ClientState:
        """Return the state of a client that had no turn."""
        return replace(initial, parameters={**initial.parameters, **self.own_start(client)})

    def put(self, client: int, state: ClientState) -> None:
        """Store the client's state of this round."""
        self._release(self.new.pop(client, None))
        if nbytes(state) <= self.free:
            self.free -= nbytes(state)
            self.new[client] = ClientState(off_heap(state.parameters), state.steps, off_heap(state.trained_shared))
        else:
            self.serial += 1
            self.new[client] = file = self.folder / f"{client}-{self.serial}.pt"
            write_client(file, state)

    def start_from(self, parameters: State, clients: Iterable[int]) -> None:
        """Let all clients go on from the same private parameters, which were shared until now."""
        states = {k: replace(self.get(k), parameters=parameters, trained_shared={}) for k in clients}
        self.new_initial = ClientState(parameters)
        for k, state in states.items():
            self.put(k, state)

    def commit(self) -> None:
        """End the round: what was put replaces what was kept."""
        for client, entry in self.new.items():
            self._release(self.kept.get(client))
            self.kept[client] = entry
        self.new, self.initial = {}, self.new_initial

    def _release(self, entry: ClientState | Path | None) -> None:
        """Give back an entry's memory, or its file."""
        if isinstance(entry, Path):
            entry.unlink()
        elif entry is not None:
            self.free += nbytes(entry)

    def export(self, clients: Iterable[int], folder: Path) -> None:
        """Write ``client_<k>.pt`` for each of the clients, as of the last commit."""
        for k in clients:
            entry, target = self.kept.get(k) or self._first(self.initial, k), folder / f"client_{k}.pt"
            if isinstance(entry, ClientState):
                write_client(target, entry)
                continue
            try:
                os.link(entry, target)
            except OSError:   # a file system without hard links
                shutil.copyfile(entry, target)


def nbytes(state: ClientState) -> int:
    """Return the size of a state's tensors."""
    return sum(value.nbytes for value in (*state.parameters.values(), *state.trained_shared.values()))


def finished_source(args: Namespace) -> Path:
    """Return the last checkpoint of the run that ``--encoders_from`` names; InputError if it cannot be used."""
    name = args.encoders_from
    path = args.results_dir / name / "config.json"
    if not path.exists():
        raise InputError(f"--encoders_from {name}: no finished run {path.parent}")
    config = configs.read(path, "rounds")
    theirs = config["options"]
    same = ["dataset", "partition", "num_users", "seed", "alpha", "classes_per_client", "unequal", "test_share",
            "keep_split", "resplit", "validate", "new_clients", "method",
            *["local_bs"] * (args.partition == "dirichlet")]   # which gives a batch to each
    differ = [key for key in same if theirs.get(key) != getattr(args, key)]
    if differ or config["status"] != "finished":
        why = f"its --{differ[0]} is {theirs.get(differ[0])}" if differ else "it is not finished"
        raise InputError(f"--encoders_from {name}: {why}; give a finished run of the same clients and images")
    return args.models_dir / name / f"round_{theirs['rounds']}"
