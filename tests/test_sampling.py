"""Partitions, as properties over sizes, seeds and kinds; splits; client sampling."""
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sampling import by_client, by_half, partition, sample_clients, split, split_all, twins, unused
from utils import InputError, rng

LABELS = np.random.default_rng(0).integers(0, 10, 4000)
SETTINGS = settings(max_examples=40, deadline=None, derandomize=True)


def dealt(kind, clients, seed=1, labels=LABELS, **options):
    """A partition, which must be disjoint, of at least two images per client, and the same for the same seed."""
    owned, again = (partition(labels, clients, kind, rng(seed, "partition"), **options) for _ in range(2))
    everything = np.concatenate(owned)
    assert len(owned) == clients and min(map(len, owned)) >= 2
    assert len(np.unique(everything)) == len(everything) and everything.max() < len(labels)
    assert all(np.array_equal(a, b) for a, b in zip(owned, again, strict=True))
    return owned


def counts_of(owned, labels, classes):
    return np.stack([np.bincount(labels[indices], minlength=classes) for indices in owned])


@SETTINGS
@given(st.integers(1, 120), st.integers(1, 10), st.booleans(), st.integers(0, 9))
def test_shards_give_exactly_that_many_classes(clients, classes, unequal, seed):
    owned = dealt("shards", clients, seed, classes_per_client=classes, unequal=unequal)
    for indices in owned:
        _, counts = np.unique(LABELS[indices], return_counts=True)
        assert len(counts) == classes and len(set(counts)) == 1
        train, _ = split(indices, LABELS, 0.1, rng(seed, "split"))
        assert len(np.unique(LABELS[train])) == classes
    assert unequal or len({len(indices) for indices in owned}) == 1


def test_pathological_partitions_deal_classes_in_order():
    """As PFLlib does with 20 clients; three classes for 10 clients wrap around."""
    counts = counts_of(dealt("pathological", 20), LABELS, 10) > 0
    pairs = np.arange(20) // 4 * 2   # the first class of each client
    assert [np.flatnonzero(row).tolist() for row in counts] == np.stack([pairs, pairs + 1], 1).tolist()
    counts = counts_of(dealt("pathological", 10, classes_per_client=3), LABELS, 10) > 0
    assert counts.sum(1).tolist() == [3] * 10 and np.flatnonzero(counts[9]).tolist() == [0, 1, 9]


@SETTINGS
@given(st.integers(1, 200), st.sampled_from([0.01, 0.5, 10.0]), st.booleans(), st.integers(0, 9))
def test_dirichlet_uses_every_image_and_keeps_the_floor(clients, alpha, unequal, seed):
    owned = dealt("dirichlet", clients, seed, alpha=alpha, unequal=unequal, min_images=30)
    assert sum(map(len, owned)) == len(LABELS)
    assert min(map(len, owned)) >= min(30, len(LABELS) // clients)


@SETTINGS
@given(st.integers(1, 1000), st.booleans(), st.integers(0, 9))
def test_iid_uses_every_image(clients, unequal, seed):
    owned = dealt("iid", clients, seed, unequal=unequal)
    assert sum(map(len, owned)) == len(LABELS)
    assert unequal or max(map(len, owned)) - min(map(len, owned)) <= 1


def test_classes_and_sizes_are_spread_as_asked():
    assert ((counts_of(dealt("shards", 10), LABELS, 10) > 0).sum(0) == 2).all()
    shares = rng(1, "partition").lognormal(0, 0.5, 10)   # drawn first
    for kind, options in (("dirichlet", {"alpha": 1e4}), ("iid", {})):
        sizes = np.array(list(map(len, dealt(kind, 10, unequal=True, **options))))
        assert sizes / len(LABELS) == pytest.approx(shares / shares.sum(), rel=0.03)


@pytest.mark.parametrize("alpha, clients", [(0.001, 4), (0.1, 10), (1.0, 10)])
def test_dirichlets_concentration_is_alpha_times_the_clients(alpha, clients):
    """Var p = m (1 - m) / (alpha K + 1) with m = 1 / K, over classes."""
    labels = np.repeat(np.arange(1000), 50)
    shares = counts_of(dealt("dirichlet", clients, labels=labels, alpha=alpha), labels, 1000) / 50
    expected = (1 / clients) * (1 - 1 / clients) / (alpha * clients + 1)
    assert shares.mean(1) == pytest.approx(1 / clients, rel=0.15)
    assert shares.var() == pytest.approx(expected, rel=0.06)


@pytest.mark.parametrize("kind, clients, classes", [
    ("iid", 2001, 2), ("shards", 10, 11), ("shards", 300, 10), ("dirichlet", 5000, 2)])
def test_too_many_clients_or_classes_is_an_input_error(kind, clients, classes):
    with pytest.raises(InputError, match="--num_users|--classes_per_client"):
        partition(LABELS, clients, kind, rng(1, "partition"), classes_per_client=classes)


@SETTINGS
@given(st.lists(st.integers(0, 4), min_size=2, max_size=200), st.integers(0, 9))
def test_a_split_is_disjoint_and_stratified(labels, seed):
    labels, indices = np.array(labels), np.arange(len(labels))
    stays, aside = split(indices, labels, 0.1, rng(seed, "split"))
    assert np.array_equal(np.sort(np.concatenate([stays, aside])), indices)
    assert len(aside) >= 1 and len(stays) >= 1
    for c in np.unique(labels):
        total, held = (labels == c).sum(), (labels[aside] == c).sum()
        assert held <= np.ceil(0.1 * total) or len(aside) == 1
        assert held < total or len(indices) == len(np.unique(labels)) or len(aside) >= len(np.unique(labels))


def test_each_clients_split_is_drawn_by_itself():
    """Two clients with images of the same classes, a hundred each: other seeds, purposes and rounds differ too."""
    labels, owned = np.tile(np.repeat(np.arange(4), 25), 2), [np.arange(100), np.arange(100, 200)]

    def aside(client=0, owned=owned, **changes):
        drawn = split_all(owned, labels, 0.1, **{"seed": 1, "purpose": "split", **changes})
        return tuple(drawn[client][1] - 100 * client)
    assert len({aside(), aside(1), aside(seed=2), aside(purpose="validation"), aside(round=1)}) == 5
    assert aside(owned=owned[:1]) == aside()   # whatever other clients there are


def test_clients_are_sampled_by_number_or_independently():
    assert sample_clients(10, 1.0, rng(1, "sample")) == list(range(10))
    some = sample_clients(100, 0.1, rng(1, "sample", round=1))
    assert len(set(some)) == 10 and some == sorted(some) != sample_clients(100, 0.1, rng(1, "sample", round=2))
    assert [len(sample_clients(*pair, rng(1, "sample"))) for pair in ((5, 1e-6), (10, 0.29))] == [1, 3]
    drawn = [sample_clients(100, 0.1, rng(1, "sample", round=r), poisson=True) for r in range(400)]
    sizes = np.array(list(map(len, drawn)))   # beyond 240 from 4,000 has a probability of 1e-4
    assert abs(sizes.sum() - 4000) < 240 and sizes.var() == pytest.approx(9, rel=0.35)
    assert set().union(*drawn) == set(range(100))


def test_a_partition_and_a_split_of_the_file():
    owned = by_client(np.array([1, 0, -1, 1, 0, 0, 1]), 2)
    assert [part.tolist() for part in owned] == [[1, 4, 5], [0, 3, 6]]
    for clients, reason in ((None, "no array `client`"), (np.array([0, 0, 1, -1]), "client 1 has 1 images"),
                            (np.array([0, 0, 1, 1, 2, 2]), "3 clients; give --num_users 3")):
        with pytest.raises(InputError, match=reason):
            by_client(clients, 2)
    splits = by_half([np.array([0, 2, 7, 9]), np.array([1, 8])], 8)
    assert [[part.tolist() for part in pair] for pair in splits] == [[[0, 2, 7], [9]], [[1], [8]]]
    with pytest.raises(InputError, match="2 of 3 clients, client 1 first, have no image of the file's test half"):
        by_half([np.array([0, 9]), np.array([1, 2]), np.array([3, 4])], 8)


@pytest.mark.parametrize("counts, users, note", [
    (np.round(300 * 0.01 ** (np.arange(10) / 9)).astype(int), 5, "715 of 745 images .* class 19 is short, 3 for"),
    (np.full(10, 1000), 4, "2,000 of 10,000 .*; no client has class 13, 15$"), (np.full(10, 1000), 5, None)])
def test_shards_state_the_images_that_nobody_gets(counts, users, note):
    labels, names = np.repeat(np.arange(10), counts), np.arange(10, 20)
    line = unused(labels, partition(labels, users, "shards", rng(1, "partition")), names)
    assert line is None if note is None else re.search(note, line)


def test_twins_are_counted_once_per_held_out_image():
    images = np.arange(8)[:, None, None] * np.ones((8, 2, 2), np.uint8)
    images[[3, 6, 7]] = images[0]
    splits = [(np.array([0, 1]), np.array([2, 3])), (np.array([4, 5]), np.array([6, 7]))]
    assert twins(images, splits) == (3, 1)
    images[3] = np.flip(images[1] + [[0, 0], [0, 1]])   # the same pixels, elsewhere
    assert twins(images, splits) == (2, 0)
