"""Going on with a run: for more rounds, by its name alone, on other data or in another environment."""
import json
import shutil

import numpy as np
import pandas as pd
import pytest

from runs import resume, setup

FLAGS = ("--method", "fedavg", "--rounds", 2)


@pytest.fixture(scope="module")
def once(tmp_path_factory, make_place):
    """A run of FLAGS."""
    place = make_place(tmp_path_factory.mktemp("once"))
    assert place.main(*FLAGS) == 0
    return place


@pytest.fixture
def finished(once, place):
    """The same, for one test to harm; its options say other folders, which may differ."""
    return place.holding(once)


def change(place, **changes):
    """Write other things into config.json."""
    (place.results / "config.json").write_text(json.dumps({**place.config, **changes}))


def test_a_run_goes_on_for_more_rounds_to_the_same_bytes_but_for_none_fewer(finished, capsys):
    change(finished, status="unfinished")
    assert "--rounds 2, not 1" in finished.refuses_and_keeps(capsys, *FLAGS, "--rounds", 1, "--resume")
    assert finished.main(*FLAGS, "--rounds", 4, "--resume") == 0   # an unfinished run, and then a finished one
    assert finished.main(*FLAGS, "--rounds", 6, "--resume") == 0
    longer, config = finished.clients_csv(), finished.config
    assert config["status"] == "finished" and config["options"]["rounds"] == 6 and "resumed" not in config
    assert {path.name for path in finished.models.glob("round_*")} == {"round_6"}
    assert finished.main(*FLAGS, "--rounds", 6, "--overwrite") == 0
    assert finished.clients_csv() == longer


@pytest.mark.parametrize("name, harm, reason", [
    ("server.csv", lambda path: path.unlink(), "is shorter than"),
    ("rounds.csv", lambda path: path.write_bytes(path.read_bytes()[:-9]), "is shorter than"),
    ("server.csv", lambda path: path.write_bytes(b"x" + path.read_bytes()), "is not as it was saved")])
def test_a_damaged_csv_is_refused_before_another_is_cut(finished, capsys, name, harm, reason):
    with open(finished.results / "clients.csv", "a", encoding="utf-8") as file:
        file.write("written after the checkpoint\n")
    harm(finished.results / name)
    assert reason in finished.refuses_and_keeps(capsys, *FLAGS, "--rounds", 4, "--resume")


@pytest.mark.parametrize("value", [5, [{}], [{"from_round": "x"}]])
def test_damaged_environments_are_refused(finished, capsys, value):
    change(finished, resumed=value)
    assert "its resumed is no list" in finished.refuses_and_keeps(capsys, *FLAGS, "--rounds", 4, "--resume")


def test_a_run_that_is_not_there_is_started_with_a_note(place, capsys):
    assert place.main(*FLAGS, "--resume") == 0
    assert "note: there is no run run to resume" in capsys.readouterr().err
    assert place.main(*FLAGS, "--resume") == 0
    assert "note" not in capsys.readouterr().err


def test_evaluations_change_no_round(finished):
    always = pd.read_csv(finished.results / "clients.csv")
    assert finished.main(*FLAGS, "--eval_every", 2, "--overwrite") == 0
    seldom = pd.read_csv(finished.results / "clients.csv")
    pd.testing.assert_frame_equal(seldom, always[always["round"] == 2].reset_index(drop=True))


def test_more_rounds_are_refused_where_they_cannot_be_had(finished, place, capsys):
    shutil.rmtree(finished.models / "round_2")
    assert "no checkpoint" in finished.refuses_and_keeps(capsys, *FLAGS, "--rounds", 3, "--resume")
    assert finished.main(*FLAGS, "--resume") == 0   # there is nothing to do
    flags = ("--method", "nbafl", "--rounds", 1)
    assert place.main(*flags, "--overwrite") == 0
    line = place.refuses_and_keeps(capsys, *flags, "--rounds", 2, "--resume")
    assert "--rounds 2: the noise" in line and "which was 1" in line


def test_the_name_alone_brings_back_every_option(place, driver, capsys):
    flags = ("--method", "rve_pfl", "--prior", "class", "--prior_apart", 0.2, "--kl_weight", 0.1, "--kl_warmup", 2,
             "--aggregation", "trimmed_mean", "--tolerate", 0.1, "--partition", "dirichlet", "--alpha", 0.7,
             "--lr", 0.002, "--optimizer", "sgd", "--momentum", 0.5, "--save_rounds", 1, "--num_users", 3,
             "--unequal")
    assert place.main(*flags, "--rounds", 1) == 0
    before, csv = place.config["options"], place.clients_csv()
    name = ("--run_name", "run", "--results_dir", str(place.folder / "results"), "--resume")
    assert driver.main(list(name)) == 0 and place.clients_csv() == csv
    assert driver.main([*name, "--rounds", "2"]) == 0
    after = place.config["options"]
    assert {key for key in before if before[key] != after[key]} == {"resume", "rounds"}
    capsys.readouterr()
    for given in (("--lr", "0.1"), ("--method", "fedavg"), ("--kl_weight", "0.2"), ("--seed", "3")):
        with pytest.raises(SystemExit, match="2"):
            driver.main([*name, *given])
        line, = capsys.readouterr().err.splitlines()
        assert f"--resume: run run was started with {given[0]} " in line and line.endswith("another --run_name")


def test_a_preset_is_resumed_with_the_flags_that_override_it_and_has_a_best_round(place, driver, capsys):
    flags = ("--preset", "pfllib", "--method", "fedavg", "--lr", 0.01)
    assert place.main(*flags, "--rounds", 1) == 0
    stored = place.config["options"]
    assert (stored["lr"], stored["lr_decay"], stored["test_share"], stored["num_users"]) == (0.01, 0, 0.25, 2)
    name = ["--run_name", "run", "--results_dir", str(place.folder / "results"), "--resume"]
    assert driver.main([*name, "--rounds", "2"]) == 0   # by its name, and then as it was started
    assert place.config["options"] == {**stored, "resume": True, "rounds": 2}
    rounds = pd.read_csv(place.results / "rounds.csv")
    rounds.assign(accuracy_images=[0.97, 0.98, 0.75, 0.96, 0.99, 0.5]).to_csv(
        place.results / "rounds.csv", index=False)   # deployed: 0.75, then 0.5
    capsys.readouterr()
    assert place.main(*flags, "--rounds", 2, "--resume") == 0
    assert "\nbest:        0.7500 of all images, in round 1: optimistic, " in capsys.readouterr().out


@pytest.mark.parametrize("part", ["train_images", "train_labels"])
def test_other_data_of_the_same_name_is_refused(finished, tiny_arrays, capsys, part):
    path = finished.folder / "data" / "tiny.npz"
    other = {name: values.copy() for name, values in tiny_arrays.items()}
    other[part][[0, 1]] = other[part][[1, 0]]   # two images, or two labels, in each other's place
    assert not np.array_equal(other[part], tiny_arrays[part])
    np.savez(path, **other)
    line = finished.refuses_and_keeps(capsys, *FLAGS, "--rounds", 3, "--resume")
    assert str(path) in line and "put them back" in line
    np.savez_compressed(path, **tiny_arrays)   # the same arrays in another file
    assert finished.main(*FLAGS, "--rounds", 3, "--resume") == 0


def test_other_clients_or_weights_are_refused(finished, driver, capsys, monkeypatch):
    """Another NumPy or PyTorch may draw otherwise."""
    with monkeypatch.context() as patch:
        partition = setup.partition
        patch.setattr(setup, "partition", lambda *given: [part[::-1] for part in partition(*given)])
        assert "dealt to clients otherwise" in finished.refuses_and_keeps(capsys, *FLAGS, "--resume")
    monkeypatch.setattr(setup, "fingerprint", lambda state: "other")
    assert "weights are drawn otherwise" in finished.refuses_and_keeps(capsys, *FLAGS, "--resume")


def environment_of(entry):
    return {name: entry[name] for name in resume.ENVIRONMENT}


def test_each_environment_is_kept_with_its_first_round_and_warned_of(finished, driver, capsys, monkeypatch):
    first = environment_of(finished.config)
    option, other = ("fp32", "float32") if first["precision"] == "torch.bfloat16" else ("bf16", "bfloat16")
    assert finished.main(*FLAGS, "--rounds", 4, "--precision", option, "--resume") == 0
    warning, = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert f"precision torch.{other} instead of {first['precision']}; from round 3 on" in warning
    config, second = finished.config, {"from_round": 3, **first, "precision": f"torch.{other}"}
    assert environment_of(config) == first and config["resumed"] == [second]
    monkeypatch.setattr(setup, "environment", lambda device: {
        name: first[name] for name in first if name not in ("processes", "precision")} | {"torch": "9.9"})
    assert finished.main(*FLAGS, "--rounds", 5, "--precision", option, "--resume") == 0
    assert f"torch 9.9 instead of {first['torch']}; from round 5 on" in capsys.readouterr().err
    assert finished.config["resumed"] == [second, {**second, "from_round": 5, "torch": "9.9"}]
