"""Attacks on one run, one at a time: each gives rows of attack.csv and a picture."""
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import datasets
from attack import picture, scoring
from attack.access import Holdings, Target, Victim, hold
from attack.adversary import Adversary, Budget, PublicImages
from attack.attacks import ATTACKS
from attack.tables import Unit
from utils import InputError, rng, seed_torch

OTHER_DATA = {"mnist10k": "mnist", "mnist": "fmnist", "fmnist": "mnist"}   # suggested for --public
MIN_PUBLIC = 200       # images; with fewer, training on them is no use
MAX_CANDIDATES = 500   # images of the client, among which a true image is ranked
# Size of the SGD steps whose upload the curious server observes. A run's own steps are some hundred times shorter,
# and noise hides less of a longer step: this is the best case for the adversary.
CLIENT_LR = 0.1


@dataclass(frozen=True)
class Truth:
    """The true images beside R x N reconstructions.

    Attributes:
        images: ``R x N x C x H x W``.
        numbers: their numbers in the data set, ``R x N``.
        rank: the true image's place, from 1, when images are sorted by distance from a reconstruction;
            ``R x N``.
        guess: the share of these images that count as true: how often a guess has rank 1; ``R x N``.
    """

    images: Tensor
    numbers: Tensor
    rank: Tensor
    guess: Tensor


@dataclass(frozen=True)
class Outcome:
    """What an attack handed in, or a control: N images, in R restarts of which the first is its own choice.

    Attributes:
        labels: of the true images, ``N``.
        images: reconstructions, ``R x N x C x H x W``.
        label_match: whether the adversary knew the label, ``R x N``, bool; see ``Scene.victims_label``.
    """

    labels: Tensor
    images: Tensor
    truth: Truth
    label_match: Tensor


FindTruth = Callable[[Tensor], Truth]   # reconstructions R x N x C x H x W -> the true images


class Scene:
    """A run under attack: its images and who owns them, the evaluator, and the budget of every adversary.

    Raises:
        InputError: the run's partition is damaged, or the public images are too few or of another shape.
    """

    def __init__(self, target: Target, args: Namespace) -> None:
        self.target, self.args = target, args
        self.train, self.test = target.owned()
        self.public_data = unowned_images(target, args.public, args.data_dir, args.seed)
        images, labels = self.public_data
        self.public = PublicImages(as_floats(images[:args.public_images]), labels[:args.public_images],
                                   self.of_classes if same_classes(target, args.public) else None)
        self.budget = Budget(args.restarts, args.iterations, args.train_epochs, args.draws, CLIENT_LR,
                             args.scores)
        seed_torch(args.seed, "evaluator")
        held_out = torch.from_numpy(np.concatenate(self.test))
        self.evaluator = scoring.evaluator(self.pixels(held_out), self.labels(held_out),
                                           target.data.num_classes)
        self.adversaries: dict[tuple, Adversary] = {}   # the latest, so that it trains once only
        self.features: dict[int, tuple[Tensor, Tensor]] = {}   # of the client attacked last

    def pixels(self, numbers: Tensor) -> Tensor:
        """Image numbers ``N`` -> ``N x C x H x W`` in [0, 1]."""
        return as_floats(self.target.data.images[numbers.numpy()])

    def labels(self, numbers: Tensor) -> Tensor:
        """Image numbers ``N`` -> labels ``N``."""
        return torch.from_numpy(self.target.data.labels[numbers.numpy()])

    def of_classes(self, classes: Tensor) -> tuple[Tensor, Tensor]:
        """Public images of these classes only, and their labels; of all classes if there are too few of them."""
        images, labels = self.public_data
        chosen = torch.isin(labels, classes).nonzero().flatten()[:self.args.public_images]
        if len(chosen) < MIN_PUBLIC:
            return self.public.images, self.public.labels
        return as_floats(images[chosen.numpy()]), labels[chosen]

    def about(self) -> str:
        """One line about the evaluator and the public images."""
        return (f"evaluator: right on {self.evaluator.accuracy:.1%} of held-out images that it was not "
                f"trained on; public images: {len(self.public.images)} ({self.args.public})")

    def latents(self, round: int, client: int) -> dict | None:
        """The client's row of attack_latents.csv; None for a method without noise."""
        images = self.pixels(torch.from_numpy(self.train[client]))
        labels = self.labels(torch.from_numpy(self.train[client]))
        noise = Victim(self.target, round, client).noise(images, labels)
        if noise is None:
            return None
        bound = noise.pop("bound_nats")
        return {"round": round, "client": client, **noise, "mse_bound": scoring.distortion_bound(images, bound),
                "bound_nats": bound}

    def adversary(self, name: str, round: int, client: int) -> Adversary:
        """An adversary of one client in one round. A curious client is the one that follows the victim."""
        key = (name, round, client)
        if key not in self.adversaries:
            target, options = self.target, self.target.options
            if name == "prediction_api":
                answers = partial(Victim(target, round, client).answers, draws=self.budget.draws,
                                  keep=self.budget.top_scores)
                holdings = Holdings(None, None, target.has_encoder, target.data.image_shape, query=answers)
            else:
                holdings = hold(target, name, round, client, own=(client + 1) % options["num_users"])
            start = target.start(round)
            self.adversaries = {key: Adversary(
                holdings, start, self.public, options.get("kl_weight") or 0.0, self.budget,
                lambda what: seed_torch(self.args.seed, f"{name} {what}", client, round))}
        return self.adversaries[key]

    def classes(self, client: int) -> Tensor:
        """The classes of a client's training images of which somebody held an image out.

        Without held-out images, the evaluator does not know a class, and nothing can be ranked among them.
        """
        held_out = self.target.data.labels[np.concatenate(self.test)]
        return torch.from_numpy(np.intersect1d(self.target.data.labels[self.train[client]], held_out))

    def unscorable(self, attack: str, client: int) -> str | None:
        """Why an attack on a client could not be scored, in words; None if it can."""
        if ATTACKS[attack].kind == "class" and not len(self.classes(client)):
            return f"nobody held out an image of client {client}'s classes"
        return None

    def attack(self, adversary: str, attack: str, round: int, client: int, observed: str = "") -> list[dict]:
        """Run one attack, draw its picture, and return its rows of attack.csv, and its controls'."""
        unit = Unit(adversary, attack, round, client, observed or "z" * ATTACKS[attack].of_latents)
        attacker = self.adversary(adversary, round, client)
        seed_torch(self.args.seed, f"{adversary} {attack}", client, round)
        attack_it = self._attack_classes if ATTACKS[attack].kind == "class" else self._attack_images
        outcome, find_truth = attack_it(unit, attacker)
        outcomes = {"": outcome, **self._controls(unit, outcome, find_truth)}
        self._draw(unit, outcomes)
        return [row for control, one in outcomes.items() for row in self.rows(unit, one, control)]

    def _attack_classes(self, unit: Unit, adversary: Adversary) -> tuple[Outcome, FindTruth]:
        """The true image beside a drawn class is the client's nearest of that class."""
        labels = self.classes(unit.client)
        images = finite(ATTACKS[unit.attack].solve(adversary, labels))

        def find_truth(images: Tensor) -> Truth:
            return self.nearest(images, labels, unit.client)
        truth = find_truth(images)
        match = self.victims_label(unit, images) == labels
        return Outcome(labels, images, truth, match), find_truth

    def _attack_images(self, unit: Unit, adversary: Adversary) -> tuple[Outcome, FindTruth]:
        """Attack some of the client's training images, drawn at random."""
        attack, client = ATTACKS[unit.attack], unit.client
        drawn = rng(self.args.seed, f"images {unit.attack}", client, unit.round)
        numbers = torch.from_numpy(drawn.permutation(self.train[client]))[:self.args.images]
        true, labels = self.pixels(numbers), self.labels(numbers)
        observed = self.observe(unit, true, labels)
        pool, is_true = self.pool(numbers, client)

        def find_truth(images: Tensor) -> Truth:
            rank = torch.stack([scoring.rank_of(one, pool, is_true) for one in images])
            return Truth(true.expand(len(images), *true.shape), numbers.expand(len(images), -1), rank,
                         torch.full_like(rank, 1 / len(pool), dtype=torch.double))
        if attack.chooses:
            likely, guessed = attack.solve(adversary, observed, pool)
            images = pool[likely.nan_to_num(-torch.inf).argmax(1)][None]
            truth = replace(find_truth(images), rank=scoring.rank_by(-likely, is_true)[None])
        else:
            images, guessed = attack.solve(adversary, observed, len(numbers))
            images = finite(images)
            if attack.unordered:
                images = torch.stack([scoring.in_order_of(true, one) for one in images])
                all_known = torch.equal(guessed, labels.sort().values)
                guessed = labels if all_known else torch.full_like(labels, -1)
            truth = find_truth(images)
        return Outcome(labels, images, truth, (guessed == labels).expand(len(images), -1)), find_truth

    def observe(self, unit: Unit, images: Tensor, labels: Tensor) -> Any:
        """What an attack on single images observes of these, ``N x C x H x W`` with labels ``N``."""
        observe = ATTACKS[unit.attack].observe
        if observe is None:
            raise ValueError(f"{unit.attack} observes no images")
        of_latents = (unit.observed,) if unit.observed else ()
        return observe(Victim(self.target, unit.round, unit.client), images, labels, self.budget, *of_latents)

    def _controls(self, unit: Unit, outcome: Outcome, find_truth: FindTruth) -> dict[str, Outcome]:
        """What controls hand in, scored in the same way."""
        labels, public = outcome.labels, self.public
        controls = scoring.controls(public.images, public.labels, labels, outcome.truth.images[0])
        return {name: Outcome(labels, images[None], find_truth(images[None]),
                              self.victims_label(unit, images[None]) == labels)
                for name, images in controls.items()}

    def _draw(self, unit: Unit, outcomes: dict[str, Outcome]) -> None:
        """Save the picture: the true images, the attack's first choices, and the controls."""
        true = "nearest of the client's" if ATTACKS[unit.attack].kind == "class" else "truth"
        rows = {true: outcomes[""].truth.images[0],
                **{name or unit.attack: one.images[0] for name, one in outcomes.items()}}
        picture.grid(self.target.results / unit.picture, rows, outcomes[""].labels,
                     f"{self.target.results.name}: {unit.adversary}, round {unit.round}")

    def rows(self, unit: Unit, outcome: Outcome, control: str) -> list[dict]:
        """Rows of attack.csv, one for each restart and image."""
        rows, labels, truth = [], outcome.labels, outcome.truth
        for restart, images in enumerate(outcome.images):
            correct = self.evaluator.classes(images) == labels
            found, true = (self.evaluator.features(part) for part in (images, truth.images[restart]))
            columns = {"label": labels, "image": truth.numbers[restart],
                       **scoring.similarity(images, truth.images[restart]),
                       "label_match": outcome.label_match[restart].int(), "evaluator_correct": correct.int(),
                       "nearest_rank": truth.rank[restart],
                       **scoring.feature_distances(found, true, labels, *self.own_features(unit.client)),
                       "identified": (truth.rank[restart] == 1).int(), "guess": truth.guess[restart]}
            rows += [{**unit._asdict(), "restart": restart, "control": control,
                      **{name: values[i].item() for name, values in columns.items()}}
                     for i in range(len(images))]
        return rows

    def own_features(self, client: int) -> tuple[Tensor, Tensor]:
        """The evaluator's features of a client's training images, ``M x D``, and their labels ``M``."""
        if client not in self.features:
            own = torch.from_numpy(self.train[client])
            parts = [self.evaluator.features(self.pixels(part)) for part in own.split(256)]
            self.features = {client: (torch.cat(parts), self.labels(own))}
        return self.features[client]

    @torch.no_grad()
    def victims_label(self, unit: Unit, images: Tensor) -> Tensor:
        """The label that the victim's own model gives images ``R x N x C x H x W``: ``R x N``."""
        victim = Victim(self.target, unit.round, unit.client)
        return torch.stack([victim.answers(one, self.budget.draws, 10**9).argmax(1) for one in images])

    def pool(self, numbers: Tensor, client: int) -> tuple[Tensor, Tensor]:
        """The client's own images that a true one is ranked among, and which of them is the true one.

        Args:
            numbers: of the N true images.

        Returns:
            ``M x C x H x W``, and bool ``N x M``.
        """
        others = torch.from_numpy(np.setdiff1d(self.train[client], numbers.numpy())[:MAX_CANDIDATES])
        pool = torch.cat([numbers, others])
        return self.pixels(pool), pool[None, :] == numbers[:, None]

    def nearest(self, images: Tensor, labels: Tensor, client: int) -> Truth:
        """For drawn classes ``R x P x C x H x W``: the client's nearest training image of each class.

        It is ranked among training images of the client and as many held-out ones of the class.
        """
        each = [self._nearest_of_class(images[:, p], int(label), client) for p, label in enumerate(labels)]
        # The noise control takes the memory layout of these images, so another way to stack changes it.
        return Truth(*(torch.stack(column).transpose(0, 1) for column in zip(*each, strict=True)))

    def _nearest_of_class(self, images: Tensor, label: int, client: int) -> tuple[Tensor, ...]:
        """Images ``R x C x H x W`` -> ``Truth``'s four, ``R x ...``: the nearest training images of the class."""
        labels = self.target.data.labels
        own = self.train[client][labels[self.train[client]] == label][:MAX_CANDIDATES]
        held_out = np.concatenate(self.test)
        held_out = held_out[labels[held_out] == label]
        size = min(len(own), len(held_out))
        pool = torch.from_numpy(np.concatenate([own[:size], held_out[:size]]))
        distance = scoring.distances(images, self.pixels(torch.from_numpy(own)))
        nearest = torch.from_numpy(own)[distance.argmin(1)]
        is_own = (torch.arange(len(pool)) < size).expand(len(images), -1)
        return (self.pixels(nearest), nearest, scoring.rank_of(images, self.pixels(pool), is_own),
                is_own.double().mean(1))


def same_classes(target: Target, public: str) -> bool:
    """Whether the public images of a name show the classes of the run's data set.

    NAME10k holds ten thousand of NAME's images (benchmarks/make_10k.py), so its classes are the same.
    """
    return public == "unowned" or public.removesuffix("10k") == target.options["dataset"].removesuffix("10k")


def unowned_images(target: Target, name: str, data_dir: Path, seed: int) -> tuple[np.ndarray, Tensor]:
    """Images that no client has for training or testing, in random order: uint8, and their labels.

    Args:
        name: as of ``--public``.

    Raises:
        InputError: there are too few, or they are of another shape.
    """
    data = target.data
    if name == "unowned":
        train, test = target.owned()
        index = np.setdiff1d(np.arange(len(data.labels)), np.concatenate([*train, *test]))
        images, labels = data.images[index], data.labels[index]
    else:
        other = datasets.load(name, data_dir)
        if other.image_shape != data.image_shape or other.num_classes > data.num_classes:
            raise InputError(f"--public {name}: its images are {other.image_shape} in "
                             f"{other.num_classes} classes; the run's are {data.image_shape} in "
                             f"{data.num_classes} classes")
        ours = {image.tobytes() for image in data.images}
        new = np.array([image.tobytes() not in ours for image in other.images])
        images, labels = other.images[new], other.labels[new]
    if len(labels) < MIN_PUBLIC:
        suggested = OTHER_DATA.get(target.options["dataset"], "NAME")
        shape = " x ".join(map(str, data.image_shape))
        raise InputError(f"--public {name}: only {len(labels)} of its images belong to no client, and "
                         f"{MIN_PUBLIC} are needed; give --public {suggested}, or the NAME of another "
                         f"data set of {shape} images")
    index = rng(seed, "public").permutation(len(labels))
    return images[index], torch.from_numpy(labels[index])


def finite(images: Tensor) -> Tensor:
    """Grey wherever a pixel is not a finite number: a gradient of 0, say, gives nothing to hand in."""
    return images.nan_to_num(0.5, 0.5, 0.5)


def as_floats(images: np.ndarray) -> Tensor:
    """uint8 ``N x H x W x C`` -> ``N x C x H x W`` in [0, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float().div_(255).contiguous()
