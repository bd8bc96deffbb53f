"""Weights that follow a threat model: ``w_k ~ min(n_k, cap) clip_k trust_k``.

A server has no data, but it can question heads. It makes probes, inputs that the mean head takes for each
class, by gradient ascent from noise, and asks every upload for their classes. A client that lacks some
classes forgets them a little, and all alike; a head trained on wrong labels unlearns the very classes that
were flipped. The trust of a round is a product of four factors:

- **norm**: an update over the median norm weighs less in proportion, and over twice it loses trust;
- **direction**: its cosine with the trusted mean of the others; only clear opposition counts, since clients
  of other classes are at right angles or worse;
- **probes**: how much it forgets of one class beyond the others, against the median over uploads;
- **look-alikes**: g copies of an upload share what one would get, and lose as much again.

What trust a client has is the lower of this round's and an exponential average: quick to go, slow to return.
README says what was measured, which usual tests were dropped for it, and what no weight can see.
"""
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from server.mean import Server, State, moved, updates_of
from utils import torch_rng

LONG = 2.0                         # in median norms: longer than that loses trust
AGAINST, OPPOSED = -0.45, -0.75    # cosines at which trust begins to fall, and is gone
FORGETS, FORGETS_ALL = 2.75, 6.0   # times the median upload that one may forget a class, or all alike
POWER = 8                          # how fast trust falls beyond that
LEAST = 0.1                        # nats: forgetting less than that is nothing, whatever the median
COPY = 0.95                        # cosine of copies: two clients with the same two classes have 0.7
KEEP = 0.8                         # of the average, from round to round
PROBES, STEPS, RATE = 2, 20, 0.1   # a class, and Adam's steps from noise towards it
SHARE = 3.0                        # times 1 / K that one client may weigh at most


class ThreatAware(Server):
    """The threat-aware mean; where it trusts fewer than half of the uploads, a trimmed mean.

    Attributes:
        network: the head's layers, whose parameters uploads replace.
    """

    def __init__(self, setting, network: nn.Module):
        super().__init__(setting)
        self.network = network
        self.memory = {"trust": torch.ones(setting.clients), "seen": torch.zeros(setting.clients),
                       "fallbacks": 0}

    @property
    def facts(self) -> dict[str, float | str]:
        """In how many rounds most uploads were not trusted."""
        return {"fallbacks": self.memory["fallbacks"]}

    def __call__(self, round: int, sent: State, uploads: dict[int, State],
                 sizes: dict[int, int]) -> tuple[State, dict[int, State], list[dict]]:
        """As ``Server``; ``server.csv`` has the reasons. Remembers this round's trust."""
        head, seen, report = super().__call__(round, sent, uploads, sizes)
        trust, count = self.memory["trust"].clone(), self.memory["seen"].clone()
        for row in report:
            k, now = row["client"], row.pop("now", 0.0)
            trust[k] = now if not count[k] else KEEP * trust[k] + (1 - KEEP) * now
            count[k] += 1
        fallback = any(math.isnan(row["weight"]) for row in report)
        self.memory = {"trust": trust, "seen": count, "fallbacks": self.memory["fallbacks"] + fallback}
        return head, seen, report

    def trust(self, round: int, sent: State, uploads: dict[int, State],
              sizes: dict[int, int]) -> dict[int, float]:
        """How far each upload would be trusted."""
        return {k: notes["trust"] for k, notes in self.assess(round, sent, uploads, sizes)[1].items()}

    def assess(self, round: int, sent: State, uploads: dict[int, State],
               sizes: dict[int, int]) -> tuple[dict[int, float], dict[int, dict]]:
        """Weights, and what ``server.csv`` says of each upload; all NaN where most are not trusted."""
        clients = list(uploads)
        if not clients:
            return {}, {}
        before = torch.where(self.memory["seen"] > 0, self.memory["trust"], 1.0)[clients].double()
        updates = updates_of(sent, list(uploads.values()))
        ratio, scale = lengths(updates)
        gram = (updates.mul_(scale.float()[:, None]) @ updates.T).double()   # clipped, from here on
        alike, copies = likenesses(gram)
        first = (LONG / ratio).clamp_max(1).square() / copies.square()
        known = before if some(before * first) else torch.ones_like(before)   # nobody trusted: all begin anew
        weight, now = known * first, torch.zeros_like(first)
        for _ in range(2):   # what the first look distrusts does not blur the second
            cosine = against_others(gram, weight)
            mean = moved(sent, weight.float() @ updates / weight.sum().clamp_min(1e-12))
            forgotten = self.forgotten(round, mean, uploads, ratio.clamp(1, LONG))
            now = (first * ((cosine - OPPOSED) / (AGAINST - OPPOSED)).clamp(0, 1)
                   / forgotten.clamp_min(1)**POWER)
            if torch.equal(weight, known * now) or not some(known * now):   # none is left to compare with
                break
            weight = known * now
        again = (self.memory["seen"] > 0)[clients]
        trust = torch.where(again, torch.minimum(now, KEEP * before + (1 - KEEP) * now), now)
        columns = {"norm_ratio": ratio, "cosine": cosine, "probe": forgotten, "lookalike": alike,
                   "trust": trust, "now": now}
        notes = {k: {name: column[i].item() for name, column in columns.items()}
                 for i, k in enumerate(clients)}
        weights = weigh(torch.tensor([sizes[k] for k in clients]).double(), scale, trust)
        return dict(zip(clients, weights, strict=True)), notes

    def combine(self, round: int, sent: State, uploads: list[State], weights: list[float]) -> State:
        """The weighted mean, or nearest-neighbour mixing and a trimmed mean."""
        if not any(math.isnan(weight) for weight in weights):
            return super().combine(round, sent, uploads, weights)
        from byzfl import NNM, TrMean
        f = (len(uploads) - 1) // 2
        return moved(sent, TrMean(f)(NNM(f)(updates_of(sent, uploads))))

    def forgotten(self, round: int, mean: State, uploads: dict[int, State], length: Tensor) -> Tensor:
        """How much each upload forgets, for its length, in units of what is allowed: of the class that it
        forgets most beyond its own median class, FORGETS times the median upload; of that class in all, which
        a client of a single class may well, FORGETS_ALL times."""
        probes, labels = self.probes(round, mean)

        @torch.no_grad()
        def known(head: State) -> Tensor:
            logs = self.ask(head, probes).log_softmax(1).gather(1, labels[:, None])
            return logs.view(PROBES, -1).mean(0)
        base = known(mean)
        lost = torch.stack([base - known(upload) for upload in uploads.values()])   # K x classes
        lost = lost.double().nan_to_num(nan=1e9, posinf=1e9) / length[:, None]
        most = lost.max(1).values
        apart = most - lost.median(1).values
        return torch.maximum(apart / (FORGETS * apart.median().clamp_min(LEAST)),
                             most / (FORGETS_ALL * most.median().clamp_min(LEAST)))

    def probes(self, round: int, mean: State) -> tuple[Tensor, Tensor]:
        """Inputs that the head takes for each class in turn, and those classes."""
        draw = torch_rng(self.setting.seed, "probes", round=round)
        classes = self.network.output.out_features
        labels = torch.arange(classes).repeat(PROBES)
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
        layers = {name.removeprefix("classifier."): value for name, value in head.items()}
        return functional_call(self.network, layers, (x,))


def lengths(updates: Tensor) -> tuple[Tensor, Tensor]:
    """Each update's norm in median norms, and what clips it to one: were more allowed, a few colluders would
    make up most of the mean that all are compared with."""
    norms = torch.linalg.vector_norm(updates, dim=1, dtype=torch.float64).clamp_min(1e-12)
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


def some(trust: Tensor) -> bool:
    """Whether anybody is trusted at all."""
    return bool(trust.sum() >= 1e-9)


def weigh(sizes: Tensor, scale: Tensor, trust: Tensor) -> list[float]:
    """``min(n, median) scale trust``, so that claiming more images buys nothing; none over SHARE / K of all;
    NaN where the effective number of trusted uploads, ``(sum t)^2 / sum t^2``, is under half."""
    if trust.sum()**2 < len(trust) / 2 * trust.square().sum() or not some(trust):
        return [math.nan] * len(trust)
    weights = torch.minimum(sizes, sizes.median()) * scale * trust
    for _ in range(len(weights)):   # what is cut off one goes to the others, and may lift those over
        weights = torch.minimum(weights / weights.sum(), torch.tensor(SHARE / len(weights)))
    return weights.tolist()
