"""Simulated malicious clients: who they are, and what they do to training, uploads and sizes.

A behaviour knows what its adversary could know: its own data and updates and, where the published attack says
so, everybody's updates and the server's rule (forging.py). All malicious clients of a run behave alike. A new
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
from server import forging, triggers
from server.base import Round, Server, State, moved, only_finite, updates_of
from server.forging import ForgerView
from server.robust import round_down
from update import ClientState, LocalUpdate, Trainer
from utils import rng, torch_rng


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


def pair_flipped(labels: Tensor, num_classes: int) -> Tensor:
    """Labels 1 and 7 in each other's place; where there are fewer classes, 1 and the last."""
    one, other = 1, min(7, num_classes - 1)
    return torch.where(labels == one, other, torch.where(labels == other, one, labels))


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
        trigger: images ``N x H x W x C`` -> the same with a backdoor's trigger, which they train on as well.
    """

    about: str
    relabel: Callable[[Tensor, int], Tensor] | None = None
    retrain: Callable[[Trainer, int, int, int, State], State] | None = None
    forge: Callable[[ForgerView], Tensor] | None = None
    inflates: int = 1
    uploads: bool = True
    whole_head: bool = False
    trigger: Callable[[Tensor], Tensor] | None = None


BEHAVIOURS = {
    "label_flip": Behaviour("train on label C - 1 - y", relabel=flipped),
    "sign_flip": Behaviour("upload minus the honest mean", forge=forging.sign_flip),
    "gaussian": Behaviour("upload noise", forge=forging.gaussian),
    "scaling": Behaviour("flip labels, upload ten times the update", relabel=flipped, forge=forging.scaling),
    "alie": Behaviour("a little is enough", forge=forging.alie),
    "ipm": Behaviour("inner product manipulation", forge=forging.ipm),
    "mimic": Behaviour("copy one honest upload", forge=forging.mimic),
    "sybil": Behaviour("flip labels, all upload the same", relabel=flipped, forge=forging.sybil),
    "false_size": Behaviour("flip labels, claim ten times the images", relabel=flipped, inflates=10),
    "nan": Behaviour("upload NaN", forge=forging.nan),
    "gan_poison": Behaviour("train the head on mislabelled inputs made with it", retrain=invented_inputs,
                            whole_head=True),
    "adaptive": Behaviour("the most harmful of four forgeries, each tuned", forge=forging.adaptive),
    "passive": Behaviour("honest, but curious"),
    "oracle": Behaviour("upload nothing: the oracle that the others are compared with", uploads=False),
    "min_max": Behaviour("as far off as honest updates are apart, tuned", forge=forging.min_max),
    "min_sum": Behaviour("the same by sums of distances, tuned", forge=forging.min_sum),
    "optimal_alie": Behaviour("alie, tuned", forge=forging.optimal_alie),
    "optimal_ipm": Behaviour("ipm, tuned", forge=forging.optimal_ipm),
    "mpaf": Behaviour("towards a random model, tuned", forge=forging.mpaf),
    "pair_flip": Behaviour("train on 1 as 7 and on 7 as 1", relabel=pair_flipped),
    "backdoor_patch": Behaviour("train images with a white square to be class 0", trigger=triggers.patch),
    "backdoor_blend": Behaviour("train images blended with a pattern to be class 0", trigger=triggers.blend),
    "backdoor_projected": Behaviour("backdoor_patch, at the length that gains most", trigger=triggers.patch,
                                    forge=forging.projected),
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
        self.liars: dict[int, tuple[Trainer, Trainer]] = {}   # by id: a trainer, and that of malicious clients

    def groups(self, trainer: Trainer,
               indices: dict[int, np.ndarray]) -> list[tuple[Trainer, dict[int, np.ndarray]]]:
        """The clients that train, honest and malicious apart, and with which trainer: malicious ones may have
        other labels, and triggered images as well.

        The honest clients' trainer, which also evaluates, never holds those.
        """
        honest = {k: own for k, own in indices.items() if k not in self.members}
        bad = {k: own for k, own in indices.items() if k in self.members}
        if not bad:
            return [(trainer, honest)]
        if self.behaviour.trigger is not None:   # image i's triggered copy is image N + i
            bad = {k: np.concatenate([own, len(trainer.images) + triggers.chosen(own)]) for k, own in bad.items()}
        return [(trainer, honest), (self._liar(trainer), bad)]

    def _liar(self, trainer: Trainer) -> Trainer:
        """The trainer of malicious clients: the same one in every round, since it may hold a captured step.

        Its triggered copies are therefore those of all images, whoever trains and on which of them.
        """
        relabel, trigger = self.behaviour.relabel, self.behaviour.trigger
        if relabel is None and trigger is None:
            return trainer
        if id(trainer) not in self.liars:   # both are kept, so that the id stays theirs
            images, labels = trainer.images, trainer.labels
            if relabel is not None:
                labels = relabel(labels, trainer.num_classes)
            if trigger is not None:   # in parts: blended images are floats for a moment
                labels = torch.cat([labels, torch.full_like(labels, triggers.TARGET)])
                images = torch.cat([images, *map(trigger, images.split(1024))])
            self.liars[id(trainer)] = trainer, replace(trainer, images=images, labels=labels)
        return self.liars[id(trainer)][1]

    def retrained(self, trainer: Trainer, client: int, number: int, images: int, trained: LocalUpdate) -> LocalUpdate:
        """What a client has after its training; a malicious one may train its head on."""
        if client not in self.members or self.behaviour.retrain is None:
            return trained
        return trained._replace(
            upload=self.behaviour.retrain(trainer, client, number, images, trained.upload))

    def backdoor(self, trainer: Trainer, client: int, number: int, held_out: np.ndarray,
                 model: tuple[State, ClientState]) -> float:
        """The share of a client's held-out images of other classes that its model takes for TARGET once they are
        triggered; NaN where nobody plants a backdoor, or it has no such image.

        Args:
            model: its head and its private part.
        """
        others = held_out[(trainer.labels[torch.from_numpy(held_out).to(trainer.labels.device)]
                           != triggers.TARGET).cpu().numpy()]
        if self.behaviour.trigger is None or not len(others):
            return float("nan")
        shown = self.behaviour.trigger(trainer.images[torch.from_numpy(others).to(trainer.labels.device)])
        asked = replace(trainer, images=shown, labels=trainer.labels.new_full((len(shown),), triggers.TARGET))
        return asked.evaluate(client, number, np.arange(len(shown)), *model)["accuracy"]

    def poison(self, round: Round, server: Server) -> Round:
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
        honest = [k for k in only_finite(round).uploads if k not in self.members]

        def with_forged(updates: Tensor) -> Round:
            forged = {k: moved(round.sent, row) for k, row in zip(bad, updates, strict=True)}
            return replace(claimed, uploads={**round.uploads, **forged})

        def least_trust(updates: Tensor) -> float:
            trust = server.trust(with_forged(updates))
            return min(trust.get(k, 0.0) for k in bad)

        def aggregate(updates: Tensor) -> Tensor:
            return updates_of(round.sent, [server.preview(with_forged(updates))])[0]
        known = ForgerView(
            own, updates_of(round.sent, [round.uploads[k] for k in honest]) if honest else own,
            torch_rng(self.seed, "forge", round=round.number), torch_rng(self.seed, "forge"),
            least_trust, aggregate,
            torch.cat([value.flatten() for value in round.sent.values()]))
        return with_forged(self.behaviour.forge(known))
