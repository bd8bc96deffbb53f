"""A filter against colluders: weight is taken from updates along the direction in which they differ most."""
import torch
from torch import Tensor


def filtered(gram: Tensor, start: Tensor, stands_out: float, taken: float) -> Tensor:
    """Return weights without what stands out along one direction.

    As long as a direction stands out, each update loses weight by its squared deviation along it, the one that
    deviates most all of it. If ``taken`` of the weight is gone and a direction still stands out, the weights under
    which the largest variance was least are returned (Allouah et al. 2025, arXiv 2505.01874, algorithm 1, whose
    eigenvectors are exact here, from inner products alone).

    A direction stands out where the updates' variance along it, over that along the next, is more than
    ``stands_out`` times what this next one is over the median one. Clients of different classes differ along
    several directions, colluders from the others along one.

    Args:
        gram: inner products of the updates, ``K x K``, float64.
        start: weights to begin with, ``K``, not all 0.
        stands_out: 0 for the published filter, which always takes its share.
        taken: a share of the weight.
    """
    weight, best, least = start, start, float("inf")
    tiny = 1e-12 * gram.diag().max()
    while weight.sum() > (1 - taken) * start.sum():
        share = weight / weight.sum()
        apart = gram - share @ gram   # (x_i - m) x_j
        centred = apart - (apart @ share)[:, None]   # (x_i - m) (x_j - m)
        root = share.sqrt()
        variances, directions = torch.linalg.eigh(root[:, None] * centred * root)   # ascending
        largest, following = variances[-1], variances[-2].clamp_min(tiny)
        median = variances[1:].quantile(0.5).clamp_min(tiny)   # the first is 0: they are centred
        if largest <= tiny or largest * median <= stands_out * following.square():
            return weight
        if largest < least:
            best, least = weight, largest.item()
        deviation = (centred @ (root * directions[:, -1])).square()
        # Far is decided by those that have weight left: one without any may be so far that this would not end.
        weight = weight * (1 - deviation / deviation[weight > 0].max()).clamp(0, 1)
    return best
