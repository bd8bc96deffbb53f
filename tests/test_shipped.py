"""The run that ships with the project: client 0 of the run of ``make run``, packed to one megabyte."""
import numpy as np
import pytest
import torch
from conftest import ROOT

from attack import mi_attack, shipped
from attack.observations import Victim
from attack.target import open_target
from runs.checkpoints import load_checked


@pytest.fixture
def home(tmp_path, monkeypatch):
    """Return a folder for ``shipped`` to write to, with the data."""
    (tmp_path / "data").symlink_to(ROOT / "data")
    monkeypatch.setattr(shipped, "ROOT", tmp_path)
    return tmp_path


def test_its_client_is_accurate(home):
    assert shipped.main([]) == 0
    target = open_target("shipped", home / "results", home / "saved_models", home / "data")
    test = target.owned()[1][shipped.VICTIM]
    answers = Victim(target, target.latest_round(), shipped.VICTIM).answers(target.pixels(test), 8, 10)
    assert (answers.argmax(1) == target.labels(test)).double().mean() > 0.96
    assert not any(str(ROOT) in text or "/work/" in text for text in load_checked(shipped.FILE)["tables"].values())


@pytest.mark.slow
def test_it_can_be_attacked(home, capsys):
    places = [f"--{name}={home / folder}" for name, folder in zip(
        ("data_dir", "results_dir", "models_dir"), ("data", "results", "saved_models"), strict=True)]
    assert shipped.main([]) == 0
    assert mi_attack.main(["--run", "shipped", "--adversary", "stolen_model", "--attack", "reidentification",
                           "--observe", "z", "--images", "20", "--train_epochs", "1", *places]) == 0
    assert "20/20 (" in capsys.readouterr().out


def test_another_run_of_its_name_stays(home, capsys):
    config = home / "results" / "shipped" / "config.json"
    config.parent.mkdir(parents=True)
    config.write_text("{}")
    assert shipped.main([]) == 2 and "is another run; move it away" in capsys.readouterr().err
    assert config.read_text() == "{}" and [*config.parent.iterdir()] == [config]


def test_a_start_that_the_seed_does_not_give_is_refused(home, capsys, monkeypatch):
    content = load_checked(shipped.FILE)
    content["config"] = content["config"].replace('"seed": 1,', '"seed": 2,')
    monkeypatch.setattr(shipped, "load_checked", lambda path: content)
    assert shipped.main([]) == 2 and "began with other weights" in capsys.readouterr().err
    assert not (home / "saved_models").exists()


def test_changes_of_low_rank_survive():
    draw = torch.Generator().manual_seed(0)
    start = {"large": torch.randn(300, 200, generator=draw), "small": torch.randn(4, 3, generator=draw)}
    low = torch.randn(300, shipped.RANK, generator=draw) @ torch.randn(shipped.RANK, 200, generator=draw)
    state = {"large": start["large"] + low, "small": start["small"] + 1}
    packed = shipped.compressed(state, start)
    assert [part.shape for part in packed["large"]] == [(300, shipped.RANK), (shipped.RANK, 200)]
    for name, value in shipped.restored(packed, start).items():
        np.testing.assert_allclose(value, state[name], atol=0.02)
