"""What a real upload says by itself: its client's classes, the gradients behind Adam's steps, and separate images.

An image pulls the last layer's bias and weights up in its own class and down in all others. So a class that a
client does not have is only ever pulled down (after Wainakh et al. 2021, arXiv 2105.09369).

A step of Adam is the learning rate times ``g / (|g| + eps)``. The distance from the full step is about
``eps / |g|``, and float32 keeps enough of it to give g back, where g is small enough.

The gradient of a dense layer's weights is ``sum_i d_i f_i^T``, with f_i the layer's input for image i and a 1
appended. Its row space holds every f_i. Inputs behind a ReLU are never negative and often exactly 0, and mixtures
rarely are. So an f_i is often a corner of {v in the row space : v >= 0, last entry 1}, which linear programs find.
SPEAR (Dimitrov et al. 2024, arXiv 2403.03945) separates images by zeros of d_i instead.
"""
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from scipy.optimize import linprog
from torch import Tensor

from server.base import State

BIAS, WEIGHT = "classifier.output.bias", "classifier.output.weight"
SLACK = 0.003        # how negative an input may be, where a typical one is 0.3: the gradient is rounded
KNOWN = 0.1          # relative error up to which an entry of the gradient is used
SHARPEN = (0.006, 0.0047, 0.0036, 0.0028, 0.0022, 0.0017, 0.0013, 0.001)   # what counts as 0, ever less


def class_scores(sent: State, upload: State) -> Tensor:
    """Score how strongly an update speaks for each class: the last bias's and weights' updates, scaled."""
    bias = upload[BIAS] - sent[BIAS]
    weight = (upload[WEIGHT] - sent[WEIGHT]).sum(1)
    return torch.stack([part / part.abs().max().clamp_min(1e-30) for part in (bias, weight)]).sum(0)


def owned_classes(scores: Tensor) -> Tensor:
    """Return the classes above the widest gap between sorted scores, bool; at least one is left out."""
    ordered = scores.sort(descending=True).values
    return scores >= ordered[(ordered[:-1] - ordered[1:]).argmax()]


def rates(options: Mapping[str, Any], epochs: int, images: int, batch: int, done: int) -> list[float]:
    """Return the head's learning rates in a round, as ``Trainer.set_lr`` sets them after ``done`` steps."""
    steps = epochs * -(-images // batch)
    warm = max(options["lr_warmup"] * steps, 1)
    return [options["head_lr"] * options["lr"] * min(1.0, (k + 1) / warm) / (1 + options["lr_decay"] * (done + k))
            for k in range(steps)]


def adam_gradient(sent: Tensor, upload: Tensor, rate: float, eps: float = 1e-7) -> tuple[Tensor, Tensor]:
    """Return the gradient behind one step of Adam in double precision, and its largest relative error.

    Several steps may be taken as one with the sum of their rates. Where the error is near 1, nothing is known.
    """
    change = sent.double() - upload.double()
    moved = change.abs()
    left = (rate - moved).clamp_min(1e-9 * rate)
    largest = torch.maximum(sent.abs(), upload.abs())
    spacing = torch.nextafter(largest, torch.full_like(largest, torch.inf)) - largest
    return change.sign() * eps * moved / left, (spacing.double() / 2 + 2e-7 * rate) / left


def dense_inputs(gradient: Tensor, error: Tensor, count: int, seconds: float) -> Tensor:
    """Return at most ``count`` inputs of a dense layer behind one gradient of several images, ``N x D``.

    ``gradient`` is that of its weights, with that of the biases as last column: ``K x (D + 1)``, double; ``error``
    is its relative error. The search ends after ``seconds``.
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
