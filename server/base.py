"""The server: how the clients' uploads become the next head.

A server is called once a round. It sees the uploads (``receive``), judges each (``judge``) and combines them
(``combine``). FedAvg's weighted mean is here. The other servers override some of these steps, or add to the call
before and after them.
"""
import copy
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
State = dict[str, Tensor]
ALL = slice(None)
Memory = dict[str, Any]   # numbers and tensors that a server keeps from round to round


def is_finite(state: State) -> bool:
    """Whether every value of a state dict is finite."""
    return all(bool(torch.stack(torch.aminmax(value)).isfinite().all()) for value in state.values())


def weighted_mean(states: list[State], weights: list[float]) -> State:
    """``sum_k w_k state_k / sum_k w_k`` (McMahan et al. 2017, algorithm 1), in the states' precision.

    Sums in the order given, so a caller that fixes the order gets the same bits every time.
    """
    total = sum(weights)
    average = {name: torch.zeros_like(value) for name, value in states[0].items()}
    for state, weight in zip(states, weights, strict=True):
        for name, value in state.items():
            average[name].add_(value, alpha=weight / total)
    return average


def updates_of(sent: State, uploads: list[State], columns: slice = ALL) -> Tensor:
    """``D_k = head_k - head`` as rows, ``K x P``, parameters in the head's order; or some of the columns."""
    first, last, _ = columns.indices(sum(value.numel() for value in sent.values()))
    rows = torch.empty(len(uploads), last - first)
    start = 0   # the parameter's first column
    for name, value in sent.items():
        low, high = max(first - start, 0), min(last - start, value.numel())
        if low < high:
            part = rows[:, start + low - first:start + high - first]
            for row, upload in zip(part, uploads, strict=True):
                torch.sub(upload[name].flatten()[low:high], value.flatten()[low:high], out=row)
        start += value.numel()
    return rows


def moved(sent: State, update: Tensor) -> State:
    """``head + D``: the inverse of one row of ``updates_of``."""
    parts = update.split([value.numel() for value in sent.values()])
    return {name: value + part.view_as(value)
            for (name, value), part in zip(sent.items(), parts, strict=True)}


@dataclass(frozen=True)
class Setting:
    """What servers need to know of a run.

    Args:
        smallest: training images of the smallest local data set.
        clip: bound on a norm, or None where the method finds its own.
        exposures: how often NbAFL counts an upload as seen.
        noise_multiplier: noise in units of the clip, or None to find it from ``epsilon``.
        tolerate: share of the uploads that a robust rule is told may be malicious.
        options: all options of the run by name, for a rule or a server with options of its own.
    """

    seed: int = 1
    clients: int = 1
    frac: float = 1.0
    rounds: int = 1
    smallest: int = 1
    epsilon: float | None = None
    delta: float | None = None
    clip: float | None = None
    exposures: int | None = None
    noise_multiplier: float | None = None
    tolerate: float = 0.3
    options: Mapping[str, Any] = field(default_factory=dict)


def required(value: T | None) -> T:
    """A part of the setting, or of a judgement, that a server cannot do without."""
    if value is None:
        raise ValueError("a part that this server needs is missing")
    return value


@dataclass(frozen=True)
class Round:
    """One round as it reaches the server.

    Args:
        number: counted from 1.
        sent: the head that every client started from.
        uploads: client -> its head after local training.
        sizes: client -> its number of training images, for every client asked to train. One that is not in
            ``uploads`` failed to train.
    """

    number: int
    sent: State
    uploads: dict[int, State]
    sizes: dict[int, int]


@dataclass(frozen=True)
class Weighting:
    """What a server decides about the uploads that it can use.

    Args:
        weights: client -> weight, before they are made to sum to 1. None where the next head is no weighted
            mean of single uploads.
        columns: client -> further columns of its row in ``server.csv``.
        memory: what the server remembers for the next round.
    """

    weights: dict[int, float] | None
    memory: Memory
    columns: dict[int, dict[str, float]] = field(default_factory=dict)


class Aggregated(NamedTuple):
    """What comes out of a round.

    Args:
        head: the next head; the one sent where no upload could be used.
        uploads: the uploads as the server saw them.
        rows: one for ``server.csv`` a client asked: ``client``, ``n``, ``weight`` (None where there are none),
            and the rule's own columns.
    """

    head: State
    uploads: dict[int, State]
    rows: list[dict]


class Server:
    """FedAvg's: a mean weighted by local data size, in which non-finite uploads count for nothing.

    Attributes:
        protects: whether ``receive`` changes what clients trained, so that the server does not see it.
        memory: numbers and tensors that the next round starts from; a checkpoint keeps them.
        min_uploads: uploads of a round under which it cannot tell who is malicious.
    """

    protects = False
    min_uploads = 1

    def __init__(self, setting: Setting):
        self.setting = setting
        self.memory: Memory = {}

    @property
    def facts(self) -> dict[str, object]:
        """What ``config.json`` says of it."""
        return {}

    def __call__(self, round: Round) -> Aggregated:
        """Aggregate a round, and remember what the next one needs."""
        seen = replace(round, uploads=self.receive(round))
        usable = only_finite(seen)
        judgement = self.judge(usable)
        head = self.combine(usable, judgement)
        self.memory = judgement.memory
        return Aggregated(head, seen.uploads, report(usable, judgement))

    def preview(self, round: Round) -> State:
        """The next head that a round would give, remembering nothing: what a forger asks itself."""
        asked = copy.copy(self)
        asked.memory = dict(self.memory)
        return asked(round).head

    def receive(self, round: Round) -> dict[int, State]:
        """What the server sees of the uploads, after whatever clients do to protect them."""
        return round.uploads

    def judge(self, round: Round) -> Weighting:
        """Weigh a round's finite uploads; ``round.sizes`` still has every client asked."""
        return Weighting({k: round.sizes[k] for k in round.uploads}, self.memory)

    def combine(self, round: Round, judgement: Weighting) -> State:
        """The next head, from finite uploads in the clients' order; the one sent where there are none."""
        if not round.uploads:
            return round.sent
        weights = required(judgement.weights)   # a server without weights combines by itself
        return weighted_mean(list(round.uploads.values()), [weights[k] for k in round.uploads])

    def trust(self, round: Round) -> dict[int, float]:
        """How far the server would trust each upload, from 0 to 1: what an adaptive adversary asks itself."""
        return dict.fromkeys(round.uploads, 1.0)


def only_finite(round: Round) -> Round:
    """Return a round with its usable uploads alone, in the clients' order.

    The rules compute in float32. An upload is usable if that can hold the sum, over all uploads, of the largest
    squared distance between two of them.
    """
    bound = torch.finfo(torch.float32).max / (4 * max(1, len(round.uploads)))   # |a - b|^2 <= 4 max(|a|^2, |b|^2)

    def squared_norm(upload: State) -> float:
        return sum((upload[name] - value).square().sum().item() for name, value in round.sent.items())
    return replace(round, uploads={k: upload for k, upload in sorted(round.uploads.items())
                                   if squared_norm(upload) <= bound})   # NaN is not


def median(values: Tensor) -> Tensor:
    """Return the median; of an even number of values the mean of the middle two, where torch's is the lower."""
    return values.quantile(0.5)


def report(usable: Round, judgement: Weighting) -> list[dict]:
    """The rows of ``server.csv``; an upload that could not be used has a weight of 0."""
    weights = judgement.weights
    total = sum(weights.values()) if weights else 1.0

    def weight(k: int) -> float | None:
        if k not in usable.uploads:
            return 0.0
        return None if weights is None else weights[k] / total
    return [{"client": k, "n": usable.sizes[k], **judgement.columns.get(k, {}), "weight": weight(k)}
            for k in sorted(usable.sizes)]
