"""`make verify`: what it takes for the same figures, and what it says."""
import dataclasses
import importlib
import json
import re

import pandas as pd
import pytest
import torch
from conftest import ROOT


@pytest.fixture
def verify(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("verify")


@pytest.fixture
def rounds(verify):
    """rounds.csv of the committed run."""
    return pd.read_csv(ROOT / "results" / "reference" / verify.RUN / "rounds.csv")


def changed(rounds, stage, split, number, column, value):
    """A copy with one figure changed, by a function of it."""
    found = rounds.copy()
    row = (found["stage"] == stage) & (found["split"] == split) & (found["round"] == number)
    assert row.sum() == 1
    found.loc[row, column] = value(found.loc[row, column])
    return found


@pytest.mark.parametrize("stage, split, number, column, value, said", [
    ("deployed", "test", 5, "accuracy", lambda x: x - 0.0099, []),
    ("deployed", "test", 5, "accuracy", lambda x: x - 0.0101, ["round 5: deployed accuracy 0.9820, not 0.9921"]),
    ("deployed", "test", 2, "accuracy", lambda x: x + 0.02, ["round 2: deployed accuracy 0.9885, not 0.9685"]),
    ("deployed", "test", 5, "accuracy", lambda x: float("nan"), ["round 5: deployed accuracy nan"]),
    ("deployed", "test", 4, "kl_nats", lambda x: 1.09 * x, []),
    ("deployed", "test", 4, "kl_nats", lambda x: 0.89 * x, ["round 4: KL 2449 nats, not 2751 within 10%"]),
    ("trained", "test", 5, "accuracy", lambda x: x / 2, []),
    ("trained", "train", 5, "accuracy", lambda x: x / 2, []),
    ("deployed", "test", 5, "round", lambda x: 6, ["rounds 1, 2, 3, 4, 6 instead of 1, 2, 3, 4, 5"])])
def test_differences(verify, rounds, stage, split, number, column, value, said):
    found = verify.differences(changed(rounds, stage, split, number, column, value), rounds)
    assert len(found) == len(said) and all(line.startswith(start) for line, start in zip(found, said, strict=True))


def test_no_rounds_at_all(verify, rounds):
    assert verify.differences(rounds[:0], rounds) == ["rounds none instead of 1, 2, 3, 4, 5"]


def test_it_runs_what_make_run_runs(verify):
    command, = re.findall(r"^run:.*\n\t\S+ RVE-PFL.py (.*)$", (ROOT / "Makefile").read_text(), re.M)
    assert command == verify.COMMAND
    for precision, name in verify.REFERENCES.items():
        options = verify.finished(ROOT / "results" / "reference" / name).options
        assert (options["dataset"], options["rounds"], options["local_ep"]) == ("mnist10k", 5, 2)
        config = json.loads((ROOT / "results" / "reference" / name / "config.json").read_text())
        assert config["precision"] == str(precision)


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("factor, status, said", [(1, 0, "verified: "), (0.5, 1, "differs: round 1: KL")])
def test_what_it_says_and_how_it_ends(verify, monkeypatch, capsys, precision, factor, status, said):
    """It compares with the run of the chip's precision."""
    monkeypatch.setattr(verify, "choose_precision", lambda name, device: precision)
    reference = verify.finished(ROOT / "results" / "reference" / verify.REFERENCES[precision])
    rounds = reference.rounds
    monkeypatch.setattr(verify.report, "main", lambda argv: 0)
    ours = dataclasses.replace(reference, rounds=rounds.assign(kl_nats=factor * rounds["kl_nats"]))
    monkeypatch.setattr(verify, "again", lambda folder: ours)
    assert verify.main([]) == status
    assert any(line.startswith(said) for line in capsys.readouterr().out.splitlines())


def test_stale_pages_end_it_before_it_trains(verify, monkeypatch):
    monkeypatch.setattr(verify.report, "main", lambda argv: 1)
    monkeypatch.setattr(verify, "again", lambda folder: pytest.fail("it trained"))
    assert verify.main([]) == 1


def test_no_reference_is_one_line(verify, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        verify.main(["--reference", str(tmp_path)])
    assert stop.value.code == 2
    line, = capsys.readouterr().err.splitlines()
    assert line.startswith("verify.py: error: ") and "no config.json" in line
