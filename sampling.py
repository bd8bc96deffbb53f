"""Partitions of the images over clients, each client's split for testing, and the sampling of clients.

Index arrays point into the pooled data, train half first. Every function takes its own generator, so the same seed
gives the same partition whatever else a run draws.
"""
from argparse import Namespace

import numpy as np
from numpy.random import Generator

from datasets import Dataset
from utils import InputError, digest
from utils import rng as make_rng

MIN_IMAGES = 2   # one to train on, one to test on


def partition(labels: np.ndarray, num_clients: int, kind: str, rng: Generator, *,
              classes_per_client: int = 2, alpha: float = 0.1, unequal: bool = False,
              min_images: int = MIN_IMAGES) -> list[np.ndarray]:
    """Distribute images over clients: one sorted index array per client, disjoint, of at least two images.

    Args:
        labels: the class of every image, ``N`` integers.
        kind: ``iid``, ``shards`` (a fixed number of classes per client), ``pathological`` (the same, but
            clients next to each other have the same classes, in their order) or ``dirichlet``.
        alpha: concentration of ``dirichlet``: small is heterogeneous (Hsu et al. 2019).
        unequal: whether clients' sizes, or the expected sizes of ``dirichlet``, are log-normal (sigma 0.5).
        min_images: the least of a client under ``dirichlet``, if there are enough images.

    Raises:
        InputError: there are too few images or classes for that many clients.
    """
    if num_clients * MIN_IMAGES > len(labels):
        raise InputError(f"--num_users {num_clients}: {len(labels)} images are too few, "
                         f"every client needs at least {MIN_IMAGES}")
    shares = rng.lognormal(0, 0.5, num_clients) if unequal else np.ones(num_clients)
    shares /= shares.sum()
    if kind == "iid":
        owned = _iid(len(labels), shares, rng)
    elif kind in ("shards", "pathological"):
        owned = _shards(labels, shares, classes_per_client, rng, in_order=kind == "pathological")
    else:
        min_images = min(max(min_images, MIN_IMAGES), len(labels) // num_clients)
        owned = _dirichlet(labels, shares, alpha, min_images, rng)
    return [np.sort(indices) for indices in owned]


def _cut(total: int, shares: np.ndarray, floor: int) -> np.ndarray:
    """Return the cuts of ``total`` items into parts of ``floor`` each, plus the rest by ``shares``."""
    ends = np.cumsum(shares) / shares.sum() * (total - floor * len(shares))
    return (np.round(ends).astype(int) + floor * np.arange(1, len(shares) + 1))[:-1]


def _iid(num_images: int, shares: np.ndarray, rng: Generator) -> list[np.ndarray]:
    return np.split(rng.permutation(num_images), _cut(num_images, shares, MIN_IMAGES))


def _shards(labels: np.ndarray, shares: np.ndarray, classes_per_client: int, rng: Generator,
            in_order: bool) -> list[np.ndarray]:
    """Give each client ``classes_per_client`` classes and equally many images of each; some images stay unused.

    Classes are dealt ``in_order`` as PFLlib does (github.com/TsingZ0/PFLlib): all clients of the first classes
    come first. Otherwise they are drawn.
    """
    classes, counts = np.unique(labels, return_counts=True)
    if classes_per_client > len(classes):
        raise InputError(f"--classes_per_client {classes_per_client}: the data has {len(classes)} classes")
    load = np.zeros(len(classes))   # sum of the shares of the clients that have a class
    holders: list[list[int]] = [[] for _ in classes]
    for client, share in enumerate(shares):
        # The least loaded classes, ties at random: loads stay within one client of each other.
        chosen = np.lexsort((rng.random(len(classes)), load))[:classes_per_client]
        if in_order:
            group = client // -(-len(shares) * classes_per_client // len(classes))   # of the same classes
            chosen = np.arange(group * classes_per_client, (group + 1) * classes_per_client) % len(classes)
        load[chosen] += share
        for c in chosen:
            holders[c].append(client)
    # Each client gets two images of each of its classes. The rest is dealt by share; the scarcest class decides
    # the number of images per unit of share.
    spare = counts - MIN_IMAGES * np.array([len(clients) for clients in holders])
    if spare.min() < 0:
        raise InputError(f"--num_users {len(shares)} --classes_per_client {classes_per_client}: too few "
                         f"images of a class to share out, every client needs {MIN_IMAGES} of each")
    density = (spare[load > 0] / load[load > 0]).min()
    quotas = MIN_IMAGES + np.floor(shares * density + 1e-9).astype(int)
    owned: list[list[np.ndarray]] = [[] for _ in shares]
    for c, clients in enumerate(holders):
        pile = rng.permutation(np.flatnonzero(labels == classes[c]))
        for client in clients:
            owned[client].append(pile[:quotas[client]])
            pile = pile[quotas[client]:]
    return [np.concatenate(parts) for parts in owned]


def _dirichlet(labels: np.ndarray, shares: np.ndarray, alpha: float, min_images: int,
               rng: Generator) -> list[np.ndarray]:
    """Deal each class by proportions drawn from Dirichlet(alpha K shares) (Yurochkin et al. 2019).

    The largest clients give images away until every client has ``min_images``; to draw again until no client is
    too small would not end at a small alpha.
    """
    dealt: list[list[np.ndarray]] = [[] for _ in shares]
    for c in np.unique(labels):
        pile = rng.permutation(np.flatnonzero(labels == c))
        proportions = _dirichlet_draw(alpha * len(shares) * shares, rng)
        for client, part in enumerate(np.split(pile, _cut(len(pile), proportions, 0))):
            dealt[client].append(part)
    owned = [rng.permutation(np.concatenate(parts)) for parts in dealt]
    sizes = np.array([len(indices) for indices in owned])
    while (poor := int(sizes.argmin())) != (rich := int(sizes.argmax())) and sizes[poor] < min_images:
        moved = min(min_images - sizes[poor], sizes[rich] - min_images)
        owned[poor] = np.concatenate([owned[poor], owned[rich][:moved]])
        owned[rich] = owned[rich][moved:]
        sizes[poor] += moved
        sizes[rich] -= moved
    return owned


def _dirichlet_draw(concentrations: np.ndarray, rng: Generator) -> np.ndarray:
    """Draw proportions from a Dirichlet distribution, ``K`` numbers of sum 1.

    They are normalised gammas, whose logarithms do not underflow at small concentrations: ``log Gamma(a) = log
    Gamma(a + 1) + log(U) / a``, U uniform (Marsaglia and Tsang 2000).
    """
    logs = np.log(rng.gamma(concentrations + 1)) - rng.standard_exponential(len(concentrations)) / concentrations
    shares = np.exp(logs - logs.max())
    return shares / shares.sum()


def by_client(clients: np.ndarray | None, num_clients: int) -> list[np.ndarray]:
    """Return the user's own partition, ``--partition file``: one sorted index array per client.

    Args:
        clients: the client of each image, ``N`` integers from 0, -1 for none; None if the file has no such array.

    Raises:
        InputError: there is no array, another number of clients, or a client with too few images.
    """
    if clients is None:
        raise InputError("--partition file: the data file has no array `client` (the client of each image, train "
                         "half first); add it, or give --partition shards, dirichlet or iid")
    sizes = np.bincount(clients[clients >= 0])
    if len(sizes) != num_clients:
        raise InputError(f"--num_users {num_clients}: the data file has {len(sizes)} clients; give --num_users "
                         f"{len(sizes)}")
    if sizes.min() < MIN_IMAGES:
        raise InputError(f"--partition file: client {sizes.argmin()} has {sizes.min()} images; every client needs "
                         f"at least {MIN_IMAGES}")
    order = np.argsort(clients, kind="stable")[(clients < 0).sum():]
    return np.split(order, np.cumsum(sizes)[:-1])


def unused(labels: np.ndarray, owned: list[np.ndarray], names: np.ndarray) -> str | None:
    """Return a note on the images that ``--partition shards`` leaves unused, or None."""
    counts, used, holders = (np.bincount(classes, minlength=len(names)) for classes in (
        labels, labels[np.concatenate(owned)], np.concatenate([np.unique(labels[indices]) for indices in owned])))
    if (counts == used).all():
        return None
    short = np.where(holders > 0, counts - used, len(labels)).argmin()
    absent = ", ".join(map(str, names[holders == 0][:10]))
    return (f"the partition leaves {(counts - used).sum():,} of {len(labels):,} images unused: class "
            f"{names[short]} is short, {counts[short]:,} for {holders[short]} clients, and a client has as many "
            "images of each of its classes" + (f"; no client has class {absent}" if absent else ""))


def by_half(owned: list[np.ndarray], train_size: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Split each client's images as the file does (``--keep_split``); InputError if a client lacks a half."""
    splits = [(indices[indices < train_size], indices[indices >= train_size]) for indices in owned]
    for part, half in enumerate(("train", "test")):
        if without := [k for k, pair in enumerate(splits) if not len(pair[part])]:
            raise InputError(f"--keep_split: {len(without)} of {len(owned)} clients, client {without[0]} first, "
                             f"have no image of the file's {half} half; use fewer clients or another --partition, "
                             "or leave it out")
    return splits


def twins(images: np.ndarray, splits: list[tuple[np.ndarray, np.ndarray]]) -> tuple[int, int]:
    """Count held-out images that are also training images, pixel by pixel: of any client, and of the same."""
    hashed = [[{i: hash(images[i].tobytes()) for i in part} for part in pair] for pair in splits]
    trained = [set(train.values()) for train, _ in hashed]
    union = set().union(*trained)
    pairs = [(key in union, key in own) for own, (_, held_out) in zip(trained, hashed, strict=True)
             for key in held_out.values()]
    return sum(of_any for of_any, _ in pairs), sum(of_same for _, of_same in pairs)


def described(data: Dataset, owned: list[np.ndarray], splits: list, args: Namespace) -> tuple[dict, list[str]]:
    """Return a run's entry of ``config.json`` on its images, and notes on their peculiarities."""
    facts = {"pooled": len(data.labels), "owned": sum(map(len, owned)), "classes": data.num_classes,
             "data": digest(np.array(data.images.shape), data.images, data.labels),
             "dealt": digest(*(part for pair in splits for part in pair))}
    notes = list(data.notes)
    if data.names[-1] != data.num_classes - 1:   # numbered anew
        facts["labels"] = data.names.tolist()
    if args.partition in ("shards", "pathological") and (note := unused(data.labels, owned, data.names)):
        notes.append(note)
    if not args.resplit:   # which draws other splits in every round
        facts["duplicates"], own = twins(data.images, splits)
        if facts["duplicates"]:
            held_out = sum(len(aside) for _, aside in splits)
            notes.append(f"{facts['duplicates']:,} of {held_out:,} held-out images are also training images, "
                         f"pixel by pixel, {own:,} of them of the same client")
    return facts, notes


def split(indices: np.ndarray, labels: np.ndarray, share: float,
          rng: Generator) -> tuple[np.ndarray, np.ndarray]:
    """Set ``share`` of a client's images aside, stratified by class: sorted (training, held-out) indices.

    At least one image is held out. At least one per class stays for training, if that allows it.
    """
    piles = [rng.permutation(indices[labels[indices] == c]) for c in np.unique(labels[indices])]
    wanted = max(1, round(share * len(indices)))
    exact = np.array([len(pile) for pile in piles]) * share
    taken = np.floor(exact).astype(int)
    room = np.array([len(pile) - 1 for pile in piles])
    for c in np.lexsort((rng.random(len(piles)), taken - exact)):   # largest remainder first
        if taken.sum() < wanted and taken[c] < room[c]:
            taken[c] += 1
    aside = np.concatenate([pile[:t] for pile, t in zip(piles, taken, strict=True)])
    stays = np.concatenate([pile[t:] for pile, t in zip(piles, taken, strict=True)])
    if not len(aside):
        aside, stays = stays[:1], stays[1:]
    return np.sort(stays), np.sort(aside)


def split_all(owned: list[np.ndarray], labels: np.ndarray, share: float, seed: int, purpose: str,
              round: int = 0) -> list[tuple[np.ndarray, np.ndarray]]:
    """Split every client's images, each by its own generator: (training, held-out) per client."""
    return [split(indices, labels, share, make_rng(seed, purpose, client, round))
            for client, indices in enumerate(owned)]


def sample_clients(num_clients: int, frac: float, rng: Generator, poisson: bool = False) -> list[int]:
    """Draw a round's clients in ascending order: ``max(1, frac K)`` without replacement or, with ``poisson``, each
    with probability ``frac``."""
    if poisson:
        return np.flatnonzero(rng.random(num_clients) < frac).tolist()
    size = max(1, round(frac * num_clients))
    return sorted(rng.choice(num_clients, size, replace=False).tolist())
