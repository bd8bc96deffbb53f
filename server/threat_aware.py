"""Threat-aware aggregation weights: ``w_k ~ min(n_k, median n) trust_k c_k / g_k``.

The trust of a round is a product of two factors, each 1 up to a bound that hardly any honest client passes,
however different their classes are:

- **norm**: an update longer than ``norm_bound`` moves the mean less than an update at the bound;
- **direction**: the cosine with the trusted mean of the others. Honest clients of other classes are orthogonal or
  slightly opposed; only updates below COS_OPPOSED lose their trust.

Two steps bound the influence of trusted uploads:
- **copies**: the g copies of one update share the weight of one;
- **filter**: if updates vary along one direction much more than along any other, those that vary most lose the
  factor c_k (``filtered``), since colluders who push one way cause such a direction.

A client's trust is the lower of this round's and an exponential average over rounds. If fewer than half of the
uploads are trusted, the round falls back: norms and copies count, trust does not, and the filter always acts.
docs/robustness.md has the limits.
"""
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from server.base import Memory, Round, Server, State, Weighting, median

MAX_NORM_RATIO = 1.5   # of an update to the median; honest ones had up to 1.56
NORM_SPREADS = 2.0     # robust standard deviations of log norms that keep their trust
COS_OPPOSED = -0.85    # an update below it has no trust; honest ones had down to -0.70, among three clients
COS_COPY = 0.985       # two clients of the same two classes have up to 0.97
TRUST_DECAY = 0.8      # share of the old average in the new one
EIGENVALUE_RATIO = 1.3   # see ``filtered``; 10 honest clients had up to 1.07, fewer had up to 1.8
MAX_FILTERED = 0.6     # share of all weight that the filter may take
MIN_TO_FILTER = 10     # uploads
PART_BYTES = 2**27     # of all clients' updates that are held at a time


class ThreatAware(Server):
    """The threat-aware mean."""

    min_uploads = 3

    def __init__(self, options: Mapping[str, Any], smallest: int = 1):
        super().__init__(options, smallest)
        clients = options["num_users"]
        self.memory = {"trust": torch.ones(clients), "seen": torch.zeros(clients), "fallbacks": 0}

    @property
    def facts(self) -> dict[str, object]:
        """Return the number of rounds that fell back."""
        return {"fallbacks": self.memory["fallbacks"]}

    def trust(self, round: Round) -> dict[int, float]:
        """Return the trust in each upload."""
        return {k: columns["trust"] for k, columns in self.weigh(round).columns.items()}

    def weigh(self, round: Round) -> Weighting:
        """Return weights, the reasons for them, and each client's trust for the next round."""
        clients = list(round.uploads)
        if not clients:
            return Weighting({}, self._remember(round, {}, fallback=False))
        met = self.memory["seen"][clients] > 0
        before = torch.where(met, self.memory["trust"][clients], 1.0).double()
        gram = gram_of(round.sent, list(round.uploads.values()))
        ratio = norm_ratios(gram)
        # Updates are clipped to the median norm first, so that a few cannot make up most of the mean.
        clip = (1 / ratio).clamp_max(1)
        gram = clip[:, None] * gram * clip
        similarity, copies = copies_of(gram)
        norm_trust = (norm_bound(ratio) / ratio).clamp_max(1).square()
        # Clients distrusted before are no reference for others, unless nobody was trusted.
        reference = before if (before * norm_trust).sum() >= 1e-9 else 1.0
        cosine = cosines_with_others(gram, norm_trust / copies * reference)
        now = norm_trust * (cosine > COS_OPPOSED)
        trust = torch.where(met, torch.minimum(now, TRUST_DECAY * before + (1 - TRUST_DECAY) * now), now)
        fallback = bool(trust.sum() < len(trust) / 2)
        sizes = torch.tensor([round.sizes[k] for k in clients]).double()
        weights = torch.minimum(sizes, median(sizes)) / copies   # to claim more images gains nothing
        if not fallback:
            weights = weights * trust / norm_trust   # the filter sees updates of one length, as ``gram`` does
        if len(gram) >= MIN_TO_FILTER:
            weights = filtered(gram, weights, 0 if fallback else EIGENVALUE_RATIO, MAX_FILTERED)
        columns = {"norm_ratio": ratio, "cosine": cosine, "max_cosine": similarity, "trust": trust}
        return Weighting(
            dict(zip(clients, (weights * norm_trust).tolist(), strict=True)),
            self._remember(round, dict(zip(clients, now.tolist(), strict=True)), fallback),
            {k: {name: column[i].item() for name, column in columns.items()} for i, k in enumerate(clients)})

    def _remember(self, round: Round, now: dict[int, float], fallback: bool) -> Memory:
        """Return the memory after a round in which clients earned trust ``now``, or 0 without a usable upload."""
        trust, seen = self.memory["trust"].clone(), self.memory["seen"].clone()
        for k in round.sizes:
            earned = now.get(k, 0.0)
            trust[k] = TRUST_DECAY * trust[k] + (1 - TRUST_DECAY) * earned if seen[k] else earned
            seen[k] += 1
        return {"trust": trust, "seen": seen, "fallbacks": self.memory["fallbacks"] + fallback}


def gram_of(sent: State, uploads: list[State]) -> Tensor:
    """Return the inner products of all updates, ``K x K`` float64, from PART_BYTES of them at a time."""
    gram = torch.zeros(len(uploads), len(uploads), dtype=torch.float64)
    step = max(1, PART_BYTES // (8 * len(uploads)))
    for name, value in sent.items():
        for first in range(0, value.numel(), step):
            part = torch.stack([upload[name].flatten()[first:first + step] for upload in uploads])
            part = part.sub_(value.flatten()[first:first + step]).double()
            gram += part @ part.T
    return gram


def norm_ratios(gram: Tensor) -> Tensor:
    """Return each update's norm over the median norm, ``K``."""
    norms = gram.diag().sqrt().clamp_min(1e-12)
    return norms / median(norms)


def norm_bound(ratio: Tensor) -> float:
    """Return the longest norm that keeps its trust, in median norms.

    It is NORM_SPREADS robust standard deviations of the logarithms and at most MAX_NORM_RATIO: clients with
    equally many images have updates of nearly the same norm.
    """
    return min(MAX_NORM_RATIO, math.exp(NORM_SPREADS * 1.4826 * median(ratio.log().abs()).item()))


def copies_of(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Return each update's largest cosine with another one, and its number of copies, itself included."""
    norms = gram.diag().clamp_min(1e-24).sqrt()
    others = gram / (norms[:, None] * norms) - 2 * torch.eye(len(gram))
    return others.max(1).values, 1.0 + (others > COS_COPY).sum(1)


def cosines_with_others(gram: Tensor, weight: Tensor) -> Tensor:
    """Return each update's cosine with the weighted mean of the others; 0 where there are none."""
    others = weight * (1 - torch.eye(len(gram), dtype=gram.dtype))   # row k: without k
    norms = gram.diag() * ((others @ gram) * others).sum(1)
    return (others * gram).sum(1) / norms.clamp_min(1e-24).sqrt()


def filtered(gram: Tensor, start: Tensor, min_ratio: float, max_removed: float) -> Tensor:
    """Return weights without the updates that deviate along one direction.

    As long as a direction stands out, each update loses weight by its squared deviation along it; the one that
    deviates most loses all. If ``max_removed`` of the weight is gone before, the weights with the least largest
    variance are returned (Allouah et al. 2025, arXiv 2505.01874, algorithm 1, with exact eigenvectors).

    A direction stands out if the ratio of the updates' largest variance to the second largest exceeds
    ``min_ratio`` times the ratio of the second largest to the median one. Clients of different classes vary along
    several directions, colluders differ from the others along one.

    Args:
        gram: inner products of the updates, ``K x K`` float64.
        start: initial weights, ``K``, not all 0.
        min_ratio: 0 for the published filter, which always acts.
        max_removed: largest share of the weight that is removed.
    """
    weight, best, least = start, start, float("inf")
    tiny = 1e-12 * gram.diag().max()
    while weight.sum() > (1 - max_removed) * start.sum():
        share = weight / weight.sum()
        centred = gram - share @ gram                     # (x_i - m) x_j
        centred = centred - (centred @ share)[:, None]    # (x_i - m) (x_j - m)
        root = share.sqrt()
        variances, directions = torch.linalg.eigh(root[:, None] * centred * root)   # ascending
        largest, second = variances[-1], variances[-2].clamp_min(tiny)
        middle = variances[1:].quantile(0.5).clamp_min(tiny)   # the first is 0: they are centred
        if largest <= tiny or largest * middle <= min_ratio * second.square():
            return weight
        if largest < least:
            best, least = weight, largest.item()
        deviation = (centred @ (root * directions[:, -1])).square()
        # Relative to those that have weight left: one without any may be so far away that the loop would not end.
        weight = weight * (1 - deviation / deviation[weight > 0].max()).clamp(0, 1)
    return best
