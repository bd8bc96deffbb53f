"""How well scores tell members from non-members: the area under the ROC curve, and its left end.

Members are weighted so that each class has the same share of them as of the non-members. Otherwise a score that
knows the class alone could tell members from non-members.
"""
from collections.abc import Callable
from functools import partial

import numpy as np
from numpy import ndarray

from utils import rng

FALSE_POSITIVE_RATES = (0.001, 0.01)
DRAWS = 1000   # of the bootstrap


def class_weights(members: ndarray, non_members: ndarray) -> ndarray:
    """The weight of each member, of mean 1, that gives the classes the shares of the non-members.

    Args:
        members, non_members: classes of M and N images; both have the same classes.
    """
    weights = np.empty(len(members))
    for one in np.unique(members):
        weights[members == one] = (non_members == one).sum() / (members == one).sum()
    return weights * len(members) / weights.sum()


def auc(members: ndarray, non_members: ndarray, weights: ndarray) -> float:
    """The chance that a member has a higher score than a non-member; a tie counts half.

    Args:
        members, non_members: their scores, ``M`` and ``N``.
        weights: of the members, ``M``.
    """
    ordered = np.sort(non_members)
    below = np.searchsorted(ordered, members, "left") + np.searchsorted(ordered, members, "right")
    return float(np.average(below, weights=weights) / (2 * len(ordered)))


def tpr(members: ndarray, non_members: ndarray, weights: ndarray, rate: float) -> float:
    """The share of members over the lowest threshold that at most ``rate`` of the non-members are over.

    With fewer than ``1 / rate`` non-members, none of them may be over it.
    """
    allowed = int(rate * len(non_members) + 1e-9)
    threshold = np.sort(non_members)[len(non_members) - 1 - allowed]
    return float(np.average(members > threshold, weights=weights))


def resampled(classes: ndarray, generator: np.random.Generator) -> ndarray:
    """Indices of a bootstrap sample, ``DRAWS x N``, drawn within each class so that its share stays."""
    index = np.empty((DRAWS, len(classes)), int)
    for one in np.unique(classes):
        where = np.flatnonzero(classes == one)
        index[:, where] = where[generator.integers(len(where), size=(DRAWS, len(where)))]
    return index


def measure(scores: ndarray, classes: ndarray, member: ndarray) -> dict[str, float]:
    """AUC and TPR with 95 % bootstrap intervals over both members and non-members.

    Args:
        scores: ``N``, high for members.
        classes: ``N``.
        member: ``N``, bool.

    Returns:
        ``auc``, ``tpr_at_fpr_0.001``, ..., and of each also ``_low`` and ``_high``, to five decimals: ties of all
        scores are 0.5 exactly, and the file shows what `leaks` was judged by.
    """
    inside, outside = scores[member], scores[~member]
    weights, draw = class_weights(classes[member], classes[~member]), rng(0, "membership bootstrap")
    samples = list(zip(resampled(classes[member], draw), resampled(classes[~member], draw), strict=True))
    metrics: dict[str, Callable[..., float]] = {"auc": auc}
    for rate in FALSE_POSITIVE_RATES:
        metrics[f"tpr_at_fpr_{rate:g}"] = partial(tpr, rate=rate)
    found: dict[str, float] = {}
    for name, metric in metrics.items():
        drawn = [metric(inside[i], outside[j], weights[i]) for i, j in samples]
        values = metric(inside, outside, weights), *np.quantile(drawn, (0.025, 0.975))
        found |= {name + end: round(float(value), 5)
                  for end, value in zip(("", "_low", "_high"), values, strict=True)}
    return found
