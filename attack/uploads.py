"""What a real upload says by itself: the classes of its client's images, and the gradients behind Adam's steps.

An image pulls the last layer's bias and weights up in its own class and down in all others, since the gradient of
the cross-entropy is ``p - onehot``. Whatever the optimiser and the number of steps, a class that a client does not
have is only ever pulled down (after Wainakh et al. 2021, arXiv 2105.09369, who count labels behind one gradient).

A step of Adam is the learning rate times ``g / (|g| + eps)``. This is no mere sign: the distance from the full
step is about ``eps / |g|``, and float32 keeps enough of it to give g back, where g is small enough.
"""
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from server.base import State

BIAS, WEIGHT = "classifier.output.bias", "classifier.output.weight"


def class_scores(sent: State, upload: State) -> Tensor:
    """How strongly an update speaks for each class, ``num_classes``: the larger, the likelier.

    The bias's update and the sum over a class's weights' updates, each divided by its largest value. The inputs of
    the last layer are not negative (ReLU), so that both have the same sign.
    """
    bias = upload[BIAS] - sent[BIAS]
    weight = (upload[WEIGHT] - sent[WEIGHT]).sum(1)
    return torch.stack([part / part.abs().max().clamp_min(1e-30) for part in (bias, weight)]).sum(0)


def owned_classes(scores: Tensor) -> Tensor:
    """The classes above the widest gap between sorted scores: bool, ``num_classes``. At least one is left out."""
    ordered = scores.sort(descending=True).values
    return scores >= ordered[(ordered[:-1] - ordered[1:]).argmax()]


def rates(options: Mapping[str, Any], epochs: int, images: int, batch: int, done: int) -> list[float]:
    """The learning rates of the head in a client's round, step by step, as ``Trainer.set_lr`` sets them.

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
        """The gradient, and its relative error at most as float32 rounds the upload.

        Both have the parameters' shape, in double precision. Where the error is near 1, nothing is known.
        """
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
