"""The steps that both commands on a trained run share, from the options to the exit status."""
from __future__ import annotations

import json
import os
import sys
import time
import warnings
from argparse import Namespace
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

import datasets
from attack.verdict import Unit, read_attack
from engine.memory import in_one_line
from engine.signals import Interrupted, Interrupts, check
from parsing import DATA_NAME, HUGE, Option, Parser
from runs import folders
from runs.configs import path_of, read_json
from utils import ROOT, InputError, Late, duration, keep_freed_memory, nearby, shown, typed, write_whole

if TYPE_CHECKING:
    import pandas as pd

    from attack import target
else:
    pd, target = Late("pandas"), Late("attack.target")

SCOPE_OPTIONS = ("adversary", "attack", "observe", "clients", "rounds")   # choose attacks, and do not change them
PLACE_OPTIONS = ("overwrite", "tensorboard", "results_dir", "models_dir", "data_dir")


class Command:
    """A command that runs attacks of a table by several adversaries on clients of a trained run."""

    program: str
    description: str
    name: str                      # of its rows, NAME.csv, and of the options behind them, NAME.json
    files: str                     # matches all its files
    columns: Sequence[str]         # of NAME.csv
    adversaries: Collection[str]
    attacks: dict
    default_attacks: Collection[str]
    table: str                     # the format of a printed line, which ends with the seconds
    titles: tuple[str, ...]        # its heading
    legend: str
    draws: int                     # the default of --draws
    public_images: int             # the default of --public_images
    options: Sequence[Option]      # that the other command does not have
    first_round = 1

    def __init__(self, args: Namespace) -> None:
        keep_freed_memory()
        self.started = time.monotonic()
        if "all" in args.attack:
            args.attack = list(self.attacks)
        if args.public:
            args.public = datasets.canonical(args.public, args.data_dir)
        self.args = args
        self.target = self.open()

    def open(self) -> target.Target:
        """Return the run to attack, and set ``rounds``."""
        args = self.args
        run = target.open_target(args.run, args.results_dir, args.models_dir, args.data_dir, seed=args.seed)
        self.rounds = args.rounds or [run.latest_round()]
        last = run.clients - 1
        if max(args.clients) > last:
            raise InputError(f"--clients {max(args.clients)}: the clients that train in the run are 0 to {last}")
        for r in self.rounds:
            run.require(r)
        return run

    # Each command defines these.

    def units(self) -> Iterator[tuple[Unit, str | None]]:
        """Yield each attack asked for, and why it cannot be run, or None."""
        raise NotImplementedError

    def prepare(self, plan: list[Unit]) -> None:
        """Read what the attacks need. A bad file is refused here, before results of earlier attacks change."""
        raise NotImplementedError

    def attack(self, unit: Unit) -> list[dict]:
        """Run one attack and return its rows."""
        raise NotImplementedError

    @staticmethod
    def describe(unit: Unit, rows: list[dict]) -> tuple[str, ...]:
        """Return the cells of an attack's line but for the seconds, the verdict first."""
        raise NotImplementedError

    def finish(self, rows: list[dict]) -> list[str]:
        """Write what follows from all rows, and return lines to print."""
        return []

    def again(self, unit: Unit) -> bool:
        """Return True for an attack whose row may be out of date."""
        return False

    # The steps.

    @classmethod
    def parser(cls) -> Parser:
        """Build the parser of the command line."""
        parser = Parser(cls.program, cls.description)
        for option in cls.all_options():
            parser.add(replace(option, group="attack"))
        return parser

    @classmethod
    def all_options(cls) -> tuple[Option, ...]:
        """Return the options of the command line."""
        sources = ", ".join(f"{name} ({attack.source})" for name, attack in cls.attacks.items())
        return (
            Option("run", "the run's folder name under RESULTS_DIR and MODELS_DIR", required=True),
            Option("adversary", "the adversaries", default=list(cls.adversaries), choices=cls.adversaries,
                   several=True),
            Option("attack", "the attacks, as far as they fit an adversary and the method, or `all` of them: "
                   + sources, default=list(cls.default_attacks), choices=[*cls.attacks, "all"], several=True),
            Option("clients", "numbers of the victims", int, [0], within=(0, HUGE), several=True),
            Option("rounds", "attack the checkpoints of these rounds (the latest if not given)"
                   + "; 0 is the start" * (not cls.first_round), int, within=(cls.first_round, HUGE),
                   several=True),
            *cls.options,
            Option("draws", "draws of z that a prediction of the model is averaged over", int, cls.draws,
                   within=(1, 1000)),
            Option("scores", "number of largest class scores that the prediction service returns", int, 3,
                   within=(1, HUGE)),
            Option("public", "images that adversaries train on: `unowned`, the images of the run's data set "
                   "that no client has, or the NAME of another data set with images of the same shape",
                   default="unowned", pattern=DATA_NAME),
            Option("public_images", "maximum number of public images that an adversary trains on", int,
                   cls.public_images, within=(200, HUGE)),
            Option("seed", "seed of every random draw", int, 1, within=(0, 2**31 - 1)),
            Option("overwrite", "delete the results of this command's earlier attacks on this run", bool, False),
            *(Option(name, "as in RVE-PFL.py", Path, ROOT / folder) for name, folder in (
                ("results_dir", "results"), ("models_dir", "saved_models"), ("data_dir", "data"))))

    @classmethod
    def main(cls, argv: list[str] | None = None) -> int:
        """Run a command line and return the exit status; what went wrong is one line on standard error."""
        args = cls.parser().parse(argv)
        if not sys.warnoptions:   # a library's deprecations would land between the results
            warnings.simplefilter("ignore", FutureWarning)
        try:
            with cls.locked(args), Interrupts():
                cls(args).run()
            return 0
        except Interrupted:
            line, status = "interrupted; the same command goes on where it stopped", 130
        except Exception as error:
            if (known := in_one_line(cls.program, error)) is None:
                raise
            line, status = known, 2
        print(line, file=sys.stderr)
        return status

    def run(self) -> None:
        """Run every attack that was asked for, fits, and is not done yet."""
        plan = self.planned()
        self.prepare(plan)
        for path in folders.half_written(self.target.results, self.files):
            path.unlink()
        options, rows = self.begin()
        with tqdm(total=len(plan), leave=False, disable=None,
                  bar_format="attack {n_fmt} of {total_fmt}{desc} |{bar:30}| {elapsed} elapsed") as bar:
            for (round, client), units in groupby(plan, lambda unit: unit[2:4]):
                bar.write(f"\n{self.heading(round, client)}\n"
                          f"{self.table.format(*self.titles, 'time').rstrip()}")
                for unit in units:
                    bar.set_description_str(f": {unit.adversary} {unit.words}")
                    started, results = time.monotonic(), [row for row in rows if unit_of(row) == unit]
                    if is_new := not results or self.again(unit):
                        results = self.attack(unit)
                        if not rows:   # just before the first rows, so that a refused attack leaves no file
                            write_whole(self.path("json"), lambda file: file.write(options.encode()))
                        rows = sorted([row for row in rows if unit_of(row) != unit] + results, key=self._place)
                        self.write(self.path("csv"), pd.DataFrame(rows, columns=self.columns))
                    try:
                        cells = self.describe(unit, results)
                    except ValueError as error:
                        if is_new:   # a fault of the program, not of the file
                            raise
                        raise InputError(f"{self.path('csv')} is damaged; use --overwrite") from error
                    bar.write(self.table.format(*cells, f"{time.monotonic() - started:.0f} s"))
                    bar.update(1)
                    if is_new:
                        check()
        print(self.legend, "", *self.finish(rows), f"results:  {nearby(self.path('csv'))}",
              *self.pictures(plan, rows), f"time:     {duration(time.monotonic() - self.started)}",
              *self.next_commands(), sep="\n")

    def heading(self, round: int, client: int) -> str:
        """Return the words above the lines of one client in one round."""
        return f"{self.target.results.name}, round {round}, client {client}"

    def next_commands(self) -> list[str]:
        """Return lines that name a command to type next."""
        return [f"next:     {typed('report.py', vars(self.args), 'results_dir')}"]

    def pictures(self, plan: list[Unit], rows: list[dict]) -> list[str]:
        """Return a line that names a picture to look at."""
        return []

    def planned(self) -> list[Unit]:
        """Return the attacks to run, each once; InputError if none fits."""
        reasons = dict(self.units())
        if plan := [unit for unit, reason in reasons.items() if reason is None]:
            return sorted(plan, key=lambda unit: unit[2:4])
        why = "; ".join(sorted(filter(None, set(reasons.values()))))
        raise InputError(f"--attack {' '.join(self.args.attack)}: none fits ({why}); --attack all tries each one")

    def begin(self) -> tuple[str, list[dict]]:
        """Return the options that decide the rows, as JSON, and earlier rows with the same options."""
        options = {key: value for key, value in vars(self.args).items()
                   if key not in (*SCOPE_OPTIONS, *PLACE_OPTIONS)}
        text = json.dumps(options, indent=2) + "\n"
        if self.args.overwrite:
            self.path("csv").unlink(missing_ok=True)
        if not self.path("csv").exists():   # an --overwrite that was interrupted has left files without rows
            results = self.target.results
            for old in (*folders.files(results, self.files), *folders.event_files(results, self.name)):
                old.unlink()
            return text, []
        rows = self.read(self.path("csv"), self.columns)
        try:
            before = read_json(self.path("json"))
        except (OSError, ValueError) as error:
            raise InputError(f"{self.path('json')} is damaged; use --overwrite") from error
        for key, value in options.items():
            if before.get(key) != value:
                now, earlier = (" ".join(map(str, given)) if isinstance(given, list) else given
                                for given in (value, before.get(key)))
                raise InputError(f"--{key} {shown(now)}: this run was attacked before with {shown(earlier)}; give "
                                 "the same, or --overwrite to start again")
        return text, rows

    @classmethod
    @contextmanager
    def locked(cls, args: Namespace) -> Iterator[None]:
        """Keep training and other attacks away from the run that is attacked; InputError if one is at work."""
        results, models = path_of(args.run, args.results_dir).parent, args.models_dir / args.run
        with ExitStack() as stack:
            folders.lock(results, stack, "--run")
            # Nobody trains into a folder that cannot be written.
            if models.is_dir() and not models.samefile(results) and os.access(models, os.W_OK):
                folders.lock(models, stack, "--run")
            yield

    def path(self, suffix: str) -> Path:
        """Return the path of NAME.csv or NAME.json."""
        return self.target.results / f"{self.name}.{suffix}"

    @staticmethod
    def read(path: Path, columns: Sequence[str]) -> list[dict]:
        """Read the rows of a table; InputError if it is damaged."""
        try:
            return read_attack(path, columns).to_dict("records")
        except (OSError, ValueError) as error:
            raise InputError(f"{path} is damaged; use --overwrite") from error

    @staticmethod
    def write(path: Path, table: pd.DataFrame, precision: int = 6) -> None:
        """Write a table anew, so that an attack is in it with all its rows or not at all."""
        write_whole(path, lambda file: table.to_csv(file, index=False, float_format=f"%.{precision}g"))

    def _place(self, row: dict) -> tuple:
        """Return the key that rows are sorted by: the file is the same whichever attacks were asked for first."""
        places = [list(table).index(row[column]) if row[column] in table else len(table)
                  for column, table in (("adversary", self.adversaries), ("attack", self.attacks))]
        return row["round"], row["client"], *places, unit_of(row).observed


def unit_of(row: dict) -> Unit:
    """Return the attack behind a row."""
    return Unit(*(row[column] for column in Unit._fields if column in row))
