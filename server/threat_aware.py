"""Weights that follow a threat model: ``w_k ~ min(n_k, median n) trust_k c_k / g_k``.

The server has no data. It sees uploads, and asks of each what honest ones do not show, however different their
classes are. Its trust in a round is a product of two factors, each 1 up to a bar that hardly any honest client
passes:

- **norm**: an update longer than honest ones are (``longest``) loses trust, until it moves the mean less than one
  of that length;
- **direction**: its cosine with the trusted mean of the others. Honest clients of other classes are orthogonal or
  slightly opposed, those of the same classes agree. What counts is clear opposition.

Three things bound what an upload can do that keeps its trust, and are no punishment:

- **copies**: the g copies of one update share the weight of one, and the one that was copied keeps its 1/g;
- **filter**: where updates differ along one direction much more than along any other, weight is taken, c_k, from
  those that differ most (``filtered``). Colluders who push one way make such a direction;
- **cap**: no upload weighs more than SHARE / K.

A client's trust is the lower of this round's and an exponential average over rounds: lost quickly, regained
slowly. Where fewer than half of the uploads are trusted, the round falls back: norms and copies count, trust does
not, and the filter always takes its share.
docs/threat-model.md has what was measured, how each constant was chosen, and what no weight can see.
"""
import functools
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from server.base import Memory, Round, Server, Setting, State, Weighting, median, updates_of
from server.filtering import filtered

MAX_NORM_RATIO, SPREADS = 1.5, 2.0           # see ``longest``; honest ones had up to 1.56 median norms
COS_FULL_TRUST, COS_NO_TRUST = -0.6, -0.85     # cosines: trust begins to fall at the first and is 0 at the second
COS_COPY = 0.985                       # cosine of copies: two clients of the same two classes have up to 0.97
TRUST_DECAY = 0.8                         # share of the old average in the new one
EIGENVALUE_RATIO = 1.3                   # see ``filtered``; of 10 honest clients up to 1.07, of fewer up to 1.8
MAX_FILTERED, MIN_TO_FILTER = 0.6, 10               # share of the weight that the filter may take; fewer uploads are not filtered
SHARE = 3.0                        # no client weighs more than SHARE / K
WHOLE, PART = 2**30, 2**27         # bytes of updates that are held at once; of a part, where there are more


class ThreatAware(Server):
    """The threat-aware mean."""

    min_uploads = 3

    def __init__(self, setting: Setting):
        super().__init__(setting)
        self.memory = {"trust": torch.ones(setting.clients), "seen": torch.zeros(setting.clients),
                       "fallbacks": 0}

    @property
    def facts(self) -> dict[str, object]:
        """In how many rounds most uploads were not trusted."""
        return {"fallbacks": self.memory["fallbacks"]}

    def trust(self, round: Round) -> dict[int, float]:
        """How far each upload would be trusted."""
        return {k: columns["trust"] for k, columns in self.judge(round).columns.items()}

    def judge(self, round: Round) -> Weighting:
        """Weights, the reasons for them, and each client's trust for the next round."""
        clients = list(round.uploads)
        if not clients:
            return Weighting({}, self.remembered(round, {}, fallback=False))
        met = self.memory["seen"][clients] > 0
        before = torch.where(met, self.memory["trust"][clients], 1.0).double()
        updates = Updates(round.sent, list(round.uploads.values()))
        ratio = lengths(updates.norms())
        # For comparisons all are clipped to the median: with a looser clip a few colluders could make up most of
        # the mean that all are compared with.
        updates.scale((1 / ratio).clamp_max(1).float())
        gram = updates.gram()
        similarity, copies = likenesses(gram)
        short = (longest(ratio) / ratio).clamp_max(1).square()
        # What was distrusted before is compared with what was not. Where nothing was trusted, with all of it: an
        # upload may so earn trust anew, but what it has stays low, and the round falls back.
        met_with = before if (before * short).sum() >= 1e-9 else 1.0
        cosine = against_others(gram, short / copies * met_with)
        now = short * ((cosine - COS_NO_TRUST) / (COS_FULL_TRUST - COS_NO_TRUST)).clamp(0, 1)
        trust = torch.where(met, torch.minimum(now, TRUST_DECAY * before + (1 - TRUST_DECAY) * now), now)
        fallback = bool(trust.sum() < len(trust) / 2)
        sizes = capped(torch.tensor([round.sizes[k] for k in clients]).double())
        weights = sizes / copies * (1 if fallback else trust / short)   # all of one length, as in ``gram``
        if len(gram) >= MIN_TO_FILTER:
            weights = filtered(gram, weights, 0 if fallback else EIGENVALUE_RATIO, MAX_FILTERED)
        columns = {"norm_ratio": ratio, "cosine": cosine, "max_cosine": similarity, "trust": trust}
        return Weighting(
            dict(zip(clients, shared_out(weights * short).tolist(), strict=True)),
            self.remembered(round, dict(zip(clients, now.tolist(), strict=True)), fallback),
            {k: {name: column[i].item() for name, column in columns.items()} for i, k in enumerate(clients)})

    def remembered(self, round: Round, now: dict[int, float], fallback: bool) -> Memory:
        """The memory after a round in which clients earned trust ``now``; an upload that could not be used
        earned none."""
        trust, count = self.memory["trust"].clone(), self.memory["seen"].clone()
        for k in round.sizes:
            earned = now.get(k, 0.0)
            trust[k] = earned if not count[k] else TRUST_DECAY * trust[k] + (1 - TRUST_DECAY) * earned
            count[k] += 1
        return {"trust": trust, "seen": count, "fallbacks": self.memory["fallbacks"] + fallback}


class Updates:
    """``updates_of`` a round: all of it up to WHOLE bytes, else a part of the columns at a time.

    A part is made again whenever it is asked for. So the server of a thousand clients does not hold their updates
    beside their uploads.
    """

    def __init__(self, sent: State, uploads: list[State]):
        self.sent, self.uploads = sent, uploads
        self.factor: Tensor | None = None
        width = sum(value.numel() for value in sent.values())
        self.whole = updates_of(sent, uploads) if 4 * width * len(uploads) <= WHOLE else None
        step = max(1, PART // (4 * len(uploads)))
        self.spans = [slice(first, first + step) for first in range(0, width, step)]

    def __iter__(self) -> Iterator[Tensor]:
        if self.whole is not None:
            yield self.whole
            return
        for span in self.spans:
            # No name for it here: the next part is made while this frame waits.
            yield updates_of(self.sent, self.uploads, span).mul_(1 if self.factor is None else self.factor)

    def scale(self, factor: Tensor) -> None:
        """Multiply each update by its own factor, ``K``."""
        self.factor = factor[:, None]
        if self.whole is not None:
            self.whole.mul_(self.factor)

    def norms(self) -> Tensor:
        """Of each update, ``K``."""
        return functools.reduce(torch.hypot, map(norms, self))

    def gram(self) -> Tensor:
        """Inner products, ``K x K``."""
        return functools.reduce(torch.add, ((part @ part.T).double() for part in self))


def norms(updates: Tensor) -> Tensor:
    """Of each row; 16 rows at a time, since PyTorch copies them to the double precision that it sums in."""
    return torch.cat([torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64)
                      for rows in updates.tensor_split(-(-len(updates) // 16))])


def lengths(norms: Tensor) -> Tensor:
    """Each update's norm over the median norm."""
    norms = norms.clamp_min(1e-12)
    return norms / median(norms)


def longest(ratio: Tensor) -> float:
    """Return how long an update may be and keep its trust, in median norms.

    It is SPREADS robust standard deviations of the logarithms, MAX_NORM_RATIO at most: clients of equally many images have
    updates of nearly the same length.
    """
    return min(MAX_NORM_RATIO, math.exp(SPREADS * 1.4826 * median(ratio.log().abs()).item()))


def cosines(gram: Tensor) -> Tensor:
    """Between updates, from their inner products."""
    norms = gram.diag().clamp_min(1e-24).sqrt()
    return gram / (norms[:, None] * norms)


def likenesses(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Each update's largest cosine with another, and how many copies of it there are, itself included."""
    others = cosines(gram) - 2 * torch.eye(len(gram))
    return others.max(1).values, 1.0 + (others > COS_COPY).sum(1)


def against_others(gram: Tensor, weight: Tensor) -> Tensor:
    """Each update's cosine with the weighted mean of the others; 0 where there are none."""
    others = weight * (1 - torch.eye(len(gram), dtype=gram.dtype))   # row k: without k
    norms = gram.diag() * ((others @ gram) * others).sum(1)
    return (others * gram).sum(1) / norms.clamp_min(1e-24).sqrt()


def capped(sizes: Tensor) -> Tensor:
    """``min(n_k, median n)``: it is useless to claim more images."""
    return torch.minimum(sizes, median(sizes))


def shared_out(weights: Tensor) -> Tensor:
    """Return the weights, ``K``, with a sum of 1 and none over SHARE / K.

    What the largest lose goes to the others in proportion. Where too few have a weight to share it out under the
    cap, they weigh alike.
    """
    cap = SHARE / len(weights)
    if (weights > 0).sum() * cap <= 1:
        return (weights > 0) / (weights > 0).sum()
    held = torch.zeros_like(weights, dtype=torch.bool)   # at the cap
    for _ in weights:
        rest = weights.where(~held, 0)
        shares = torch.where(held, cap, rest * (1 - cap * held.sum()) / rest.sum())
        held |= shares > cap
    return shares
