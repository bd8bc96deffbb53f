"""Commands import PyTorch, pandas and other slow libraries only where they need them."""
import importlib
import subprocess
import sys
from functools import partial

import pytest
from conftest import ROOT

from attack.attacks import ATTACKS
from attack.membership import MEMBERSHIP_ATTACKS
from methods import METHODS
from server.behaviours import BEHAVIOURS
from server.rules import RULES
from utils import Late, LateName

SLOW = {"torch", "pandas", "matplotlib", "scipy", "torchmetrics", "byzfl", "dp_accounting", "opacus",
        "torchvision", "PIL", "tensorboard"}
EXPERIMENTS = [f"experiments/{path.name}" for path in sorted((ROOT / "experiments").glob("*.py"))
               if path.stem not in ("common", "speed")]   # speed.py is about PyTorch
LINES = ["RVE-PFL.py --help", "RVE-PFL.py --lrate 1", "RVE-PFL.py --method local --prox 1",
         "RVE-PFL.py --dataset nothing", "attack/mi_attack.py --help", "attack/mi_attack.py --model x --help",
         "attack/mi_attack.py --runn x",
         "attack/membership.py --run nothing", "report.py --help", "report.py --results_dir EMPTY",
         *(f"{path} --help" for path in EXPERIMENTS), "experiments/headline.py --list"]
# Runs command lines in turn, and prints each with its exit status and the slow modules that are imported by then.
WATCHED = f"""
import contextlib, io, os, runpy, sys
for line in sys.argv[1:]:
    sys.argv = line.split()
    sys.path.insert(0, os.path.dirname(sys.argv[0]))
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
        except SystemExit as stop:
            status = stop.code
    print(line, status, sorted({SLOW!r} & sys.modules.keys()), sep=": ")
"""


def test_nothing_slow_is_imported_to_answer(tmp_path):
    lines = [line.replace("EMPTY", str(tmp_path)) for line in LINES]
    done = subprocess.run([sys.executable, "-c", WATCHED, *lines], cwd=ROOT, capture_output=True, text=True)
    wrong = ("--lrate", "--prox", " nothing", "--runn")
    assert done.stdout.splitlines() == [
        f"{line}: {2 if any(word in line for word in wrong) else 0}: []" for line in lines], done.stderr


# Runs RVE-PFL.py up to its first training step, and prints the slow modules that are imported by then.
STARTED = f"""
import os, runpy, sys
from torch.optim.optimizer import register_optimizer_step_post_hook

def stop(*_):
    print(sorted({SLOW!r} & sys.modules.keys()), "torch._dynamo" in sys.modules, flush=True)
    os._exit(0)
register_optimizer_step_post_hook(stop)
runpy.run_path("RVE-PFL.py", run_name="__main__")
"""


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_the_first_training_step_needs_pytorch_alone(place, optimizer):
    words = [sys.executable, "-c", STARTED, *place.argv("--optimizer", optimizer)]
    assert subprocess.check_output(words, cwd=ROOT, text=True, stderr=subprocess.DEVNULL) == "['torch'] False\n"


def late_names(value):
    """The late names in a row, also those that a partial function holds."""
    if isinstance(value, partial):
        return [*late_names(value.func), *(name for part in value.keywords.values() for name in late_names(part))]
    return [value] if isinstance(value, LateName) else []


@pytest.mark.parametrize("table", [METHODS, RULES, BEHAVIOURS, ATTACKS, MEMBERSHIP_ATTACKS],
                         ids=["methods", "rules", "behaviours", "attacks", "membership"])
def test_what_a_row_names_exists(table):
    names = [name for row in table.values() for value in vars(row).values() for name in late_names(value)]
    assert len(names) >= len(table) / 2 and all(callable(name.imported()) for name in names)


def test_a_late_module_is_imported_when_something_of_it_is_used(tmp_path, monkeypatch):
    (tmp_path / "lateexample.py").write_text("def double(x): return 2 * x\ndouble.mark = 'seen'\n")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    late = Late("lateexample")
    named = late.double
    assert late.double is named   # rows are compared with it
    assert "lateexample" not in sys.modules
    assert named(4) == 8 and named.mark == "seen" and "lateexample" in sys.modules
    with pytest.raises(AttributeError, match="absent"):
        Late("lateexample").absent()
