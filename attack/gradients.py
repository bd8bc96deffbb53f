"""Gradient inversion: from what a client uploads back to what its head was fed.

A problem is one upload; several are solved as one batch, vmapped. What comes out is the head's input: an
image under FedAvg and its kin, a latent under a method with a private encoder.
"""
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from update import State


def loss_of(head: nn.Module) -> Callable[[State, Tensor, Tensor], Tensor]:
    """``(parameters, inputs, labels) -> mean cross-entropy``; labels may be class probabilities."""
    return lambda parameters, x, y: F.cross_entropy(functional_call(head, parameters, (x,)), y)


def gradient(head: nn.Module, x: Tensor, y: Tensor) -> State:
    """A single step's gradient."""
    return grad(loss_of(head))({name: p.detach() for name, p in head.named_parameters()}, x, y)


def epoch_update(head: nn.Module, x: Tensor, y: Tensor, lr: float, batch: int) -> State:
    """How far parameters fall over an epoch of SGD, batches in order, in units of the learning rate: of a
    single batch, its gradient. Differentiable in ``x``."""
    now = {name: p.detach() for name, p in head.named_parameters()}
    total = {name: torch.zeros_like(value) for name, value in now.items()}
    for part, labels in zip(x.split(batch), y.split(batch), strict=True):
        slope = grad(loss_of(head))(now, part, labels)
        now = {name: value - lr * slope[name] for name, value in now.items()}
        total = {name: value + slope[name] for name, value in total.items()}
    return total


def labels_of(observed: State, count: int, steps: int = 1, layer: str = "output.bias") -> Tensor:
    """The labels behind the sum of ``steps`` gradients, with repetition, in order of class.

    One image: the only negative entry of the last bias's gradient, ``p - onehot`` (iDLG, Zhao et al. 2020,
    arXiv 2001.02610). Several: the most negative entry is a label, which is worth ``steps / count``, since
    each step's gradient is a mean over its share of the images; then the next (after Wainakh et al. 2021,
    arXiv 2105.09369).
    """
    left, labels = observed[layer].clone(), []
    for _ in range(count):
        labels.append(int(left.argmin()))
        left[labels[-1]] += steps / count
    return torch.tensor(sorted(labels))


def dense_input(observed: State, layer: str) -> Tensor:
    """The input of a dense layer for one image, exactly, from ``dL/dW = (dL/db) input^T`` (Phong et al., IEEE
    TIFS 2018); a mean over all its units, weighted by the square of ``dL/db``.

    Args:
        observed: one image's gradient.
        layer: name of the layer, whose ``.weight`` is ``M x D`` and ``.bias`` ``M``.
    """
    weight, bias = observed[f"{layer}.weight"].double(), observed[f"{layer}.bias"].double()
    return ((weight * bias[:, None]).sum(0) / bias.square().sum()).float()


def total_variation(x: Tensor) -> Tensor:
    """Mean absolute difference of neighbouring pixels of each image: ``... x C x H x W -> ...``."""
    down, right = x.diff(dim=-2).abs().mean((-3, -2, -1)), x.diff(dim=-1).abs().mean((-3, -2, -1))
    return down + right


def cosine_distance(one: State, other: State) -> Tensor:
    """``1 - <a, b> / (|a| |b|)`` of two gradients as whole vectors."""
    dot = sum((value * other[name]).sum() for name, value in one.items())
    sizes = [sum(value.square().sum() for value in state.values()) for state in (one, other)]
    return 1 - dot / (sizes[0] * sizes[1]).sqrt().clamp_min(1e-20)


def squared_distance(one: State, other: State) -> Tensor:
    """``|a - b|^2``."""
    return sum((value - other[name]).square().sum() for name, value in one.items())


def invert(change: Callable[[Tensor, Tensor], State], observed: State, labels: Tensor, start: Tensor,
           iterations: int, tv: float, bounded: bool, lr: float = 0.1) -> tuple[Tensor, Tensor]:
    """Cosine distance + total variation, signed Adam (Geiping et al. 2020, arXiv 2003.14053).

    Args:
        change: inputs ``B x C x H x W``, labels ``B`` -> what the server would have observed.
        observed: what it saw, ``P x ...`` each, of P problems.
        labels: ``P x B``.
        start: ``R x P x B x C x H x W``, R restarts.
        bounded: whether inputs are images, in [0, 1], or latents.

    Returns:
        The inputs and, ``R x P``, the objective they end at; of each problem the best restart is first.
    """
    restarts, problems = start.shape[:2]
    x = start.flatten(0, 1).clone().requires_grad_()
    many = {name: value.repeat(restarts, *[1] * (value.ndim - 1)) for name, value in observed.items()}
    y = labels.repeat(restarts, 1)

    def objective(x, y, observed):
        return cosine_distance(change(x, y), observed) + tv * total_variation(x).mean()

    optimizer = torch.optim.Adam([x], lr)
    schedule = torch.optim.lr_scheduler.MultiStepLR(
        optimizer, [round(iterations * share) for share in (0.375, 0.625, 0.875)], 0.1)
    for _ in range(iterations):
        value = vmap(objective)(x, y, many)
        slope, = torch.autograd.grad(value.sum(), x)
        x.grad = slope.sign()
        optimizer.step()
        schedule.step()
        if bounded:
            x.data.clamp_(0, 1)
    with torch.no_grad():
        value = vmap(objective)(x, y, many).nan_to_num(torch.inf)
    return best_first(x.detach().unflatten(0, (restarts, problems)), value.unflatten(0, (restarts, problems)))


def best_first(found: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """``R x P x ...`` and ``R x P``, with each problem's restarts sorted by value."""
    order = value.argsort(0)
    index = order.reshape(*order.shape, *[1] * (found.ndim - 2)).expand_as(found)
    return found.gather(0, index), value.gather(0, order)


def deep_leakage(head: nn.Module, observed: State, count: int, classes: int, start: Tensor,
                 iterations: int) -> tuple[Tensor, float]:
    """DLG: inputs and soft labels at once, squared distance, L-BFGS (Zhu et al. 2019, arXiv 1906.08935).

    Args:
        observed: one problem's gradient.
        start: ``B x C x H x W``.

    Returns:
        The inputs, and the distance they end at (infinite if it diverged).
    """
    x = start.clone().requires_grad_()
    y = torch.zeros(count, classes, requires_grad=True)
    parameters = {name: p.detach() for name, p in head.named_parameters()}
    optimizer = torch.optim.LBFGS([x, y], lr=1.0, max_iter=iterations, history_size=100,
                                  tolerance_grad=0, tolerance_change=0, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        value = squared_distance(grad(loss_of(head))(parameters, x, y.softmax(1)), observed)
        value.backward()
        return value

    value = float(optimizer.step(closure).detach())
    final = float(closure().detach())
    return x.detach(), final if final == final and value == value else float("inf")


def from_features(features: Callable[[Tensor], Tensor], observed: Tensor, start: Tensor, iterations: int,
                  tv: float, bounded: bool, lr: float = 0.05) -> tuple[Tensor, Tensor]:
    """Inputs whose features are those recovered by ``dense_input``: ``|f(x) - f|^2 / |f|^2`` + TV, Adam.

    Args:
        observed: ``P x D``.
        start: ``R x P x C x H x W``.

    Returns:
        As ``invert``, with one image a problem: ``R x P x C x H x W``.
    """
    restarts, problems = start.shape[:2]
    x = start.flatten(0, 1).clone().requires_grad_()
    goal = observed.repeat(restarts, 1)
    scale = goal.square().sum(1).clamp_min(1e-12)
    optimizer = torch.optim.Adam([x], lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iterations)
    for _ in range(iterations):
        optimizer.zero_grad()
        value = (features(x) - goal).square().sum(1) / scale + tv * total_variation(x)
        value.sum().backward()
        optimizer.step()
        schedule.step()
        if bounded:
            x.data.clamp_(0, 1)
    with torch.no_grad():
        value = (features(x) - goal).square().sum(1) / scale + tv * total_variation(x)
    return best_first(x.detach().unflatten(0, (restarts, problems)), value.unflatten(0, (restarts, problems)))
