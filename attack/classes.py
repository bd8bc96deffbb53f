"""Class inversion: images of a class, drawn from a model that was trained on it."""
import torch
from torch import Tensor

from attack.adversaries import Adversary
from attack.gradients import best_first, descend, total_variation


def log_odds(logs: Tensor, labels: Tensor) -> Tensor:
    """Return ``log p - log(1 - p)`` of the labels, ``N``, from log-probabilities ``N x num_classes``."""
    true = torch.zeros_like(logs, dtype=torch.bool).scatter_(1, labels[:, None], True)
    return logs[true] - logs.masked_fill(true, -torch.inf).logsumexp(1)


# Attacks: (adversary, labels P) -> images R x P x C x H x W, the adversary's own choice of each label first.

def mi_face(adversary: Adversary, labels: Tensor, lr: float = 0.1, patience: int = 100,
            enough: float = 0.99) -> Tensor:
    """Descend on ``1 - p(label | x)`` from black: MI-Face (Fredrikson et al. 2015, algorithm 1)."""
    score = adversary.score(adversary.budget.draws)
    x = torch.zeros(len(labels), *adversary.knowledge.image_shape)
    best, lowest = x.clone(), torch.full((len(labels),), torch.inf)
    since = torch.zeros(len(labels), dtype=torch.long)
    for _ in range(3 * adversary.budget.iterations):
        going = (lowest > 1 - enough) & (since < patience)   # images that are not finished
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
    return best[None]


def margin(adversary: Adversary, labels: Tensor, draws: int | None = None) -> Tensor:
    """Raise the margin ``log p - log(1 - p)`` by Adam, with total variation and a pull near the public mean."""
    budget, mean = adversary.budget, adversary.public.images.mean(0)
    score = adversary.score(budget.draws if draws is None else draws)
    x = adversary.random_images(len(labels)).flatten(0, 1).requires_grad_()
    y = labels.repeat(budget.restarts)

    def objective() -> Tensor:
        return (-log_odds(score(x), y).clamp_max(20) + 3.0 * total_variation(x)
                + 0.3 * (x - mean).square().mean((1, 2, 3)))
    value = descend(objective, x, budget.iterations, 0.05)
    return best_first(x.detach(), value, budget.restarts)[0]


def gmi(adversary: Adversary, labels: Tensor) -> Tensor:
    """Raise the margin over a generator's codes, kept near N(0, I) (after Zhang et al. 2020, arXiv 1911.07135)."""
    generator, budget = adversary.generator, adversary.budget
    code = torch.randn(budget.restarts * len(labels), generator.size).requires_grad_()
    score, y = adversary.score(budget.draws), labels.repeat(budget.restarts)

    def objective() -> Tensor:
        return -log_odds(score(generator.decode(code)), y).clamp_max(20) + 0.025 * code.square().sum(1)
    value = descend(objective, code, budget.iterations, 0.05, drops=(), bounded=False)
    return best_first(generator.decode(code).detach(), value, budget.restarts)[0]
