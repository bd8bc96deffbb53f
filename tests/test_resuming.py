"""Going on with a run: for more rounds, by its name alone, on other data or in another environment."""
import json
import shutil

import numpy as np
import pandas as pd
import pytest

from runs import resuming

FLAGS = ("--method", "fedavg", "--rounds", 2)


@pytest.fixture
def finished(place):
    """A run of FLAGS."""
    assert place.main(*FLAGS) == 0
    return place


def config_of(place):
    return json.loads((place.results / "config.json").read_text())


def change(place, **changes):
    """Write other things into config.json."""
    (place.results / "config.json").write_text(json.dumps({**config_of(place), **changes}))


def refuses_and_keeps(place, capsys, *flags):
    """Refuse with one line, and leave all files as they are."""
    def files():
        return {path: path.read_bytes() for folder in (place.results, place.models) for path in folder.rglob("*")
                if path.is_file()}
    before = files()
    line = place.refuses(capsys, *flags)
    assert files() == before
    return line


def test_a_finished_run_goes_on_for_more_rounds_to_the_same_bytes(finished):
    """As a run of four that was never interrupted; its name says all the rest."""
    assert finished.main(*FLAGS, "--rounds", 4, "--resume") == 0
    longer, config = finished.clients_csv(), config_of(finished)
    assert config["status"] == "finished" and config["options"]["rounds"] == 4 and "resumed" not in config
    assert (finished.models / "round_4").exists() and not (finished.models / "round_2").exists()
    assert finished.main(*FLAGS, "--rounds", 4, "--overwrite") == 0
    assert finished.clients_csv() == longer


def test_an_unfinished_run_may_be_given_more_rounds_but_none_fewer(finished, capsys):
    change(finished, status="unfinished")
    assert "--rounds 2, not 1" in refuses_and_keeps(finished, capsys, *FLAGS, "--rounds", 1, "--resume")
    assert finished.main(*FLAGS, "--rounds", 3, "--resume") == 0
    assert set(pd.read_csv(finished.results / "rounds.csv")["round"]) == {1, 2, 3}


@pytest.mark.parametrize("flags", [("nbafl",), ("client_dp", "--epsilon", 100)])
def test_more_rounds_are_refused_where_the_noise_was_made_for_fewer(place, capsys, flags):
    flags = ("--method", *flags, "--rounds", 1)
    assert place.main(*flags) == 0
    line = refuses_and_keeps(place, capsys, *flags, "--rounds", 2, "--resume")
    assert "--rounds 2: the noise" in line and "which was 1" in line
    assert place.main(*flags, "--resume") == 0


def test_a_run_whose_last_checkpoint_is_gone_is_not_begun_again(finished, capsys):
    shutil.rmtree(finished.models / "round_2")
    assert "no checkpoint" in refuses_and_keeps(finished, capsys, *FLAGS, "--rounds", 3, "--resume")
    assert finished.main(*FLAGS, "--resume") == 0   # there is nothing to do


def test_other_evaluations_change_no_round(finished):
    """Of rounds 3 to 6 the even ones; what is trained in them is what it is without."""
    assert finished.main(*FLAGS, "--rounds", 6, "--eval_every", 2, "--resume") == 0
    seldom = pd.read_csv(finished.results / "clients.csv")
    assert finished.main(*FLAGS, "--rounds", 6, "--overwrite") == 0
    always = pd.read_csv(finished.results / "clients.csv")
    assert set(seldom["round"]) == {1, 2, 4, 6} < set(always["round"])
    pd.testing.assert_frame_equal(seldom, always[always["round"].isin(seldom["round"])].reset_index(drop=True))


def test_the_name_alone_brings_back_every_option(place, driver, capsys):
    """Those of the method, of the rule and of the partition, which have no default that --resume could know."""
    flags = ("--method", "rve_pfl", "--prior", "class", "--prior_apart", 0.2, "--kl_weight", 0.1, "--kl_warmup", 2,
             "--aggregation", "trimmed_mean", "--tolerate", 0.1, "--partition", "dirichlet", "--alpha", 0.7,
             "--lr", 0.002, "--optimizer", "sgd", "--momentum", 0.5, "--save_rounds", 1, "--num_users", 3,
             "--unequal")
    assert place.main(*flags, "--rounds", 1) == 0
    before, csv = config_of(place)["options"], place.clients_csv()
    name = ("--run_name", "run", "--results_dir", str(place.folder / "results"), "--resume")
    assert driver.main(list(name)) == 0 and place.clients_csv() == csv
    assert driver.main([*name, "--rounds", "2"]) == 0
    after = config_of(place)["options"]
    assert {key for key in before if before[key] != after[key]} == {"resume", "rounds"}
    capsys.readouterr()
    for given in (("--lr", "0.1"), ("--method", "fedavg"), ("--kl_weight", "0.2"), ("--seed", "3")):
        with pytest.raises(SystemExit, match="2"):
            driver.main([*name, *given])
        line, = capsys.readouterr().err.splitlines()
        assert f"--resume: run run was started with {given[0]} " in line and line.endswith("another --run_name")


def test_another_name_of_the_data_set_is_no_other_data_set(finished, driver, monkeypatch):
    monkeypatch.setattr(resuming.datasets, "canonical", lambda name, folder: name.lower())
    assert finished.main(*FLAGS, "--dataset", "TINY", "--resume") == 0


def test_without_such_a_run_the_command_line_is_all_there_is(place):
    assert place.main(*FLAGS, "--resume") == 0 and config_of(place)["options"]["method"] == "fedavg"


@pytest.mark.parametrize("part", ["train_images", "train_labels"])
def test_other_data_of_the_same_name_is_refused(finished, tiny_arrays, capsys, part):
    path = finished.folder / "data" / "tiny.npz"
    other = {name: values.copy() for name, values in tiny_arrays.items()}
    other[part][[0, 1]] = other[part][[1, 0]]   # two images, or two labels, in each other's place
    assert not np.array_equal(other[part], tiny_arrays[part])
    np.savez(path, **other)
    change(finished, status="unfinished")
    line = refuses_and_keeps(finished, capsys, *FLAGS, "--rounds", 3, "--resume")
    assert str(path) in line and "put them back" in line
    np.savez_compressed(path, **tiny_arrays)   # the same arrays in another file
    assert finished.main(*FLAGS, "--rounds", 3, "--resume") == 0


def test_images_that_are_dealt_otherwise_are_refused(finished, driver, capsys, monkeypatch):
    """As by a NumPy whose generator draws otherwise."""
    deal = driver.deal

    def otherwise(args, data):
        owned, splits = deal(args, data)
        return owned[::-1], splits[::-1]
    monkeypatch.setattr(driver, "deal", otherwise)
    assert "dealt to clients otherwise" in refuses_and_keeps(finished, capsys, *FLAGS, "--resume", "--rounds", 3)


def environment_of(entry):
    return {name: entry[name] for name in resuming.ENVIRONMENT}


def test_each_environment_is_kept_with_its_first_round_and_warned_of(finished, driver, capsys, monkeypatch):
    first = environment_of(config_of(finished))
    assert finished.main(*FLAGS, "--rounds", 3, "--resume") == 0   # the same: nothing is said
    assert "warning" not in capsys.readouterr().err and "resumed" not in config_of(finished)
    option, other = ("fp32", "float32") if first["precision"] == "torch.bfloat16" else ("bf16", "bfloat16")
    assert finished.main(*FLAGS, "--rounds", 4, "--precision", option, "--resume") == 0
    said, = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert f"precision torch.{other} instead of {first['precision']}; from round 4 on" in said
    config, second = config_of(finished), {"from_round": 4, **first, "precision": f"torch.{other}"}
    assert environment_of(config) == first and config["resumed"] == [second]
    monkeypatch.setattr(driver, "environment", lambda device: {
        name: first[name] for name in first if name not in ("processes", "precision")} | {"torch": "9.9"})
    assert finished.main(*FLAGS, "--rounds", 5, "--precision", option, "--resume") == 0
    assert f"torch 9.9 instead of {first['torch']}; from round 5 on" in capsys.readouterr().err
    config = config_of(finished)
    assert environment_of(config) == first and config["options"]["rounds"] == 5
    assert config["resumed"] == [second, {**second, "from_round": 5, "torch": "9.9"}]


@pytest.mark.parametrize("changed, warned", [
    ({}, False), ({"system": "other", "python": "4", "processes": 3}, False), ({"torch": "9"}, True),
    ({"numpy": "9"}, True), ({"commit": "abc"}, True), ({"device": "CPU, 9 threads, AVX2"}, True),
    ({"precision": "torch.bfloat16"}, True)])
def test_what_can_change_a_number_is_warned_of(changed, warned):
    here = dict.fromkeys(resuming.ENVIRONMENT, "a")
    config = {**here, **changed}
    past = resuming.environments(here)
    assert bool(resuming.note_environment(config, past, 3)) == warned
    assert config.get("resumed") == ([{"from_round": 4, **here, **changed}] if warned else None)
    assert environment_of(config) == here


def test_an_environment_whose_rounds_are_computed_again_is_forgotten():
    """Killed before its first checkpoint: the run goes on from round 3 where it was, not from 5 or 6."""
    here = dict.fromkeys(resuming.ENVIRONMENT, "a")
    past = [{"from_round": 1, **here}, {"from_round": 3, **here, "torch": "b"},
            {"from_round": 5, **here, "torch": "c"}]
    config = {**here, "torch": "b"}
    assert resuming.note_environment(config, past, 4) is None
    assert config == {**here, "resumed": past[1:2]}
    config = dict(here)
    assert "torch a instead of b; from round 4 on" in resuming.note_environment(config, past, 3)
    assert config["resumed"] == [past[1], {"from_round": 4, **here}]
    config = {**here, "torch": "d"}
    assert resuming.note_environment(config, past, 0) is None   # nothing is left of it: it begins here
    assert config == {**here, "torch": "d"}


@pytest.mark.parametrize("resumed", [3, "later", [3], [{"from_round": "x"}], [{}]])
def test_a_damaged_list_of_environments_is_no_traceback(finished, resumed):
    change(finished, resumed=resumed)
    assert finished.main(*FLAGS, "--rounds", 3, "--resume") == 0
    assert "resumed" not in config_of(finished)
