"""Read finished runs from their folders, and condense them to one row for each setting.

Runs with the same setting differ only in the seed, and in options that do not change the result, such as
where files are kept. A setting's row has means over seeds, and the command that makes its first run.
"""
import csv
import io
import json
import shlex
import statistics
from dataclasses import dataclass, field
from functools import cache, cached_property
from math import inf, nan
from pathlib import Path
from typing import Any

from options import args_parser, shared_parser
from reporting import leakage
from runs import configs
from runs.configs import EVALUATION_SPLIT
from runs.csvs import csv_columns
from utils import InputError, shown

# Options that do not change the result: not part of a setting, and left out of its command, but for the seed.
BOOKKEEPING_OPTIONS = {"run_name", "seed", "data_dir", "results_dir", "models_dir", "save_rounds", "resume",
                       "overwrite", "checkpoint_seconds", "rendezvous_seconds", "device", "stack",
                       "eval_every", "preset", "tensorboard"}
BASIC = ("dataset", "method", "partition")   # with the prior, they decide the defaults of other options
NEEDED = (*BASIC, "num_users", "rounds", "local_ep", "local_steps", "seed")   # a config.json must have these
RUN_METRICS = {"accuracy": "accuracy", "accuracy_worst": "worst decile", "accuracy_images": "all images",
               "f1": "macro F1", "kl_nats": "KL, nats"}   # columns of rounds.csv, and their names on the page


@dataclass(frozen=True)
class Finished:
    """One finished run."""

    name: str
    protocol: str
    options: dict
    rounds: list[dict[str, Any]]   # rows of rounds.csv
    leaks: list[dict[str, Any]] = field(default_factory=list)   # attack.csv, condensed (leakage.py)
    has_partition_picture: bool = False
    unread: str = ""   # why attacks are left out

    @cached_property
    def setting(self) -> str:
        """A text that is the same for runs that differ only in the seed."""
        kept = {key: value for key, value in self.options.items() if key not in BOOKKEEPING_OPTIONS}
        return json.dumps([self.protocol, kept], sort_keys=True)

    @property
    def partition(self) -> str:
        """The partition in words, such as `shards 2, unequal`."""
        partition = self.options["partition"]
        value = next((self.options[name] for name in ("classes_per_client", "alpha")
                      if self.options.get(name) is not None), None)   # what the partition does not read is None
        unequal = ", unequal" if self.options.get("unequal") else ""
        return f"{partition}{'' if value is None else f' {value:g}'}{unequal}"

    def last(self, stage: str, metric: str) -> float:
        """Return a metric after the last round on held-out images; not a number if there is none."""
        return next((row[metric] for row in self.rounds
                     if row["round"] == self.options["rounds"] and row["stage"] == stage
                     and row["split"] == EVALUATION_SPLIT[self.protocol]), nan)

    def seconds(self) -> float:
        """Return how long all rounds took."""
        return sum({row["round"]: row["seconds"] for row in self.rounds}.values())


def read(folder: Path) -> Finished:
    """Return the finished run in a folder; InputError says why there is none."""
    path = folder / "config.json"
    if not path.exists():
        raise InputError("not a run of this program: no config.json")
    config = configs.read(path, *NEEDED)
    options, protocol = configs.completed(config["options"]), config["protocol"]
    try:
        rounds = _rounds(folder / "rounds.csv", options["rounds"])
    except (OSError, ValueError, OverflowError, csv.Error) as error:
        raise InputError(f"rounds.csv is damaged ({one_line(error)})") from error
    if config["status"] != "finished":
        reached = max((row["round"] for row in rounds), default=0)
        raise InputError(f"unfinished: {reached} of {options['rounds']} rounds; continue with --resume")
    final = [(row["stage"], row["split"]) for row in rounds if row["round"] == options["rounds"]]
    if final.count(("deployed", EVALUATION_SPLIT[protocol])) != 1:
        raise InputError(f"rounds.csv is damaged (round {options['rounds']} is missing or there more than once)")
    leaks, unread = list[dict](), ""
    if (folder / "attack.csv").exists():
        try:
            leaks = leakage.read(folder)
        except (OSError, ValueError, KeyError, TypeError) as error:
            unread = f"finished, but attack.csv cannot be read ({one_line(error)})"
    return Finished(folder.name, protocol, options, rounds, leaks, (folder / "partition.png").exists(), unread)


def _rounds(path: Path, asked: int) -> list[dict[str, Any]]:
    """Read ``rounds.csv`` of a run of ``asked`` rounds; an error if it is not what a run writes."""
    rows = []
    with path.open(newline="", encoding="utf-8") as file:
        lines = csv.reader(file)
        columns = next(lines, [])
        if columns != csv_columns(sum("_class_" in name for name in columns))["rounds.csv"]:
            raise ValueError("its columns are not those of a run")
        for line in lines:
            cells = dict(zip(columns, line, strict=True))
            texts = {name: cells.pop(name) for name in ("stage", "split")}
            row = {name: float(cell or nan) for name, cell in cells.items()}
            shares = [row[name] for name in RUN_METRICS if name != "kl_nats"]
            if not (1 <= row["round"] <= asked and row["round"].is_integer() and 0 <= row["seconds"] < inf
                    and all(0 <= share <= 1 for share in shares)):
                raise ValueError("it has gaps or impossible values")
            rows.append({**texts, **row, "round": int(row["round"])})
    return rows


def command(options: dict) -> str:
    """Return the shortest command that makes a run with these options."""
    words = [[f"--{name if value else f'no-{name}'}"] if isinstance(value, bool) else [f"--{name}", str(value)]
             for name, value in unusual(options).items()]
    return shlex.join(["python", "RVE-PFL.py", *sum(words, [])])


def unusual(options: dict) -> dict[str, Any]:
    """Return the options that are not the default, and the seed; without bookkeeping ones."""
    kept = {}
    for name, default in _usual(options.get("prior"), *(options[name] for name in BASIC)).items():
        value = options.get(name)
        is_given = value is not None and value != default
        if name == "seed" or (is_given and name not in BOOKKEEPING_OPTIONS):
            kept[name] = value
    return kept


@cache
def _usual(prior: str | None, *values: str) -> dict[str, Any]:
    """Return the default of every option where the ``BASIC`` ones have these values, and the prior is this one."""
    parser = shared_parser()
    words = [word for name, value in zip(BASIC, values, strict=True) for word in (f"--{name}", value)]
    usual = vars(args_parser(words, parser))
    if prior not in (None, usual["prior"]):
        usual = {**vars(args_parser([*words, "--prior", str(prior)], parser)), "prior": usual["prior"]}
    return {name: parser.get_default(name) if name in BASIC else usual[name] for name in parser.options}


def by_setting(runs: list[Finished]) -> list[list[Finished]]:
    """Return runs by ``setting``, one for each seed; of several with a seed, one that was attacked.

    Settings are in the order of summary.csv: the more accurate first among those that can be compared.
    """
    settings: dict[str, dict[int, Finished]] = {run.setting: {} for run in runs}
    for run in sorted(runs, key=lambda run: len(run.leaks)):
        settings[run.setting][run.options["seed"]] = run
    return sorted(([seeds[seed] for seed in sorted(seeds)] for seeds in settings.values()), key=lambda same: (
        same[0].options["dataset"], same[0].partition, same[0].protocol, same[0].options["rounds"],
        same[0].options["local_ep"] or 0, same[0].options["local_steps"] or 0, -mean(figures(same, "accuracy"))))


def labels(settings: list[list[Finished]]) -> list[str]:
    """Return each setting's method, and its options that are neither the default nor the same in all of them."""
    texts = [[name if value is True else f"{name} {value}" for name, value in unusual(same[0].options).items()
              if name not in (*BASIC, "seed", "resplit", "validate")] for same in settings]
    common = set.intersection(*map(set, texts))
    # The figures of another protocol than the usual one are not comparable.
    return [" ".join([same[0].options["method"], *[same[0].protocol] * (same[0].protocol != "held-out"),
                      ", ".join(text for text in words if text not in common)]).strip()
            for same, words in zip(settings, texts, strict=True)]


def figures(runs: list[Finished], metric: str, stage: str = "deployed") -> list[float]:
    """Return ``last`` of each run that has one."""
    return [value for run in runs if (value := run.last(stage, metric)) == value]


def mean(values: list[float]) -> float:
    """Return the mean; not a number without values."""
    return statistics.fmean(values) if values else nan


def deviation(values: list[float]) -> float:
    """Return the standard deviation; not a number with less than two values."""
    return statistics.stdev(values) if len(values) > 1 else nan


def half_interval(values: list[float]) -> float:
    """Return half the width of the mean's 95 % interval (Student's t); not a number with less than 3 values."""
    if len(values) < 3:
        return nan
    from scipy.special import stdtrit  # takes 0.4 s
    return deviation(values) * float(stdtrit(len(values) - 1, 0.975)) / len(values) ** 0.5


def as_csv(runs: list[Finished]) -> str:
    """Return the text of summary.csv."""
    text, rows = io.StringIO(), summarise(runs)
    writer = csv.DictWriter(text, rows[0] if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows([{name: f"{value:.6g}".replace("nan", "") if isinstance(value, float) else value
                       for name, value in row.items()} for row in rows])
    return text.getvalue()


def summarise(runs: list[Finished]) -> list[dict[str, Any]]:
    """Return the rows of summary.csv: one for each setting and stage, with means and deviations over seeds."""
    rows = []
    for same in by_setting(runs):
        options = same[0].options
        for stage in dict.fromkeys(("deployed", "trained", *(row["stage"] for run in same for row in run.rounds))):
            metrics = {name: figures(same, name, stage) for name in RUN_METRICS}
            if not metrics["accuracy"]:   # no client trained in the last round
                continue
            rows.append({
                "dataset": options["dataset"], "partition": same[0].partition, "method": options["method"],
                "protocol": same[0].protocol, "clients": options["num_users"], "rounds": options["rounds"],
                "local_ep": options["local_ep"], "stage": stage,
                "seeds": " ".join(str(run.options["seed"]) for run in same),
                **{f"{name}{suffix}": statistic(values) for name, values in metrics.items()
                   for suffix, statistic in (("", mean), ("_std", deviation))},
                "seconds": mean([run.seconds() for run in same]), "command": command(options)})
    return rows


def one_line(error: Exception) -> str:
    """Return the first line of an error's text, or its type if it has none."""
    return shown((str(error).splitlines() or [type(error).__name__])[0][:120])
