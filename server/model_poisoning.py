"""Model poisoning: functions ``ForgerView -> M x P``, the forged updates of the M malicious clients.

*Tuned* attacks choose their strength by querying the server in use, so that each adapts to each rule.
"""
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import Tensor

from server.base import median

STRENGTHS = (20.0, 8.0, 3.0, 1.2, 0.5)   # tried first, then 0.65 and 1.5 times the best
SHARES = (1.0, 0.5)                      # of the largest deviation that min-max and min-sum allow


@dataclass(frozen=True)
class ForgerView:
    """The knowledge of malicious clients when they forge their uploads; updates are rows."""

    own_updates: Tensor   # ``M x P``, as they trained them
    honest_updates: Tensor   # ``H x P``; their own where nobody is honest
    generator: torch.Generator   # for draws of this round
    lasting: torch.Generator   # for draws that are the same in every round
    # forged updates ``M x P`` -> the server's lowest trust in one of them
    least_trust: Callable[[Tensor], float]
    # forged updates ``M x P`` -> the server's update ``P`` from them and the honest ones
    aggregate: Callable[[Tensor], Tensor]
    sent: Tensor   # ``P``, the head that all clients were sent

    @cached_property
    def mean(self) -> Tensor:
        """Return the honest mean, ``P``."""
        return self.honest_updates.mean(0)

    @cached_property
    def spread(self) -> Tensor:
        """Return the standard deviation over honest updates, ``P``; 0 for a single one."""
        return self.honest_updates.std(0) if len(self.honest_updates) > 1 else torch.zeros_like(self.mean)

    def same(self, update: Tensor) -> Tensor:
        """Return one update ``P`` for all malicious clients, ``M x P``."""
        return update.expand_as(self.own_updates)


def harm(view: ForgerView, forged: Tensor) -> float:
    """Return the server's lost progress along the honest mean m, ``(m - aggregate) m / |m|^2``; 1 if it stalls."""
    mean = view.mean
    return ((mean - view.aggregate(forged)) @ mean / mean.square().sum().clamp_min(1e-24)).item()


def most_harmful(view: ForgerView, candidates: Iterable[Tensor]) -> Tensor:
    """Return the forgery that harms most under the server in use; the first of equals."""
    return max(candidates, key=lambda forged: harm(view, forged))


def tuned(view: ForgerView, forge: Callable[[float], Tensor],
          gain: Callable[[ForgerView, Tensor], float] = harm) -> Tensor:
    """Return the forgery at the strength with the largest gain under the server in use, by a line search."""
    gains = {strength: gain(view, forge(strength)) for strength in STRENGTHS}
    best = max(gains, key=gains.__getitem__)
    for other in (best * 0.65, best * 1.5):
        gains[other] = gain(view, forge(other))
    return forge(max(gains, key=gains.__getitem__))


def gaussian(view: ForgerView) -> Tensor:
    """Upload noise three times as long as the honest updates."""
    size = 3 * view.honest_updates.square().mean().sqrt()
    return size * torch.randn(view.own_updates.shape, generator=view.generator)


def sybil(view: ForgerView) -> Tensor:
    """Upload the malicious clients' mean update with 1 % of noise each (Fung et al. 2020, arXiv 1808.04866)."""
    poison = view.own_updates.mean(0)
    noise = torch.randn(view.own_updates.shape, generator=view.generator)
    return poison + 0.01 * poison.square().mean().sqrt() * noise


def trusted_most(view: ForgerView, trusted: float = 0.9, steps: int = 8) -> Tensor:
    """Subtract the largest multiple of the honest mean, up to 20, that keeps the trust at ``trusted``."""
    against = -view.mean
    low, high = 0.0, 20.0
    if view.least_trust(view.own_updates + high * against) >= trusted:
        return view.own_updates + high * against
    for _ in range(steps):
        middle = (low + high) / 2
        if view.least_trust(view.own_updates + middle * against) >= trusted:
            low = middle
        else:
            high = middle
    return view.own_updates + low * against


def adaptive(view: ForgerView) -> Tensor:
    """Upload the most harmful of these forgeries, each tuned (after Shejwalkar and Houmansadr, NDSS 2021)."""
    return most_harmful(view, [
        tuned(view, lambda strength: view.own_updates - strength * view.mean),
        tuned(view, lambda strength: view.same(-strength * view.mean)),
        tuned(view, lambda strength: view.same(view.mean - strength * view.spread)),
        trusted_most(view)])


def min_max_reach(honest: Tensor, direction: Tensor) -> float:
    """Return the largest g for which ``m + g p`` is no farther from any honest update than two of them are apart.

    It solves ``|m - x_i|^2 + 2 g p (m - x_i) + g^2 |p|^2 <= D^2``, for honest updates x of mean m and direction p.
    """
    away, bound = honest.mean(0) - honest, torch.cdist(honest, honest).square().max()
    a, b, c = direction.square().sum(), away @ direction, away.square().sum(1) - bound
    return ((-b + (b.square() - a * c).clamp_min(0).sqrt()) / a.clamp_min(1e-24)).min().item()


def min_sum_reach(honest: Tensor, direction: Tensor) -> float:
    """Return the largest g for which ``m + g p`` has no larger sum of squared distances than an honest update."""
    spare = (torch.cdist(honest, honest).square().sum(1).max()
             - (honest - honest.mean(0)).square().sum()).clamp_min(0)
    return (spare / (len(honest) * direction.square().sum()).clamp_min(1e-24)).sqrt().item()


def within_reach(view: ForgerView, reach: Callable[[Tensor, Tensor], float]) -> Tensor:
    """Deviate from the honest mean as far as ``reach`` allows, or half of that, in the most harmful of three
    directions (Shejwalkar and Houmansadr, NDSS 2021, section V; min-max is equation 9, min-sum equation 10)."""
    mean = view.mean
    deviations = (-mean / mean.norm().clamp_min(1e-12), -mean.sign(), -view.spread)
    return most_harmful(view, (
        view.same(mean + share * reach(view.honest_updates, direction) * direction)
        for direction in deviations for share in SHARES))


min_max = partial(within_reach, reach=min_max_reach)
min_sum = partial(within_reach, reach=min_sum_reach)


def byzfl_tuned(view: ForgerView, attack: str) -> Tensor:
    """Let byzfl tune the factor of an attack under the server in use (Allouah et al. 2023, arXiv 2302.01772)."""
    import byzfl  # slow to import
    malicious, honest = len(view.own_updates), view.honest_updates

    def aggregate(vectors: Tensor) -> Tensor:
        return view.aggregate(vectors[len(vectors) - malicious:])
    search = getattr(byzfl, attack)(agg=aggregate, pre_agg_list=[], f=malicious, evals=12)
    return view.same(search(honest if len(honest) > 1 else honest.repeat(2, 1)))


optimal_alie = partial(byzfl_tuned, attack="Optimal_ALittleIsEnough")
optimal_ipm = partial(byzfl_tuned, attack="Optimal_InnerProductManipulation")


def mpaf(view: ForgerView) -> Tensor:
    """Push towards a random model w', the same in all rounds: ``l (w' - w)`` (Cao and Gong 2022, arXiv 2203.08669,
    equation 4). w' has the sent head's size; l is tuned, or the paper's 1e6."""
    size = view.sent.square().mean().sqrt()
    direction = size * torch.randn(view.sent.shape, generator=view.lasting) - view.sent
    return most_harmful(view, (view.same(strength * direction) for strength in (0.1, 1.0, 10.0, 1e6)))


def projected(view: ForgerView) -> Tensor:
    """Scale the own update to the norm that leaves most of its difference from the honest mean in the aggregate
    (projected model replacement, Wang et al. 2020, arXiv 2007.05084; projected once, after training)."""
    apart = view.own_updates.mean(0) - view.mean
    unit = torch.nn.functional.normalize(view.own_updates) * median(view.honest_updates.norm(dim=1))

    def gain(view: ForgerView, forged: Tensor) -> float:
        return (view.aggregate(forged) @ apart).item()
    return tuned(view, lambda strength: strength * unit, gain)
