"""One client's round: local training and evaluation."""
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from methods import Method, State
from metrics import Tally
from utils import rng, seed_torch

SHIFT = 4   # pixels, of --augment flip+shift


class Diverged(Exception):
    """A client's loss became NaN or infinite; its text says which client, which round and why."""


@dataclass
class Private:
    """What never leaves a client: its parameters, and the optimiser steps it has made.

    Attributes:
        own: what it trained last of the shared part, where the server sees it clipped or noised only.
    """

    parameters: State
    steps: int = 0
    own: State = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Size of its tensors."""
        return sum(value.nbytes for value in (*self.parameters.values(), *self.own.values()))

    @property
    def kind(self) -> str:
        """The kind of device that its parameters are on."""
        return next((value.device.type for value in self.parameters.values()), "cpu")


def reflect(index: Tensor, side: int) -> Tensor:
    """Bring pixel numbers that lie past an edge back inside, as a mirror at the edge would."""
    return (side - 1) - ((side - 1) - index.abs()).abs()


@dataclass
class Client:
    """The one working model, which plays every client in turn.

    Args:
        model: on the device that trains; its parameters are overwritten by each call.
        images: all images pooled, ``N x H x W x C`` uint8, on that device.
        labels: ``N`` int64, on that device.
        lr_decay: learning rate ``lr / (1 + lr_decay * step)``, step counted over all rounds.
        lr_warmup: share of a round's steps over which it rises from 0: a new Adam's first steps are all as
            long as the learning rate, since it does not know the gradients' size yet.
        head_lr: the head's learning rate as a multiple of the encoder's.
        kl_weight: beta, on the KL summed over z; reached from 0, linearly over ``kl_warmup`` rounds.
        eval_samples: draws of z averaged in a prediction.
        loss_weight: lambda, of the method's own loss.
        augment: ``none``, ``flip`` or ``flip+shift`` of the training images, drawn anew each time.
        dtype: of convolutions and matrix products, bfloat16 or float32; parameters are float32.
        frozen: what stays with a client is not trained.
    """

    model: nn.Module
    method: Method
    images: Tensor
    labels: Tensor
    num_classes: int
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
    loss_weight: float
    augment: str
    dtype: torch.dtype
    frozen: bool = False

    def state(self) -> State:
        """A copy of the working model's parameters, on their device."""
        return {name: value.detach().clone() for name, value in self.model.state_dict().items()}

    def split(self, state: State) -> tuple[State, State]:
        """What is shared, in main memory, and what stays private, where it is."""
        shared, private = self.method.split(state)
        return {name: value.cpu() for name, value in shared.items()}, private

    def train(self, client: int, round: int, indices: np.ndarray, sent: State,
              private: Private) -> tuple[State, Private, dict[str, float]]:
        """``epochs`` local epochs on ``CE(head(z), y) + beta KL(q(z|x) || N(0, I))``.

        Returns:
            The upload, what stays, and the running figures of the last epoch (loss is the CE alone).

        Raises:
            Diverged: the loss is no longer finite; ``private`` and ``sent`` are untouched.
        """
        seed_torch(self.seed, "train", client, round)
        self._load(sent, private)
        self.model.train()
        optimizer, steps = self.make_optimizer(dict(self.model.named_parameters())), private.steps
        orders = rng(self.seed, "order", client, round)   # the same on every device
        for _ in range(self.epochs):
            tally = Tally()
            order = torch.from_numpy(orders.permutation(indices)).to(self.labels.device)
            for batch in order.split(self.batch_size):
                self.set_lr(optimizer, steps, steps - private.steps, len(indices))
                tally.add(*self._step(optimizer, round, batch), self.labels[batch])
                steps += 1
            if not torch.cat(tally.loss).isfinite().all():
                raise self.diverged(client, round)
        return self.outcome(client, round, self.state(), steps, tally)

    def outcome(self, client: int, round: int, state: State, steps: int,
                tally: Tally) -> tuple[State, Private, dict[str, float]]:
        """What ``train`` returns, of a client's parameters after training, or Diverged."""
        if not torch.stack([value.isfinite().all() for value in state.values()]).all():   # the last step
            raise self.diverged(client, round)
        upload, kept = self.split(state)
        own = upload if self.method.server.protects else {}
        return upload, Private(kept, steps, own), tally.result(self.num_classes)

    @torch.inference_mode()
    def evaluate(self, client: int, round: int, indices: np.ndarray, shared: State,
                 private: Private) -> dict[str, float]:
        """Figures of ``p(y|x)``, averaged over ``eval_samples`` draws of z; loss is its CE."""
        seed_torch(self.seed, "evaluate", client, round)
        self._load(shared, private)
        self.model.eval()
        tally = Tally()
        for batch in torch.from_numpy(indices).to(self.labels.device).split(512):
            with self.autocast():
                probabilities, kl = self.model.predict(self._pixels(batch), self.eval_samples)
            loss = F.nll_loss(probabilities.clamp_min(1e-12).log(), self.labels[batch], reduction="none")
            tally.add(loss, kl, probabilities, self.labels[batch])
        return tally.result(self.num_classes)

    def objective(self, model: nn.Module, images: Tensor, logits: Tensor, kl: Tensor | None, labels: Tensor,
                  round: int) -> tuple[Tensor, Tensor]:
        """``CE + beta KL + the method's own loss``, and the CE alone, an image: ``N``, ``N``."""
        loss = F.cross_entropy(logits, labels, reduction="none")
        whole = loss if kl is None else loss + self.beta(round) * kl
        if self.method.loss is not None:
            whole = whole + self.method.loss(model, images, self.loss_weight)
        return whole, loss

    def beta(self, round: int) -> float:
        """``kl_weight``, or the part of it that its warm-up has reached."""
        return self.kl_weight * min(1.0, (round - 1) / self.kl_warmup if self.kl_warmup else 1.0)

    def autocast(self) -> torch.autocast:
        """The precision of convolutions and matrix products, as a context."""
        return torch.autocast(self.images.device.type, torch.bfloat16, self.dtype == torch.bfloat16)

    def _step(self, optimizer: torch.optim.Optimizer, round: int,
              batch: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """One step on a batch of image numbers -> loss and KL an image, logits."""
        optimizer.zero_grad(set_to_none=True)
        with self.autocast():
            images = self.augmented(batch)
            logits, kl = self.model(images)
            objective, loss = self.objective(self.model, images, logits, kl, self.labels[batch], round)
        objective.mean().backward()
        optimizer.step()
        return loss, kl, logits

    def diverged(self, client: int, round: int) -> Diverged:
        """The error, with its likely reason."""
        beta = f", or --kl_weight {self.kl_weight:g}" if self.kl_weight else ""
        return Diverged(f"client {client}, round {round}: the loss is not finite; most likely "
                        f"--lr {self.lr:g}{beta} is too high")

    def _pixels(self, batch: Tensor) -> Tensor:
        """Image numbers ``N`` -> ``N x C x H x W`` in [0, 1], channels-last in memory."""
        return self.images[batch].permute(0, 3, 1, 2).float().div_(255)

    def augmented(self, batch: Tensor) -> Tensor:
        """``_pixels``, mirrored left to right with probability 1/2, or shifted too, where asked to.

        A shift is up to SHIFT pixels each way, with the image's own mirrored edge filling the gap.
        """
        if self.augment == "none":
            return self._pixels(batch)
        device, (height, width) = batch.device, self.images.shape[1:3]
        rows, columns = (torch.arange(side, device=device).expand(len(batch), side)
                         for side in (height, width))
        mirrored = torch.rand(len(batch), 1, device=device) < 0.5
        if self.augment == "flip+shift":
            by = torch.randint(-SHIFT, SHIFT + 1, (2, len(batch), 1), device=device)
            rows, columns = reflect(rows + by[0], height), reflect(columns + by[1], width)
        columns = torch.where(mirrored, width - 1 - columns, columns)
        chosen = self.images[batch[:, None, None], rows[:, :, None], columns[:, None, :]]   # N x H x W x C
        return chosen.permute(0, 3, 1, 2).float().div_(255)

    def _load(self, shared: State, private: Private) -> None:
        self.model.load_state_dict({**shared, **private.parameters})

    def make_optimizer(self, parameters: State) -> torch.optim.Optimizer:
        """A client's own optimiser, new every round as in FedAvg: the head's moments belong to weights that
        the server has since replaced, and the encoder's would treble what a client stores."""
        groups = [{"params": [value for name, value in parameters.items()
                              if name.startswith("classifier.") == of_head], "scale": scale}
                  for of_head, scale in ((False, 0.0 if self.frozen else 1.0), (True, self.head_lr))]
        groups = [group for group in groups if group["params"]]
        if self.optimizer == "sgd":
            return torch.optim.SGD(groups, self.lr, self.momentum, fused=True)
        return torch.optim.Adam(groups, self.lr, eps=1e-7, fused=True)

    def set_lr(self, optimizer: torch.optim.Optimizer, steps: int, done: int, images: int) -> None:
        """The learning rates of a client's next step, after ``steps`` in all and ``done`` in this round."""
        warm = self.lr_warmup * self.epochs * -(-images // self.batch_size)
        factor = min(1.0, (done + 1) / max(warm, 1)) / (1 + self.lr_decay * steps)
        for group in optimizer.param_groups:
            rate = group["scale"] * self.lr * factor
            if isinstance(group["lr"], Tensor):   # a captured step reads it where it is
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate
