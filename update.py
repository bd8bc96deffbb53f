"""One client's round: local training and evaluation."""
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from methods import Method, Step
from metrics import Tally
from models import Network, Output
from server.base import State
from utils import rng, seed_torch

SHIFT = 4   # pixels, of --augment flip+shift


class Diverged(Exception):
    """A client's loss became NaN or infinite; its text says which client, which round and why."""


@dataclass
class ClientState:
    """What never leaves a client: its parameters, and the optimiser steps it has made.

    Attributes:
        trained_shared: what it trained last of the shared part, where the server sees it clipped or noised only.
    """

    parameters: State
    steps: int = 0
    trained_shared: State = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Size of its tensors."""
        return sum(value.nbytes for value in (*self.parameters.values(), *self.trained_shared.values()))

    @property
    def kind(self) -> str:
        """The kind of device that its parameters are on."""
        return next((value.device.type for value in self.parameters.values()), "cpu")


class LocalUpdate(NamedTuple):
    """What comes out of a client's local training.

    Args:
        upload: the shared part, in main memory.
        client_state: what stays with the client.
        metrics: the running ones of the last local epoch; ``loss`` is the cross-entropy alone.
    """

    upload: State
    client_state: ClientState
    metrics: dict[str, float]


@dataclass(frozen=True)
class Training:
    """How every client of a run trains and predicts.

    Args:
        epochs: local epochs E.
        lr_decay: learning rate ``lr / (1 + lr_decay * step)``, step counted over all rounds.
        lr_warmup: share of a round's steps over which it rises from 0: a new Adam's first steps are all as
            long as the learning rate, since it does not know the gradients' size yet.
        head_lr: the head's learning rate as a multiple of the encoder's.
        kl_weight: beta, on the KL summed over z; reached from 0, linearly over ``kl_warmup`` rounds.
        eval_samples: draws of z averaged in a prediction.
        augment: ``none``, ``flip`` or ``flip+shift`` of the training images, drawn anew each time.
        dtype: of convolutions and matrix products, bfloat16 or float32; parameters are float32.
        freezes_private: what stays with a client is not trained.
        options: all options of the run by name, for a method with options of its own.
    """

    seed: int
    epochs: int
    batch_size: int
    optimizer: str
    lr: float
    head_lr: float
    lr_decay: float
    lr_warmup: float
    momentum: float
    kl_weight: float
    kl_warmup: int
    eval_samples: int
    augment: str
    dtype: torch.dtype
    freezes_private: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_options(cls, options: Mapping[str, Any], dtype: torch.dtype, **changes: Any) -> "Training":
        """Return how clients train by a run's options (options.py), but for ``changes``."""
        same = ("seed", "optimizer", "lr", "head_lr", "lr_decay", "lr_warmup", "momentum", "kl_weight",
                "kl_warmup", "eval_samples", "augment")
        return replace(cls(epochs=options["local_ep"], batch_size=options["local_bs"], dtype=dtype,
                           options=options, **{name: options[name] for name in same}), **changes)

    def beta(self, round: int) -> float:
        """``kl_weight``, or the part of it that its warm-up has reached."""
        return self.kl_weight * min(1.0, (round - 1) / self.kl_warmup if self.kl_warmup else 1.0)


def reflect(index: Tensor, side: int) -> Tensor:
    """Bring pixel numbers that lie past an edge back inside, as a mirror at the edge would."""
    return (side - 1) - ((side - 1) - index.abs()).abs()


@dataclass
class Trainer:
    """The one working model, which plays every client in turn.

    Args:
        model: on the device that trains; its parameters are overwritten by each call.
        images: all images pooled, ``N x H x W x C`` uint8, on that device.
        labels: ``N`` int64, on that device.
    """

    model: Network
    method: Method
    images: Tensor
    labels: Tensor
    num_classes: int
    training: Training

    def state(self) -> State:
        """A copy of the working model's parameters, on their device."""
        return {name: value.detach().clone() for name, value in self.model.state_dict().items()}

    def shared_and_private(self, state: State) -> tuple[State, State]:
        """What travels, in main memory, and what stays with the client, where it is."""
        shared, private = self.method.shared_and_private(state)
        return {name: value.cpu() for name, value in shared.items()}, private

    def train(self, client: int, round: int, indices: np.ndarray, sent: State, private: ClientState) -> LocalUpdate:
        """``epochs`` local epochs on ``objective``.

        Raises:
            Diverged: the loss is no longer finite; ``private`` and ``sent`` are untouched.
        """
        how = self.training
        self.seed("train", client, round)
        self._load(sent, private)
        self.model.train()
        steps, (optimizer, received) = private.steps, self.prepare(sent)
        orders = rng(how.seed, "order", client, round)   # the same on every device
        for _ in range(how.epochs):
            tally = Tally()
            order = torch.from_numpy(orders.permutation(indices)).to(self.labels.device)
            for batch in order.split(how.batch_size):
                self.set_lr(optimizer, steps, steps - private.steps, len(indices))
                tally.add(*self._step(optimizer, round, batch, received), self.labels[batch])
                steps += 1
            if not torch.cat(tally.loss).isfinite().all():
                raise self.diverged(client, round)
        return self.trained(client, round, self.state(), steps, tally)

    def trained(self, client: int, round: int, state: State, steps: int, tally: Tally) -> LocalUpdate:
        """What ``train`` returns, of a client's parameters after training, or Diverged."""
        if not torch.stack([value.isfinite().all() for value in state.values()]).all():   # by the last step
            raise self.diverged(client, round)
        upload, kept = self.shared_and_private(state)
        own = upload if self.method.protects else {}
        return LocalUpdate(upload, ClientState(kept, steps, own), tally.result(self.num_classes))

    @torch.inference_mode()
    def evaluate(self, client: int, round: int, indices: np.ndarray, shared: State,
                 private: ClientState) -> dict[str, float]:
        """Metrics of ``p(y|x)``, averaged over ``eval_samples`` draws of z; loss is its cross-entropy."""
        self.seed("evaluate", client, round)
        self._load(shared, private)
        self.model.eval()
        tally = Tally()
        for batch in torch.from_numpy(indices).to(self.labels.device).split(512):
            labels = self.labels[batch]   # for the metrics alone
            with self.autocast():
                probabilities, kl = self.model.predict(self._pixels(batch), self.training.eval_samples, labels)
            loss = F.nll_loss(probabilities.clamp_min(1e-12).log(), labels, reduction="none")
            tally.add(loss, kl, probabilities, labels)
        return tally.result(self.num_classes)

    def objective(self, images: Tensor, output: Output, labels: Tensor, round: int,
                  sent: State) -> tuple[Tensor, Tensor]:
        """``CE(head(z), y) + beta KL(q(z|x) || prior) + the method's own loss``, and the cross-entropy alone.

        With a prior for each class, the head's cross-entropy on draws from these priors is added.

        Args:
            images: ``N x C x H x W``.
            sent: what the client received, for the method's own loss.

        Returns:
            One number an image each: ``N``, ``N``.
        """
        loss = F.cross_entropy(output.logits, labels, reduction="none")
        whole = loss if output.kl is None else loss + self.training.beta(round) * output.kl
        if output.replay is not None:
            whole = whole + output.replay
        if self.method.loss is not None:
            whole = whole + self.method.loss(Step(self.model, images, output, sent, self.training.options))
        return whole, loss

    def prepare(self, sent: State) -> tuple[torch.optim.Optimizer, State]:
        """A client's new optimiser, and what was sent, on the device that trains, for the method's own loss."""
        received = {} if self.method.loss is None else {
            name: value.to(self.labels.device) for name, value in sent.items()}
        return self.make_optimizer(dict(self.model.named_parameters())), received

    def autocast(self) -> torch.autocast:
        """The precision of convolutions and matrix products, as a context."""
        bf16 = self.training.dtype == torch.bfloat16
        return torch.autocast(self.images.device.type, torch.bfloat16, bf16)

    def _step(self, optimizer: torch.optim.Optimizer, round: int, batch: Tensor,
              sent: State) -> tuple[Tensor, Tensor | None, Tensor]:
        """One step on a batch of image numbers -> loss and KL an image, logits."""
        optimizer.zero_grad(set_to_none=True)
        with self.autocast():
            images, labels = self.augmented(batch), self.labels[batch]
            output = self.model(images, labels)
            objective, loss = self.objective(images, output, labels, round, sent)
        objective.mean().backward()
        optimizer.step()
        return loss, output.kl, output.logits

    def diverged(self, client: int, round: int) -> Diverged:
        """The error, with its likely reason."""
        how = self.training
        beta = f", or --kl_weight {how.kl_weight:g}" if how.kl_weight else ""
        return Diverged(f"client {client}, round {round}: the loss is not finite; most likely --lr {how.lr:g}"
                        f"{beta} is too high")

    def _pixels(self, batch: Tensor) -> Tensor:
        """Image numbers ``N`` -> ``N x C x H x W`` in [0, 1], channels-last in memory."""
        return self.images[batch].permute(0, 3, 1, 2).float().div_(255)

    def augmented(self, batch: Tensor) -> Tensor:
        """``_pixels``, and as ``augment`` says: mirrored left to right with probability 1/2, and shifted.

        A shift is up to SHIFT pixels each way; the image's mirrored edge fills the gap.
        """
        return self.placed(batch, self.placements(len(batch)))

    def placements(self, count: int) -> tuple[Tensor, ...]:
        """What ``augment`` draws for ``count`` images: who is mirrored, ``N x 1``, and shifts, ``2 x N x 1``."""
        if self.training.augment == "none":
            return ()
        device = self.labels.device
        mirrored = torch.rand(count, 1, device=device) < 0.5
        if self.training.augment == "flip":
            return (mirrored,)
        return mirrored, torch.randint(-SHIFT, SHIFT + 1, (2, count, 1), device=device)

    def placed(self, batch: Tensor, drawn: tuple[Tensor, ...]) -> Tensor:
        """``_pixels``, mirrored and shifted as ``placements`` drew."""
        if not drawn:
            return self._pixels(batch)
        device, (height, width) = batch.device, self.images.shape[1:3]
        rows, columns = (torch.arange(side, device=device).expand(len(batch), side)
                         for side in (height, width))
        mirrored, *shifts = drawn
        for by in shifts:
            rows, columns = reflect(rows + by[0], height), reflect(columns + by[1], width)
        columns = torch.where(mirrored, width - 1 - columns, columns)
        chosen = self.images[batch[:, None, None], rows[:, :, None], columns[:, None, :]]   # N x H x W x C
        return chosen.permute(0, 3, 1, 2).float().div_(255)

    def seed(self, purpose: str, client: int, round: int) -> None:
        """Let what follows draw what one client's work in one round draws."""
        seed_torch(self.training.seed, purpose, client, round)

    def _load(self, shared: State, private: ClientState) -> None:
        self.model.load_state_dict({**shared, **private.parameters})

    def make_optimizer(self, parameters: State) -> torch.optim.Optimizer:
        """A client's own optimiser, new in every round, as in FedAvg.

        The head's moments would belong to weights that the server has replaced since; the encoder's would treble
        what a client stores.
        """
        how = self.training
        groups = [{"params": [value for name, value in parameters.items()
                              if name.startswith("classifier.") == of_head], "scale": scale}
                  for of_head, scale in ((False, 0.0 if how.freezes_private else 1.0), (True, how.head_lr))]
        groups = [group for group in groups if group["params"]]
        if how.optimizer == "sgd":
            return torch.optim.SGD(groups, how.lr, how.momentum, fused=True)
        return torch.optim.Adam(groups, how.lr, eps=1e-7, fused=True)

    def set_lr(self, optimizer: torch.optim.Optimizer, steps: int, done: int, images: int) -> None:
        """The learning rates of a client's next step, after ``steps`` in all and ``done`` in this round."""
        how = self.training
        warm = how.lr_warmup * how.epochs * -(-images // how.batch_size)
        factor = min(1.0, (done + 1) / max(warm, 1)) / (1 + how.lr_decay * steps)
        for group in optimizer.param_groups:
            rate = group["scale"] * how.lr * factor
            if isinstance(group["lr"], Tensor):   # a captured step reads it where it is
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate


def one_by_one(trainer: Trainer, number: int, indices: dict[int, np.ndarray], sent: State,
               private: Callable[[int], ClientState]) -> Iterator[tuple[int, LocalUpdate | Diverged]]:
    """Train clients one after another; what comes out of each.

    Args:
        number: of the round.
        indices: client -> its training images, for all that train in this round.
        private: client -> what stays with it.
    """
    for k, own in indices.items():
        try:
            yield k, trainer.train(k, number, own, sent, private(k))
        except Diverged as error:
            yield k, error
