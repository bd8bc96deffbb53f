"""Every script under benchmarks/ refuses bad numbers and names in one line, with status 2."""
import argparse
import importlib

import pytest
from conftest import ROOT, _load

OF_MI_ATTACK = {"art_miface", "inverting_gradients"}   # whose command line they have
SCRIPTS = sorted({path.stem for path in (ROOT / "benchmarks").glob("*.py")} - {"_path", "plain"} - OF_MI_ATTACK)
BAD = ["-1", "nan", "inf", "1e99", "9" * 30, "many", ""]


@pytest.fixture
def script(monkeypatch):
    """A script of benchmarks/ by its name."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return lambda name: importlib.import_module(name) if name != "server" else _load(   # as a package is called
        "benchmarks_server", ROOT / "benchmarks" / "server.py")


class Caught(BaseException):
    """The parser of a script, before it has parsed anything."""


@pytest.fixture
def actions(script, monkeypatch):
    """A script's name -> its arguments, as argparse has them."""
    def find(name):
        def stop(parser, *args, **kwargs):
            raise Caught(parser._actions)
        with monkeypatch.context() as patch:
            patch.setattr(argparse.ArgumentParser, "parse_known_args", stop)
            try:
                script(name).main(["1", "--", "--lr 1"] if name == "sweep" else [])
            except Caught as caught:
                return caught.args[0]
        raise AssertionError(f"{name} parses nothing")
    return find


@pytest.mark.parametrize("name", SCRIPTS)
def test_bad_values_are_refused(script, actions, capsys, name):
    """Of every argument that takes a number or one of some names; and no number is without bounds."""
    found, path = actions(name), script("_path")
    needed = [word for action in found if action.required and action.option_strings
              for word in (action.option_strings[0], "any")]
    for action in found:
        assert action.type not in (int, float), f"{name}: {action.dest} takes any number"
        values = ["nonsense"] if action.choices else BAD if action.type in (
            path.count, path.index, path.positive, path.share) else []
        for value in values:
            words = [value] * (action.nargs if isinstance(action.nargs, int) else 1)
            flag = action.option_strings[:1]
            with pytest.raises(SystemExit) as stop:
                script(name).main([*needed, *flag, *words])
            line = capsys.readouterr().err.strip()
            assert stop.value.code == 2 and len(line.splitlines()) == 1 and action.dest in line, (value, line)


RUNS = (*sorted(OF_MI_ATTACK), "conditioning", "ladder", "real_uploads")


@pytest.mark.parametrize("name, words", [
    *((name, ["--run", "none"]) for name in RUNS), ("which_classes", ["--runs", "none"]),
    *((name, ["--only", "nothing"]) for name in ("attack_proof", "batching", "speed", "tricks")),
    ("speed", ["--device", "gpu"]), ("server", ["--datasets", "none", "--out", "{}"]),
    ("server", ["--part", "1", "1", "--out", "{}"]), ("study", ["--match", "nothing"]),
    ("frontier", ["--datasets", "none", "--results_dir", "{}", "--models_dir", "{}", "--data_dir", "{}"]),
    ("frontier", ["--partitions", "none"]), ("verify", ["--reference", "{}/none"]),
    ("crowds", ["--driver", "{}/none", "--clients", "2", "--tiny", "0"]), ("scaling", ["--folder", "{}/none"]),
    ("sweep", []), ("sweep", ["many", "--", ""]), ("sweep", ["3"]), ("sweep", ["11", "--", ""]),
    ("sweep", ["2", "--dataset", "none", "--", ""]), ("make_10k", ["plants"]), ("ranks", ["--turns", "3"])])
def test_bad_names_are_refused(script, tmp_path, capfd, name, words):
    with pytest.raises(SystemExit) as stop:
        raise SystemExit(script(name).main([word.format(tmp_path) for word in words]))
    line = capfd.readouterr().err.strip()
    assert stop.value.code == 2 and len(line.splitlines()) == 1 and "Traceback" not in line, line
    assert f"{name}.py: error: " in line or name in ("crowds", "frontier", "sweep"), line   # of what they start
