"""Membership inference: attacks that score how likely a client was trained on an image, and their measures."""
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import cached_property, partial
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy import ndarray
from torch import Tensor, nn

from attack.adversaries import Knowledge, PublicImages, hold, posterior_in_parts, public_images, shadow_encoder
from attack.classes import log_odds
from attack.observations import Victim
from attack.target import Target
from attack.verdict import FALSE_POSITIVE_RATES
from devices import choose_precision, seed_torch
from models import Network, as_image, reparameterise
from sampling import sample_clients
from server.base import State, is_finite
from update import ClientState, Diverged, Trainer, Training
from utils import InputError, rng

Answer = Callable[[Tensor], Tensor]   # images N x C x H x W -> log-probabilities N x num_classes
NOBODY = -1         # no client's number: it uploads nothing, and ``hold`` gives the head that was sent
POPULATION = 1000   # public images at most that RMIA compares an image with
PART = 64           # images that a model is asked about at a time
LEAST = 1e-300      # in place of a probability of 0
DRAWS = 1000        # of the bootstrap


class Asked(NamedTuple):
    """The images asked about."""

    images: Tensor
    labels: Tensor
    member: ndarray   # True where the client was trained on it, which only the measure sees


def asked(target: Target, client: int) -> Asked | None:
    """Return a client's images of the classes that it trains on and holds out too; None if there are none."""
    labels = target.data.labels
    train, test = (halves[client] for halves in target.owned())
    both = np.intersect1d(labels[train], labels[test])
    members, others = (half[np.isin(labels[half], both)] for half in (train, test))
    numbers = np.concatenate([members, others])
    return Asked(target.pixels(numbers), target.labels(numbers),
                 np.arange(len(numbers)) < len(members)) if len(both) else None


class MembershipAdversary:
    """One adversary of one client after one round; the curious server looks at several ``rounds`` together."""

    def __init__(self, target: Target, args: Namespace, rounds: list[int], round: int, client: int) -> None:
        self.target, self.args, self.rounds, self.round, self.client = target, args, rounds, round, client
        self.trained: dict[tuple[int, ...], list[Network]] = {}   # references, by classes and their images

    @cached_property
    def public(self) -> PublicImages:
        """Images that no client owns."""
        return public_images(self.target, self.args)

    def references(self, images: Tensor, labels: Tensor, count: int) -> list[Network]:
        """Return models trained as the victim was, each on ``count`` of the public images."""
        key, like = (count, *labels.unique().tolist()), (self.round, self.client, self.args.train_epochs)
        if key not in self.trained:
            self.trained[key] = []
            for number in range(self.args.references):
                draw = rng(self.args.seed, f"reference {number}", self.client, self.round)
                chosen = torch.from_numpy(draw.permutation(len(images))[:count])
                self.trained[key].append(train_reference(self.target, like, int(draw.integers(2**31)),
                                                         images[chosen], labels[chosen]))
        return self.trained[key]


def schedule(target: Target, last: int, client: int, epochs: int | None) -> list[tuple[int, int]]:
    """Return the rounds in which a reference trains, as the client did or ``epochs`` fill, and their epochs."""
    options, names, each = target.options, target.seeded, target.options["local_ep"] or 1
    if epochs:
        return [(done // each + 1, min(each, epochs - done)) for done in range(0, epochs, each)]

    def trains(number: int) -> bool:
        row, draw = target.row(number), rng(options["seed"], "sample", round=number)
        chosen = sample_clients(target.clients, options["frac"], draw, row.poisson)
        return client in chosen or not row.shared_and_private(names)[1]
    return [(number, each) for number in range(1, last + 1) if trains(number)]


def train_reference(target: Target, like: tuple[int, int, int | None], seed: int, images: Tensor,
                    labels: Tensor) -> Network:
    """Train a model alone as clients train, from the seeded start; ``like`` are arguments of ``schedule``."""
    pixels = (images * 255).round().byte().permute(0, 2, 3, 1).contiguous()   # as clients store them
    network = target.start(0).to(memory_format=torch.channels_last)   # of round 0: before the full sharing rounds
    try:
        precision = choose_precision(target.options["precision"], torch.device("cpu"))
        trainer = (target.method.trainer or Trainer)(
            network, target.method, pixels, labels, target.data.num_classes,
            Training.from_options(target.options, precision, seed=seed))
        shared, private_part = trainer.shared_and_private(trainer.state())
        private = ClientState(private_part)
        for number, epochs in schedule(target, *like):
            steps = None if like[2] else trainer.training.local_steps
            now = replace(trainer, training=replace(trainer.training, epochs=epochs, local_steps=steps))
            shared, private, _ = now.train(like[1], number, np.arange(len(labels)), shared, private)
    except KeyError as error:
        raise InputError(f"{target.results / 'config.json'}: it has no --{error.args[0]}") from error
    except Diverged as error:
        raise InputError(f"a reference model diverged ({error}); try another --train_epochs") from error
    network.load_state_dict({**shared, **private.parameters})
    return network.eval().requires_grad_(False)


def answer_of(name: str, adversary: MembershipAdversary) -> Answer:
    """Return the answers of the stolen model, or of the service, -inf where it does not tell a score."""
    target, args, round, client = adversary.target, adversary.args, adversary.round, adversary.client
    if name == "stolen_model":
        return partial(hold(target, name, round, client).logits, draws=args.draws)
    victim = Victim(target, round, client)
    return lambda x: victim.answers(x, args.draws, args.scores).double().log()


@torch.no_grad()
def confidence(answer: Answer, images: Tensor, labels: Tensor) -> Tensor:
    """Return ``log(p / (1 - p))`` of the true label, float64 ``N``; a p that is not told is the rest."""
    logs = torch.cat([answer(part) for part in images.split(PART)]).double()
    true = F.one_hot(labels, logs.shape[1]).bool()
    rest = (1 - logs.exp().sum(1, keepdim=True)).clamp_min(LEAST).log()
    logs = torch.where(true & logs.isneginf(), rest, logs).clamp_min(float(np.log(LEAST)))
    return log_odds(logs, labels)


# Attacks: (adversary's name, adversary, images N x C x H x W, labels N) -> scores, float64 N.

def loss(name: str, adversary: MembershipAdversary, images: Tensor, labels: Tensor) -> Tensor:
    """Score by the loss: the surer, the likelier a member."""
    return confidence(answer_of(name, adversary), images, labels)


def kl(name: str, adversary: MembershipAdversary, images: Tensor, labels: Tensor) -> Tensor:
    """Score by ``-KL(q(z|x) || prior)`` in nats: trained to be small, it is smaller for a member."""
    nats = Victim(adversary.target, adversary.round, adversary.client).kl(images, labels)
    assert nats is not None   # or it was not planned
    return -nats.double()


def rmia(name: str, adversary: MembershipAdversary, images: Tensor, labels: Tensor) -> Tensor:
    """Score by offline RMIA: the share of public z with ``p(x|victim) / p(x) >= gamma p(z|victim) / p(z)``.

    References have not seen x, so ``p(x) = ((1 + a) p_out(x) + 1 - a) / 2`` with their mean ``p_out``.
    """
    args, (public, known) = adversary.args, adversary.public.of(labels)
    size = min(POPULATION, len(public) // 4)   # z, which no reference has seen
    references = adversary.references(public[size:], known[size:], len(images))
    victim = answer_of(name, adversary)

    def answer(reference: Network, x: Tensor) -> Tensor:
        return reference.predict(x, args.draws)[0].double().log()

    def ratio(x: Tensor, y: Tensor) -> Tensor:
        each = [confidence(partial(answer, reference), x, y).sigmoid() for reference in references]
        usual = ((1 + args.scaling) * torch.stack(each).mean(0) + 1 - args.scaling) / 2
        return confidence(victim, x, y).sigmoid() / usual.clamp_min(LEAST)
    ordered = ratio(public[:size], known[:size]).sort().values
    return torch.searchsorted(ordered, ratio(images, labels) / args.gamma, right=True).double() / size


def fedmia(name: str, adversary: MembershipAdversary, images: Tensor, labels: Tensor) -> Tensor:
    """Score by the loss under the upload, standardised by other clients' and averaged over rounds."""
    scores = []
    for r in adversary.rounds:
        uploads = adversary.target.shared(r)["uploads"]   # read once: that is every client's head
        if adversary.client not in uploads or len(uploads) < 3:
            continue
        losses = dict(zip(uploads, losses_under(uploads.values(), adversary, r, images, labels), strict=True))
        own = losses.pop(adversary.client)
        others = torch.stack(list(losses.values()))
        scores.append((others.mean(0) - own) / others.std(0).clamp_min(1e-12))
    return torch.stack(scores).mean(0)


def sum_loss(name: str, adversary: MembershipAdversary, images: Tensor, labels: Tensor) -> Tensor:
    """Score by how much the loss falls from the head sent to the mean of all uploads, averaged over rounds."""
    scores = []
    for r in adversary.rounds:
        shared = adversary.target.shared(r)
        if adversary.client in shared["clients"] and is_finite(shared["sum"]):
            before, after = losses_under([shared["sent"], shared["sum"]], adversary, r, images, labels)
            scores.append(before - after)
    return torch.stack(scores).mean(0)


def losses_under(heads: Iterable[State], adversary: MembershipAdversary, round: int, images: Tensor,
                 labels: Tensor) -> Iterator[Tensor]:
    """Yield the loss of each image, ``N``, under each head of a round, behind a shadow encoder if there is one."""
    target = adversary.target
    inputs = latents(shadow(adversary, round, labels), images, adversary.args.draws) if target.has_encoder else (
        images[:, None])
    network = target.network().requires_grad_(False)
    classifier = network.get_submodule("classifier").to(memory_format=torch.channels_last)
    for head in heads:
        network.load_state_dict(head, strict=False)
        yield -F.logsigmoid(confidence(partial(mean_answer, classifier), inputs, labels))


@torch.no_grad()
def latents(encoded: Knowledge, images: Tensor, draws: int) -> Tensor:
    """Draw z for each image, in its shape, ``N x draws x C x H x W``; one z where there is no noise."""
    mu, logvar = posterior_in_parts(encoded, images)
    z = mu[:, None] if logvar is None else reparameterise(
        *(part[:, None].expand(-1, draws, -1) for part in (mu, logvar)))
    return as_image(z, encoded.image_shape).unflatten(0, z.shape[:2])


def mean_answer(head: nn.Module, inputs: Tensor) -> Tensor:
    """Average probabilities over S inputs per image, ``N x S x C x H x W``, and return logarithms."""
    each = head(inputs.flatten(0, 1)).log_softmax(1).unflatten(0, inputs.shape[:2])
    return each.logsumexp(1) - float(np.log(inputs.shape[1]))


def shadow(adversary: MembershipAdversary, round: int, labels: Tensor) -> Knowledge:
    """Train the curious server's shadow encoder on public images behind the head sent in a round."""
    target, args = adversary.target, adversary.args
    sent = hold(target, "curious_server", round, NOBODY)
    start, public = target.start(adversary.round), adversary.public.of(labels)
    seed_torch(args.seed, "shadow", adversary.client, round)
    training = Training.from_options(target.options, torch.float32)
    epochs = args.train_epochs or round * training.epochs_of(len(target.owned()[0][adversary.client]))
    return shadow_encoder(sent, start, *public, epochs, target.options.get("kl_weight") or 0.0)


# Measures: the area under the ROC curve, and its left end. Members are weighted so that each class has the same
# share of them as of the non-members. Otherwise a score that knows the class alone could tell them apart.

def class_weights(members: ndarray, non_members: ndarray) -> ndarray:
    """Return member weights of mean 1 that give the classes the shares of the non-members."""
    weights = np.empty(len(members))
    for c in np.unique(members):
        weights[members == c] = (non_members == c).sum() / (members == c).sum()
    return weights * len(members) / weights.sum()


def auc(members: ndarray, non_members: ndarray, weights: ndarray) -> float:
    """Return the chance that a weighted member has a higher score than a non-member; a tie counts half."""
    ordered = np.sort(non_members)
    below = np.searchsorted(ordered, members, "left") + np.searchsorted(ordered, members, "right")
    return float(np.average(below, weights=weights) / (2 * len(ordered)))


def tpr(members: ndarray, non_members: ndarray, weights: ndarray, rate: float) -> float:
    """Return the share of members over the lowest threshold that at most ``rate`` of the non-members are over."""
    allowed = int(rate * len(non_members) + 1e-9)
    threshold = np.sort(non_members)[len(non_members) - 1 - allowed]
    return float(np.average(members > threshold, weights=weights))


def resampled(classes: ndarray, generator: np.random.Generator) -> ndarray:
    """Return indices of bootstrap samples, ``DRAWS x N``, drawn within each class so that its share stays."""
    index = np.empty((DRAWS, len(classes)), int)
    for c in np.unique(classes):
        where = np.flatnonzero(classes == c)
        index[:, where] = where[generator.integers(len(where), size=(DRAWS, len(where)))]
    return index


def measure(scores: ndarray, classes: ndarray, member: ndarray) -> dict[str, float]:
    """Return AUC and TPR with 95 % bootstrap intervals, to five decimals; scores ``N`` are high for members."""
    inside, outside = scores[member], scores[~member]
    weights, draw = class_weights(classes[member], classes[~member]), rng(0, "membership bootstrap")
    samples = list(zip(resampled(classes[member], draw), resampled(classes[~member], draw), strict=True))
    metrics: dict[str, Callable[..., float]] = {
        "auc": auc, **{f"tpr_at_fpr_{rate:g}": partial(tpr, rate=rate) for rate in FALSE_POSITIVE_RATES}}
    figures: dict[str, float] = {}
    for name, metric in metrics.items():
        drawn = [metric(inside[i], outside[j], weights[i]) for i, j in samples]
        values = metric(inside, outside, weights), *np.quantile(drawn, (0.025, 0.975))
        figures |= {name + end: round(float(value), 5)
                    for end, value in zip(("", "_low", "_high"), values, strict=True)}
    return figures
