"""Checkpoint files, and where private parameters and uploads wait in the meantime.

A folder ``round_<r>`` holds ``shared.pt`` (what the server saw: ``sent`` and ``uploads``), ``client_<k>.pt``
(what stayed with client k) and ``server.pt`` (the head just aggregated, and what the server remembers), so
an adversary's access to files is its threat model. All are read with ``weights_only=True``, so that a file
from elsewhere cannot run code.
"""
import mmap
import os
import shutil
import warnings
from argparse import Namespace
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeGuard

import torch

from runs import configs
from server.base import State, is_finite
from update import ClientState
from utils import InputError, plain_file, write_whole

MEMORY = 2 * 2**30   # bytes of private parameters kept in memory; the rest waits in files
UPLOADS = 2**29      # bytes of uploads, likewise
SMALL = 2**16        # bytes: a state that is smaller is kept on the heap
MOST_STEPS = 10**12   # of a client: more than any run makes, and still exact as a float


def load_checked(path: Path) -> dict[str, Any]:
    """``torch.load`` of a dictionary of tensors and plain values only, on the CPU.

    Raises:
        InputError: the file is missing, damaged, or holds anything that would have to be executed.
    """
    try:
        with warnings.catch_warnings(action="ignore"):   # of old pickles: refused below, in one line
            found = torch.load(plain_file(path), map_location="cpu", weights_only=True)
        if not isinstance(found, dict):
            raise ValueError("no dictionary")
        return found
    except Exception as error:   # damage can make the unpickler raise nearly anything
        why = "holds objects other than tensors and was not opened" if "weights_only" in str(error).lower() \
            else "is missing or damaged"
        raise InputError(f"checkpoint {path} {why}; remove that round's folder to go on from an earlier one, "
                         "or start again with --overwrite") from error


def same_layout(found: object, expected: State) -> TypeGuard[State]:
    """Whether a state dict has exactly the expected names, shapes and types."""
    return isinstance(found, dict) and found.keys() == expected.keys() and all(
        isinstance(found[name], torch.Tensor) and found[name].shape == value.shape
        and found[name].dtype == value.dtype and found[name].layout == torch.strided
        and found[name].device.type == "cpu" for name, value in expected.items())   # as it was read


def is_whole(value: object) -> bool:
    """Whether it is an int of at least 0, and no bool."""
    return type(value) is int and value >= 0


def same_memory(found: object, expected: dict) -> bool:
    """Whether it can be a server's memory, given its memory at the start.

    Tensors must be like those of the start, and counts must be counts. There may be further numbers, as NbAFL's
    clip, which it finds in the first round. Nothing is below 0.
    """
    def like(value, start):
        if isinstance(start, torch.Tensor):
            return same_layout({"": value}, {"": start}) and is_finite({"": value}) and not (value < 0).any()
        if isinstance(start, int):
            return is_whole(value)
        return type(value) in (int, float) and 0 <= value < float("inf")
    return isinstance(found, dict) and expected.keys() <= found.keys() and all(
        isinstance(name, str) and like(value, expected.get(name)) for name, value in found.items())


def read_shared(path: Path, travels: State, clients: int) -> dict:
    """Read a ``shared.pt``. An upload may hold NaN, since a malicious client's does; what was sent may not.

    Args:
        travels: a state dict like those that are sent and uploaded.
        clients: of the run, by whose numbers uploads are filed.
    """
    found = load_checked(path)
    uploads = found.get("uploads")
    if not (isinstance(uploads, dict) and all(
            is_whole(k) and k < clients and same_layout(upload, travels) for k, upload in uploads.items())):
        raise InputError(f"checkpoint {path} is not of this run; start again with --overwrite")
    return {**found, "sent": checked_state(found.get("sent"), travels, path)}


def checked_state(found: object, travels: State, path: Path) -> State:
    """A head as it was read from a file, if it is like those that travel, and finite."""
    if not same_layout(found, travels):
        raise InputError(f"checkpoint {path} is not of this run; start again with --overwrite")
    if not is_finite(found):
        raise InputError(f"checkpoint {path} holds NaN or infinite values; start again with --overwrite")
    return found


def off_heap(state: State) -> State:
    """A copy in memory of its own, which the kernel gets back when the copy is dropped.

    On the heap, tensors that live for a round would lie between the blocks that every training step reuses, and
    split these into smaller and smaller ones: the process would grow with every round. Small states stay there:
    the kernel counts mappings, and knows 65,530 at most.
    """
    starts, size = {}, 0
    for name, value in state.items():
        starts[name], size = size, size + -(-value.nbytes // 64) * 64
    if size < SMALL:
        return {name: value.to("cpu", copy=True) for name, value in state.items()}
    place = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return {name: torch.frombuffer(place, dtype=value.dtype, count=value.numel(), offset=starts[name]).as_strided(
        value.shape, value.stride()).copy_(value) for name, value in state.items()}


class WaitingUploads:
    """Uploads between a client's turn and the checkpoint that has them.

    They stay in memory up to UPLOADS bytes, those of the last round included; the others are mapped from files, so
    that the kernel may take their memory whenever it needs it. A file is removed as soon as it is mapped.
    """

    def __init__(self, folder: Path, memory: int = UPLOADS):
        self.folder, self.memory = folder, memory
        self.last, self.now = 0, 0   # bytes in memory, of the last round and of this one

    def keep(self, client: int, upload: State) -> State:
        """The same tensors, in memory or mapped."""
        size = sum(value.nbytes for value in upload.values())
        if self.last + self.now + size <= self.memory:
            self.now += size
            return upload
        file = self.folder / f"upload-{client}.pt"
        write_whole(file, lambda target: torch.save(upload, target))
        mapped = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        file.unlink()
        return mapped

    def end_round(self) -> None:
        """This round's uploads are the last round's."""
        self.last, self.now = self.now, 0

    def dropped(self) -> None:
        """A checkpoint has the last round's: nobody holds them any more."""
        self.last = 0


class ClientStore:
    """What stays with each client between its turns.

    It is kept on the GPU that trains, up to half of what is free there, shared with the processes beside this one;
    then in memory, up to MEMORY bytes; then in files. ``put`` takes effect at ``commit``, so an interrupted round
    changes no client. A file is never written twice, so that a checkpoint can hard-link it instead of copying it.

    Args:
        memory: bytes to keep on the heap at most.
        processes: of this run on this machine.

    Attributes:
        base: what a client has of parameters that it never trained as its own: what travelled in the warm rounds.
    """

    def __init__(self, folder: Path, initial: ClientState, memory: int = MEMORY, *, processes: int = 1):
        self.folder, self.initial = folder, initial
        self.kept: dict[int, ClientState | Path] = {}
        self.new: dict[int, ClientState | Path] = {}
        self.base: State = {}
        self.new_base: State | None = None
        self.serial = 0
        self.free = {"cpu": memory}   # bytes left, by the kind of device
        if initial.kind == "cuda":
            device = next(iter(initial.parameters.values())).device
            sharing = -(-processes // torch.cuda.device_count())   # that ``choose_device`` gave the same GPU
            self.free["cuda"] = torch.cuda.mem_get_info(device)[0] // (2 * sharing)

    def get(self, client: int) -> ClientState:
        """The client's latest; a client that has never trained has what all started from."""
        entry = self.new.get(client, self.kept.get(client, self.initial))
        base = self.base if self.new_base is None else self.new_base
        if isinstance(entry, Path):
            return read_client(entry, base or self.initial.parameters)
        return entry if entry.parameters or not base else replace(entry, parameters=base)

    def start_from(self, base: State) -> None:
        """From this round on, clients that have trained nothing of their own yet have this."""
        self.new_base = base

    def put(self, client: int, private: ClientState) -> None:
        """Remember for this round."""
        entry: ClientState | Path = private
        size = private.nbytes
        if private.kind == "cuda" and size <= self.free.get("cuda", 0):
            self.free["cuda"] -= size
        elif size <= self.free["cpu"]:
            self.free["cpu"] -= size
            entry = ClientState(off_heap(private.parameters), private.steps, off_heap(private.trained_shared))
        else:
            self.serial += 1
            entry = file = self.folder / f"{client}-{self.serial}.pt"
            write_client(file, private)
        self.new[client] = entry

    def commit(self) -> None:
        """The round is over: what was put replaces what was kept."""
        for client, entry in self.new.items():
            old, self.kept[client] = self.kept.get(client), entry
            if isinstance(old, Path):
                old.unlink()
            elif old is not None:
                self.free[old.kind] += old.nbytes
        self.new = {}
        self.base, self.new_base = self.base if self.new_base is None else self.new_base, None

    def export(self, clients: Iterable[int], folder: Path) -> None:
        """Write ``client_<k>.pt`` for each of the clients, as of the last commit."""
        first: dict[int, Path] = {}   # where an entry was written: clients that never trained share one
        for k in clients:
            entry, target = self.kept.get(k, self.initial), folder / f"client_{k}.pt"
            if isinstance(entry, ClientState) and self.base and not entry.parameters:
                write_client(target, replace(entry, parameters=self.base))
                continue
            if isinstance(entry, ClientState) and id(entry) not in first:
                first[id(entry)] = target
                write_client(target, entry)
                continue
            source = entry if isinstance(entry, Path) else first[id(entry)]
            try:
                os.link(source, target)
            except OSError:   # a file system without hard links
                shutil.copyfile(source, target)


def write_client(path: Path, private: ClientState) -> None:
    """Write a ``client_<k>.pt``."""
    parameters = {name: value.cpu() for name, value in private.parameters.items()}
    found = {"parameters": parameters, "steps": private.steps}
    if private.trained_shared:
        found["trained_shared"] = private.trained_shared
    write_whole(path, lambda file: torch.save(found, file))


def read_client(path: Path, expected: State, travels: State | None = None) -> ClientState:
    """Read a ``client_<k>.pt``, whose parameters are like those ``expected``.

    Args:
        travels: a state dict like ``own``, for those who use that.
    """
    found = load_checked(path)
    used = [(found.get("parameters"), expected)]
    if not isinstance(found.get("trained_shared", {}), dict):
        raise InputError(f"checkpoint {path} is not one of this program's; start again with --overwrite")
    if travels is not None and "trained_shared" in found:
        used.append((found["trained_shared"], travels))
    if not (found.keys() - {"trained_shared"} == {"parameters", "steps"} and is_whole(found["steps"])
            and found["steps"] <= MOST_STEPS):
        raise InputError(f"checkpoint {path} is not one of this program's; start again with --overwrite")
    for state, like in used:
        if not same_layout(state, like):
            raise InputError(f"checkpoint {path} is of another network; start again with --overwrite")
        if not is_finite(state):
            raise InputError(f"checkpoint {path} holds NaN or infinite values; start again with --overwrite")
    return ClientState(**found)


def finished_source(args: Namespace) -> Path:
    """The last checkpoint of the run that ``--encoders_from`` names.

    Raises:
        InputError: there is no such run, it is not finished, or its clients are not this one's.
    """
    name = args.encoders_from
    path = args.results_dir / name / "config.json"
    if not path.exists():
        raise InputError(f"--encoders_from {name}: no finished run {path.parent}")
    try:
        config = configs.read(path, "rounds")
    except InputError as error:
        raise InputError(f"--encoders_from {name}: {error}; give another run") from error
    theirs, finished = config["options"], config["status"] == "finished"
    deal = ["dataset", "partition", "num_users", "seed", "alpha", "classes_per_client", "unequal", "resplit",
            "validate", "method"]
    if args.partition == "dirichlet":   # a client needs images for one batch, which is dealt for
        deal.append("local_bs")
    differ = [key for key in deal if theirs.get(key) != getattr(args, key)]
    if differ or not finished:
        why = f"its --{differ[0]} is {theirs.get(differ[0])}" if differ else "it is not finished"
        raise InputError(f"--encoders_from {name}: {why}; give a finished run of the same clients and images")
    return args.models_dir / name / f"round_{theirs['rounds']}"


def borrowed_encoders(args: Namespace, clients: Iterable[int],
                      expected: State) -> Iterator[tuple[int, ClientState]]:
    """Each client's private parameters at the end of the run that ``--encoders_from`` names.

    Raises:
        InputError: as ``finished_source``, or a checkpoint is damaged.
    """
    folder = finished_source(args)
    for k in clients:
        try:
            found = read_client(folder / f"client_{k}.pt", expected)
        except InputError as error:
            raise InputError(f"--encoders_from {args.encoders_from}: {error}") from error
        yield k, ClientState(found.parameters)
