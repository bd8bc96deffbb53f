"""One client: local training, its upload, and evaluation."""
import inspect
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from devices import seed_torch
from engine.products import OneDnnProducts, mkl_is_slow
from losses import Step
from methods import Method
from metrics import Tally
from models import Network, Output
from server.base import State
from utils import rng

SHIFT = 4   # pixels, of --augment flip+shift


def uncompiled(kind: type[torch.optim.Optimizer]) -> type:
    """Return an optimiser without the wrappers that keep PyTorch's compiler off it, which takes two seconds to
    import and is not used here."""
    plain = {name: inspect.unwrap(getattr(kind, name)) for name in ("add_param_group", "zero_grad", "step")}
    return type(kind.__name__, (kind,), {**plain, "step": torch.no_grad()(plain["step"])})


SGD, Adam = uncompiled(torch.optim.SGD), uncompiled(torch.optim.Adam)


class Diverged(Exception):
    """A client's loss became NaN or infinite; the message names the client, the round and the likely cause."""


@dataclass
class ClientState:
    """The state that never leaves a client."""

    parameters: State   # those that are not shared
    steps: int = 0   # optimiser steps over all rounds
    # the shared parameters as trained last; only where the server does not see them like that
    trained_shared: State = field(default_factory=dict)


class LocalUpdate(NamedTuple):
    """The result of a client's local training."""

    upload: State   # the shared parameters, in main memory
    client_state: ClientState   # what the client keeps
    metrics: dict[str, float]   # means over the last local epoch; ``loss`` is the cross-entropy alone


@dataclass(frozen=True)
class Training:
    """Settings of training and prediction, the same for all clients of a run."""

    seed: int
    epochs: int   # local epochs E
    batch_size: int
    optimizer: str
    lr: float
    head_lr: float   # the head's learning rate as a multiple of the encoder's
    lr_decay: float   # learning rate ``lr / (1 + lr_decay * step)``, with the step counted over all rounds
    # share of a round's steps over which the learning rate rises from 0: a new Adam's first steps are all as
    # long as the learning rate, since it has no estimate of the gradients' size yet
    lr_warmup: float
    momentum: float
    kl_weight: float   # beta, on the KL summed over z; it rises linearly from 0 over ``kl_warmup`` rounds
    kl_warmup: int
    eval_samples: int   # draws of z averaged in a prediction
    augment: str   # ``none``, ``flip`` or ``flip+shift`` of the training images, drawn anew each time
    dtype: torch.dtype   # of convolutions and matrix products, bfloat16 or float32; parameters are float32
    local_steps: int | None = None   # steps of a client in a round, in place of the epochs
    # epochs that train the private parameters alone, before those of the shared ones alone (FedRep); None: all
    # parameters train at once
    private_ep: int | None = None
    part: str = "all"   # the parameters that train: ``all``, those that are ``shared``, or the ``private`` ones
    options: Mapping[str, Any] = field(default_factory=dict)   # all options of the run by name

    @classmethod
    def from_options(cls, options: Mapping[str, Any], dtype: torch.dtype, **changes: Any) -> "Training":
        """Return the settings of a run's options (options.py), with ``changes``."""
        same = ("seed", "optimizer", "lr", "head_lr", "lr_decay", "lr_warmup", "momentum", "kl_weight",
                "kl_warmup", "eval_samples", "augment", "local_steps", "private_ep")
        return replace(cls(epochs=options["local_ep"] or 1, batch_size=options["local_bs"], dtype=dtype,
                           options=options, **{name: options[name] for name in same}), **changes)

    def steps_of(self, images: int) -> int:
        """Return the number of a client's steps in a round, from its number of images."""
        return self.local_steps or self.epochs * -(-images // self.batch_size)

    def epochs_of(self, images: int) -> int:
        """Return the number of a client's epochs in a round, rounded up, from its number of images."""
        return -(-self.local_steps * self.batch_size // images) if self.local_steps else self.epochs

    def phases(self) -> list["Training"]:
        """Return the settings of the parts of a client's round, one after another."""
        if not self.private_ep or self.part != "all":
            return [self]
        return [replace(self, part="private", epochs=self.private_ep, local_steps=None),
                replace(self, part="shared")]

    def beta(self, round: int) -> float:
        """Return the weight of the KL term in a round."""
        return self.kl_weight * min(1.0, (round - 1) / self.kl_warmup if self.kl_warmup else 1.0)


def reflect(index: Tensor, side: int) -> Tensor:
    """Reflect pixel numbers beyond an edge back into ``0 .. side - 1``."""
    return (side - 1) - ((side - 1) - index.abs()).abs()


@dataclass
class Trainer:
    """The one working model, which trains and evaluates every client in turn; a call overwrites its parameters."""

    model: Network
    method: Method
    images: Tensor   # all images pooled, ``N x H x W x C`` uint8, on the device that trains
    labels: Tensor   # ``N`` int64, on the same device
    num_classes: int
    training: Training

    def facts(self, sizes: list[int]) -> dict[str, Any]:
        """Return the trainer's entries of ``config.json``, from the clients' numbers of training images."""
        return {}

    def in_round(self, number: int) -> "Trainer":
        """Return the trainer of a round: in the first ``--full_sharing_rounds``, every parameter is shared."""
        return replace(self, method=self.method.in_round(number, self.training.options))

    def state(self) -> State:
        """Return a copy of the working model's parameters, on their device."""
        return {name: value.detach().clone() for name, value in self.model.state_dict().items()}

    def shared_and_private(self, state: State) -> tuple[State, State]:
        """Split a state dict into what the method shares, in main memory, and what stays with the client."""
        shared, private = self.method.shared_and_private(state)
        return {name: value.cpu() for name, value in shared.items()}, private

    def train(self, client: int, round: int, indices: np.ndarray, sent: State,
              client_state: ClientState) -> LocalUpdate:
        """Train a client for ``epochs`` local epochs on ``objective``.

        Args:
            indices: its training images.
            sent: the shared parameters from the server; they and ``client_state`` stay untouched.

        Raises:
            Diverged: the loss is no longer finite.
        """
        steps = client_state.steps
        self.seed("train", client, round)
        self.model.load_state_dict({**sent, **client_state.parameters})
        self.model.train()
        orders = rng(self.training.seed, "order", client, round)   # the same on every device
        for phase in self.training.phases():
            optimizer, received = self.prepare(sent, phase.part)
            total = left = phase.steps_of(len(indices))
            while left:   # an epoch
                tally = Tally()
                for batch in self.batches(orders, indices)[:left]:
                    self.set_lr(optimizer, steps, total - left, total)
                    tally.add(*self._step(optimizer, round, batch, received), self.labels[batch])
                    steps, left = steps + 1, left - 1
        return self.local_update(client, round, self.state(), steps, tally)

    def batches(self, orders: np.random.Generator, indices: np.ndarray) -> Sequence[Tensor]:
        """Draw an epoch's batches of image numbers."""
        return torch.from_numpy(orders.permutation(indices)).to(self.labels.device).split(self.training.batch_size)

    def local_update(self, client: int, round: int, trained: State, steps: int, tally: Tally) -> LocalUpdate:
        """Split a client's trained parameters into what it uploads and what it keeps.

        Raises:
            Diverged: a parameter is NaN or infinite.
        """
        settings = self.training
        if not torch.stack([value.sum() for value in trained.values()]).isfinite().all():   # one pass over each
            beta = f", or --kl_weight {settings.kl_weight:g}" if settings.kl_weight else ""
            raise Diverged(f"client {client}, round {round}: the loss is not finite; most likely --lr "
                           f"{settings.lr:g}{beta} is too high")
        upload, private = self.shared_and_private(trained)   # only the shared part leaves the client
        hidden = self.method.protects or settings.options.get("secure_aggregation")
        trained_shared = upload if hidden else {}
        return LocalUpdate(upload, ClientState(private, steps, trained_shared), tally.result(self.num_classes))

    @torch.inference_mode()
    def evaluate(self, client: int, round: int, indices: np.ndarray, shared: State,
                 client_state: ClientState) -> dict[str, float]:
        """Return the metrics of ``p(y|x)``, the mean over ``eval_samples`` draws of z; loss is cross-entropy."""
        self.seed("evaluate", client, round)
        self.model.load_state_dict({**shared, **client_state.parameters})
        self.model.eval()
        tally = Tally()
        for batch in torch.from_numpy(indices).to(self.labels.device).split(512):
            labels = self.labels[batch]   # for the metrics alone
            with self.autocast(), self.products():
                probabilities, kl = self.model.predict(self._pixels(batch), self.training.eval_samples, labels)
            loss = F.nll_loss(probabilities.clamp_min(1e-12).log(), labels, reduction="none")
            tally.add(loss, kl, probabilities, labels)
        return tally.result(self.num_classes)

    def objective(self, images: Tensor, output: Output, labels: Tensor, round: int,
                  sent: State) -> tuple[Tensor, Tensor]:
        """Compute ``CE(head(z), y) + beta KL(q(z|x) || prior) + auxiliary + the method's own loss``, and CE alone.

        Args:
            images: ``N x C x H x W``.
            sent: the shared parameters from the server, for the method's own loss.

        Returns:
            One number per image each: ``N``, ``N``.
        """
        loss = F.cross_entropy(output.logits, labels, reduction="none")
        whole = loss if output.kl is None else loss + self.training.beta(round) * output.kl
        if output.auxiliary is not None:
            whole = whole + output.auxiliary
        if self.method.loss is not None:
            whole = whole + self.method.loss(Step(self.model, images, output, sent, self.training.options))
        return whole, loss

    def prepare(self, sent: State, part: str = "all") -> tuple[torch.optim.Optimizer, State]:
        """Freeze what does not train; return a new optimiser, and what was sent on the training device, for the
        method's own loss."""
        parameters: dict[str, Tensor] = dict(self.model.named_parameters())
        shared = self.method.shared_and_private(parameters)[0]
        for name, parameter in parameters.items():
            parameter.requires_grad_(part == "all" or (part == "shared") == (name in shared))
        received = {} if self.method.loss is None else {
            name: value.to(self.labels.device) for name, value in sent.items()}
        trained = {name: parameter for name, parameter in parameters.items() if parameter.requires_grad}
        return self.make_optimizer(trained), received

    def autocast(self) -> torch.autocast:
        """Return the context that sets the precision of convolutions and matrix products."""
        bf16 = self.training.dtype == torch.bfloat16
        return torch.autocast(self.images.device.type, torch.bfloat16, bf16)

    def products(self) -> AbstractContextManager:
        """Return the context that takes the faster library for float32 on this chip."""
        slow = self.training.dtype == torch.float32 and self.labels.device.type == "cpu" and mkl_is_slow()
        return OneDnnProducts() if slow else nullcontext()

    def _step(self, optimizer: torch.optim.Optimizer, round: int, batch: Tensor,
              sent: State) -> tuple[Tensor, Tensor | None, Tensor]:
        """Make one step on a batch of image numbers; return loss and KL per image, and logits."""
        optimizer.zero_grad(set_to_none=True)
        with self.autocast(), self.products():
            images, labels = self.placed(batch, self.placements(len(batch))), self.labels[batch]
            output = self.model(images, labels)
            objective, loss = self.objective(images, output, labels, round, sent)
        self.descend(optimizer, objective)
        return loss, output.kl, output.logits

    def descend(self, optimizer: torch.optim.Optimizer, objective: Tensor) -> None:
        """Make one step down the objective, which is one number per image ``N``."""
        objective.mean().backward()
        optimizer.step()

    def gradient(self, objective: Tensor, parameters: list[Tensor], images: int) -> Sequence[Tensor]:
        """Return the gradient that the optimiser gets; ``images`` is the client's number of images."""
        return torch.autograd.grad(objective.mean(), parameters, allow_unused=True, materialize_grads=True)

    def _pixels(self, batch: Tensor) -> Tensor:
        """Return images as ``N x C x H x W`` in [0, 1], channels-last in memory."""
        return self.images[batch].permute(0, 3, 1, 2).float().div_(255)

    def placements(self, count: int) -> tuple[Tensor, ...]:
        """Draw, by ``augment``, which of ``count`` images are mirrored, ``N x 1``, and shifts, ``2 x N x 1``."""
        if self.training.augment == "none":
            return ()
        device = self.labels.device
        mirrored = torch.rand(count, 1, device=device) < 0.5
        if self.training.augment == "flip":
            return (mirrored,)
        return mirrored, torch.randint(-SHIFT, SHIFT + 1, (2, count, 1), device=device)

    def placed(self, batch: Tensor, placements: tuple[Tensor, ...]) -> Tensor:
        """Return ``_pixels``, mirrored left to right and shifted; the image's mirrored edge fills the gap."""
        if not placements:
            return self._pixels(batch)
        height, width = self.images.shape[1:3]
        rows, columns = (torch.arange(side, device=batch.device).expand(len(batch), side)
                         for side in (height, width))
        mirrored, *shifts = placements
        for down, right in shifts:
            rows, columns = reflect(rows + down, height), reflect(columns + right, width)
        columns = torch.where(mirrored, width - 1 - columns, columns)
        chosen = self.images[batch[:, None, None], rows[:, :, None], columns[:, None, :]]   # N x H x W x C
        return chosen.permute(0, 3, 1, 2).float().div_(255)

    def seed(self, purpose: str, client: int, round: int) -> None:
        """Seed PyTorch's generators for one client's work in one round."""
        seed_torch(self.training.seed, purpose, client, round)

    def make_optimizer(self, parameters: State) -> torch.optim.Optimizer:
        """Return a client's optimiser, new in every round, as in FedAvg."""
        settings = self.training
        scales = {False: 1.0, True: settings.head_lr}   # by being of the head
        groups = [{"params": [value for name, value in parameters.items()
                              if name.startswith("classifier.") == of_head], "scale": scale}
                  for of_head, scale in scales.items()]
        groups = [group for group in groups if group["params"]]
        if settings.optimizer == "sgd":
            return SGD(groups, settings.lr, settings.momentum, fused=True)
        return Adam(groups, settings.lr, eps=1e-7, fused=True)

    def set_lr(self, optimizer: torch.optim.Optimizer, steps: int, done: int, total: int) -> None:
        """Set the learning rates of a client's next step, after ``steps`` in all, ``done`` of ``total`` now."""
        settings = self.training
        factor = min(1.0, (done + 1) / max(settings.lr_warmup * total, 1)) / (1 + settings.lr_decay * steps)
        for group in optimizer.param_groups:
            rate = group["scale"] * settings.lr * factor
            if isinstance(group["lr"], Tensor):   # a captured step reads it where it is
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate
