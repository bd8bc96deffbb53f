"""Losses that a method adds to its own objective: functions ``Step`` -> loss per image ``N``, or of the batch."""
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import models
from server.base import State


@dataclass(frozen=True)
class Step:
    """The input of a method's own loss, in one training step of a client."""

    model: nn.Module
    images: Tensor   # ``N x C x H x W`` in [0, 1]
    output: models.Output   # of the network for these images
    sent: State   # parameters that the client received in this round, on the device that trains
    options: Mapping[str, Any]   # all options of the run, by name


def inner_attacker(step: Step) -> Tensor:
    """Return ResSFL's loss against its inner attacker, ``N``."""
    assert isinstance(step.model, models.ResSFL) and step.output.features is not None
    return step.model.resistance(step.images, step.output.features, step.options["loss_weight"])


def proximal(step: Step) -> Tensor:
    """Return ``mu / 2 ||w - w_t||^2`` over the shared parameters (Li et al. 2020; Wei et al. 2020, eq. 5)."""
    return half_distance(step, "classifier.")


def ditto(step: Step) -> Tensor:
    """Return ``lambda / 2 ||v - w_t||^2`` over the client's own parameters v (Li et al. 2021)."""
    return half_distance(step, "personal.")


def half_distance(step: Step, prefix: str) -> Tensor:
    """Return ``--prox / 2`` times the squared distance of the parameters with a prefix to those sent."""
    now = dict(step.model.named_parameters())
    apart = torch.stack([(now[name.replace("classifier.", prefix, 1)] - value).square().sum()
                         for name, value in step.sent.items()])
    return step.options["prox"] / 2 * apart.sum()
