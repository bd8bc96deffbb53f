"""Puts all finished runs of a results folder into one page and one table.

    python report.py                    writes results/report.html and results/summary.csv

A row of the table is a setting: runs that differ only in the seed. It has their means and standard deviations
over seeds, and the command that makes one of them. The page shows the same, and what attacks found. It needs
no other file. Folders that are left out, because a run is unfinished or damaged, say, are listed with the
reason.
"""
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Final

import pandas as pd

from engine.memory import in_one_line
from engine.signals import steady_output
from parsing import Option, Parser
from reporting.page import page
from reporting.summary import Finished, one_line, read, summarise
from utils import ROOT, InputError, printable, remove_leftovers, shown, write_whole

ESCAPED: Final = "backslashreplace"   # bytes of a folder's name that are no text: \xNN


def made(found: dict[str, Finished | str]) -> tuple[list[Finished], dict[str, str], pd.DataFrame, str]:
    """The report, from what ``read`` gives for each folder.

    Returns:
        The finished runs; by folder, why others are left out, or what of a run is; the table; and the page.
    """
    runs = [run for run in found.values() if isinstance(run, Finished)]
    others = {name: run if isinstance(run, str) else run.unread for name, run in found.items()}
    others, table = {name: why for name, why in others.items() if why}, summarise(runs)
    return runs, others, table, page(table, runs, others)


def _guarded(call: Callable, run: Path | Finished) -> Finished | str:
    """The result of a call, or its error in words, so that one bad run does not stop the report."""
    try:
        return call(run)
    except Exception as error:
        return f"cannot be shown ({type(error).__name__}: {one_line(error)})"


def make_parser() -> Parser:
    """The command line."""
    parser = Parser("report.py", "Put all finished runs of a results folder into one page and one table.")
    parser.add(Option("results_dir", "folder whose subfolders are runs", Path, ROOT / "results"))
    return parser


def write_report(folder: Path) -> int:
    """Write the page and the table of a folder of runs; the exit status."""
    if not folder.is_dir():
        raise InputError(f"--results_dir {folder}: no such folder")
    for name in ("report.html", "summary.csv"):
        remove_leftovers(folder, name)
    found = {path.name: _guarded(read, path) for path in sorted(folder.iterdir()) if path.is_dir()}
    try:
        runs, others, table, text = made(found)
    except Exception:   # caused by a run that ``read`` should have refused: find it, and leave it out
        found = {name: run if isinstance(run, str) else _guarded(lambda run: made({"": run}) and run, run)
                 for name, run in found.items()}
        runs, others, table, text = made(found)
    write_whole(folder / "report.html", lambda file: file.write(text.encode(errors=ESCAPED)))
    write_whole(folder / "summary.csv", lambda file: table.to_csv(
        file, index=False, float_format="%.6g", errors=ESCAPED))
    place = printable(folder)
    print(f"{len(runs)} runs in {place}/report.html and {place}/summary.csv"
          + "".join(f"\nleft out: {shown(name)}: {printable(why)}" for name, why in others.items()))
    return 0


def main(argv: list[str] | None = None) -> int:
    """Write the report, or the pages' tables, and return the exit status."""
    parser = make_parser()
    args = parser.parse(argv)
    try:
        return write_report(args.results_dir)
    except Exception as error:
        if (line := in_one_line("report.py", error)) is None:
            raise
        print(line, file=sys.stderr)
    return 2


if __name__ == "__main__":
    with steady_output("report.py"):
        sys.exit(main())
