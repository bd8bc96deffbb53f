"""A filter against colluders: weight is taken from updates along the direction in which they differ most."""
import torch
from torch import Tensor


def filtered(gram: Tensor, start: Tensor, stands_out: float, taken: float) -> Tensor:
    """Weights without what stands out along one direction.

    As long as the updates' variance along its largest direction is over ``stands_out`` times that along the next,
    each update loses weight by its squared deviation along it, the one that deviates most all of it. If ``taken``
    of the weight is gone and a direction still stands out, the weights under which the largest variance was least
    are returned (Allouah et al. 2025, arXiv 2505.01874, algorithm 1, whose eigenvectors are exact here, from inner
    products alone).

    Args:
        gram: inner products of the updates, ``K x K``, float64.
        start: weights to begin with, ``K``, not all 0.
        stands_out: 1 for the published filter, which always takes its share.
        taken: a share of the weight.
    """
    weight, best, least = start, start, float("inf")
    while weight.sum() > (1 - taken) * start.sum():
        share = weight / weight.sum()
        apart = gram - share @ gram   # (x_i - m) x_j
        centred = apart - (apart @ share)[:, None]   # (x_i - m) (x_j - m)
        root = share.sqrt()
        variances, directions = torch.linalg.eigh(root[:, None] * centred * root)   # ascending
        if variances[-1] <= stands_out * variances[-2].clamp_min(1e-12 * gram.diag().max()):
            return weight
        if variances[-1] < least:
            best, least = weight, variances[-1].item()
        deviation = (centred @ (root * directions[:, -1])).square()
        # Far is decided by those that have weight left: one without any may be so far that this would not end.
        weight = weight * (1 - deviation / deviation[weight > 0].max()).clamp(0, 1)
    return best
