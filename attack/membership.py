"""Ask of a trained run's images which a client was trained on, and say of each attack whether it leaks.

    python attack/membership.py --run mnist10k-shards-rve_pfl-seed1

A client's training images are the members, its held-out images of the same classes the non-members. Every attack
that fits is run by every adversary, unless options choose some. Written to results/<run>/membership.csv: a row
for each attack by each adversary on each client after each round, and another run of it replaces the row.

An adversary reads only its own files (access.py). Whatever it trains, it trains on images that no client owns,
or on another data set (--public).
"""
import sys
import time
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))   # the project, whatever the folder

import pandas as pd

import datasets
from attack.access import Target, Victim, hold, open_target
from attack.command import chosen_rounds, exit_status, folder_options, public_options, service_options
from attack.members import ATTACKS, MODELS, Adversary, asked, needs_public, unfit
from attack.roc import FALSE_POSITIVE_RATES, measure
from attack.tables import Unit
from engine.signals import check, steady_output
from parsing import HUGE, Option, Parser
from runs import folders
from runs.csvs import read_csv
from utils import InputError, keep_freed_memory, printable, seed_torch, write_whole

ADVERSARIES = ("curious_server", *MODELS)
METRICS = ("auc", *(f"tpr_at_fpr_{rate:g}" for rate in FALSE_POSITIVE_RATES))
NUMBERS = ["members", "non_members", *(name + end for name in METRICS for end in ("", "_low", "_high"))]
KEY = ["adversary", "attack", "round", "client"]   # no attack here observes latents
COLUMNS = [*KEY, *NUMBERS]   # of membership.csv


def make_parser() -> Parser:
    """The options."""
    parser = Parser("membership.py", "Tell which of a run's images a client was trained on, and say of each "
                    "attack whether it leaks.")
    for option in (
            Option("run", "the run's folder name under RESULTS_DIR and MODELS_DIR", required=True),
            Option("adversary", "the adversaries", default=list(ADVERSARIES), choices=ADVERSARIES, several=True),
            Option("attack", "the attacks, as far as they fit an adversary and the method: "
                   + ", ".join(f"{name} ({row.source})" for name, row in ATTACKS.items()), default=list(ATTACKS),
                   choices=ATTACKS, several=True),
            Option("clients", "numbers of the victims", int, [0], within=(0, HUGE), several=True),
            Option("rounds", "attack the checkpoints of these rounds (if not given: the latest; `fedmia`, which "
                   "looks at all together, all that are there)", int, within=(1, HUGE), several=True),
            Option("references", "how many models `rmia` trains to compare with", int, 4, within=(1, 1000)),
            Option("train_epochs", "epochs of training on public images (if not given: as many as a client has "
                   "trained by then)", int, within=(1, HUGE)),
            Option("scaling", "how far `rmia` trusts its references: a of its offline form", float, 0.3,
                   within=(0, 1)),
            Option("gamma", "`rmia` counts a public image if the ratio is so many times its own", float, 1.0,
                   within=(1, 1000)),
            *service_options(8), *public_options(4000), *folder_options()):
        parser.add(replace(option, group="attack"))
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run a command line and return the exit status."""
    args = make_parser().parse(argv)
    return exit_status("membership.py", args, attack_all, "interrupted; the rows printed are saved")


def attack_all(args: Namespace) -> None:
    """Run every attack that was asked for and fits.

    Raises:
        InputError: no attack fits, the run cannot be attacked, or membership.csv is damaged.
    """
    keep_freed_memory()
    args.public = datasets.canonical(args.public, args.data_dir)
    target = open_target(args.run, args.results_dir, args.models_dir, args.data_dir)
    together = sorted(set(args.rounds or target.rounds()))   # what `fedmia` looks at
    plan = planned(target, args, chosen_rounds(target, args), together)
    adversaries = {(unit.round, unit.client): Adversary(target, args, together, unit.round, unit.client)
                   for unit in plan}
    if any(needs_public(target, unit) for unit in plan):
        next(iter(adversaries.values())).public   # noqa: B018, a bad --public is refused before any work
    for unit in plan:   # and a bad file, too
        if unit.adversary == "prediction_api":
            Victim(target, unit.round, unit.client)
        else:
            hold(target, unit.adversary, unit.round, unit.client)
    for path in folders.half_written(target.results, folders.OF_MEMBERSHIP):
        path.unlink()
    read(target)
    for unit in plan:
        check()
        started, row = time.monotonic(), attack(adversaries[unit.round, unit.client], unit)
        write(target, row)
        print(f"{in_words(row)} ({time.monotonic() - started:.0f} s)", flush=True)
    print(f"results:     {printable(target.results)}/membership.csv")


def planned(target: Target, args: Namespace, rounds: list[int], together: list[int]) -> list[Unit]:
    """The attacks to run, each once; InputError if none fits.

    Args:
        together: the rounds that an attack on all rounds looks at; its row stands for the latest.
    """
    asked_for = dict.fromkeys(
        Unit(who, how, together[-1] if ATTACKS[how].all_rounds else r, k)
        for r in rounds for k in args.clients for who in args.adversary for how in args.attack)
    why = {unit: unfit(target, unit, together) for unit in asked_for}
    plan = [unit for unit, reason in why.items() if reason is None]
    if not plan:
        reasons = "; ".join(sorted({reason for reason in why.values() if reason}))
        raise InputError(f"--run {args.run}: no attack asked for fits ({reasons})")
    return plan


def attack(adversary: Adversary, unit: Unit) -> dict:
    """Run one attack and return its row."""
    images = asked(adversary.target, unit.client)
    assert images is not None   # or it was not planned
    seed_torch(adversary.args.seed, f"{unit.adversary} {unit.attack}", unit.client, unit.round)
    scores = ATTACKS[unit.attack].score(unit.adversary, adversary, images.images, images.labels)
    if not scores.isfinite().all():   # a row would look like a guess
        raise InputError(f"{unit.adversary} {unit.attack} round {unit.round} client {unit.client}: scores that "
                         "are not numbers, of a model that diverged; try another --train_epochs")
    return {**unit._asdict(), "members": int(images.member.sum()), "non_members": int((~images.member).sum()),
            **measure(scores.numpy(), images.labels.numpy(), images.member)}


def read(target: Target) -> pd.DataFrame:
    """``membership.csv``, without rows if it is not there; InputError if it is damaged."""
    path = target.results / "membership.csv"
    if not path.exists():
        return pd.DataFrame(columns=COLUMNS)
    try:
        table = read_csv(path)[COLUMNS]
        table[["round", "client", *NUMBERS]].apply(pd.to_numeric)
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is damaged; remove it") from error
    return table


def write(target: Target, row: dict) -> None:
    """Write ``membership.csv`` anew with one more row, in place of that of the same attack, if any."""
    before, new = read(target), pd.DataFrame([row], columns=COLUMNS)
    table = pd.concat([before, new]) if len(before) else new
    table = table.drop_duplicates(KEY, keep="last").sort_values(KEY)
    write_whole(target.results / "membership.csv",
                lambda file: table.to_csv(file, index=False, float_format="%.5g"))


def in_words(row: dict) -> str:
    """A row in one line, with the word `leaks` if its interval of the AUC lies above a guess's."""
    def shown(name: str) -> str:
        return f"{row[name]:.2f} ({row[f'{name}_low']:.2f} to {row[f'{name}_high']:.2f})"
    word = "leaks" if row["auc_low"] > 0.5 else "as a guess"
    rates = ", ".join(f"{shown(f'tpr_at_fpr_{rate:g}')} at FPR {rate:g}" for rate in FALSE_POSITIVE_RATES)
    return (f"{row['adversary']} {row['attack']} round {row['round']} client {row['client']}: {word}. "
            f"AUC {shown('auc')}, TPR {rates}; {row['members']} members, {row['non_members']} non-members")


if __name__ == "__main__":
    with steady_output("membership.py"):
        sys.exit(main())
