"""The programs where outputs or surroundings are broken, or Ctrl-C arrives: no work lost, at most one line."""
import errno
import io
import json
import os
import signal
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT

import utils
from engine import signals
from engine.memory import in_one_line, is_exhausted
from engine.signals import Interrupted, Interrupts, Steady

MADE = {"RVE-PFL.py": "run/curves.png", "mi_attack.py": "run/attack_summary.csv", "report.py": "report.html"}


@pytest.fixture(scope="module")
def run_program(tmp_path_factory, make_place, tiny_arrays):
    """A program's name -> its process, which has succeeded, run with redirections of the shell's."""
    place = make_place(tmp_path_factory.mktemp("output"))
    images = {name: 255 - values if "images" in name else values for name, values in tiny_arrays.items()}
    np.savez(place.folder / "data" / "public.npz", **images)
    assert place.main("--rounds", 1) == 0

    def run(name, home="results", shell="", **popen):
        folder = place.folder / home
        if not folder.exists():
            folder.symlink_to(place.folder / "results")
        words = {
            "RVE-PFL.py": ["RVE-PFL.py", *place.argv("--rounds", 2, "--overwrite", "--aggregation", "mean")],
            "mi_attack.py": ["attack/mi_attack.py", "--run", "run", "--data_dir", place.folder / "data",
                             "--models_dir", place.folder / "models", "--public", "public", "--overwrite",
                             *["--attack", "mi_face", "--adversary", "curious_server", "--iterations", "2"]],
            "report.py": ["report.py"]}[name]
        (folder / MADE[name]).unlink(missing_ok=True)
        half = (folder / MADE[name]).with_name(f".{Path(MADE[name]).name}.{2**40}.tmp")
        half.write_text("a killed process's")
        process = subprocess.run(
            ["bash", "-c", f'"$@" {shell}', "bash", sys.executable, *words, "--results_dir", folder],
            stderr=subprocess.PIPE, cwd=ROOT, timeout=240, **popen)
        assert process.returncode == 0 and (folder / MADE[name]).exists(), process.stderr
        assert not half.exists()
        assert json.loads((folder / "run" / "config.json").read_text())["status"] == "finished"
        return process
    return run


@pytest.mark.slow
@pytest.mark.parametrize("name", MADE)
def test_a_full_output_is_said_once_and_nothing_else(run_program, name):
    """Nor does a home in which nothing can be kept make matplotlib speak."""
    environment = {key: value for key, value in os.environ.items() if key != "MPLCONFIGDIR"}
    said = run_program(name, shell=">/dev/full", env={**environment, "HOME": "/proc"}).stderr.decode()
    assert said == (f"{name}: warning: standard output cannot be written, what it would say is lost; files "
                    f"are written as usual ({os.strerror(errno.ENOSPC)})\n")


@pytest.mark.slow
@pytest.mark.parametrize("shell", ["<&- >&- 2>&-", "2>&1 | head -1 >&2; exit ${PIPESTATUS[0]}"])
def test_a_training_outlives_its_outputs(run_program, shell):
    assert run_program("RVE-PFL.py", shell=shell).stderr.count(b"\n") <= 1


@pytest.mark.slow
def test_letters_that_the_terminal_lacks_are_escaped(run_program, name="RVE-PFL.py"):
    """In an ASCII locale, with a folder that no UTF-8 terminal could show either."""
    ascii = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"}
    process = run_program(name, os.fsdecode(b"l\xc3\xa4ufe\xff"), env={**os.environ, **ascii},
                          stdout=subprocess.PIPE)
    assert b"\\udcff" in process.stdout and process.stdout.isascii()
    assert b"Traceback" not in process.stderr


OBEYED = "\x1b]0;owned\x07 \x1b[2J\r\x9b1m\x7f\u202e"   # a title, a cleared screen, and text from right to left


def test_what_a_terminal_would_obey_is_written_as_escapes():
    stream = io.StringIO()
    Steady(stream).write(f"a{OBEYED}b\n\té")
    assert stream.getvalue() == "a\\x1b]0;owned\\x07 \\x1b[2J\r\\x9b1m\\x7f\\u202eb\n\té"
    line = utils.error_line("p.py", utils.InputError(f"{OBEYED}\nand a second line"))
    assert line.isprintable() and "owned" in line and "\\nand a second line" in line


def test_long_values_are_cut(place, capsys):
    long = "x" * 10**6
    for flags in (("--run_name", long), ("--method", long), (f"--{long}", 1)):
        line = place.refuses(capsys, *flags)
        assert len(line) < 3000 and "xxx" in line
    path = "/" + "/".join(["folder"] * 30)   # longer than a value, and still a path that somebody has
    assert path in utils.error_line("p.py", FileNotFoundError(2, "No such file", path))


@pytest.mark.parametrize("by_torch", [False, True])
def test_a_full_disk_is_said_of_a_file(tmp_path, by_torch):
    """The system's error does not know of which; torch.save raises a RuntimeError while it handles that error."""
    def full(file):
        try:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            if by_torch:
                raise RuntimeError("[enforce fail at inline_container.cc:672]") from None
            raise
    with pytest.raises(OSError, match="No space left") as caught:
        utils.write_whole(tmp_path / "head.pt", full)
    assert caught.value.filename == str(tmp_path / "head.pt") and not [*tmp_path.iterdir()]


def test_an_interruption_while_starting_is_one_line():
    program = ("import os, signal\nfrom engine.signals import steady_output\n"
               "with steady_output('any.py'):\n    os.kill(os.getpid(), signal.SIGINT)\n    print('went on')\n")
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "any.py: interrupted\n")


EXHAUSTED = [
    MemoryError(), OSError(errno.ENOMEM, "none"), torch.OutOfMemoryError("CUDA out of memory."),
    RuntimeError("[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory"),
    RuntimeError("std::bad_alloc"), RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `x`")]


def test_whoever_says_that_memory_ran_out():
    for error in EXHAUSTED:
        line = in_one_line("p.py", error, "; then: again")
        assert line.startswith("p.py: error: out of memory; ") and line.endswith("; then: again")
        assert "--local_bs" in line and "\n" not in line
    assert in_one_line("p.py", utils.InputError("--lr 7: no"), "; again") == "p.py: error: --lr 7: no"
    denied = PermissionError(13, "Permission denied", "a.csv")
    assert in_one_line("p.py", denied, "; again") == "p.py: error: a.csv: Permission denied; again"
    assert in_one_line("p.py", RuntimeError("shapes cannot be multiplied")) is None
    for ask in (lambda: torch.empty(2**60, dtype=torch.uint8), lambda: np.empty(2**60, np.uint8)):
        with pytest.raises(Exception) as caught:   # no machine grants it
            ask()
        assert is_exhausted(caught.value)


def test_the_driver_says_it_in_one_line_and_shows_its_own_faults(place, capsys, monkeypatch):
    def fails(error):
        def federate(*_):
            raise error
        monkeypatch.setattr(place.driver, "federate", federate)
    fails(EXHAUSTED[-1])
    assert "out of memory; " in (line := place.refuses(capsys)) and "--resume" in line
    fails(ZeroDivisionError())
    with pytest.raises(ZeroDivisionError):
        place.main("--resume")


def test_what_is_unusual_about_the_images_is_said_and_recorded(place, tiny_arrays, capsys):
    images = tiny_arrays["train_images"].copy()
    images[1:150] = images[0]
    labels = {key: tiny_arrays[key] + 1 for key in ("train_labels", "test_labels")}
    np.savez(place.folder / "data" / "odd.npz", **{**tiny_arrays, **labels, "train_images": images})
    assert place.main("--dataset", "odd", "--rounds", 1, "--method", "fedavg") == 0
    notes = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: ")]
    config = place.config["images"]
    assert config["labels"] == [1, 2, 3, 4] and config["pooled"] == 240 and config["classes"] == 4
    assert notes[0] == "note: labels are 1, 2, 3, 4; classes are numbered 0 to 3 in that order"
    assert notes[-1].startswith(f"note: {config['duplicates']} of ") and 5 < config["duplicates"] < 30


def test_the_users_own_clients_and_split(place, tiny_arrays, capsys):
    clients = np.tile([0, 1, 2, -1], 60)
    np.savez(place.folder / "data" / "own.npz", **tiny_arrays, client=clients)
    flags = ("--dataset", "own", "--rounds", 1, "--method", "fedavg", "--partition", "file", "--keep_split")
    assert "--num_users 3" in place.refuses(capsys, *flags)
    assert place.main(*flags, "--num_users", 3) == 0
    with np.load(place.results / "partition.npz") as file:
        for k in range(3):
            assert file[f"train_{k}"].tolist() == [i for i in range(200) if i % 4 == k]
            assert file[f"test_{k}"].tolist() == [i for i in range(200, 240) if i % 4 == k]
    assert "no array `client`" in place.refuses(capsys, "--partition", "file", "--overwrite")


def test_a_network_too_large_for_the_memory_is_refused_before_it_is_built(place, capsys, monkeypatch):
    monkeypatch.setattr("devices.memory_of", lambda device: 2**20)
    line = place.refuses(capsys)
    assert "M parameters" in line and "--method fedavg" in line and not place.results.exists()


class Object:
    """Something that a weak reference can point to."""


def arrive_while_freeing(number=signal.SIGTERM):
    """Send the signal while Python frees an object: it drops what is raised there."""
    thing = Object()
    reference = weakref.ref(thing, lambda _: os.kill(os.getpid(), number))
    del thing
    return reference


@pytest.mark.parametrize("again", ["optimizer", "check", "end"])
def test_one_that_python_drops_comes_again(again, capfd):
    optimizer, passed = torch.optim.Adam([torch.zeros(3, requires_grad=True)]), []
    with pytest.raises(Interrupted) as caught, Interrupts():
        optimizer.step()
        arrive_while_freeing()
        passed.append("dropped")
        {"optimizer": optimizer.step, "check": signals.check, "end": lambda: None}[again]()
        passed.append("end")
    assert passed == ["dropped", "end"][:1 + (again == "end")] and caught.value.args == (signal.SIGTERM,)
    assert capfd.readouterr().err == ""   # no traceback of it
    optimizer.step()   # outside, nothing is left of it
    with pytest.raises(ValueError, match="mine"), Interrupts():
        arrive_while_freeing()
        raise ValueError("mine")   # which it does not hide


def test_signals_are_put_off_while_they_are_held():
    """And interrupt at once when they are not."""
    done = []
    with pytest.raises(Interrupted) as caught, Interrupts():
        with signals.held():
            for number in (signal.SIGINT, signal.SIGTERM):
                os.kill(os.getpid(), number)
            with signals.held():
                signals.check()
            done.append("written")
        done.append("went on")
    assert done == ["written"] and caught.value.args == (signal.SIGTERM,)
