"""Ask of a trained run's images which a client was trained on, and say of each attack whether it leaks.

    python attack/membership.py --run mnist10k-shards-rve_pfl-seed1

A client's training images are the members, its held-out images of the same classes the non-members. Written to
results/<run>/membership.csv: a row for each attack by each adversary on each client after each round;
membership.json has the options.
"""
import sys
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))   # the project, whatever the folder

from attack import members
from attack.adversaries import hold
from attack.command import Command
from attack.members import FALSE_POSITIVE_RATES, MEMBERSHIP_ATTACKS, MODELS, MembershipAdversary
from attack.observations import Victim
from attack.verdict import GUESS, LEAKS, Unit
from engine.signals import steady_output
from parsing import HUGE, Option
from runs import folders
from utils import InputError, seed_torch

METRICS = ("auc", *(f"tpr_at_fpr_{rate:g}" for rate in FALSE_POSITIVE_RATES))
COLUMNS = [*Unit._fields[:4], "members", "non_members",   # no attack here observes latents
           *(name + end for name in METRICS for end in ("", "_low", "_high"))]


class Membership(Command):
    """Attacks that tell training images from others."""

    program, name = "membership.py", "membership"
    description = ("Tell which of a run's images a client was trained on, and say of each attack whether it "
                   "leaks. `fedmia` looks at all --rounds together, or at all that have a checkpoint.")
    files, columns = folders.OF_MEMBERSHIP, COLUMNS
    adversaries, attacks = ("curious_server", *MODELS), MEMBERSHIP_ATTACKS
    draws, public_images = 8, 4000

    options = (
        Option("references", "how many models `rmia` trains to compare with", int, 4, within=(1, 1000)),
        Option("train_epochs", "epochs of training on public images (if not given: as many as a client has "
               "trained by then)", int, within=(1, HUGE)),
        Option("scaling", "how far `rmia` trusts its references: a of its offline form", float, 0.3,
               within=(0, 1)),
        Option("gamma", "`rmia` counts a public image if the ratio is so many times its own", float, 1.0,
               within=(1, 1000)))

    def __init__(self, args: Namespace) -> None:
        super().__init__(args)
        self.together = sorted(set(args.rounds or self.target.rounds()))   # the rounds that `fedmia` looks at
        self.by_client: dict[tuple[int, int], MembershipAdversary] = {}

    def units(self) -> Iterator[tuple[Unit, str | None]]:
        args = self.args
        for unit in dict.fromkeys(
                Unit(who, name, self.together[-1] if MEMBERSHIP_ATTACKS[name].all_rounds else r, k)
                for r in self.rounds for k in args.clients for who in args.adversary for name in args.attack):
            yield unit, members.obstacle(self.target, unit, self.together)

    def again(self, unit: Unit) -> bool:
        return MEMBERSHIP_ATTACKS[unit.attack].all_rounds   # the rounds may be others than before

    def prepare(self, plan: list[Unit]) -> None:
        for unit in plan:
            adversary = self.by_client.setdefault((unit.round, unit.client), MembershipAdversary(
                self.target, self.args, self.together, unit.round, unit.client))
            if unit.attack == "rmia" or (unit.attack == "fedmia" and self.target.has_encoder):
                adversary.public   # noqa: B018, a bad --public is refused before any work
            if unit.adversary == "prediction_api":
                Victim(self.target, unit.round, unit.client)
            else:
                hold(self.target, unit.adversary, unit.round, unit.client)

    def attack(self, unit: Unit) -> list[dict]:
        images, adversary = members.asked(self.target, unit.client), self.by_client[unit.round, unit.client]
        assert images is not None   # or it was not planned
        seed_torch(self.args.seed, f"{unit.adversary} {unit.attack}", unit.client, unit.round)
        scores = MEMBERSHIP_ATTACKS[unit.attack].score(unit.adversary, adversary, images.images, images.labels)
        if not scores.isfinite().all():   # a row would look like a guess
            raise InputError(f"{unit.adversary} {unit.attack} round {unit.round} client {unit.client}: scores "
                             "that are not numbers, of a model that diverged; try another --train_epochs")
        sizes = {"members": int(images.member.sum()), "non_members": int((~images.member).sum())}
        return [{**dict(zip(COLUMNS, unit)), **sizes,   # noqa: B905, without ``observed``
                 **members.measure(scores.numpy(), images.labels.numpy(), images.member)}]

    @staticmethod
    def describe(unit: Unit, rows: list[dict]) -> str:
        """Return a row in words; an attack leaks if its interval of the AUC lies above a guess's."""
        row, = rows

        def shown(name: str) -> str:
            return f"{row[name]:.2f} ({row[f'{name}_low']:.2f} to {row[f'{name}_high']:.2f})"
        rates = ", ".join(f"{shown(f'tpr_at_fpr_{rate:g}')} at FPR {rate:g}" for rate in FALSE_POSITIVE_RATES)
        return (f"{LEAKS if row['auc_low'] > 0.5 else GUESS}. AUC {shown('auc')}, TPR {rates}; "
                f"{row['members']} members, {row['non_members']} non-members")


make_parser, main = Membership.parser, Membership.main

if __name__ == "__main__":
    with steady_output("membership.py"):
        sys.exit(main())
