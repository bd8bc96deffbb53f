"""All runs under results/ as one page and one table.

    python report.py                    writes results/report.html and results/summary.csv

A row of the table is a setting: runs that differ in nothing but the seed, their means and standard deviations
over seeds, and the command that makes them. Runs that are unfinished, damaged or not this program's are
listed with the reason. The page needs no other file.
"""
import json
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

import configs
import leakage
from configs import ASIDE
from files import remove_leftovers, write_whole
from options import ROOT, Parser, args_parser, make_parser, shown
from page import FIGURES, page, png
from runs import COLUMNS
from utils import InputError, steady_output

# Options that say where and how, not what: they part no settings and stand in no command.
ASIDE_OPTIONS = {"run_name", "seed", "data_dir", "results_dir", "models_dir", "save_rounds", "resume",
                 "overwrite", "checkpoint_seconds", "rendezvous_seconds", "device", "stack", "eval_every"}
BASIC = ("dataset", "method", "partition")   # on which the defaults of others depend
ESCAPED = "backslashreplace"   # what becomes of bytes in a folder's name that are no letters
STAGES = ("deployed", "trained")
NEEDED = (*BASIC, "num_users", "rounds", "local_ep", "seed")   # of a config.json
SHARES = ["accuracy", "accuracy_worst", "f1"]   # in every row of rounds.csv, from 0 to 1


@dataclass(frozen=True)
class Finished:
    """One finished run: its options, its protocol, ``rounds.csv``, what attackers found of it (leakage.py),
    its pictures as PNG by name, and, of these last two, why they cannot be read."""

    name: str
    protocol: str
    options: dict
    rounds: pd.DataFrame
    leaks: pd.DataFrame = field(default_factory=lambda: leakage.NONE)
    pictures: dict[str, bytes] = field(default_factory=dict)
    unread: str = ""

    @property
    def setting(self) -> str:
        """The same for runs that differ in the seed alone."""
        kept = {key: value for key, value in self.options.items() if key not in ASIDE_OPTIONS}
        return json.dumps([self.protocol, kept], sort_keys=True)

    @property
    def partition(self) -> str:
        """Its partition in words."""
        extra = {"shards": self.options.get("classes_per_client"), "dirichlet": self.options.get("alpha")}
        unequal = ", unequal" if self.options.get("unequal") else ""
        value = extra.get(self.options["partition"])
        return f"{self.options['partition']}{'' if value is None else f' {value:g}'}{unequal}"


def read(folder: Path) -> Finished | str:
    """A finished run, or why the folder is none."""
    path = folder / "config.json"
    if not path.exists():
        return "not a run of this program: no config.json"
    try:
        config = configs.read(path, *NEEDED)
    except InputError as error:
        return str(error).removeprefix(f"{folder}/")
    options, protocol = config["options"], config["protocol"]
    options.setdefault("aggregation", "mean")   # all there was when such runs were made
    try:
        rounds = _rounds(folder / "rounds.csv", options["rounds"])
    except (OSError, ValueError, TypeError, OverflowError) as error:
        return f"rounds.csv is damaged ({_line(error)})"
    if config["status"] != "finished":
        reached = int(rounds["round"].max()) if len(rounds) else 0
        return f"unfinished: {reached} of {options['rounds']} rounds; go on with --resume"
    final = rounds[(rounds["round"] == options["rounds"]) & (rounds["stage"] == "deployed")]
    if len(final) != 1:
        return f"rounds.csv is damaged (round {options['rounds']} is missing or not there once)"
    leaks, pictures, faults = leakage.NONE, {}, []
    try:
        leaks = leakage.read(folder)
    except (OSError, ValueError, KeyError, TypeError) as error:
        faults.append(f"attack_summary.csv or attack.json is damaged ({_line(error)})")
    for name in ("partition.png", *leakage.pictures(leaks)):
        for picture in sorted(folder.glob(name)):
            try:
                pictures[picture.name] = png(picture)
            except (OSError, ValueError) as error:
                faults.append(f"{picture.name} is left out ({_line(error)})")
    unread = f"finished, but {'; '.join(faults)}" if faults else ""
    return Finished(folder.name, protocol, options, rounds, leaks, pictures, unread)


def _rounds(path: Path, asked: int) -> pd.DataFrame:
    """A ``rounds.csv`` of at most that many rounds; ValueError if it is none."""
    if path.exists() and not path.is_file():   # a pipe would be waited for
        raise ValueError("no plain file")
    rounds = pd.read_csv(path)
    if list(rounds.columns) != COLUMNS["rounds.csv"]:
        raise ValueError("its columns are not those of a run")
    numbers = [name for name in rounds if name not in ("stage", "split")]
    rounds[numbers] = rounds[numbers].apply(pd.to_numeric)
    if not (rounds["round"].between(1, asked).all() and (rounds["round"] % 1 == 0).all()
            and rounds[SHARES].apply(lambda column: column.between(0, 1)).all(axis=None)
            and rounds["seconds"].between(0, np.finfo(float).max).all()):
        raise ValueError("it has gaps, or values that no run writes")
    return rounds


def command(options: dict) -> str:
    """What makes a run, with no more flags than needed."""
    parser, words = make_parser(), []
    basic = [word for name in BASIC for word in (f"--{name}", options[name])]
    usual = {**vars(args_parser(basic)), **{name: parser.get_default(name) for name in BASIC}}
    for name in [action.dest for action in parser._actions]:
        value = options.get(name)
        unusual = value is not None and value is not False and value != usual.get(name)
        if name == "seed" or (unusual and name not in ASIDE_OPTIONS):
            words += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return shlex.join(["python", "RVE-PFL.py", *words])


def summarise(runs: list[Finished]) -> pd.DataFrame:
    """One row a setting and stage: means over seeds, and the standard deviation where there are several."""
    rows = []
    for setting in dict.fromkeys(run.setting for run in runs):
        same = sorted((run for run in runs if run.setting == setting), key=lambda run: len(run.leaks))
        by_seed = {run.options["seed"]: run for run in same}   # one of each counts, an attacked one first
        same = [by_seed[seed] for seed in sorted(by_seed)]
        options = same[0].options
        for stage in STAGES:
            last = pd.concat([_last(run, stage) for run in same])
            if last.empty:   # nobody was sampled in the last round
                continue
            row = {"dataset": options["dataset"], "partition": same[0].partition,
                   "method": options["method"], "protocol": same[0].protocol, "clients": options["num_users"],
                   "rounds": options["rounds"], "local_ep": options["local_ep"], "stage": stage,
                   "seeds": " ".join(str(run.options["seed"]) for run in same)}
            for figure in FIGURES:
                row[figure], row[f"{figure}_std"] = last[figure].mean(), last[figure].std()
            seconds = sum(run.rounds.drop_duplicates("round")["seconds"].sum() for run in same)
            leaks = [leakage.worst(run.leaks) for run in same if stage == "deployed"]
            rows.append({**row, "seconds": seconds / len(same), "command": command(options),
                         **leakage.over_seeds(leaks)})
    table = pd.DataFrame(rows)
    return table.sort_values(["dataset", "partition", "protocol", "rounds", "local_ep", "stage", "accuracy"],
                             ascending=[True] * 6 + [False]) if rows else table


def _last(run: Finished, stage: str) -> pd.DataFrame:
    rounds = run.rounds
    return rounds[(rounds["round"] == run.options["rounds"]) & (rounds["stage"] == stage)
                  & (rounds["split"] == ASIDE[run.protocol])]


def made(found: dict[str, Finished | str]) -> tuple[list[Finished], dict[str, str], pd.DataFrame, str]:
    """Folders as ``read`` -> finished runs, why others are none or not whole, the table, and the page."""
    runs = [run for run in found.values() if isinstance(run, Finished)]
    others = {name: run if isinstance(run, str) else run.unread for name, run in found.items()}
    others, table = {name: why for name, why in others.items() if why}, summarise(runs)
    return runs, others, table, page(table, runs, others)


def _guarded(call: Callable, run: Path | Finished) -> Finished | str:
    """What the call makes of a run, or that it failed: one run never stops the page of all."""
    try:
        return call(run)
    except Exception as error:
        return f"cannot be shown ({type(error).__name__}: {_line(error)})"


def _line(error: Exception) -> str:
    return shown((str(error).splitlines() or [type(error).__name__])[0][:120])


def main(argv: list[str] | None = None) -> int:
    """Write the report; the exit status."""
    parser = Parser(prog="report.py", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--results_dir", type=Path, default=ROOT / "results", help="where the runs are")
    folder = parser.parse(argv).results_dir
    try:
        if not folder.is_dir():
            raise InputError(f"--results_dir {folder}: no such folder")
        for name in ("report.html", "summary.csv"):
            remove_leftovers(folder, f"{name}.*")
        found = {path.name: _guarded(read, path) for path in sorted(folder.iterdir()) if path.is_dir()}
        try:
            runs, others, table, text = made(found)
        except Exception:   # a run that no check above was made for: which one?
            found = {name: run if isinstance(run, str) else _guarded(lambda run: made({"": run}) and run, run)
                     for name, run in found.items()}
            runs, others, table, text = made(found)
        write_whole(folder / "report.html", lambda file: file.write(text.encode(errors=ESCAPED)))
        write_whole(folder / "summary.csv", lambda file: table.to_csv(
            file, index=False, float_format="%.6g", errors=ESCAPED))
    except InputError as error:
        print(f"report.py: error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"report.py: error: {error.filename or folder}: {error.strerror or error}", file=sys.stderr)
        return 2
    print(f"{len(runs)} runs in {folder / 'report.html'} and {folder / 'summary.csv'}"
          + "".join(f"\nleft out: {shown(name)}: {why}" for name, why in others.items()))
    return 0


if __name__ == "__main__":
    with steady_output("report.py"):
        sys.exit(main())
