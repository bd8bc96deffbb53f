"""Gradient inversion: from a client's gradient or update back to the input of its head.

The input is an image under FedAvg and similar methods, and a latent under a method with a private encoder.
One gradient or update is one problem. Several problems are solved as one batch, with ``vmap``.

In shapes, R is the number of restarts, P of problems, and B of images behind one gradient.
"""
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from server.base import State

BETA1, BETA2 = 0.9, 0.999   # of Adam, PyTorch's own
POWER = 30   # iterations towards a first singular vector


def loss_of(head: nn.Module) -> Callable[[State, Tensor, Tensor], Tensor]:
    """A function ``(parameters, inputs, labels) -> mean cross-entropy``; labels may be probabilities."""
    return lambda parameters, x, y: F.cross_entropy(functional_call(head, parameters, (x,)), y)


def gradient(head: nn.Module, x: Tensor, y: Tensor) -> State:
    """The gradient of one step on inputs ``B x C x H x W`` and labels ``B``, by parameter name."""
    return grad(loss_of(head))({name: p.detach() for name, p in head.named_parameters()}, x, y)


def epoch_update(head: nn.Module, x: Tensor, y: Tensor, lr: float, batch: int) -> State:
    """The change of the head over one epoch of SGD, divided by ``-lr``: the sum of its steps' gradients.

    With a single batch this is the batch's gradient. It is differentiable in ``x``.

    Args:
        x, y: inputs and labels, in the order in which they are trained on.
        batch: images in a step.
    """
    now = {name: p.detach() for name, p in head.named_parameters()}
    total = {name: torch.zeros_like(value) for name, value in now.items()}
    for part, labels in zip(x.split(batch), y.split(batch), strict=True):
        slope = grad(loss_of(head))(now, part, labels)
        now = {name: value - lr * slope[name] for name, value in now.items()}
        total = {name: value + slope[name] for name, value in total.items()}
    return total


def adam_update(head: nn.Module, x: Tensor, y: Tensor, rates: list[float], batch: int, eps: float = 1e-7) -> State:
    """``sent - upload`` of a client that trains by Adam (Kingma and Ba 2015, arXiv 1412.6980), without dropout.

    It is differentiable in ``x``: the steps are unrolled. Every epoch takes the images in the order given.

    Args:
        x, y: inputs ``B x C x H x W`` and labels ``B``.
        rates: the learning rate of each step.
        batch: images in a step.
        eps: Adam's, which ``update.py`` sets to 1e-7.
    """
    sent = {name: p.detach() for name, p in head.named_parameters()}
    total = {name: torch.zeros_like(value) for name, value in sent.items()}
    first, second = dict(total), dict(total)
    parts = list(zip(x.split(batch), y.split(batch), strict=True))
    for step, rate in enumerate(rates, 1):
        now = {name: value - total[name] for name, value in sent.items()}
        slope = grad(loss_of(head))(now, *parts[(step - 1) % len(parts)])
        for name, value in slope.items():
            first[name] = BETA1 * first[name] + (1 - BETA1) * value
            second[name] = BETA2 * second[name] + (1 - BETA2) * value.square()
            # The root has no slope at 0, where a dead unit's gradient is.
            root = ((second[name] / (1 - BETA2 ** step)).clamp_min(1e-30)).sqrt()
            total[name] = total[name] + rate * first[name] / (1 - BETA1 ** step) / (root + eps)
    return total


def of_upload(sent: State, arrived: State, lr: float, clipped: bool) -> State:
    """Return the sum of gradients behind an upload, ``(sent - arrived / s) / lr``, in single precision.

    Args:
        sent, arrived: the parameters that the client started from, and those that arrived, in double precision.
        lr: size of the client's steps.
        clipped: whether the client's parameters were scaled as one vector, by s. Most parameters hardly move in a
            step, so s is the median of ``arrived / sent``, weighted by ``|sent|``: the least absolute deviation.
    """
    scale = 1.0
    if clipped:
        before, after = (torch.cat([state[name].flatten() for name in sent]) for state in (sent, arrived))
        ratio, order = (after / before).nan_to_num(0.0).sort()
        weight = before.abs()[order].cumsum(0)
        scale = float(ratio[torch.searchsorted(weight, weight[-1] / 2)].clamp(1e-6, 1))
    return {name: ((value - arrived[name] / scale) / lr).float() for name, value in sent.items()}


def labels_of(observed: State, count: int, steps: int = 1, layer: str = "output.bias") -> Tensor:
    """The labels of the images behind an observed gradient, or behind the sum of several steps' gradients.

    With one image, the label is the only negative entry of the last bias's gradient, ``p - onehot`` (iDLG,
    Zhao et al. 2020, arXiv 2001.02610). With several, the most negative entry is the first label. Each image
    lowers its entry by ``steps / count``, so that much is added back before the next label is read (after
    Wainakh et al. 2021, arXiv 2105.09369).

    Args:
        observed: the gradient, by parameter name.
        count: how many images.
        steps: how many steps share them out.
        layer: name of the last layer's bias.

    Returns:
        ``count`` labels in ascending order, repeated where several images have the same.
    """
    left, labels = observed[layer].clone(), []
    for _ in range(count):
        labels.append(int(left.argmin()))
        left[labels[-1]] += steps / count
    return torch.tensor(sorted(labels))


def dense_input(observed: State, layer: str) -> Tensor:
    """The input of a dense layer for one image (Phong et al., IEEE TIFS 2018), exact without noise.

    It follows from ``dL/dW = (dL/db) input^T``: with a 1 appended to the input, ``[dL/dW, dL/db]`` has rank 1.
    Under noise its first singular vectors are used, by power iterations from ``dL/db``.

    Args:
        observed: the gradient of one image.
        layer: name of the layer, whose ``.weight`` is ``M x D`` and whose ``.bias`` is ``M``.

    Returns:
        The input, ``D`` values.
    """
    weight, bias = observed[f"{layer}.weight"].double(), observed[f"{layer}.bias"].double()
    whole, units = torch.cat([weight, bias[:, None]], 1), bias
    for _ in range(POWER):
        units = whole @ (units @ whole)
        units = units / units.norm()
    return ((units @ weight) / (units @ bias)).float()


def total_variation(x: Tensor) -> Tensor:
    """Mean absolute difference of neighbouring pixels, for each image: ``... x C x H x W -> ...``."""
    down, right = x.diff(dim=-2).abs().mean((-3, -2, -1)), x.diff(dim=-1).abs().mean((-3, -2, -1))
    return down + right


def cosine_distance(one: State, other: State) -> Tensor:
    """``1 - <a, b> / (|a| |b|)`` of two gradients, each taken as one long vector."""
    zero = torch.zeros(())
    dot = sum(((value * other[name]).sum() for name, value in one.items()), zero)
    sizes = [sum((value.square().sum() for value in state.values()), zero) for state in (one, other)]
    return 1 - dot / (sizes[0] * sizes[1]).sqrt().clamp_min(1e-20)


def squared_distance(one: State, other: State) -> Tensor:
    """``|a - b|^2`` of two gradients, each taken as one long vector."""
    return sum(((value - other[name]).square().sum() for name, value in one.items()), torch.zeros(()))


def invert(change: Callable[[Tensor, Tensor], State], observed: State, labels: Tensor, start: Tensor,
           iterations: int, tv: float, bounded: bool, lr: float = 0.1) -> tuple[Tensor, Tensor]:
    """Minimise cosine distance + total variation by signed Adam (Geiping et al. 2020, arXiv 2003.14053).

    Args:
        change: inputs ``B x C x H x W`` and labels ``B`` -> the gradient or update that they would cause.
        observed: the gradients or updates to match, ``P x ...`` for each parameter.
        labels: ``P x B``.
        start: where the search starts, ``R x P x B x C x H x W``.
        tv: weight of total variation.
        bounded: True keeps the inputs in [0, 1], for images; False is for latents.

    Returns:
        The inputs, ``R x P x B x C x H x W``, and their objective, ``R x P``. Each problem's best
        restart comes first.
    """
    restarts, problems = start.shape[:2]
    x = start.flatten(0, 1).clone().requires_grad_()
    many = {name: value.repeat(restarts, *[1] * (value.ndim - 1)) for name, value in observed.items()}
    y = labels.repeat(restarts, 1)

    def objective(x: Tensor, y: Tensor, observed: State) -> Tensor:
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
    """Sort each problem's restarts by value, the lowest first: ``R x P x ...`` and ``R x P``."""
    order = value.argsort(0)
    index = order.reshape(*order.shape, *[1] * (found.ndim - 2)).expand_as(found)
    return found.gather(0, index), value.gather(0, order)


def deep_leakage(head: nn.Module, observed: State, count: int, classes: int, start: Tensor,
                 iterations: int) -> tuple[Tensor, float]:
    """DLG: search inputs and soft labels together by L-BFGS (Zhu et al. 2019, arXiv 1906.08935).

    Args:
        observed: the gradient of one problem.
        count: how many images are behind it, B.
        start: where the search starts, ``B x C x H x W``.

    Returns:
        The inputs, and the squared distance of their gradient from the observed one; infinite if the search
        diverged.
    """
    x = start.clone().requires_grad_()
    y = torch.zeros(count, classes, requires_grad=True)
    parameters = {name: p.detach() for name, p in head.named_parameters()}
    optimizer = torch.optim.LBFGS([x, y], lr=1.0, max_iter=iterations, history_size=100,
                                  tolerance_grad=0, tolerance_change=0, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = squared_distance(grad(loss_of(head))(parameters, x, y.softmax(1)), observed)
        value.backward()
        return value

    value = float(optimizer.step(closure).detach())
    final = float(closure().detach())
    return x.detach(), final if final == final and value == value else float("inf")


def from_features(features: Callable[[Tensor], Tensor], goal: Tensor, start: Tensor, iterations: int,
                  tv: float, bounded: bool, lr: float = 0.05) -> tuple[Tensor, Tensor]:
    """Search inputs with given features: minimise ``|f(x) - goal|^2 / |goal|^2 + tv * TV(x)`` by Adam.

    Args:
        goal: the features to reach, ``P x D``.
        start: where the search starts, ``R x P x C x H x W``.
        tv, bounded: as in ``invert``.

    Returns:
        The inputs, ``R x P x C x H x W``, and their objective, ``R x P``. Each problem's best restart comes
        first.
    """
    restarts, problems = start.shape[:2]
    x = start.flatten(0, 1).clone().requires_grad_()
    goal = goal.repeat(restarts, 1)
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
