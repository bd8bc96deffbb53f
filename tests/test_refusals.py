"""What must be refused, each with one line, and what must then still be whole."""
import dataclasses
import fcntl
import os
import pickle
import resource

import numpy as np
import pandas as pd
import pytest
import torch

from runs import checkpoints as checkpoint
from runs.checkpoints import load_checked
from runs.run import csv_columns
from utils import write_whole


def test_an_earlier_run_is_never_lost_by_accident(place, capsys):
    assert place.main("--rounds", 1) == 0
    before = place.clients_csv()
    assert "--overwrite" in place.refuses(capsys, "--rounds", 1)
    assert "--lr" in place.refuses(capsys, "--rounds", 1, "--resume", "--lr", 0.1)
    config = place.results / "config.json"
    config.write_text(config.read_text().replace('"finished"', '"unfinished"'))
    line = place.refuses(capsys, "--rounds", 1)
    assert "--resume" in line and "--overwrite" in line
    whole = config.read_text()
    config.write_text("{")
    assert "config.json" in place.refuses(capsys, "--rounds", 1, "--resume")
    assert place.clients_csv() == before
    config.write_text(whole)
    assert place.main("--rounds", 2, "--overwrite") == 0
    assert place.clients_csv() != before


def test_a_second_run_of_the_same_name_is_refused(place, capsys):
    place.results.mkdir(parents=True)
    with open(place.results / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "another process" in place.refuses(capsys)
        assert "another process" in place.refuses(capsys, "--overwrite")
    assert place.main() == 0


def contents(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_two_runs_that_share_checkpoints_alone_are_refused_too(place, capsys):
    assert place.main("--rounds", 1) == 0
    before = contents(place.models)
    with open(place.models / ".lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for flag in ([], ["--overwrite"], ["--resume"]):
            line = place.refuses(capsys, "--rounds", 1, "--results_dir", place.folder / "other", *flag)
            assert "another process" in line and str(place.models) in line
    assert contents(place.models) == before


def test_checkpoints_of_a_run_elsewhere_are_neither_deleted_nor_taken_up(place, capsys):
    assert place.main("--rounds", 1) == 0
    before, other = contents(place.models), place.folder / "other"
    line = place.refuses(capsys, "--rounds", 1, "--results_dir", other)
    assert str(place.results) in line and "--overwrite" in line
    assert contents(place.models) == before
    assert place.main("--rounds", 1, "--results_dir", other, "--overwrite") == 0   # they are its own from now
    before = contents(place.models)
    config = place.results / "config.json"
    config.write_text(config.read_text().replace('"finished"', '"unfinished"'))
    assert str(other / "run") in place.refuses(capsys, "--rounds", 1, "--resume")
    assert contents(place.models) == before


def test_both_folders_of_a_run_may_be_copied_to_another_place(unfinished, capsys):
    """As the fixture does; the first place still stands."""
    assert unfinished.main("--save_rounds", 1, "--resume") == 0
    assert {p.name for p in unfinished.models.iterdir()} == {".lock", "round_1", "round_3"}


@pytest.mark.parametrize("name", ["round_3", ".round_3", ".private"])
def test_what_nobody_says_is_ours_is_not_deleted(place, capsys, name):
    (place.models / name).mkdir(parents=True)
    (place.models / name / "thesis.tex").write_text("years of work")
    for flags in ([], ["--overwrite"], ["--resume"]):
        line = place.refuses(capsys, "--rounds", 1, *flags)
        assert f"{name}/thesis.tex" in line and "--overwrite" not in line
    assert (place.models / name / "thesis.tex").exists()


@pytest.mark.parametrize("which", ["results", "models", "results/run", "models/run"])
def test_a_link_to_nowhere_is_refused(place, capsys, which):
    link = place.folder / which
    link.parent.mkdir(exist_ok=True)
    link.symlink_to(place.folder / "gone")
    line = place.refuses(capsys, "--rounds", 1)
    assert f"{link} is a link to {place.folder / 'gone'}" in line and link.is_symlink()


def test_foreign_folders_are_left_alone(place, capsys):
    place.results.mkdir(parents=True)
    (place.results / "thesis.tex").write_text("years of work")
    for flag in ([], ["--overwrite"], ["--resume"]):
        assert "thesis.tex" in place.refuses(capsys, *flag)
    assert (place.results / "thesis.tex").read_text() == "years of work"


def test_checkpoints_without_results_are_not_taken_up(place, capsys):
    assert place.main("--rounds", 1) == 0
    checkpoint.shutil.rmtree(place.results)
    assert "--overwrite" in place.refuses(capsys, "--rounds", 1)
    assert place.main("--rounds", 1, "--overwrite") == 0


@pytest.fixture(scope="module")
def stopped(tmp_path_factory, make_place):
    """A run of three rounds, of which two are left to do."""
    place = make_place(tmp_path_factory.mktemp("stopped"))
    assert place.main("--save_rounds", 1, "--checkpoint_seconds", 1e6) == 0
    config = place.results / "config.json"
    config.write_text(config.read_text().replace('"finished"', '"unfinished"'))
    checkpoint.shutil.rmtree(place.models / "round_3")
    return place


@pytest.fixture
def unfinished(stopped, place):
    """The same, for one test to harm."""
    for name in ("results", "models"):
        checkpoint.shutil.copytree(stopped.folder / name, place.folder / name)
    return place


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("/tmp/a-checkpoint-ran-code",)


def torn(path):
    path.write_bytes(path.read_bytes()[:-100])


def foreign(path):
    torch.save({"anything": torch.zeros(3)}, path)


def pickled(path):
    path.write_bytes(pickle.dumps(Bomb()))


def zipped_pickle(path):
    torch.save({"parameters": Bomb(), "steps": 1}, path)


@pytest.mark.parametrize("name", ["shared.pt", "server.pt", "client_1.pt"])
@pytest.mark.parametrize("damage", [torn, foreign, pickled, zipped_pickle, os.remove])
def test_a_damaged_or_foreign_checkpoint_is_refused(unfinished, capsys, name, damage):
    damage(unfinished.models / "round_1" / name)
    line = unfinished.refuses(capsys, "--save_rounds", 1, "--resume")
    assert "round_1" in line
    assert not os.path.exists("/tmp/a-checkpoint-ran-code")


def test_a_checkpoint_of_another_network_is_refused(unfinished, capsys):
    path = unfinished.models / "round_1" / "client_0.pt"
    found = load_checked(path)
    found["parameters"]["encoder.mu.weight"] = found["parameters"]["encoder.mu.weight"][:, :5].clone()
    torch.save(found, path)
    assert "client_0.pt" in unfinished.refuses(capsys, "--save_rounds", 1, "--resume")


def put(path, *keys_and_value):
    """Change one value of a checkpoint's file; a tensor's, all of its entries."""
    *keys, last, value = keys_and_value
    found = place = load_checked(path)
    for key in keys:
        place = place[key]
    if isinstance(place[last], torch.Tensor) and isinstance(value, float):
        value = torch.full_like(place[last], value)
    place[last] = value
    torch.save(found, path)


NAN, WEIGHT = float("nan"), "classifier.output.weight"


@pytest.mark.parametrize("name, harm", [
    ("client_1.pt", ("parameters", "encoder.mu.bias", NAN)),
    ("client_0.pt", ("parameters", "encoder.mu.bias", -np.inf)), ("client_0.pt", ("steps", -1)),
    ("client_0.pt", ("steps", True)), ("client_0.pt", ("steps", 10**30)), ("client_0.pt", ("steps", 3.0)),
    ("client_0.pt", ("parameters", [])), ("server.pt", ("head", WEIGHT, NAN)),
    ("server.pt", ("head", WEIGHT, np.inf)), ("server.pt", ("head", 5)), ("server.pt", ("round", True)),
    ("server.pt", ("round", 1.0)), ("server.pt", ("round", 2)),
    ("server.pt", ("round", torch.tensor([1, 1]))), ("server.pt", ("csv_bytes", {})),
    ("server.pt", ("csv_bytes", 4)), ("server.pt", ("csv_bytes", "rounds.csv", -1)),
    ("server.pt", ("csv_bytes", "rounds.csv", "100")), ("server.pt", ("csv_bytes", "rounds.csv", True)),
    ("server.pt", ("csv_bytes", "rounds.csv", 10**30)), ("server.pt", ("csv_bytes", "rounds.csv", 5)),
    ("server.pt", ("csv_bytes", "clients.csv", 150)), ("server.pt", ("memory", 3)),
    ("server.pt", ("memory", {})), ("server.pt", ("memory", "trust", [1.0, 1.0])),
    ("server.pt", ("memory", "trust", torch.ones(3))),
    ("server.pt", ("memory", "trust", torch.full((2,), NAN))),
    ("server.pt", ("memory", "seen", -torch.ones(2))), ("server.pt", ("memory", "fallbacks", "none")),
    ("shared.pt", ("sent", WEIGHT, NAN)), ("shared.pt", ("sent", {})), ("shared.pt", ("uploads", [])),
    ("shared.pt", ("uploads", 0, WEIGHT, torch.zeros(3))), ("shared.pt", ("uploads", {"0": {}})),
    ("shared.pt", ("uploads", {7: {}}))])
def test_a_checkpoint_with_values_that_no_run_writes_is_refused(unfinished, capsys, name, harm):
    put(unfinished.models / "round_1" / name, *harm)
    before = {path: path.read_bytes() for path in unfinished.results.iterdir()}
    line = unfinished.refuses(capsys, "--save_rounds", 1, "--resume")
    assert ("round_1" in line or ".csv" in line) and "--overwrite" in line
    if "csv_bytes" not in harm:   # of which an earlier file may be cut by then
        assert {path: path.read_bytes() for path in unfinished.results.iterdir()} == before


def test_uploads_of_nan_are_what_a_malicious_client_sends(unfinished):
    """Nothing starts from them."""
    put(unfinished.models / "round_1" / "shared.pt", "uploads", 0, WEIGHT, NAN)
    assert unfinished.main("--save_rounds", 1, "--resume") == 0


def test_nbafl_may_have_found_a_clip_but_no_other_kind_of_it(place, capsys):
    flags = ("--method", "nbafl", "--save_rounds", 1, "--checkpoint_seconds", 1e6)
    assert place.main(*flags) == 0
    config = place.results / "config.json"
    for clip in (0.5, NAN, -1.0, "one", torch.ones(1)):
        config.write_text(config.read_text().replace('"finished"', '"unfinished"'))
        checkpoint.shutil.rmtree(place.models / "round_3", ignore_errors=True)
        put(place.models / "round_1" / "server.pt", "memory", {"clip": clip})
        if clip == 0.5:
            assert place.main(*flags, "--resume") == 0
        else:
            assert "round_1" in place.refuses(capsys, *flags, "--resume")


def test_a_shortened_csv_is_refused(unfinished, capsys):
    path = unfinished.results / "clients.csv"
    path.write_bytes(path.read_bytes()[:100])
    assert "clients.csv" in unfinished.refuses(capsys, "--save_rounds", 1, "--resume")


@pytest.mark.parametrize("flags, named", [
    (["--dataset", "nothing"], "nothing.npz"), (["--num_users", 200], "--num_users"),
    (["--classes_per_client", 5], "--classes_per_client"), (["--device", "cuda:99"], "--device"),
    (["--device", "cuda:128"], "--device"), (["--device", "cuda:064"], "--device"),
    (["--frac", 0], "--frac"), (["--num_users", 100, "--validate", "--partition", "iid"], "100 --validate"),
    (["--num_users", 100, "--validate", "--classes_per_client", 1], "100 --validate")])
def test_bad_input_leaves_nothing_behind(place, capsys, flags, named):
    assert named in place.refuses(capsys, *flags)
    assert not place.results.exists() and not place.models.exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_asked_for_and_absent(place, capsys):
    assert "--device cpu" in place.refuses(capsys, "--device", "cuda")


@pytest.mark.parametrize("which", ["--results_dir", "--models_dir", "--data_dir"])
def test_a_folder_that_cannot_be_used(place, capsys, which):
    (place.folder / "file").write_text("")
    assert "file" in place.refuses(capsys, which, place.folder / "file" / "inside")


def limit_files(size):
    """What a process calls so that none of its files passes ``size`` bytes: a full disk, for one process."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def test_a_full_disk_stops_with_one_line_and_whole_files(place):
    flags = ("--rounds", 40, "--checkpoint_seconds", 1e6)
    process = place.start(*flags, preexec_fn=limit_files(6000))
    _, err = process.communicate(timeout=120)
    said = [line for line in err.splitlines() if "error" in line]
    assert process.returncode == 2 and len(said) == 1 and "Traceback" not in err, err
    assert place.clients_csv().endswith(b"\n")
    assert not list(place.folder.rglob("*.tmp"))
    if (place.results / "config.json").exists():
        assert place.main(*flags, "--resume") == 0


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


def test_write_whole_leaves_the_old_file_when_it_fails(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")

    def fail(file):
        file.write(b"new, but")
        raise RuntimeError("PytorchStreamWriter failed")
    with pytest.raises(OSError, match="PytorchStreamWriter"):
        write_whole(path, fail)
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_a_client_that_diverges_is_left_out_and_the_others_go_on(place, driver, capsys, monkeypatch):
    train = driver.Trainer.train

    def broken(self, client, round, indices, sent, private):
        if (client, round) == (1, 2):
            self = dataclasses.replace(self, training=dataclasses.replace(self.training, lr=1000.0, epochs=5))
        return train(self, client, round, indices, sent, private)
    monkeypatch.setattr(driver.Trainer, "train", broken)
    assert place.main("--aggregation", "mean") == 0
    assert "client 1, round 2" in capsys.readouterr().err
    steps = [torch.load(place.models / "round_3" / f"client_{k}.pt", weights_only=True)["steps"] for k in (0, 1)]
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
    assert place.clients_csv() == (",".join(csv_columns()["clients.csv"]) + "\n").encode()


def test_a_misspelt_source_of_encoders_leaves_nothing_behind(place, capsys):
    assert "no finished run" in place.refuses(capsys, "--encoders_from", "tpyo")
    assert not (place.results / "config.json").exists()
    assert place.main() == 0
