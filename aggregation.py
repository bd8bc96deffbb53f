"""The server: what it makes of the heads that clients upload.

An aggregation rule takes the head sent and the uploads, and returns the next head with one report
a client. The plain weighted mean is here; rules that judge the uploads take its place behind the
same signature.
"""
import torch
from torch import Tensor

State = dict[str, Tensor]


def is_finite(state: State) -> bool:
    """Whether every value of a state dict is finite."""
    return all(bool(torch.isfinite(value).all()) for value in state.values())


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


def mean(sent: State, uploads: dict[int, State], sizes: dict[int, int]) -> tuple[State, list[dict]]:
    """Average this round's uploads, weighted by local data size; non-finite uploads count for nothing.

    Args:
        sent: the head sent at the start of the round; returned as it is when nothing usable came back.
        uploads: client -> head after local training.
        sizes: client -> number of training images, for every client asked to train this round; one
            that is not in ``uploads`` failed to train.

    Returns:
        The next head, and one row for ``server.csv`` a client asked: ``client``, ``n``, ``weight``.
    """
    usable = [k for k in sorted(uploads) if is_finite(uploads[k])]
    total = sum(sizes[k] for k in usable)
    report = [{"client": k, "n": sizes[k], "weight": sizes[k] / total if k in usable else 0.0,
               "malicious": 0} for k in sorted(sizes)]
    if not usable:
        return sent, report
    return weighted_mean([uploads[k] for k in usable], [sizes[k] for k in usable]), report
