"""The adversaries: what each one holds of a run, from its own files alone, may train on and may spend.

| adversary        | files                      | holds                                            |
| curious_server   | shared.pt, server.pt       | the heads it received, or their mean, and sends  |
| stolen_model     | shared.pt, client_<k>.pt   | the victim's encoder and the victim's own head   |
| prediction_api   | shared.pt, client_<k>.pt   | answers of that model, but not the model         |
| curious_client   | shared.pt, client_<own>.pt | its own encoder, and the heads that it is sent   |

A client that did not train in the round holds the head just aggregated, a malicious one the head it uploaded.
"""
import copy
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import sha256
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import datasets
from attack import decoders
from attack.target import Target, as_floats
from models import RVE, FlattenHWC, as_image, over_draws, reparameterise
from server.base import State, is_finite
from utils import InputError, rng

ALIGNED_STEPS = 128   # of training, at least, before an encoder's moments are those of the victim
Part = TypeVar("Part")
Distance = Callable[[Tensor, Tensor], Tensor]   # latents N x D, labels N -> distance from those of the victim
flatten = FlattenHWC()


@dataclass(frozen=True)
class Knowledge:
    """The parts that an adversary has of one client in one round; None for a part that it does not have."""

    head: nn.Module | None      # images, or latents z in their shape -> logits
    encoder: nn.Module | None   # images -> z or its mean and log variance; the victim's, a guess, or its own
    has_encoder: bool           # True if the head's input is z, also for an adversary without an encoder
    image_shape: tuple[int, int, int]
    next_head: nn.Module | None = None                # that the server sends next, as far as it is shared
    query: Callable[[Tensor], Tensor] | None = None   # images -> probabilities N x num_classes of the service
    known: State = field(default_factory=dict)        # the shared part of an encoder that is not held
    next_trunk: nn.Module | None = None               # of the encoder, if it is shared
    encoded: dict[bytes, tuple[Tensor, Tensor | None]] = field(default_factory=dict)   # digest of an image -> z's

    def __post_init__(self) -> None:
        """Store weights channels last: max pooling of a large batch is then fifteen times as fast."""
        for part in filter(None, (self.head, self.encoder, self.next_head, self.next_trunk)):
            if getattr(part, "channels_last", True):
                part.to(memory_format=torch.channels_last)

    def posterior(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return mean and log variance of z, ``N x CHW`` each; the latter is None for an encoder without noise."""
        encoded = held(self.encoder)(x)
        return encoded if isinstance(encoded, tuple) else (encoded, None)

    def logits(self, x: Tensor, draws: int = 0) -> Tensor:
        """Return log-probabilities of images, ``N x num_classes``, averaged over draws of z; 0 takes its mean."""
        head = held(self.head)
        if not self.has_encoder:
            return head(x).log_softmax(1)
        mu, logvar = self.posterior(x)
        if not draws or logvar is None:
            return head(as_image(mu, self.image_shape)).log_softmax(1)
        each = over_draws(lambda z: head(as_image(z, self.image_shape)).log_softmax(1), mu, logvar, draws)
        return each.logsumexp(0) - float(np.log(draws))


def held(part: Part | None) -> Part:
    """Return a part of ``Knowledge``; LookupError if this adversary does not have it."""
    if part is None:
        raise LookupError("the attack needs a part of the model that this adversary does not have")
    return part


@torch.no_grad()
def posterior_in_parts(knowledge: Knowledge, images: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return ``Knowledge.posterior`` of many images, 256 at a time; without dropout, each is encoded once."""
    if held(knowledge.encoder).training:
        return joined([knowledge.posterior(part) for part in images.split(256)])
    digests, kept = [sha256(image.numpy()).digest() for image in images.contiguous()], knowledge.encoded
    new = {digest: i for i, digest in enumerate(digests) if digest not in kept}
    for part in torch.tensor([*new.values()], dtype=torch.long).split(256) if new else ():
        mu, logvar = knowledge.posterior(images[part])
        for row, i in enumerate(part):
            one = slice(row, row + 1)
            kept[digests[i]] = mu[one], None if logvar is None else logvar[one]
    return joined([kept[digest] for digest in digests])


def joined(posteriors: list[tuple[Tensor, Tensor | None]]) -> tuple[Tensor, Tensor | None]:
    """Return the posteriors of parts of images as one."""
    means, logvars = zip(*posteriors, strict=True)
    return torch.cat(means), None if logvars[0] is None else torch.cat(logvars)


def hold(target: Target, adversary: str, round: int, client: int, own: int = 0) -> Knowledge:
    """Read what an adversary, but ``prediction_api``, has of a client; ``own`` is the curious client's number."""
    shared, network = target.shared(round), target.network()
    if adversary == "curious_server":
        if not shared["sent"]:
            raise InputError(f"--adversary curious_server: --method {target.options['method']} sends it nothing")
        seen = shared["clients"] if is_finite(shared["sum"]) else []   # else no upload shows in the sum
        received = {**dict.fromkeys(seen, shared["sum"]), **shared["uploads"]}
        parameters = received.get(client, shared["sent"]) if round else target.start(0).state_dict()
    elif adversary == "curious_client":   # it never sees the upload of another client
        parameters = {**shared["sent"], **target.private(round, own).parameters}
    else:
        private = target.private(round, client)
        parameters = {**target.own_head(round, client, private), **private.parameters}
    head = network.predictor if adversary == "stolen_model" else "classifier"
    whole = all(name in parameters for name in network.state_dict() if name.startswith(f"{head}."))
    network.load_state_dict(parameters, strict=False)
    network.requires_grad_(False)
    next_head = next_trunk = None
    if adversary == "curious_server":
        following, sent_next = target.network().requires_grad_(False), target.sent_next(round)
        following.load_state_dict(sent_next, strict=False)
        next_head = following.get_submodule("classifier")
        if "encoder.trunk.0.weight" in sent_next:
            next_trunk = following.get_submodule("encoder.trunk")
    names = {name for name in network.state_dict() if name.startswith("encoder.")}
    known = {name.removeprefix("encoder."): parameters[name] for name in names if name in parameters}
    encoder = network.get_submodule("encoder") if 0 < len(known) == len(names) else None
    return Knowledge(network.get_submodule(head) if whole else None, encoder, target.has_encoder,
                     target.data.image_shape, next_head, known={} if encoder is not None else known,
                     next_trunk=next_trunk)


@dataclass(frozen=True)
class Budget:
    """Limits of every adversary, for all methods: effort, and observations of latents."""

    restarts: int         # of each search
    iterations: int       # of each search
    epochs: int           # of training on public images
    draws: int            # of z, averaged in an answer of the model
    lr: float             # size of the client's steps whose upload is observed
    top_scores: int       # class scores that the prediction service tells
    observed: str = "z"   # what attacks on latents see (latents.py)
    clients: int = 1      # whose uploads are observed as one
    tv: float = 1e-2      # weight of total variation where images are searched by their gradient


@dataclass(frozen=True)
class PublicImages:
    """Images that every adversary may train on, ``N x C x H x W`` in [0, 1], and their labels."""

    images: Tensor
    labels: Tensor
    # Returns those of some classes only; None if they show other classes than the victim's.
    of_classes: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None

    def of(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return public images of these labels' classes if possible, else all, and their labels."""
        return (self.images, self.labels) if self.of_classes is None else self.of_classes(labels.unique())


def public_images(target: Target, args: Namespace) -> PublicImages:
    """Return at most ``--public_images`` of the images of ``--public`` that no client has, in random order."""
    name, data = args.public, target.data
    if name == "unowned":
        train, test = target.owned()
        numbers = np.setdiff1d(np.arange(len(data.labels)), np.concatenate([*train, *test]))
        images, labels = data.images[numbers], data.labels[numbers]
    else:
        other = datasets.load(name, args.data_dir, "public")
        if other.image_shape != data.image_shape or other.num_classes > data.num_classes:
            raise InputError(f"--public {name}: its images are {other.image_shape} in {other.num_classes} "
                             f"classes; the run's are {data.image_shape} in {data.num_classes} classes")
        ours = {image.tobytes() for image in data.images}
        new = np.array([image.tobytes() not in ours for image in other.images])
        images, labels = other.images[new], other.labels[new]
    if len(labels) < datasets.MIN_PUBLIC:
        suggested = datasets.OTHER_DATA.get(target.options["dataset"], "NAME")
        shape = " x ".join(map(str, data.image_shape))
        raise InputError(f"--public {name}: only {len(labels)} of its images belong to no client, and "
                         f"{datasets.MIN_PUBLIC} are needed; give --public {suggested}, or the NAME of another "
                         f"data set of {shape} images")
    order = rng(args.seed, "public").permutation(len(labels))
    images, known = images[order], torch.from_numpy(labels[order])

    def first(numbers: Tensor) -> tuple[Tensor, Tensor]:
        chosen = numbers[:args.public_images]
        return as_floats(images[chosen.numpy()]), known[chosen]

    def of_classes(classes: Tensor) -> tuple[Tensor, Tensor]:
        chosen = torch.isin(known, classes).nonzero().flatten()
        return first(chosen if len(chosen) >= datasets.MIN_PUBLIC else torch.arange(len(known)))
    # NAME10k holds ten thousand of NAME's images, so its classes are the same.
    same_classes = name == "unowned" or name.removesuffix("10k") == target.options["dataset"].removesuffix("10k")
    return PublicImages(*first(torch.arange(len(known))), of_classes if same_classes else None)


class Adversary:
    """One adversary of one client in one round. What it trains, it trains once and uses in all its attacks."""

    def __init__(self, knowledge: Knowledge, start: nn.Module, public: PublicImages, kl_weight: float,
                 budget: Budget, seed: Callable[[str], None] = lambda name: None) -> None:
        # Clients start from ``start``; ``seed`` seeds PyTorch for what several attacks use, by its name.
        self.knowledge, self.start, self.public = knowledge, start, public
        self.kl_weight, self.budget, self.seed = kl_weight, budget, seed
        self.decoders: dict[tuple[int, ...], decoders.Decode] = {}   # by the classes they were trained on

    @contextmanager
    def shared(self, name: str) -> Iterator[None]:
        """Draw by a seed of its own, so that attacks do not depend on which of them came first."""
        with torch.random.fork_rng(devices=[]):
            self.seed(name)
            yield

    @cached_property
    def whole_model(self) -> Knowledge:
        """A model from images to logits: the real one, or the real head behind a shadow encoder."""
        if not self.knowledge.has_encoder or self.knowledge.encoder is not None:
            return self.knowledge
        with self.shared("shadow"):
            return shadow_encoder(self.knowledge, self.start, self.public.images, self.public.labels,
                                  self.budget.epochs, self.kl_weight)

    @cached_property
    def generator(self) -> decoders.Generator:
        """A generator of images that look like the public ones."""
        with self.shared("generator"):
            return decoders.generator(self.public.images, self.budget.epochs)

    def score(self, draws: int) -> Callable[[Tensor], Tensor]:
        """Return a function from images to log-probabilities, averaged over draws of z."""
        return lambda x: self.whole_model.logits(x, draws)

    def decode_inputs(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """Turn recovered inputs of the head, ``R x N x C x H x W``, with labels ``N``, into images."""
        if not self.knowledge.has_encoder:
            return inputs.clamp(0, 1)
        key = tuple(labels.unique().tolist())
        if key not in self.decoders:
            with self.shared(f"decoder of {key}"):
                images, _ = self.public.of(labels)
                self.decoders[key] = decoders.decoder(*posterior_in_parts(self.whole_model, images), images,
                                                      self.budget.epochs)
        return torch.stack([self.decoders[key](flatten(restart)) for restart in inputs])

    def random_inputs(self, *shape: int) -> Tensor:
        """Draw inputs of the head where the restarts of a search start, ``R x shape``."""
        noise = torch.randn(self.budget.restarts, *shape)
        return noise if self.knowledge.has_encoder else (0.5 + 0.2 * noise).clamp(0, 1)

    def random_images(self, count: int) -> Tensor:
        """Draw noisy copies of the mean public image, where restarts start: ``R x count x C x H x W``."""
        mean = self.public.images.mean(0)
        return (mean + 0.1 * torch.randn(self.budget.restarts, count, *mean.shape)).clamp(0, 1)


def shadow_encoder(knowledge: Knowledge, start: nn.Module, images: Tensor, labels: Tensor, epochs: int,
                   kl_weight: float, distance: Distance | None = None) -> Knowledge:
    """Train an encoder on public images before the frozen head, from ``start``; ``distance`` adds to the loss."""
    start = copy.deepcopy(start)   # a later call starts from the same weights
    encoder, head = start.get_submodule("encoder").train(), held(knowledge.head)
    encoder.load_state_dict(knowledge.known, strict=False)
    trained: list[Tensor] = [
        parameter for name, parameter in start.named_parameters()
        if not name.startswith("classifier.") and name.removeprefix("encoder.") not in knowledge.known]
    for parameter in trained:
        parameter.requires_grad_(True)

    def loss(part: Tensor) -> Tensor:
        if isinstance(start, RVE):
            mu, logvar, nats = start.encode(images[part], labels[part])
            assert nats is not None   # the labels are given
            z, kl = reparameterise(mu, logvar), nats.mean()
        else:
            z, kl = encoder(images[part]), torch.zeros(())
        value = F.cross_entropy(head(as_image(z, knowledge.image_shape)), labels[part]) + kl_weight * kl
        return value if distance is None else value + distance(z, labels[part])
    if distance is None:
        decoders.fit(trained, loss, len(images), epochs)
    else:   # moments need many images of each class, and time
        decoders.fit(trained, loss, len(images), epochs, 2 * decoders.BATCH, ALIGNED_STEPS)
    return Knowledge(head, encoder.eval().requires_grad_(False), True, knowledge.image_shape)


def moment_distance(latents: Tensor, labels: Tensor) -> Distance:
    """Return the distance from latents ``M x D`` by each class's moments, after FORA (Xu et al. 2024)."""
    unit = latents.std().clamp_min(1e-12)

    def moments(z: Tensor) -> list[Tensor]:
        centred = (z - z.mean(0)) / unit
        covariance = centred.T @ centred / (len(z) - 1)
        # Most entries of the D x D are near 0, so their mean square is small beside the other two.
        return [z.mean(0) / unit, covariance.diagonal().clamp_min(1e-12).sqrt(), 10 * covariance]

    goals = {c: moments(latents[labels == c]) for c in labels.unique().tolist() if (labels == c).sum() > 1}

    def distance(z: Tensor, labels: Tensor) -> Tensor:
        terms = [(value - wanted).square().mean() for c, goal in goals.items() if (labels == c).sum() > 1
                 for value, wanted in zip(moments(z[labels == c]), goal, strict=True)]
        return sum(terms, z.new_zeros(()))
    return distance
