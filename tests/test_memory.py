"""Running out of memory is one line; what is unusual about the images is printed and recorded."""
import errno
import json

import numpy as np
import pytest
import torch

from engine import memory
from utils import InputError

EXHAUSTED = [
    MemoryError(), OSError(errno.ENOMEM, "none"), torch.OutOfMemoryError("CUDA out of memory."),
    RuntimeError("[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory"),
    RuntimeError("std::bad_alloc"), RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `x`")]


def test_whoever_says_that_memory_ran_out():
    for error in EXHAUSTED:
        line = memory.in_one_line("p.py", error, "; then: again")
        assert line.startswith("p.py: error: out of memory; ") and line.endswith("; then: again")
        assert "--local_bs" in line and "\n" not in line
    assert memory.in_one_line("p.py", InputError("--lr 7: no"), "; again") == "p.py: error: --lr 7: no"
    denied = PermissionError(13, "Permission denied", "a.csv")
    assert memory.in_one_line("p.py", denied, "; again") == "p.py: error: a.csv: Permission denied; again"
    assert memory.in_one_line("p.py", RuntimeError("shapes cannot be multiplied")) is None
    for ask in (lambda: torch.empty(2**60, dtype=torch.uint8), lambda: np.empty(2**60, np.uint8)):
        with pytest.raises(Exception) as caught:   # no machine grants it
            ask()
        assert memory.is_exhausted(caught.value)


def test_the_driver_says_it_in_one_line_and_shows_its_own_faults(place, capsys, monkeypatch):
    def fails(error):
        def federate(*_):
            raise error
        monkeypatch.setattr(place.driver, "federate", federate)
    fails(EXHAUSTED[-1])
    assert "out of memory; " in (line := place.refuses(capsys)) and "--resume" in line
    fails(ZeroDivisionError())
    with pytest.raises(ZeroDivisionError):
        place.main("--resume")


def test_what_is_unusual_about_the_images_is_said_and_recorded(place, tiny_arrays, capsys):
    images = tiny_arrays["train_images"].copy()
    images[1:150] = images[0]
    labels = {key: tiny_arrays[key] + 1 for key in ("train_labels", "test_labels")}
    np.savez(place.folder / "data" / "odd.npz", **{**tiny_arrays, **labels, "train_images": images})
    assert place.main("--dataset", "odd", "--rounds", 1, "--method", "fedavg") == 0
    notes = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: ")]
    config = json.loads((place.results / "config.json").read_text())["images"]
    assert config["labels"] == [1, 2, 3, 4] and config["pooled"] == 240 and config["classes"] == 4
    assert notes[0] == "note: labels are 1, 2, 3, 4; classes are numbered 0 to 3 in that order"
    assert notes[-1].startswith(f"note: {config['duplicates']} of ") and 5 < config["duplicates"] < 30


def test_the_users_own_clients_and_split(place, tiny_arrays, capsys):
    clients = np.tile([0, 1, 2, -1], 60)
    np.savez(place.folder / "data" / "own.npz", **tiny_arrays, client=clients)
    flags = ("--dataset", "own", "--rounds", 1, "--method", "fedavg", "--partition", "file", "--keep_split")
    assert "--num_users 3" in place.refuses(capsys, *flags)
    assert "--unequal" in place.refuses(capsys, *flags, "--num_users", 3, "--unequal")
    assert "--keep_split" in place.refuses(capsys, *flags, "--num_users", 3, "--resplit")
    assert place.main(*flags, "--num_users", 3) == 0
    with np.load(place.results / "partition.npz") as file:
        for k in range(3):
            assert file[f"train_{k}"].tolist() == [i for i in range(200) if i % 4 == k]
            assert file[f"test_{k}"].tolist() == [i for i in range(200, 240) if i % 4 == k]
    assert "no array `client`" in place.refuses(capsys, "--partition", "file", "--overwrite")
