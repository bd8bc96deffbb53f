"""Images apart: the inputs of a dense layer behind one gradient of several images.

The gradient of a dense layer's weights is ``sum_i d_i f_i^T``, and of its biases ``sum_i d_i``. This is a matrix
of rank B, where f_i is the layer's input for image i, with a 1 appended. Its row space holds every f_i, and all
their mixtures. What tells them apart: inputs behind a ReLU are never negative and often exactly 0, and mixtures
rarely are. So an f_i is often a corner of {v in the row space : v >= 0, last entry 1}. Linear programs find
them.

Dropout behind the layer only changes d_i, which is not used. SPEAR (Dimitrov et al. 2024, arXiv 2403.03945) parts
the images by zeros of d_i instead. A prototype of that found eight images, but not sixteen: many mixtures had more
zeros than the images themselves. Why was not examined; images of one class may have nearly the same d_i.
"""
import time

import numpy as np
import torch
from scipy.optimize import linprog
from torch import Tensor

SLACK = 0.003        # how negative an input may be, where a typical one is 0.3: the gradient is rounded
KNOWN = 0.1          # relative error up to which an entry of the gradient is used
SHARPEN = (0.006, 0.0047, 0.0036, 0.0028, 0.0022, 0.0017, 0.0013, 0.001)   # what counts as 0, ever less


def inputs(gradient: Tensor, error: Tensor, count: int, seconds: float) -> Tensor:
    """The inputs of a dense layer.

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
    """An orthonormal basis of the row space of rank ``rank``, ``rank x D``; unknown entries are filled in."""
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
        """Linear programs until as many corners are found as there are dimensions, and some more."""
        rank, end, extra, tries = len(self.basis), time.monotonic() + seconds, 0, 0
        while extra < 2 * rank and tries < 4 * rank + 8 and time.monotonic() < end:
            extra, tries = extra + (len(self.found) >= rank), tries + 1
            direction = self.direction()
            for sign in (1, -1):
                if (corner := self.corner(sign * direction)) is not None and not self.add(self.sharpened(corner)):
                    self.add(corner)

    def direction(self) -> np.ndarray:
        """A random direction; while corners are missing, one in which those found all are at 0."""
        drawn = self.random.standard_normal(len(self.basis))
        if 0 < len(self.found) < len(self.basis):
            span = np.linalg.qr(torch.stack(self.found).numpy().T)[0]
            drawn -= span @ (span.T @ drawn)
        return drawn

    def corner(self, direction: np.ndarray) -> Tensor | None:
        """The corner that lies farthest in a direction; None if there is none."""
        basis = self.basis.numpy()
        solved = linprog(-direction, A_ub=-basis.T, b_ub=np.full(basis.shape[1], SLACK), A_eq=basis[None, :, -1],
                         b_eq=[1.0], bounds=(None, None), method="highs", options={"time_limit": 20.0})
        return None if solved.status else torch.from_numpy(solved.x)

    def sharpened(self, q: Tensor) -> Tensor:
        """A corner without the slack: least squares over the entries that are nearly 0, again and again."""
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
        """Corners by number of zeros: one that is an image's has more of them than a corner must have."""
        return [self.found[i] for i in np.argsort(self.zeros)[::-1]]
