"""Class inversion: images of a class, drawn from a model that was trained on the class.

All classes and restarts are one batch. In shapes, R is the number of restarts and P the number of labels.
"""
from collections.abc import Callable

import torch
from torch import Tensor, nn

from attack.adversaries import Adversary
from attack.gradients import best_first, descend, total_variation

Score = Callable[[Tensor], Tensor]   # images N x C x H x W -> log-probabilities N x num_classes


def mi_face(score: Score, labels: Tensor, image_shape: tuple[int, int, int], iterations: int, lr: float = 0.1,
            patience: int = 100, enough: float = 0.99) -> Tensor:
    """Descend on ``1 - p(label | x)`` from black: MI-Face (Fredrikson et al. 2015, algorithm 1).

    An image is finished when its cost has not fallen for ``patience`` steps, or its probability is ``enough``.
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

    Images start at ``R x P x C x H x W``. Total variation keeps them smooth, and a pull keeps them near the mean
    of public images. Returns images and objectives ``R x P``, each label's best restart first.
    """
    x, y = start.flatten(0, 1).clone().requires_grad_(), labels.repeat(len(start))

    def objective() -> Tensor:
        return (-log_odds(score(x), y).clamp_max(20) + tv * total_variation(x)
                + pull * (x - mean).square().mean((1, 2, 3)))
    return best_first(x.detach(), descend(objective, x, iterations, lr), len(start))


def gmi(score: Score, labels: Tensor, decoder: nn.Module, start: Tensor, iterations: int,
        weight: float = 0.05, lr: float = 0.05) -> tuple[Tensor, Tensor]:
    """Raise the margin over the images that a generator can draw, with codes ``R x P x Z`` kept near N(0, I).

    After Zhang et al. 2020 (arXiv 1911.07135), whose generator is a GAN.
    """
    code, y = start.flatten(0, 1).clone().requires_grad_(), labels.repeat(len(start))

    def objective() -> Tensor:
        return -log_odds(score(decoder(code)), y).clamp_max(20) + weight * 0.5 * code.square().sum(1)
    value = descend(objective, code, iterations, lr, cosine=False, bounded=False)
    return best_first(decoder(code).detach(), value, len(start))


def log_odds(logs: Tensor, labels: Tensor) -> Tensor:
    """Return ``log p - log(1 - p)`` of the labels, ``N``, from log-probabilities ``N x num_classes``."""
    true = torch.zeros_like(logs, dtype=torch.bool).scatter_(1, labels[:, None], True)
    return logs[true] - logs.masked_fill(true, -torch.inf).logsumexp(1)


# Attacks: (adversary, labels P) -> images R x P x C x H x W, the adversary's own choice of each label first.

def attack_mi_face(adversary: Adversary, labels: Tensor) -> Tensor:
    """Run ``mi_face`` once, three times as long as others, since it has no restarts."""
    return mi_face(adversary.score(adversary.budget.draws), labels, adversary.knowledge.image_shape,
                   3 * adversary.budget.iterations)[None]


def attack_margin(adversary: Adversary, labels: Tensor, draws: int | None = None) -> Tensor:
    """Run ``margin`` with ``draws`` of z in place of the budget's; 0 is for the mean of z."""
    score = adversary.score(adversary.budget.draws if draws is None else draws)
    return margin(score, labels, adversary.random_images(len(labels)), adversary.public.images.mean(0),
                  adversary.budget.iterations)[0]


def attack_gmi(adversary: Adversary, labels: Tensor) -> Tensor:
    """Run ``gmi`` with a generator of public images."""
    generator, budget = adversary.generator, adversary.budget
    start = torch.randn(budget.restarts, len(labels), generator.size)
    return gmi(adversary.score(budget.draws), labels, generator.decode, start, budget.iterations)[0]
