"""A tiny data set, and the driver called in this process or, for signals and limits, in one of its own."""
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

# Before PyTorch is imported: the models are tiny, and several tests run at a time.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest

from utils import write_whole

# A shell in the background ignores Ctrl-C, and so would every program that is started here.
signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parent.parent


def _load(name, path):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def wait_for(process, condition, seconds=120):
    """Wait until something is true, or a process has ended."""
    end = time.monotonic() + seconds
    while process.poll() is None and not condition():
        assert time.monotonic() < end, "the run made no progress"
        time.sleep(0.002)


def server_options(**changes):
    """Options of a run, as a server reads them; `seed=...` and so on change single ones."""
    return {"seed": 1, "num_users": 1, "new_clients": 0.0, "frac": 1.0, "rounds": 1, "epsilon": None,
            "delta": None, "clip": None, "exposures": None, "noise_multiplier": None, "tolerate": 0.3,
            "clip_noise": 0.05, **changes}


@pytest.fixture(scope="session")
def driver():
    """The module of RVE-PFL.py, whose name no import statement can say."""
    return _load("rve_pfl_driver", ROOT / "RVE-PFL.py")


@pytest.fixture
def few_steps(monkeypatch):
    """The attacks that train or search for long stop early: for tests of what is written, not of what is found."""
    for name, steps in (("latents.PRIOR_STEPS", 8), ("adversaries.ALIGNED_STEPS", 8), ("newton.STEPS", 2),
                        ("newton.FEWER", 2)):
        monkeypatch.setattr(f"attack.{name}", steps)


@pytest.fixture(scope="session", autouse=True)
def quick_pictures():
    """Rendering takes longer than a tiny run: pictures are composed, and written as what they would show."""
    from runs import plots  # once a test runs

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "_save", lambda figure, path: (
            write_whole(path, lambda file: file.write(b"composed")), plots.plt.close(figure)))
        patch.setattr("attack.evaluation.save_picture", lambda path, rows, captions, labels, title: (
            path.write_text(f"{labels.tolist()} {title} {list(rows)} {captions} "
                            f"{[float(images.sum()) for images in rows.values()]}")))
        yield


@pytest.fixture(scope="session")
def tiny_arrays():
    """Four classes of 8 x 8 images, 60 of each: a bright quarter on noise, learnt in seconds."""
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(4), 60)
    images = rng.integers(0, 90, (240, 8, 8, 1))
    for image, c in zip(images, labels, strict=True):
        image[4 * (c // 2):4 * (c // 2) + 4, 4 * (c % 2):4 * (c % 2) + 4] += 120
    order = rng.permutation(240)
    images, labels = images[order].astype(np.uint8), labels[order].astype(np.uint8)
    return {"train_images": images[:200], "train_labels": labels[:200],
            "test_images": images[200:], "test_labels": labels[200:]}


class Place:
    """A folder for one test's data, results and checkpoints, and ways to run the program on them."""

    def __init__(self, folder, driver):
        self.folder, self.driver = folder, driver

    def argv(self, *flags):
        """Small settings; a flag given later wins."""
        epochs = [] if "--local_steps" in flags else ["--local_ep", "1"]
        return ["--dataset", "tiny", "--num_users", "2", "--rounds", "3", *epochs,
                "--local_bs", "32", "--run_name", "run", "--device", "cpu",
                "--data_dir", str(self.folder / "data"), "--results_dir", str(self.folder / "results"),
                "--models_dir", str(self.folder / "models"), *map(str, flags)]

    def main(self, *flags):
        """Exit status of the program, run in this process."""
        return self.driver.main(self.argv(*flags))

    def start(self, *flags, launcher=(), **popen):
        """The program as a process of its own, or as those of a launcher, such as torchrun."""
        popen = {"env": {**os.environ, "PYTHONUNBUFFERED": "1"}, **popen}
        words = [sys.executable, *launcher, str(ROOT / "RVE-PFL.py"), *self.argv(*flags)]
        return subprocess.Popen(words, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT,
                                **popen)

    def holding(self, other):
        """Return this place with a copy of another's runs, for one test to harm."""
        for name in ("results", "models"):
            shutil.copytree(other.folder / name, self.folder / name)
        return self

    @property
    def results(self):
        return self.folder / "results" / "run"

    @property
    def models(self):
        return self.folder / "models" / "run"

    @property
    def config(self):
        """The content of config.json."""
        return json.loads((self.results / "config.json").read_text())

    def contents(self):
        """Every file's bytes, by its path; None for what is no file. Locks are left out."""
        return {str(path.relative_to(self.folder)): path.read_bytes() if path.is_file() else None
                for path in self.folder.rglob("*") if path.name != ".lock"}

    def saved(self, round, name):
        """The content of a checkpoint's file."""
        from runs.checkpoints import load_checked

        return load_checked(self.models / f"round_{round}" / name)

    def target(self, **more):
        """The run as adversaries open it."""
        from attack.target import open_target

        return open_target("run", *(self.folder / name for name in ("results", "models", "data")), **more)

    def unfinish(self, round, run="run"):
        """Make a run look killed before its last checkpoint, which is of this round."""
        config = self.folder / "results" / run / "config.json"
        config.write_text(config.read_text().replace('"finished"', '"unfinished"'))
        shutil.rmtree(self.folder / "models" / run / f"round_{round}")

    def clients_csv(self):
        return (self.results / "clients.csv").read_bytes()

    def refuses(self, capsys, *flags):
        """Run what must fail for a user's mistake; the one line it says."""
        capsys.readouterr()   # what earlier runs said
        try:
            status = self.main(*flags)
        except SystemExit as stop:   # argparse's way out
            status = stop.code
        lines = capsys.readouterr().err.strip().splitlines()
        assert status == 2, lines
        assert len(lines) == 1 and lines[0].startswith("RVE-PFL.py: error: "), lines
        return lines[0]

    def refuses_and_keeps(self, capsys, *flags):
        """The same, and all files stay as they are."""
        before = self.contents()
        line = self.refuses(capsys, *flags)
        assert self.contents() == before
        return line


@pytest.fixture(scope="session")
def make_place(driver, tiny_arrays):
    """A folder -> a Place in it."""
    def make(folder):
        (folder / "data").mkdir()
        np.savez(folder / "data" / "tiny.npz", **tiny_arrays)
        return Place(folder, driver)
    return make


@pytest.fixture
def place(tmp_path, make_place):
    return make_place(tmp_path)
