"""Class inversion: images of a class, drawn from a model that was trained on the class.

All classes and restarts are one batch, since the loss of one image does not depend on the others.

In shapes, R is the number of restarts and P the number of labels.
"""
from collections.abc import Callable

import torch
from torch import Tensor, nn

from attack.gradients import best_first, total_variation

Score = Callable[[Tensor], Tensor]   # images N x C x H x W -> log-probabilities N x num_classes


def mi_face(score: Score, labels: Tensor, image_shape: tuple[int, int, int], iterations: int, lr: float = 0.1,
            patience: int = 100, enough: float = 0.99) -> Tensor:
    """MI-Face: gradient descent on ``1 - p(label | x)`` from black (Fredrikson et al. 2015, algorithm 1).

    Args:
        labels: ``P``.
        enough: an image is finished when its probability reaches this,
        patience: or when its cost has not fallen for this many steps.

    Returns:
        The best image of each label, ``P x C x H x W``.
    """
    x = torch.zeros(len(labels), *image_shape)
    best, lowest = x.clone(), torch.full((len(labels),), torch.inf)
    since = torch.zeros(len(labels), dtype=torch.long)
    for _ in range(iterations):
        going = (lowest > 1 - enough) & (since < patience)
        if not going.any():
            break
        at = x[going].requires_grad_()
        cost = 1 - score(at).gather(1, labels[going, None]).squeeze(1).exp()
        slope, = torch.autograd.grad(cost.sum(), at)
        better = torch.zeros_like(going)
        better[going] = cost.detach() < lowest[going]
        lowest[going] = torch.minimum(lowest[going], cost.detach())
        best[better] = x[better]
        since = torch.where(better, 0, since + 1)
        x[going] = (at.detach() - lr * slope).clamp(0, 1)
    return best


def margin(score: Score, labels: Tensor, start: Tensor, mean: Tensor, iterations: int, tv: float = 3.0,
              pull: float = 0.3, lr: float = 0.05) -> tuple[Tensor, Tensor]:
    """Raise the margin ``log p - log(1 - p)`` by Adam; unlike p, it does not level off near 1.

    Total variation keeps the image smooth, and a pull keeps it near the mean of public images.

    Args:
        labels: ``P``.
        start: where the search starts, ``R x P x C x H x W``.
        mean: of public images, ``C x H x W``.
        tv, pull: weights of total variation and of the squared distance from the mean.

    Returns:
        Images ``R x P x C x H x W`` and objectives ``R x P``. Each label's best restart comes first.
    """
    restarts, problems = start.shape[:2]
    x, y = start.flatten(0, 1).clone().requires_grad_(), labels.repeat(restarts)
    optimizer = torch.optim.Adam([x], lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iterations)

    def objective() -> Tensor:
        return (-log_odds(score(x), y).clamp_max(20) + tv * total_variation(x)
                + pull * (x - mean).square().mean((1, 2, 3)))
    for _ in range(iterations):
        optimizer.zero_grad()
        objective().sum().backward()
        optimizer.step()
        schedule.step()
        x.data.clamp_(0, 1)
    with torch.no_grad():
        value = objective()
    return best_first(x.detach().unflatten(0, (restarts, problems)), value.unflatten(0, (restarts, problems)))


def gmi(score: Score, labels: Tensor, decoder: nn.Module, start: Tensor, iterations: int,
             weight: float = 0.05, lr: float = 0.05) -> tuple[Tensor, Tensor]:
    """Raise the margin over the images that a generator can draw.

    The generator was trained on public images, and its code is kept near N(0, I). After Zhang et al. 2020
    (arXiv 1911.07135), whose generator is a GAN.

    Args:
        labels: ``P``.
        decoder: code ``N x Z`` -> images ``N x C x H x W``.
        start: codes where the search starts, ``R x P x Z``.
        weight: of ``-log N(code; 0, I)``.

    Returns:
        As ``margin``.
    """
    restarts, problems = start.shape[:2]
    code, y = start.flatten(0, 1).clone().requires_grad_(), labels.repeat(restarts)
    optimizer = torch.optim.Adam([code], lr)

    def objective() -> Tensor:
        return -log_odds(score(decoder(code)), y).clamp_max(20) + weight * 0.5 * code.square().sum(1)
    for _ in range(iterations):
        optimizer.zero_grad()
        objective().sum().backward()
        optimizer.step()
    with torch.no_grad():
        value, images = objective(), decoder(code)
    return best_first(images.unflatten(0, (restarts, problems)), value.unflatten(0, (restarts, problems)))


def log_odds(logs: Tensor, labels: Tensor) -> Tensor:
    """Log-probabilities ``N x num_classes``, labels ``N`` -> ``log p - log(1 - p)`` of the labels, ``N``."""
    hit = torch.zeros_like(logs, dtype=torch.bool).scatter_(1, labels[:, None], True)
    return logs[hit] - logs.masked_fill(hit, -torch.inf).logsumexp(1)
