"""Trained runs in one folder, and attacks on them."""
import contextlib

import numpy as np
import pandas as pd

from attack import mi_attack
from attack import target as targets
from attack.observations import Victim


@contextlib.contextmanager
def kept(*paths):
    """Put the bytes of files back at the end."""
    whole = [path.read_bytes() for path in paths]
    try:
        yield
    finally:
        for path, data in zip(paths, whole, strict=True):
            path.write_bytes(data)


def spy(monkeypatch, owner, name):
    """Return the list of the arguments that a function of ``owner`` is called with from now on."""
    calls, function = [], getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *given, **named: calls.append(given) or function(*given, **named))
    return calls


def refused(capsys, main, argv):
    """Run a command line that must be refused, and return the one line that it says."""
    capsys.readouterr()   # what earlier commands said
    try:
        status = main([str(word) for word in argv])
    except SystemExit as stop:   # argparse's way out
        status = stop.code
    lines = capsys.readouterr().err.strip().splitlines()
    assert status == 2 and len(lines) == 1 and ".py: error: " in lines[0], lines
    return lines[0]


class Attacked:
    """A place whose runs are attacked; those of ``runs``, name -> flags, are trained when they are needed."""

    def __init__(self, place, tiny_arrays, program=mi_attack, flags=(), runs=()):
        self.place, self.program, self.flags, self.runs = place, program, flags, dict(runs)
        self.labels = np.concatenate([tiny_arrays["train_labels"], tiny_arrays["test_labels"]])
        np.savez(place.folder / "data" / "public.npz", **{
            name: values if "labels" in name else 255 - values for name, values in tiny_arrays.items()})

    def results(self, run):
        folder = self.place.folder / "results" / run
        if run in self.runs and not folder.exists():
            self.train(run, *self.runs[run])
        return folder

    def train(self, name, *flags):
        assert self.place.main("--run_name", name, *flags) == 0

    def target(self, run):
        self.results(run)
        return targets.open_target(run, *(self.place.folder / name for name in ("results", "models", "data")))

    def victim(self, run, round=None, client=0):
        target = self.target(run)
        return Victim(target, target.latest_round() if round is None else round, client)

    def images(self, run, count, client=0):
        target = self.target(run)
        numbers = target.owned()[0][client][:count]
        return target.pixels(numbers), target.labels(numbers)

    def argv(self, run, *flags):
        folders = [word for name in ("results", "models", "data")
                   for word in (f"--{name}_dir", self.place.folder / name)]
        return [str(word) for word in ("--run", run, *self.flags, "--public", "public", *folders, *flags)]

    def attack(self, run, *flags):
        self.results(run)
        return self.program.main(self.argv(run, *flags))

    def refuses(self, capsys, run, *flags):
        self.results(run)
        return refused(capsys, self.program.main, self.argv(run, *flags))

    def csv(self, run, name="attack.csv"):
        return pd.read_csv(self.results(run) / name, keep_default_na=False)
