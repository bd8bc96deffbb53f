"""The malicious clients of a run, who all behave as one row of BEHAVIOURS says."""
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from devices import torch_rng
from server.base import Round, Server, State, flattened, moved, only_finite, updates_of
from server.behaviours import BEHAVIOURS, TARGET
from server.model_poisoning import ForgerView
from update import ClientState, LocalUpdate, Trainer
from utils import rng, round_down


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
