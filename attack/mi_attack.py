"""Attack a trained run, and report of each attack whether it beats guessing.

    python attack/mi_attack.py --run mnist10k-shards-rve_pfl-seed1

Every attack that fits is run by every adversary, unless options choose some. Written to results/<run>/:
attack.csv, a row for each reconstruction and each control; attack.json, the options; attack_summary.csv, means and
95 % bootstrap intervals; attack_latents.csv, how much a latent tells at most; a picture of each attack.
"""
from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))   # the project, whatever the folder

from attack.attacks import ADVERSARIES, ATTACKS, CLIENT_LR, FEW_IMAGES, observe_latents
from attack.command import Command
from attack.verdict import ATTACK_COLUMNS, WORST, Unit, judge, summarise, worst_identified
from engine.signals import steady_output
from parsing import HUGE, Option
from runs import folders
from utils import InputError, Late

if TYPE_CHECKING:
    import pandas as pd

    from attack import evaluation, observations
else:
    pd, evaluation, observations = Late("pandas"), Late("attack.evaluation"), Late("attack.observations")

# Printed of an attack: means over its first choices.
SHOWN = {"ssim": ("SSIM", "{:.2f}"), "class_rank": ("rank in its class", "{:.0f}"),
         "nearest_rank": ("rank", "{:.0f}"), "psnr": ("PSNR", "{:.1f} dB"),
         "evaluator_correct": ("evaluator right", "{:.0%}")}
PICTURED = ("ssim", "psnr")   # say nothing of an attack that makes no image
OBSERVED = (r"z([2-9]|[1-9]\d{1,3})?|rounds|mu|train",
            "choose from z, zN (N draws, from 2 to 9999), rounds, mu, train")
CHEAP = ", ".join(name for name, attack in ATTACKS.items() if attack.cheap)
LATENT_COLUMNS = ["round", "client", "kl_nats", "sigma", "snr_db", "bound_nats"]


class MiAttack(Command):
    """Attacks that reconstruct images and classes."""

    program, name = "mi_attack.py", "attack"
    description = "Attack a trained run, and report of each attack whether it beats guessing."
    files, columns = folders.OF_ATTACKS, ATTACK_COLUMNS
    adversaries, attacks = ADVERSARIES, ATTACKS
    draws, public_images, first_round = 32, 10_000, 0

    options = (
        Option("observe", "what attacks on latents see of an image: z is one draw, zN are N draws, as z8; rounds "
               "is one draw in each round so far, with that round's encoder; mu is the mean of z; train is one "
               "draw with the encoder's dropout", default=["z"], pattern=OBSERVED, several=True),
        Option("images", "how many of a client's training images are attacked at most (if not given: all, where "
               f"an attack is cheap: {CHEAP}; {FEW_IMAGES} elsewhere)", int, within=(1, HUGE)),
        Option("image_numbers", "the numbers in the data set of the training images to attack, in place of "
               "--images", int, within=(0, HUGE), several=True),
        Option("restarts", "number of starts of a search", int, 3, within=(1, 1000)),
        Option("iterations", "steps of a search", int, 300, within=(1, HUGE)),
        Option("client_lr", "size of the client's SGD steps whose upload the curious server observes; where "
               "uploads have noise, longer steps leak more", float, CLIENT_LR, within=(1e-6, 10)),
        Option("train_epochs", "epochs of training on public images", int, 20, within=(1, HUGE)))

    def __init__(self, args: Namespace) -> None:
        super().__init__(args)
        self.evaluation = evaluation.Evaluation(self.target, args)

    def units(self) -> Iterator[tuple[Unit, str | None]]:
        why = {(k, who, name): ATTACKS[name].unfit(self.target, who) or self.evaluation.unscorable(name, k)
               for k in self.args.clients for who in self.args.adversary for name in self.args.attack}
        for r in self.rounds:
            for (k, who, name), reason in why.items():
                of_latents = getattr(ATTACKS[name], "observe", None) is observe_latents
                for observed in self.args.observe if of_latents else [""]:
                    yield Unit(who, name, r, k, observed), reason

    def prepare(self, plan: list[Unit]) -> None:
        for last in {unit.round for unit in plan if unit.observed == "rounds"}:
            gone = set(range(1, last + 1)) - set(self.target.rounds())
            if gone or not last:
                raise InputError(f"--observe rounds: there is no checkpoint of round {min(gone, default=1)}; "
                                 "attack a later round, and train with --save_rounds and every round up to it")
        for who, r, k in dict.fromkeys((unit.adversary, unit.round, unit.client) for unit in plan):
            self.evaluation.adversary(who, r, k)
            observations.Victim(self.target, r, k)

    def attack(self, unit: Unit) -> list[dict]:
        return self.evaluation.attack(unit)

    def finish(self, rows: list[dict]) -> list[str]:
        # From the rounded figures of the file, as if all attacks had been run by several commands.
        target, new = self.target, []
        path = target.results / "attack_latents.csv"
        self.write(path.with_name("attack_summary.csv"), summarise(self.read(self.path("csv"), ATTACK_COLUMNS)), 5)
        for r, k in dict.fromkeys((r, k) for r in self.rounds for k in self.args.clients):
            own = self.evaluation.train[k]
            if noise := observations.Victim(target, r, k).noise(target.pixels(own), target.labels(own)):
                new.append({"round": r, "client": k, **noise})
        if new:
            before = self.read(path, LATENT_COLUMNS) if path.exists() else []
            table = pd.DataFrame([*before, *new], columns=LATENT_COLUMNS)
            table = table.drop_duplicates(["round", "client"], keep="last").sort_values(["round", "client"])
            self.write(path, table, 5)
        evaluator, public = self.evaluation.evaluator, self.evaluation.public
        return [f"evaluator: right on {evaluator.accuracy:.1%} of held-out images that it was not trained on; "
                f"public images: {len(public.images)} ({self.args.public})", *(
            f"round {row['round']} client {row['client']}: z tells at most {row['bound_nats']:.0f} nats about an "
            f"image (sigma {row['sigma']:.3f}, SNR {row['snr_db']:.1f} dB)" for row in new)]

    @staticmethod
    def describe(unit: Unit, rows: list[dict]) -> str:
        """Return the verdict and the scores, those that decide beside their control's."""
        table, attack = pd.DataFrame(rows, columns=ATTACK_COLUMNS), ATTACKS[unit.attack]
        first = table[(table["restart"] == 0) & (table["control"] == "")]
        verdict = judge(table, attack)
        compared, parts = {comparison.metric: comparison for comparison in verdict.comparisons}, []
        for metric, (name, form) in SHOWN.items():
            if attack.chooses and metric in PICTURED:
                continue
            text = f"{name} {form.format(first[metric].mean())}"
            if beside := compared.get(metric):
                control = beside.control.replace("_", " ")
                text += f" ({control} {form.format(beside.control_score)}, p = {beside.p:.2g})"
            parts.append(text)
        if attack.kind == "image":
            parts.append(f"identified {first['identified'].sum():.0f} of {len(first)} (a guess: "
                         f"{first['guess'].sum():.1f})")
            if (worst := worst_identified(first)) == worst:
                parts.append(f"of the {WORST:.0%} with the highest KL {worst:.0%}")
        things = {"class": ("class", "classes"), "image": ("image", "images")}[attack.kind][verdict.count > 1]
        return f"{verdict.word}{f' (only {verdict.count} {things})' * verdict.few}. {', '.join(parts)}"


make_parser, main = MiAttack.parser, MiAttack.main

if __name__ == "__main__":
    with steady_output("mi_attack.py"):
        sys.exit(main())
