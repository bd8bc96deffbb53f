"""Attacks on one run, one at a time: each gives rows of attack.csv and a picture."""
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import datasets
from attack import picture, scoring
from attack.access import Knowledge, Target, Victim, hold
from attack.adversary import Adversary, Budget, PublicImages
from attack.attacks import ATTACKS, Attack
from attack.pairs import MAX_CANDIDATES, Ranks, candidates, paired
from attack.tables import FOREIGN, Unit
from utils import InputError, rng, seed_torch

OTHER_DATA = {"mnist10k": "mnist", "mnist": "fmnist", "fmnist": "mnist"}   # suggested for --public
MIN_PUBLIC = 200       # images; with fewer, training on them is no use
FEW_IMAGES = 8         # attacked where an attack is slow, unless --images says otherwise
# Default size of the SGD steps whose upload the curious server observes. A run's own steps are some hundred times
# shorter, and noise hides less of a longer step: this is the best case for the adversary.
CLIENT_LR = 0.1
Observe = Callable[[np.ndarray], Any]   # numbers of N images -> what an attack observes of them


@dataclass(frozen=True)
class Outcome:
    """What an attack handed in, or a control: N images, in R restarts of which the first is its own choice.

    Attributes:
        images: reconstructions, ``R x N x C x H x W``.
        numbers: of the true images in the data set, ``R x N``.
        label_match: whether the adversary knew the label, ``R x N``, bool.
        ranks: of the true images, by distance from a reconstruction or by the likelihood that it gives them.
        kl: of the true images' posteriors to the prior, nats, ``N``; not a number where there is none.
    """

    images: Tensor
    numbers: Tensor
    label_match: Tensor
    ranks: Ranks
    kl: Tensor

    def restarts(self, which: slice) -> "Outcome":
        """Some of the restarts."""
        ranks = Ranks(*(getattr(self.ranks, name)[which] for name in Ranks.__dataclass_fields__))
        return Outcome(self.images[which], self.numbers[which], self.label_match[which], ranks, self.kl)


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
        self.budget = Budget(args.restarts, args.iterations, args.train_epochs, args.draws, args.client_lr,
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
                knowledge = Knowledge(None, None, target.has_encoder, target.data.image_shape, query=answers)
            else:
                knowledge = hold(target, name, round, client, own=(client + 1) % options["num_users"])
            start = target.start(round)
            self.adversaries = {key: Adversary(
                knowledge, start, self.public, options.get("kl_weight") or 0.0, self.budget,
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
        if ATTACKS[attack].kind == "class":
            lacking = not len(self.classes(client))
            return f"nobody held out an image of client {client}'s classes" if lacking else None
        lacking = not len(self.paired(ATTACKS[attack], client, 1)[0])
        return f"no two images of a class of client {client}, one of them as a control" if lacking else None

    def order(self, client: int, round: int) -> np.ndarray:
        """The numbers of a client's training images in the order in which all attacks on it take them."""
        return rng(self.args.seed, "images", client, round).permutation(self.train[client])

    def paired(self, attack: Attack, client: int, round: int) -> tuple[np.ndarray, np.ndarray]:
        """``pairs.paired`` for an attack; held-out images, the client's own first, make up what is missing."""
        count = self.args.images or (None if attack.cheap else FEW_IMAGES)
        others = [part for k, part in enumerate(self.test) if k != client]
        return paired(self.target.data.labels, self.order(client, round),
                      np.concatenate([self.test[client], *others]), count, attack.unordered)

    def attack(self, adversary: str, attack: str, round: int, client: int, observed: str = "") -> list[dict]:
        """Run one attack, draw its picture, and return its rows of attack.csv, and its controls'."""
        unit = Unit(adversary, attack, round, client, observed or "z" * ATTACKS[attack].of_latents)
        attacker = self.adversary(adversary, round, client)
        seed_torch(self.args.seed, f"{adversary} {attack}", client, round)
        attack_it = self._attack_classes if ATTACKS[attack].kind == "class" else self._attack_images
        outcomes = attack_it(unit, attacker)
        self._draw(unit, outcomes)
        return [row for control, one in outcomes.items() for row in self.rows(unit, one, control)]

    def _attack_classes(self, unit: Unit, adversary: Adversary) -> dict[str, Outcome]:
        """Attack the classes of a client. Controls are what the public images show of them, and blank pictures."""
        labels, (public, public_labels) = self.classes(unit.client), (self.public.images, self.public.labels)
        images = finite(ATTACKS[unit.attack].solve(adversary, labels))
        shown = {"": images, "grey": torch.full_like(images[:1], 0.5), "noise": torch.rand_like(images[:1])}
        if self.public.of_classes is not None:
            firsts = [int((public_labels == c).int().argmax()) for c in labels]   # in random order as they are
            shown |= {"class_mean": scoring.class_means(public, public_labels, labels)[None],
                      "public_image": public[firsts][None]}
        return {name: self._drawn_classes(unit, one, labels) for name, one in shown.items()}

    def _drawn_classes(self, unit: Unit, images: Tensor, labels: Tensor) -> Outcome:
        """``R x P`` drawn classes beside the client's nearest image of each."""
        numbers, ranks = self.nearest(images, labels, unit.client)
        return Outcome(images, numbers, self.victims_label(unit, images) == labels, ranks,
                       torch.full((len(labels),), torch.nan))

    def nearest(self, images: Tensor, labels: Tensor, client: int) -> tuple[Tensor, Ranks]:
        """The numbers and ranks of the client's images nearest to drawn classes, ``R x P x C x H x W``."""
        each = [self._nearest_of_class(images[:, p], int(label), client) for p, label in enumerate(labels)]
        numbers, rank, size, guess = (torch.stack(column, 1) for column in zip(*each, strict=True))
        return numbers, Ranks(rank, rank, size, guess)

    def _attack_images(self, unit: Unit, adversary: Adversary) -> dict[str, Outcome]:
        """Attack some of the client's training images, and others of their class as the foreign control."""
        attack, victim = ATTACKS[unit.attack], Victim(self.target, unit.round, unit.client)
        numbers, partners = self.paired(attack, unit.client, unit.round)
        of_latents = (unit.observed,) if unit.observed else ()

        def observe(seen: np.ndarray) -> Any:
            if attack.observe is None:
                raise ValueError(f"{unit.attack} observes no images")
            index = torch.from_numpy(seen)
            return attack.observe(victim, self.pixels(index), self.labels(index), self.budget, *of_latents)
        if attack.unordered:
            numbers, partners = (np.concatenate(both) for both in ((numbers, partners), (partners, numbers)))
        true, labels = (of(torch.from_numpy(numbers)) for of in (self.pixels, self.labels))
        order, kl = self.order(unit.client, unit.round), victim.kl(true, labels)
        kl = torch.full((len(true),), torch.nan) if kl is None else kl

        def outcome(images: Tensor, guessed: Tensor, ranks: Ranks | None = None) -> Outcome:
            if ranks is None:
                ranks = Ranks.joined([one.rank(torch.stack([scoring.distances(
                    shown[one.part], self.pixels(one.numbers)) for shown in images]))
                    for one in candidates(self.target.data.labels, order, numbers)])
            where = torch.from_numpy(numbers).expand(len(images), -1)
            return Outcome(images, where, guessed == labels, ranks, kl)
        solve = self._choose if attack.chooses else self._solve_batches if attack.unordered else self._solve
        both = outcome(*solve(attack, adversary, observe, numbers, partners, order))
        outcomes = {"": both.restarts(slice(-1)), FOREIGN: both.restarts(slice(-1, None))}
        if self.public.of_classes is not None:
            means = scoring.class_means(self.public.images, self.public.labels, labels)[None]
            outcomes["class_mean"] = outcome(means, labels[None])
        return outcomes

    # The three ways to attack images: (attack, adversary, numbers -> what is observed of these images, numbers N,
    # partners N, order of the client's images) -> images (R + 1) x N x C x H x W, and labels (R + 1) x N. The last
    # of R + 1 is the foreign control.

    def _solve(self, attack: Attack, adversary: Adversary, observe: Observe, numbers: np.ndarray,
               partners: np.ndarray, order: np.ndarray) -> tuple[Tensor, Tensor]:
        """Each image is observed alone, and what is made of one is the foreign control of another."""
        seen = np.concatenate([numbers, np.setdiff1d(partners, numbers)])
        place = {number: i for i, number in enumerate(seen)}
        images, guessed = attack.solve(adversary, observe(seen), len(seen))
        images = finite(images)
        foreign = [place[number] for number in partners]
        return (torch.cat([images[:, :len(numbers)], images[:1, foreign]]),
                torch.stack([*[guessed[:len(numbers)]] * len(images), guessed[foreign]]))

    def _solve_batches(self, attack: Attack, adversary: Adversary, observe: Observe, numbers: np.ndarray,
                       partners: np.ndarray, order: np.ndarray) -> tuple[Tensor, Tensor]:
        """Two batches with the same labels are observed, and each is the other's foreign control."""
        halves = np.split(numbers, 2)
        made = [attack.solve(adversary, observe(half), len(half)) for half in halves]
        made = [(finite(images), guessed) for images, guessed in made]
        images, guessed = [], []
        for half, own, other in zip(halves, made, made[::-1], strict=True):
            true, labels = (of(torch.from_numpy(half)) for of in (self.pixels, self.labels))
            images.append(torch.stack([scoring.in_order_of(true, one) for one in (*own[0], other[0][0])]))
            guessed.append(torch.stack([labels if torch.equal(one.sort().values, labels.sort().values)
                                        else torch.full_like(labels, -1)
                                        for one in (*[own[1]] * len(own[0]), other[1])]))
        return torch.cat(images, 1), torch.cat(guessed, 1)

    def _choose(self, attack: Attack, adversary: Adversary, observe: Observe, numbers: np.ndarray,
                partners: np.ndarray, order: np.ndarray) -> tuple[Tensor, Tensor, Ranks]:
        """The likelihood of each candidate given an image's observation, and given its partner's."""
        found = []
        for one in candidates(self.target.data.labels, order, numbers):
            observed = observe(np.concatenate([numbers[one.part], partners[one.part]]))
            pool = self.pixels(one.numbers)
            likely, guessed = attack.solve(adversary, observed, pool)
            likely, guessed = (part.unflatten(0, (2, -1)) for part in (likely, guessed))
            chosen = likely.nan_to_num(-torch.inf).masked_fill(~one.among, -torch.inf).argmax(2)
            found.append((pool[chosen], guessed, one.rank(-likely)))
        images, guessed, ranks = zip(*found, strict=True)
        return torch.cat(images, 1), torch.cat(guessed, 1), Ranks.joined(list(ranks))

    def _draw(self, unit: Unit, outcomes: dict[str, Outcome]) -> None:
        """Save the picture: the true images, the attack's first choices, and the controls."""
        true = "nearest of the client's" if ATTACKS[unit.attack].kind == "class" else "truth"
        shown = outcomes[""].numbers[0, :picture.MOST]
        rows = {true: self.pixels(shown), **{name or unit.attack: one.images[0] for name, one in outcomes.items()}}
        picture.grid(self.target.results / unit.picture, rows, self.labels(shown),
                     f"{self.target.results.name}: {unit.adversary}, round {unit.round}")

    def rows(self, unit: Unit, outcome: Outcome, control: str) -> list[dict]:
        """Rows of attack.csv, one for each restart and image."""
        rows, ranks = [], outcome.ranks
        for restart, images in enumerate(outcome.images):
            numbers = outcome.numbers[restart]
            true, labels = self.pixels(numbers), self.labels(numbers)
            found, features = (self.evaluator.features(part) for part in (images, true))
            columns = {"label": labels, "image": numbers, **scoring.similarity(images, true),
                       "label_match": outcome.label_match[restart].int(),
                       "evaluator_correct": (self.evaluator.classes(images) == labels).int(),
                       "nearest_rank": ranks.rank[restart], "class_rank": ranks.class_rank[restart],
                       **scoring.feature_distances(found, features, labels, *self.own_features(unit.client)),
                       "identified": (ranks.rank[restart] == 1).int(), "guess": ranks.guess[restart],
                       "class_size": ranks.class_size[restart], "kl_nats": outcome.kl}
            values = {name: column.tolist() for name, column in columns.items()}
            rows += [{**unit._asdict(), "restart": restart, "control": control,
                      **{name: column[i] for name, column in values.items()}} for i in range(len(images))]
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

    def _nearest_of_class(self, images: Tensor, label: int, client: int) -> tuple[Tensor, ...]:
        """The client's training image of a class that is nearest to each of ``R x C x H x W``.

        Returns:
            Its number, its rank among training images of the client and as many held-out ones of the class, how
            many these are, and the share that is the client's; ``R`` each.
        """
        labels = self.target.data.labels
        own = self.train[client][labels[self.train[client]] == label][:MAX_CANDIDATES]
        held_out = np.concatenate(self.test)
        held_out = held_out[labels[held_out] == label]
        size = min(len(own), len(held_out))
        pool = torch.from_numpy(np.concatenate([own[:size], held_out[:size]]))
        distance = scoring.distances(images, self.pixels(torch.from_numpy(own)))
        is_own = (torch.arange(len(pool)) < size).expand(len(images), -1)
        return (torch.from_numpy(own)[distance.argmin(1)], scoring.rank_of(images, self.pixels(pool), is_own),
                torch.full((len(images),), len(pool)), is_own.double().mean(1))


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
