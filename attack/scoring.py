"""Scores of reconstructions: similarity, ranks among candidates, and an evaluator.

Images are ``N x C x H x W`` in [0, 1], so the data range of PSNR and SSIM is 1.
"""
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from attack.decoders import fit
from models import CNN

SMALLEST_MSE = 1e-10   # what is less counts as this, so that PSNR is at most 100 dB
SSIM_WINDOW, SSIM_SIGMA = 11, 1.5   # side and standard deviation, pixels
# Of a true image; the last two are the number of candidates of its class, and 1 / the number of all.
RANKS = ("nearest_rank", "identified", "class_rank", "class_size", "guess")
MAX_CANDIDATES = 500   # images of the client, among which a true image is ranked
PART = 250             # images that are ranked at a time


def similarity(found: Tensor, truth: Tensor) -> dict[str, Tensor]:
    """Return ``mse``, ``psnr`` in dB and ``ssim`` of each image and its true one, ``N`` each."""
    mse = (found - truth).double().square().mean((1, 2, 3)).clamp_min(SMALLEST_MSE)
    return {"mse": mse, "psnr": -10 * mse.log10(), "ssim": ssim(found, truth)}


def ssim(found: Tensor, truth: Tensor) -> Tensor:
    """Return the structural similarity of images and true ones, ``N`` (Wang et al. 2004), as scikit-image's."""
    side = min(SSIM_WINDOW, (min(found.shape[2:]) + 1) // 2 * 2 - 1)
    line = (-0.5 * ((torch.arange(side, dtype=torch.double) - side // 2) / SSIM_SIGMA).square()).exp()
    line = line / line.sum()   # the window is its outer product with itself: two passes are exact, and faster
    c1, c2, values = 0.01**2, 0.03**2, []
    for x, y in zip(found.double().split(256), truth.double().split(256), strict=True):
        planes = torch.stack([x, y, x * x, y * y, x * y]).flatten(0, 2)[:, None]
        rows = torch.nn.functional.conv2d(planes, line[None, None, :, None])
        means = torch.nn.functional.conv2d(rows, line[None, None, None])
        mx, my, xx, yy, xy = means.unflatten(0, (5, *x.shape[:2])).squeeze(3)
        similar = ((2 * mx * my + c1) * (2 * (xy - mx * my) + c2)
                   / ((mx * mx + my * my + c1) * (xx - mx * mx + yy - my * my + c2)))
        values.append(similar.mean((1, 2, 3)))
    return torch.cat(values)


def distances(found: Tensor, pool: Tensor) -> Tensor:
    """Return the mean squared error between each of N images and each of a pool of M: ``N x M``."""
    return torch.cdist(found.flatten(1), pool.flatten(1)).square() / found[0].numel()


def in_order_of(truth: Tensor, found: Tensor) -> Tensor:
    """Return as many of ``found`` as ``truth`` has, in the order of the least squared error (Hungarian method)."""
    from scipy.optimize import linear_sum_assignment  # slow to import

    rows, columns = linear_sum_assignment(distances(truth, found).numpy())
    return found[torch.from_numpy(columns[np.argsort(rows)])]


def tied(a: Tensor, b: Tensor) -> Tensor:
    """Return True where two distances or log-likelihoods differ by no more than rounding."""
    return torch.isclose(a, b, rtol=1e-9, atol=1e-6)


def rank_by(distance: Tensor, is_true: Tensor, among: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Rank the nearest true image ``among`` a pool by distances ``... x N x M``; ties are in random order.

    Returns:
        Its expected rank, and the probability that a true image is the first, ``... x N`` each.
    """
    among = torch.ones_like(is_true) if among is None else among
    distance = distance.nan_to_num(torch.inf, torch.inf)
    nearest = distance.masked_fill(~is_true, torch.inf).min(-1, keepdim=True).values
    equal, others = tied(distance, nearest), among & ~is_true
    true_ties, ties, better = (which.sum(-1).double() for which in (
        equal & is_true, equal & others, (distance < nearest) & ~equal & others))
    return 1 + better + ties / (true_ties + 1), (better == 0) * true_ties / (true_ties + ties)


def paired(labels: np.ndarray, order: np.ndarray, spare: np.ndarray, count: int | None,
           batch: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Return the numbers of up to ``count`` images of ``order`` to attack, and of their foreign controls.

    A control is the next attacked image of the same class, cyclically; if only one of the class is attacked, the
    next of ``order``, then of ``spare``. For a batch it is a second batch with the same labels. Images of classes
    that have too few are not attacked.
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


class Candidates(NamedTuple):
    """The images of the client among which ``part`` of the attacked images are ranked."""

    part: slice
    numbers: Tensor   # M
    is_true: Tensor   # bool P x M: the image itself
    among: Tensor     # its candidates
    alike: Tensor     # those of its class

    def rank(self, distance: Tensor) -> Tensor:
        """Return ``RANKS`` of the true images by any distance of the candidates ``R x P x M``: ``5 x R x P``."""
        rank, identified = rank_by(distance, self.is_true, self.among)
        class_rank, _ = rank_by(distance, self.is_true, self.alike)
        class_size, size = (among.sum(1).double().expand_as(rank) for among in (self.alike, self.among))
        return torch.stack([rank, identified, class_rank, class_size, 1 / size])


def candidates(labels: np.ndarray, order: np.ndarray, numbers: np.ndarray) -> Iterator[Candidates]:
    """Yield, ``PART`` images at a time, the true image and the first others, up to ``MAX_CANDIDATES``."""
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
    """Return distances in features from the true images, and the nearest own of the label (Zhang et al. 2020)."""
    other = own_labels[None, :] != labels[:, None]
    distance = torch.cdist(found, own, compute_mode="donot_use_mm_for_euclid_dist")   # by products, 0 is not found
    nearest = distance.masked_fill(other, torch.inf).min(1).values
    return {"feature_distance": (found - truth).norm(dim=1),
            "knn_distance": nearest.masked_fill(nearest == torch.inf, torch.nan)}


class Evaluator:
    """A classifier trained on nine tenths of images that no client trained on; ``accuracy`` is on the rest."""

    def __init__(self, images: Tensor, labels: Tensor, shape: tuple[int, int, int], num_classes: int) -> None:
        model, cut = CNN(shape, num_classes), len(images) - len(images) // 10
        order = torch.randperm(len(images))
        train, test = order[:cut], order[cut:]
        fit(list(model.parameters()), lambda part: torch.nn.functional.cross_entropy(
            model(images[train[part]])[0], labels[train[part]]), cut, 12, batch=64)
        self.model = model.eval().to(memory_format=torch.channels_last)   # as in Knowledge
        self.accuracy = (self.classes(images[test]) == labels[test]).double().mean().item()

    @torch.no_grad()
    def classes(self, images: Tensor) -> Tensor:
        """Return the class that it sees in each image, ``N``."""
        return torch.cat([self.model(part)[0].argmax(1) for part in images.split(256)])

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Return the inputs of its last layer, ``N x D``. Similar images are near each other there."""
        return torch.cat([self.model.classifier.features(part) for part in images.split(256)])


def class_means(public: Tensor, public_labels: Tensor, labels: Tensor) -> Tensor:
    """Return the mean public image of each label, ``N x C x H x W``; of all public images where none has it."""
    means = {c: (public[public_labels == c] if (public_labels == c).any() else public).mean(0)
             for c in labels.unique().tolist()}
    return torch.stack([means[c] for c in labels.tolist()])
