"""Attacks that ask of an image whether a client was trained on it, and the table of them, ``ATTACKS``.

An attack is given images and their labels, members and non-members mixed, and what its adversary holds. It gives
each image a score, the higher the likelier a member. Who is a member it never sees.
"""
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attack import learnt
from attack.access import Knowledge, Target, Victim, hold, posterior_in_parts
from attack.attacks import shared_head, whole_head
from attack.references import Alone
from attack.scene import MIN_PUBLIC, as_floats, same_classes, unowned_images
from attack.tables import Unit
from methods import METHODS
from models import RVE, Network, as_image, reparameterise
from server.base import State
from utils import rng, seed_torch

Answer = Callable[[Tensor], Tensor]   # images N x C x H x W -> log-probabilities N x num_classes
NOBODY = -1         # no client's number: it uploads nothing, and ``hold`` gives the head that was sent
POPULATION = 1000   # public images at most that RMIA compares an image with
PART = 64           # images that a model is asked about at a time
LEAST = 1e-300      # in place of a probability of 0


@dataclass(frozen=True)
class Asked:
    """The images asked about, and the truth about them.

    Attributes:
        images, labels: ``N x C x H x W`` and ``N``.
        member: whether the client was trained on it, bool ``N``. Only the measure sees it.
    """

    images: Tensor
    labels: Tensor
    member: np.ndarray


def asked(target: Target, client: int) -> Asked | None:
    """All images of a client whose class is among its training and its held-out images; None if none is.

    Members are training images. Non-members are the client's own held-out images of the same classes.
    """
    labels = target.data.labels
    train, test = (halves[client] for halves in target.owned())
    both = np.intersect1d(labels[train], labels[test])
    members, others = (half[np.isin(labels[half], both)] for half in (train, test))
    if not len(both):
        return None
    numbers = np.concatenate([members, others])
    return Asked(as_floats(target.data.images[numbers]), torch.from_numpy(labels[numbers]),
                 np.arange(len(numbers)) < len(members))


class Adversary:
    """What an adversary can do about one client after one round. Its references are trained once.

    Args:
        rounds: the saved rounds that the curious server looks at together.
    """

    def __init__(self, target: Target, args: Namespace, rounds: list[int], round: int, client: int) -> None:
        self.target, self.args, self.rounds, self.round, self.client = target, args, rounds, round, client
        self.trained: dict[tuple[int, ...], list[Network]] = {}   # references, by classes and their images

    @cached_property
    def public(self) -> tuple[np.ndarray, Tensor]:
        """Images that no client owns, uint8, and their labels."""
        return unowned_images(self.target, self.args.public, self.args.data_dir, self.args.seed)

    def public_of(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Public images of the classes asked about, or of all where these mean other things or are too few."""
        images, known = self.public
        chosen = torch.isin(known, labels).nonzero().flatten()
        if len(chosen) < MIN_PUBLIC or not same_classes(self.target, self.args.public):
            chosen = torch.arange(len(known))
        chosen = chosen[:self.args.public_images]
        return as_floats(images[chosen.numpy()]), known[chosen]

    def epochs(self, round: int) -> int:
        """Of training on public images: as many as a client has trained by then, unless told otherwise."""
        return self.args.train_epochs or round * self.target.options.get("local_ep", 1)

    def start(self) -> Network:
        """The network with the weights that all clients start from."""
        return self.target.start(self.round)

    @property
    def kl_weight(self) -> float:
        """Of the KL term in a client's loss."""
        return self.target.options.get("kl_weight") or 0.0

    def stolen(self) -> Network:
        """The client's own model, all of it."""
        private = self.target.private(self.round, self.client)
        head, network = self.target.own_head(self.round, self.client, private), self.target.network()
        network.load_state_dict({**head, **private.parameters})
        return network.requires_grad_(False)

    def references(self, images: Tensor, labels: Tensor, count: int) -> list[Network]:
        """Models trained as the victim was, each on ``count`` of the public images.

        Which network a method has and how clients train it is no secret. A reference has to be as sure of images
        as the victim would be if it had not seen them, and one trained otherwise would not be.
        """
        key = (count, *labels.unique().tolist())
        if key not in self.trained:
            self.trained[key] = [self._reference(i, images, labels, count) for i in range(self.args.references)]
        return self.trained[key]

    def _reference(self, number: int, images: Tensor, labels: Tensor, count: int) -> Network:
        draw = rng(self.args.seed, f"reference {number}", self.client, self.round)
        chosen = torch.from_numpy(draw.permutation(len(images))[:count])
        how = Alone(self.round, self.client, self.args.train_epochs, int(draw.integers(2**31)))
        return how.train(self.target, images[chosen], labels[chosen])


# What a model says of images: (adversary) -> images N x C x H x W -> log-probabilities N x num_classes.

def stolen(adversary: Adversary) -> Answer:
    """The client's own model, averaged over draws of z."""
    knowledge = hold(adversary.target, "stolen_model", adversary.round, adversary.client)
    return partial(knowledge.logits, draws=adversary.args.draws)


def service(adversary: Adversary) -> Answer:
    """The prediction service, which tells only its largest scores; those not told are -inf."""
    victim = Victim(adversary.target, adversary.round, adversary.client)
    return lambda x: victim.answers(x, adversary.args.draws, adversary.args.scores).double().log()


def said(network: Network, draws: int, x: Tensor) -> Tensor:
    """What a reference says."""
    return network.predict(x, draws)[0].double().log()


MODELS = {"stolen_model": stolen, "prediction_api": service}


@torch.no_grad()
def confidence(answer: Answer, images: Tensor, labels: Tensor) -> Tensor:
    """``log(p / (1 - p))`` with p the probability of the true label, float64 ``N``.

    It is in the same order as ``-CE = log p``, but two images that a model is nearly sure of still differ, where
    p rounds to 1. If a service did not tell p, the rest that it did not tell stands for it.
    """
    logs = torch.cat([answer(part) for part in images.split(PART)]).double()
    true = F.one_hot(labels, logs.shape[1]).bool()
    rest = (1 - logs.exp().sum(1, keepdim=True)).clamp_min(LEAST).log()
    logs = torch.where(true & logs.isneginf(), rest, logs).clamp_min(float(np.log(LEAST)))
    return logs[true] - logs.masked_fill(true, -torch.inf).logsumexp(1)


# Attacks: (adversary's name, adversary, images N x C x H x W, labels N) -> scores, float64 N.

def loss(who: str, adversary: Adversary, images: Tensor, labels: Tensor) -> Tensor:
    """A threshold on the loss (Yeom et al. 2018, arXiv 1709.01604): the surer, the likelier a member."""
    return confidence(MODELS[who](adversary), images, labels)


@torch.no_grad()
def kl(who: str, adversary: Adversary, images: Tensor, labels: Tensor) -> Tensor:
    """``-KL(q(z|x) || p_y)`` in nats: trained to be small, it is smaller for a member.

    p_y is the label's own Gaussian with a prior for each class, N(0, I) otherwise.
    """
    network = adversary.stolen()
    assert isinstance(network, RVE)   # or it was not planned
    mu, logvar = map(torch.cat, zip(*(network.encoder(x) for x in images.split(PART)), strict=True))
    return -learnt.kl_of(network, mu, logvar, labels).double()


def rmia(who: str, adversary: Adversary, images: Tensor, labels: Tensor) -> Tensor:
    """RMIA, offline, with few references (Zarifzadeh et al. 2024, arXiv 2312.03262).

    With ``p(x|victim)`` the probability of the true label, and ``p(x)`` of a model that may or may not have seen
    x, a score is the share of public images z for which ``p(x|victim) / p(x) >= gamma p(z|victim) / p(z)``.
    References have not seen x, so ``p(x) = ((1 + a) p_out(x) + 1 - a) / 2`` with their mean ``p_out``.
    """
    args, (public, known) = adversary.args, adversary.public_of(labels)
    size = min(POPULATION, len(public) // 4)   # z, which no reference has seen
    references = adversary.references(public[size:], known[size:], len(images))
    victim = MODELS[who](adversary)

    def ratio(x: Tensor, y: Tensor) -> Tensor:
        each = [confidence(partial(said, one, args.draws), x, y).sigmoid() for one in references]
        usual = ((1 + args.scaling) * torch.stack(each).mean(0) + 1 - args.scaling) / 2
        return confidence(victim, x, y).sigmoid() / usual.clamp_min(LEAST)
    ordered = ratio(public[:size], known[:size]).sort().values
    return torch.searchsorted(ordered, ratio(images, labels) / args.gamma, right=True).double() / size


def fedmia(who: str, adversary: Adversary, images: Tensor, labels: Tensor) -> Tensor:
    """After FedMIA (Zhu et al. 2025, CVPR, arXiv 2402.06289), with the loss as what is measured.

    No other client has trained on x. So the losses of x under their uploads of a round say what is usual, and
    the victim's is standardised by their mean and deviation. A score is the mean over rounds. Behind an encoder,
    the server puts one before all heads of a round: a shadow encoder, trained with the head that it had sent.
    """
    scores, target = [], adversary.target
    for r in adversary.rounds:
        uploads = target.shared(r)["uploads"]   # read once: that is every client's head
        if not comparable(uploads, adversary.client):
            continue
        inputs = images[:, None]
        if target.has_encoder:
            encoded = Knowledge(None, shadow(adversary, r, labels), True, target.data.image_shape)
            inputs = latents(encoded, images, adversary.args.draws)
        network, losses = target.network().requires_grad_(False), {}
        head = network.get_submodule("classifier").to(memory_format=torch.channels_last)
        for k, upload in uploads.items():
            network.load_state_dict(upload, strict=False)
            losses[k] = -F.logsigmoid(confidence(partial(mean_answer, head), inputs, labels))
        own = losses.pop(adversary.client)
        others = torch.stack(list(losses.values()))
        scores.append((others.mean(0) - own) / others.std(0).clamp_min(1e-12))
    return torch.stack(scores).mean(0)


@torch.no_grad()
def latents(encoded: Knowledge, images: Tensor, draws: int) -> Tensor:
    """Draws of z for each image, in its shape, ``N x draws x C x H x W``; one where there is no noise."""
    mu, logvar = posterior_in_parts(encoded, images)
    z = mu[:, None] if logvar is None else reparameterise(
        *(part[:, None].expand(-1, draws, -1) for part in (mu, logvar)))
    return as_image(z, encoded.image_shape).unflatten(0, z.shape[:2])


def mean_answer(head: nn.Module, inputs: Tensor) -> Tensor:
    """Inputs of a head, S an image, ``N x S x C x H x W`` -> averaged log-probabilities ``N x num_classes``."""
    each = head(inputs.flatten(0, 1)).log_softmax(1).unflatten(0, inputs.shape[:2])
    return each.logsumexp(1) - float(np.log(inputs.shape[1]))


def shadow(adversary: Adversary, round: int, labels: Tensor) -> nn.Module | None:
    """The curious server's shadow encoder, trained on public images behind the head sent in a round."""
    sent = hold(adversary.target, "curious_server", round, NOBODY)
    start, (public, known) = adversary.start(), adversary.public_of(labels)
    seed_torch(adversary.args.seed, "shadow", adversary.client, round)
    return learnt.shadow_encoder(sent, start, public, known, adversary.epochs(round), adversary.kl_weight).encoder


def comparable(uploads: dict[int, State], client: int) -> bool:
    """Whether the client and at least two others uploaded."""
    return client in uploads and len(uploads) > 2


@dataclass(frozen=True)
class Attack:
    """A row of the table.

    Attributes:
        adversaries: who can run it.
        source: where it was published.
        all_rounds: whether it looks at all rounds at once, and so gives one row for them.
    """

    score: Callable[[str, Adversary, Tensor, Tensor], Tensor]
    adversaries: tuple[str, ...]
    source: str
    all_rounds: bool = False


ATTACKS = {
    "loss": Attack(loss, tuple(MODELS), "Yeom et al. 2018, arXiv 1709.01604"),
    "kl": Attack(kl, ("stolen_model",), "the KL term of the client's own loss"),
    "rmia": Attack(rmia, tuple(MODELS), "Zarifzadeh et al. 2024, arXiv 2312.03262"),
    "fedmia": Attack(fedmia, ("curious_server",), "after Zhu et al. 2025, arXiv 2402.06289", all_rounds=True),
}


def needs_public(target: Target, unit: Unit) -> bool:
    """Whether an attack trains something on public images."""
    return unit.attack == "rmia" or (unit.attack == "fedmia" and target.has_encoder)


def unfit(target: Target, unit: Unit, rounds: list[int]) -> str | None:
    """Why an attack cannot be run or scored, in words; None if it can."""
    attack = ATTACKS[unit.attack]
    if unit.adversary not in attack.adversaries:
        return "needs what this adversary does not have"
    if asked(target, unit.client) is None:
        return f"client {unit.client} holds out no image of a class that it trained on"
    if unit.attack == "kl" and not METHODS[target.options["method"]].network.variational:
        return "needs an encoder with noise"
    if unit.attack == "rmia" and target.options.get("encoders_from"):
        return "needs references whose encoders are trained as in the run of --encoders_from"
    if not attack.all_rounds:
        return None
    if why := shared_head(target, unit.adversary) or whole_head(target, unit.adversary):
        return why
    if not any(comparable(target.shared(r)["uploads"], unit.client) for r in rounds):
        return f"client {unit.client} and two others uploaded together in no round"
    return None
