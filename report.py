"""All runs under results/ as one page and one table.

    python report.py                    writes results/report.html and results/summary.csv

A row of the table is a setting: runs that differ in nothing but the seed, their means and standard deviations
over seeds, and the command that makes them. Runs that are unfinished, damaged or not this program's are
listed with the reason. The page needs no other file.
"""
import contextlib
import io
import json
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

import leakage
from files import remove_leftovers, write_whole
from options import ROOT, Parser, args_parser, make_parser
from page import FIGURES, page
from runs import ASIDE, COLUMNS
from utils import InputError, steady_output

# Options that say where and how, not what: they part no settings and stand in no command.
ASIDE_OPTIONS = {"run_name", "seed", "data_dir", "results_dir", "models_dir", "save_rounds", "resume",
                 "overwrite", "checkpoint_seconds", "rendezvous_seconds", "device", "stack", "eval_every"}
BASIC = ("dataset", "method", "partition")   # on which the defaults of others depend
ESCAPED = "backslashreplace"   # what becomes of bytes in a folder's name that are no letters
STAGES = ("deployed", "trained")


@dataclass(frozen=True)
class Finished:
    """One finished run: its options, its protocol, its folder, ``rounds.csv``, and what attackers found of it
    (leakage.py), or why that cannot be read."""

    name: str
    folder: Path
    protocol: str
    options: dict
    rounds: pd.DataFrame
    leaks: pd.DataFrame
    unread: str

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
        config = json.loads(path.read_text())
        options, status, protocol = config["options"], config["status"], config["protocol"]
        options.setdefault("aggregation", "mean")   # all there was when such runs were made
        if protocol not in ASIDE or {"num_users", "local_ep", "seed"} - set(options):
            raise ValueError("of another version, or not this program's")
        asked = int(options["rounds"])
        with contextlib.redirect_stderr(io.StringIO()) as said:
            command(options)
    except SystemExit:   # argparse's way out
        return f"its options are not this version's ({said.getvalue().strip()})"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"config.json is damaged ({_line(error)})"
    try:
        rounds = pd.read_csv(folder / "rounds.csv")
        if list(rounds.columns) != COLUMNS["rounds.csv"]:
            raise ValueError("its columns are not those of a run")
        reached = int(rounds["round"].max()) if len(rounds) else 0
        final = rounds[(rounds["round"] == asked) & (rounds["stage"] == "deployed")]
        numbers = rounds[["accuracy", "accuracy_worst", "f1", "seconds"]].apply(pd.to_numeric)
    except (OSError, ValueError, TypeError) as error:
        return f"rounds.csv is damaged ({_line(error)})"
    if status != "finished":
        return f"unfinished: {reached} of {asked} rounds; go on with --resume"
    if len(final) != 1 or numbers.isna().any(axis=None):
        return f"rounds.csv is damaged (round {asked} is missing or has gaps)"
    return Finished(folder.name, folder, protocol, options, rounds, *_attacked(folder))


def _attacked(folder: Path) -> tuple[pd.DataFrame, str]:
    try:
        return leakage.read(folder), ""
    except (OSError, ValueError, KeyError, TypeError) as error:
        return leakage.NONE, f"finished, but attack_summary.csv or attack.json is damaged ({_line(error)})"


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


def _line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:120]


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
        found = {path.name: read(path) for path in sorted(folder.iterdir()) if path.is_dir()}
        runs = [run for run in found.values() if isinstance(run, Finished)]
        table = summarise(runs)
        others = {name: run if isinstance(run, str) else run.unread for name, run in found.items()}
        others = {name: why for name, why in others.items() if why}
        text = page(table, runs, others)
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
          + "".join(f"\nleft out: {name}: {why}" for name, why in others.items()))
    return 0


if __name__ == "__main__":
    with steady_output("report.py"):
        sys.exit(main())
