"""Attacks on a model that another program trained, with controls: rows of attack.csv and a picture of each.

Given images are the client's. Where no gradient is given, those that they cause are simulated. Half of the public
images train the evaluator, and adversaries have the other half.
"""
from argparse import Namespace
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import datasets
from attack import any_model, gradients, scoring
from attack.adversaries import Adversary, Budget, PublicImages
from attack.any_model import AnyModel
from attack.attacks import ATTACKS, ClassAttack, IdentificationAttack, ReconstructionAttack
from attack.evaluation import PICTURED, Evaluation, finite, save_picture
from attack.target import Target, as_floats
from attack.verdict import METRICS, Unit
from devices import seed_torch
from server.base import State
from utils import InputError, rng

GIVEN = "--images: an attack's control is another image of the same class, and images {} of the file lack it"


@dataclass(frozen=True)
class ModelVictim:
    """The client whose training step is simulated, and whose trained model answers."""

    model: AnyModel      # after training, with running statistics
    trains: AnyModel     # as in a training step
    steps: int

    def kl(self, x: Tensor, y: Tensor) -> None:
        """Return None: there are no latents."""

    def answers(self, x: Tensor, draws: int, keep: int) -> Tensor:
        """Return class probabilities, ``N x num_classes``."""
        with torch.no_grad():
            return self.model(x).softmax(1)

    def update(self, x: Tensor, y: Tensor, lr: float) -> State:
        """Return the sum of the gradients of the steps that a client makes with these images."""
        return gradients.epoch_update(self.trains, x, y, lr, -(-len(x) // self.steps))


@dataclass(frozen=True)
class Inputs:
    """The user's input: a model, gradients or updates of the model ``at``, and images for scoring."""

    model: AnyModel
    at: AnyModel
    given: list[State]
    images: np.ndarray | None    # N x H x W x C, uint8
    labels: np.ndarray | None
    public: datasets.Dataset | None


class ModelEvaluation(Evaluation):
    """A model under attack; ``args`` are the options of ``ModelAttack``."""

    def __init__(self, inputs: Inputs, args: Namespace, results: Path) -> None:
        self.inputs, self.count, self.steps, self.bn = inputs, args.count, args.local_steps, args.bn
        count = self.count
        self.given = np.arange(len(inputs.given) * count if inputs.images is not None else 0)   # true images
        # As Evaluation reads them: how many images, or which.
        self.args = Namespace(seed=args.seed, image_numbers=self.given.tolist(),
                              images=count if count > 1 else args.max_images)
        model, shape = inputs.model, inputs.model.image_shape
        own = np.zeros((0, *shape[1:], shape[0]), np.uint8) if inputs.images is None else inputs.images
        own_labels = np.zeros(0, np.int64) if inputs.labels is None else inputs.labels
        if len(self.given) > len(own):
            raise InputError(f"--images: it holds {len(own)} images; {len(self.given)} are behind what was given")
        if len(own_labels) and own_labels.max() >= model.num_classes:
            raise InputError(f"--images: it has label {own_labels.max()}, and the model has {model.num_classes} "
                             "classes, from 0")
        public, other, other_labels = self._public_images(args)
        images = np.concatenate([own, other])
        self.target = Target(results, results, {}, datasets.Dataset(
            images, np.concatenate([own_labels, other_labels]), model.num_classes, len(own),
            np.arange(model.num_classes)))
        self.train, self.held_out = [np.arange(len(own))], np.arange(len(own), len(images))
        self.test = [self.held_out]
        if inputs.public is not None:
            seed_torch(args.seed, "evaluator")
            self.evaluator = scoring.Evaluator(self.target.pixels(self.held_out),
                                               self.target.labels(self.held_out), shape, model.num_classes)
        self.budget = Budget(args.restarts, args.iterations, args.train_epochs, 1, args.lr, 1, tv=args.tv)
        self.features: dict[int, tuple[Tensor, Tensor]] = {}
        self.of_model = any_model.adversary_of(model, self.budget, args.bn, public, args.seed, inputs.at)
        self.public = self.of_model.public
        self.attacks = {name: self._row(name, count) for name in args.known}

    def _row(self, name: str, count: int) -> Any:
        if isinstance(attack := ATTACKS[name], ClassAttack):
            return attack
        assert isinstance(attack, ReconstructionAttack)
        return replace(attack, solve=partial(self._solve_any, name), unordered=count > 1,
                       observe=lambda victim, x, y, budget: [
                           victim.update(part, labels, budget.lr)
                           for part, labels in zip(x.split(count), y.split(count), strict=True)])

    def _solve_any(self, name: str, adversary: Adversary, observed: list[State],
                   count: int) -> tuple[Tensor, Tensor]:
        return any_model.solve(name, adversary, observed, count, self.steps)

    def _public_images(self, args: Namespace) -> tuple[PublicImages | None, np.ndarray, np.ndarray]:
        """Return the adversary's half of the public images, and the evaluator's with its labels."""
        public, shape = self.inputs.public, self.inputs.model.image_shape
        if public is None:
            return None, np.zeros((0, *shape[1:], shape[0]), np.uint8), np.zeros(0, np.int64)
        order = rng(args.seed, "public").permutation(len(public.labels))[:2 * args.public_images]
        ours, theirs = np.array_split(order, 2)
        images, labels = as_floats(public.images[ours]), torch.from_numpy(public.labels[ours])
        return (PublicImages(images, labels, lambda _: (images, labels)), public.images[theirs],
                public.labels[theirs])

    # What Evaluation asks for.

    def adversary(self, name: str, round: int, client: int) -> Adversary:
        return self.of_model

    def victim(self, unit: Unit) -> Any:
        trains = self.of_model.knowledge.next_head
        assert isinstance(trains, AnyModel)
        return ModelVictim(self.inputs.model, trains, self.steps)

    def observe(self, attack: ReconstructionAttack | IdentificationAttack, victim: Any, numbers: np.ndarray,
                budget: Budget) -> Any:
        """Return the given gradients of the first images, and simulated ones of others."""
        if attack.unordered:
            own = len(self.given) and set(numbers) == set(self.given)
            return self.inputs.given if own else super().observe(attack, victim, numbers, budget)
        return [self.inputs.given[n] if n < len(self.given) else
                super(ModelEvaluation, self).observe(attack, victim, np.array([n]), budget)[0] for n in numbers]

    def paired(self, attack: ReconstructionAttack | IdentificationAttack, client: int,
               round: int) -> tuple[np.ndarray, np.ndarray]:
        try:
            return super().paired(attack, client, round)
        except InputError as error:
            raise InputError(GIVEN.format(f"0 to {len(self.given) - 1}")) from error

    def evaluated(self, images: Tensor, true: Tensor, labels: Tensor, client: int) -> dict[str, Tensor]:
        if self.inputs.public is None:
            unknown = torch.full((len(images),), torch.nan)
            return dict.fromkeys(("evaluator_correct", "feature_distance", "knn_distance"), unknown)
        return super().evaluated(images, true, labels, client)

    def unscorable(self, name: str, client: int) -> str | None:
        """Return why an attack cannot be run at all; None if it can."""
        inputs, attack = self.inputs, self.attacks[name]
        if isinstance(attack, ClassAttack):
            return "gmi needs --public" if name == "gmi" and inputs.public is None else None
        if not inputs.given and inputs.images is None:
            return f"{name} needs --gradient, --update or --images"
        if why := any_model.unfit(name, inputs.at, self.count, self.steps, self.bn):
            return why
        if inputs.images is not None and not len(self.paired(attack, 0, 0)[0]):
            return "--images holds no two images of a class, one of them as a control"
        return None

    def attack(self, unit: Unit) -> list[dict]:
        """Run one attack, save its picture, and return its rows; values that need unknown images are missing."""
        attack, inputs = self.attacks[unit.attack], self.inputs
        known = inputs.images is not None and (inputs.public is not None or attack.kind == "image")
        if known:
            rows = super().attack(unit)
            return [row for row in rows if not len(self.given) or attack.kind == "class"
                    or row["image"] < len(self.given)]
        seed_torch(self.args.seed, f"{unit.adversary} {unit.attack}")
        if isinstance(attack, ClassAttack):
            labels = torch.arange(inputs.model.num_classes)
            shown = self.drawn_classes(attack, self.of_model, labels)
        else:
            images, labels = attack.solve(self.of_model, inputs.given, len(inputs.given) * self.count)
            shown = {"": finite(images)}
        pictures = {(f"{name} (control)" if name else unit.words): images[0] for name, images in shown.items()
                    if name not in ("grey", "noise")}
        save_picture(self.target.results / unit.picture, pictures, {}, labels[:PICTURED],
                     f"{self.target.results.name}: {unit.adversary}")
        return [row for control, restarts in shown.items() for restart, images in enumerate(restarts)
                for row in self._unscored(unit, images, labels, restart, control)]

    def _unscored(self, unit: Unit, images: Tensor, labels: Tensor, restart: int, control: str) -> list[dict]:
        """Return rows of reconstructions without known true images; at most the class can be judged."""
        gaps = {**dict.fromkeys(METRICS, float("nan")), "guess": float("nan"), "class_size": 0,
                "kl_nats": float("nan"), "image": -1}
        seen = {}
        if self.attacks[unit.attack].kind == "class":
            seen["label_match"] = self.inputs.model(images).detach().argmax(1) == labels
        if self.inputs.public is not None:
            seen["evaluator_correct"] = self.evaluator.classes(images) == labels
        return [{**unit._asdict(), "label": int(labels[i]), "restart": restart, "control": control, **gaps,
                 **{name: int(values[i]) for name, values in seen.items()}} for i in range(len(images))]
