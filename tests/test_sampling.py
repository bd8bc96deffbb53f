"""Partitions, as properties over sizes, seeds and kinds; splits; client sampling."""
import re
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sampling import by_client, by_half, partition, sample_clients, split, split_all, twins, unused
from utils import InputError, rng

LABELS = np.random.default_rng(0).integers(0, 10, 4000)
SETTINGS = settings(max_examples=60, deadline=None, derandomize=True)


def check_disjoint(owned, num_clients, total):
    assert len(owned) == num_clients
    everything = np.concatenate(owned)
    assert len(np.unique(everything)) == len(everything)
    assert everything.min() >= 0 and everything.max() < total
    assert min(map(len, owned)) >= 2


@SETTINGS
@given(st.integers(1, 1000), st.sampled_from(["iid", "shards", "dirichlet"]), st.booleans(),
       st.integers(0, 9))
def test_partitions_are_disjoint_and_seeded(num_clients, kind, unequal, seed):
    deal = [partition(LABELS, num_clients, kind, rng(seed, "partition"), classes_per_client=1,
                      unequal=unequal) for _ in range(2)]
    check_disjoint(deal[0], num_clients, len(LABELS))
    assert all(np.array_equal(a, b) for a, b in zip(*deal, strict=True))


@SETTINGS
@given(st.integers(1, 120), st.integers(1, 10), st.booleans(), st.integers(0, 9))
def test_shards_give_exactly_that_many_classes(num_clients, classes, unequal, seed):
    owned = partition(LABELS, num_clients, "shards", rng(seed, "partition"), classes_per_client=classes,
                      unequal=unequal)
    check_disjoint(owned, num_clients, len(LABELS))
    for indices in owned:
        _, counts = np.unique(LABELS[indices], return_counts=True)
        assert len(counts) == classes and len(set(counts)) == 1
        train, _ = split(indices, LABELS, 0.1, rng(seed, "split"))
        assert len(np.unique(LABELS[train])) == classes
    if not unequal:
        assert len({len(indices) for indices in owned}) == 1


def test_shards_spread_the_classes_evenly():
    owned = partition(LABELS, 10, "shards", rng(1, "partition"), classes_per_client=2)
    holders = np.bincount(np.concatenate([np.unique(LABELS[i]) for i in owned]), minlength=10)
    assert (holders == 2).all()


@SETTINGS
@given(st.integers(1, 200), st.sampled_from([0.01, 0.05, 0.5, 10.0]), st.booleans(), st.integers(0, 9))
def test_dirichlet_uses_every_image_and_keeps_the_floor(num_clients, alpha, unequal, seed):
    owned = partition(LABELS, num_clients, "dirichlet", rng(seed, "partition"), alpha=alpha, unequal=unequal,
                      min_images=30)
    check_disjoint(owned, num_clients, len(LABELS))
    assert sum(map(len, owned)) == len(LABELS)
    assert min(map(len, owned)) >= min(30, len(LABELS) // num_clients)


def test_dirichlet_with_150_clients_at_a_small_alpha_is_quick():
    labels = np.random.default_rng(1).integers(0, 10, 70_000)
    start = time.monotonic()
    owned = partition(labels, 150, "dirichlet", rng(1, "partition"), alpha=0.05, min_images=285)
    assert time.monotonic() - start < 5
    assert min(map(len, owned)) >= 285


def test_a_small_alpha_is_more_heterogeneous():
    def classes_held(alpha):
        owned = partition(LABELS, 10, "dirichlet", rng(1, "partition"), alpha=alpha)
        return np.mean([np.bincount(LABELS[i], minlength=10).max() / len(i) for i in owned])
    assert classes_held(0.05) > 0.5 > 0.2 > classes_held(100)


@pytest.mark.parametrize("alpha", [1e-4, 1e-3, 0.01])
def test_the_smallest_alphas_give_each_class_to_one_client(alpha):
    """Gammas of such a concentration underflow to 0; a class in which all did would be dealt evenly."""
    labels = np.repeat(np.arange(100), 20)
    owned = partition(labels, 5, "dirichlet", rng(1, "partition"), alpha=alpha)
    counts = np.stack([np.bincount(labels[indices], minlength=100) for indices in owned])
    assert (counts.max(0) >= 19).sum() >= {1e-4: 100, 1e-3: 98, 0.01: 85}[alpha]
    holders = counts.argmax(0)
    assert np.bincount(holders, minlength=5).min() > 8   # each is as likely to be it


@pytest.mark.parametrize("alpha, clients", [(0.001, 4), (0.1, 10), (1.0, 10)])
def test_dirichlets_concentration_is_alpha_times_the_clients(alpha, clients):
    """Var p = m (1 - m) / (alpha K + 1) with m = 1 / K, over classes."""
    labels = np.repeat(np.arange(1000), 50)
    owned = partition(labels, clients, "dirichlet", rng(1, "partition"), alpha=alpha)
    shares = np.stack([np.bincount(labels[indices], minlength=1000) for indices in owned]) / 50
    expected = (1 / clients) * (1 - 1 / clients) / (alpha * clients + 1)
    assert shares.mean(1) == pytest.approx(1 / clients, rel=0.15)
    assert shares.var() == pytest.approx(expected, rel=0.06)


def test_unequal_skews_the_expected_sizes_of_dirichlet():
    """At a large alpha sizes are the log-normal shares, which are drawn first."""
    shares = rng(1, "partition").lognormal(0, 0.5, 10)
    owned = partition(LABELS, 10, "dirichlet", rng(1, "partition"), alpha=1e4, unequal=True)
    assert np.array(list(map(len, owned))) / len(LABELS) == pytest.approx(shares / shares.sum(), rel=0.03)


def test_unequal_sizes_differ_and_equal_ones_do_not():
    sizes = {unequal: [len(i) for i in partition(LABELS, 10, "iid", rng(1, "partition"), unequal=unequal)]
             for unequal in (False, True)}
    assert max(sizes[False]) - min(sizes[False]) <= 1
    assert max(sizes[True]) > 1.5 * min(sizes[True]) and sum(sizes[True]) == len(LABELS)


@SETTINGS
@given(st.lists(st.integers(0, 4), min_size=2, max_size=200), st.integers(0, 9))
def test_split_is_disjoint_and_stratified(labels, seed):
    labels = np.array(labels)
    indices = np.arange(len(labels))
    stays, aside = split(indices, labels, 0.1, rng(seed, "split"))
    assert np.array_equal(np.sort(np.concatenate([stays, aside])), indices)
    assert len(aside) >= 1 and len(stays) >= 1
    for c in np.unique(labels):
        total, held = (labels == c).sum(), (labels[aside] == c).sum()
        assert held <= np.ceil(0.1 * total) or len(aside) == 1
        if len(aside) < len(np.unique(labels)) and held == total:
            assert len(indices) == len(np.unique(labels))   # one image of each class: one must go


def test_split_takes_a_tenth_of_each_class():
    labels = np.repeat([0, 1], [900, 100])
    _, aside = split(np.arange(1000), labels, 0.1, rng(1, "split"))
    assert np.bincount(labels[aside]).tolist() == [90, 10]


def test_the_largest_remainder_gives_the_odd_image():
    """A tenth of 16, 14 and 13 images is 4 of 43: one of each, and one more of the class with 1.6."""
    labels = np.repeat([0, 1, 2], [13, 16, 14])
    for seed in range(5):
        assert np.bincount(labels[split(np.arange(43), labels, 0.1, rng(seed, "split"))[1]]).tolist() == [1, 2, 1]


def test_splits_do_not_depend_on_other_clients():
    owned = partition(LABELS, 4, "iid", rng(1, "partition"))
    alone = split_all([owned[0]], LABELS, 0.1, 1, "split")[0]
    among = split_all(owned, LABELS, 0.1, 1, "split")[0]
    assert all(np.array_equal(a, b) for a, b in zip(alone, among, strict=True))


def test_each_clients_split_is_drawn_by_itself():
    """Two clients with images of the same classes, a hundred each: other seeds, purposes and rounds differ too."""
    labels = np.tile(np.repeat(np.arange(4), 25), 2)
    owned = [np.arange(100), np.arange(100, 200)]

    def aside(client=0, **changes):
        drawn = split_all(owned, labels, 0.1, **{"seed": 1, "purpose": "split", **changes})
        return tuple(drawn[client][1] - 100 * client)
    draws = {aside(), aside(1), aside(seed=2), aside(purpose="validation"), aside(round=1)}
    assert len(draws) == 5


@pytest.mark.parametrize("kind, num_clients, classes", [
    ("iid", 2001, 2), ("shards", 10, 11), ("shards", 300, 10), ("dirichlet", 5000, 2)])
def test_too_many_clients_or_classes_is_an_input_error(kind, num_clients, classes):
    with pytest.raises(InputError, match="--num_users|--classes_per_client"):
        partition(LABELS, num_clients, kind, rng(1, "partition"), classes_per_client=classes)


def test_sample_clients():
    assert sample_clients(10, 1.0, rng(1, "sample")) == list(range(10))
    some = sample_clients(100, 0.1, rng(1, "sample", round=1))
    assert len(set(some)) == 10 and some == sorted(some)
    assert some != sample_clients(100, 0.1, rng(1, "sample", round=2))
    assert len(sample_clients(5, 1e-6, rng(1, "sample"))) == 1
    assert len(sample_clients(10, 0.29, rng(1, "sample"))) == 3


def test_poisson_sampling_takes_each_client_with_the_share_asked_for():
    """Of 40,000 draws at 0.1, over 4,240 or under 3,760 have a probability of 1e-4; sizes vary as a binomial's."""
    drawn = [sample_clients(100, 0.1, rng(1, "sample", round=r), poisson=True) for r in range(400)]
    sizes = np.array(list(map(len, drawn)))
    assert abs(sizes.sum() - 4000) < 240 and sizes.var() == pytest.approx(9, rel=0.35)
    assert all(some == sorted(set(some)) for some in drawn) and set().union(*drawn) == set(range(100))


def test_a_partition_of_the_users_own():
    owned = by_client(np.array([1, 0, -1, 1, 0, 0, 1]), 2)
    assert [part.tolist() for part in owned] == [[1, 4, 5], [0, 3, 6]]


@pytest.mark.parametrize("clients, num_clients, said", [
    (None, 2, "no array `client`"), (np.array([0, 0, 1, 1, 2, 2]), 2, "3 clients; give --num_users 3"),
    (np.array([0, 0, 1, -1]), 2, "client 1 has 1 images")])
def test_a_partition_that_the_file_does_not_have(clients, num_clients, said):
    with pytest.raises(InputError, match=said):
        by_client(clients, num_clients)


@pytest.mark.parametrize("counts, users, said", [
    (np.round(300 * 0.01 ** (np.arange(10) / 9)).astype(int), 5, "715 of 745 images .* class 9 is short, 3 for"),
    (np.round(5000 * 0.01 ** (np.arange(10) / 9)).astype(int), 10, "11,908 of 12,408 .* class 9 is short, 50 for"),
    (np.full(10, 1000), 4, "2,000 of 10,000 .*; nobody has class 3, 5$"), (np.full(10, 1000), 5, None)])
def test_shards_say_what_they_leave_to_nobody(counts, users, said):
    labels, names = np.repeat(np.arange(10), counts), np.arange(10)
    line = unused(labels, partition(labels, users, "shards", rng(1, "partition")), names)
    assert line is None if said is None else re.search(said, line)


def test_classes_are_named_as_in_the_file():
    labels = np.repeat([0, 1], [594, 6])
    line = unused(labels, partition(labels, 3, "shards", rng(1, "partition")), np.array([10, 20]))
    assert "588 of 600" in line and "class 20 is short, 6 for 3 of the clients" in line


def test_the_files_own_split_is_kept():
    splits = by_half([np.array([0, 2, 7, 9]), np.array([1, 8])], 8)
    assert [[part.tolist() for part in pair] for pair in splits] == [[[0, 2, 7], [9]], [[1], [8]]]
    with pytest.raises(InputError, match="2 of 3 clients, client 1 first, have no image of the file's test half"):
        by_half([np.array([0, 9]), np.array([1, 2]), np.array([3, 4])], 8)
    with pytest.raises(InputError, match="1 of 1 clients, client 0 first, have no image of the file's train half"):
        by_half([np.array([8, 9])], 8)


def test_twins_are_counted_once_a_held_out_image():
    images = np.arange(8)[:, None, None] * np.ones((8, 2, 2), np.uint8)
    images[[3, 6, 7]] = images[0]
    splits = [(np.array([0, 1]), np.array([2, 3])), (np.array([4, 5]), np.array([6, 7]))]
    assert twins(images, splits) == (3, 1)
    images[3] = np.flip(images[1] + [[0, 0], [0, 1]])   # the same pixels, elsewhere
    assert twins(images, splits) == (2, 0)


def test_twins_among_70_000_images_take_no_time():
    images = np.random.default_rng(0).integers(0, 255, (70_000, 28, 28), dtype=np.uint8)
    numbers = np.arange(70_000).reshape(10, -1)
    start = time.process_time()
    assert twins(images, [(part[700:], part[:700]) for part in numbers]) == (0, 0)
    assert time.process_time() - start < 5
