"""Clients trained side by side as one stacked model: for small models on a GPU.

A step on ten images leaves a GPU idle but for the launching of kernels. Here the parameters of S clients are
stacked, S x ..., and torch.func.vmap makes of their S steps one. Every client keeps its own data order, its
own optimiser (Adam and SGD work element by element) and its own loss; what dropout and the encoder's noise
draw comes from one generator for the stack, so a stack's draws are other numbers than its clients' alone.
"""
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor
from torch.func import functional_call, grad, vmap

from metrics import Tally
from update import Client, Diverged, Private, State
from utils import rng, seed_torch

Outcome = tuple[State, Private, dict[str, float]] | Diverged
FULL = 500   # images a step that keep a GPU busy


def stack_size(device: torch.device, batch_size: int) -> int:
    """How many clients to train at a time where the user did not say: one on a CPU, where stacking loses."""
    return max(1, FULL // batch_size) if device.type == "cuda" else 1


def train_each(client: Client, round: int, indices: dict[int, np.ndarray], sent: State,
               private: Callable[[int], Private], most: int) -> Iterator[tuple[int, Outcome]]:
    """Train clients in turn, or up to ``most`` at a time, and yield what ``Client.train`` returns or raises.

    A method with a loss of its own, which looks into the model, is trained in turn.

    Args:
        client: the working model and how it trains.
        indices: client -> its training images, for all that train in this round.
        private: what stays with a client, by its number.
    """
    if most == 1 or client.method.loss is not None:
        for k, own in indices.items():
            try:
                yield k, client.train(k, round, own, sent, private(k))
            except Diverged as error:
                yield k, error
        return
    alike: dict[tuple[int, int], dict[int, Private]] = {}   # clients that march in step
    for k, own in indices.items():
        mine = private(k)
        members = alike.setdefault((-(-len(own) // client.batch_size), mine.steps), {})
        members[k] = mine
        if len(members) == most:
            yield from _train(client, round, {j: indices[j] for j in members}, sent, members)
            members.clear()
    for members in alike.values():
        if members:
            yield from _train(client, round, {j: indices[j] for j in members}, sent, members)


def _train(client: Client, round: int, indices: dict[int, np.ndarray], sent: State,
           privates: dict[int, Private]) -> Iterator[tuple[int, Outcome]]:
    """``Client.train`` for clients with as many batches, and steps behind them, as one another."""
    seed_torch(client.seed, "train", min(indices), round)
    device = client.labels.device
    states = [{**sent, **own.parameters} for own in privates.values()]
    parameters = {name: torch.stack([state[name] for state in states]).to(device).requires_grad_()
                  for name in states[0]}   # S x ...
    optimizer, before = client.make_optimizer(parameters), next(iter(privates.values())).steps
    steps, most = before, max(map(len, indices.values()))   # as many batches for all
    orders = {k: rng(client.seed, "order", k, round) for k in indices}
    client.model.train()
    gradient = vmap(grad(_objective(client, round), has_aux=True), randomness="different")
    for _ in range(client.epochs):
        epoch = []
        numbers, counts = _batches({k: orders[k].permutation(own) for k, own in indices.items()},
                                   client.batch_size)
        for batch, counted in zip(numbers.to(device), counts.to(device), strict=True):   # S x B each
            client.set_lr(optimizer, steps, steps - before, most)
            images = client.augmented(batch.flatten()).unflatten(0, batch.shape)   # S x B x C x H x W
            labels = client.labels[batch]
            values = {name: value.detach() for name, value in parameters.items()}
            with client.autocast():
                found, (loss, logits, *kl) = gradient(values, images, labels, counted)
            for name, value in parameters.items():
                value.grad = found[name]
            optimizer.step()
            steps += 1
            epoch.append((loss, kl[0] if kl else None, logits, labels, counted))
    for s, k in enumerate(indices):
        tally = Tally()
        for loss, kl, logits, labels, counted in epoch:
            real = counted[s] > 0
            tally.add(loss[s][real], None if kl is None else kl[s][real], logits[s][real], labels[s][real])
        try:
            yield k, client.outcome(k, round, {name: value[s].detach().clone()
                                               for name, value in parameters.items()}, steps, tally)
        except Diverged as error:
            yield k, error


def _objective(client: Client, round: int) -> Callable:
    """One client's objective, of its parameters and one batch, for ``vmap`` to spread over the stack."""
    def objective(parameters: State, images: Tensor, labels: Tensor, counted: Tensor):
        logits, kl = functional_call(client.model, parameters, (images,))
        whole, loss = client.objective(client.model, images, logits, kl, labels, round)
        noted = (loss, logits) if kl is None else (loss, logits, kl)
        return (whole * counted).sum() / counted.sum(), noted
    return objective


def _batches(orders: dict[int, np.ndarray], batch_size: int) -> tuple[Tensor, Tensor]:
    """Every client's images in its order -> image numbers and 1 for each that counts, ``batches x S x B``.

    A last short batch is filled up with the client's first image, which counts 0.
    """
    length = -(-max(map(len, orders.values())) // batch_size) * batch_size
    numbers = np.stack([np.pad(order, (0, length - len(order)), constant_values=order[0])
                        for order in orders.values()])
    counts = np.stack([np.arange(length) < len(order) for order in orders.values()])
    return tuple(torch.from_numpy(a.reshape(len(orders), -1, batch_size)).transpose(0, 1)
                 for a in (numbers, counts.astype(np.float32)))
