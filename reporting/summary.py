"""Read finished runs from their folders, and condense them to one row for each setting.

Runs with the same setting differ only in the seed, and in options that do not change the result, such as
where files are kept. A setting's row has means over seeds, and the command that makes its first run.
"""
import json
import shlex
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

from options import args_parser, make_parser
from reporting import leakage
from reporting.images import png
from runs import configs
from runs.configs import EVALUATION_SPLIT
from runs.csvs import read_csv
from runs.run import csv_columns
from utils import InputError, shown

# Options that do not change the result: not part of a setting, and left out of its command, but for the seed.
BOOKKEEPING_OPTIONS = {"run_name", "seed", "data_dir", "results_dir", "models_dir", "save_rounds", "resume",
                       "overwrite", "checkpoint_seconds", "rendezvous_seconds", "device", "stack",
                       "eval_every"}
BASIC = ("dataset", "method", "partition")   # they decide the defaults of other options
STAGES = ("deployed", "trained")
NEEDED = (*BASIC, "num_users", "rounds", "local_ep", "seed")   # options that a config.json must have
SHARES = ["accuracy", "accuracy_worst", "f1"]   # columns of rounds.csv, from 0 to 1
RUN_METRICS = {"accuracy": "accuracy", "accuracy_worst": "worst decile", "f1": "macro F1",
               "kl_nats": "KL, nats"}   # columns of rounds.csv, and their names on the page


@dataclass(frozen=True)
class Finished:
    """One finished run.

    Attributes:
        rounds: its ``rounds.csv``.
        leaks: what attacks on it found, condensed (leakage.py).
        pictures: PNG files by name.
        unread: why attacks or pictures are left out, in words; "" if nothing is.
    """

    name: str
    protocol: str
    options: dict
    rounds: pd.DataFrame
    leaks: pd.DataFrame = field(default_factory=lambda: leakage.NONE)
    pictures: dict[str, bytes] = field(default_factory=dict)
    unread: str = ""

    @property
    def setting(self) -> str:
        """Return a text that is the same for runs that differ only in the seed."""
        kept = {key: value for key, value in self.options.items() if key not in BOOKKEEPING_OPTIONS}
        return json.dumps([self.protocol, kept], sort_keys=True)

    @property
    def partition(self) -> str:
        """Return the partition in words, such as `shards 2, unequal`."""
        extra = {"shards": self.options.get("classes_per_client"), "dirichlet": self.options.get("alpha")}
        unequal = ", unequal" if self.options.get("unequal") else ""
        value = extra.get(self.options["partition"])
        return f"{self.options['partition']}{'' if value is None else f' {value:g}'}{unequal}"


def read(folder: Path) -> Finished | str:
    """Return the finished run in a folder, or the reason why there is none."""
    path = folder / "config.json"
    if not path.exists():
        return "not a run of this program: no config.json"
    try:
        config = configs.read(path, *NEEDED)
    except InputError as error:
        return str(error).removeprefix(f"{folder}/")
    options, protocol = configs.completed(config["options"]), config["protocol"]
    try:
        rounds = _rounds(folder / "rounds.csv", options["rounds"])
    except (OSError, ValueError, TypeError, OverflowError) as error:
        return f"rounds.csv is damaged ({one_line(error)})"
    if config["status"] != "finished":
        reached = int(rounds["round"].max()) if len(rounds) else 0
        return f"unfinished: {reached} of {options['rounds']} rounds; continue with --resume"
    final = rounds[(rounds["round"] == options["rounds"]) & (rounds["stage"] == "deployed")]
    if len(final) != 1:
        return f"rounds.csv is damaged (round {options['rounds']} is missing or there more than once)"
    leaks, pictures, faults = leakage.NONE, {}, []
    try:
        leaks = leakage.read(folder)
    except (OSError, ValueError, KeyError, TypeError) as error:
        faults.append(f"attack.csv cannot be read ({one_line(error)})")
    for name in ("partition.png", *leaks["pictures"].dropna()):
        for picture in sorted(folder.glob(name)):
            try:
                pictures[picture.name] = png(picture)
            except (OSError, ValueError) as error:
                faults.append(f"{picture.name} is left out ({one_line(error)})")
    unread = f"finished, but {'; '.join(faults)}" if faults else ""
    return Finished(folder.name, protocol, options, rounds, leaks, pictures, unread)


def _rounds(path: Path, asked: int) -> pd.DataFrame:
    """Read ``rounds.csv`` of a run of ``asked`` rounds; an error if it is not what a run writes."""
    rounds = read_csv(path)
    if list(rounds.columns) != csv_columns()["rounds.csv"]:
        raise ValueError("its columns are not those of a run")
    numbers = [name for name in csv_columns()["rounds.csv"] if name not in ("stage", "split")]
    rounds[numbers] = rounds[numbers].apply(pd.to_numeric)
    if not (rounds["round"].between(1, asked).all() and (rounds["round"] % 1 == 0).all()
            and rounds[SHARES].apply(lambda column: column.between(0, 1)).all(axis=None)
            and rounds["seconds"].between(0, np.finfo(float).max).all()):
        raise ValueError("it has gaps or impossible values")
    return rounds


def command(options: dict) -> str:
    """Return the shortest command that makes a run with these options."""
    words = []
    for name, value in unusual(options).items():
        words += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return shlex.join(["python", "RVE-PFL.py", *words])


def unusual(options: dict) -> dict[str, object]:
    """Return the options that are not the default, and the seed; without bookkeeping ones."""
    parser = make_parser()
    basic = [word for name in BASIC for word in (f"--{name}", options[name])]
    usual = {**vars(args_parser(basic)), **{name: parser.get_default(name) for name in BASIC}}
    found = {}
    for name in [action.dest for action in parser._actions]:
        value = options.get(name)
        differs = value is not None and value is not False and value != usual.get(name)
        if name == "seed" or (differs and name not in BOOKKEEPING_OPTIONS):
            found[name] = value
    return found


def by_setting(runs: list[Finished]) -> dict[str, list[Finished]]:
    """Return runs by ``setting``, one for each seed; of several with a seed, one that was attacked."""
    found = {}
    for setting in dict.fromkeys(run.setting for run in runs):
        same = sorted((run for run in runs if run.setting == setting), key=lambda run: len(run.leaks))
        seeds = {run.options["seed"]: run for run in same}
        found[setting] = [seeds[seed] for seed in sorted(seeds)]
    return found


def summarise(runs: list[Finished]) -> pd.DataFrame:
    """Return summary.csv, by setting: a row for each stage, with means and deviations over seeds."""
    rows, settings = list[dict](), []
    for setting, same in by_setting(runs).items():
        options = same[0].options
        for stage in STAGES:
            last = pd.concat([last_round(run, stage) for run in same])
            if last.empty:   # no client trained in the last round
                continue
            row = {"dataset": options["dataset"], "partition": same[0].partition,
                   "method": options["method"], "protocol": same[0].protocol, "clients": options["num_users"],
                   "rounds": options["rounds"], "local_ep": options["local_ep"], "stage": stage,
                   "seeds": " ".join(str(run.options["seed"]) for run in same)}
            for metric in RUN_METRICS:
                row[metric], row[f"{metric}_std"] = last[metric].mean(), last[metric].std()
            seconds = sum(run.rounds.drop_duplicates("round")["seconds"].sum() for run in same)
            leaks = [leakage.worst(run.leaks) for run in same if stage == "deployed"]
            settings.append(setting)
            rows.append({**row, "seconds": seconds / len(same), "command": command(options),
                         **leakage.over_seeds(leaks)})
    table = pd.DataFrame(rows, index=settings)
    return table.sort_values(["dataset", "partition", "protocol", "rounds", "local_ep", "stage", "accuracy"],
                             ascending=[True] * 6 + [False]) if rows else table


def last_round(run: Finished, stage: str) -> pd.DataFrame:
    """Return the run's last round on held-out images: one row of ``rounds.csv``, or none."""
    rounds = run.rounds
    return rounds[(rounds["round"] == run.options["rounds"]) & (rounds["stage"] == stage)
                  & (rounds["split"] == EVALUATION_SPLIT[run.protocol])]


def one_line(error: Exception) -> str:
    """Return the first line of an error's text, or its type if it has none."""
    return shown((str(error).splitlines() or [type(error).__name__])[0][:120])
