"""Simulated malicious clients: who they are, and what they do to training, uploads and sizes.

A behaviour knows what its adversary could know: its own data and updates and, where the published attack says
so (ALIE, IPM, mimic, sign flip), everybody's updates. All malicious clients of a run behave alike. A new
behaviour is one row of BEHAVIOURS and its function.
"""
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

from models import Classifier
from server.mean import Round, Server, State, is_finite, moved, updates_of
from server.robust import round_down
from update import Trained, Trainer
from utils import rng, torch_rng


@dataclass(frozen=True)
class Knowledge:
    """What malicious clients know when they forge their uploads; updates are rows.

    Args:
        own: ``M x P``, their own updates, as trained.
        honest: ``H x P``; their own where nobody is honest.
        generator: for what they draw.
        least_trust: forged updates ``M x P`` -> the lowest trust that the server would have in one of them.
    """

    own: Tensor
    honest: Tensor
    generator: torch.Generator
    least_trust: Callable[[Tensor], float]


def sign_flip(known: Knowledge) -> Tensor:
    """Minus the honest mean."""
    from byzfl import SignFlipping
    return SignFlipping()(known.honest).expand_as(known.own)


def gaussian(known: Knowledge) -> Tensor:
    """Noise three times as long as the honest updates."""
    size = 3 * known.honest.square().mean().sqrt()
    return size * torch.randn(known.own.shape, generator=known.generator)


def scaling(known: Knowledge) -> Tensor:
    """Their own, ten times as long: model replacement (Bagdasaryan et al. 2020, arXiv 1807.00459)."""
    return 10 * known.own


def alie(known: Knowledge) -> Tensor:
    """Honest mean and 1.5 standard deviations: a little is enough (Baruch et al. 2019, arXiv 1902.06156)."""
    from byzfl import ALittleIsEnough
    honest = known.honest if len(known.honest) > 1 else known.honest.repeat(2, 1)
    return ALittleIsEnough(tau=1.5)(honest).expand_as(known.own)


def ipm(known: Knowledge) -> Tensor:
    """Minus twice the honest mean: inner product manipulation (Xie et al. 2020, arXiv 1903.03936)."""
    from byzfl import InnerProductManipulation
    return InnerProductManipulation(tau=2.0)(known.honest).expand_as(known.own)


def mimic(known: Knowledge) -> Tensor:
    """All send the update of one honest client, which then counts too much (Karimireddy et al. 2022,
    arXiv 2006.09365)."""
    from byzfl import Mimic
    return Mimic(epsilon=0)(known.honest).expand_as(known.own)


def sybil(known: Knowledge) -> Tensor:
    """All send their mean update, each with 1 % of noise of its own (Fung et al. 2020, arXiv 1808.04866)."""
    poison = known.own.mean(0)
    noise = torch.randn(known.own.shape, generator=known.generator)
    return poison + 0.01 * poison.square().mean().sqrt() * noise


def nan(known: Knowledge) -> Tensor:
    """Not a number."""
    return torch.full_like(known.own, torch.nan)


def adaptive(known: Knowledge, trusted: float = 0.9, steps: int = 12) -> Tensor:
    """Their own update minus the largest multiple of the honest mean, up to 20, that keeps the server's trust
    at ``trusted``, found by bisection (after min-max, Shejwalkar and Houmansadr, NDSS 2021)."""
    against = -known.honest.mean(0)
    low, high = 0.0, 20.0
    if known.least_trust(known.own + high * against) >= trusted:
        return known.own + high * against
    for _ in range(steps):
        middle = (low + high) / 2
        low, high = (middle, high) if known.least_trust(known.own + middle * against) >= trusted else (low, middle)
    return known.own + low * against


def invented_inputs(trainer: Trainer, client: int, number: int, images: int, head: State) -> State:
    """A head trained on mislabelled inputs that the head itself made (after PoisonGAN, Zhang et al. 2021).

    The inputs are made by gradient ascent from noise, for each class in turn, and labelled as the next class. The
    ascent stands for PoisonGAN's generator, since the head's input may be a latent here.
    """
    drawn, device = torch_rng(trainer.training.seed, "invent", client, number), trainer.labels.device
    network = trainer.model.classifier.eval()
    assert isinstance(network, Classifier)
    state = {name.removeprefix("classifier."): value.to(device, copy=True).requires_grad_()
             for name, value in head.items() if name.startswith("classifier.")}
    count = min(images, trainer.training.batch_size)
    labels = (torch.arange(count) % trainer.num_classes).to(device)
    x = torch.randn(count, *network.input_shape, generator=drawn).to(device).requires_grad_()
    for optimizer, wanted, steps in (
            (torch.optim.Adam([x], 0.1), labels, 20),
            (torch.optim.Adam(state.values(), trainer.training.lr), (labels + 1) % trainer.num_classes,
             4 * trainer.training.epochs)):
        for _ in range(steps):
            optimizer.zero_grad()
            F.cross_entropy(functional_call(network, state, (x,)), wanted).backward()
            optimizer.step()
    return {**head, **{f"classifier.{name}": value.detach().cpu() for name, value in state.items()}}


def flipped(labels: Tensor, num_classes: int) -> Tensor:
    """Label ``C - 1 - y`` instead of y."""
    return num_classes - 1 - labels


@dataclass(frozen=True)
class Behaviour:
    """One row: how malicious clients differ from honest ones.

    Args:
        about: a few words for ``--help``.
        relabel: labels ``N``, number of classes -> the labels that they train on.
        retrain: trainer, client, round, number of images, trained head -> the head that they upload.
        forge: what is known -> the updates ``M x P`` that they upload instead of their own.
        inflates: how many times its images a client claims.
        uploads: whether they upload at all.
        whole_head: they question the head, so that all of it has to travel.
    """

    about: str
    relabel: Callable[[Tensor, int], Tensor] | None = None
    retrain: Callable[[Trainer, int, int, int, State], State] | None = None
    forge: Callable[[Knowledge], Tensor] | None = None
    inflates: int = 1
    uploads: bool = True
    whole_head: bool = False


BEHAVIOURS = {
    "label_flip": Behaviour("train on label C - 1 - y", relabel=flipped),
    "sign_flip": Behaviour("upload minus the honest mean", forge=sign_flip),
    "gaussian": Behaviour("upload noise", forge=gaussian),
    "scaling": Behaviour("flip labels, upload ten times the update", relabel=flipped, forge=scaling),
    "alie": Behaviour("a little is enough", forge=alie),
    "ipm": Behaviour("inner product manipulation", forge=ipm),
    "mimic": Behaviour("copy one honest upload", forge=mimic),
    "sybil": Behaviour("flip labels, all upload the same", relabel=flipped, forge=sybil),
    "false_size": Behaviour("flip labels, claim ten times the images", relabel=flipped, inflates=10),
    "nan": Behaviour("upload NaN", forge=nan),
    "gan_poison": Behaviour("train the head on mislabelled inputs made with it", retrain=invented_inputs,
                            whole_head=True),
    "adaptive": Behaviour("as much harm as keeps the server's trust", forge=adaptive),
    "passive": Behaviour("honest, but curious"),
    "absent": Behaviour("upload nothing: the oracle that the others are compared with", uploads=False),
}


class MaliciousClients:
    """The malicious clients of a run.

    Args:
        behaviour: its name in BEHAVIOURS; None where nobody is malicious.
        frac: share of the clients, rounded down.
    """

    def __init__(self, behaviour: str | None, frac: float, clients: int, seed: int):
        self.behaviour, self.seed = BEHAVIOURS[behaviour or "passive"], seed
        count = round_down(frac * clients)
        self.members = frozenset(rng(seed, "malicious").permutation(clients)[:count].tolist())
        self.liars: dict[int, tuple[Trainer, Trainer]] = {}   # by id: a trainer, and the same with other labels

    def groups(self, trainer: Trainer,
               indices: dict[int, np.ndarray]) -> list[tuple[Trainer, dict[int, np.ndarray]]]:
        """The clients that train, honest and malicious apart, and with which trainer: malicious ones may have
        other labels."""
        honest = {k: own for k, own in indices.items() if k not in self.members}
        bad = {k: own for k, own in indices.items() if k in self.members}
        if not bad:
            return [(trainer, honest)]
        return [(trainer, honest), (self._liar(trainer), bad)]

    def _liar(self, trainer: Trainer) -> Trainer:
        """The trainer of malicious clients: the same one in every round, since it may hold a captured step."""
        if self.behaviour.relabel is None:
            return trainer
        if id(trainer) not in self.liars:   # both are kept, so that the id stays theirs
            labels = self.behaviour.relabel(trainer.labels, trainer.num_classes)
            self.liars[id(trainer)] = trainer, replace(trainer, labels=labels)
        return self.liars[id(trainer)][1]

    def retrained(self, trainer: Trainer, client: int, number: int, images: int, trained: Trained) -> Trained:
        """What a client has after its training; a malicious one may train its head on."""
        if client not in self.members or self.behaviour.retrain is None:
            return trained
        return trained._replace(
            upload=self.behaviour.retrain(trainer, client, number, images, trained.upload))

    def forge(self, round: Round, server: Server) -> Round:
        """The round as it reaches the server: uploads and sizes after the malicious clients' turn."""
        bad = [k for k in sorted(round.uploads) if k in self.members]
        claimed = replace(round, sizes={k: n * (self.behaviour.inflates if k in self.members else 1)
                                        for k, n in round.sizes.items()})
        if bad and not self.behaviour.uploads:
            return replace(
                claimed, uploads={k: head for k, head in claimed.uploads.items() if k not in self.members},
                sizes={k: n for k, n in claimed.sizes.items() if k not in self.members})
        if not bad or self.behaviour.forge is None:
            return claimed
        own = updates_of(round.sent, [round.uploads[k] for k in bad])
        honest = [k for k in sorted(round.uploads)
                  if k not in self.members and is_finite(round.uploads[k])]

        def with_forged(updates: Tensor) -> Round:
            forged = {k: moved(round.sent, row) for k, row in zip(bad, updates, strict=True)}
            return replace(claimed, uploads={**round.uploads, **forged})

        def least_trust(updates: Tensor) -> float:
            trust = server.trust(with_forged(updates))
            return min(trust[k] for k in bad)
        known = Knowledge(
            own, updates_of(round.sent, [round.uploads[k] for k in honest]) if honest else own,
            torch_rng(self.seed, "forge", round=round.number), least_trust)
        return with_forged(self.behaviour.forge(known))
