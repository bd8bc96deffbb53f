"""Runs read from their folders; a row for each setting: means over seeds, and the command that makes them.

Options that only say where and how a run was made are left out of a setting and of its command.
"""
import json
import shlex
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

from options import args_parser, make_parser, shown
from reporting import leakage
from reporting.page import METRICS, png
from runs import configs
from runs.configs import ASIDE
from runs.run import COLUMNS
from utils import InputError

# Options that say where and how, not what: they part no settings and stand in no command.
BOOKKEEPING_OPTIONS = {"run_name", "seed", "data_dir", "results_dir", "models_dir", "save_rounds", "resume",
                 "overwrite", "checkpoint_seconds", "rendezvous_seconds", "device", "stack", "eval_every"}
BASIC = ("dataset", "method", "partition")   # on which the defaults of others depend
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
        kept = {key: value for key, value in self.options.items() if key not in BOOKKEEPING_OPTIONS}
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
        return f"rounds.csv is damaged ({one_line(error)})"
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
        faults.append(f"attack_summary.csv or attack.json is damaged ({one_line(error)})")
    for name in ("partition.png", *leakage.pictures(leaks)):
        for picture in sorted(folder.glob(name)):
            try:
                pictures[picture.name] = png(picture)
            except (OSError, ValueError) as error:
                faults.append(f"{picture.name} is left out ({one_line(error)})")
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
        if name == "seed" or (unusual and name not in BOOKKEEPING_OPTIONS):
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
            for metric in METRICS:
                row[metric], row[f"{metric}_std"] = last[metric].mean(), last[metric].std()
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


def one_line(error: Exception) -> str:
    """The first line of an error's text, or its kind."""
    return shown((str(error).splitlines() or [type(error).__name__])[0][:120])
