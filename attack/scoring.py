"""How good a reconstruction is, what the class alone would score, and what a latent can tell at most.

Images are ``N x C x H x W`` in [0, 1], so the data range of PSNR and SSIM is 1.
"""
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from attack.learnt import fit, shape_of
from models import CNN

SMALLEST_MSE = 1e-10   # what is less counts as this, so that PSNR is at most 100 dB
SSIM_WINDOW, SSIM_SIGMA = 11, 1.5   # side and standard deviation, pixels


def similarity(found: Tensor, truth: Tensor) -> dict[str, Tensor]:
    """``mse``, ``psnr`` in dB and ``ssim`` of each image and its true one, ``N`` each."""
    mse = (found - truth).double().square().mean((1, 2, 3)).clamp_min(SMALLEST_MSE)
    return {"mse": mse, "psnr": -10 * mse.log10(), "ssim": ssim(found, truth)}


def ssim(found: Tensor, truth: Tensor) -> Tensor:
    """Structural similarity of each image and its true one, ``N`` (Wang et al. 2004, IEEE TIP 13(4):600).

    The window is Gaussian, 11 x 11 with a standard deviation of 1.5 pixels, and only windows that lie within the
    image count: scikit-image's ``structural_similarity(gaussian_weights=True, use_sample_covariance=False)``.
    In an image of fewer than 11 pixels a side the window is the largest odd square that fits. Colours are
    averaged.
    """
    side = min(SSIM_WINDOW, (min(found.shape[2:]) + 1) // 2 * 2 - 1)
    line = (-0.5 * ((torch.arange(side, dtype=torch.double) - side // 2) / SSIM_SIGMA).square()).exp()
    window = torch.outer(line, line)[None, None] / line.sum() ** 2
    parts = [_ssim(one.double(), true.double(), window)
             for one, true in zip(found.split(256), truth.split(256), strict=True)]
    return torch.cat(parts)


def _ssim(x: Tensor, y: Tensor, window: Tensor) -> Tensor:
    """``ssim`` in windows of the given weights, ``1 x 1 x S x S``."""
    planes = torch.stack([x, y, x * x, y * y, x * y]).flatten(0, 2)[:, None]
    means = torch.nn.functional.conv2d(planes, window).unflatten(0, (5, *x.shape[:2])).squeeze(3)
    mx, my, xx, yy, xy = means
    c1, c2 = 0.01**2, 0.03**2
    similar = ((2 * mx * my + c1) * (2 * (xy - mx * my) + c2)
               / ((mx * mx + my * my + c1) * (xx - mx * mx + yy - my * my + c2)))
    return similar.mean((1, 2, 3))


def distances(found: Tensor, pool: Tensor) -> Tensor:
    """Mean squared error between each of N images and each of a pool of M: ``N x M``."""
    return torch.cdist(found.flatten(1), pool.flatten(1)).square() / found[0].numel()


def in_order_of(truth: Tensor, found: Tensor) -> Tensor:
    """``found`` in the order that makes its squared error to ``truth`` least (Hungarian method).

    This is for attacks on a batch, since its gradient says nothing about the order of the images.
    """
    rows, columns = linear_sum_assignment(distances(truth, found).numpy())
    return found[torch.from_numpy(columns[np.argsort(rows)])]


def rank_of(found: Tensor, pool: Tensor, is_true: Tensor) -> Tensor:
    """The rank of the true image when a pool is sorted by distance from each reconstruction: ``N``, from 1.

    Args:
        pool: ``M x C x H x W``.
        is_true: which images of the pool are true, ``N x M``, bool. Of several, the nearest counts.
    """
    return rank_by(distances(found, pool), is_true)


def rank_by(distance: Tensor, is_true: Tensor, among: Tensor | None = None) -> Tensor:
    """``rank_of`` by any distance ``N x M``, among all of the pool or those of ``among``, bool ``N x M``.

    A distance that is not a number comes last. The true image comes behind others at the same distance, so that
    calling all alike finds nothing.
    """
    among = torch.ones_like(is_true) if among is None else among
    distance = distance.nan_to_num(torch.inf)
    nearest = distance.masked_fill(~is_true, torch.inf).min(1, keepdim=True).values
    return 1 + ((distance <= nearest) & among & ~is_true).sum(1)


def feature_distances(found: Tensor, truth: Tensor, labels: Tensor, own: Tensor,
                      own_labels: Tensor) -> dict[str, Tensor]:
    """Euclidean distances of N images from true ones in an evaluator's features.

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
        """The class that it sees in each image, ``N``."""
        return torch.cat([self.model(part)[0].argmax(1) for part in images.split(256)])

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """The inputs of its last layer, ``N x D``. Images of a kind are near each other there."""
        return torch.cat([self.model.classifier.features(part) for part in images.split(256)])


def evaluator(images: Tensor, labels: Tensor, num_classes: int, epochs: int = 12) -> Evaluator:
    """Train an evaluator on nine tenths of held-out images, and test it on the rest."""
    model, cut = CNN(shape_of(images), num_classes), len(images) - len(images) // 10
    order = torch.randperm(len(images))
    train, test = order[:cut], order[cut:]
    fit(list(model.parameters()), lambda part: torch.nn.functional.cross_entropy(
        model(images[train[part]])[0], labels[train[part]]), cut, epochs, batch=64)
    found = Evaluator(model.eval(), 0.0)
    accuracy = (found.classes(images[test]) == labels[test]).double().mean().item()
    return Evaluator(model, accuracy)


def class_means(public: Tensor, public_labels: Tensor, labels: Tensor) -> Tensor:
    """The mean public image of each label, ``N x C x H x W``; of all public images where none has the label.

    Args:
        public, public_labels: ``M x C x H x W`` and ``M``.
        labels: ``N``.
    """
    means = {c: (public[public_labels == c] if (public_labels == c).any() else public).mean(0)
             for c in labels.unique().tolist()}
    return torch.stack([means[c] for c in labels.tolist()])


def distortion_bound(images: Tensor, nats: float) -> float:
    """The least mean squared error that is possible for an adversary who knows ``nats`` about an image.

    It is an error per pixel, by reverse water-filling (Cover and Thomas, 10.3.3). It holds for Gaussian
    images with the covariance of the given ones. Real images can be described in fewer nats, so for them it
    is no bound.

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
