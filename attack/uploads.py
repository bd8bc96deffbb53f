"""Read a client's classes, the gradients behind Adam's steps, and separate images off one upload.

The gradient of a dense layer's weights is ``sum_i d_i f_i^T``, with f_i the layer's input for image i and a 1
appended. Behind a ReLU, inputs are never negative and often 0, which mixtures rarely are. So f_i is often a corner
of {v in the row space : v >= 0, last entry 1}, which linear programs find. SPEAR (Dimitrov et al. 2024, arXiv
2403.03945) separates images by zeros of d_i instead.
"""
import time

import numpy as np
import torch
from torch import Tensor

from server.base import State
from update import Training

BIAS, WEIGHT = "classifier.output.bias", "classifier.output.weight"
SLACK = 0.003        # how negative an input may be, where a typical one is 0.3: the gradient is rounded
KNOWN = 0.1          # relative error up to which an entry of the gradient is used
SHARPEN = (0.006, 0.0047, 0.0036, 0.0028, 0.0022, 0.0017, 0.0013, 0.001)   # what counts as 0, ever less


def class_scores(sent: State, upload: State) -> Tensor:
    """Score how an update speaks for each class: an image raises its own (after Wainakh et al. 2021)."""
    bias = upload[BIAS] - sent[BIAS]
    weight = (upload[WEIGHT] - sent[WEIGHT]).sum(1)
    return torch.stack([part / part.abs().max().clamp_min(1e-30) for part in (bias, weight)]).sum(0)


def owned_classes(scores: Tensor) -> Tensor:
    """Return the classes above the widest gap between sorted scores, bool; at least one is left out."""
    ordered = scores.sort(descending=True).values
    return scores >= ordered[(ordered[:-1] - ordered[1:]).argmax()]


def rates(training: Training, images: int, done: int) -> list[float]:
    """Return the learning rates of a client's round, as ``Trainer.set_lr`` sets them after ``done`` steps."""
    steps = training.steps_of(images)
    warm = max(training.lr_warmup * steps, 1)
    return [training.lr * min(1.0, (k + 1) / warm) / (1 + training.lr_decay * (done + k)) for k in range(steps)]


def adam_gradient(sent: Tensor, upload: Tensor, rate: float, eps: float = 1e-7) -> tuple[Tensor, Tensor]:
    """Return g behind ``rate * g / (|g| + eps)``, of one or more steps, and its largest relative error."""
    change = sent.double() - upload.double()
    moved = change.abs()
    left = (rate - moved).clamp_min(1e-9 * rate)
    largest = torch.maximum(sent.abs(), upload.abs())
    spacing = torch.nextafter(largest, torch.full_like(largest, torch.inf)) - largest
    return change.sign() * eps * moved / left, (spacing.double() / 2 + 2e-7 * rate) / left


def dense_inputs(gradient: Tensor, error: Tensor, count: int, seconds: float) -> Tensor:
    """Return at most ``count`` inputs of a dense layer behind one gradient of several images, ``N x D``.

    ``gradient`` is double, ``K x (D + 1)``, with the biases' as last column; ``error`` is its relative error.
    """
    alive, used = (gradient != 0).any(1), (gradient != 0).any(0)
    used[-1] = True
    rows, known = gradient[alive][:, used], (error <= KNOWN)[alive][:, used]
    if not len(rows) or not known.any(0)[-1]:
        return torch.zeros(0, gradient.shape[1] - 1)
    # Rows of one length each: an image that moves few units, and those little, is seen as well as the others.
    size = ((rows.square() * known).sum(1) / known.sum(1).clamp_min(1)).sqrt()
    basis = row_space(rows[size > 0] / size[size > 0, None], known[size > 0], count)
    values = corners(basis, seconds)
    inputs = torch.zeros(len(values), gradient.shape[1], dtype=torch.double)
    inputs[:, used] = values
    return inputs[:count, :-1].clamp_min(0).float()


def row_space(rows: Tensor, known: Tensor, rank: int, rounds: int = 30) -> Tensor:
    """Return an orthonormal basis of the row space, ``rank x D``; unknown entries are filled in."""
    filled = torch.where(known, rows, 0.0)
    for _ in range(1 if known.all() else rounds):
        u, s, v = torch.linalg.svd(filled, full_matrices=False)
        filled = torch.where(known, rows, (u[:, :rank] * s[:rank]) @ v[:rank])
    return v[:rank]


def corners(basis: Tensor, seconds: float) -> Tensor:
    """Return corners, ``N x D``, those with most zeros first: an image has more of them than a corner needs."""
    rank, end, extra, tries = len(basis), time.process_time() + seconds, 0, 0
    random = np.random.default_rng(0)
    points: list[Tensor] = []   # coordinates in the basis
    values: list[Tensor] = []
    while extra < 2 * rank and tries < 4 * rank + 8 and time.process_time() < end:
        extra, tries = extra + (len(points) >= rank), tries + 1
        direction = random.standard_normal(rank)
        if 0 < len(points) < rank:   # a direction in which the known corners are all at 0
            span = np.linalg.qr(torch.stack(points).numpy().T)[0]
            direction -= span @ (span.T @ direction)
        for corner in (farthest(basis, direction), farthest(basis, -direction)):
            tried = [] if corner is None else [sharpened(basis, corner), corner]
            point = next((q for q in tried if clearly_negative(q @ basis) <= 0.02), None)
            if point is None:
                continue
            value = point @ basis
            if all(torch.cosine_similarity(value, other, dim=0) <= 0.995 for other in values):
                points.append(point)
                values.append(value)
    zeros = [int((value.abs() < 0.02 * value.abs().mean()).sum()) for value in values]
    return torch.stack([values[i] for i in np.argsort(zeros)[::-1]]) if values else basis[:0]


def clearly_negative(value: Tensor) -> float:
    """Return the share of clearly negative entries, of which a corner has next to none; 1 if any overflowed."""
    return float((value < -0.04 * value.abs().mean()).double().mean()) if value.isfinite().all() else 1.0


def farthest(basis: Tensor, direction: np.ndarray) -> Tensor | None:
    """Return the coordinates of the corner that lies farthest in a direction; None if there is none."""
    from scipy.optimize import linprog  # slow to import

    matrix = basis.numpy()
    solved = linprog(-direction, A_ub=-matrix.T, b_ub=np.full(matrix.shape[1], SLACK), A_eq=matrix[None, :, -1],
                     b_eq=[1.0], bounds=(None, None), method="highs", options={"time_limit": 20.0})
    return None if solved.status else torch.from_numpy(solved.x)


def sharpened(basis: Tensor, q: Tensor) -> Tensor:
    """Remove a corner's slack by repeated least squares over the entries that are nearly 0."""
    for small in SHARPEN:
        weight = 1 / ((q @ basis).square() + small ** 2)
        square = (basis * weight) @ basis.T
        square += 1e-12 * square.diagonal().mean() * torch.eye(len(square), dtype=square.dtype)
        q = torch.linalg.solve(square, basis[:, -1])
        q = q / (q @ basis[:, -1])
    return q
