"""Published robust rules, mostly from byzfl: what the threat-aware weights are compared with.

A rule takes the updates ``head_k - head`` as rows, ``K x P``, and the number f of clients that may be malicious,
and returns the update ``P`` of the next head. Data sizes play no part. A rule has no weight for a single client,
so ``server.csv`` leaves that column empty.
"""
from collections.abc import Callable

import torch
from torch import Tensor

from server.base import Round, Server, Setting, State, Weighting, moved, updates_of
from server.base import median as median_of
from server.filtering import filtered
from utils import torch_rng

CHUNK = 2**16   # coordinates at a time in coordinate-wise rules: byzfl's need several copies of what they get

RobustRule = Callable[[Tensor, int], Tensor]   # updates K x P, f -> update P


def by_columns(rule: Callable[[Tensor], Tensor], updates: Tensor) -> Tensor:
    """A coordinate-wise rule, a part of the coordinates at a time."""
    return torch.cat([rule(part) for part in updates.split(CHUNK, dim=1)])


def median(updates: Tensor, f: int) -> Tensor:
    """Coordinate-wise (Yin et al. 2018, arXiv 1803.01498)."""
    from byzfl import Median
    return by_columns(Median(), updates)


def trimmed_mean(updates: Tensor, f: int) -> Tensor:
    """Coordinate-wise mean without the f largest and f smallest (ibid.)."""
    from byzfl import TrMean
    return by_columns(TrMean(f), updates)


def krum(updates: Tensor, f: int) -> Tensor:
    """The update nearest to its n - f - 1 nearest others (Blanchard et al. 2017, who have n - f - 2)."""
    from byzfl import Krum
    return Krum(f)(updates)


def geometric_median(updates: Tensor, f: int) -> Tensor:
    """The point with the least sum of distances, by Weiszfeld's iteration (Pillutla et al. 2022,
    arXiv 1912.13445)."""
    from byzfl import GeometricMedian
    return GeometricMedian(nu=1e-6, T=20)(updates)


def centered_clipping(updates: Tensor, f: int) -> Tensor:
    """Updates clipped at their median norm around a centre found in three steps (Karimireddy et al. 2021,
    arXiv 2012.10333); the centre starts at the head sent, since clients start anew from it."""
    from byzfl import CenteredClipping
    tau = median_of(updates.norm(dim=1)).item()
    if tau == 0:   # most have not moved, and byzfl would divide by it
        return torch.zeros_like(updates[0])
    return CenteredClipping(L=3, tau=tau)(updates)


def nnm_trimmed_mean(updates: Tensor, f: int) -> Tensor:
    """Each update is first replaced by the mean of its n - f nearest, itself included; then the trimmed mean
    (Allouah et al. 2023, arXiv 2302.01772). As byzfl's NNM, whose mixing takes ``K x K x P`` of memory, 52 GB for
    150 MNIST heads."""
    nearest = torch.cdist(updates, updates).topk(len(updates) - f, largest=False).indices
    share = torch.zeros(len(updates), len(updates)).scatter_(1, nearest, 1 / (len(updates) - f))
    return trimmed_mean(share.to(updates) @ updates, f)


def multi_krum(updates: Tensor, f: int) -> Tensor:
    """The mean of the n - f updates nearest to their neighbours (Blanchard et al. 2017)."""
    from byzfl import MultiKrum
    return MultiKrum(f)(updates)


def caf(updates: Tensor, f: int) -> Tensor:
    """Covariance-bound agnostic filter: takes weight from updates along the direction in which they differ most,
    until 2 f of it are gone, and keeps the mean that differed least on the way (Allouah et al. 2025,
    arXiv 2505.01874). Not byzfl's, whose loop does not end where one upload is far longer than others, and whose
    widest direction is a guess after one step of power iteration."""
    weight = filtered((updates @ updates.T).double(), torch.ones(len(updates)).double(), 0, 2 * f / len(updates))
    return (weight / weight.sum()).to(updates) @ updates


def clipped_to_median(updates: Tensor) -> tuple[Tensor, Tensor]:
    """The updates, none longer than the median norm, and that norm."""
    norms = updates.norm(dim=1)
    bound = median_of(norms)
    return updates * (bound / norms.clamp_min(1e-12)).clamp_max(1)[:, None], bound


class Robust(Server):
    """A server whose next head is a robust rule's."""

    min_uploads = 3   # of two that differ, neither is the odd one out

    def __init__(self, setting: Setting, rule: RobustRule):
        super().__init__(setting)
        self.rule = rule

    def judge(self, round: Round) -> Weighting:
        """No weights: the rule works on all uploads at once."""
        return Weighting(None, self.memory)

    def combine(self, round: Round, judgement: Weighting) -> State:
        """The rule's update, added to the head."""
        if not round.uploads:
            return round.sent
        uploads = list(round.uploads.values())
        f = min(round_down(self.setting.tolerate * len(uploads)), (len(uploads) - 1) // 2)
        return moved(round.sent, self.rule(updates_of(round.sent, uploads), f))


class ClippedNoisy(Robust):
    """The mean of updates clipped to their median norm, with Gaussian noise, against backdoors (Sun et al. 2019,
    arXiv 1911.07963). The noise's norm is about ``--clip_noise`` times the clip, whatever the number of
    parameters; without the option there is none."""

    def __init__(self, setting: Setting):
        super().__init__(setting, lambda updates, f: clipped_to_median(updates)[0].mean(0))

    def combine(self, round: Round, judgement: Weighting) -> State:
        """The clipped mean and the noise, drawn anew in each round."""
        share = self.setting.options.get("clip_noise", 0.0)
        if not round.uploads or not share:
            return super().combine(round, judgement)
        _, bound = clipped_to_median(updates_of(round.sent, list(round.uploads.values())))
        size = sum(value.numel() for value in round.sent.values())
        noise = torch.randn(size, generator=torch_rng(self.setting.seed, "clip_noise", round=round.number))
        return moved(super().combine(round, judgement), share * bound / size**0.5 * noise)


def round_down(count: float) -> int:
    """The whole clients in a share; 0.3 x 10 is 3, whatever floating point makes of it."""
    return int(count + 1e-9)
