"""Who owns which image: non-IID partitions, each client's train and test split, and who trains when.

Index arrays point into the pooled data (train half first). Every function takes its own generator,
so the same seed gives the same partition whatever else a run draws.
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
    """Deal images to clients.

    Args:
        labels: the class of every image, ``N`` integers.
        kind: ``iid``, ``shards`` (a fixed number of classes a client) or ``dirichlet``.
        alpha: ``dirichlet`` only, concentration: small is heterogeneous (Hsu et al. 2019).
        unequal: draw clients' sizes from a log-normal (sigma 0.5) instead of making them equal; for
            ``dirichlet``, whose sizes differ anyway, skew the expected sizes so.
        min_images: what ``dirichlet`` gives a client at least, where there are images enough.

    Returns:
        One sorted index array a client, disjoint, each of at least two images.

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
    elif kind == "shards":
        owned = _shards(labels, shares, classes_per_client, rng)
    else:
        min_images = min(max(min_images, MIN_IMAGES), len(labels) // num_clients)
        owned = _dirichlet(labels, shares, alpha, min_images, rng)
    return [np.sort(indices) for indices in owned]


def _cut(total: int, shares: np.ndarray, floor: int) -> np.ndarray:
    """Where to cut ``total`` items into parts of ``floor`` each plus the rest by ``shares``."""
    ends = np.cumsum(shares) / shares.sum() * (total - floor * len(shares))
    return (np.round(ends).astype(int) + floor * np.arange(1, len(shares) + 1))[:-1]


def _iid(num_images: int, shares: np.ndarray, rng: Generator) -> list[np.ndarray]:
    return np.split(rng.permutation(num_images), _cut(num_images, shares, MIN_IMAGES))


def _shards(labels: np.ndarray, shares: np.ndarray, classes_per_client: int,
            rng: Generator) -> list[np.ndarray]:
    """Exactly ``classes_per_client`` classes a client, and as many images of one as of another.

    The rarest class among those a client has decides the number, so some images may stay unused.
    """
    classes, counts = np.unique(labels, return_counts=True)
    if classes_per_client > len(classes):
        raise InputError(f"--classes_per_client {classes_per_client}: the data has {len(classes)} classes")
    load = np.zeros(len(classes))   # the shares of the clients that have a class, added up
    holders: list[list[int]] = [[] for _ in classes]
    for client, share in enumerate(shares):
        # The least loaded classes, ties at random: loads stay within one client of each other.
        chosen = np.lexsort((rng.random(len(classes)), load))[:classes_per_client]
        load[chosen] += share
        for c in chosen:
            holders[c].append(client)
    # Everybody gets two images of each of its classes, so that one can be trained on. The rest is dealt by share,
    # and the scarcest class decides how many images a unit of share is.
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
    """Each class is dealt by proportions drawn from Dirichlet(alpha K shares) (Yurochkin et al. 2019).

    Usual code draws again until no client is too small, which at a small alpha never ends. Here the
    largest clients give images away until every client has ``min_images``.
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
    """Draw proportions from a Dirichlet distribution, ``K`` concentrations -> ``K`` numbers of sum 1.

    They are normalised gammas, of which all underflow to 0 where every concentration is under 0.002 or so. Their
    logarithms do not: ``log Gamma(a) = log Gamma(a + 1) + log(U) / a``, U uniform (Marsaglia and Tsang 2000).
    """
    logs = np.log(rng.gamma(concentrations + 1)) - rng.standard_exponential(len(concentrations)) / concentrations
    shares = np.exp(logs - logs.max())
    return shares / shares.sum()


def by_client(clients: np.ndarray | None, num_clients: int) -> list[np.ndarray]:
    """Return the user's own partition, ``--partition file``: one sorted index array per client.

    Args:
        clients: the client of each image, ``N`` integers from 0, -1 for nobody; None if the file does not say.

    Raises:
        InputError: the file does not say, has another number of clients, or one of them has too few images.
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
    """Say how many images ``--partition shards`` leaves to nobody, and which class is short; None for no images.

    Args:
        labels: the class of every image, ``N``.
        names: what each class is called.
    """
    counts, used, holders = (np.bincount(classes, minlength=len(names)) for classes in (
        labels, labels[np.concatenate(owned)], np.concatenate([np.unique(labels[indices]) for indices in owned])))
    if (counts == used).all():
        return None
    short = np.where(holders > 0, counts - used, len(labels)).argmin()
    absent = ", ".join(map(str, names[holders == 0][:10]))
    return (f"--partition shards leaves {(counts - used).sum():,} of {len(labels):,} images to nobody: class "
            f"{names[short]} is short, {counts[short]:,} for {holders[short]} of the clients, and a client has as "
            "many images of each of its classes" + (f"; nobody has class {absent}" if absent else ""))


def by_half(owned: list[np.ndarray], train_size: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Split each client's images as the file does (``--keep_split``): its train and val halves, and its test half.

    Raises:
        InputError: a client has none of one of them.
    """
    splits = [(indices[indices < train_size], indices[indices >= train_size]) for indices in owned]
    for part, half in enumerate(("train", "test")):
        if without := [k for k, pair in enumerate(splits) if not len(pair[part])]:
            raise InputError(f"--keep_split: {len(without)} of {len(owned)} clients, client {without[0]} first, "
                             f"have no image of the file's {half} half; use fewer clients or another --partition, "
                             "or leave it out")
    return splits


def twins(images: np.ndarray, splits: list[tuple[np.ndarray, np.ndarray]]) -> tuple[int, int]:
    """Count held-out images that are also training images, pixel by pixel: of any client, and of the same client.

    Args:
        images: ``N x ...``, all of them.
        splits: the training and the held-out images of each client, as index arrays.
    """
    hashed = [[{i: hash(images[i].tobytes()) for i in part} for part in pair] for pair in splits]
    trained = [set(train.values()) for train, _ in hashed]
    everybodys = set().union(*trained)
    found = [(key in everybodys, key in own) for own, (_, held_out) in zip(trained, hashed, strict=True)
             for key in held_out.values()]
    return sum(anybody for anybody, _ in found), sum(own for _, own in found)


def described(data: Dataset, owned: list[np.ndarray], splits: list, args: Namespace) -> tuple[dict, list[str]]:
    """Return what ``config.json`` says of a run's images, and lines about what is unusual in them.

    Args:
        splits: the training and the held-out images of each client.
        args: the run's options.
    """
    facts = {"pooled": len(data.labels), "owned": sum(map(len, owned)), "classes": data.num_classes,
             "data": digest(np.array(data.images.shape), data.images, data.labels),
             "dealt": digest(*(part for pair in splits for part in pair))}
    notes = list(data.notes)
    if data.names[-1] != data.num_classes - 1:   # numbered anew
        facts["labels"] = data.names.tolist()
    if args.partition == "shards" and (note := unused(data.labels, owned, data.names)):
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
    """Set ``share`` of a client's images aside, stratified by class.

    At least one image is set aside and at least one of each class stays, the second winning where a
    client has one image of each class only.

    Returns:
        The indices that stay (for training) and those set aside, both sorted.
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
    """``split`` for every client, each by its own generator: (training, set aside) a client."""
    return [split(indices, labels, share, make_rng(seed, purpose, client, round))
            for client, indices in enumerate(owned)]


def sample_clients(num_clients: int, frac: float, rng: Generator, poisson: bool = False) -> list[int]:
    """Who trains in a round: ``max(1, frac K)`` clients, without replacement, in ascending order.

    With ``poisson``, each client with probability ``frac`` instead, so perhaps nobody.
    """
    if poisson:
        return np.flatnonzero(rng.random(num_clients) < frac).tolist()
    size = max(1, round(frac * num_clients))
    return sorted(rng.choice(num_clients, size, replace=False).tolist())
