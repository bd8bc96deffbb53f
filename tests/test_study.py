"""benchmarks/study.py: what it runs, how it goes on, and what it leaves for the pages."""
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import ROOT

from options import args_parser


@pytest.fixture
def study(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("study")


def test_every_run_of_the_study_is_a_command_and_has_a_name_of_its_own(study):
    cells = [cell for part in study.PARTS for cell in study.cells_of(part)]
    names = [cell.name for cell in cells]
    assert len(set(names)) == len(names) > 300
    for cell in cells:
        asked = vars(args_parser(cell.argv))
        assert all(asked[name] == value for name, value in cell.options.items())
        assert asked["aggregation"] in ("mean", None) or asked["method"] == "local"   # methods, not servers


def test_a_small_data_set_is_trained_as_the_whole_one(study):
    small, whole = (vars(args_parser(study.Cell(name, "shards", "fedavg", 1, (1, 1)).argv))
                    for name in ("cifar10k", "cifar"))
    assert all(small.pop(name) != whole.pop(name) for name in ("dataset", "run_name"))
    assert small == whole and small["augment"] == "flip"
    often = study.Cell("mnist", "shards", "nbafl-LT", 1, (7, 1))
    assert args_parser(often.argv).exposures == 7


class Studied:
    """Two runs of a tiny data set, with their own folders."""

    def __init__(self, study, folder, arrays, monkeypatch):
        self.study, self.folder = study, folder
        (folder / "data").mkdir()
        np.savez(folder / "data" / "tiny.npz", **arrays)
        more = {"num_users": 3, "local_bs": 32, "classes_per_client": 2}
        self.cells = [study.Cell("tiny", "shards", label, 1, (2, 1), more) for label in ("fedavg", "local")]
        monkeypatch.setattr(study, "cells_of", lambda part: iter(self.cells if part == "shards" else ()))

    def main(self, *words):
        folders = [word for name in ("data", "results", "models") for word in
                   (f"--{name}_dir", str(self.folder / name))]
        return self.study.main([*words, "--out", str(self.folder / "reference"), *folders])

    def config(self, cell):
        return self.folder / "reference" / cell.name / "config.json"


@pytest.fixture
def studied(study, tmp_path, tiny_arrays, monkeypatch):
    return Studied(study, tmp_path, tiny_arrays, monkeypatch)


def test_what_is_there_is_not_made_again(studied, capsys):
    assert studied.main("--list") == 0
    assert capsys.readouterr().out.splitlines()[-1] == "0 of 2 runs are there"
    assert studied.main() == 0
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 2 and all("finished" in line and "hours" in line for line in said)
    first, second = studied.cells
    for cell in studied.cells:
        assert sorted(path.name for path in studied.config(cell).parent.iterdir()) == [
            "clients.csv", "config.json", "rounds.csv"]
        assert str(studied.folder) not in studied.config(cell).read_text()   # no path of this machine
        assert json.loads(studied.config(cell).read_text())["status"] == "finished"
    assert not list((studied.folder / "models").iterdir())
    assert studied.main() == 0 and capsys.readouterr().out == ""
    other = json.loads(studied.config(first).read_text())
    other["options"]["lr"] = 0.5   # made with another default, as an older version may have had
    studied.config(first).write_text(json.dumps(other))
    assert studied.main("--list") == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[:2]] == ["missing", "there"]
    assert studied.main("--list", "--match", "local") == 0
    assert capsys.readouterr().out.splitlines()[-1] == "1 of 1 runs are there"


def test_a_list_may_be_cut_short(tmp_path):
    reader, writer = os.pipe()
    os.close(reader)   # `study.py --list | head`, once head has seen enough
    cut = subprocess.run([sys.executable, ROOT / "benchmarks" / "study.py", "--list", "--out", tmp_path],
                         stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (cut.returncode, cut.stderr) == (0, "")


def test_a_run_that_fails_is_named_and_the_others_go_on(studied, capsys):
    studied.cells.insert(0, studied.study.Cell("none", "shards", "fedavg", 1, (1, 1)))
    assert studied.main() == 1
    said = capsys.readouterr().out.splitlines()
    failed, = (line for line in said if line.startswith("FAILED"))
    assert "none-shards" in failed and "--dataset" in failed
    assert sum(line.startswith("finished") for line in said) == 2


def test_wrong_words_are_refused_in_one_line(studied, capsys):
    for words in (("--only", "everything"), ("--workers", "0"), ("--match", "xyz")):
        with pytest.raises(SystemExit) as stop:
            studied.main(*words)
        assert stop.value.code == 2
    capsys.readouterr()
    (studied.folder / "reference").write_text("")
    assert studied.main() == 2 and not (studied.folder / "results").exists()   # before any run
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
    (studied.folder / "reference").unlink()
    assert studied.main() == 0
    studied.config(studied.cells[0]).write_text("{")
    capsys.readouterr()
    assert studied.main("--list") == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_a_run_that_cannot_be_published_is_named_and_the_others_go_on(studied, study, capsys, monkeypatch):
    publish = study.publish

    def fails(run, place):
        if "fedavg" in run.name:
            raise OSError(28, "No space left on device")
        publish(run, place)
    monkeypatch.setattr(study, "publish", fails)
    assert studied.main("--workers", "1") == 1
    said = capsys.readouterr().out.splitlines()
    assert ["FAILED" in line for line in said] == [True, False] and "No space" in said[0]
    monkeypatch.undo()
    monkeypatch.setattr(study, "cells_of", lambda part: iter(studied.cells if part == "shards" else ()))
    (studied.folder / "results" / studied.cells[0].name / "clients.csv").write_text("")
    assert studied.main() == 1 and "FAILED" in capsys.readouterr().out


def test_a_run_of_other_options_under_that_name_is_not_taken(studied, study, capsys):
    assert studied.main() == 0
    shutil.rmtree(studied.folder / "reference")
    studied.cells[0] = study.Cell("tiny", "shards", "fedavg", 1, (2, 1), {**studied.cells[0].more, "local_bs": 16})
    assert studied.main() == 1
    failed, = (line for line in capsys.readouterr().out.splitlines() if line.startswith("FAILED"))
    assert "--local_bs" in failed and "move" in failed


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_stopped_it_ends_its_runs_and_goes_on(tmp_path, tiny_arrays, how):
    """A whole study in a process of its own: nothing is left running, and nothing half-made is published."""
    (tmp_path / "data").mkdir()
    np.savez(tmp_path / "data" / "tiny.npz", **tiny_arrays)
    script = tmp_path / "one.py"
    script.write_text(f"""
import sys
sys.path.insert(0, {str(ROOT / 'benchmarks')!r})
import signal, study
for ending in (signal.SIGTERM, signal.SIGHUP):
    signal.signal(ending, signal.default_int_handler)
more = {{"num_users": 3, "local_bs": 4}}
study.cells_of = lambda part: iter([study.Cell("tiny", "shards", "fedavg", 1, (ROUNDS, 1), more)] * (part == "dp"))
sys.exit(study.main())
""".replace("ROUNDS", "40"))
    folders = [word for name in ("data", "results", "models") for word in
               (f"--{name}_dir", str(tmp_path / name))]
    argv = [sys.executable, str(script), "--out", str(tmp_path / "reference"), *folders]
    run = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    rounds = tmp_path / "results" / "tiny-shards-3clients-40x1-fedavg-seed1" / "rounds.csv"
    limit = time.monotonic() + 120
    while not (rounds.exists() and len(rounds.read_text().splitlines()) > 8):
        assert run.poll() is None and time.monotonic() < limit
        time.sleep(0.2)
    run.send_signal(how)
    assert run.wait(60) == 130 and "goes on" in run.stderr.read()
    reached = len(rounds.read_text().splitlines())
    assert 8 < reached < 120 and not list((tmp_path / "reference").iterdir())
    time.sleep(1)
    assert len(rounds.read_text().splitlines()) == reached   # nobody writes on
    assert subprocess.run(argv, capture_output=True, timeout=120).returncode == 0
    published, = (tmp_path / "reference").glob("*/rounds.csv")
    assert published.read_text().splitlines()[:reached] == rounds.read_text().splitlines()[:reached]
    assert published.read_text().splitlines()[-1].startswith("40,")


def test_published_files_are_whole_or_not_there(study, tmp_path, monkeypatch):
    """config.json comes last: a copy that was cut off is a missing run."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text('{"options": {"results_dir": "/home/me"}}')
    (run / "rounds.csv").write_text("round,loss\n9,1\n10,2\n")
    (run / "clients.csv").write_text("round,client\n9,0\n10,0\n10,1\n")
    (run / "partition.npz").write_text("large")
    study.publish(run, tmp_path / "whole")
    assert sorted(os.listdir(tmp_path / "whole")) == ["clients.csv", "config.json", "rounds.csv"]
    assert json.loads((tmp_path / "whole" / "config.json").read_text())["options"]["results_dir"] == "results"
    assert (tmp_path / "whole" / "rounds.csv").read_text() == "round,loss\n9,1\n10,2\n"
    assert (tmp_path / "whole" / "clients.csv").read_text() == "round,client\n10,0\n10,1\n"
    monkeypatch.setattr(study, "without_paths", lambda data: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        study.publish(run, tmp_path / "part")
    assert sorted(os.listdir(tmp_path / "part")) == ["clients.csv", "rounds.csv"]
    shutil.rmtree(tmp_path / "part")
