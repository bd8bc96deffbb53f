"""Attacks that know the class and not the image are as a guess, and true leaks leak: many draws of real images."""
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT
from scipy.stats import binom

from attack import evaluation, scoring
from attack.adversaries import Budget, PublicImages
from attack.attacks import ATTACKS, ClassAttack, IdentificationAttack, ReconstructionAttack
from attack.target import Target
from attack.verdict import ATTACK_COLUMNS, GUESS, LEAKS, LEVEL, Unit, judge
from datasets import Dataset

CLASSES, EACH = 10, 150   # classes; training images of the client in each of its classes


@pytest.fixture(scope="module")
def mnist():
    with np.load(ROOT / "data" / "mnist10k.npz") as file:
        images, labels = file["train_images"], file["train_labels"].astype(np.int64)
    return Dataset(images, labels, CLASSES, len(labels), np.arange(CLASSES))


class Seen(SimpleNamespace):
    """A victim that shows its very images."""

    def __init__(self, target, round, client):
        super().__init__()

    def kl(self, x, y):
        return None

    def answers(self, x, draws, keep):
        return torch.nn.functional.one_hot(torch.zeros(len(x), dtype=torch.long), CLASSES).double()


class Recognised:
    """An evaluator: the class of the nearest of some images that nobody owns."""

    def __init__(self, images, labels):
        self.images, self.labels = images[::4], labels[::4]

    def classes(self, images):
        return self.labels[scoring.distances(images, self.images).argmin(1)]

    def features(self, images):
        return images.flatten(1)[:, ::97]


def tried(data, seed, attack, count, per_class):
    """attack.csv of a client that has classes which the seed chooses."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(data.labels))
    own = [order[data.labels[order] == c] for c in rng.permutation(CLASSES)[:per_class]]
    made = evaluation.Evaluation.__new__(evaluation.Evaluation)
    made.target = Target(Path("run"), Path("run"), {}, data)
    made.args = Namespace(seed=seed, images=count, image_numbers=None)
    made.train = [np.sort(np.concatenate([part[:EACH] for part in own]))]
    made.test = [np.concatenate([part[EACH:EACH + 20] for part in own])]
    made.held_out = made.test[0]
    free = np.concatenate([part[EACH + 20:EACH + 220] for part in own])
    images, labels = made.target.pixels(free), made.target.labels(free)
    made.public = PublicImages(images, labels, lambda classes: (images, labels))
    made.evaluator, made.budget, made.features = Recognised(images, labels), Budget(1, 1, 1, 1, 0.1, 3), {}
    made.adversary = lambda *_: made
    ATTACKS["tried"] = attack
    torch.manual_seed(seed)
    try:
        return pd.DataFrame(made.attack(Unit("stolen_model", "tried", 1, 0)), columns=ATTACK_COLUMNS)
    finally:
        del ATTACKS["tried"]


@pytest.fixture
def draw(mnist, monkeypatch):
    """(seed, attack, images, classes) -> the verdict on an attack."""
    monkeypatch.setattr(evaluation, "Victim", Seen)
    monkeypatch.setattr(evaluation, "save_picture", lambda *_: None)
    return lambda seed, attack, count, per_class=2: judge(tried(mnist, seed, attack, count, per_class), attack)


def of_class(public, labels, make):
    """What ``make`` makes of the public images of each label, ``1 x N x C x H x W``."""
    return torch.stack([make(public.images[public.labels == c]) for c in labels.tolist()])[None]


def image_attack(make, **more):
    """An attack on images: (scene, images N, labels N) -> images ``1 x N x C x H x W``."""
    return ReconstructionAttack(observe=lambda victim, x, y, budget: (x, y), adversaries=(), source="", **more,
                                solve=lambda adversary, seen, count: (make(adversary.public, *seen), seen[1]))


def chooser(make):
    """An attack that chooses: (images N, labels N, candidates M) -> likelihoods ``N x M``."""
    return IdentificationAttack(observe=lambda victim, x, y, budget: (x, y), adversaries=(), source="",
                                solve=lambda adversary, seen, pool: (make(*seen, pool), seen[1]))


def same_class(x, y, pool):
    """Whether a candidate's class is the image's, by the nearest of the images seen, ``N x M``."""
    return (y[scoring.distances(pool, x).argmin(1)][None] == y[:, None]).double()


# What knows the class and nothing of the image: always the same picture of a class, or a new one each time.
FIXED = {
    "median": image_attack(lambda public, x, y: of_class(public, y, lambda part: part.median(0).values)),
    "mean": image_attack(lambda public, x, y: of_class(public, y, lambda part: part.mean(0))),
    "sharp mean": image_attack(lambda public, x, y: of_class(public, y, lambda part: part.mean(0) ** 1.5)),
    "one image": image_attack(lambda public, x, y: of_class(public, y, lambda part: part[0])),
    "all alike": chooser(lambda x, y, pool: torch.zeros(len(x), len(pool)))}
RANDOM = {
    "a public image": image_attack(lambda public, x, y: of_class(
        public, y, lambda part: part[torch.randint(len(part), ())])),
    "noisy mean": image_attack(lambda public, x, y: of_class(
        public, y, lambda part: part.mean(0) + torch.rand(()) * torch.randn(part.shape[1:])).clamp(0, 1)),
    "a mean of a few": image_attack(lambda public, x, y: of_class(
        public, y, lambda part: part[torch.randperm(len(part))[:4]].mean(0))),
    "good and bad days": image_attack(lambda public, x, y: of_class(
        public, y, lambda part: part.mean(0)) * torch.rand(()) ** 2, unordered=True),
    "random order in the class": chooser(
        lambda x, y, pool: same_class(x, y, pool) + torch.rand(len(x), len(pool)))}


@pytest.mark.parametrize("name", FIXED)
def test_the_same_picture_for_all_of_a_class_is_a_guess(draw, name):
    assert {draw(seed, FIXED[name], count).word for seed in range(2) for count in (6, 16, None)} == {GUESS}


@pytest.mark.parametrize("count, draws", [(6, 16), pytest.param(16, 10, marks=pytest.mark.slow), (None, 2)])
def test_random_guesses_leak_no_more_often_than_the_level_says(draw, count, draws):
    """The bound is passed by chance once in ten thousand times where the rate is the level."""
    words = [draw(seed, attack, count).word for seed in range(draws) for attack in RANDOM.values()]
    assert words.count(LEAKS) <= binom.ppf(0.9999, len(words), LEVEL)


@pytest.mark.slow
@pytest.mark.parametrize("count", [8, 16])
def test_guesses_leak_no_more_often_where_each_image_has_a_class_of_its_own(draw, count):
    """The foreign control then observes images that are not attacked."""
    words = [draw(seed, RANDOM[name], count, per_class=10).word for seed in range(10)
             for name in ("noisy mean", "random order in the class")]
    assert words.count(LEAKS) <= binom.ppf(0.9999, len(words), LEVEL)


# What knows something of the image, and the least number of ten draws in which it leaks.
BLUR = torch.nn.AvgPool2d(5, 1, 2)
LEAKING = {
    "truth in noise": (image_attack(lambda public, x, y: (x + torch.randn_like(x)).clamp(0, 1)[None]), 8, 9),
    "blurred truth": (image_attack(lambda public, x, y: BLUR(x)[None]), 8, 9),
    "a little of the image": (image_attack(lambda public, x, y: 0.9 * of_class(
        public, y, lambda part: part.mean(0)) + 0.1 * x), 8, 9),
    "a batch": (image_attack(lambda public, x, y: BLUR(x)[torch.randperm(len(x))][None], unordered=True), 8, 9),
    "a weak chooser": (chooser(lambda x, y, pool: same_class(x, y, pool) * 9 + torch.randn(len(x), len(pool))
                               + 1.5 * scoring.distances(x, pool).isclose(torch.zeros(()), atol=1e-4)), 16, 9)}


@pytest.mark.parametrize("name", LEAKING)
def test_what_knows_the_image_leaks(draw, name):
    attack, count, least = LEAKING[name]
    assert sum(draw(seed, attack, count).word == LEAKS for seed in range(10)) >= least


@pytest.mark.parametrize("make", [lambda part: part.mean(0), lambda part: part.median(0).values,
                                  lambda part: part[torch.randint(len(part), ())]])
def test_a_picture_of_a_class_from_public_images_is_a_guess(draw, make):
    """Also where the evaluator recognises each picture: its controls are a mean and an image of the class."""
    attack = ClassAttack(solve=lambda adversary, labels: of_class(adversary.public, labels, make), adversaries=(),
                         source="")
    assert {draw(seed, attack, None, per_class=10).word for seed in range(3)} == {GUESS}


@pytest.mark.parametrize("shift, known", [(0, 1), (1, 0)])
def test_a_batchs_labels_are_known_if_all_are_right_in_any_order(draw, mnist, shift, known):
    attack = ReconstructionAttack(observe=lambda victim, x, y, budget: (x, y), adversaries=(), source="",
                                  solve=lambda adversary, seen, count: (seen[0][None], (seen[1] + shift).flip(0)),
                                  unordered=True)
    assert (tried(mnist, 1, attack, 8, 2).query("control == ''")["label_match"] == known).all()
