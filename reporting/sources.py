"""The committed files behind the tables of README.md and docs/, read so that a fault of theirs is one line.

``root`` is the project's folder everywhere. Runs are those of results/reference/, and CSVs those of docs/.
"""
import re
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

import pandas as pd

from attack.verdict import read_attack
from reporting.summary import Finished, one_line, read
from runs.configs import EVALUATION_SPLIT
from runs.csvs import read_csv
from utils import InputError

DASH = "–"   # was not run
PARTITIONS = ("shards", "dirichlet", "iid")
REFERENCE = Path("results", "reference")
NAME = re.compile(r"(\w+)-((?:shards|dirichlet|iid)(?:-\d+clients)?)-(\d+)x(\d+)-(.+)-seed(\d+)")


def csv(root: Path, name: str, numbers: Sequence[str], texts: Sequence[str] = ()) -> pd.DataFrame:
    """The named columns of docs/NAME, as numbers and as text; empty fields of numbers are NaN.

    Raises:
        InputError: it is missing, lacks a column, or holds something else.
    """
    path = root / "docs" / name
    try:
        table = read_csv(path, dtype=dict.fromkeys(texts, str), keep_default_na=False,
                         na_values=dict.fromkeys(numbers, [""]))
        table = table[[*texts, *numbers]]
        return table.assign(**{one: pd.to_numeric(table[one]) for one in numbers})
    except OSError as error:
        raise InputError(f"docs/{name}: {error.strerror or error}") from error
    except (KeyError, ValueError, TypeError) as error:
        raise InputError(f"docs/{name} is damaged ({one_line(error)})") from error


def run(folder: Path) -> Finished:
    """A finished run, without what attacks on it found.

    Raises:
        InputError: it is not finished, or a file of it is damaged.
    """
    return _run(folder, _changed(folder))


@cache
def _run(folder: Path, changed: float) -> Finished:
    """``run``, once for each state of the folder: several tables read the same runs."""
    found = read(folder, attacks=False)
    if isinstance(found, str):
        raise InputError(f"{REFERENCE / folder.name}: {found}")
    return found


def _changed(folder: Path) -> float:
    return max((path.stat().st_mtime for path in folder.glob("*")), default=0)


def state(root: Path) -> tuple[tuple[str, float], ...]:
    """All runs and when each last changed: what tells whether a result made from them is stale."""
    return tuple((folder.name, _changed(folder)) for folder in sorted((root / REFERENCE).glob("*")))


def attacked(folder: Path) -> pd.DataFrame:
    """What an attacked run's adversaries handed in (restart 0), and the controls: rows of its attack.csv.

    Raises:
        InputError: it cannot be read.
    """
    return _attacked(folder, _changed(folder))


@cache
def _attacked(folder: Path, changed: float) -> pd.DataFrame:
    try:
        rows = read_attack(folder / "attack.csv")
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{REFERENCE / folder.name}/attack.csv: {one_line(error)}") from error
    return rows[(rows["restart"] == 0) | (rows["control"] != "")]


def of_images(root: Path, run: Finished, stage: str) -> float:
    """The share of all clients' test images that the last round's models know.

    Raises:
        InputError: clients.csv is missing or damaged.
    """
    name = REFERENCE / run.name / "clients.csv"
    try:
        table = read_csv(root / name)
        rows = table[(table["round"] == run.options["rounds"]) & (table["stage"] == stage)
                     & (table["split"] == EVALUATION_SPLIT[run.protocol])]
        return float((rows["accuracy"] * rows["n"]).sum() / rows["n"].sum())
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{name}: {one_line(error)}") from error


def study(root: Path) -> Iterator[tuple[tuple[str, str, str], str, int, Finished]]:
    """The study's runs: (data set, partition, rounds x local epochs), label, seed, run.

    Raises:
        InputError: a run is not finished or damaged, or its options are not those that its folder names.
    """
    for path in sorted((root / REFERENCE).glob("*")):
        if named := NAME.fullmatch(path.name):
            dataset, partition, rounds, epochs, label, seed = named.groups()
            if not (path / "config.json").exists():   # being published
                continue
            found = run(path)
            said = [str(found.options[name]) for name in ("dataset", "partition", "rounds", "local_ep", "seed")]
            if said != [dataset, partition.split("-")[0], rounds, epochs, seed]:
                raise InputError(f"{REFERENCE / path.name}: its config.json is of {' '.join(said)}")
            yield (dataset, partition, f"{rounds} x {epochs}"), label, int(seed), found


def grid(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A table in Markdown."""
    body = [head, ["---"] * len(head), *rows]
    return ["|" + "".join(f" {cell} |" if cell else " |" for cell in cells) for cells in body]
