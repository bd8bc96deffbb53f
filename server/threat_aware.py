"""Weights that follow a threat model: ``w_k ~ min(n_k, SIZE median n) clip_k trust_k c_k / g_k``.

The server has no data. It sees uploads, and asks of each what honest ones do not show, however different their
classes are. Its trust in a round is a product of two factors, each 1 up to a bar that no honest client reached in
what was measured:

- **norm**: an update over LONG median norms loses trust;
- **direction**: its cosine with the trusted mean of the others. Honest clients of other classes are orthogonal or
  slightly opposed, those of the same classes agree. What counts is clear opposition, or a cosine far under the
  median upload's, in units of how much the uploads' cosines differ.

Three things bound what an upload can do that keeps its trust, and are no punishment:

- **clip**: no update counts for more than the median norm;
- **copies**: the g copies of one update share the weight of one, and the one that was copied keeps its 1/g;
- **filter**: where updates differ along one direction much more than along any other, weight is taken, c_k, from
  those that differ most (``filtered``). Colluders who push one way make such a direction.

A client's trust is the lower of this round's and an exponential average over rounds: lost quickly, regained
slowly.
docs/threat-model.md has what was measured, how each constant was chosen, and what no weight can see.
"""
import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from server.filtering import filtered
from server.mean import Judgement, Memory, Round, Server, Setting, State, moved, updates_of

LONG = 2.0                         # in median norms: a longer update loses trust
AGAINST, OPPOSED = -0.6, -0.85     # cosines: trust begins to fall at the first and is 0 at the second
GAP, SPREADS = 0.5, 8.0            # so far under the median cosine, or so many spreads, trust begins to fall
COPY = 0.985                       # cosine of copies: two clients of the same two classes have up to 0.97
KEEP = 0.8                         # share of the old average in the new one
SIZE = 1.0                         # in median sizes: what a size counts for at most
ALIKE = 0.2                        # a median cosine over it: the clients have the same classes
STANDS_OUT, AMONG_ALIKE = 1.6, 1.15   # variances, largest over next: of honest ones up to 1.53, 1.14 if alike
TAKEN, FEW = 0.6, 5                # share of the weight that the filter may take; fewer uploads are not filtered
SHARE = 3.0                        # no client weighs more than SHARE / K
WHOLE, PART = 2**30, 2**27         # bytes of updates that are held at once; of a part, where there are more


class ThreatAware(Server):
    """The threat-aware mean; where it trusts fewer than half of the uploads, a filtered mean of all."""

    fewest = 3

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

    def judge(self, round: Round) -> Judgement:
        """Weights, the reasons for them, and each client's trust for the next round."""
        clients = list(round.uploads)
        if not clients:
            return Judgement({}, self.remembered(round, {}, fallback=False))
        met = self.memory["seen"][clients] > 0
        before = torch.where(met, self.memory["trust"][clients], 1.0).double()
        updates = Updates(round.sent, list(round.uploads.values()))
        ratio, clip = lengths(updates.norms())
        updates.scale(clip.float())   # clipped, from here on
        gram = updates.gram()
        similarity, copies = likenesses(gram)
        short = (LONG / ratio).clamp_max(1).square()
        # What was distrusted before is compared with what was not. Where nothing was trusted, with all of it: an
        # upload may so earn trust anew, but what it has stays low, and the round falls back (``weigh``).
        prior = short / copies * (before if any_trust(before * short) else 1.0)
        weight = prior
        for _ in range(2):   # the second pass leaves out what the first distrusted
            cosine = against_others(gram, weight)
            now = short * direction(cosine)
            if not any_trust(prior * now):
                break
            weight = prior * now
        trust = torch.where(met, torch.minimum(now, KEEP * before + (1 - KEEP) * now), now)
        sizes = torch.tensor([round.sizes[k] for k in clients]).double()
        stands_out = AMONG_ALIKE if cosine.median() > ALIKE else STANDS_OUT
        weights = weigh(without_colluders(gram, capped(sizes) * clip / copies * trust, stands_out), trust)
        columns = {"norm_ratio": ratio, "cosine": cosine, "lookalike": similarity, "trust": trust}
        memory = self.remembered(round, dict(zip(clients, now.tolist(), strict=True)), weights is None)
        return Judgement(
            None if weights is None else dict(zip(clients, weights, strict=True)), memory,
            {k: {name: column[i].item() for name, column in columns.items()} for i, k in enumerate(clients)},
            fallback=weights is None)

    def remembered(self, round: Round, now: dict[int, float], fallback: bool) -> Memory:
        """The memory after a round in which clients earned trust ``now``; an upload that could not be used
        earned none."""
        trust, count = self.memory["trust"].clone(), self.memory["seen"].clone()
        for k in round.sizes:
            earned = now.get(k, 0.0)
            trust[k] = earned if not count[k] else KEEP * trust[k] + (1 - KEEP) * earned
            count[k] += 1
        return {"trust": trust, "seen": count, "fallbacks": self.memory["fallbacks"] + fallback}

    def combine(self, round: Round, judgement: Judgement) -> State:
        """The weighted mean; where it fell back, the filtered mean of all clipped updates, trusted or not."""
        if not judgement.fallback:
            return super().combine(round, judgement)
        updates = Updates(round.sent, list(round.uploads.values()))
        updates.scale(lengths(updates.norms())[1].float())
        gram = updates.gram()
        weight = without_colluders(gram, 1 / likenesses(gram)[1].double(), stands_out=1.0)
        return moved(round.sent, updates.mix((weight / weight.sum()).float()))


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

    def mix(self, weight: Tensor) -> Tensor:
        """Their sum with these weights, ``P``."""
        return torch.cat([weight @ part for part in self])


def norms(updates: Tensor) -> Tensor:
    """Of each row; 16 rows at a time, since PyTorch copies them to the double precision that it sums in."""
    return torch.cat([torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64)
                      for rows in updates.tensor_split(-(-len(updates) // 16))])


def lengths(norms: Tensor) -> tuple[Tensor, Tensor]:
    """Each update's norm over the median norm, and the factor that clips it to the median.

    With a looser clip a few colluders could make up most of the mean that all are compared with.
    """
    norms = norms.clamp_min(1e-12)
    ratio = norms / norms.median()
    return ratio, (1 / ratio).clamp_max(1)


def cosines(gram: Tensor) -> Tensor:
    """Between updates, from their inner products."""
    norms = gram.diag().clamp_min(1e-24).sqrt()
    return gram / (norms[:, None] * norms)


def likenesses(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Each update's largest cosine with another, and how many copies of it there are, itself included."""
    others = cosines(gram) - 2 * torch.eye(len(gram))
    return others.max(1).values, 1.0 + (others > COPY).sum(1)


def against_others(gram: Tensor, weight: Tensor) -> Tensor:
    """Each update's cosine with the weighted mean of the others; 0 where there are none."""
    others = weight * (1 - torch.eye(len(gram), dtype=gram.dtype))   # row k: without k
    norms = gram.diag() * ((others @ gram) * others).sum(1)
    return (others * gram).sum(1) / norms.clamp_min(1e-24).sqrt()


def direction(cosine: Tensor) -> Tensor:
    """Trust by cosines with the others' mean: 1 up to both bars, 0 from OPPOSED on, or half as far again under the
    median."""
    centre = cosine.median()
    spread = 1.4826 * (cosine - centre).abs().median()   # a normal distribution's standard deviation
    under = (centre - cosine) / torch.clamp_min(SPREADS * spread, GAP)
    return (3 - 2 * under).clamp(0, 1) * ((cosine - OPPOSED) / (AGAINST - OPPOSED)).clamp(0, 1)


def any_trust(trust: Tensor) -> bool:
    """Whether anybody is trusted at all."""
    return bool(trust.sum() >= 1e-9)


def without_colluders(gram: Tensor, start: Tensor, stands_out: float) -> Tensor:
    """``filtered``, where there are enough uploads to tell what stands out, and only where something does."""
    return start if len(gram) < FEW or not any_trust(start) else filtered(gram, start, stands_out, TAKEN)


def capped(sizes: Tensor) -> Tensor:
    """``min(n_k, SIZE median n)``: it is useless to claim more images."""
    return torch.minimum(sizes, SIZE * sizes.median())


def weigh(weights: Tensor, trust: Tensor) -> list[float] | None:
    """The weights with none over SHARE / K of their sum; None where trust sums to under half the uploads."""
    if trust.sum() < len(trust) / 2:
        return None
    for _ in range(len(weights)):   # what one loses goes to the others, and may lift them over the cap
        weights = torch.minimum(weights / weights.sum(), torch.tensor(SHARE / len(weights)))
    return weights.tolist()
