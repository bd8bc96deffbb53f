"""What the two commands on a trained run have in common: options, the rounds and clients attacked, errors."""
import os
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from attack.access import Target
from engine.memory import in_one_line
from engine.signals import Interrupted, Interrupts
from parsing import DATA_NAME, HUGE, Option
from runs import folders
from utils import ROOT, InputError


def public_options(most: int) -> list[Option]:
    """What adversaries train on; ``most`` images if not said otherwise."""
    return [
        Option("public", "images that adversaries train on: `unowned`, the images of the run's data set that no "
               "client has, or the NAME of another data set with images of the same shape", default="unowned",
               pattern=DATA_NAME),
        Option("public_images", "an adversary trains on at most so many of them", int, most, within=(200, HUGE)),
        Option("seed", "decides every random draw", int, 1, within=(0, 2**31 - 1))]


def service_options(draws: int) -> list[Option]:
    """How a model answers."""
    return [
        Option("draws", "draws of z that an answer of the model is averaged over", int, draws, within=(1, 1000)),
        Option("scores", "how many of the largest class scores the prediction service tells", int, 3,
               within=(1, HUGE))]


def folder_options() -> list[Option]:
    """Where runs and data sets are."""
    return [Option(name, "as in RVE-PFL.py", Path, ROOT / where) for name, where in (
        ("results_dir", "results"), ("models_dir", "saved_models"), ("data_dir", "data"))]


def chosen_rounds(target: Target, args: Namespace) -> list[int]:
    """The rounds to attack; InputError if a checkpoint or a client of the command line does not exist."""
    rounds = args.rounds or [target.latest_round()]
    last = target.options["num_users"] - 1
    if max(args.clients) > last:
        raise InputError(f"--clients {max(args.clients)}: the run's clients are 0 to {last}")
    for r in rounds:
        target.require(r)
    return rounds


@contextmanager
def locked(args: Namespace) -> Iterator[None]:
    """Keep training and other attacks away from the run that is attacked.

    Raises:
        InputError: another process trains or attacks it.
    """
    results, models = args.results_dir / args.run, args.models_dir / args.run
    with ExitStack() as held:
        if (results / "config.json").exists():   # else it is no run, and nothing is left in it
            folders.lock(results, held, "--run")
            # Nobody trains into a folder that cannot be written.
            if models.is_dir() and not models.samefile(results) and os.access(models, os.W_OK):
                folders.lock(models, held, "--run")
        yield


def exit_status(program: str, args: Namespace, work: Callable[[Namespace], None], interrupted: str) -> int:
    """Do the work on a locked run and return the exit status; what went wrong is one line on standard error."""
    try:
        with Interrupts(), locked(args):
            work(args)
        return 0
    except Interrupted:
        line, status = interrupted, 130
    except Exception as error:
        said = in_one_line(program, error)
        if said is None:
            raise
        line, status = said, 2
    print(line, file=sys.stderr)
    return status
