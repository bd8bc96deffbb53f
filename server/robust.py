"""The published robust rules, mostly from byzfl; rules.py has their rows.

A robust rule maps the updates ``head_k - head``, ``K x P``, and the number f of clients that may be malicious to
the update ``P`` of the next head. It gives no weight to a single client: that column of ``server.csv`` is empty.
"""
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from devices import torch_rng
from server import base
from server.base import Round, Server, State, Weighting, moved, updates_of
from server.threat_aware import filtered
from utils import round_down

CHUNK = 2**16   # coordinates at a time in coordinate-wise rules: byzfl's need several copies of their input

RobustRule = Callable[[Tensor, int], Tensor]   # updates K x P, f -> update P


def of_byzfl(name: str, takes_f: bool = True, **arguments: float) -> RobustRule:
    """Return a rule of byzfl by its class name; byzfl is slow to import."""
    def rule(updates: Tensor, f: int) -> Tensor:
        import byzfl
        return getattr(byzfl, name)(*([f] if takes_f else []), **arguments)(updates)
    return rule


def by_columns(rule: RobustRule) -> RobustRule:
    """Return a coordinate-wise rule that is applied to CHUNK coordinates at a time."""
    return lambda updates, f: torch.cat([rule(part, f) for part in updates.split(CHUNK, dim=1)])


median = by_columns(of_byzfl("Median", takes_f=False))
trimmed_mean = by_columns(of_byzfl("TrMean"))
krum = of_byzfl("Krum")
multi_krum = of_byzfl("MultiKrum")
geometric_median = of_byzfl("GeometricMedian", takes_f=False, nu=1e-6, T=20)


def centered_clipping(updates: Tensor, f: int) -> Tensor:
    """Clip updates at their median norm around a centre found in three steps (Karimireddy et al. 2021,
    arXiv 2012.10333). The centre starts at the head sent, since clients start anew from it."""
    from byzfl import CenteredClipping
    tau = base.median(updates.norm(dim=1)).item()
    if tau == 0:   # most have not moved, and byzfl would divide by it
        return torch.zeros_like(updates[0])
    return CenteredClipping(L=3, tau=tau)(updates)


def nnm_trimmed_mean(updates: Tensor, f: int) -> Tensor:
    """Replace each update by the mean of its n - f nearest, itself included, then trim (Allouah et al. 2023,
    arXiv 2302.01772). byzfl's NNM takes ``K x K x P`` of memory, 52 GB for 150 MNIST heads."""
    nearest = torch.cdist(updates, updates).topk(len(updates) - f, largest=False).indices
    share = torch.zeros(len(updates), len(updates)).scatter_(1, nearest, 1 / (len(updates) - f))
    return trimmed_mean(share.to(updates) @ updates, f)


def caf(updates: Tensor, f: int) -> Tensor:
    """Return the mean after the covariance-bound agnostic filter, which removes up to 2 f (Allouah et al. 2025,
    arXiv 2505.01874). byzfl's CAF does not end if one upload is far longer than the others."""
    weight = filtered((updates @ updates.T).double(), torch.ones(len(updates)).double(), 0, 2 * f / len(updates))
    return (weight / weight.sum()).to(updates) @ updates


def clipped_mean(updates: Tensor, f: int) -> Tensor:
    """Return the mean of the updates, clipped to their median norm."""
    norms = updates.norm(dim=1, keepdim=True)
    return (updates * (base.median(norms) / norms.clamp_min(1e-12)).clamp_max(1)).mean(0)


class Robust(Server):
    """A server that adds a robust rule's update to the head."""

    min_uploads = 3   # of two different uploads, neither is the outlier

    def __init__(self, options: Mapping[str, Any], smallest: int = 1, *, rule: RobustRule):
        super().__init__(options, smallest)
        self.rule = rule

    def weigh(self, round: Round) -> Weighting:
        """Return no weights: the rule works on all uploads at once."""
        return Weighting(None, self.memory)

    def combine(self, round: Round, weighting: Weighting) -> State:
        """Return the head plus the rule's update."""
        if not round.uploads:
            return round.sent
        return moved(round.sent, self.update(round, updates_of(round.sent, list(round.uploads.values()))))

    def update(self, round: Round, updates: Tensor) -> Tensor:
        """Return the update of the head, ``P``, from a round's updates, ``K x P``."""
        f = min(round_down(self.options["tolerate"] * len(updates)), (len(updates) - 1) // 2)
        return self.rule(updates, f)


class NormClipping(Robust):
    """A mean of clipped updates with Gaussian noise, against backdoors (Sun et al. 2019, arXiv 1911.07963).

    The noise's norm is about ``--clip_noise`` times the clip.
    """

    def update(self, round: Round, updates: Tensor) -> Tensor:
        """Return the clipped mean with this round's noise."""
        clip, size = base.median(updates.norm(dim=1)), updates.shape[1]
        noise = torch.randn(size, generator=torch_rng(self.options["seed"], "clip_noise", round=round.number))
        return super().update(round, updates) + self.options["clip_noise"] * clip / size**0.5 * noise
