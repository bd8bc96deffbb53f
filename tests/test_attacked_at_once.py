"""Attacks that are interrupted, killed, or meet another process on the same run."""
import contextlib
import fcntl
import os
import shutil
import weakref

import pytest
from attacked import Attacked
from test_folders import Killed, die_after

from attack import command, membership, mi_attack
from engine import signals
from engine.signals import Interrupted

TWO = ("--adversary", "curious_server", "stolen_model", "--attack", "mi_face", "reidentification")


@pytest.fixture(autouse=True)
def quick_pictures(monkeypatch):
    """A picture is drawn in no time, and shows what it is of."""
    monkeypatch.setattr("attack.evaluation.save_picture", lambda path, rows, labels, title: path.write_text(
        f"{labels.tolist()} {title} {[float(images.sum()) for images in rows.values()]}"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory, make_place, tiny_arrays):
    place = make_place(tmp_path_factory.mktemp("attacked"))
    assert place.main("--rounds", 1) == 0
    flags = ("--images", 2, "--iterations", 3, "--train_epochs", 1, "--draws", 2)
    return Attacked(place, tiny_arrays, flags=flags)


@pytest.fixture
def files(trained):
    """What attacks have left, by name."""
    return lambda: {p.name: p.read_bytes() for p in trained.place.results.glob("attack*")}


def test_the_files_are_the_same_however_often_an_attack_was_interrupted(trained, files, monkeypatch, capsys):
    """After each attack, and whichever was asked for first."""
    flags = ("--adversary", "stolen_model", *TWO[3:], "--clients", 1, 0)
    assert trained.attack("run", "--overwrite", *flags) == 0
    expected, stopped = files(), []
    assert len(expected) == 4 + 4

    def stop_after_each():
        stopped.append(1)
        raise Interrupted(2)
    with monkeypatch.context() as patch:
        patch.setattr(command, "check", stop_after_each)
        assert trained.attack("run", "--overwrite", *flags) == 130
        while trained.attack("run", *flags) == 130:
            pass
    assert len(stopped) == 4 and files() == expected
    assert trained.attack("run", "--overwrite", *flags[:3], "reidentification") == 0
    assert trained.attack("run", *flags) == 0 and files() == expected


def test_sigterm_while_python_frees_an_object_ends_an_attack(trained, monkeypatch, capfd):
    real, freed = mi_attack.Evaluation.attack, []

    class Object:
        """Something that a weak reference can point to."""

    def attack(self, unit):
        thing = Object()
        freed.append(weakref.ref(thing, lambda _: os.kill(os.getpid(), 15)))
        del thing
        return real(self, unit)
    monkeypatch.setattr(mi_attack.Evaluation, "attack", attack)
    assert trained.attack("run", "--overwrite", "--adversary", "curious_server", "--attack", "mi_face") == 130
    assert len(freed) == 1 and capfd.readouterr().err.endswith(
        "interrupted; the same command goes on where it stopped\n")


def test_an_overwrite_of_attacks_that_is_killed_leaves_nothing_of_them(trained, files, monkeypatch):
    """Once their rows are gone, whatever is left goes when the next attack begins; nothing of the user's does."""
    notes = trained.place.results / "attack_notes.txt"
    notes.write_text("mine")
    first, second = (*TWO[:2], *TWO[3:5], "--seed", 1), (*TWO[:2], *TWO[3:5], "--seed", 2)
    assert trained.attack("run", "--overwrite", *second) == 0
    expected, steps = files(), 0
    monkeypatch.setattr(mi_attack.Evaluation, "attack", lambda *_: (_ for _ in ()).throw(Killed))
    assert trained.attack("run", *second) == 0
    while True:
        for old in trained.place.results.glob("attack*"):
            old.unlink()
        for name, what in expected.items():
            (trained.place.results / name).write_bytes(what)
        with monkeypatch.context() as patch:
            done = die_after(patch, steps)
            with pytest.raises(Killed):
                trained.attack("run", "--overwrite", *first)
        if len(done) < steps:
            break
        with contextlib.suppress(Killed):
            trained.attack("run", *(first if steps else second))
        left = files()
        assert left == expected if not steps else left == {"attack_notes.txt": b"mine"}
        steps += 1
    assert steps == len(expected) and notes.read_text() == "mine"
    notes.unlink()


@pytest.mark.parametrize("program", [mi_attack, membership])
@pytest.mark.parametrize("folder", ["results", "models"])
def test_one_process_at_a_time_trains_or_attacks_a_run(trained, capsys, program, folder):
    argv = trained.argv("run")
    argv = argv[:2] + argv[-6:]
    with open(getattr(trained.place, folder) / ".lock", "rb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert program.main([*argv, "--clients", "0"]) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and "attacked by another process" in said


def test_a_run_cannot_be_trained_while_it_is_attacked(trained, monkeypatch, capsys):
    place, lines = trained.place, []
    monkeypatch.setattr(mi_attack, "Evaluation", lambda *_: lines.extend(
        place.refuses(capsys, "--rounds", 1, *flags) for flags in (["--overwrite"], ["--resume"], [])) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        trained.attack("run")
    assert len(lines) == 3 and all("attacked by another process" in line for line in lines)
    assert place.main("--rounds", 1, "--resume") == 0   # the lock went with the attack


def test_a_folder_that_is_no_run_gets_no_lock(trained, tmp_path, capsys):
    (tmp_path / "thesis").mkdir()
    assert mi_attack.main(["--run", "thesis", "--results_dir", str(tmp_path), "--models_dir", str(tmp_path)]) == 2
    assert not list((tmp_path / "thesis").iterdir())


def test_checkpoints_that_nobody_can_write_are_attacked(trained, monkeypatch, tmp_path):
    shutil.copytree(trained.place.folder / "models", tmp_path / "models")
    (tmp_path / "models" / "run" / ".lock").unlink()
    monkeypatch.setattr("attack.command.os.access", lambda path, mode: False)
    assert trained.attack("run", "--overwrite", "--adversary", "stolen_model", "--attack", "reidentification",
                          "--models_dir", tmp_path / "models") == 0
    assert not (tmp_path / "models" / "run" / ".lock").exists()
    signals.check()
