"""Several processes under torchrun: one process's numbers, a death that ends all, another number goes on."""
import os
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT

from engine import processes

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node"]
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
FLAGS = ("--num_users", 5, "--frac", 0.7, "--checkpoint_seconds", 0)


def start(place, launcher, *flags):
    return subprocess.Popen([*launcher, str(ROOT / "RVE-PFL.py"), *place.argv(*flags)], text=True, env=ENV,
                            cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def run(place, processes, *flags):
    process = start(place, [*TORCHRUN, str(processes)], *flags)
    out, err = process.communicate(timeout=240)
    return process.returncode, out, err


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def same(first, second):
    """Two runs' clients.csv, to 1e-5."""
    names = ["round", "client", "stage", "split", "n"]
    assert first[names].equals(second[names])
    figures = first.columns.difference(names)
    assert np.allclose(first[figures], second[figures], rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def alone(tmp_path_factory, make_place):
    """clients.csv and server.csv of one process."""
    place = make_place(tmp_path_factory.mktemp("alone"))
    process = start(place, [sys.executable], *FLAGS)
    _, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    return [pd.read_csv(place.results / name) for name in ("clients.csv", "server.csv")]


@pytest.mark.slow
def test_the_same_numbers_as_one_process(place, alone):
    code, out, err = run(place, 2, *FLAGS)
    assert code == 0, err
    assert out.count("results:") == 1   # one process speaks for all
    same(alone[0], pd.read_csv(place.results / "clients.csv"))
    pd.testing.assert_frame_equal(alone[1], pd.read_csv(place.results / "server.csv"))
    assert {p.name for p in (place.models / "round_3").iterdir()} == {
        "shared.pt", "server.pt", *(f"client_{k}.pt" for k in range(5))}
    assert not (place.models / ".private").exists()
    code, _, err = run(place, 2)   # and one error for all
    lines = [line for line in err.splitlines() if line.startswith("RVE-PFL.py: error")]
    assert code != 0 and len(lines) == 1 and "finished" in lines[0], err


@pytest.mark.slow
def test_a_death_ends_all_and_another_number_goes_on(place, alone):
    process = start(place, [*TORCHRUN, "2"], *FLAGS)
    end = time.monotonic() + 120
    while not (place.models / "round_1").exists() and process.poll() is None:
        assert time.monotonic() < end
        time.sleep(0.005)
    workers = [int(pid) for pid in subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True,
                                                  text=True).stdout.split()]
    os.kill(workers[-1], signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    said = [line for line in err.splitlines() if "another process of this run died" in line]
    assert process.returncode != 0 and len(said) == 1 and "--resume" in said[0], err
    code, _, err = run(place, 3, *FLAGS, "--resume")
    assert code == 0, err
    same(alone[0], pd.read_csv(place.results / "clients.csv"))


WHOLE = {"RANK": "1", "WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", "LOCAL_RANK": "1",
         "LOCAL_WORLD_SIZE": "2"}   # started by hand, with one more process on another machine


@pytest.mark.parametrize("name, value", [
    ("WORLD_SIZE", None), ("RANK", None), ("MASTER_PORT", None), ("MASTER_ADDR", ""), ("RANK", "abc"),
    ("RANK", "3"), ("WORLD_SIZE", "9" * 5000), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "2"), ("LOCAL_WORLD_SIZE", "4"),
    ("MASTER_PORT", "\x1b[2J")])
def test_an_environment_of_no_process_is_refused(place, capsys, monkeypatch, name, value):
    """Even without a mistake in the options, and whichever rank it would be: nobody else says so."""
    for key, usual in WHOLE.items():
        monkeypatch.setenv(key, usual)
    monkeypatch.delenv(name) if value is None else monkeypatch.setenv(name, value)
    line = place.refuses(capsys)
    assert ("RANK" if name == "WORLD_SIZE" else name) in line and len(line) < 400
    assert not place.results.exists()


@pytest.mark.parametrize("rank, waits", [(0, []), (1, [processes.LAST_WORDS])])
def test_the_first_process_has_time_to_say_what_is_wrong(place, capsys, monkeypatch, rank, waits):
    """torchrun stops it when another ends."""
    slept = []
    monkeypatch.setattr(processes.time, "sleep", slept.append)
    for key, usual in {**WHOLE, "RANK": str(rank), "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(key, usual)
    with pytest.raises(SystemExit):
        place.main("--frac", 7)
    assert slept == waits and ("--frac" in capsys.readouterr().err) == (rank == 0)


@pytest.mark.parametrize("rank, missing", [(0, "rank 1 is not there"), (1, "Connection refused")])
def test_who_waits_in_vain_says_for_whom_and_ends(place, capsys, monkeypatch, rank, missing):
    at = f"127.0.0.1:{free_port()}"
    for name, value in zip(("MASTER_ADDR", "MASTER_PORT"), at.split(":"), strict=True):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(processes, "SILENCE", 0.3)
    began = time.monotonic()
    assert place.main("--rendezvous_seconds", 1) == 2
    assert 1 <= time.monotonic() - began < 20   # what PyTorch itself doubles, and floors at seconds
    waits, ends = capsys.readouterr().err.splitlines()
    assert waits == f"rank {rank} of 2 waits for the others at {at} ({missing}), up to 1 s"
    assert f"rank {rank} of 2 did not reach the others at {at} ({missing}, after 1 s)" in ends
    assert "--rendezvous_seconds" in ends and not place.results.exists()


@pytest.mark.slow
def test_waiting_can_be_interrupted_and_is_silent_at_first(place):
    master = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    process = place.start(env={**ENV, **master, "RANK": "1", "WORLD_SIZE": "2"})
    end = time.monotonic() + 120
    while "rank" not in (said := process.stderr.readline()):
        assert time.monotonic() < end
    assert "waits for the others" in said and "up to 300 s" in said
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=30)[1].startswith("interrupted") and process.returncode == 130


@pytest.mark.slow
def test_a_mistake_is_told_once(place):
    code, _, err = run(place, 2, "--frac", 7)
    lines = [line for line in err.splitlines() if line.startswith("RVE-PFL.py: error")]
    assert code != 0 and len(lines) == 1 and "--frac 7" in lines[0], err
