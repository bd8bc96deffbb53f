"""The server: what it makes of the heads that clients upload.

A server is called once a round with the head it sent and the uploads, and returns the next head, the uploads
as it saw them, and one report a client. The plain weighted mean is here, published robust rules in robust.py,
weights that follow a threat model in threat.py, and differential privacy in privacy.py.
"""
from dataclasses import dataclass

import torch
from torch import Tensor

State = dict[str, Tensor]


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


def updates_of(sent: State, uploads: list[State]) -> Tensor:
    """``D_k = head_k - head`` as rows, ``K x P``, parameters in the head's order."""
    rows = torch.empty(len(uploads), sum(value.numel() for value in sent.values()))
    start = 0
    for name, value in sent.items():
        columns = rows[:, start:start + value.numel()]
        for row, upload in zip(columns, uploads, strict=True):
            torch.sub(upload[name].flatten(), value.flatten(), out=row)
        start += value.numel()
    return rows


def moved(sent: State, update: Tensor) -> State:
    """``head + D``: the inverse of one row of ``updates_of``."""
    parts = update.split([value.numel() for value in sent.values()])
    return {name: value + part.view_as(value)
            for (name, value), part in zip(sent.items(), parts, strict=True)}


@dataclass(frozen=True)
class Setting:
    """What servers need to know of a run; the rest is for those that add noise (privacy.py).

    Args:
        smallest: training images of the smallest local data set.
        clip: bound on a norm, or None where the method finds its own.
        exposures: how often NbAFL counts an upload as seen.
        noise_multiplier: noise in units of the clip, or None to find it from ``epsilon``.
        tolerate: share of the uploads that a robust rule is told may be malicious.
        rule: name of the robust rule (robust.py).
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
    rule: str = "mean"


class Server:
    """FedAvg's: a mean weighted by local data size, in which non-finite uploads count for nothing.

    Attributes:
        protects: whether ``receive`` changes what clients trained, so that the server does not see it.
        memory: numbers and tensors that the next round starts from; a checkpoint keeps them.
    """

    protects = False

    def __init__(self, setting: Setting):
        self.setting = setting
        self.memory: dict[str, float | Tensor] = {}

    @property
    def facts(self) -> dict[str, float | str]:
        """What ``config.json`` says of it."""
        return {}

    def receive(self, round: int, sent: State, uploads: dict[int, State]) -> dict[int, State]:
        """What the server sees of the clients' uploads, after whatever they did to protect them."""
        return uploads

    def weights(self, sizes: dict[int, int]) -> dict[int, float]:
        """Each client's weight before they are made to sum to 1."""
        return dict(sizes)

    def trust(self, round: int, sent: State, uploads: dict[int, State],
              sizes: dict[int, int]) -> dict[int, float]:
        """How far it trusts each upload, from 0 to 1."""
        return dict.fromkeys(uploads, 1.0)

    def __call__(self, round: int, sent: State, uploads: dict[int, State],
                 sizes: dict[int, int]) -> tuple[State, dict[int, State], list[dict]]:
        """Aggregate a round.

        Args:
            sent: the head sent at the start of the round; returned as it is when nothing usable came back.
            uploads: client -> head after local training.
            sizes: client -> number of training images, for every client asked to train this round; one
                that is not in ``uploads`` failed to train.

        Returns:
            The next head; the uploads as the server saw them; and one row for ``server.csv`` a client asked:
            ``client``, ``n``, ``weight`` and what else its rule has to say.
        """
        seen = self.receive(round, sent, uploads)
        usable = [k for k in sorted(seen) if is_finite(seen[k])]
        weights, notes = self.assess(round, sent, {k: seen[k] for k in usable}, {k: sizes[k] for k in usable})
        total = sum(weights.values())
        report = [{"client": k, "n": sizes[k], **notes.get(k, {}),
                   "weight": weights[k] / total if k in weights else 0.0} for k in sorted(sizes)]
        head = self.combine(round, sent, [seen[k] for k in usable], list(weights.values()))
        return head, seen, report

    def assess(self, round: int, sent: State, uploads: dict[int, State],
               sizes: dict[int, int]) -> tuple[dict[int, float], dict[int, dict]]:
        """The finite uploads' weights, and further columns of ``server.csv``."""
        return self.weights(sizes), {}

    def combine(self, round: int, sent: State, uploads: list[State], weights: list[float]) -> State:
        """The next head."""
        return weighted_mean(uploads, weights) if uploads else sent
