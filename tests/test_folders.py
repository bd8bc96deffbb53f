"""Files in a run's folders: deleted, kept or locked, wherever a process dies."""
import os
import resource

import pytest
import torch

from devices import environment
from runs import folders, setup
from runs.csvs import append_csv
from runs.run import Run
from utils import InputError


class Killed(BaseException):
    """The process is gone: nothing that it would still have done happens."""


def die_after(monkeypatch, steps):
    """Let the process die at the next change of a folder after so many."""
    done = []

    def dying(real):
        def change(*given, **named):
            if len(done) >= steps:
                raise Killed
            done.append(given)
            return real(*given, **named)
        return change
    for name in ("unlink", "rename", "replace", "rmdir", "mkdir"):
        monkeypatch.setattr(os, name, dying(getattr(os, name)))
    return done


FLAGS = ("--rounds", 2, "--save_rounds", 1)
ATTACKED = ("attack.csv", "attack.json", "attack_summary.csv", "attack_stolen_model_dlg_round2_client0.png",
            "membership.csv", ".attack.csv.7.tmp")


@pytest.fixture(scope="module")
def finished(tmp_path_factory, make_place):
    """A finished run of two rounds that was attacked."""
    place = make_place(tmp_path_factory.mktemp("finished"))
    assert place.main(*FLAGS) == 0
    for name in ATTACKED:
        (place.results / name).write_text("found")
    return place


@pytest.fixture
def copy(finished, make_place, tmp_path):
    """A function that copies that run to another folder, for one test to harm."""
    def make(name="copy"):
        folder = tmp_path / name
        folder.mkdir()
        return make_place(folder).holding(finished)
    return make


@pytest.fixture
def opened_only(driver, monkeypatch):
    """No run trains: it stops with one line where its first round would begin, and draws nothing before."""
    def stop(*_):
        raise InputError("was opened")
    monkeypatch.setattr(driver, "federate", stop)
    here = environment(torch.device("cpu"))   # which asks git
    monkeypatch.setattr(setup, "environment", lambda device: here)
    monkeypatch.setattr(Run, "write_inputs", lambda *_: None)


def test_an_overwrite_that_is_killed_anywhere_leaves_a_run(copy, opened_only, monkeypatch, capsys):
    """The old run, or that run unfinished; --overwrite and --resume take up either."""
    before, steps, states = None, 0, []
    while True:
        place = copy(str(steps))
        before = before or place.contents()
        with monkeypatch.context() as patch:
            die_after(patch, steps)
            try:
                assert place.main(*FLAGS, "--seed", 2, "--overwrite") == 2
                break
            except Killed:
                pass
        config = place.config
        states.append((config["status"], config["options"]["seed"], len(list(place.models.glob("round_*")))))
        now = {name: what for name, what in place.contents().items() if not name.endswith(".tmp")}
        if config["status"] == "finished":
            assert now == {name: what for name, what in before.items() if not name.endswith(".tmp")}
        steps += 1
        if states[-1] in states[:-1] and steps % 6:   # once for each state, and now and then
            continue
        seed = config["options"]["seed"]
        assert f"--seed {seed}" in place.refuses(capsys, *FLAGS, "--seed", 3 - seed, "--resume")
        if config["status"] == "unfinished":
            assert "was opened" in place.refuses(capsys, *FLAGS, "--seed", seed, "--resume")
        assert "was opened" in place.refuses(capsys, *FLAGS, "--seed", 2, "--overwrite")
        assert not list(place.folder.rglob("*.tmp")) and not list(place.models.glob("*round_*"))
    assert {status for status, *_ in states} == {"finished", "unfinished"}
    assert [count for *_, count in states] == sorted((count for *_, count in states), reverse=True)
    assert {count for *_, count in states} == {0, 1, 2}
    assert not {p.name for p in place.results.iterdir()} & set(ATTACKED)


def test_only_own_files_are_deleted(copy, opened_only, capsys):
    """Not a thesis beside them, nor folders, links' targets and files whose names only begin like ours."""
    place = copy()
    place.results.symlink_to(place.results.rename(place.folder / "elsewhere"))
    mine = {"thesis.tex": "years", "attack_notes.txt": "mine", "clients.csv.bak": "mine",
            ".attack.csv.tmp": "mine", "attack_stolen_model_dlg_round2_client0.png.old": "mine",
            "figures/trust.png": "mine"}
    (place.results / "figures").mkdir()
    for name, text in mine.items():
        (place.results / name).write_text(text)
    (place.folder / "target").write_text("mine")
    (place.results / "curves.png").unlink()
    (place.results / "curves.png").symlink_to(place.folder / "target")
    (place.results / "trust.png").unlink(missing_ok=True)
    (place.results / "trust.png").mkdir()
    (place.models / "paper.pdf").write_text("mine")
    (place.models / "round_1.zip").write_text("mine")
    assert "was opened" in place.refuses(capsys, *FLAGS, "--overwrite")
    assert {name: (place.results / name).read_text() for name in mine} == mine
    assert (place.folder / "target").read_text() == "mine" and not (place.results / "curves.png").exists()
    assert (place.results / "trust.png").is_dir() and place.results.is_symlink()
    assert {p.name for p in place.models.iterdir()} == {"paper.pdf", "round_1.zip", ".lock"}


@pytest.mark.parametrize("config", ['{"name": "my-app", "version": "2"}', "{", "a folder", "none"])
def test_a_folder_of_another_program_is_refused_without_advice_to_overwrite(copy, capsys, config):
    place = copy()
    (place.results / "config.json").unlink()
    if config == "a folder":
        (place.results / "config.json").mkdir()
    elif config != "none":
        (place.results / "config.json").write_text(config)
    for flags in ([], ["--resume"], ["--overwrite"]):
        line = place.refuses_and_keeps(capsys, *FLAGS, *flags)
        assert "config.json" in line and "--overwrite" not in line and "--run_name" in line


@pytest.mark.parametrize("where", ["round_1", ".round_2", ".private"])
def test_what_lies_in_a_checkpoint_is_kept_with_it(copy, opened_only, capsys, where):
    place = copy()
    (place.models / where).mkdir(exist_ok=True)
    (place.models / where / "notes.txt").write_text("mine")
    before = place.contents()
    line = place.refuses_and_keeps(capsys, *FLAGS, "--overwrite")
    assert f"{where}/notes.txt" in line and "move it away" in line
    folders.remove(place.models / where)
    assert place.contents() == before


def test_the_list_of_own_files_is_whole(finished):
    """All that a run and attacks on it write; test_mi_attack.py has the attacks'."""
    written = {p.name for p in finished.results.iterdir()} - {".lock", "config.json"}
    ours = folders.files(finished.results, f"{folders.OF_TRAINING}|{folders.OF_ATTACKS}|{folders.OF_MEMBERSHIP}")
    assert {p.name for p in ours} == written
    assert {p.name for p in folders.files(finished.models / "round_2", folders.OF_A_CHECKPOINT)} == {
        p.name for p in (finished.models / "round_2").iterdir()}


def test_rows_that_find_no_room_are_said_of_a_file_and_leave_no_part(tmp_path):
    path, before = tmp_path / "rounds.csv", resource.getrlimit(resource.RLIMIT_FSIZE)
    path.write_text("a\n" + "1\n" * 100)
    resource.setrlimit(resource.RLIMIT_FSIZE, (250, before[1]))
    try:
        with pytest.raises(OSError, match="too large") as caught:
            append_csv(path, ["a"], [{"a": 22}] * 40)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert caught.value.filename == str(path) and path.read_text() == "a\n" + "1\n" * 100


def test_checkpoints_kept_for_good_stay_without_being_asked_for_again(copy):
    place = copy()
    assert place.main("--rounds", 3, "--save_rounds", 2, "--resume") == 0
    assert {p.name for p in place.models.glob("round_*")} == {"round_1", "round_2", "round_3"}
    assert place.config["options"]["save_rounds"] == [1, 2]
