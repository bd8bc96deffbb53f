"""Which images are attacked, their partners and their candidates, by hand."""
import numpy as np
import pytest
import torch

from attack import scoring
from attack.scoring import MAX_CANDIDATES, candidates, paired

LABELS = np.array([0, 0, 0, 1, 1, 2, 2, 3])


@pytest.mark.parametrize("count, batch, numbers, partners", [
    (None, False, [2, 3, 0, 1, 5], [0, 4, 1, 2, 6]),   # in a circle; 4 and 6 are held out; 7 has nobody
    (2, False, [2, 3], [0, 4]),                        # alone of their classes: the client's next, a held-out one
    (None, True, [2, 3, 5], [0, 4, 6]),                # half of a class at most, and others with the same labels
    (1, True, [2], [0])])
def test_each_image_has_a_partner_of_its_class(count, batch, numbers, partners):
    found = paired(LABELS, np.array([2, 3, 0, 1, 7, 5]), np.array([4, 6]), count, batch)
    assert [one.tolist() for one in found] == [numbers, partners]


def test_no_image_is_attacked_where_each_class_has_one():
    assert not len(paired(LABELS, np.array([0, 3]), np.array([5]), None)[0])


@pytest.mark.parametrize("size", [4, MAX_CANDIDATES + 40])
def test_candidates_are_the_true_image_and_the_first_of_the_others(size):
    order = np.arange(size)[::-1].copy()
    labels, base = np.arange(1000) % 2, set(order[:MAX_CANDIDATES])
    numbers = np.array([*order[-2:], order[0], 900])   # the last of the client, the first, and a held-out one
    one, = candidates(labels, order, numbers)
    for i, number in enumerate(numbers):
        among = set(one.numbers[one.among[i]].tolist())
        full = number not in base and len(base) == MAX_CANDIDATES   # then the last of them makes room
        assert among == base - ({order[MAX_CANDIDATES - 1]} if full else set()) | {number}
        assert len(among) == (MAX_CANDIDATES if size > MAX_CANDIDATES else 4 + (number == 900))
        assert one.numbers[one.is_true[i]].tolist() == [number]
        alike = set(one.numbers[one.alike[i]].tolist())
        assert alike == {other for other in among if labels[other] == labels[number]}


def test_all_images_are_ranked_a_part_at_a_time():
    parts = list(candidates(np.zeros(700, int), np.arange(700), np.arange(600)))
    assert [one.part for one in parts] == [slice(0, 250), slice(250, 500), slice(500, 750)]
    rank = torch.cat([one.rank(-one.is_true[None].float()).rank for one in parts], 1)
    assert rank.shape == (1, 600) and (rank == 1).all()


def test_calling_all_alike_finds_nothing():
    is_true = torch.eye(3, 5, dtype=torch.bool)
    assert scoring.rank_by(torch.zeros(3, 5), is_true).tolist() == [5, 5, 5]
    among = torch.tensor([[True, True, False, False, True]]).expand(3, 5) | is_true
    assert scoring.rank_by(torch.zeros(3, 5), is_true, among).tolist() == [3, 3, 4]
