"""Several processes under torchrun: one process's numbers, a death that ends all, another number goes on."""
import os
import signal
import socket
import subprocess

import numpy as np
import pandas as pd
import pytest
from conftest import wait_for

from engine.processes import Ranks

TORCHRUN = ("-m", "torch.distributed.run", "--nproc-per-node")
FLAGS = ("--num_users", 5, "--frac", 0.7, "--checkpoint_seconds", 0)


def run(place, processes, *flags):
    process = place.start(*flags, launcher=(*TORCHRUN, str(processes)))
    out, err = process.communicate(timeout=240)
    return process.returncode, out, err


def same(first, second):
    """Two runs' clients.csv, to 1e-5."""
    names = ["round", "client", "stage", "split", "n"]
    assert first[names].equals(second[names])
    figures = first.columns.difference(names)
    assert np.allclose(first[figures], second[figures], rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def alone(tmp_path_factory, make_place):
    """clients.csv, server.csv and rounds.csv of one process."""
    place = make_place(tmp_path_factory.mktemp("alone"))
    assert place.main(*FLAGS) == 0
    return [pd.read_csv(place.results / name) for name in ("clients.csv", "server.csv", "rounds.csv")]


@pytest.mark.slow
def test_the_same_numbers_as_one_process(place, alone):
    code, out, err = run(place, 2, *FLAGS)
    assert code == 0, err
    assert out.count("results:") == 1   # one process speaks for all
    same(alone[0], pd.read_csv(place.results / "clients.csv"))
    pd.testing.assert_frame_equal(alone[1], pd.read_csv(place.results / "server.csv"))
    rounds = [rows.filter(regex="^(accuracy_images|accuracy_class|bytes)")
              for rows in (alone[2], pd.read_csv(place.results / "rounds.csv"))]
    pd.testing.assert_frame_equal(*rounds, check_exact=True)   # counts of images, and bytes
    assert {p.name for p in (place.models / "round_3").iterdir()} == {
        "shared.pt", "server.pt", *(f"client_{k}.pt" for k in range(5))}
    assert not (place.models / ".private").exists()
    code, _, err = run(place, 2)
    lines = [line for line in err.splitlines() if line.startswith("RVE-PFL.py: error")]
    assert code != 0 and len(lines) == 1 and "already there, finished" in lines[0], err   # one error for all


@pytest.mark.slow
def test_a_death_ends_all_and_another_number_goes_on(place, alone):
    process = place.start(*FLAGS, launcher=(*TORCHRUN, "2"))
    wait_for(process, (place.models / "round_1").exists)
    workers = [int(pid) for pid in subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True,
                                                  text=True).stdout.split()]
    os.kill(workers[-1], signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    messages = [line for line in err.splitlines() if "another process of this run died" in line]
    assert process.returncode != 0 and len(messages) == 1 and "--resume" in messages[0], err
    code, _, err = run(place, 3, *FLAGS, "--resume")
    assert code == 0, err
    same(alone[0], pd.read_csv(place.results / "clients.csv"))


def test_each_process_trains_and_evaluates_its_own_clients_alone(place, monkeypatch):
    """Every client belongs to one process, and what is not its own leaves no trace there."""
    with monkeypatch.context() as patch:
        patch.setenv("WORLD_SIZE", "3")
        owners = []
        for rank in range(3):
            patch.setenv("RANK", str(rank))
            owners.append(Ranks().mine(range(7)))
    assert owners == [[0, 3, 6], [1, 4], [2, 5]]
    monkeypatch.setattr(Ranks, "mine", lambda self, clients: [k for k in clients if k % 2])
    assert place.main("--num_users", 4, "--rounds", 2, "--full_sharing_rounds", 1) == 0
    clients = pd.read_csv(place.results / "clients.csv")
    assert clients.groupby("stage")["client"].unique().map(list).to_dict() == {
        "trained": [1, 3], "deployed": [1, 3]}
    folder = place.models / "round_2"
    assert {p.name for p in folder.iterdir()} == {"shared.pt", "server.pt", "client_1.pt", "client_3.pt"}
    assert place.saved(2, "shared.pt")["uploads"].keys() == {1, 3}


@pytest.mark.parametrize("name, value", [("WORLD_SIZE", "x"), ("RANK", None), ("LOCAL_RANK", "")])
def test_an_environment_of_no_process_is_refused(place, capsys, monkeypatch, name, value):
    for key, usual in {"RANK": "1", "WORLD_SIZE": "3", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(key, usual)
    monkeypatch.delenv(name) if value is None else monkeypatch.setenv(name, value)
    assert name in place.refuses(capsys) and not place.results.exists()


def test_the_first_process_alone_names_a_bad_option(place, capsys, monkeypatch):
    monkeypatch.setattr("engine.signals.LAST_WORDS", 0)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit, match="2"):
            place.main("--frac", 7)
        assert ("--frac 7" in capsys.readouterr().err) == (rank == "0")


@pytest.mark.parametrize("rank", [0, 1])
def test_who_waits_in_vain_ends_with_one_line(place, capsys, monkeypatch, rank):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    for name, value in (("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", port), ("RANK", rank), ("WORLD_SIZE", 2)):
        monkeypatch.setenv(name, str(value))
    line = place.refuses(capsys, "--rendezvous_seconds", 1)
    assert f"rank {rank} of 2 did not reach the others" in line and "--rendezvous_seconds" in line
    assert not place.results.exists()
