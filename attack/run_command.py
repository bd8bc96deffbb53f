"""``mi_attack.py --run``: attack a run of RVE-PFL.py, and report for each attack whether it beats its control."""
from __future__ import annotations

from argparse import Namespace
from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING

from attack.attacks import ADVERSARIES, ATTACKS, CLIENT_LR, DEFAULT_ATTACKS, observe_latents
from attack.command import Command
from attack.verdict import ATTACK_COLUMNS, FOREIGN, Unit, judge, summarise
from parsing import HUGE, TENSORBOARD, Option
from runs import folders
from utils import InputError, Late, nearby

if TYPE_CHECKING:
    import pandas as pd

    from attack import evaluation, observations
    from runs import board
else:
    pd, evaluation, observations = Late("pandas"), Late("attack.evaluation"), Late("attack.observations")
    board = Late("runs.board")

OBSERVED = (r"z([2-9]|[1-9]\d{1,3})?|rounds|mu|train",
            "choose from z, zN (N draws, from 2 to 9999), rounds, mu, train")
CHEAP = ", ".join(name for name, attack in ATTACKS.items() if attack.cheap)
LATENT_COLUMNS = ["round", "client", "kl_nats", "sigma", "snr_db", "bound_nats"]


class MiAttack(Command):
    """Attacks that reconstruct images and classes."""

    program, name = "mi_attack.py", "attack"
    description = ("Attack a trained run, and report for each attack whether it beats its control. "
                   "For a model that another program trained, see --help --model.")
    files, columns = folders.OF_ATTACKS, ATTACK_COLUMNS
    adversaries: Collection[str] = ADVERSARIES
    attacks: dict = ATTACKS
    default_attacks: Collection[str] = DEFAULT_ATTACKS
    table = "{:<10} {:<14} {:<25} {:>16} {:>10} {:>11} {:>5}"
    titles = "verdict", "adversary", "attack (observes)", "identified", "class rank", "SSIM"
    legend = ("In brackets: the same attack on another image of the class. For attacks on classes: how many the\n"
              "evaluator recognises, and in brackets how many of the best control.")
    draws, public_images, first_round = 32, 10_000, 0

    options: Sequence[Option] = (
        Option("observe", "what attacks on latents observe of an image: z is one draw, zN are N draws, as z8; "
               "rounds is one draw in each round so far, with that round's encoder; mu is the mean of z; train is "
               "one draw with the encoder's dropout", default=["z", "mu"], pattern=OBSERVED, several=True),
        Option("images", "maximum number of a client's training images that are attacked (if not given: all, "
               f"where an attack is cheap: {CHEAP}; else --slow_images)", int, within=(1, HUGE)),
        Option("slow_images", "the same, of attacks that are not cheap", int, 8, within=(1, HUGE)),
        Option("image_numbers", "indices in the pooled data of the training images to attack, in place of "
               "--images", int, within=(0, HUGE), several=True),
        Option("restarts", "number of starts of a search", int, 3, within=(1, 1000)),
        Option("iterations", "steps of a search", int, 300, within=(1, HUGE)),
        Option("client_lr", "size of the client's SGD steps whose upload the curious server observes; where "
               "uploads have noise, longer steps leak more", float, CLIENT_LR, within=(1e-6, 10)),
        Option("train_epochs", "epochs of training on public images", int, 20, within=(1, HUGE)),
        TENSORBOARD)

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
        if self.args.tensorboard:
            board.write_pictures(target.results)
        evaluator, public = self.evaluation.evaluator, self.evaluation.public
        return [f"evaluator: right on {evaluator.accuracy:.1%} of images that it was not trained on; "
                f"public images: {len(public.images)} ({self.args.public})", *(
            f"round {row['round']}, client {row['client']}: z tells at most {row['bound_nats']:.0f} nats about an "
            f"image (sigma {row['sigma']:.3f}, SNR {row['snr_db']:.1f} dB)" for row in new)]

    def pictures(self, plan: list[Unit], rows: list[dict]) -> list[str]:
        """Return a line that names the picture of the attack with the largest advantage in SSIM."""
        table, advantage = pd.DataFrame(rows, columns=ATTACK_COLUMNS), {}
        for unit, part in table.groupby(list(Unit._fields), sort=False):
            if Unit(*unit) not in plan:
                continue
            attack = ATTACKS[unit[1]]
            if attack.kind == "image" and not attack.chooses:
                comparison = judge(part, attack).comparisons[0]
                advantage[Unit(*unit)] = comparison.score - comparison.control_score
        best = max(advantage, key=lambda unit: advantage[unit], default=plan[0])
        return [f"picture:  {nearby(self.target.results / best.picture)}"]

    @staticmethod
    def describe(unit: Unit, rows: list[dict]) -> tuple[str, ...]:
        table, attack = pd.DataFrame(rows, columns=ATTACK_COLUMNS), ATTACKS[unit.attack]
        verdict = judge(table, attack)
        word = "too few" if verdict.few else verdict.word
        if attack.kind == "class":
            best = verdict.comparisons[0]
            right, control = round(best.score * verdict.count), round(best.control_score * verdict.count)
            return word, unit.adversary, unit.words, f"{right}/{verdict.count} ({control})", "-", "-"
        first = table[table["restart"] == 0]
        own, foreign = (first[first["control"] == control] for control in ("", FOREIGN))
        rank, ssim = (f"{own[metric].mean():{form}} ({foreign[metric].mean():{form}})"
                      for metric, form in (("class_rank", ".0f"), ("ssim", ".2f")))
        identified = f"{own['identified'].sum():.0f}/{len(own)} ({foreign['identified'].sum():.0f})"
        return word, unit.adversary, unit.words, identified, rank, "-" if attack.chooses else ssim
