"""Weights that follow a threat model: ``w_k ~ min(n_k, median n) clip_k trust_k``.

The server has no data, but it can question heads. By gradient ascent from noise it makes probes: inputs that the
mean head takes for each class. Then it asks every upload for their classes. A client that lacks some classes
forgets them a little, all of them alike. A head trained on flipped labels forgets just the classes that were
flipped. An upload's trust in a round is a product of four factors:

- **norm**: an update longer than the median norm weighs less in proportion; over twice the median it loses trust;
- **direction**: its cosine with the trusted mean of the others. Only clear opposition counts, since updates of
  clients with other classes are orthogonal or slightly opposed;
- **probes**: how much it forgets of one class more than of the others, against the median over uploads;
- **look-alikes**: g copies of an upload share the weight of one, and their trust falls by g again.

A client's trust is the lower of this round's and an exponential average over rounds: lost quickly, regained
slowly. docs/threat-model.md has what was measured, which usual tests were dropped, and what no weight can see.
"""
import functools
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

from server.mean import Judgement, Memory, Round, Server, Setting, State, moved, required, updates_of
from utils import torch_rng

LONG = 2.0                         # in median norms: a longer update loses trust
AGAINST, OPPOSED = -0.45, -0.75    # cosines: trust begins to fall at the first and is 0 at the second
FORGETS, FORGETS_ALL = 2.75, 6.0   # how many times the median upload's forgetting is allowed (``forgotten``)
POWER = 8                          # how steeply trust falls over that limit
LEAST = 0.1                        # nats: what counts as forgetting at the least, however small the median is
COPY = 0.95                        # cosine of copies: two clients with the same two classes have 0.7
KEEP = 0.8                         # share of the old average in the new one
PROBES, STEPS, RATE = 2, 20, 0.1   # probes a class; Adam's steps from noise to a probe, and their rate
SHARE = 3.0                        # no client weighs more than SHARE / K
WHOLE, PART = 2**30, 2**27         # bytes of updates that are held at once; of a part, where there are more


class ThreatAware(Server):
    """The threat-aware mean; where it trusts fewer than half of the uploads, a trimmed mean."""

    def __init__(self, setting: Setting):
        super().__init__(setting)
        self.network = required(setting.network)
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
        first = (LONG / ratio).clamp_max(1).square() / copies.square()
        # If nobody is trusted any more, all begin anew: there would be no mean to compare with.
        prior = before if any_trust(before * first) else torch.ones_like(before)
        weight = prior * first
        for _ in range(2):   # the second pass leaves out what the first distrusted
            cosine = against_others(gram, weight)
            mean = moved(round.sent, updates.mix(weight.float()) / weight.sum().clamp_min(1e-12))
            forgotten = self.forgotten(round, mean, ratio.clamp(1, LONG))
            now = (first * ((cosine - OPPOSED) / (AGAINST - OPPOSED)).clamp(0, 1)
                   / forgotten.clamp_min(1)**POWER)
            if torch.equal(weight, prior * now) or not any_trust(prior * now):
                break
            weight = prior * now
        trust = torch.where(met, torch.minimum(now, KEEP * before + (1 - KEEP) * now), now)
        weights = weigh(torch.tensor([round.sizes[k] for k in clients]).double(), clip, trust)
        columns = {"norm_ratio": ratio, "cosine": cosine, "probe": forgotten, "lookalike": similarity,
                   "trust": trust}
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
        """The weighted mean, or nearest-neighbour mixing and a trimmed mean."""
        if not judgement.fallback:
            return super().combine(round, judgement)
        from byzfl import NNM, TrMean
        uploads = list(round.uploads.values())
        f = (len(uploads) - 1) // 2
        return moved(round.sent, TrMean(f)(NNM(f)(updates_of(round.sent, uploads))))

    def forgotten(self, round: Round, mean: State, length: Tensor) -> Tensor:
        """How much each upload forgets, divided by what is allowed, so that 1 is the limit: ``K``.

        What counts is the loss on probes, divided by the update's length. The class that an upload forgets most
        may stand out from its own median class by FORGETS times what the median upload's does. That class may
        be forgotten in all FORGETS_ALL times as much as by the median upload: a client of one class does that.
        """
        probes, labels = self.probes(round.number, mean)

        @torch.no_grad()
        def log_probabilities(head: State) -> Tensor:
            logs = self.ask(head, probes).log_softmax(1).gather(1, labels[:, None])
            return logs.view(PROBES, -1).mean(0)
        base = log_probabilities(mean)
        lost = torch.stack([base - log_probabilities(upload) for upload in round.uploads.values()])   # K x classes
        lost = lost.double().nan_to_num(nan=1e9, posinf=1e9) / length[:, None]
        most = lost.max(1).values
        apart = most - lost.median(1).values
        return torch.maximum(apart / (FORGETS * apart.median().clamp_min(LEAST)),
                             most / (FORGETS_ALL * most.median().clamp_min(LEAST)))

    def probes(self, number: int, mean: State) -> tuple[Tensor, Tensor]:
        """Inputs that the head takes for each class in turn, ``N x C x H x W``, and those classes, ``N``."""
        draw = torch_rng(self.setting.seed, "probes", round=number)
        labels = torch.arange(self.network.output.out_features).repeat(PROBES)
        x = torch.randn(len(labels), *self.network.input_shape, generator=draw)
        x = x.to(memory_format=torch.channels_last).requires_grad_()   # half the time of a question
        optimizer = torch.optim.Adam([x], RATE)
        for _ in range(STEPS):
            optimizer.zero_grad()
            F.cross_entropy(self.ask(mean, x), labels, reduction="sum").backward()
            optimizer.step()
        return x.detach(), labels

    def ask(self, head: State, x: Tensor) -> Tensor:
        """A head's logits."""
        layers = {name.removeprefix("classifier."): value for name, value in head.items()
                  if name.startswith("classifier.")}   # parts of an encoder may travel, too
        return functional_call(self.network, layers, (x,))


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
    """Of each row; 64 rows at a time, since PyTorch copies them to the double precision that it sums in."""
    return torch.cat([torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64)
                      for rows in updates.tensor_split(-(-len(updates) // 64))])


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


def any_trust(trust: Tensor) -> bool:
    """Whether anybody is trusted at all."""
    return bool(trust.sum() >= 1e-9)


def weigh(sizes: Tensor, clip: Tensor, trust: Tensor) -> list[float] | None:
    """``w_k ~ min(n_k, median n) clip_k trust_k``, none over SHARE / K of the sum.

    The cap on sizes makes it useless to claim more images.

    Returns:
        The weights; None where the effective number of trusted uploads, ``(sum t)^2 / sum t^2``, is under half
        of them.
    """
    if trust.sum()**2 < len(trust) / 2 * trust.square().sum() or not any_trust(trust):
        return None
    weights = torch.minimum(sizes, sizes.median()) * clip * trust
    for _ in range(len(weights)):   # what one loses goes to the others, and may lift them over the cap
        weights = torch.minimum(weights / weights.sum(), torch.tensor(SHARE / len(weights)))
    return weights.tolist()
