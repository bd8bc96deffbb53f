"""Checkpoint files, and where private parameters wait between a client's turns.

A folder ``round_<r>`` holds ``shared.pt`` (what the server saw: ``sent`` and ``uploads``), ``client_<k>.pt``
(what stayed with client k) and ``server.pt`` (the head just aggregated, and what the server remembers), so
an adversary's access to files is its threat model. All are read with ``weights_only=True``: a file from
elsewhere cannot run code.
"""
import json
import mmap
import os
import pickle
import shutil
import warnings
from argparse import Namespace
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from files import write_whole
from update import Private, State
from utils import InputError

MEMORY = 2 * 2**30   # bytes of private parameters kept in memory; the rest waits in files


def load_checked(path: Path) -> dict:
    """``torch.load`` of a dictionary of tensors and plain values only, on the CPU.

    Raises:
        InputError: the file is missing, damaged, or holds anything that would have to be executed.
    """
    try:
        with warnings.catch_warnings(action="ignore"):   # of old pickles: refused below, in one line
            found = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(found, dict):
            raise ValueError("no dictionary")
        return found
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
        why = "holds objects other than tensors and was not opened" if "weights_only" in str(error).lower() \
            else "is missing or damaged"
        raise InputError(f"checkpoint {path} {why}; remove that round's folder to go on from an earlier one, "
                         "or start again with --overwrite") from error


def same_layout(found: object, expected: State) -> bool:
    """Whether a state dict has exactly the expected names, shapes and types."""
    return isinstance(found, dict) and found.keys() == expected.keys() and all(
        isinstance(found[name], torch.Tensor) and found[name].shape == value.shape
        and found[name].dtype == value.dtype for name, value in expected.items())


def off_heap(state: State) -> State:
    """A copy in memory of its own, which the kernel gets back when the copy is dropped.

    On the heap, what lives for a round would lie between the blocks that every training step reuses, and
    break them into ever smaller ones: the process would grow with every round.
    """
    copy = {}
    for name, value in state.items():
        place = mmap.mmap(-1, value.nbytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        copy[name] = torch.frombuffer(place, dtype=value.dtype, count=value.numel()).as_strided(
            value.shape, value.stride()).copy_(value)
    return copy


class PrivateStore:
    """What stays with each client between turns: on the GPU that trains, up to half of what is free there,
    then in memory up to MEMORY bytes, then in files.

    ``put`` is provisional until ``commit``: a round cut short leaves everybody as before it. Files are
    never written twice, so a checkpoint can hard-link them instead of copying.
    """

    def __init__(self, folder: Path, initial: Private, memory: int = MEMORY):
        self.folder, self.initial = folder, initial
        self.kept, self.new, self.serial = {}, {}, 0
        self.free = {"cpu": memory}   # bytes left, by the kind of device
        if initial.kind == "cuda":
            self.free["cuda"] = torch.cuda.mem_get_info()[0] // 2

    def get(self, client: int) -> Private:
        """The client's latest; a client that has never trained has what all began with."""
        entry = self.new.get(client, self.kept.get(client, self.initial))
        return read_private(entry) if isinstance(entry, Path) else entry

    def put(self, client: int, private: Private) -> None:
        """Remember for this round."""
        entry, size = private, private.nbytes
        if private.kind == "cuda" and size <= self.free["cuda"]:
            self.free["cuda"] -= size
        elif size <= self.free["cpu"]:
            self.free["cpu"] -= size
            entry = Private(off_heap(private.parameters), private.steps, off_heap(private.own))
        else:
            self.serial += 1
            entry = self.folder / f"{client}-{self.serial}.pt"
            write_private(entry, private)
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

    def export(self, clients: Iterable[int], folder: Path) -> None:
        """Write ``client_<k>.pt`` for each of the clients, as of the last commit."""
        first = {}   # where an entry was written: clients that never trained share one
        for k in clients:
            entry, target = self.kept.get(k, self.initial), folder / f"client_{k}.pt"
            source = entry if isinstance(entry, Path) else first.setdefault(id(entry), target)
            if source == target:
                write_private(target, entry)
                continue
            try:
                os.link(source, target)
            except OSError:   # a file system without hard links
                shutil.copyfile(source, target)


def write_private(path: Path, private: Private) -> None:
    """Write a ``client_<k>.pt``."""
    parameters = {name: value.cpu() for name, value in private.parameters.items()}
    found = {"parameters": parameters, "steps": private.steps}
    if private.own:
        found["own"] = private.own
    write_whole(path, lambda file: torch.save(found, file))


def read_private(path: Path) -> Private:
    """Read a ``client_<k>.pt``."""
    found = load_checked(path)
    if found.keys() - {"own"} != {"parameters", "steps"} or not isinstance(found["steps"], int):
        raise InputError(f"checkpoint {path} is not one of this program's; start again with --overwrite")
    return Private(**found)


def borrowed_encoders(args: Namespace, clients: Iterable[int],
                      expected: State) -> Iterator[tuple[int, Private]]:
    """Each client's private parameters at the end of the run that ``--encoders_from`` names.

    Raises:
        InputError: there is no such run, or its clients are not this one's.
    """
    name = args.encoders_from
    try:
        config = json.loads((args.results_dir / name / "config.json").read_text())
        theirs, finished = config["options"], config["status"] == "finished"
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"--encoders_from {name}: no finished run {args.results_dir / name}") from error
    deal = ("dataset", "partition", "num_users", "seed", "alpha", "classes_per_client", "unequal", "resplit",
            "validate", "method")
    differ = [key for key in deal if theirs.get(key) != getattr(args, key)]
    if differ or not finished:
        why = f"its --{differ[0]} is {theirs.get(differ[0])}" if differ else "it is not finished"
        raise InputError(f"--encoders_from {name}: {why}; give a finished run of the same clients and images")
    folder = args.models_dir / name / f"round_{theirs['rounds']}"
    for k in clients:
        found = read_private(folder / f"client_{k}.pt").parameters
        if not same_layout(found, expected):
            raise InputError(f"--encoders_from {name}: {folder}/client_{k}.pt is of another network")
        yield k, Private(found)
