"""The parts that all experiments share: declaration, queue of runs, CSV, table, picture and command line.

    python experiments/NAME.py              run what is missing; the same command goes on after an interruption
    python experiments/NAME.py --list       print each command line and whether it is done
    python experiments/NAME.py --draw       redraw the picture, and the table of the page, from the CSV

A file of this folder declares one ``Experiment`` and passes it to ``main``. Its rows are in
results/reference/NAME.csv, each with the command behind it; its page is docs/NAME.md, its picture docs/NAME.png.
"""
from __future__ import annotations

import argparse
import csv
import hashlib
import importlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

ROOT: Final = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from engine.signals import steady_output  # noqa: E402, after the path
from parsing import NAME, Option, Parser  # noqa: E402
from runs.configs import read_json  # noqa: E402
from utils import InputError, Late, commit, error_line, write_whole  # noqa: E402

if TYPE_CHECKING:
    import pandas as pd
    import torch
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    import devices
    from runs import plots
else:   # --list and --help need none of them
    Figure = Any
    pd, torch, devices, plots = Late("pandas"), Late("torch"), Late("devices"), Late("runs.plots")

REFERENCE: Final = ROOT / "results" / "reference"
PAGES: Final = ROOT / "docs"
SEEDS: Final = (11, 12, 13)   # of tables; options are chosen on seeds 1 to 3
Options = dict[str, Any]   # of a command line, by name
STUDENT: Final = 4.303   # 97.5 % quantile of Student's t with two degrees of freedom: three seeds
PROVENANCE: Final = ["seed", "precision", "processor", "commit", "command"]
START, END = "<!-- results -->", "<!-- end -->"
GENERATED: Final = [".", ":(exclude)results/reference", ":(exclude)docs"]   # files that the queue itself changes


@dataclass(frozen=True)
class Task:
    """One run of the queue."""

    run: str   # name of its folder under results/ and saved_models/
    key: Options   # columns that tell this run from others
    seed: int
    commands: tuple[str, ...]   # as a reader would type them, run one after the other

    @property
    def command(self) -> str:
        """Return the literal command line."""
        return " && ".join(self.commands)

    @property
    def runs(self) -> set[str]:
        """Return the names of the runs that it trains or reads; other tasks may name some of them, too."""
        return {self.run, *map(run_of, self.commands)}


@dataclass(frozen=True)
class Experiment:
    """One question and how it is answered."""

    name: str   # of its file, page, CSV and picture
    question: str
    tasks: Callable[[Sequence[int]], list[Task]]   # the runs for some seeds, the most important first
    measure: Callable[[Path], list[dict]]   # rows of the CSV from the folder of a finished run, results/RUN
    settings: Sequence[str]   # columns that tell settings apart; one counts if it has all seeds in one precision
    tabulate: Callable[[pd.DataFrame], pd.DataFrame]   # a row for each row of the table and seed
    keys: dict[str, str]   # columns of those rows that name a row of the table, with their headings
    values: dict[str, tuple[str, str]]   # columns whose means the table shows, with headings and formats
    draw: Callable[[pd.DataFrame], Figure]   # from the rows of the settings that count
    spread: str   # the column of ``values`` whose 95 % interval the table shows
    inspect: Callable[[str], list[dict]] | None = None   # rows about the run that ``--run`` names


def flags(options: Options) -> str:
    """Return options as words of a command line."""
    return " ".join(f"--{name}" if value is True else f"--{name} {value}" for name, value in options.items())


def run_of(command: str) -> str:
    """Return the name of the run that a command line trains or reads."""
    words = shlex.split(command)
    return next(words[words.index(flag) + 1] for flag in ("--run_name", "--run") if flag in words)


def training(run: str, options: Options) -> str:
    """Return the command line that trains a run."""
    return f"python RVE-PFL.py {flags(options)} --run_name {run}"


def slug(words: str) -> str:
    """Return words as part of a folder's name."""
    return words.replace(", ", "-").replace(" ", "_")


def curve(folder: Path) -> list[dict]:
    """Return a row for each evaluated round of a run: means over clients, and over all images, held out."""
    rounds = pd.read_csv(folder / "rounds.csv")
    rows = []
    for number, part in rounds[rounds["split"] != "train"].groupby("round"):
        row: dict[str, Any] = {"round": number}
        for stage, values in part.set_index("stage").sort_index().iterrows():
            row |= {str(stage): values["accuracy"], f"{stage}_worst": values["accuracy_worst"],
                    f"{stage}_images": values["accuracy_images"]}
        deployed = part[part["stage"] == "deployed"].iloc[0]
        rows.append({**row, "kl_nats": deployed["kl_nats"], "seconds": deployed["seconds"]})
    return rows


def half_interval(values: pd.DataFrame | pd.Series) -> Any:
    """Return half the 95 % interval of each column's mean over ``SEEDS``, by Student's t."""
    return STUDENT * values.std() / len(SEEDS) ** 0.5


def chosen(rows: pd.DataFrame, columns: Sequence[str], keys: Sequence[tuple]) -> pd.DataFrame:
    """Return the rows whose ``columns`` are one of ``keys``, in the order of ``keys``."""
    by = rows.set_index([*columns], drop=False).sort_index()
    return pd.concat([by.loc[[key]] for key in keys if key in by.index] or [by[:0]]).reset_index(drop=True)


def panels(count: int, size: tuple[float, float] = (3.2, 2.9), **more: Any) -> tuple[Figure, list[Axes]]:
    """Return a figure, and its panels of ``size`` inches in rows of at most three."""
    columns, rows = min(3, count), -(-count // 3)
    figure, axes = plots.plt.subplots(rows, columns, figsize=(size[0] * columns, size[1] * rows + 0.6),
                                      squeeze=False, layout="constrained", **more)
    for panel in axes.flat[count:]:
        panel.axis("off")
    return figure, list(axes.flat[:count])


def legend(figure: Figure) -> None:
    """Put one legend for all panels below them."""
    lines = {str(line.get_label()): line for panel in figure.axes for line in panel.get_legend_handles_labels()[0]}
    figure.legend([*lines.values()], [*lines], loc="outside lower center", ncols=3, fontsize=8)


def dots(rows: pd.DataFrame, keys: Sequence[str], values: Sequence[str], **axes: Any) -> Figure:
    """Draw columns of the table's rows, a dot for each seed; keywords are properties of the axes."""
    names = rows[[*keys]].astype(str).agg(", ".join, axis=1)
    figure, (panel,) = panels(1, (7.5, 0.8 + 0.3 * names.nunique()))
    for name in values:
        panel.plot(rows[name], names, "o", alpha=0.7, label=name.replace("_", " "))
    panel.set(ylim=(names.nunique() - 0.5, -0.5), **axes)   # the first row on top
    legend(figure)
    return figure


def provenance(task: Task, folder: Path, made_by: str) -> Options:
    """Return the columns that say how a row was made."""
    config, cpu = folder / "config.json", torch.device("cpu")
    facts = json.loads(config.read_text()) if config.exists() else {
        **devices.environment(cpu), "precision": str(devices.choose_precision("auto", cpu))}
    return {"seed": task.seed, "precision": facts["precision"].removeprefix("torch."),
            "processor": facts["device"], "commit": made_by, "command": task.command}


def read(path: Path) -> pd.DataFrame:
    """Return the rows of an experiment's CSV, none if there is no file; InputError if it is no such CSV."""
    if not path.exists():
        return pd.DataFrame(columns=PROVENANCE)
    try:
        rows = pd.read_csv(path, dtype={"commit": str}, keep_default_na=False, na_values=[""])   # "nan" is a name
    except ValueError as error:
        raise InputError(f"{path}: cannot be read ({error})") from error
    if missing := [name for name in PROVENANCE if name not in rows]:
        raise InputError(f"{path}: has no column {missing[0]}")
    return rows


def add(path: Path, rows: list[dict]) -> None:
    """Add rows to a CSV in place of those of the same command."""
    old, new = read(path), pd.DataFrame(rows)
    old = old[~old["command"].isin(new["command"])]
    table = new if old.empty else pd.concat([old, new])
    table = table[[*(name for name in table if name not in PROVENANCE), *PROVENANCE]]
    write_whole(path, lambda file: table.to_csv(file, index=False, float_format="%.5g"))


class Queue:
    """Run tasks that are not done, several at a time with one thread each, and keep their rows in a CSV."""

    def __init__(self, experiment: Experiment, out: Path):
        self.experiment, self.path = experiment, out / f"{experiment.name}.csv"
        self.lock, self.running, self.stopped, self.failed = threading.Lock(), set[subprocess.Popen](), False, 0
        self.in_use: dict[str, threading.Lock] = {}   # by run: a process at a time

    def missing(self, tasks: Sequence[Task]) -> list[Task]:
        """Return the tasks of whose command the CSV has no rows."""
        if not self.path.exists():
            return list(tasks)
        with open(self.path, encoding="utf-8", errors="replace", newline="") as file:
            rows = csv.DictReader(file)
            if not set(rows.fieldnames or ()) >= set(PROVENANCE):
                read(self.path)   # says what is wrong
            done = {row["command"] for row in rows}
        return [task for task in tasks if task.command not in done]

    def run(self, tasks: Sequence[Task], workers: int) -> int:
        """Run what is missing and return the exit status."""
        with ThreadPoolExecutor(workers) as pool:
            try:
                list(pool.map(self.make, self.missing(tasks)))
            except BaseException:
                self.stop()
                raise
        return int(self.failed > 0)

    def make(self, task: Task) -> None:
        """Run one task, add its rows to the CSV, and delete the folders that no missing task needs."""
        made_by, folder = commit(*GENERATED), ROOT / "results" / task.run
        if fault := self.foreign(task, made_by):
            self.fail(task, fault)
            return
        if not all(self.call(task, command) for command in task.commands):
            return
        rows, facts = self.experiment.measure(folder), provenance(task, folder, made_by)
        with self.lock:
            add(self.path, [{**task.key, **row, **facts} for row in rows])
            needed = {run for other in self.missing(self.experiment.tasks([task.seed])) for run in other.runs}
        for run in task.runs - needed:
            for made in (ROOT / "results" / run, ROOT / "saved_models" / run):
                shutil.rmtree(made, ignore_errors=True)
        print(f"done    {task.run}", flush=True)

    def foreign(self, task: Task, made_by: str) -> str | None:
        """Return why a task cannot go on: another commit began one of its runs, and a row names one commit."""
        for run in sorted(task.runs):
            if not (config := ROOT / "results" / run / "config.json").exists():
                continue
            try:
                begun = str(read_json(config).get("commit"))[:12]
            except ValueError as error:
                return f"{config}: cannot be read ({error}); delete results/{run}"
            if begun != made_by[:12]:
                return f"commit {begun} began it; check that out, or delete results/{run}"
        return None

    def call(self, task: Task, command: str) -> bool:
        """Run one command line in a process of its own, alone on its run; return whether it succeeded."""
        words = [sys.executable, *shlex.split(command)[1:], *["--resume"] * ("RVE-PFL.py" in command)]
        with self.lock:
            alone = self.in_use.setdefault(run_of(command), threading.Lock())
        with alone:
            return self.process(task, words)

    def process(self, task: Task, words: list[str]) -> bool:
        """Run the words of a command line, and return whether it succeeded."""
        with self.lock:
            if self.stopped:
                return False
            process = subprocess.Popen(words, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"},
                                       stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                                       start_new_session=True)
            self.running.add(process)
        lines = process.communicate()[1].strip().splitlines() or ["it gave no reason"]
        with self.lock:
            self.running.discard(process)
        if process.returncode and not self.stopped:
            self.fail(task, lines[-1])
        return process.returncode == 0

    def fail(self, task: Task, reason: str) -> None:
        """Count and say a failure."""
        with self.lock:
            self.failed += 1
            print(f"failed  {task.run}: {reason}", flush=True)

    def stop(self) -> None:
        """Let the runs write a checkpoint and end; start no others."""
        with self.lock:
            self.stopped = True
            for process in self.running:
                process.terminate()


def whole(experiment: Experiment, rows: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of the settings that have every seed of ``SEEDS``, all in one precision."""
    rows = rows[rows["seed"].isin(SEEDS)]
    if rows.empty:
        return rows
    rows = rows[rows["precision"] == rows["precision"].mode()[0]]
    seeds = rows.groupby([*experiment.settings], dropna=False)["seed"].transform("nunique")
    return rows[seeds == len(SEEDS)]


def table(experiment: Experiment, rows: pd.DataFrame) -> list[str]:
    """Return the lines of the table: means over seeds, one number per cell, and one column of half intervals.

    A column that nothing was measured for is left out, and so is a row with gaps in the others.
    """
    rows = experiment.tabulate(rows)
    measured = [name for name in experiment.values if name in rows and rows[name].notna().any()]
    values = {name: experiment.values[name] for name in measured}
    heads = [*experiment.keys.values()]
    for name, (heading, _) in values.items():
        heads += [heading, "± (95 %)"] if name == experiment.spread else [heading]
    lines = [heads, ["---"] * len(heads)]
    for key, part in rows.groupby([*experiment.keys], sort=False, dropna=False):
        if part[[*values]].isna().any(axis=None):
            continue
        cells, seeds = [str(word) for word in key], part.groupby("seed")[[*values]].mean()
        for name, (_, form) in values.items():
            cells.append(form.format(seeds[name].mean()))
            if name == experiment.spread:
                cells.append(form.format(half_interval(seeds[name])))
        lines.append(cells)
    return [f"| {' | '.join(cells)} |" for cells in lines]


def results(experiment: Experiment, rows: pd.DataFrame) -> list[str]:
    """Return what stands between the markers of a page; a digest of the rows says what the picture shows."""
    lines = table(experiment, rows) if len(rows := whole(experiment, rows)) else []
    if len(lines) < 3:
        return ["The table is still to be filled: no setting has been run with all three seeds."]
    digest = hashlib.sha256(rows.to_csv().encode()).hexdigest()[:16]
    return [f"![{experiment.question}]({experiment.name}.png)", f"<!-- drawn from {digest} -->", "", *lines, "",
            f"Means over seeds {', '.join(map(str, SEEDS))}, {rows['precision'].iloc[0]}; every row, with its "
            f"command: [{experiment.name}.csv](../results/reference/{experiment.name}.csv)."]


def draw(experiment: Experiment, out: Path) -> None:
    """Draw the picture, and fill in the page if ``out`` is the reference folder; print the table elsewhere."""
    path, committed = out / f"{experiment.name}.csv", out.resolve() == REFERENCE
    rows = read(path)
    if len(rows) and (missing := [name for name in experiment.settings if name not in rows]):
        raise InputError(f"{path}: has no column {missing[0]}")
    lines = results(experiment, rows)
    if lines[0].startswith("!"):
        picture = (PAGES if committed else out) / f"{experiment.name}.png"
        figure = experiment.draw(whole(experiment, rows))
        write_whole(picture, lambda file: figure.savefig(file, format="png", dpi=110))
    if not committed:
        print("\n".join(lines))
        return
    page = PAGES / f"{experiment.name}.md"
    text = filled(page.read_text(encoding="utf-8"), page, lines)
    write_whole(page, lambda file: file.write(text.encode()))


def filled(text: str, page: Path, lines: Sequence[str]) -> str:
    """Return a page's text with other lines between its markers; InputError if it lacks one."""
    before, start, rest = text.partition(f"{START}\n")
    _, end, after = rest.partition(f"{END}\n")
    if not start or not end:
        raise InputError(f"{page}: needs a line {START} and a line {END} after it")
    return f"{before}{start}" + "".join(f"{line}\n" for line in lines) + f"{end}{after}"


def arguments(experiment: Experiment, argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line of an experiment."""
    parser = Parser(f"{experiment.name}.py", experiment.question)
    parser.add_argument("--list", action="store_true", help="print each command line and whether it is done")
    parser.add_argument("--draw", action="store_true", help="redraw the table and the picture; run nothing")
    parser.add(Option("seeds", "of the runs", int, list(SEEDS), within=(0, 2**31 - 1), several=True))
    parser.add(Option("workers", "runs at a time, one thread each", int, 1, within=(1, 64)))
    parser.add_argument("--match", default="", help="only runs whose name contains this")
    parser.add_argument("--out", type=Path, default=REFERENCE, help="folder of the CSV")
    if experiment.inspect:
        parser.add(Option("run", "measure this run alone", pattern=NAME))
    args = parser.parse(argv)
    if len(given := [name for name in ("list", "draw", "run") if getattr(args, name, None)]) > 1:
        parser.error(f"--{given[0]} and --{given[1]} contradict each other; leave one out")
    return args


def main(experiment: Experiment, argv: list[str] | None = None) -> int:
    """Run an experiment's command line and return the exit status."""
    args = arguments(experiment, argv)
    with steady_output(f"{experiment.name}.py"):
        return obey(experiment, args)


def obey(experiment: Experiment, args: argparse.Namespace) -> int:
    """Do what a command line says and return the exit status."""
    queue = Queue(experiment, args.out)
    try:
        if args.draw:
            draw(experiment, args.out)
            return 0
        tasks = [task for task in experiment.tasks(args.seeds) if args.match in task.run]
        if not tasks:
            raise InputError(f"--match {args.match}: no run has such a name")
        if args.list:
            missing = queue.missing(tasks)
            print("\n".join(f"{'missing' if task in missing else 'done   '} {task.command}" for task in tasks))
            return 0
        torch.set_num_threads(1)   # of a measurement in this process, and as rows say of those in others
        if experiment.inspect and args.run is not None:
            rows, path = experiment.inspect(args.run), ROOT / "results" / args.run / f"{experiment.name}.csv"
            write_whole(path, lambda file: pd.DataFrame(rows).to_csv(file, index=False))
            return 0
        if args.out.resolve() == REFERENCE and commit(*GENERATED).endswith("with edits"):
            raise InputError("the working tree has uncommitted edits; commit them, or try out with --out FOLDER")
        args.out.mkdir(parents=True, exist_ok=True)
        for ending in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(ending, signal.default_int_handler)
        return queue.run(tasks, args.workers)
    except KeyboardInterrupt:
        print(f"{experiment.name}.py: interrupted; the same command goes on", file=sys.stderr)
        return 130
    except (InputError, OSError) as error:
        print(error_line(f"{experiment.name}.py", error), file=sys.stderr)
        return 2


def outdated() -> list[str]:
    """Return a line for each page whose table or picture is not what its CSV gives."""
    found = []
    for page in sorted(PAGES.glob("*.md")):
        if START in (text := page.read_text(encoding="utf-8")):
            lines = results(importlib.import_module(page.stem).EXPERIMENT, read(REFERENCE / f"{page.stem}.csv"))
            if filled(text, page, lines) != text:
                found.append(f"docs/{page.name}: run python experiments/{page.stem}.py --draw")
    return found
