"""Published robust rules, from byzfl: what the threat-aware weights are compared with.

A rule takes the updates ``head_k - head`` as rows, ``K x P``, and the number f of clients that may be malicious,
and returns the update ``P`` of the next head. Data sizes play no part. A rule has no weight for a single client,
so ``server.csv`` leaves that column empty.
"""
import statistics
from collections.abc import Callable

import torch
from torch import Tensor

from server.mean import Judgement, Round, Server, Setting, State, moved, updates_of

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
    """The update nearest to its n - f - 1 nearest others (Blanchard et al. 2017)."""
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
    return CenteredClipping(L=3, tau=statistics.median(updates.norm(dim=1).tolist()))(updates)


class Robust(Server):
    """A server whose next head is a robust rule's."""

    def __init__(self, setting: Setting, rule: RobustRule):
        super().__init__(setting)
        self.rule = rule

    def judge(self, round: Round) -> Judgement:
        """No weights: the rule works on all uploads at once."""
        return Judgement(None, self.memory)

    def combine(self, round: Round, judgement: Judgement) -> State:
        """The rule's update, added to the head."""
        if not round.uploads:
            return round.sent
        uploads = list(round.uploads.values())
        f = min(round_down(self.setting.tolerate * len(uploads)), (len(uploads) - 1) // 2)
        return moved(round.sent, self.rule(updates_of(round.sent, uploads), f))


def round_down(count: float) -> int:
    """The whole clients in a share; 0.3 x 10 is 3, whatever floating point makes of it."""
    return int(count + 1e-9)
