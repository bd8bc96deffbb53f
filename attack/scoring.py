"""How good a reconstruction is, beside controls that know nothing of the victim, and what latents can tell.

Images are in [0, 1], so the data range of PSNR and SSIM is 1.
"""
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure

from attack.learnt import fit
from models import CNN

SMALLEST = 1e-10   # mean squared error that counts as none: 100 dB


def likeness(found: Tensor, truth: Tensor) -> dict[str, Tensor]:
    """``mse``, ``psnr`` in dB and ``ssim`` of each pair of ``N x C x H x W``."""
    mse = (found - truth).double().square().mean((1, 2, 3)).clamp_min(SMALLEST)
    ssim = structural_similarity_index_measure(found, truth, data_range=1.0, reduction="none")
    return {"mse": mse, "psnr": -10 * mse.log10(), "ssim": ssim.reshape(-1)}


def distances(found: Tensor, pool: Tensor) -> Tensor:
    """Mean squared error of each of ``N`` with each of ``M`` images: ``N x M``."""
    return torch.cdist(found.flatten(1), pool.flatten(1)).square() / found[0].numel()


def assigned(found: Tensor, truth: Tensor) -> Tensor:
    """``found`` in the order of ``truth`` that makes their squared error least (Hungarian method): a batch's
    gradient says nothing of the order in it."""
    rows, columns = linear_sum_assignment(distances(truth, found).numpy())
    return found[torch.from_numpy(columns[np.argsort(rows)])]


def rank_of(found: Tensor, pool: Tensor, is_true: Tensor) -> Tensor:
    """Among the pool by distance from each image, the place of the nearest is_true, from 1.

    Args:
        is_true: ``N x M`` bool: which of the pool is (one of) the victim's.
    """
    return rank_by(distances(found, pool), is_true)


def rank_by(apart: Tensor, is_true: Tensor) -> Tensor:
    """``rank_of`` by any measure of how far each of the pool is, ``N x M``; what is not a number is last."""
    apart = apart.nan_to_num(torch.inf)
    nearest = apart.masked_fill(~is_true, torch.inf).min(1).values
    return torch.where(nearest == torch.inf, apart.shape[1], (apart < nearest[:, None]).sum(1) + 1)


@dataclass(frozen=True)
class Evaluator:
    """A classifier of images that the victim has never seen; ``accuracy`` on images new to it too."""

    model: CNN
    accuracy: float

    @torch.no_grad()
    def classes(self, images: Tensor) -> Tensor:
        return self.model(images)[0].argmax(1)


def evaluator(images: Tensor, labels: Tensor, num_classes: int, epochs: int = 12) -> Evaluator:
    """Train an evaluator on nine tenths of held-out images and test it on the rest."""
    model, cut = CNN(tuple(images.shape[1:]), num_classes), len(images) - len(images) // 10
    order = torch.randperm(len(images))
    train, test = order[:cut], order[cut:]
    fit(list(model.parameters()), lambda part: torch.nn.functional.cross_entropy(
        model(images[train[part]])[0], labels[train[part]]), cut, epochs, batch=64)
    found = Evaluator(model.eval(), 0.0)
    accuracy = (found.classes(images[test]) == labels[test]).double().mean().item()
    return Evaluator(model, accuracy)


def controls(public: Tensor, public_labels: Tensor, labels: Tensor, truth: Tensor) -> dict[str, Tensor]:
    """What anybody could hand in for images of ``labels``: grey, noise, the public mean of the class, and the
    public image that happens to be nearest the truth, which only a lucky guesser would pick."""
    means = torch.stack([public[public_labels == c].mean(0) if (public_labels == c).any() else public.mean(0)
                         for c in labels.tolist()])
    return {"grey": torch.full_like(truth, 0.5), "noise": torch.rand_like(truth), "class_mean": means,
            "nearest_public": public[distances(truth, public).argmin(1)]}


def distortion_bound(images: Tensor, nats: float) -> float:
    """The least mean squared error a pixel that anybody can reach who has been told ``nats`` of an image, if
    images were Gaussian with these images' covariance: reverse water-filling (Cover and Thomas, 10.3.3).

    Real images are not Gaussian and can be told in fewer nats, so the bound holds under that assumption only.

    Args:
        images: ``N x C x H x W``; with fewer images than pixels the missing directions count as variance 0.
        nats: where they are no number, an encoder has overflowed, and nothing is known to bound anybody.
    """
    flat = images.flatten(1).double()
    variances = torch.linalg.svdvals(flat - flat.mean(0)).square() / max(len(flat) - 1, 1)
    variances = variances[variances > 1e-12]
    if not len(variances) or nats != nats:   # one image, or all alike: known before anything is told
        return 0.0
    low, high = 1e-15, float(variances.max())
    for _ in range(200):   # the water level at which the rate is what was told
        level = (low * high) ** 0.5
        rate = 0.5 * (variances / level).log().clamp_min(0).sum()
        low, high = (low, level) if rate < nats else (level, high)
    return float(torch.minimum(variances, torch.tensor(level)).sum() / flat.shape[1])
