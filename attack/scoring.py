"""Scores of reconstructions: similarity, ranks among candidates, an evaluator, and the least possible error.

The control of an attack on images is the attack itself on the observation of another image of the same class: the
foreign control. It has everything that an attack can know of a class, and nothing of the image.

Images are ``N x C x H x W`` in [0, 1], so the data range of PSNR and SSIM is 1.
"""
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from attack.decoders import fit, shape_of
from models import CNN

SMALLEST_MSE = 1e-10   # what is less counts as this, so that PSNR is at most 100 dB
SSIM_WINDOW, SSIM_SIGMA = 11, 1.5   # side and standard deviation, pixels
MAX_CANDIDATES = 500   # images of the client, among which a true image is ranked
PART = 250             # images that are ranked at a time


def similarity(found: Tensor, truth: Tensor) -> dict[str, Tensor]:
    """Return ``mse``, ``psnr`` in dB and ``ssim`` of each image and its true one, ``N`` each."""
    mse = (found - truth).double().square().mean((1, 2, 3)).clamp_min(SMALLEST_MSE)
    return {"mse": mse, "psnr": -10 * mse.log10(), "ssim": ssim(found, truth)}


def ssim(found: Tensor, truth: Tensor) -> Tensor:
    """Return the structural similarity of each image and its true one, ``N`` (Wang et al. 2004, IEEE TIP 13(4)).

    The window is Gaussian, 11 x 11 with a standard deviation of 1.5 pixels, and only windows that lie within the
    image count: scikit-image's ``structural_similarity(gaussian_weights=True, use_sample_covariance=False)``.
    For images of fewer than 11 pixels a side it is the largest odd square that fits. Colours are averaged.
    """
    side = min(SSIM_WINDOW, (min(found.shape[2:]) + 1) // 2 * 2 - 1)
    line = (-0.5 * ((torch.arange(side, dtype=torch.double) - side // 2) / SSIM_SIGMA).square()).exp()
    window = torch.outer(line, line)[None, None] / line.sum() ** 2
    return torch.cat([_ssim(x.double(), y.double(), window)
                      for x, y in zip(found.split(256), truth.split(256), strict=True)])


def _ssim(x: Tensor, y: Tensor, window: Tensor) -> Tensor:
    """Return ``ssim`` in windows of the given weights, ``1 x 1 x S x S``."""
    planes = torch.stack([x, y, x * x, y * y, x * y]).flatten(0, 2)[:, None]
    means = torch.nn.functional.conv2d(planes, window).unflatten(0, (5, *x.shape[:2])).squeeze(3)
    mx, my, xx, yy, xy = means
    c1, c2 = 0.01**2, 0.03**2
    similar = ((2 * mx * my + c1) * (2 * (xy - mx * my) + c2)
               / ((mx * mx + my * my + c1) * (xx - mx * mx + yy - my * my + c2)))
    return similar.mean((1, 2, 3))


def distances(found: Tensor, pool: Tensor) -> Tensor:
    """Return the mean squared error between each of N images and each of a pool of M: ``N x M``."""
    return torch.cdist(found.flatten(1), pool.flatten(1)).square() / found[0].numel()


def in_order_of(truth: Tensor, found: Tensor) -> Tensor:
    """Return ``found`` in the order that makes its squared error to ``truth`` least (Hungarian method)."""
    rows, columns = linear_sum_assignment(distances(truth, found).numpy())
    return found[torch.from_numpy(columns[np.argsort(rows)])]


def rank_by(distance: Tensor, is_true: Tensor, among: Tensor | None = None) -> Tensor:
    """Return the rank of the true image when a pool is sorted by distance, ``N``, from 1.

    A distance that is not a number comes last. The true image comes behind others at the same distance, so that
    calling all alike finds nothing.

    Args:
        distance: ``N x M``.
        is_true: the true images of the pool, bool ``N x M``. Of several, the nearest counts.
        among: those of the pool that count, bool ``N x M``; all if not given.
    """
    among = torch.ones_like(is_true) if among is None else among
    distance = distance.nan_to_num(torch.inf)
    nearest = distance.masked_fill(~is_true, torch.inf).min(1, keepdim=True).values
    return 1 + ((distance <= nearest) & among & ~is_true).sum(1)


def paired(labels: np.ndarray, order: np.ndarray, spare: np.ndarray, count: int | None,
           batch: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Choose the images to attack, and for each the image of its class whose observation is its foreign control.

    The images attacked are the first of ``order``. One by one, each is paired with the next attacked image of its
    class, in a circle, so that the control needs no further observation. The only attacked image of its class is
    paired with the class's next image of ``order`` or ``spare``, which is observed too. A batch is paired with a
    second batch, of the next images with the same labels. An image whose class has too few images is not attacked.

    Args:
        labels: of all images of the data set.
        order: numbers of the client's images, in the order in which they are attacked.
        spare: numbers of other images, which may be observed where the client's do not suffice.
        count: how many images are attacked at most; None for all.
        batch: True if the images are observed together.

    Returns:
        The numbers of the images attacked, and of their partners, ``N`` each. They are empty if no class has two.
    """
    line = np.concatenate([order, spare]).astype(int)
    of_class = {c: line[labels[line] == c] for c in np.unique(labels[line])}
    place = {number: i for members in of_class.values() for i, number in enumerate(members)}
    numbers = np.array([i for i in order if place[i] < len(of_class[labels[i]]) // 2
                        or not batch and len(of_class[labels[i]]) > 1], int)[:count]
    partners = np.empty_like(numbers)
    for c in np.unique(labels[numbers]):
        here = labels[numbers] == c
        size = int(here.sum())
        partners[here] = (of_class[c][size:2 * size] if batch or size == 1 else np.roll(numbers[here], -1))
    return numbers, partners


class Ranks(NamedTuple):
    """The places of true images when candidates are sorted by distance from a reconstruction, each ``R x N``.

    Attributes:
        rank: from 1, among all candidates.
        class_rank: from 1, among the candidates of the image's class.
        class_size: how many these are.
        guess: the share of candidates that are true: how often a guess has rank 1.
    """

    rank: Tensor
    class_rank: Tensor
    class_size: Tensor
    guess: Tensor

    @staticmethod
    def joined(parts: "list[Ranks]") -> "Ranks":
        """Return the ranks of consecutive images as one."""
        return Ranks(*(torch.cat(values, 1) for values in zip(*parts, strict=True)))


@dataclass(frozen=True)
class Candidates:
    """The images of the client among which some true images are ranked.

    Attributes:
        part: which of the attacked images these are.
        numbers: of the candidates in the data set, ``M``.
        is_true, among, alike: bool ``P x M``: the true image of each; its candidates; those of its class.
    """

    part: slice
    numbers: Tensor
    is_true: Tensor
    among: Tensor
    alike: Tensor

    def rank(self, distance: Tensor) -> Ranks:
        """Rank true images by any distance of the candidates, ``R x P x M``."""
        rank, class_rank = (torch.stack([rank_by(restart, self.is_true, among) for restart in distance])
                            for among in (self.among, self.alike))
        class_size, size = (among.sum(1).expand_as(rank) for among in (self.alike, self.among))
        return Ranks(rank, class_rank, class_size, 1 / size.double())


def candidates(labels: np.ndarray, order: np.ndarray, numbers: np.ndarray) -> Iterator[Candidates]:
    """Yield the candidates of attacked images, ``PART`` images at a time.

    They are the true image and the first of the client's other images in ``order``: ``MAX_CANDIDATES`` at most.
    """
    base = order[:MAX_CANDIDATES]
    for start in range(0, len(numbers), PART):
        part = numbers[start:start + PART]
        pool = np.concatenate([base, np.setdiff1d(part, base)])
        is_true = torch.from_numpy(pool[None] == part[:, None])
        among = torch.zeros_like(is_true)
        among[:, :len(base)] = True
        if len(base) == MAX_CANDIDATES:   # the last one makes room for a true image that is not among them
            among[:, len(base) - 1] = torch.from_numpy(np.isin(part, base))
        among |= is_true
        alike = among & torch.from_numpy(labels[pool][None] == labels[part][:, None])
        yield Candidates(slice(start, start + PART), torch.from_numpy(pool), is_true, among, alike)


def feature_distances(found: Tensor, truth: Tensor, labels: Tensor, own: Tensor,
                      own_labels: Tensor) -> dict[str, Tensor]:
    """Return Euclidean distances of N images from true ones in an evaluator's features.

    Args:
        found, truth: features of the images and of the true ones, ``N x D``.
        labels: of the true images, ``N``.
        own, own_labels: features of the victim's training images, ``M x D``, and their labels, ``M``.

    Returns:
        ``feature_distance``, from the true image; ``knn_distance``, from the nearest training image of the label
        (Zhang et al. 2020, arXiv 1911.07135), NaN if there is none. ``N`` each.
    """
    other = own_labels[None, :] != labels[:, None]
    distance = torch.cdist(found, own, compute_mode="donot_use_mm_for_euclid_dist")   # by products, 0 is not found
    nearest = distance.masked_fill(other, torch.inf).min(1).values
    return {"feature_distance": (found - truth).norm(dim=1),
            "knn_distance": nearest.masked_fill(nearest == torch.inf, torch.nan)}


@dataclass(frozen=True)
class Evaluator:
    """A classifier that has nothing to do with the victim, trained on images that no client trained on.

    Attributes:
        accuracy: share right on further such images, which it was not trained on either.
    """

    model: CNN
    accuracy: float

    @torch.no_grad()
    def classes(self, images: Tensor) -> Tensor:
        """Return the class that it sees in each image, ``N``."""
        return torch.cat([self.model(part)[0].argmax(1) for part in images.split(256)])

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Return the inputs of its last layer, ``N x D``. Similar images are near each other there."""
        return torch.cat([self.model.classifier.features(part) for part in images.split(256)])


def evaluator(images: Tensor, labels: Tensor, num_classes: int, epochs: int = 12) -> Evaluator:
    """Train an evaluator on nine tenths of held-out images, and test it on the rest."""
    model, cut = CNN(shape_of(images), num_classes), len(images) - len(images) // 10
    order = torch.randperm(len(images))
    train, test = order[:cut], order[cut:]
    fit(list(model.parameters()), lambda part: torch.nn.functional.cross_entropy(
        model(images[train[part]])[0], labels[train[part]]), cut, epochs, batch=64)
    right = Evaluator(model.eval(), 0.0).classes(images[test]) == labels[test]
    return Evaluator(model, right.double().mean().item())


def class_means(public: Tensor, public_labels: Tensor, labels: Tensor) -> Tensor:
    """Return the mean public image of each label, ``N x C x H x W``; of all public images where none has it.

    Args:
        public, public_labels: ``M x C x H x W`` and ``M``.
        labels: ``N``.
    """
    means = {c: (public[public_labels == c] if (public_labels == c).any() else public).mean(0)
             for c in labels.unique().tolist()}
    return torch.stack([means[c] for c in labels.tolist()])


def distortion_bound(images: Tensor, nats: float) -> float:
    """Return the least mean squared error per pixel for an adversary who knows ``nats`` about an image.

    By reverse water-filling (Cover and Thomas, 10.3.3). It holds for Gaussian images with the covariance of the
    given ones. Real images can be described in fewer nats, so for them it is no bound.

    Args:
        images: with fewer images than pixels, the directions that they do not span count as variance 0.
        nats: not a number if an encoder has overflowed; then nothing is known, and the bound is 0.
    """
    flat = images.flatten(1).double()
    variances = torch.linalg.svdvals(flat - flat.mean(0)).square() / max(len(flat) - 1, 1)
    variances = variances[variances > 1e-12]
    if not len(variances) or nats != nats:   # one image, or all the same: no variance
        return 0.0
    low, high = 1e-15, float(variances.max())
    for _ in range(200):   # bisection for the water level at which the rate is ``nats``
        level = (low * high) ** 0.5
        rate = 0.5 * (variances / level).log().clamp_min(0).sum()
        low, high = (low, level) if rate < nats else (level, high)
    return float(torch.minimum(variances, torch.tensor(level)).sum() / flat.shape[1])
