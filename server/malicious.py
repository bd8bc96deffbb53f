"""BEHAVIOURS: what malicious clients may do to training, uploads and sizes, one row per behaviour.

All malicious clients of a run behave alike. model_poisoning.py has the forgeries that take more than a line.
"""
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

from models import Classifier
from server import model_poisoning
from server.base import Round, Server, State, flattened, moved, only_finite, round_down, updates_of
from server.model_poisoning import ForgerView, byzfl_tuned, min_max_reach, min_sum_reach, within_reach
from update import ClientState, LocalUpdate, Trainer
from utils import rng, torch_rng

TARGET = 0       # a backdoor's class
PATCH_SIDE = 3   # pixels
BLEND = 0.2      # share of the pattern in a blended image


def patch(images: Tensor) -> Tensor:
    """Return the images with a white square in the lower right corner, one pixel from both edges."""
    triggered = images.clone()
    triggered[:, -PATCH_SIDE - 1:-1, -PATCH_SIDE - 1:-1] = 255
    return triggered


def blend(images: Tensor) -> Tensor:
    """Return the images blended with a fixed pattern of noise (Chen et al. 2017, arXiv 1712.05526)."""
    pattern = 255 * torch.rand(images.shape[1:], generator=torch_rng(0, "blend")).to(images.device)
    return ((1 - BLEND) * images.float() + BLEND * pattern).round().to(torch.uint8)


def flipped(labels: Tensor, num_classes: int) -> Tensor:
    """Return label ``C - 1 - y`` for y."""
    return num_classes - 1 - labels


def pair_flipped(labels: Tensor, num_classes: int) -> Tensor:
    """Exchange labels 1 and 7; with fewer classes, 1 and the last."""
    other = min(7, num_classes - 1)
    return torch.where(labels == 1, other, torch.where(labels == other, 1, labels))


def invented_inputs(trainer: Trainer, client: int, number: int, images: int, head: State) -> State:
    """Train a head on inputs that it made itself, labelled as the next class (after PoisonGAN, Zhang et al. 2021).

    Gradient ascent from noise replaces PoisonGAN's generator, since the head's input may be a latent here.
    """
    generator, device = torch_rng(trainer.training.seed, "invent", client, number), trainer.labels.device
    network = trainer.model.classifier.eval()
    assert isinstance(network, Classifier)
    state = {name.removeprefix("classifier."): value.to(device, copy=True).requires_grad_()
             for name, value in head.items() if name.startswith("classifier.")}
    count = min(images, trainer.training.batch_size)
    labels = (torch.arange(count) % trainer.num_classes).to(device)
    x = torch.randn(count, *network.input_shape, generator=generator).to(device).requires_grad_()
    for optimizer, wanted, steps in (
            (torch.optim.Adam([x], 0.1), labels, 20),
            (torch.optim.Adam(state.values(), trainer.training.lr), (labels + 1) % trainer.num_classes,
             4 * trainer.training.epochs)):
        for _ in range(steps):
            optimizer.zero_grad()
            F.cross_entropy(functional_call(network, state, (x,)), wanted).backward()
            optimizer.step()
    return {**head, **{f"classifier.{name}": value.detach().cpu() for name, value in state.items()}}


@dataclass(frozen=True)
class Behaviour:
    """One row: the difference of malicious clients from honest ones.

    Args:
        about: a few words for ``--help``.
        relabel: labels ``N``, number of classes -> the labels that they train on.
        retrain: trainer, client, round, number of images, trained head -> the head that they upload.
        forge: ``ForgerView`` -> the updates ``M x P`` that they upload instead of their own.
        inflates: factor on the number of images that they claim.
        uploads: whether they upload at all.
        whole_head: whether the behaviour needs the whole head to be shared.
        trigger: images ``N x H x W x C`` uint8 -> triggered images; copies of half of their images are trained on,
            labelled TARGET (Gu et al. 2017, arXiv 1708.06733).
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
    "sign_flip": Behaviour("upload minus the honest mean", forge=lambda view: view.same(-view.mean)),
    "gaussian": Behaviour("upload noise", forge=model_poisoning.gaussian),
    # Model replacement (Bagdasaryan et al. 2020, arXiv 1807.00459).
    "scaling": Behaviour("flip labels, upload ten times the update", relabel=flipped,
                         forge=lambda view: 10 * view.own_updates),
    # Baruch et al. 2019, arXiv 1902.06156, whose z_max depends on the number of clients.
    "alie": Behaviour("a little is enough: the honest mean and 1.5 standard deviations",
                      forge=lambda view: view.same(view.mean + 1.5 * view.spread)),
    # Xie et al. 2020, arXiv 1903.03936.
    "ipm": Behaviour("inner product manipulation: minus twice the honest mean",
                     forge=lambda view: view.same(-2 * view.mean)),
    # Karimireddy et al. 2022, arXiv 2006.09365.
    "mimic": Behaviour("copy one honest upload", forge=lambda view: view.same(view.honest_updates[0])),
    "sybil": Behaviour("flip labels, all upload the same", relabel=flipped, forge=model_poisoning.sybil),
    "false_size": Behaviour("flip labels, claim ten times the images", relabel=flipped, inflates=10),
    "nan": Behaviour("upload NaN", forge=lambda view: torch.full_like(view.own_updates, torch.nan)),
    "gan_poison": Behaviour("train the head on mislabelled inputs made with it", retrain=invented_inputs,
                            whole_head=True),
    "adaptive": Behaviour("the most harmful of four forgeries, each tuned", forge=model_poisoning.adaptive),
    "passive": Behaviour("honest, but curious"),
    "oracle": Behaviour("upload nothing: the reference for the rules", uploads=False),
    "min_max": Behaviour("as far off as honest updates are apart, tuned",
                         forge=partial(within_reach, reach=min_max_reach)),
    "min_sum": Behaviour("the same by sums of distances, tuned", forge=partial(within_reach, reach=min_sum_reach)),
    "optimal_alie": Behaviour("alie, tuned", forge=partial(byzfl_tuned, attack="Optimal_ALittleIsEnough")),
    "optimal_ipm": Behaviour("ipm, tuned", forge=partial(byzfl_tuned, attack="Optimal_InnerProductManipulation")),
    "mpaf": Behaviour("towards a random model, tuned", forge=model_poisoning.mpaf),
    "pair_flip": Behaviour("train on 1 as 7 and on 7 as 1", relabel=pair_flipped),
    "backdoor_patch": Behaviour("train images with a white square to be class 0", trigger=patch),
    "backdoor_blend": Behaviour("train images blended with a pattern to be class 0", trigger=blend),
    "backdoor_projected": Behaviour("backdoor_patch, at the norm that gains most", trigger=patch,
                                    forge=model_poisoning.projected),
}


class MaliciousClients:
    """The malicious clients of a run.

    Args:
        behaviour: its name in BEHAVIOURS; None if nobody is malicious.
        frac: share of the clients, rounded down.
    """

    def __init__(self, behaviour: str | None, frac: float, clients: int, seed: int):
        self.behaviour, self.seed = BEHAVIOURS[behaviour or "passive"], seed
        count = round_down(frac * clients)
        self.members = frozenset(rng(seed, "malicious").permutation(clients)[:count].tolist())
        self._poisoned: dict[int, tuple[Trainer, Trainer]] = {}   # id of a trainer -> it, and the malicious one

    def groups(self, trainer: Trainer,
               indices: dict[int, np.ndarray]) -> list[tuple[Trainer, dict[int, np.ndarray]]]:
        """Return the honest and the malicious clients that train, each group with its trainer; the honest clients'
        trainer, which also evaluates, never holds poisoned labels or images."""
        honest = {k: numbers for k, numbers in indices.items() if k not in self.members}
        bad = {k: numbers for k, numbers in indices.items() if k in self.members}
        if not bad:
            return [(trainer, honest)]
        if self.behaviour.trigger is not None:   # image i's triggered copy is image N + i
            bad = {k: np.concatenate([numbers, len(trainer.images) + numbers[::2]]) for k, numbers in bad.items()}
        return [(trainer, honest), (self._poisoned_trainer(trainer), bad)]

    def _poisoned_trainer(self, trainer: Trainer) -> Trainer:
        """Return the malicious clients' trainer, the same in every round since it may hold a captured step."""
        relabel, trigger = self.behaviour.relabel, self.behaviour.trigger
        if relabel is None and trigger is None:
            return trainer
        if id(trainer) not in self._poisoned:   # the original is kept too, so that the id stays its own
            images, labels = trainer.images, trainer.labels
            if relabel is not None:
                labels = relabel(labels, trainer.num_classes)
            if trigger is not None:   # in parts, since blended images are floats for a moment
                labels = torch.cat([labels, torch.full_like(labels, TARGET)])
                images = torch.cat([images, *map(trigger, images.split(1024))])
            self._poisoned[id(trainer)] = trainer, replace(trainer, images=images, labels=labels)
        return self._poisoned[id(trainer)][1]

    def retrained(self, trainer: Trainer, client: int, number: int, images: int,
                  trained: LocalUpdate) -> LocalUpdate:
        """Return a client's update after training; a malicious one may train its head further."""
        if client not in self.members or self.behaviour.retrain is None:
            return trained
        return trained._replace(
            upload=self.behaviour.retrain(trainer, client, number, images, trained.upload))

    def backdoor(self, trainer: Trainer, client: int, number: int, held_out: np.ndarray,
                 model: tuple[State, ClientState]) -> float:
        """Return the share of a client's triggered held-out images of other classes that its model (head, private
        part) takes for TARGET; NaN if nobody plants a backdoor or there is no such image."""
        numbers = torch.from_numpy(held_out).to(trainer.labels.device)
        numbers = numbers[trainer.labels[numbers] != TARGET]
        if self.behaviour.trigger is None or not len(numbers):
            return float("nan")
        images = self.behaviour.trigger(trainer.images[numbers])
        triggered = replace(trainer, images=images, labels=trainer.labels.new_full((len(images),), TARGET))
        return triggered.evaluate(client, number, np.arange(len(images)), *model)["accuracy"]

    def poison(self, round: Round, server: Server) -> Round:
        """Return the round as it reaches the server, with the malicious clients' uploads and sizes."""
        bad = [k for k in sorted(round.uploads) if k in self.members]
        round = replace(round, sizes={k: n * (self.behaviour.inflates if k in self.members else 1)
                                      for k, n in round.sizes.items()})
        if bad and not self.behaviour.uploads:
            return replace(round, uploads={k: head for k, head in round.uploads.items() if k not in self.members},
                           sizes={k: n for k, n in round.sizes.items() if k not in self.members})
        if not bad or self.behaviour.forge is None:
            return round

        def with_forged(updates: Tensor) -> Round:
            forged = {k: moved(round.sent, row) for k, row in zip(bad, updates, strict=True)}
            return replace(round, uploads={**round.uploads, **forged})

        def least_trust(updates: Tensor) -> float:
            trust = server.trust(with_forged(updates))
            return min(trust.get(k, 0.0) for k in bad)

        def aggregate(updates: Tensor) -> Tensor:
            return updates_of(round.sent, [server.preview(with_forged(updates))])[0]
        own = updates_of(round.sent, [round.uploads[k] for k in bad])
        honest = [upload for k, upload in only_finite(round).uploads.items() if k not in self.members]
        view = ForgerView(
            own, updates_of(round.sent, honest) if honest else own,
            torch_rng(self.seed, "forge", round=round.number), torch_rng(self.seed, "forge"),
            least_trust, aggregate, flattened(round.sent, round.sent))
        return with_forged(self.behaviour.forge(view))
