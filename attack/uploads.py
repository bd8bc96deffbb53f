"""What a real upload says by itself: its client's classes, the gradients behind Adam's steps, and separate images.

An image pulls the last layer's bias and weights up in its own class and down in all others, since the gradient of
the cross-entropy is ``p - onehot``. Whatever the optimiser and the number of steps, a class that a client does not
have is only ever pulled down (after Wainakh et al. 2021, arXiv 2105.09369, who count labels behind one gradient).

A step of Adam is the learning rate times ``g / (|g| + eps)``. This is no mere sign: the distance from the full
step is about ``eps / |g|``, and float32 keeps enough of it to give g back, where g is small enough.

The gradient of a dense layer's weights is ``sum_i d_i f_i^T``, and of its biases ``sum_i d_i``. This is a matrix
of rank B, where f_i is the layer's input for image i, with a 1 appended. Its row space holds every f_i. Inputs
behind a ReLU are never negative and often exactly 0, and mixtures rarely are. So an f_i is often a corner of
{v in the row space : v >= 0, last entry 1}. Linear programs find them. Dropout behind the layer only changes d_i,
which is not used. SPEAR (Dimitrov et al. 2024, arXiv 2403.03945) separates the images by zeros of d_i instead.
"""
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from scipy.optimize import linprog
from torch import Tensor, nn
from torch.func import grad

from attack.gradients import loss_of, parameters_of
from server.base import State

BIAS, WEIGHT = "classifier.output.bias", "classifier.output.weight"
BETA1, BETA2 = 0.9, 0.999   # of Adam, PyTorch's own
SLACK = 0.003        # how negative an input may be, where a typical one is 0.3: the gradient is rounded
KNOWN = 0.1          # relative error up to which an entry of the gradient is used
SHARPEN = (0.006, 0.0047, 0.0036, 0.0028, 0.0022, 0.0017, 0.0013, 0.001)   # what counts as 0, ever less


def class_scores(sent: State, upload: State) -> Tensor:
    """Score how strongly an update speaks for each class, ``num_classes``: the larger, the likelier.

    The bias's update and the sum over a class's weights' updates, each divided by its largest value. The inputs of
    the last layer are not negative (ReLU), so that both have the same sign.
    """
    bias = upload[BIAS] - sent[BIAS]
    weight = (upload[WEIGHT] - sent[WEIGHT]).sum(1)
    return torch.stack([part / part.abs().max().clamp_min(1e-30) for part in (bias, weight)]).sum(0)


def owned_classes(scores: Tensor) -> Tensor:
    """Return the classes above the widest gap between sorted scores, bool; at least one is left out."""
    ordered = scores.sort(descending=True).values
    return scores >= ordered[(ordered[:-1] - ordered[1:]).argmax()]


def rates(options: Mapping[str, Any], epochs: int, images: int, batch: int, done: int) -> list[float]:
    """Return the head's learning rates in a client's round, step by step, as ``Trainer.set_lr`` sets them.

    Args:
        options: of the run.
        done: steps that the client has made in earlier rounds.
    """
    steps = epochs * -(-images // batch)
    warm = max(options["lr_warmup"] * steps, 1)
    return [options["head_lr"] * options["lr"] * min(1.0, (k + 1) / warm) / (1 + options["lr_decay"] * (done + k))
            for k in range(steps)]


class AdamStep:
    """The update of a parameter whose gradient is not zero in a single one of a round's steps.

    With one step in the round, this is each parameter. With several, it is a unit that was dropped, or dead, in
    all steps but one. Later steps still move it, by Adam's momentum.

    Args:
        rates: the learning rate of each step.
        step: which one had a gradient, from 0.
        eps: Adam's.
    """

    def __init__(self, rates: list[float], step: int = 0, eps: float = 1e-7) -> None:
        s = np.arange(step, len(rates))
        mean = 0.1 * 0.9 ** (s - step) / (1 - 0.9 ** (s + 1))
        root = np.sqrt(0.001 * 0.999 ** (s - step) / (1 - 0.999 ** (s + 1)))
        self.shares, self.knees = np.asarray(rates)[s] * mean / root, eps / root
        self.full = float(self.shares.sum())   # the update of a large gradient
        # From the log odds of the update to the log of the gradient: nearly a straight line.
        self.sizes = np.geomspace(1e-14, 1e2, 8000)
        moved = (self.shares * self.sizes[:, None] / (self.sizes[:, None] + self.knees)).sum(1)
        left = (self.shares * self.knees / (self.sizes[:, None] + self.knees)).sum(1)
        self.odds = np.log(moved / left)

    def gradient(self, sent: Tensor, upload: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gradient in double precision, and its largest relative error; near 1, nothing is known."""
        change = sent.double() - upload.double()
        moved = change.abs()
        left = (self.full - moved).clamp_min(1e-9 * self.full)
        odds = (moved.clamp_min(1e-300) / left).log().numpy()
        size = torch.from_numpy(np.exp(np.interp(odds, self.odds, np.log(self.sizes))))
        size = torch.where(moved == 0, 0.0, size)
        largest = torch.maximum(sent.abs(), upload.abs())
        spacing = torch.nextafter(largest, torch.full_like(largest, torch.inf)) - largest
        error = (spacing.double() / 2 + 2e-7 * self.full) / left
        return change.sign() * size, error


def adam_update(head: nn.Module, x: Tensor, y: Tensor, rates: list[float], batch: int, eps: float = 1e-7) -> State:
    """Return ``sent - upload`` of a client that trains by Adam (Kingma and Ba 2015), without dropout.

    It is differentiable in ``x``: the steps are unrolled. Every epoch takes the images in the order given.

    Args:
        x, y: inputs ``B x C x H x W`` and labels ``B``.
        rates: the learning rate of each step.
        batch: images in a step.
        eps: Adam's, which ``update.py`` sets to 1e-7.
    """
    sent = parameters_of(head)
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


def dense_inputs(gradient: Tensor, error: Tensor, count: int, seconds: float) -> Tensor:
    """Return the inputs of a dense layer behind one gradient of several images.

    Args:
        gradient: of its weights, with that of the biases as last column: ``K x (D + 1)``, double.
        error: the relative error of each entry.
        count: how many images are behind it, B.
        seconds: how long to search at most.

    Returns:
        At most B inputs, ``N x D``, those with most zeros first. Images that hardly change it are missing.
    """
    alive, used = (gradient != 0).any(1), (gradient != 0).any(0)
    used[-1] = True
    rows, known = gradient[alive][:, used], (error <= KNOWN)[alive][:, used]
    if not len(rows) or not known.any(0)[-1]:
        return torch.zeros(0, gradient.shape[1] - 1)
    # Rows of one length each: an image that moves few units, and those little, is seen as well as the others.
    size = ((rows.square() * known).sum(1) / known.sum(1).clamp_min(1)).sqrt()
    rows, known = rows[size > 0] / size[size > 0, None], known[size > 0]
    basis = row_space(rows, known, min(count, len(rows)))
    corners = Corners(basis)
    corners.search(seconds)
    found = torch.zeros(len(corners.found), gradient.shape[1], dtype=torch.double)
    if len(found):
        found[:, used] = torch.stack(corners.best()) @ basis
    return found[:count, :-1].clamp_min(0).float()


def row_space(rows: Tensor, known: Tensor, rank: int, rounds: int = 30) -> Tensor:
    """Return an orthonormal basis of the row space, ``rank x D``; unknown entries are filled in."""
    filled = torch.where(known, rows, 0.0)
    for _ in range(1 if known.all() else rounds):
        u, s, v = torch.linalg.svd(filled, full_matrices=False)
        filled = torch.where(known, rows, (u[:, :rank] * s[:rank]) @ v[:rank])
    return v[:rank]


class Corners:
    """Corners of {q : q basis >= 0, last entry of q basis = 1}, and how many entries of ``q basis`` are 0."""

    def __init__(self, basis: Tensor, seed: int = 0) -> None:
        self.basis, self.random = basis, np.random.default_rng(seed)
        self.found: list[Tensor] = []
        self.zeros: list[int] = []

    def search(self, seconds: float) -> None:
        """Solve linear programs until as many corners are found as there are dimensions, and some more."""
        rank, end, extra, tries = len(self.basis), time.monotonic() + seconds, 0, 0
        while extra < 2 * rank and tries < 4 * rank + 8 and time.monotonic() < end:
            extra, tries = extra + (len(self.found) >= rank), tries + 1
            direction = self.direction()
            for sign in (1, -1):
                if (corner := self.corner(sign * direction)) is not None and not self.add(self.sharpened(corner)):
                    self.add(corner)

    def direction(self) -> np.ndarray:
        """Draw a direction; while corners are missing, one in which those found all are at 0."""
        drawn = self.random.standard_normal(len(self.basis))
        if 0 < len(self.found) < len(self.basis):
            span = np.linalg.qr(torch.stack(self.found).numpy().T)[0]
            drawn -= span @ (span.T @ drawn)
        return drawn

    def corner(self, direction: np.ndarray) -> Tensor | None:
        """Return the corner that lies farthest in a direction; None if there is none."""
        basis = self.basis.numpy()
        solved = linprog(-direction, A_ub=-basis.T, b_ub=np.full(basis.shape[1], SLACK), A_eq=basis[None, :, -1],
                         b_eq=[1.0], bounds=(None, None), method="highs", options={"time_limit": 20.0})
        return None if solved.status else torch.from_numpy(solved.x)

    def sharpened(self, q: Tensor) -> Tensor:
        """Remove a corner's slack by repeated least squares over the entries that are nearly 0."""
        for small in SHARPEN:
            weight = 1 / ((q @ self.basis).square() + small ** 2)
            square = (self.basis * weight) @ self.basis.T
            square += 1e-12 * square.diagonal().mean() * torch.eye(len(square), dtype=square.dtype)
            q = torch.linalg.solve(square, self.basis[:, -1])
            q = q / (q @ self.basis[:, -1])
        return q

    def add(self, q: Tensor) -> bool:
        """Keep a corner that is new; False if it is negative somewhere, and so none."""
        value = q @ self.basis
        small = 0.02 * value.abs().mean()
        if not value.isfinite().all() or (value < -2 * small).double().mean() > 0.02:
            return False
        if any(torch.cosine_similarity(value, other @ self.basis, dim=0) > 0.995 for other in self.found):
            return True
        self.found.append(q)
        self.zeros.append(int((value.abs() < small).sum()))
        return True

    def best(self) -> list[Tensor]:
        """Return corners by number of zeros: an image's corner has more of them than a corner must have."""
        return [self.found[i] for i in np.argsort(self.zeros)[::-1]]
