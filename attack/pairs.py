"""Which images are attacked, which other image of its class each is paired with, and how a true image is ranked.

The control of an attack on images is the attack itself on the observation of another image of the same class: the
foreign control. It has everything that an attack can know of a class, and nothing of the image.
"""
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from attack import scoring

MAX_CANDIDATES = 500   # images of the client, among which a true image is ranked
PART = 250             # images that are ranked at a time


def paired(labels: np.ndarray, order: np.ndarray, spare: np.ndarray, count: int | None,
           batch: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Choose the images to attack, and for each the image of its class whose observation is its foreign control.

    The images attacked are the first of ``order``. One by one, each is paired with the next attacked image of its
    class, in a circle, so that the control needs no further observation. The only attacked image of its class is
    paired with the class's next image of ``order`` or ``spare``, which is observed too. A batch is paired with a
    second batch, of the next images with the same labels. An image whose class has too few images is not attacked.

    Args:
        labels: of all images of the data set.
        order: numbers of the client's images, in the order in which they are attacked.
        spare: numbers of other images, which may be observed where the client's do not suffice.
        count: how many images are attacked at most; None for all.
        batch: whether the images are observed together.

    Returns:
        The numbers of the images attacked, and of their partners, ``N`` each. They are empty if no class has two.
    """
    line = np.concatenate([order, spare]).astype(int)
    of_class = {c: line[labels[line] == c] for c in np.unique(labels[line])}
    place = {number: i for members in of_class.values() for i, number in enumerate(members)}
    numbers = np.array([i for i in order if place[i] < len(of_class[labels[i]]) // 2
                        or not batch and len(of_class[labels[i]]) > 1], int)[:count]
    partners = np.empty_like(numbers)
    for c in np.unique(labels[numbers]):
        here = labels[numbers] == c
        size = int(here.sum())
        partners[here] = (of_class[c][size:2 * size] if batch or size == 1 else np.roll(numbers[here], -1))
    return numbers, partners


@dataclass(frozen=True)
class Ranks:
    """The places of true images when candidates are sorted by distance from a reconstruction, each ``R x N``.

    Attributes:
        rank: from 1, among all candidates.
        class_rank: from 1, among the candidates of the image's class.
        class_size: how many these are.
        guess: the share of candidates that are true: how often a guess has rank 1.
    """

    rank: Tensor
    class_rank: Tensor
    class_size: Tensor
    guess: Tensor

    @staticmethod
    def joined(parts: "list[Ranks]") -> "Ranks":
        """The ranks of consecutive images as one."""
        return Ranks(*(torch.cat([getattr(part, name) for part in parts], 1)
                       for name in Ranks.__dataclass_fields__))


@dataclass(frozen=True)
class Candidates:
    """The images of the client among which some true images are ranked.

    Attributes:
        part: which of the attacked images these are.
        numbers: of the candidates in the data set, ``M``.
        is_true, among, alike: bool ``P x M``: the true image of each; its candidates; those of its class.
    """

    part: slice
    numbers: Tensor
    is_true: Tensor
    among: Tensor
    alike: Tensor

    def rank(self, distance: Tensor) -> Ranks:
        """Rank true images by any distance of the candidates, ``R x P x M``."""
        rank, class_rank = (torch.stack([scoring.rank_by(one, self.is_true, among) for one in distance])
                            for among in (self.among, self.alike))
        sizes = [among.sum(1).expand_as(rank) for among in (self.alike, self.among)]
        return Ranks(rank, class_rank, sizes[0], 1 / sizes[1].double())


def candidates(labels: np.ndarray, order: np.ndarray, numbers: np.ndarray) -> Iterator[Candidates]:
    """The candidates of attacked images, ``PART`` images at a time.

    They are the true image and the first of the client's other images in ``order``: ``MAX_CANDIDATES`` at most.
    """
    for start in range(0, len(numbers), PART):
        part = numbers[start:start + PART]
        base = order[:MAX_CANDIDATES]
        pool = np.concatenate([base, np.setdiff1d(part, base)])
        is_true = torch.from_numpy(pool[None] == part[:, None])
        among = torch.zeros_like(is_true)
        among[:, :len(base)] = True
        if len(base) == MAX_CANDIDATES:   # the last one makes room for a true image that is not among them
            among[:, len(base) - 1] = torch.from_numpy(np.isin(part, base))
        among |= is_true
        alike = among & torch.from_numpy(labels[pool][None] == labels[part][:, None])
        yield Candidates(slice(start, start + PART), torch.from_numpy(pool), is_true, among, alike)
