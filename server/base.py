"""The server: from the clients' uploads to the next head.

Each round, a server receives the uploads (``receive``), weighs them (``weigh``), combines them (``combine``) and
releases the next head (``release``). ``Server`` is FedAvg's weighted mean; others override some of these steps.
"""
import copy
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

State = dict[str, Tensor]
Memory = dict[str, Any]   # numbers and tensors that a server keeps from round to round


def is_finite(state: State) -> bool:
    """Return whether every value of a state dict is finite."""
    return all(bool(value.isfinite().all()) for value in state.values())


def weighted_mean(states: list[State], weights: list[float]) -> State:
    """Return ``sum_k w_k state_k / sum_k w_k`` (McMahan et al. 2017, algorithm 1), summed in the given order."""
    total = sum(weights)
    average = {name: torch.zeros_like(value) for name, value in states[0].items()}
    for state, weight in zip(states, weights, strict=True):
        for name, value in state.items():
            average[name].add_(value, alpha=weight / total)
    return average


def flattened(state: State, names: Mapping[str, Any]) -> Tensor:
    """Return the parameters of a state dict as one vector, in the order of ``names``."""
    return torch.cat([state[name].flatten() for name in names])


def updates_of(sent: State, uploads: list[State]) -> Tensor:
    """Return the updates ``head_k - head`` as rows, ``K x P``, with the parameters in the head's order."""
    start = flattened(sent, sent)
    rows = torch.empty(len(uploads), len(start))
    for row, upload in zip(rows, uploads, strict=True):
        torch.sub(flattened(upload, sent), start, out=row)
    return rows


def moved(sent: State, update: Tensor) -> State:
    """Return ``head + update``, the inverse of one row of ``updates_of``."""
    parts = update.split([value.numel() for value in sent.values()])
    return {name: value + part.view_as(value)
            for (name, value), part in zip(sent.items(), parts, strict=True)}


def median(values: Tensor) -> Tensor:
    """Return the median; for an even number of values the mean of the middle two, unlike ``torch.median``."""
    return values.quantile(0.5)


@dataclass(frozen=True)
class Round:
    """One round as it reaches the server."""

    number: int   # counted from 1
    sent: State   # the head that every client started from
    uploads: dict[int, State]   # client -> its head after local training
    # client -> its number of training images, for every client asked to train. A client that is not in
    # ``uploads`` failed to train.
    sizes: dict[int, int]

    @property
    def traffic(self) -> dict[str, int]:
        """Return the bytes of all uploads, and of the parameters sent to every client asked: columns."""
        up, down = ([value.nbytes for state in states for value in state.values()]
                    for states in (self.uploads.values(), [self.sent] * len(self.sizes)))
        return {"bytes_up": sum(up), "bytes_down": sum(down)}


@dataclass(frozen=True)
class Weighting:
    """The aggregation weights of a round's usable uploads."""

    # client -> weight, not normalised; None if the next head is not a weighted mean of uploads
    weights: dict[int, float] | None
    memory: Memory   # what the server remembers for the next round
    # client -> further columns of its row in ``server.csv``
    columns: dict[int, dict[str, float]] = field(default_factory=dict)


class Aggregated(NamedTuple):
    """The next head, what the server saw, and rows of ``server.csv``, one per client asked.

    That is the uploads as they arrived or, with secure aggregation, their weighted mean alone (``total``).
    """

    head: State
    uploads: dict[int, State]
    rows: list[dict]
    total: State


class Server:
    """FedAvg's server: a mean weighted by local data size, without the uploads that are not finite.

    Args:
        options: all options of the run by name.
        smallest: number of training images of the smallest local data set.

    Attributes:
        protects: whether ``receive`` changes the uploads, so that the server does not see what clients trained.
        memory: numbers and tensors that the next round starts from; a checkpoint keeps them.
        min_uploads: with fewer uploads the rule cannot tell which client is malicious.
    """

    protects = False
    min_uploads = 1

    def __init__(self, options: Mapping[str, Any], smallest: int = 1):
        self.options, self.smallest = options, smallest
        self.memory: Memory = {}

    @property
    def facts(self) -> dict[str, object]:
        """Return the server's entries of ``config.json``."""
        return {}

    @property
    def secure(self) -> bool:
        """Return whether the server sees the weighted mean of the uploads and nothing else.

        This is the ideal functionality of secure aggregation (Bonawitz et al. 2017, doi 10.1145/3133956.3133982),
        simulated without cryptography.
        """
        return bool(self.options.get("secure_aggregation"))

    def __call__(self, round: Round) -> Aggregated:
        """Aggregate a round and update the memory."""
        seen = replace(round, uploads=self.receive(round))
        usable = seen if self.secure else only_finite(seen)
        weighting = self.weigh(usable)
        total = self.combine(usable, weighting)
        self.memory = weighting.memory
        if self.secure and not is_finite(total):   # no upload can be singled out, so none is used
            return Aggregated(round.sent, {}, report(replace(usable, uploads={}), weighting), total)
        head, rows = self.release(usable, total), report(usable, weighting)
        return Aggregated(head, {}, rows, total) if self.secure else Aggregated(head, seen.uploads, rows, {})

    def preview(self, round: Round) -> State:
        """Return the next head that a round would give, without updating the memory."""
        asked = copy.copy(self)
        asked.memory = dict(self.memory)
        return asked(round).head

    def receive(self, round: Round) -> dict[int, State]:
        """Return the uploads as the server sees them, clipped or noised if the method does so."""
        return round.uploads

    def weigh(self, round: Round) -> Weighting:
        """Weigh a round's finite uploads; ``round.sizes`` still has every client asked."""
        return Weighting({k: round.sizes[k] for k in round.uploads}, self.memory)

    def combine(self, round: Round, weighting: Weighting) -> State:
        """Return the next head, from finite uploads in the clients' order; the one sent if there are none."""
        if not round.uploads:
            return round.sent
        assert weighting.weights is not None
        return weighted_mean(list(round.uploads.values()), [weighting.weights[k] for k in round.uploads])

    def release(self, round: Round, total: State) -> State:
        """Return the next head, which is what the uploads were combined to, with noise if the method adds any."""
        return total

    def trust(self, round: Round) -> dict[int, float]:
        """Return the trust in each upload, from 0 to 1; adaptive attackers query it."""
        return dict.fromkeys(round.uploads, 1.0)


def only_finite(round: Round) -> Round:
    """Return a round with its usable uploads only, in the clients' order: float32, in which the rules compute, can
    hold the sum, over all uploads, of the largest squared distance between two of them."""
    bound = torch.finfo(torch.float32).max / (4 * max(1, len(round.uploads)))   # |a - b|^2 <= 4 max(|a|^2, |b|^2)

    def squared_norm(upload: State) -> float:
        return sum((upload[name] - value).square().sum().item() for name, value in round.sent.items())
    return replace(round, uploads={k: upload for k, upload in sorted(round.uploads.items())
                                   if squared_norm(upload) <= bound})   # False for NaN


def report(usable: Round, weighting: Weighting) -> list[dict]:
    """Return the rows of ``server.csv``; an unusable upload has a weight of 0."""
    weights = weighting.weights
    total = sum(weights.values()) if weights else 1.0

    def weight(k: int) -> float | None:
        if k not in usable.uploads:
            return 0.0
        return None if weights is None else weights[k] / total
    return [{"client": k, "n": usable.sizes[k], **weighting.columns.get(k, {}), "weight": weight(k)}
            for k in sorted(usable.sizes)]
