"""What the two commands on a trained run have in common: options, the rounds and clients attacked, errors."""
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

from attack.access import Target
from engine.memory import in_one_line
from engine.signals import Interrupted, Interrupts
from parsing import DATA_NAME, HUGE, Option
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


def exit_status(program: str, work: Callable[[], None], interrupted: str) -> int:
    """Do the work; what went wrong is one line on standard error, and the status of the process."""
    try:
        with Interrupts():
            work()
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
