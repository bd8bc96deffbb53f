"""Observations of the attacked client: an upload, latents, or the answer to an image.

An upload observed at a checkpoint is that of the next training step, from the head that the server sends next.
With secure aggregation, the weighted mean of the uploads of the victim and of other clients is observed.
"""
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from attack.adversaries import Budget, Knowledge, hold, posterior_in_parts
from attack.target import Target
from models import RVE, Network
from server.base import Round, State
from server.privacy import NbAFL
from update import Trainer, Training
from utils import rng


class Victim:
    """The attacked client. Its methods give what the adversary observes of images ``x`` with labels ``y``."""

    def __init__(self, target: Target, round: int, client: int) -> None:
        self.target, self.round, self.client, self.sent_next = target, round, client, target.sent_next(round)
        self.uploads = 0   # observed so far
        private = target.private(round, client)
        self.private, self.own = private.parameters, target.own_head(round, client, private)
        self.others: dict[tuple, dict[int, tuple[State, int]]] = {}   # by arguments of ``other_steps``

    @cached_property
    def sizes(self) -> list[int]:
        """The clients' numbers of training images, which are no secret."""
        return [len(images) for images in self.target.owned()[0]]

    def network(self, shared: State, private: State | None = None) -> Network:
        """Return a client's network with these shared parameters, and the victim's ``private`` ones by default."""
        network = self.target.network()
        network.load_state_dict({**shared, **(self.private if private is None else private)})
        return network

    @cached_property
    def stolen(self) -> Knowledge:
        """The client's own model."""
        network = self.network(self.own)
        return Knowledge(network.get_submodule(network.predictor), getattr(network, "encoder", None),
                         self.target.has_encoder, self.target.data.image_shape)

    @cached_property
    def by_round(self) -> list[Knowledge]:
        """The client's own model in each round up to this one."""
        return [hold(self.target, "stolen_model", r, self.client) for r in range(1, self.round + 1)]

    @torch.no_grad()
    def kl(self, x: Tensor, y: Tensor) -> Tensor | None:
        """Return KL of the posterior of z to the prior, nats, ``N``; None for a method without noise."""
        network = self.network(self.own)
        if not isinstance(network, RVE):
            return None
        parts = [network.encode(*part)[2] for part in zip(x.split(256), y.split(256), strict=True)]
        return torch.cat([part for part in parts if part is not None])

    @torch.no_grad()
    def noise(self, x: Tensor, y: Tensor) -> dict[str, float] | None:
        """Return means of KL and sigma, the SNR of z, and a bound on what z tells; None without noise."""
        kl, network = self.kl(x, y), self.network(self.own)
        if kl is None:
            return None
        mu, logvar = posterior_in_parts(self.stolen, x)
        assert logvar is not None and isinstance(network, RVE)
        # The bound is the KL, and with a prior of classes also the entropy of the labels.
        labels = 0.0 if network.prior is None else torch.special.entr(y.bincount() / len(y)).sum().item()
        return {"kl_nats": kl.mean().item(), "sigma": (0.5 * logvar).exp().mean().item(),
                "snr_db": 10 * (mu.var(0).sum() / logvar.exp().mean(0).sum()).log10().item(),
                "bound_nats": min(kl.mean().item() + labels, network.most_nats)}

    @torch.no_grad()
    def answers(self, x: Tensor, draws: int, keep: int) -> Tensor:
        """Return the prediction service's ``keep`` largest probabilities and else 0, averaged over draws of z."""
        scores = self.stolen.logits(x, draws).exp()
        smallest = scores.topk(min(keep, scores.shape[1])).values[:, -1:]
        return torch.where(scores >= smallest, scores, torch.zeros_like(scores))

    def update(self, x: Tensor, y: Tensor, lr: float, batch: int | None = None) -> State:
        """Return what the server makes of the upload that a client's next steps cause: the sum of their gradients.

        Steps are of SGD, without dropout.
        """
        target, batch = self.target, batch or len(x)
        total = self._steps(x, y, lr, batch)
        if not (target.method.protects or target.secure):
            return total
        server = target.server(self.round)
        self.uploads += 1
        sent = {name: value.double() for name, value in self.sent_next.items()}
        steps = {self.client: (total, len(x)), **(self.other_steps(len(x), lr, batch) if target.secure else {})}
        uploads = {k: {name: value - lr * total[name] for name, value in sent.items()}
                   for k, (total, _) in sorted(steps.items())}
        next_round = Round(self.round + self.uploads, sent, uploads, {k: size for k, (_, size) in steps.items()})
        arrived = server(next_round).total if target.secure else server.receive(next_round)[self.client]
        return of_upload(sent, arrived, lr, clipped=isinstance(server, NbAFL))

    def other_steps(self, count: int, lr: float, batch: int) -> dict[int, tuple[State, int]]:
        """Return the other clients of the sum, each with its ``_steps`` on ``count`` images and their number.

        They and their images are the same in all observations: an attack and its control differ in the victim's
        images only.
        """
        target, key = self.target, (count, lr, batch)
        if key not in self.others:
            draw = rng(target.options["seed"], "others of a sum", self.client, self.round)
            train, others = target.owned()[0], np.delete(np.arange(target.clients), self.client)
            self.others[key] = {}
            for k in draw.permutation(others)[:target.clients_observed - 1].tolist():
                numbers = draw.permutation(train[k])[:count]
                total = self._steps(target.pixels(numbers), target.labels(numbers), lr, batch, k)
                self.others[key][k] = total, len(numbers)
        return self.others[key]

    def _steps(self, x: Tensor, y: Tensor, lr: float, batch: int, other: int | None = None) -> State:
        """Return the sum of the gradients of the steps of the victim, or of an ``other`` client; as ``update``."""
        target, client = self.target, self.client if other is None else other
        private = self.private if other is None else target.private(self.round, other).parameters
        network = self.network(self.sent_next, private)
        network.training = True   # for the priors' replay; the layers themselves stay without dropout
        trainer = (target.method.trainer or Trainer)(
            network, target.method, torch.empty(0), torch.empty(0), target.data.num_classes,
            Training.from_options(target.options, torch.float32))
        shared = {name: value for name, value in network.named_parameters() if name in self.sent_next}
        total = {name: torch.zeros_like(value) for name, value in shared.items()}
        for part, labels in zip(x.split(batch), y.split(batch), strict=True):
            objective, _ = trainer.objective(part, network(part, labels), labels, self.round + 1, self.sent_next)
            slopes = trainer.gradient(objective, list(shared.values()), self.sizes[client])
            with torch.no_grad():
                for (name, value), slope in zip(shared.items(), slopes, strict=True):
                    total[name] += slope
                    value.sub_(lr * slope)
        return total


def of_upload(sent: State, arrived: State, lr: float, clipped: bool) -> State:
    """Return the sum of gradients behind an upload, ``(sent - arrived / s) / lr``, with s its clip's scale."""
    scale = 1.0
    if clipped:   # s is the weighted median of arrived / sent: most parameters hardly move in a step
        before, after = (torch.cat([state[name].flatten() for name in sent]) for state in (sent, arrived))
        ratio, order = (after / before).nan_to_num(0.0).sort()
        weight = before.abs()[order].cumsum(0)
        scale = float(ratio[torch.searchsorted(weight, weight[-1] / 2)].clamp(1e-6, 1))
    return {name: ((value - arrived[name] / scale) / lr).float() for name, value in sent.items()}


# Observations of images N x C x H x W with labels N: (victim, images, labels, budget) -> what the attack is given.

def observe_gradients(victim: Victim, x: Tensor, y: Tensor, budget: Budget) -> list[State]:
    """Observe the gradient of the head behind the upload of a step on each image alone."""
    return [part_of(victim.update(x[i:i + 1], y[i:i + 1], budget.lr), "classifier.") for i in range(len(x))]


def observe_trunk(victim: Victim, x: Tensor, y: Tensor, budget: Budget) -> list[State]:
    """Observe gradients as ``observe_gradients`` does, of the head and of an encoder's trunk."""
    updates = [victim.update(x[i:i + 1], y[i:i + 1], budget.lr) for i in range(len(x))]
    return [{**part_of(update, "classifier."), **part_of(update, "encoder.")} for update in updates]


def observe_update(victim: Victim, x: Tensor, y: Tensor, budget: Budget, steps: int) -> list[State]:
    """Observe the sum of the head's gradients behind one upload, over ``steps`` steps of equal size."""
    return [part_of(victim.update(x, y, budget.lr, batch=-(-len(x) // steps)), "classifier.")]


def part_of(update: State, prefix: str) -> State:
    """Return the values whose names begin with a prefix, without it."""
    return {name.removeprefix(prefix): value for name, value in update.items() if name.startswith(prefix)}
