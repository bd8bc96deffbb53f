"""Tell which of a trained run's images a client was trained on, and report for each attack whether it leaks.

    python attack/membership.py --run mnist10k-shards-rve_pfl-seed1

A client's training images are the members, its held-out images of the same classes the non-members. Written to
results/<run>/membership.csv: a row for each attack by each adversary on each client after each round;
membership.json has the options.
"""
from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))   # the project, whatever the folder

from attack.attacks import NOISE, SHARED_HEAD, SINGLE_UPLOADS, SUM, WHOLE_HEAD, Attack, Need
from attack.command import Command
from attack.verdict import FALSE_POSITIVE_RATES, GUESS, LEAKS, Unit
from engine.signals import steady_output
from parsing import HUGE, Option
from runs import folders
from utils import InputError, Late

if TYPE_CHECKING:
    from torch import Tensor

    import devices
    from attack import adversaries, members, observations
    from attack.target import Target
else:
    devices, adversaries, members, observations = (
        Late(name) for name in ("devices", "attack.adversaries", "attack.members", "attack.observations"))

MODELS = ("stolen_model", "prediction_api")
METRICS = ("auc", *(f"tpr_at_fpr_{rate:g}" for rate in FALSE_POSITIVE_RATES))
COLUMNS = [*Unit._fields[:4], "members", "non_members",   # no attack here observes latents
           *(name + end for name in METRICS for end in ("", "_low", "_high"))]


@dataclass(frozen=True, kw_only=True)
class MembershipAttack(Attack):
    """A row of the table; an attack that looks at ``all_rounds`` at once gives one row for them."""

    score: Callable[[str, members.MembershipAdversary, Tensor, Tensor], Tensor]
    all_rounds: bool = False


SEEDED_ENCODER: Need = ("needs references whose encoders are trained as in the run of --encoders_from",
                        lambda target, adversary: not target.options.get("encoders_from"))
MEMBERSHIP_ATTACKS = {
    "loss": MembershipAttack(score=members.loss, adversaries=MODELS, source="Yeom et al. 2018, arXiv 1709.01604"),
    "kl": MembershipAttack(score=members.kl, adversaries=("stolen_model",),
                           source="the KL term of the client's own loss", needs=(NOISE,)),
    "rmia": MembershipAttack(score=members.rmia, adversaries=MODELS,
                             source="Zarifzadeh et al. 2024, arXiv 2312.03262", needs=(SEEDED_ENCODER,)),
    "fedmia": MembershipAttack(score=members.fedmia, adversaries=("curious_server",), all_rounds=True,
                               source="after Zhu et al. 2025, arXiv 2402.06289",
                               needs=(SHARED_HEAD, WHOLE_HEAD, SINGLE_UPLOADS)),
    "sum_loss": MembershipAttack(score=members.sum_loss, adversaries=("curious_server",), all_rounds=True,
                                 source="the fall of the loss from the head sent to the sum",
                                 needs=(SHARED_HEAD, WHOLE_HEAD, SUM)),
}


class Membership(Command):
    """Attacks that tell training images from others."""

    program, name = "membership.py", "membership"
    description = ("Tell which of a run's images a client was trained on, and report for each attack whether it "
                   "leaks. `fedmia` and `sum_loss` look at all --rounds together, or at all with a checkpoint.")
    files, columns = folders.OF_MEMBERSHIP, COLUMNS
    adversaries, attacks = ("curious_server", *MODELS), MEMBERSHIP_ATTACKS
    default_attacks = tuple(MEMBERSHIP_ATTACKS)
    table = "{:<10} {:<14} {:<6}" + " {:>18}" * len(METRICS) + " {:>6}"
    titles = "verdict", "adversary", "attack", "AUC", *(f"TPR at FPR {rate:g}" for rate in FALSE_POSITIVE_RATES)
    legend = "In brackets: 95 % intervals. An attack that guesses has an AUC of 0.5."
    draws, public_images = 8, 4000

    options = (
        Option("references", "how many models `rmia` trains to compare with", int, 4, within=(1, 1000)),
        Option("train_epochs", "epochs of training on public images (if not given: as many as a client has "
               "trained by then)", int, within=(1, HUGE)),
        Option("scaling", "the factor a of `rmia`'s offline form, on its references' mean", float, 0.3,
               within=(0, 1)),
        Option("gamma", "`rmia` counts a public image if the image's ratio is at least gamma times its own",
               float, 1.0, within=(1, 1000)))

    def __init__(self, args: Namespace) -> None:
        super().__init__(args)
        self.together = sorted(set(args.rounds or self.target.rounds()))   # for attacks on ``all_rounds``
        self.by_client: dict[tuple[int, int], members.MembershipAdversary] = {}

    def units(self) -> Iterator[tuple[Unit, str | None]]:
        args = self.args
        for unit in dict.fromkeys(
                Unit(who, name, self.together[-1] if MEMBERSHIP_ATTACKS[name].all_rounds else r, k)
                for r in self.rounds for k in args.clients for who in args.adversary for name in args.attack):
            yield unit, obstacle(self.target, unit, self.together)

    def again(self, unit: Unit) -> bool:
        return MEMBERSHIP_ATTACKS[unit.attack].all_rounds   # the rounds may be others than before

    def prepare(self, plan: list[Unit]) -> None:
        for unit in plan:
            adversary = self.by_client.setdefault((unit.round, unit.client), members.MembershipAdversary(
                self.target, self.args, self.together, unit.round, unit.client))
            if unit.attack == "rmia" or (unit.adversary == "curious_server" and self.target.has_encoder):
                adversary.public   # noqa: B018, a bad --public is refused before any work
            if unit.adversary == "prediction_api":
                observations.Victim(self.target, unit.round, unit.client)
            else:
                adversaries.hold(self.target, unit.adversary, unit.round, unit.client)

    def attack(self, unit: Unit) -> list[dict]:
        images, adversary = members.asked(self.target, unit.client), self.by_client[unit.round, unit.client]
        assert images is not None   # or it was not planned
        devices.seed_torch(self.args.seed, f"{unit.adversary} {unit.attack}", unit.client, unit.round)
        scores = MEMBERSHIP_ATTACKS[unit.attack].score(unit.adversary, adversary, images.images, images.labels)
        if not scores.isfinite().all():   # a row would look like a guess
            raise InputError(f"{unit.adversary} {unit.attack} round {unit.round} client {unit.client}: scores "
                             "that are not numbers, of a model that diverged; try another --train_epochs")
        sizes = {"members": int(images.member.sum()), "non_members": int((~images.member).sum())}
        return [{**dict(zip(COLUMNS, unit)), **sizes,   # noqa: B905, without ``observed``
                 **members.measure(scores.numpy(), images.labels.numpy(), images.member)}]

    @staticmethod
    def describe(unit: Unit, rows: list[dict]) -> tuple[str, ...]:
        """Return the cells of an attack's line; it leaks if its interval of the AUC lies above a guess's."""
        row, = rows
        return (LEAKS if row["auc_low"] > 0.5 else GUESS, unit.adversary, unit.attack, *(
            f"{row[name]:.2f} ({row[f'{name}_low']:.2f}-{row[f'{name}_high']:.2f})" for name in METRICS))


def obstacle(target: Target, unit: Unit, rounds: list[int]) -> str | None:
    """Return why an attack cannot be run or scored; None if it can."""
    attack = MEMBERSHIP_ATTACKS[unit.attack]
    if why := attack.unfit(target, unit.adversary):
        return why
    if members.asked(target, unit.client) is None:
        return f"client {unit.client} holds out no image of a class that it trained on"
    if not attack.all_rounds:
        return None
    seen = [shared for shared in map(target.shared, rounds) if unit.client in shared["clients"]]
    if target.secure:
        return None if any(members.is_finite(shared["sum"]) for shared in seen) else (
            f"no sum has a usable upload of client {unit.client}")
    return None if any(len(shared["clients"]) > 2 for shared in seen) else (
        f"client {unit.client} and two others uploaded together in no round")


make_parser, main = Membership.parser, Membership.main

if __name__ == "__main__":
    with steady_output("membership.py"):
        sys.exit(main())
