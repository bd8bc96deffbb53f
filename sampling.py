"""Who owns which image: non-IID partitions, each client's train and test split, and who trains when.

Index arrays point into the pooled data (train half first). Every function takes its own generator,
so the same seed gives the same partition whatever else a run draws.
"""
import numpy as np
from numpy.random import Generator

from utils import InputError
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
