"""Refusals in one line, and files that must be whole after them."""
import dataclasses
import fcntl
import os
import pickle
import resource
import tempfile

import numpy as np
import pandas as pd
import pytest
import torch

from runs import setup
from runs.checkpoints import load_checked
from runs.csvs import csv_columns


def test_an_earlier_run_is_never_lost_by_accident(place, capsys):
    assert place.main("--rounds", 1) == 0
    before = place.clients_csv()
    assert "--overwrite" in place.refuses(capsys, "--rounds", 1)
    config = place.results / "config.json"
    config.write_text(config.read_text().replace('"finished"', '"unfinished"'))
    line = place.refuses(capsys, "--rounds", 1)
    assert "--resume" in line and "--overwrite" in line
    assert place.clients_csv() == before
    assert place.main("--rounds", 2, "--overwrite") == 0
    assert place.clients_csv() != before


def test_a_second_run_of_the_same_name_is_refused(place, capsys):
    place.results.mkdir(parents=True)
    with open(place.results / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "another process" in place.refuses(capsys)
        assert "another process" in place.refuses(capsys, "--overwrite")
    assert place.main() == 0


@pytest.fixture(scope="module")
def stopped(tmp_path_factory, make_place):
    """A run of three rounds, of which two are left to do."""
    place = make_place(tmp_path_factory.mktemp("stopped"))
    assert place.main("--save_rounds", 1, "--checkpoint_seconds", 1e6) == 0
    place.unfinish(3)
    return place


@pytest.fixture
def unfinished(stopped, place):
    """The same, for one test to harm."""
    return place.holding(stopped)


MARK = f"{tempfile.gettempdir()}/a-checkpoint-ran-code-{os.getpid()}"


class Bomb:
    def __reduce__(self):
        return os.mkdir, (MARK,)


def put(*keys_and_value):
    """A function that changes one value of a checkpoint's file; a tensor's, all of its entries."""
    *keys, last, value = keys_and_value

    def harm(path):
        found = place = load_checked(path)
        for key in keys:
            place = place[key]
        is_number = isinstance(place[last], torch.Tensor) and isinstance(value, float)
        place[last] = torch.full_like(place[last], value) if is_number else value
        torch.save(found, path)
    return harm


NAN, WEIGHT = float("nan"), "classifier.output.weight"


@pytest.mark.parametrize("name, harm", [
    ("client_1.pt", os.remove), ("shared.pt", lambda path: path.write_bytes(path.read_bytes()[:-100])),
    ("server.pt", lambda path: torch.save({"anything": torch.zeros(3)}, path)),
    ("client_1.pt", lambda path: path.write_bytes(pickle.dumps(Bomb()))),
    ("server.pt", lambda path: torch.save({"parameters": Bomb(), "steps": 1}, path)),
    ("client_1.pt", put("parameters", "encoder.mu.bias", NAN)), ("client_0.pt", put("steps", -1)),
    ("client_0.pt", put("parameters", "encoder.mu.weight", torch.zeros(3))),
    ("server.pt", put("head", WEIGHT, np.inf)), ("server.pt", put("round", 2)),
    ("server.pt", put("csv_bytes", {})), ("server.pt", put("csv_bytes", "rounds.csv", -1)),
    ("server.pt", put("csv_bytes", "rounds.csv", 10**30)), ("server.pt", put("memory", {})),
    ("server.pt", put("memory", "trust", torch.full((2,), NAN))),
    ("shared.pt", put("sent", WEIGHT, NAN)), ("shared.pt", put("uploads", 0, WEIGHT, torch.zeros(3))),
    ("shared.pt", put("uploads", {7: {}}))])
def test_a_checkpoint_that_no_run_writes_is_refused(unfinished, capsys, name, harm):
    """Torn, foreign, or with other values; and no code in it is run."""
    harm(unfinished.models / "round_1" / name)
    line = unfinished.refuses_and_keeps(capsys, "--save_rounds", 1, "--resume")
    assert ("round_1" in line or ".csv" in line) and "--overwrite" in line
    assert not os.path.exists(MARK)


@pytest.mark.parametrize("flags, named", [
    (["--dataset", "nothing"], "nothing.npz"), (["--num_users", 200], "--num_users"),
    (["--classes_per_client", 5], "--classes_per_client"), (["--device", "cuda:99"], "--device"),
    (["--num_users", 100, "--validate", "--partition", "iid"], "100 --validate"),
    (["--encoders_from", "tpyo"], "no finished run")])
def test_bad_input_leaves_nothing_behind(place, capsys, flags, named):
    assert named in place.refuses(capsys, *flags)
    assert not place.results.exists() and not place.models.exists()


def limit_files(size):
    """Return a function that limits the files of a process to ``size`` bytes: a full disk, for one process."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


@pytest.mark.slow
def test_a_full_disk_during_a_checkpoint_keeps_the_last_one(place):
    flags = ("--checkpoint_seconds", 0)
    assert place.main("--save_rounds", 1, *flags) == 0
    expected = place.clients_csv()
    size = (place.models / "round_1" / "client_0.pt").stat().st_size
    process = place.start(*flags, "--overwrite", preexec_fn=limit_files(size // 2))
    _, err = process.communicate(timeout=120)
    said = [line for line in err.splitlines() if "error" in line]
    assert process.returncode == 2 and len(said) == 1 and "Traceback" not in err, err
    assert not list(place.models.glob("round_*")) and not list(place.folder.rglob("*.tmp"))
    assert place.main(*flags, "--resume") == 0
    assert place.clients_csv() == expected


def test_a_client_that_diverges_is_left_out_and_the_others_go_on(place, driver, capsys, monkeypatch):
    train = setup.Trainer.train

    def broken(self, client, round, indices, sent, private):
        if (client, round) == (1, 2):
            self = dataclasses.replace(self, training=dataclasses.replace(self.training, lr=1000.0, epochs=5))
        return train(self, client, round, indices, sent, private)
    monkeypatch.setattr(setup.Trainer, "train", broken)
    assert place.main("--aggregation", "mean") == 0
    assert "client 1, round 2" in capsys.readouterr().err
    steps = [place.saved(3, f"client_{k}.pt")["steps"] for k in (0, 1)]
    assert steps[1] == steps[0] * 2 / 3   # its own encoder went on from the round before
    server = pd.read_csv(place.results / "server.csv").set_index(["round", "client"])
    assert server.loc[(2, 1), "weight"] == 0 and server.loc[(2, 0), "weight"] == 1
    clients = pd.read_csv(place.results / "clients.csv")
    assert clients.query("round == 2 and client == 1")["stage"].tolist() == ["deployed"]
    assert np.isfinite(clients["loss"]).all() and clients["round"].max() == 3


def test_when_every_client_diverges_the_run_stops(place, capsys):
    assert place.main("--lr", 1000, "--local_ep", 5) == 2
    err = capsys.readouterr().err
    assert "client 0, round 1" in err and "smaller --lr" in err
    assert place.clients_csv() == (",".join(csv_columns(4)["clients.csv"]) + "\n").encode()


def test_heads_are_trained_on_borrowed_encoders_of_the_same_deal(place, capsys):
    """Under Dirichlet the batch size decides the deal; with rve_pfl_trunk no client has a whole encoder."""
    deal = ("--partition", "dirichlet", "--alpha", 1, "--rounds", 1)
    borrow = ("--encoders_from", "run", "--run_name")
    assert place.main(*deal) == 0
    assert place.main(*deal, *borrow, "heads") == 0
    heads = place.folder / "models" / "heads"
    for k in (0, 1):
        before, after = (torch.load(folder / "round_1" / f"client_{k}.pt", weights_only=True)["parameters"]
                         for folder in (place.models, heads))
        assert all(torch.equal(value, after[name]) for name, value in before.items())
    for flags, reason in ((("--seed", 9), "--encoders_from run: its --seed is 1"),
                          (("--local_bs", 16), "its --local_bs is 32"),
                          (("--test_share", 0.2), "its --test_share is 0.1"),
                          (("--new_clients", 0.5), "its --new_clients is 0"),
                          (("--method", "rve_pfl_trunk"), "--encoders_from")):
        assert reason in place.refuses(capsys, *deal, *borrow, "other", *flags)
    config = place.results / "config.json"
    config.write_text(config.read_text().replace('"finished"', '"unfinished"'))
    assert "not finished" in place.refuses(capsys, *deal, *borrow, "fourth")
