"""Carry out attacks on one run, one at a time, with their controls: rows of attack.csv and a picture of each."""
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from attack import scoring
from attack.adversaries import Adversary, Budget, Knowledge, hold, public_images
from attack.attacks import ATTACKS, ClassAttack, IdentificationAttack, ReconstructionAttack
from attack.observations import Victim
from attack.scoring import MAX_CANDIDATES, RANKS
from attack.target import Target
from attack.verdict import FOREIGN, Unit
from devices import seed_torch
from utils import InputError, rng, write_whole

PICTURED = 10          # images in a picture
BLANK = ("grey", "noise")   # controls of attacks on classes that a picture does not show
Observe = Callable[[np.ndarray], Any]   # numbers of N images -> what an attack observes of them


class Outcome(NamedTuple):
    """The N images of an attack or a control in R restarts, of which the first is the attack's own choice."""

    images: Tensor        # R x N x C x H x W
    numbers: Tensor       # R x N, of the true images
    label_match: Tensor   # R x N, True where the adversary knew the label
    ranks: Tensor         # 5 x R x N, RANKS
    kl: Tensor            # N, of the true images' posteriors in nats; NaN where there is none


class Evaluation:
    """A run under attack: its images and their owners, the evaluator, and the budget of every adversary."""

    attacks = ATTACKS

    def __init__(self, target: Target, args: Namespace) -> None:
        self.target, self.args = target, args
        self.train, self.test = target.owned()
        self._check_image_numbers()
        self.held_out = np.concatenate(self.test)
        self.public = public_images(target, args)
        self.budget = Budget(args.restarts, args.iterations, args.train_epochs, args.draws, args.client_lr,
                             args.scores, clients=target.clients_observed)
        seed_torch(args.seed, "evaluator")
        self.evaluator = scoring.Evaluator(target.pixels(self.held_out), target.labels(self.held_out),
                                           target.data.image_shape, target.data.num_classes)
        self.adversaries: dict[tuple, Adversary] = {}   # the latest, so that it trains once only
        self.features: dict[int, tuple[Tensor, Tensor]] = {}   # of the client attacked last

    def _check_image_numbers(self) -> None:
        numbers, clients = self.args.image_numbers, self.args.clients
        if not numbers:
            return
        if self.args.images:
            raise InputError("--image_numbers and --images: give one of them")
        if len(set(numbers)) < len(numbers):
            raise InputError(f"--image_numbers {max(numbers, key=numbers.count)}: it is given more than once")
        if len(foreign := np.setdiff1d(numbers, np.concatenate([self.train[k] for k in clients]))):
            raise InputError(f"--image_numbers {foreign[0]}: no client of --clients trains on this image")
        for k in clients:
            if not np.isin(numbers, self.train[k]).any():
                raise InputError(f"--image_numbers: client {k} trains on none of these images")

    def adversary(self, name: str, round: int, client: int) -> Adversary:
        """Return an adversary of one client in one round. A curious client is the one that follows the victim."""
        key = (name, round, client)
        if key not in self.adversaries:
            target = self.target
            if name == "prediction_api":
                answers = partial(Victim(target, round, client).answers, draws=self.budget.draws,
                                  keep=self.budget.top_scores)
                knowledge = Knowledge(None, None, target.has_encoder, target.data.image_shape, query=answers)
            else:
                knowledge = hold(target, name, round, client, own=(client + 1) % target.clients)
            self.adversaries = {key: Adversary(
                knowledge, target.start(round), self.public, target.options.get("kl_weight") or 0.0, self.budget,
                lambda what: seed_torch(self.args.seed, f"{name} {what}", client, round))}
        return self.adversaries[key]

    def classes(self, client: int) -> Tensor:
        """Return the classes of a client's training images of which somebody held an image out."""
        labels = self.target.data.labels
        return torch.from_numpy(np.intersect1d(labels[self.train[client]], labels[self.held_out]))

    def unscorable(self, name: str, client: int) -> str | None:
        """Return why an attack on a client could not be scored; None if it can."""
        attack = self.attacks[name]
        if isinstance(attack, ClassAttack):
            return None if len(self.classes(client)) else f"nobody held out an image of client {client}'s classes"
        return (None if len(self.paired(attack, client, 1)[0])
                else f"no two images of a class of client {client}, one of them as a control")

    def order(self, client: int, round: int) -> np.ndarray:
        """Return the numbers of a client's training images in the order in which all attacks on it take them."""
        return rng(self.args.seed, "images", client, round).permutation(self.train[client])

    def paired(self, attack: ReconstructionAttack | IdentificationAttack, client: int,
               round: int) -> tuple[np.ndarray, np.ndarray]:
        """Run ``scoring.paired``; held-out images, the client's own first, make up what is missing."""
        count = self.args.images or (None if attack.cheap else self.args.slow_images)
        order = self.order(client, round)
        chosen = np.array([n for n in self.args.image_numbers or [] if n in self.train[client]], int)
        if len(chosen):
            count, order = len(chosen), np.concatenate([chosen, order[~np.isin(order, chosen)]])
        spare = [self.test[client], *(part for k, part in enumerate(self.test) if k != client)]
        numbers, partners = scoring.paired(self.target.data.labels, order, np.concatenate(spare), count,
                                           attack.unordered)
        if len(lacking := np.setdiff1d(chosen, numbers)):
            raise InputError(f"--image_numbers {lacking[0]}: its class has too few images for a control"
                             + " of attacks on several images at once" * attack.unordered)
        return numbers, partners

    def attack(self, unit: Unit) -> list[dict]:
        """Run one attack, save its picture, and return its rows of attack.csv, and its controls'."""
        outcomes = self.outcomes(unit)
        rows = {control: self.rows(unit, outcome, control) for control, outcome in outcomes.items()}
        shown, of_class = outcomes[""].numbers[0, :PICTURED], isinstance(self.attacks[unit.attack], ClassAttack)
        pictures, texts = {"nearest own" if of_class else "truth": self.target.pixels(shown)}, {}
        for control in [name for name in outcomes if name not in BLANK]:
            name = f"{control} (control)" if control else unit.words
            pictures[name], texts[name] = outcomes[control].images[0], captions(rows[control][:len(shown)])
        save_picture(self.target.results / unit.picture, pictures, texts, self.target.labels(shown),
                     f"{self.target.results.name}: {unit.adversary}, round {unit.round}, client {unit.client}")
        return [row for of_control in rows.values() for row in of_control]

    def outcomes(self, unit: Unit) -> dict[str, Outcome]:
        """Run one attack; return what it found ("") and what its controls found, by name."""
        adversary, attack = self.adversary(unit.adversary, unit.round, unit.client), self.attacks[unit.attack]
        seed_torch(self.args.seed, f"{unit.adversary} {unit.attack}", unit.client, unit.round)
        return (self._attack_classes(unit, attack, adversary) if isinstance(attack, ClassAttack)
                else self._attack_images(unit, attack, adversary))

    def victim(self, unit: Unit) -> Victim:
        """Return the attacked client."""
        return Victim(self.target, unit.round, unit.client)

    def observe(self, attack: ReconstructionAttack | IdentificationAttack, victim: Victim, numbers: np.ndarray,
                budget: Budget) -> Any:
        """Return what an attack observes of the images of these numbers."""
        return attack.observe(victim, self.target.pixels(numbers), self.target.labels(numbers), budget)

    def _attack_classes(self, unit: Unit, attack: ClassAttack, adversary: Adversary) -> dict[str, Outcome]:
        """Attack the classes of a client. Controls are what the public images show of them, and blank pictures."""
        labels, victim = self.classes(unit.client), self.victim(unit)
        shown = self.drawn_classes(attack, adversary, labels)

        def outcome(images: Tensor) -> Outcome:
            nearest = [self._nearest(images[:, p], int(c), unit.client) for p, c in enumerate(labels)]
            numbers, ranks = (torch.stack(column, -1) for column in zip(*nearest, strict=True))
            guessed = torch.stack([victim.answers(part, self.budget.draws, 10**9).argmax(1) for part in images])
            return Outcome(images, numbers, guessed == labels, ranks, torch.full((len(labels),), torch.nan))
        return {name: outcome(images) for name, images in shown.items()}

    def drawn_classes(self, attack: ClassAttack, adversary: Adversary, labels: Tensor) -> dict[str, Tensor]:
        """Return the attack's images of the labels' classes ("") and the controls', ``R x P x C x H x W``."""
        images, public = finite(attack.solve(adversary, labels)), self.public
        shown = {"": images, **dict(zip(BLANK, (torch.full_like(images[:1], 0.5), torch.rand_like(images[:1])),
                                        strict=True))}
        if public.of_classes is not None:
            firsts = [int((public.labels == c).int().argmax()) for c in labels]   # in random order as they are
            shown |= {"class_mean": scoring.class_means(public.images, public.labels, labels)[None],
                      "public_image": public.images[firsts][None]}
        return shown

    @torch.no_grad()
    def _nearest(self, images: Tensor, label: int, client: int) -> tuple[Tensor, Tensor]:
        """Return the client's image of a class nearest to each of R, and its ``RANKS`` among held-out ones."""
        labels = self.target.data.labels
        own = self.train[client][labels[self.train[client]] == label][:MAX_CANDIDATES]
        held_out = self.held_out[labels[self.held_out] == label]
        size = min(len(own), len(held_out))
        pool = self.target.pixels(np.concatenate([own[:size], held_out[:size]]))
        nearest = scoring.distances(images, self.target.pixels(own)).argmin(1)
        is_own = (torch.arange(len(pool)) < size).expand(len(images), -1)
        rank, identified = scoring.rank_by(scoring.distances(images, pool), is_own)
        count, guess = torch.full_like(rank, len(pool)), torch.full_like(rank, size / max(len(pool), 1))
        return torch.from_numpy(own)[nearest], torch.stack([rank, identified, rank, count, guess])

    def _attack_images(self, unit: Unit, attack: ReconstructionAttack | IdentificationAttack,
                       adversary: Adversary) -> dict[str, Outcome]:
        """Attack some of the client's training images, and others of their class as the foreign control."""
        target, victim = self.target, self.victim(unit)
        numbers, partners = self.paired(attack, unit.client, unit.round)
        if attack.unordered:
            numbers, partners = np.concatenate([numbers, partners]), np.concatenate([partners, numbers])
        budget, order = replace(self.budget, observed=unit.observed), self.order(unit.client, unit.round)
        labels = target.labels(numbers)
        kl = victim.kl(target.pixels(numbers), labels)
        kl = torch.full((len(labels),), torch.nan) if kl is None else kl

        def observe(seen: np.ndarray) -> Any:
            return self.observe(attack, victim, seen, budget)

        def rank(images: Tensor) -> Tensor:
            return torch.cat([pool.rank(torch.stack([
                scoring.distances(restart[pool.part], target.pixels(pool.numbers)) for restart in images]))
                for pool in scoring.candidates(target.data.labels, order, numbers)], 2)

        def outcome(images: Tensor, guessed: Tensor, ranks: Tensor) -> Outcome:
            return Outcome(images, torch.from_numpy(numbers).expand(len(images), -1), guessed == labels, ranks, kl)
        if isinstance(attack, IdentificationAttack):
            images, guessed, ranks = self._identify(attack, adversary, observe, numbers, partners, order)
        else:
            images, guessed = (self._solve_batches(attack, adversary, observe, numbers) if attack.unordered
                               else self._solve(attack, adversary, observe, numbers, partners))
            ranks = rank(images)
        outcomes = {"": outcome(images[:-1], guessed[:-1], ranks[:, :-1]),
                    FOREIGN: outcome(images[-1:], guessed[-1:], ranks[:, -1:])}
        if self.public.of_classes is not None:
            means = scoring.class_means(self.public.images, self.public.labels, labels)[None]
            outcomes["class_mean"] = outcome(means, labels[None], rank(means))
        return outcomes

    # Three ways to attack images: (attack, adversary, numbers -> what is observed of these images, numbers N, and
    # partners N) -> images (R + 1) x N x C x H x W, and labels (R + 1) x N. The last is the foreign control.

    def _solve(self, attack: ReconstructionAttack, adversary: Adversary, observe: Observe, numbers: np.ndarray,
               partners: np.ndarray) -> tuple[Tensor, Tensor]:
        """Observe each image alone. The reconstruction of one is the foreign control of another."""
        seen = np.concatenate([numbers, np.setdiff1d(partners, numbers)])
        images, guessed = attack.solve(adversary, observe(seen), len(seen))
        images, foreign = finite(images), (seen == partners[:, None]).argmax(1)
        return (torch.cat([images[:, :len(numbers)], images[:1, foreign]]),
                torch.stack([*[guessed[:len(numbers)]] * len(images), guessed[foreign]]))

    def _solve_batches(self, attack: ReconstructionAttack, adversary: Adversary, observe: Observe,
                       numbers: np.ndarray) -> tuple[Tensor, Tensor]:
        """Observe two batches with the same labels. Each is the other's foreign control.

        Of more reconstructions than images, as from a sum, those nearest to the images count, in the control too.
        """
        halves = np.split(numbers, 2)
        solved = [attack.solve(adversary, observe(half), len(half)) for half in halves]
        images, guessed = [], []
        for half, own, other in zip(halves, solved, solved[::-1], strict=True):
            true, labels = self.target.pixels(half), self.target.labels(half)
            images.append(torch.stack([scoring.in_order_of(true, finite(restart))
                                       for restart in (*own[0], other[0][0])]))
            right = [all((guess == c).sum() >= (labels == c).sum() for c in labels.unique())
                     for guess in (*[own[1]] * len(own[0]), other[1])]
            guessed.append(torch.where(torch.tensor(right)[:, None], labels, -1))
        return torch.cat(images, 1), torch.cat(guessed, 1)

    def _identify(self, attack: IdentificationAttack, adversary: Adversary, observe: Observe, numbers: np.ndarray,
                  partners: np.ndarray, order: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
        """Return the likeliest candidates given an image's and its partner's observation, and their ranks."""
        chosen_images, labels, ranks = [], [], []
        for pool in scoring.candidates(self.target.data.labels, order, numbers):
            observed = observe(np.concatenate([numbers[pool.part], partners[pool.part]]))
            images = self.target.pixels(pool.numbers)
            likely, guessed = (part.unflatten(0, (2, -1)) for part in attack.solve(adversary, observed, images))
            chosen = likely.nan_to_num(-torch.inf).masked_fill(~pool.among, -torch.inf).argmax(2)
            chosen_images.append(images[chosen])
            labels.append(guessed)
            ranks.append(pool.rank(-likely))
        return torch.cat(chosen_images, 1), torch.cat(labels, 1), torch.cat(ranks, 2)

    def rows(self, unit: Unit, outcome: Outcome, control: str) -> list[dict]:
        """Return rows of attack.csv, one for each restart and image."""
        rows = []
        for restart, images in enumerate(outcome.images):
            numbers = outcome.numbers[restart]
            true, labels = self.target.pixels(numbers), self.target.labels(numbers)
            ranks = dict(zip(RANKS, outcome.ranks[:, restart], strict=True))
            columns = {"label": labels, "image": numbers, **scoring.similarity(images, true), **ranks,
                       "label_match": outcome.label_match[restart].int(),
                       **self.evaluated(images, true, labels, unit.client),
                       "kl_nats": outcome.kl}
            values = zip(*(column.tolist() for column in columns.values()), strict=True)
            rows += [{**unit._asdict(), "restart": restart, "control": control,
                      **dict(zip(columns, image, strict=True))} for image in values]
        return rows

    def evaluated(self, images: Tensor, true: Tensor, labels: Tensor, client: int) -> dict[str, Tensor]:
        """Return the columns of attack.csv that are the evaluator's."""
        found, features = (self.evaluator.features(part) for part in (images, true))
        return {"evaluator_correct": (self.evaluator.classes(images) == labels).int(),
                **scoring.feature_distances(found, features, labels, *self.own_features(client))}

    def own_features(self, client: int) -> tuple[Tensor, Tensor]:
        """Return the evaluator's features of a client's training images, ``M x D``, and their labels ``M``."""
        if client not in self.features:
            own = self.train[client]
            self.features = {client: (self.evaluator.features(self.target.pixels(own)), self.target.labels(own))}
        return self.features[client]


def finite(images: Tensor) -> Tensor:
    """Replace pixels that are no finite number by grey: a gradient of 0, say, gives nothing to hand in."""
    return images.nan_to_num(0.5, 0.5, 0.5)


def captions(rows: list[dict]) -> list[str]:
    """Return the text below each image of a picture, from its row of attack.csv."""
    return [f"SSIM {row['ssim']:.2f}\nrank {row['class_rank']:g} of {row['class_size']:.0f}" for row in rows]


def save_picture(path: Path, rows: dict[str, Tensor], captions: dict[str, list[str]], labels: Tensor,
                 title: str) -> None:
    """Save the first images of each row, ``N x C x H x W``, as one picture, a labelled column for each image.

    Args:
        captions: the texts below the images of some rows.
    """
    from runs.plots import drawable, plt  # slow to import

    count, text = min(PICTURED, len(labels)), {"ha": "center", "va": "top", "fontsize": 7}
    figure, panel = plt.subplots(figsize=(1.6 + count, 0.6 + 1.35 * len(rows)), layout="constrained")
    for line, (name, images) in enumerate(rows.items()):   # an image and its text have a height of 1.35
        top = 1.35 * line
        for i in range(count):
            panel.imshow(drawable(images[i].permute(1, 2, 0).numpy()), cmap="gray", vmin=0, vmax=1,
                         extent=(i + 0.03, i + 0.97, top + 0.94, top))
            if name in captions:
                panel.text(i + 0.5, top + 0.98, captions[name][i], text)
    names = [name.replace("_", " ").replace(" (", "\n(") for name in rows]
    panel.set(xlim=(0, count), ylim=(1.35 * len(rows), 0))
    panel.set_xticks([i + 0.5 for i in range(count)], [f"class {label}" for label in labels[:count]])
    panel.set_yticks([1.35 * line + 0.47 for line in range(len(rows))], names)
    panel.tick_params(length=0, labelsize=8, top=True, labeltop=True, bottom=False, labelbottom=False)
    panel.spines[:].set_visible(False)
    figure.suptitle(title, fontsize=9)
    write_whole(path, lambda file: figure.savefig(file, format="png", dpi=110, bbox_inches="tight"))
    plt.close(figure)
