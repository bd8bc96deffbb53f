"""Scores of reconstructions, the choice of images and controls, and the word for an attack."""
import itertools
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT
from scipy.stats import binom
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from attack import evaluation, scoring
from attack.adversaries import Budget, PublicImages
from attack.attacks import ATTACKS, ClassAttack, IdentificationAttack, ReconstructionAttack
from attack.scoring import MAX_CANDIDATES, PART, candidates, paired
from attack.target import Target
from attack.verdict import (
    ATTACK_COLUMNS,
    FOREIGN,
    GUESS,
    LEAKS,
    METRICS,
    Unit,
    judge,
    sign_flip,
    summarise,
    worst_identified,
)
from datasets import Dataset
from devices import seed_torch


@pytest.fixture(autouse=True)
def seeded():
    seed_torch(3, "scoring tests")


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 12, 11)])
def test_similarity_is_that_of_scikit_image(shape):
    """Over windows within the image."""
    x, noise = torch.rand(3, *shape), torch.rand(3, *shape)
    for y in (noise, (x + 0.1 * noise).clamp(0, 1), torch.zeros_like(x)):
        like = scoring.similarity(x, y)
        for i in range(3):
            a, b = x[i].numpy().astype(float), y[i].numpy().astype(float)
            assert like["psnr"][i].item() == pytest.approx(peak_signal_noise_ratio(a, b, data_range=1), abs=1e-4)
            assert like["ssim"][i].item() == pytest.approx(structural_similarity(
                a, b, data_range=1, channel_axis=0, gaussian_weights=True, use_sample_covariance=False), abs=1e-8)
    weight = np.exp(-0.5 * (np.arange(-3, 4) / 1.5) ** 2)   # in a small image, the largest window that fits
    weight = np.outer(weight, weight) / weight.sum() ** 2
    x, y = x[:1, :1, :7, :7], noise[:1, :1, :7, :7]
    mean, other = ((weight * image[0, 0].numpy()).sum() for image in (x, y))
    a, b = x[0, 0].numpy() - mean, y[0, 0].numpy() - other
    value = ((2 * mean * other + 1e-4) * (2 * (weight * a * b).sum() + 9e-4)
             / ((mean**2 + other**2 + 1e-4) * ((weight * a * a).sum() + (weight * b * b).sum() + 9e-4)))
    assert scoring.ssim(x, y).item() == pytest.approx(value, abs=1e-6)


def test_batches_are_matched_by_assignment_not_greedily():
    truth = torch.tensor([0.0, 1.0]).reshape(2, 1, 1, 1)
    images = torch.tensor([1.4, 0.9]).reshape(2, 1, 1, 1)   # both nearest to 1: only one may have it
    assert scoring.in_order_of(truth, images).flatten().tolist() == pytest.approx([0.9, 1.4])


def test_a_rank_is_that_of_a_random_order_of_ties():
    target = torch.tensor([[False, False, True, False, True]])
    for value, rank in ((0.4, 3), (2.1, 1)):   # of the nearest true image, 2 or 4
        distance = (torch.arange(5.0)[None] - value).square()
        assert [part.tolist() for part in scoring.rank_by(distance, target)] == [[rank], [rank == 1]]
    orders = np.array(list(itertools.permutations(range(5))))   # the true images are 2 and 4, all images tie
    firsts = 1 + np.isin(orders, [2, 4]).argmax(1)
    rank, identified = scoring.rank_by(torch.zeros(1, 5), target)
    assert rank.item() == pytest.approx(firsts.mean()) and identified.item() == pytest.approx((firsts == 1).mean())
    is_true = torch.eye(3, 5, dtype=torch.bool)
    among = torch.tensor([[True, True, False, False, True]]).expand(3, 5) | is_true
    rank, identified = scoring.rank_by(torch.zeros(3, 5), is_true, among)
    assert rank.tolist() == [2, 2, 2.5] and identified.tolist() == [1 / 3, 1 / 3, 1 / 4]
    apart = torch.tensor([[torch.nan, 1.0, 2.0], [torch.nan, 1.0, torch.nan]])   # what is not a number comes last
    assert scoring.rank_by(apart, torch.eye(3, dtype=torch.bool)[:2])[0].tolist() == [3, 1]
    assert scoring.rank_by(apart[1:], torch.eye(3, dtype=torch.bool)[:1])[0].tolist() == [2.5]


@pytest.mark.parametrize("scale", [1e-12, 1, 1e6])
def test_ties_are_equal_up_to_rounding(scale):
    """Log-likelihoods of an attacked image's code and another; 1e-6 nats are no evidence."""
    distance = scale * torch.tensor([[1.0, 1 + 1e-13, 1 - 1e-13, 1.1]], dtype=torch.double)
    rank, identified = scoring.rank_by(distance, torch.tensor([[True, False, False, False]]))
    ties = 4 if scale < 1e-6 else 3
    assert rank.item() == (ties + 1) / 2 and identified.item() == pytest.approx(1 / ties)


def test_distances_in_features_by_hand():
    features, truth = torch.tensor([[0.0, 0.0], [3.0, 0.0]]), torch.tensor([[3.0, 4.0], [3.0, 1.0]])
    own, own_labels = torch.tensor([[0.0, 1.0], [0.0, 2.0], [5.0, 0.0]]), torch.tensor([0, 1, 1])
    known = scoring.feature_distances(features, truth, torch.tensor([1, 1]), own, own_labels)
    assert known["feature_distance"].tolist() == [5, 1]
    assert known["knn_distance"].tolist() == [2, 2]   # the nearest one is of another class
    alone = scoring.feature_distances(features, truth, torch.tensor([0, 3]), own, own_labels)
    assert alone["knn_distance"].tolist()[0] == 1 and alone["knn_distance"].isnan().tolist() == [False, True]


@pytest.mark.parametrize("count, batch, numbers, partners", [
    (None, False, [2, 3, 0, 1, 5], [0, 4, 1, 2, 6]),   # in a circle; 4 and 6 are held out; 7 has nobody
    (2, False, [2, 3], [0, 4]),                        # alone of their classes: the client's next, a held-out one
    (None, True, [2, 3, 5], [0, 4, 6]),                # half of a class at most, and others with the same labels
    (1, True, [2], [0])])
def test_each_image_has_a_partner_of_its_class(count, batch, numbers, partners):
    labels = np.array([0, 0, 0, 1, 1, 2, 2, 3])
    pairs = paired(labels, np.array([2, 3, 0, 1, 7, 5]), np.array([4, 6]), count, batch)
    assert [part.tolist() for part in pairs] == [numbers, partners]
    assert not len(paired(labels, np.array([0, 3]), np.array([5]), None)[0])


@pytest.mark.parametrize("size", [4, MAX_CANDIDATES + 40])
def test_candidates_are_the_true_image_and_the_first_of_the_others(size):
    order = np.arange(size)[::-1].copy()
    labels, base = np.arange(1000) % 2, set(order[:MAX_CANDIDATES])
    numbers = np.array([*order[-2:], order[0], 900])   # the last of the client, the first, and a held-out one
    numbers = np.resize(numbers, PART + 2)
    pools = list(candidates(labels, order, numbers))
    assert [len(pool.is_true) for pool in pools] == [PART, 2]
    for pool in pools:
        for i, number in enumerate(numbers[pool.part]):
            among = set(pool.numbers[pool.among[i]].tolist())
            full = number not in base and len(base) == MAX_CANDIDATES   # then the last of them makes room
            assert among == base - ({order[MAX_CANDIDATES - 1]} if full else set()) | {number}
            assert pool.numbers[pool.is_true[i]].tolist() == [number]
            alike = set(pool.numbers[pool.alike[i]].tolist())
            assert alike == {other for other in among if labels[other] == labels[number]}


DIFFERENCES = np.array([0.1, -0.1] * 4)   # of mean 0
RANKS = {"": 50, FOREIGN: 50}
DECODER = ATTACKS["latent_decoder"]


def rows(ssim=None, rank=None, right=None, attack="latent_decoder", count=8, controls=(FOREIGN,)):
    """Return attack.csv with a value, or one for each image, by control ("" for the attack itself); else 0."""
    tables = []
    for control in ("", *controls):
        table = pd.DataFrame({**Unit("stolen_model", attack, 2, 0)._asdict(), "label": range(count),
                              "image": range(40, 40 + count), "restart": 0, "control": control,
                              **dict.fromkeys(METRICS, 0.0), "guess": 0.002, "class_size": 100,
                              "kl_nats": np.nan})
        for metric, values in (("ssim", ssim), ("class_rank", rank), ("evaluator_correct", right)):
            table[metric] = np.broadcast_to((values or {}).get(control, 0.0), count)
        tables.append(table[ATTACK_COLUMNS])
    return pd.concat(tables, ignore_index=True)


@pytest.mark.parametrize("ssim, rank, word", [
    (0.6, 60, LEAKS), (0.4, 40, LEAKS), (0.4, 60, GUESS), (0.5, 50, GUESS), (0.5 + DIFFERENCES, 50, GUESS)])
def test_single_images_are_judged_by_ssim_and_rank_in_the_class(ssim, rank, word):
    verdict = judge(rows({"": ssim, FOREIGN: 0.5}, {**RANKS, "": rank}), DECODER)
    assert verdict.word == word and verdict.count == 8 and not verdict.few
    assert [row[:3:2] for row in verdict.comparisons] == [("ssim", FOREIGN), ("class_rank", FOREIGN)]


@pytest.mark.parametrize("rank, foreign, word", [
    (40, 50, LEAKS), (50 + 100 * DIFFERENCES, 50, GUESS), (60, 50, GUESS),
    (60, 90, GUESS)])   # better than its control, and worse than a guess in a class of 100
def test_a_choice_of_candidates_is_judged_by_its_rank_alone(rank, foreign, word):
    table = rows({"": 1.0}, {"": rank, FOREIGN: foreign}, attack="reidentification")
    assert judge(table, ATTACKS["reidentification"]).word == word


@pytest.mark.parametrize("right, mean, word", [
    (1, 0, LEAKS), ([1, 0] * 4, 0, GUESS), (0, 0, GUESS), (1, 1, GUESS)])
def test_classes_are_judged_beside_the_best_of_their_controls(right, mean, word):
    controls = {"grey": 0, "noise": [1, 0, 0, 0] * 2, "class_mean": mean}
    verdict = judge(rows(right={"": right, **controls}, attack="mi_face", controls=controls), ATTACKS["mi_face"])
    (comparison,), best = verdict.comparisons, "class_mean" if mean else "noise"
    assert verdict.word == word and (comparison.metric, comparison.control) == ("evaluator_correct", best)


def test_the_level_is_shared_by_the_metrics_and_clients_are_pooled():
    """Six images on one side have p = 1/64, which is less than 0.05 / 2 and more than 0.025 / 2."""
    table = rows({"": 0.6, FOREIGN: 0.5}, RANKS, count=6)
    verdict = judge(table, DECODER)
    assert verdict.word == LEAKS and verdict.comparisons[0].p == 1 / 64 and not verdict.few
    assert judge(table, DECODER, 0.025).word == GUESS and judge(table, DECODER, 0.025).few
    half = rows({"": 0.6, FOREIGN: 0.5}, RANKS, count=3)
    both = judge(pd.concat([half, half.assign(client=1)]), DECODER)
    assert judge(half, DECODER).few and both.count == 6 and not both.few and both.word == LEAKS


@pytest.mark.parametrize("count", [3, 9])
def test_the_probability_is_the_share_of_signs_with_as_great_a_mean(count):
    values = np.random.default_rng(count).normal(0.3, 1, count)
    sums = [np.dot(signs, values) for signs in itertools.product([1, -1], repeat=count)]
    share = np.mean([total >= values.sum() - 1e-12 for total in sums])
    assert sign_flip(values) == pytest.approx(share)
    assert sign_flip(np.concatenate([values, np.zeros(9)])) == pytest.approx(share)   # 0 has no sign
    assert sign_flip(np.zeros(4)) == 1
    many = np.random.default_rng(2).normal(0, 1, 400)   # estimated; beside the normal approximation of a mean
    many += 1.645 * np.sqrt((many**2).mean() / 400) - many.mean()
    assert sign_flip(many) == pytest.approx(0.05, abs=0.01)


def test_an_attack_is_compared_with_its_control_image_by_image():
    """Images differ far more than the attack does from its control, and rows may stand in any order."""
    hard = np.linspace(0, 0.9, 8)
    table = rows({"": hard + 0.01, FOREIGN: hard}, RANKS)
    assert judge(table, DECODER).word == LEAKS
    assert judge(table.sample(frac=1, random_state=1), DECODER) == judge(table, DECODER)


def test_later_choices_count_neither_for_the_word_nor_in_the_summary():
    table = rows({"": 0.4, FOREIGN: 0.5}, {**RANKS, "": 60})
    second = table[table["control"] == ""].assign(restart=1, ssim=1.0, class_rank=1.0)
    table = pd.concat([table, second])
    assert judge(table, DECODER).word == GUESS
    summary = summarise(table.to_dict("records"))
    assert summary["n"].tolist() == [8, 8] and summary["ssim"].tolist() == pytest.approx([0.4, 0.5])


def test_the_worst_images_are_those_with_the_highest_kl():
    """Two of 100, and one of 10."""
    table = pd.DataFrame({"kl_nats": np.arange(100.0), "identified": 0})
    table.loc[99, "identified"] = 1
    assert worst_identified(table) == 0.5 and worst_identified(table.tail(10)) == 1
    assert worst_identified(table.head(10)) == 0 and np.isnan(worst_identified(table.assign(kl_nats=np.nan)))


CLASSES, EACH = 10, 150   # classes; training images of the client in each of its classes


@pytest.fixture(scope="module")
def mnist():
    with np.load(ROOT / "data" / "mnist10k.npz") as file:
        images, labels = file["train_images"], file["train_labels"].astype(np.int64)
    return Dataset(images, labels, CLASSES, len(labels), np.arange(CLASSES))


class Recognised:
    """An evaluator: the class of the nearest of some images that nobody owns."""

    def __init__(self, images, labels):
        self.images, self.labels = images[::4], labels[::4]

    def classes(self, images):
        return self.labels[scoring.distances(images, self.images).argmin(1)]

    def features(self, images):
        return images.flatten(1)[:, ::97]


def attacked(data, seed, attack, count, per_class):
    """Return attack.csv of a client with ``per_class`` classes that the seed chooses.

    What an attack is shown of its victim are the images themselves.
    """
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(data.labels))
    own = [order[data.labels[order] == c] for c in rng.permutation(CLASSES)[:per_class]]
    scene = evaluation.Evaluation.__new__(evaluation.Evaluation)
    scene.target = Target(Path("run"), Path("run"), {}, data)
    scene.args = Namespace(seed=seed, images=count, slow_images=count, image_numbers=None)
    scene.train = [np.sort(np.concatenate([part[:EACH] for part in own]))]
    scene.test = [np.concatenate([part[EACH:EACH + 20] for part in own])]
    scene.held_out = scene.test[0]
    free = np.concatenate([part[EACH + 20:EACH + 220] for part in own])
    images, labels = scene.target.pixels(free), scene.target.labels(free)
    scene.public = PublicImages(images, labels, lambda classes: (images, labels))
    scene.evaluator, scene.budget, scene.features = Recognised(images, labels), Budget(1, 1, 1, 1, 0.1, 3), {}
    scene.adversary = lambda *_: scene
    ATTACKS["tried"] = attack
    torch.manual_seed(seed)
    try:
        return pd.DataFrame(scene.attack(Unit("stolen_model", "tried", 1, 0)), columns=ATTACK_COLUMNS)
    finally:
        del ATTACKS["tried"]


@pytest.fixture
def tried(mnist, monkeypatch):
    """Return (seed, attack, images, classes) -> attack.csv of an attack."""
    answers = torch.nn.functional.one_hot(torch.zeros(1, dtype=torch.long), CLASSES).double()
    victim = SimpleNamespace(kl=lambda x, y: None, answers=lambda x, draws, keep: answers.expand(len(x), -1))
    monkeypatch.setattr(evaluation, "Victim", lambda *_: victim)
    monkeypatch.setattr(evaluation, "save_picture", lambda *_: None)
    return lambda seed, attack, count, classes=2: attacked(mnist, seed, attack, count, classes)


@pytest.fixture
def draw(tried):
    """Return (seed, attack, images, classes) -> the word for an attack."""
    return lambda seed, attack, count, classes=2: judge(tried(seed, attack, count, classes), attack).word


def of_class(public, labels, make):
    """Return what ``make`` makes of the public images of each label, ``1 x N x C x H x W``."""
    return torch.stack([make(public.images[public.labels == c]) for c in labels.tolist()])[None]


def image_attack(make, **more):
    """Return an attack on images: (public images, images N, labels N) -> images ``1 x N x C x H x W``."""
    return ReconstructionAttack(observe=lambda victim, x, y, budget: (x, y), adversaries=(), source="", **more,
                                solve=lambda adversary, seen, count: (make(adversary.public, *seen), seen[1]))


def chooser(make):
    """Return an attack that chooses: (images N, labels N, candidates M) -> likelihoods ``N x M``."""
    return IdentificationAttack(observe=lambda victim, x, y, budget: (x, y), adversaries=(), source="",
                                solve=lambda adversary, seen, pool: (make(*seen, pool), seen[1]))


def same_class(x, y, pool):
    """Return 1 where a candidate's class is the image's, by the nearest of the images seen, ``N x M``."""
    return (y[scoring.distances(pool, x).argmin(1)][None] == y[:, None]).double()


# What knows the class and nothing of the image, and makes a new picture or order each time.
RANDOM = {
    "a public image": image_attack(lambda public, x, y: of_class(
        public, y, lambda part: part[torch.randint(len(part), ())])),
    "good and bad days": image_attack(lambda public, x, y: of_class(
        public, y, lambda part: part.mean(0)) * torch.rand(()) ** 2, unordered=True),
    "random order in the class": chooser(
        lambda x, y, pool: same_class(x, y, pool) + torch.rand(len(x), len(pool)))}


def test_what_knows_nothing_of_the_image_identifies_at_the_rate_of_guessing(tried):
    """All images of a client of two classes, among all of them; the third knows the class and breaks no ties."""
    alike = chooser(lambda x, y, pool: torch.zeros(len(x), len(pool)))
    grey = image_attack(lambda public, x, y: torch.full_like(x, 0.5)[None])
    code = chooser(lambda x, y, pool: 1e5 * same_class(x, y, pool) + 1e-8 * torch.rand(len(x), len(pool)))
    for attack, share in ((alike, 1 / 2), (grey, 1 / 2), (code, 1)):
        table = tried(0, attack, 2 * EACH)
        for control in ("", FOREIGN):
            own = table[table["control"] == control]
            assert len(own) == 2 * EACH and own["identified"].mean() == pytest.approx(share / EACH, rel=0.02)
            assert own["class_rank"].mean() == pytest.approx((EACH + 1) / 2, rel=0.02)
        assert own["guess"].mean() == pytest.approx(1 / (2 * EACH)) and judge(table, attack).word == GUESS


def test_the_same_picture_for_all_of_a_class_is_a_guess(draw):
    """And a picture of a class, also if the evaluator recognises it: controls are its mean and a public image."""
    median = image_attack(lambda public, x, y: of_class(public, y, lambda part: part.median(0).values))
    assert {draw(seed, median, count) for seed, count in ((0, 6), (1, 16))} == {GUESS}
    for make in (lambda part: part.mean(0), lambda part: part[torch.randint(len(part), ())]):
        attack = ClassAttack(solve=lambda adversary, labels, make=make: of_class(adversary.public, labels, make),
                             adversaries=(), source="")
        assert {draw(seed, attack, None, 10) for seed in range(3)} == {GUESS}


@pytest.mark.parametrize("count, draws, per_class", [
    (6, 12, 2), pytest.param(16, 12, 2, marks=pytest.mark.slow),
    pytest.param(8, 12, 10, marks=pytest.mark.slow)])   # a class for each image: the control's are not attacked
def test_random_guesses_leak_no_more_often_than_the_level_says(draw, count, draws, per_class):
    """The bound is passed by chance once in ten thousand times where the rate is the level."""
    words = [draw(seed, attack, count, per_class) for seed in range(draws) for attack in RANDOM.values()]
    assert words.count(LEAKS) <= binom.ppf(0.9999, len(words), 0.05)


# What knows something of the image.
BLUR = torch.nn.AvgPool2d(5, 1, 2)
LEAKING = {
    "a little of the image": (image_attack(lambda public, x, y: 0.9 * of_class(
        public, y, lambda part: part.mean(0)) + 0.1 * x), 8),
    "a batch": (image_attack(lambda public, x, y: BLUR(x)[torch.randperm(len(x))][None], unordered=True), 8),
    "a weak chooser": (chooser(lambda x, y, pool: same_class(x, y, pool) * 9 + torch.randn(len(x), len(pool))
                               + 1.5 * scoring.distances(x, pool).isclose(torch.zeros(()), atol=1e-4)), 16)}


@pytest.mark.parametrize("name", LEAKING)
def test_what_knows_the_image_leaks(draw, name):
    attack, count = LEAKING[name]
    assert sum(draw(seed, attack, count) == LEAKS for seed in range(10)) >= 9


@pytest.mark.parametrize("shift, known", [(0, 1), (1, 0)])
def test_a_batchs_labels_are_known_if_all_are_right_in_any_order(tried, shift, known):
    attack = ReconstructionAttack(
        observe=lambda victim, x, y, budget: (x, y), adversaries=(), source="", unordered=True,
        solve=lambda adversary, seen, count: (seen[0][None], (seen[1] + shift).sort(descending=True)[0]))
    assert (tried(1, attack, 8).query("control == ''")["label_match"] == known).all()
