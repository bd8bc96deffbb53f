"""Read finished runs from their folders, and condense them to one row for each setting.

Runs with the same setting differ only in the seed, and in options that do not change the result, such as
where files are kept. A setting's row has means over seeds, and the command that makes its first run.
"""
import json
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from options import args_parser, make_parser
from reporting import leakage
from runs import configs
from runs.configs import EVALUATION_SPLIT
from runs.csvs import csv_columns
from utils import InputError, shown

# Options that do not change the result: not part of a setting, and left out of its command, but for the seed.
BOOKKEEPING_OPTIONS = {"run_name", "seed", "data_dir", "results_dir", "models_dir", "save_rounds", "resume",
                       "overwrite", "checkpoint_seconds", "rendezvous_seconds", "device", "stack",
                       "eval_every"}
BASIC = ("dataset", "method", "partition")   # they decide the defaults of other options
NEEDED = (*BASIC, "num_users", "rounds", "local_ep", "seed")   # options that a config.json must have
RUN_METRICS = {"accuracy": "accuracy", "accuracy_worst": "worst decile", "f1": "macro F1",
               "kl_nats": "KL, nats"}   # columns of rounds.csv, and their names on the page


@dataclass(frozen=True)
class Finished:
    """One finished run."""

    name: str
    protocol: str
    options: dict
    rounds: pd.DataFrame   # rounds.csv
    leaks: pd.DataFrame = field(default_factory=lambda: leakage.NONE)   # attack.csv, condensed (leakage.py)
    pictures: tuple[str, ...] = ()   # names of PNG files in the run's folder
    unread: str = ""   # why attacks are left out

    @property
    def setting(self) -> str:
        """Return a text that is the same for runs that differ only in the seed."""
        kept = {key: value for key, value in self.options.items() if key not in BOOKKEEPING_OPTIONS}
        return json.dumps([self.protocol, kept], sort_keys=True)

    @property
    def partition(self) -> str:
        """Return the partition in words, such as `shards 2, unequal`."""
        partition = self.options["partition"]
        value = self.options.get({"shards": "classes_per_client", "dirichlet": "alpha"}.get(partition))
        unequal = ", unequal" if self.options.get("unequal") else ""
        return f"{partition}{'' if value is None else f' {value:g}'}{unequal}"

    def last(self, stage: str) -> pd.DataFrame:
        """Return the last round on held-out images: one row of ``rounds.csv``, or none."""
        rounds = self.rounds
        return rounds[(rounds["round"] == self.options["rounds"]) & (rounds["stage"] == stage)
                      & (rounds["split"] == EVALUATION_SPLIT[self.protocol])]


def read(folder: Path) -> Finished:
    """Return the finished run in a folder; InputError says why there is none."""
    path = folder / "config.json"
    if not path.exists():
        raise InputError("not a run of this program: no config.json")
    config = configs.read(path, *NEEDED)
    options, protocol = configs.completed(config["options"]), config["protocol"]
    try:
        rounds = _rounds(folder / "rounds.csv", options["rounds"])
    except (OSError, ValueError, TypeError, OverflowError) as error:
        raise InputError(f"rounds.csv is damaged ({one_line(error)})") from error
    if config["status"] != "finished":
        reached = int(rounds["round"].max()) if len(rounds) else 0
        raise InputError(f"unfinished: {reached} of {options['rounds']} rounds; continue with --resume")
    final = rounds[(rounds["round"] == options["rounds"]) & (rounds["stage"] == "deployed")]
    if len(final) != 1:
        raise InputError(f"rounds.csv is damaged (round {options['rounds']} is missing or there more than once)")
    leaks, unread = leakage.NONE, ""
    try:
        leaks = leakage.read(folder)
    except (OSError, ValueError, KeyError, TypeError) as error:
        unread = f"finished, but attack.csv cannot be read ({one_line(error)})"
    pictures = [path.name for name in ("partition.png", *leaks["pictures"].dropna())
                for path in sorted(folder.glob(name))]
    return Finished(folder.name, protocol, options, rounds, leaks, tuple(pictures), unread)


def _rounds(path: Path, asked: int) -> pd.DataFrame:
    """Read ``rounds.csv`` of a run of ``asked`` rounds; an error if it is not what a run writes."""
    rounds = pd.read_csv(path)
    if list(rounds.columns) != csv_columns()["rounds.csv"]:
        raise ValueError("its columns are not those of a run")
    numbers = rounds.columns.difference(["stage", "split"])
    rounds[numbers] = rounds[numbers].apply(pd.to_numeric)
    if not (rounds["round"].between(1, asked).all() and (rounds["round"] % 1 == 0).all()
            and rounds[["accuracy", "accuracy_worst", "f1"]].melt()["value"].between(0, 1).all()
            and rounds["seconds"].between(0, np.finfo(float).max).all()):
        raise ValueError("it has gaps or impossible values")
    return rounds


def command(options: dict) -> str:
    """Return the shortest command that makes a run with these options."""
    words = [[f"--{name}"] if value is True else [f"--{name}", str(value)]
             for name, value in unusual(options).items()]
    return shlex.join(["python", "RVE-PFL.py", *sum(words, [])])


def unusual(options: dict) -> dict[str, Any]:
    """Return the options that are not the default, and the seed; without bookkeeping ones."""
    parser = make_parser()
    basic = [word for name in BASIC for word in (f"--{name}", options[name])]
    usual = {**vars(args_parser(basic)), **{name: parser.get_default(name) for name in BASIC}}
    kept = {}
    for name in parser.options:
        value = options.get(name)
        is_given = value is not None and value is not False and value != usual[name]
        if name == "seed" or (is_given and name not in BOOKKEEPING_OPTIONS):
            kept[name] = value
    return kept


def by_setting(runs: list[Finished]) -> dict[str, list[Finished]]:
    """Return runs by ``setting``, one for each seed; of several with a seed, one that was attacked."""
    settings: dict[str, dict[int, Finished]] = {run.setting: {} for run in runs}
    for run in sorted(runs, key=lambda run: len(run.leaks)):
        settings[run.setting][run.options["seed"]] = run
    return {setting: [seeds[seed] for seed in sorted(seeds)] for setting, seeds in settings.items()}


def summarise(runs: list[Finished]) -> pd.DataFrame:
    """Return summary.csv, by setting: a row for each stage, with means and deviations over seeds."""
    rows = dict[tuple[str, str], dict]()
    for setting, same in by_setting(runs).items():
        options = same[0].options
        for stage in ("deployed", "trained"):
            last = pd.concat([run.last(stage) for run in same])
            if last.empty:   # no client trained in the last round
                continue
            row = {"dataset": options["dataset"], "partition": same[0].partition, "method": options["method"],
                   "protocol": same[0].protocol, "clients": options["num_users"], "rounds": options["rounds"],
                   "local_ep": options["local_ep"], "stage": stage,
                   "seeds": " ".join(str(run.options["seed"]) for run in same)}
            for metric in RUN_METRICS:
                row |= {metric: last[metric].mean(), f"{metric}_std": last[metric].std()}
            seconds = [run.rounds.drop_duplicates("round")["seconds"].sum() for run in same]
            rows[setting, stage] = {**row, "seconds": sum(seconds) / len(same), "command": command(options)}
    table = pd.DataFrame([*rows.values()], index=[setting for setting, _ in rows])
    return table.sort_values(["dataset", "partition", "protocol", "rounds", "local_ep", "stage", "accuracy"],
                             ascending=[True] * 6 + [False]) if rows else table


def one_line(error: Exception) -> str:
    """Return the first line of an error's text, or its type if it has none."""
    return shown((str(error).splitlines() or [type(error).__name__])[0][:120])
