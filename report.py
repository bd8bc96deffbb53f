"""Put all finished runs of a results folder on one page, report.html, and into one table, summary.csv.

A row of the table is a setting: runs that differ only in the seed. It has their means and standard deviations over
seeds, and the command that makes one of them. The page also has pictures of accuracy, convergence and what attacks
found. Folders without a finished run are listed with the reason.
"""
import sys
from pathlib import Path

from engine.memory import in_one_line
from engine.signals import steady_output
from parsing import Option, Parser
from reporting.page import page
from reporting.summary import Finished, as_csv, one_line, read
from runs import folders
from utils import ROOT, InputError, printable, shown, write_whole


def guarded(folder: Path) -> Finished | str:
    """Return the run in a folder, or why there is none; no error of one run stops the report."""
    try:
        return read(folder)
    except InputError as error:
        return str(error).removeprefix(f"{folder}/")
    except Exception as error:
        return f"cannot be read ({type(error).__name__}: {one_line(error)})"


def make_parser() -> Parser:
    """Return the parser of the command line."""
    parser = Parser("report.py", "Put all finished runs of a results folder into one page and one table.")
    parser.add(Option("results_dir", "folder whose subfolders are runs", Path, ROOT / "results"))
    return parser


def write_report(folder: Path) -> None:
    """Write the page and the table of a folder of runs."""
    if not folder.is_dir():
        raise InputError(f"--results_dir {folder}: no such folder")
    for partial in folders.half_written(folder, r"report\.html|summary\.csv"):   # a killed process's
        partial.unlink()
    results = {path.name: guarded(path) for path in sorted(folder.iterdir())
               if path.is_dir() and path != ROOT / "results" / "reference"}   # has no runs, but rows of the pages
    runs = [run for run in results.values() if isinstance(run, Finished)]
    reasons = {name: run if isinstance(run, str) else run.unread for name, run in results.items()}
    reasons = {name: reason for name, reason in reasons.items() if reason}
    # Names of folders may be no text.
    html, table = (text.encode(errors="backslashreplace") for text in (page(runs, reasons), as_csv(runs)))
    write_whole(folder / "report.html", lambda file: file.write(html))
    write_whole(folder / "summary.csv", lambda file: file.write(table))
    place = printable(folder)
    print(f"{len(runs)} runs in {place}/report.html and {place}/summary.csv"
          + "".join(f"\nleft out: {shown(name)}: {printable(reason)}" for name, reason in reasons.items()))


def main(argv: list[str] | None = None) -> int:
    """Write the report and return the exit status."""
    args = make_parser().parse(argv)
    try:
        write_report(args.results_dir)
    except Exception as error:
        if (line := in_one_line("report.py", error)) is None:
            raise
        print(line, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    with steady_output("report.py"):
        sys.exit(main())
