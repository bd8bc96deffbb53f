"""Gradient inversion: from a client's gradient or update back to the input of its head, an image or a latent.

One gradient or update is one problem. Several are solved as one batch. In shapes, R is the number of restarts, P
of problems, and B of images behind one gradient.
"""
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from attack import decoders, newton
from attack.adversaries import Adversary, flatten, held, moment_distance, posterior_in_parts, shadow_encoder
from server.base import State
from utils import InputError


def one_by_one(function: Callable) -> Callable:
    """Do the work of ``vmap`` in a loop, in which any model can be called."""
    def take(part: Any, i: int) -> Any:
        return {name: value[i] for name, value in part.items()} if isinstance(part, dict) else part[i]
    return lambda first, *rest: torch.stack([function(*(take(part, i) for part in (first, *rest)))
                                             for i in range(len(first))])


def parameters_of(head: nn.Module) -> State:
    """Return the parameters by name, without the buffers of the state dict."""
    return {name: value.detach() for name, value in head.named_parameters()}


def output_of(head: nn.Module) -> str:
    """Return the name of the layer that gives the class scores: ``output``, unless the module names another."""
    return getattr(head, "output_layer", "output")


def gradient(head: nn.Module, x: Tensor, y: Tensor, at: State | None = None) -> State:
    """Return the gradient of the mean cross-entropy on ``B x C x H x W``; labels may be probabilities."""
    return grad(lambda parameters: F.cross_entropy(functional_call(head, parameters, (x,)), y))(
        parameters_of(head) if at is None else at)


def epoch_update(head: nn.Module, x: Tensor, y: Tensor, lr: float, batch: int) -> State:
    """Return the sum of the gradients of one epoch of SGD in the given order, differentiable in ``x``."""
    now = parameters_of(head)
    total = {name: torch.zeros_like(value) for name, value in now.items()}
    for part, labels in zip(x.split(batch), y.split(batch), strict=True):
        slope = gradient(head, part, labels, now)
        now = {name: value - lr * slope[name] for name, value in now.items()}
        total = {name: value + slope[name] for name, value in total.items()}
    return total


def labels_of(observed: State, count: int, steps: int = 1, output: str = "output") -> Tensor:
    """Return the labels behind the sum of ``steps`` gradients over ``count`` images, in ascending order.

    The gradient of the last bias is the probabilities less the one-hot label, so one image's label has its only
    negative value, and the largest; without a bias, the rows of the weights have these sizes (iDLG, Zhao et al.
    2020, arXiv 2001.02610). Without a gradient of that layer, labels are unknown: -1.
    """
    if f"{output}.weight" not in observed:
        return torch.full((count,), -1)
    if f"{output}.bias" not in observed:
        if count > 1:
            raise InputError(f"the last layer ({output}) has no bias, so only one image's label can be read off")
        return observed[f"{output}.weight"].flatten(1).norm(dim=1).argmax()[None]
    left, labels = observed[f"{output}.bias"].clone(), []   # each image lowers its own (Wainakh et al. 2021)
    for _ in range(count):
        labels.append(int(left.argmin()))
        left[labels[-1]] += steps / count
    return torch.tensor(sorted(labels))


def total_variation(x: Tensor) -> Tensor:
    """Return the mean absolute difference of neighbouring pixels of each image: ``... x C x H x W -> ...``."""
    down, right = x.diff(dim=-2).abs().mean((-3, -2, -1)), x.diff(dim=-1).abs().mean((-3, -2, -1))
    return down + right


def cosine_distance(one: State, other: State) -> Tensor:
    """Return ``1 - <a, b> / (|a| |b|)`` of two gradients, each taken as one long vector."""
    zero = torch.zeros(())
    dot = sum(((value * other[name]).sum() for name, value in one.items()), zero)
    sizes = [sum((value.square().sum() for value in state.values()), zero) for state in (one, other)]
    return 1 - dot / (sizes[0] * sizes[1]).sqrt().clamp_min(1e-20)


def best_first(found: Tensor, value: Tensor, restarts: int) -> tuple[Tensor, Tensor]:
    """Sort each problem's restarts by value, the lowest first: ``RP x ...`` and ``RP`` to ``R x P``."""
    found, value = found.unflatten(0, (restarts, -1)), value.unflatten(0, (restarts, -1))
    order = value.argsort(0)
    index = order.reshape(*order.shape, *[1] * (found.ndim - 2)).expand_as(found)
    return found.gather(0, index), value.gather(0, order)


def invert(change: Callable[[Tensor, Tensor], State], observed: State, labels: Tensor, start: Tensor,
           iterations: int, tv: float, bounded: bool,
           over: Callable[[Callable], Callable] = vmap) -> tuple[Tensor, Tensor]:
    """Minimise cosine distance + total variation by signed Adam (Geiping et al. 2020, arXiv 2003.14053).

    ``change`` returns the gradient or update of inputs ``B x C x H x W`` with labels ``B``. It is to match
    ``observed``, ``P x ...`` by name. Labels are ``P x B`` and starts ``R x P x B x C x H x W``.
    Returns the inputs and their objectives ``R x P``, each problem's best restart first.

    Args:
        tv: the weight of total variation.
        bounded: True if inputs stay in [0, 1].
        over: turns a function of one problem into one of many; ``one_by_one`` for models that ``vmap`` refuses.
    """
    restarts = len(start)
    x = start.flatten(0, 1).clone().requires_grad_()
    many = {name: value.repeat(restarts, *[1] * (value.ndim - 1)) for name, value in observed.items()}
    y = labels.repeat(restarts, 1)

    def objective(x: Tensor, y: Tensor, observed: State) -> Tensor:
        return cosine_distance(change(x, y), observed) + tv * total_variation(x).mean()

    drops = [round(iterations * share) for share in (0.375, 0.625, 0.875)]
    value = descend(lambda: over(objective)(x, y, many), x, iterations, 0.1, drops=drops, bounded=bounded,
                    signed=True)
    return best_first(x.detach(), value.nan_to_num(torch.inf), restarts)


def deep_leakage(head: nn.Module, observed: State, start: Tensor, iterations: int) -> tuple[Tensor, float]:
    """Search an input and a soft label by L-BFGS (DLG, Zhu et al. 2019); return the input and its error."""
    x = start.clone().requires_grad_()
    y = torch.zeros(1, len(observed[f"{output_of(head)}.weight"]), requires_grad=True)
    optimizer = torch.optim.LBFGS([x, y], lr=1.0, max_iter=iterations, history_size=100,
                                  tolerance_grad=0, tolerance_change=0, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        made = gradient(head, x, y.softmax(1))
        value = sum(((made[name] - observed[name]).square().sum() for name in made), torch.zeros(()))
        value.backward()
        return value

    value = float(optimizer.step(closure).detach())
    final = float(closure().detach())
    return x.detach(), final if final == final and value == value else float("inf")


def descend(objective: Callable[[], Tensor], x: Tensor, iterations: int, lr: float, *,
            drops: Sequence[int] | None = None, bounded: bool = True, signed: bool = False) -> Tensor:
    """Minimise the objectives ``N`` of independent searches over ``x`` by Adam, in place; return the last ones.

    The learning rate falls to 0 by a cosine, or tenfold after each of the steps ``drops``. ``bounded`` keeps x in
    [0, 1]; ``signed`` uses the gradient's signs alone.
    """
    optimizer = torch.optim.Adam([x], lr)
    schedule = (torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iterations) if drops is None
                else torch.optim.lr_scheduler.MultiStepLR(optimizer, drops, 0.1))
    for _ in range(iterations):
        x.grad, = torch.autograd.grad(objective().sum(), x)
        if signed:
            x.grad.sign_()
        optimizer.step()
        schedule.step()
        if bounded:
            x.data.clamp_(0, 1)
    with torch.no_grad():
        return objective()


def from_features(features: Callable[[Tensor], Tensor], goal: Tensor, start: Tensor, iterations: int,
                  tv: float, bounded: bool, lr: float = 0.05) -> tuple[Tensor, Tensor]:
    """Minimise ``|f(x) - goal|^2 / |goal|^2 + tv * TV(x)`` over ``R x P x C x H x W``; returns as ``invert``."""
    x, goal = start.flatten(0, 1).clone().requires_grad_(), goal.repeat(len(start), 1)
    scale = goal.square().sum(1).clamp_min(1e-12)

    def objective() -> Tensor:
        return (features(x) - goal).square().sum(1) / scale + tv * total_variation(x)
    return best_first(x.detach(), descend(objective, x, iterations, lr, bounded=bounded), len(start))


# Attacks: (adversary, gradients of the head or its update, N) -> images R x N x C x H x W, labels N.

def single_labels(observed: list[State], output: str = "output") -> Tensor:
    """Return the label behind each gradient of one image, ``N``."""
    return torch.cat([labels_of(gradient, 1, output=output) for gradient in observed])


def dlg(adversary: Adversary, observed: list[State], count: int) -> tuple[Tensor, Tensor]:
    """Run ``deep_leakage`` on each image's gradient."""
    head, budget = held(adversary.knowledge.next_head), adversary.budget
    starts = adversary.random_inputs(count, *adversary.knowledge.image_shape)
    tried = [deep_leakage(head, gradient, start[None], budget.iterations)
             for restart in starts for gradient, start in zip(observed, restart, strict=True)]
    inputs, distances = zip(*tried, strict=True)
    found, _ = best_first(torch.cat(inputs).nan_to_num(0.5), torch.tensor(distances), budget.restarts)
    labels = single_labels(observed, output_of(head))
    return adversary.decode_inputs(found, labels), labels


def matched(adversary: Adversary, change: Callable[[Tensor, Tensor], State], observed: list[State],
            labels: Tensor) -> tuple[Tensor, Tensor]:
    """Run ``invert`` on what was observed of images with labels ``P x B``."""
    knowledge = adversary.knowledge
    start = adversary.random_inputs(*labels.shape, *knowledge.image_shape)
    together = {name: torch.stack([update[name] for update in observed]) for name in observed[0]}
    tv = 0.0 if knowledge.has_encoder else adversary.budget.tv   # latents are not smooth
    inputs, _ = invert(change, together, labels, start, adversary.budget.iterations, tv, not knowledge.has_encoder,
                       over=getattr(knowledge.next_head, "over", vmap))
    return adversary.decode_inputs(inputs.flatten(1, 2), labels.flatten()), labels.flatten()


def cosine_tv(adversary: Adversary, observed: list[State], count: int) -> tuple[Tensor, Tensor]:
    """Run ``invert`` on each image's gradient."""
    head = held(adversary.knowledge.next_head)
    return matched(adversary, lambda x, y: gradient(head, x, y), observed,
                   single_labels(observed, output_of(head))[:, None])


def invert_update(adversary: Adversary, observed: list[State], count: int, steps: int) -> tuple[Tensor, Tensor]:
    """Run ``invert`` on one update of ``count`` images of each client, by simulating the same steps."""
    head, budget = held(adversary.knowledge.next_head), adversary.budget
    labels = labels_of(observed[0], budget.clients * count, min(steps, count), output_of(head))
    each = count if steps > 1 else len(labels)   # all clients' first steps together are one step on all images

    def change(x: Tensor, y: Tensor) -> State:
        updates = [epoch_update(head, images, labels, budget.lr, -(-each // steps))
                   for images, labels in zip(x.split(each), y.split(each), strict=True)]
        return {name: torch.stack([update[name] for update in updates]).sum(0) for name in updates[0]}
    return matched(adversary, change, observed, labels[None])


def from_dense(layers: nn.Module, name: str, observed: list[State], start: Tensor, iterations: int, tv: float,
               bounded: bool) -> Tensor:
    """Recover the exact input of the first dense layer, then search images that lead to it."""
    before, dense = newton.before_dense(layers)
    goal = torch.stack([newton.dense_input(gradient, f"{name}.{dense}") for gradient in observed])
    return from_features(before, goal, start, iterations, tv, bounded, lr=0.1)[0]


def analytic(adversary: Adversary, observed: list[State], count: int) -> tuple[Tensor, Tensor]:
    """Run ``from_dense`` on the head."""
    knowledge, labels = adversary.knowledge, single_labels(observed)
    found = from_dense(held(knowledge.next_head).get_submodule("features"), "features", observed,
                       adversary.random_inputs(count, *knowledge.image_shape), adversary.budget.iterations,
                       0.0 if knowledge.has_encoder else 1e-4, not knowledge.has_encoder)
    return adversary.decode_inputs(found, labels), labels


def trunk_analytic(adversary: Adversary, observed: list[State], count: int) -> tuple[Tensor, Tensor]:
    """Run ``from_dense`` on an encoder's shared trunk: its input is the image itself."""
    found = from_dense(held(adversary.knowledge.next_trunk), "trunk", observed, adversary.random_images(count),
                       adversary.budget.iterations, 1e-4, True)
    return found, single_labels(observed)


def head_inputs(adversary: Adversary, observed: list[State]) -> Tensor:
    """Recover the head's inputs by ``newton.head_input``, ``N x C x H x W``."""
    knowledge, budget = adversary.knowledge, adversary.budget
    return newton.head_input(held(knowledge.next_head), observed, knowledge.image_shape,
                             hops=max(1, budget.iterations // 40), copies=budget.restarts)


def gauss_newton(adversary: Adversary, observed: list[State], count: int) -> tuple[Tensor, Tensor]:
    """Recover the head's inputs, exactly where the search converges."""
    found, labels = head_inputs(adversary, observed), single_labels(observed)
    return adversary.decode_inputs(found[None], labels), labels


def feature_alignment(adversary: Adversary, observed: list[State], count: int) -> tuple[Tensor, Tensor]:
    """Recover latents by ``head_inputs``, align a shadow encoder with them, and train a decoder behind it."""
    found, labels, budget = flatten(head_inputs(adversary, observed)), single_labels(observed), adversary.budget
    images, classes = adversary.public.of(labels)
    shadow = shadow_encoder(adversary.knowledge, adversary.start, images, classes, budget.epochs,
                            adversary.kl_weight, moment_distance(found, labels))
    decode = decoders.latent_decoder(*posterior_in_parts(shadow, images), images, budget.epochs)
    return decode(found)[None], labels
