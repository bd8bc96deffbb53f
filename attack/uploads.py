"""What a real upload says by itself: the classes of its client's images, from the last layer's update.

An image pulls the last layer's bias and weights up in its own class and down in all others, since the gradient of
the cross-entropy is ``p - onehot``. Whatever the optimiser and the number of steps, a class that a client does not
have is only ever pulled down (after Wainakh et al. 2021, arXiv 2105.09369, who count labels behind one gradient).
"""
import torch
from torch import Tensor

from server.mean import State

BIAS, WEIGHT = "classifier.output.bias", "classifier.output.weight"


def class_scores(sent: State, upload: State) -> Tensor:
    """How strongly an update speaks for each class, ``num_classes``: the larger, the likelier.

    The bias's update and the sum over a class's weights' updates, each divided by its largest value. The inputs of
    the last layer are not negative (ReLU), so that both have the same sign.
    """
    bias = upload[BIAS] - sent[BIAS]
    weight = (upload[WEIGHT] - sent[WEIGHT]).sum(1)
    return torch.stack([part / part.abs().max().clamp_min(1e-30) for part in (bias, weight)]).sum(0)


def owned_classes(scores: Tensor) -> Tensor:
    """The classes above the widest gap between sorted scores: bool, ``num_classes``. At least one is left out."""
    ordered = scores.sort(descending=True).values
    return scores >= ordered[(ordered[:-1] - ordered[1:]).argmax()]
