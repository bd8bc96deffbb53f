"""Clients trained side by side as one stacked model: for small models on a GPU.

A step on ten images leaves a GPU idle but for the launching of kernels. Here the parameters of S clients are
stacked, S x ..., and torch.func.vmap makes one step of their S steps. Every client keeps its own data order, its
own optimiser (Adam and SGD work element by element) and its own loss. Dropout and the encoder's noise are drawn
from one generator for the whole stack, so a client's draws are other numbers than when it trains alone.
"""
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.func import functional_call, grad, vmap

from metrics import Tally
from models import Output
from server.mean import State
from update import Diverged, Private, Trained, Trainer, one_by_one
from utils import rng, seed_torch

FULL = 500   # images a step that keep a GPU busy


def stack_size(device: torch.device, batch_size: int) -> int:
    """How many clients to train at a time where the user did not say: one on a CPU, where stacking loses."""
    return max(1, FULL // batch_size) if device.type == "cuda" else 1


def train_each(trainer: Trainer, round: int, indices: dict[int, np.ndarray], sent: State,
               private: Callable[[int], Private], most: int) -> Iterator[tuple[int, Trained | Diverged]]:
    """``update.one_by_one``, or up to ``most`` clients at a time.

    A method with a loss of its own, which looks into the model, is always trained one client after another.
    """
    if most == 1 or trainer.method.loss is not None:
        yield from one_by_one(trainer, round, indices, sent, private)
        return
    alike: dict[tuple[int, int], dict[int, Private]] = {}   # by steps a round and steps made
    for k, own in indices.items():
        mine = private(k)
        members = alike.setdefault((-(-len(own) // trainer.training.batch_size), mine.steps), {})
        members[k] = mine
        if len(members) == most:
            yield from _train(trainer, round, {j: indices[j] for j in members}, sent, members)
            members.clear()
    for members in alike.values():
        if members:
            yield from _train(trainer, round, {j: indices[j] for j in members}, sent, members)


@dataclass(frozen=True)
class StackedStep:
    """What one step said of S clients' batches: ``S x B`` each, logits ``S x B x num_classes``.

    Args:
        counted: 1 for each image that counts, 0 for what fills up a short last batch.
    """

    loss: Tensor
    output: Output
    labels: Tensor
    counted: Tensor


def _train(trainer: Trainer, round: int, indices: dict[int, np.ndarray], sent: State,
           privates: dict[int, Private]) -> Iterator[tuple[int, Trained | Diverged]]:
    """``Trainer.train`` for clients with as many batches, and steps behind them, as one another."""
    how, device = trainer.training, trainer.labels.device
    seed_torch(how.seed, "train", min(indices), round)
    states = [{**sent, **own.parameters} for own in privates.values()]
    parameters = {name: torch.stack([state[name] for state in states]).to(device).requires_grad_()
                  for name in states[0]}   # S x ...
    optimizer, before = trainer.make_optimizer(parameters), next(iter(privates.values())).steps
    steps, largest = before, max(map(len, indices.values()))   # as many batches for all
    orders = {k: rng(how.seed, "order", k, round) for k in indices}
    trainer.model.train()
    gradient = vmap(grad(_objective(trainer, round), has_aux=True), randomness="different")
    for _ in range(how.epochs):
        epoch: list[StackedStep] = []
        numbers, counts = _batches({k: orders[k].permutation(own) for k, own in indices.items()},
                                   how.batch_size)
        for batch, counted in zip(numbers.to(device), counts.to(device), strict=True):   # S x B each
            trainer.set_lr(optimizer, steps, steps - before, largest)
            images = trainer.augmented(batch.flatten()).unflatten(0, batch.shape)   # S x B x C x H x W
            labels = trainer.labels[batch]
            values = {name: value.detach() for name, value in parameters.items()}
            with trainer.autocast():
                found, (loss, logits, *kl) = gradient(values, images, labels, counted)
            for name, value in parameters.items():
                value.grad = found[name]
            optimizer.step()
            steps += 1
            epoch.append(StackedStep(loss, Output(logits, *kl), labels, counted))
    for s, k in enumerate(indices):
        tally = Tally()
        for step in epoch:
            real = step.counted[s] > 0
            kl = None if step.output.kl is None else step.output.kl[s][real]
            tally.add(step.loss[s][real], kl, step.output.logits[s][real], step.labels[s][real])
        try:
            yield k, trainer.trained(k, round, {name: value[s].detach().clone()
                                                for name, value in parameters.items()}, steps, tally)
        except Diverged as error:
            yield k, error


def _objective(trainer: Trainer, round: int) -> Callable:
    """One client's objective, of its parameters and one batch, for ``vmap`` to spread over the stack."""
    def objective(parameters: State, images: Tensor, labels: Tensor, counted: Tensor):
        output = functional_call(trainer.model, parameters, (images, labels))
        whole, loss = trainer.objective(images, output, labels, round, {})
        kl = () if output.kl is None else (output.kl,)   # vmap returns tensors only
        return (whole * counted).sum() / counted.sum(), (loss, output.logits, *kl)
    return objective


def _batches(orders: dict[int, np.ndarray], batch_size: int) -> tuple[Tensor, Tensor]:
    """Every client's images in its order -> image numbers and 1 for each that counts, ``batches x S x B``.

    A last short batch is filled up with the client's first image, which counts 0.
    """
    length = -(-max(map(len, orders.values())) // batch_size) * batch_size
    numbers = np.stack([np.pad(order, (0, length - len(order)), constant_values=order[0])
                        for order in orders.values()])
    counts = np.stack([np.arange(length) < len(order) for order in orders.values()])

    def by_step(values: np.ndarray) -> Tensor:
        return torch.from_numpy(values.reshape(len(orders), -1, batch_size)).transpose(0, 1)
    return by_step(numbers), by_step(counts.astype(np.float32))
