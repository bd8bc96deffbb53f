"""What malicious clients upload instead of their own updates, from all that they know.

A forgery is a function ``ForgerView -> M x P``, the updates of the M malicious clients. Published attacks have a
strength; those that say *tuned* choose it by asking what the server in use would make of the forgery, so that each
attack adapts to each rule. The adversary then knows the rule, its options and everybody's updates: the strongest
that it could be.
"""
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from server.base import median

STRENGTHS = (20.0, 8.0, 3.0, 1.2, 0.5)   # tried first; then halfway to both neighbours of the best
SHARES = (1.0, 0.5)                      # of the largest deviation that min-max and min-sum allow


@dataclass(frozen=True)
class ForgerView:
    """What malicious clients know when they forge their uploads; updates are rows.

    Args:
        own: ``M x P``, their own updates, as trained.
        honest: ``H x P``; their own where nobody is honest.
        generator: for what they draw in this round.
        lasting: for what they have drawn once and keep: the same numbers in every round.
        least_trust: forged updates ``M x P`` -> the lowest trust that the server would have in one of them.
        aggregate: forged updates ``M x P`` -> the update ``P`` that the server would make of them and the others.
        sent: ``P``, the head that all clients were sent.
    """

    own: Tensor
    honest: Tensor
    generator: torch.Generator
    lasting: torch.Generator
    least_trust: Callable[[Tensor], float]
    aggregate: Callable[[Tensor], Tensor]
    sent: Tensor


def harm(known: ForgerView, forged: Tensor) -> float:
    """How far the server's update falls back along the honest mean m: ``(m - aggregate) m / |m|^2``.

    0 where it makes the progress that m would, 1 where it stalls, more where it goes backwards.
    """
    mean = known.honest.mean(0)
    return ((mean - known.aggregate(forged)) @ mean / mean.square().sum().clamp_min(1e-24)).item()


def most_harmful(known: ForgerView, candidates: Iterable[Tensor]) -> Tensor:
    """The forgery that harms most under the server in use; the first of equals."""
    return max(candidates, key=lambda forged: harm(known, forged))


def tuned(known: ForgerView, forge: Callable[[float], Tensor],
          gain: Callable[[ForgerView, Tensor], float] = harm) -> Tensor:
    """The forgery at the strength that gains most under the server in use, by a line search over STRENGTHS."""
    gains = {strength: gain(known, forge(strength)) for strength in STRENGTHS}
    best = max(gains, key=gains.__getitem__)
    for other in (best * 0.65, best * 1.5):
        gains[other] = gain(known, forge(other))
    return forge(max(gains, key=gains.__getitem__))


class Aggregator:
    """The server in use, as byzfl's optimal attacks ask it: honest and forged updates -> aggregate."""

    def __init__(self, known: ForgerView):
        self.known = known

    def __call__(self, vectors: Tensor) -> Tensor:
        return self.known.aggregate(vectors[len(vectors) - len(self.known.own):])


def sign_flip(known: ForgerView) -> Tensor:
    """Minus the honest mean."""
    from byzfl import SignFlipping
    return SignFlipping()(known.honest).expand_as(known.own)


def gaussian(known: ForgerView) -> Tensor:
    """Noise three times as long as the honest updates."""
    size = 3 * known.honest.square().mean().sqrt()
    return size * torch.randn(known.own.shape, generator=known.generator)


def scaling(known: ForgerView) -> Tensor:
    """Their own, ten times as long: model replacement (Bagdasaryan et al. 2020, arXiv 1807.00459)."""
    return 10 * known.own


def at_least_two(honest: Tensor) -> Tensor:
    """``H x P``, repeated where H is 1, for what needs a standard deviation."""
    return honest if len(honest) > 1 else honest.repeat(2, 1)


def alie(known: ForgerView) -> Tensor:
    """Honest mean and 1.5 standard deviations: a little is enough (Baruch et al. 2019, arXiv 1902.06156, who take
    as many as their z_max allows; ``optimal_alie`` tunes it)."""
    from byzfl import ALittleIsEnough
    return ALittleIsEnough(tau=1.5)(at_least_two(known.honest)).expand_as(known.own)


def ipm(known: ForgerView) -> Tensor:
    """Minus twice the honest mean: inner product manipulation (Xie et al. 2020, arXiv 1903.03936)."""
    from byzfl import InnerProductManipulation
    return InnerProductManipulation(tau=2.0)(known.honest).expand_as(known.own)


def mimic(known: ForgerView) -> Tensor:
    """All send the update of one honest client, which then counts too much (Karimireddy et al. 2022,
    arXiv 2006.09365)."""
    from byzfl import Mimic
    return Mimic(epsilon=0)(known.honest).expand_as(known.own)


def sybil(known: ForgerView) -> Tensor:
    """All send their mean update, each with 1 % of noise of its own (Fung et al. 2020, arXiv 1808.04866)."""
    poison = known.own.mean(0)
    noise = torch.randn(known.own.shape, generator=known.generator)
    return poison + 0.01 * poison.square().mean().sqrt() * noise


def nan(known: ForgerView) -> Tensor:
    """Not a number."""
    return torch.full_like(known.own, torch.nan)


def trusted_most(known: ForgerView, trusted: float = 0.9, steps: int = 8) -> Tensor:
    """Their own update minus the largest multiple of the honest mean, up to 20, that keeps the server's trust
    at ``trusted``, found by bisection."""
    against = -known.honest.mean(0)
    low, high = 0.0, 20.0
    if known.least_trust(known.own + high * against) >= trusted:
        return known.own + high * against
    for _ in range(steps):
        middle = (low + high) / 2
        low, high = (middle, high) if known.least_trust(known.own + middle * against) >= trusted else (low, middle)
    return known.own + low * against


def adaptive(known: ForgerView) -> Tensor:
    """The most harmful of four, each tuned: their own update minus a multiple of the honest mean; that multiple
    alone; the honest mean minus a multiple of the standard deviation; and ``trusted_most`` (after Shejwalkar and
    Houmansadr, NDSS 2021, who tailor an attack to the rule)."""
    mean, spread = known.honest.mean(0), at_least_two(known.honest).std(0)
    return most_harmful(known, [
        tuned(known, lambda strength: known.own - strength * mean),
        tuned(known, lambda strength: (-strength * mean).expand_as(known.own)),
        tuned(known, lambda strength: (mean - strength * spread).expand_as(known.own)),
        trusted_most(known)])


def min_max_reach(honest: Tensor, towards: Tensor) -> float:
    """The largest g for which ``m + g p`` is no farther from any honest update than two of them are apart.

    Of ``|m - x_i|^2 + 2 g p (m - x_i) + g^2 |p|^2 <= D^2``, the larger root, least over i.

    Args:
        honest: ``H x P``, of mean m.
        towards: p, ``P``.
    """
    away, bound = honest.mean(0) - honest, torch.cdist(honest, honest).square().max()
    a, b, c = towards.square().sum(), away @ towards, away.square().sum(1) - bound
    return ((-b + (b.square() - a * c).clamp_min(0).sqrt()) / a.clamp_min(1e-24)).min().item()


def min_sum_reach(honest: Tensor, towards: Tensor) -> float:
    """The largest g for which ``m + g p`` has no larger sum of squared distances to honest updates than one of
    them has; arguments as in ``min_max_reach``."""
    spare = (torch.cdist(honest, honest).square().sum(1).max()
             - (honest - honest.mean(0)).square().sum()).clamp_min(0)
    return (spare / (len(honest) * towards.square().sum()).clamp_min(1e-24)).sqrt().item()


def within_reach(known: ForgerView, reach: Callable[[Tensor, Tensor], float]) -> Tensor:
    """The honest mean and as much of a deviation as ``reach`` allows, or half of it: against the mean's direction,
    its signs or the standard deviation, whichever harms most (Shejwalkar and Houmansadr, section V)."""
    mean = known.honest.mean(0)
    deviations = (-mean / mean.norm().clamp_min(1e-12), -mean.sign(), -at_least_two(known.honest).std(0))
    return most_harmful(known, ((mean + share * reach(known.honest, towards) * towards).expand_as(known.own)
                                for towards in deviations for share in SHARES))


def min_max(known: ForgerView) -> Tensor:
    """As far as the farthest honest updates are apart (Shejwalkar and Houmansadr, NDSS 2021, equation 9)."""
    return within_reach(known, min_max_reach)


def min_sum(known: ForgerView) -> Tensor:
    """The same with sums of squared distances (ibid., equation 10)."""
    return within_reach(known, min_sum_reach)


def optimal_alie(known: ForgerView) -> Tensor:
    """``alie``, its factor tuned by byzfl's search (Allouah et al. 2023, arXiv 2302.01772)."""
    from byzfl import Optimal_ALittleIsEnough
    attack = Optimal_ALittleIsEnough(agg=Aggregator(known), pre_agg_list=[], f=len(known.own), evals=12)
    return attack(at_least_two(known.honest)).expand_as(known.own)


def optimal_ipm(known: ForgerView) -> Tensor:
    """``ipm``, its factor tuned by byzfl's search (ibid.)."""
    from byzfl import Optimal_InnerProductManipulation
    attack = Optimal_InnerProductManipulation(agg=Aggregator(known), pre_agg_list=[], f=len(known.own), evals=12)
    return attack(known.honest).expand_as(known.own)


def mpaf(known: ForgerView) -> Tensor:
    """Towards a random model w', which fake clients without data can do: ``l (w' - w)`` (Cao and Gong 2022,
    arXiv 2203.08669, equation 4). w' is one direction for all rounds, at the sent head's size; l is tuned, or the
    paper's 1e6."""
    size = known.sent.square().mean().sqrt()
    towards = size * torch.randn(known.sent.shape, generator=known.lasting) - known.sent
    return most_harmful(known, ((strength * towards).expand_as(known.own) for strength in (0.1, 1.0, 10.0, 1e6)))


def projected(known: ForgerView) -> Tensor:
    """Their own update, cut or stretched to a multiple of the honest median norm: the multiple that leaves most of
    what sets it apart from the honest mean in the aggregate (projected model replacement, Wang et al. 2020,
    arXiv 2007.05084; projected once, after training)."""
    apart = known.own.mean(0) - known.honest.mean(0)
    unit = torch.nn.functional.normalize(known.own) * median(known.honest.norm(dim=1))

    def gain(known: ForgerView, forged: Tensor) -> float:
        return (known.aggregate(forged) @ apart).item()
    return tuned(known, lambda strength: strength * unit, gain)
