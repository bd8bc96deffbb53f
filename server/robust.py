"""Published robust rules, from byzfl, as servers: what the threat-aware weights are compared with.

They work on the updates ``head_k - head``, and data sizes count for nothing in them. Their weights cannot be
told client by client, so ``server.csv`` leaves that column empty.
"""
import statistics
from collections.abc import Callable

import torch
from torch import Tensor

from server.mean import Server, State, moved, updates_of

COLUMNS = 2**16   # coordinates at a time, where a rule takes each by itself: memory for a few of them only


def by_columns(rule: Callable[[Tensor], Tensor], updates: Tensor) -> Tensor:
    """A coordinate-wise rule, a part of the coordinates at a time."""
    return torch.cat([rule(part) for part in updates.split(COLUMNS, dim=1)])


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


RULES = {rule.__name__: rule for rule in (median, trimmed_mean, krum, geometric_median, centered_clipping)}


class Robust(Server):
    """One of ``RULES``; ``setting.rule`` names it."""

    def weights(self, sizes: dict[int, int]) -> dict[int, float]:
        """None that could be told."""
        return dict.fromkeys(sizes, float("nan"))

    def combine(self, round: int, sent: State, uploads: list[State], weights: list[float]) -> State:
        """The rule's update, added to the head."""
        if not uploads:
            return sent
        f = min(round_down(self.setting.tolerate * len(uploads)), (len(uploads) - 1) // 2)
        return moved(sent, RULES[self.setting.rule](updates_of(sent, uploads), f))


def round_down(count: float) -> int:
    """The whole clients in a share, whatever floating point makes of 0.3 x 10."""
    return int(count + 1e-9)
