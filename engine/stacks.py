"""Clients trained side by side as one stacked model: for small models on a GPU.

A step on ten images leaves a GPU idle but for the launching of kernels. Here the parameters of S clients are
stacked, S x ..., and torch.func.vmap makes one step of their S steps. Every client keeps its own data order, its
own optimiser (Adam and SGD work element by element), its own loss, and the draws for augmentation, dropout and the
encoder's noise that it has when it trains alone.
"""
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call, grad, vmap
from torch.overrides import TorchFunctionMode

from devices import generator_of
from metrics import Tally
from models import Output
from server.base import State
from update import ClientState, Diverged, LocalUpdate, Trainer
from utils import rng

FULL = 500   # images per step that keep a GPU busy

Draw = Callable[[int], Tensor]   # number of images -> what is drawn for them, from PyTorch's own generator


def stack_size(device: torch.device, batch_size: int) -> int:
    """Return how many clients to stack where the user does not say: one on a CPU, where stacking loses."""
    return max(1, FULL // batch_size) if device.type == "cuda" else 1


def in_stacks(trainer: Trainer, round: int, indices: dict[int, np.ndarray], sent: State,
              state_of: Callable[[int], ClientState], most: int) -> Iterator[tuple[int, LocalUpdate | Diverged]]:
    """Train clients, up to ``most`` at a time; arguments as of ``engine.clients.train_each``."""
    alike: dict[tuple[int, int], dict[int, ClientState]] = {}   # by batches and by earlier steps
    for k, images in indices.items():
        state = state_of(k)
        members = alike.setdefault((-(-len(images) // trainer.training.batch_size), state.steps), {})
        members[k] = state
        if len(members) == most:
            yield from _train(trainer, round, {j: indices[j] for j in members}, sent, members)
            members.clear()
    for members in alike.values():
        if members:
            yield from _train(trainer, round, {j: indices[j] for j in members}, sent, members)


class Draws(TorchFunctionMode):
    """Replay random tensors in order, since vmap has one generator; with None, record what would be drawn."""

    def __init__(self, drawn: Iterable[Tensor] | None = None):
        super().__init__()
        self.drawn = None if drawn is None else iter(drawn)
        self.noted: list[tuple[Tensor, Draw]] = []   # what a draw is shaped like, and the draw

    def __torch_function__(self, function: Callable, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is F.dropout and kwargs["training"]:
            return args[0] * self._next(args[0], lambda like: F.dropout(like.fill_(1), kwargs["p"]))
        if function is torch.randn_like:
            return self._next(args[0], torch.randn_like)
        return function(*args, **kwargs)

    def _next(self, like: Tensor, draw: Callable[[Tensor], Tensor]) -> Tensor:
        if self.drawn is not None:
            return next(self.drawn)
        self.noted.append((like, lambda count: draw(like.new_empty(count, *like.shape[1:]))))
        return torch.ones_like(like)


@torch.no_grad()
def draws_of(trainer: Trainer) -> list[Draw] | None:
    """Return what one step of a client's network draws; None if that cannot be drawn client by client."""
    generator, images = generator_of(trainer.labels.device), 2
    before = generator.get_state()
    trainer.model.train()
    with Draws() as draws, trainer.autocast():
        trainer.model(trainer.images[:images].permute(0, 3, 1, 2).float())
    untouched = torch.equal(before, generator.get_state())
    by_image = all(like.shape[:1] == (images,) for like, _ in draws.noted)
    return [draw for _, draw in draws.noted] if untouched and by_image else None


class ClientDraws:
    """Every client's draws, each from PyTorch's generator as it is when the client trains alone."""

    def __init__(self, trainer: Trainer, round: int, clients: Iterable[int]):
        self.trainer, self.draws = trainer, draws_of(trainer) or []
        self.generator = generator_of(trainer.labels.device)
        self.states: dict[int, Tensor] = {}
        for k in clients:
            trainer.seed("train", k, round)
            self.states[k] = self.generator.get_state()

    def step(self, counts: list[int]) -> tuple[tuple[Tensor, ...], list[Tensor]]:
        """Draw for one step ``Trainer.placements`` of all clients in a row, and the network's, ``S x B x ...``.

        Args:
            counts: number of images by client; a client with fewer than the largest is filled up with 0.
        """
        size, steps = max(counts), []
        for (k, state), count in zip(list(self.states.items()), counts, strict=True):
            self.generator.set_state(state)
            placements = self.trainer.placements(count)
            steps.append(([F.pad(placement, (0, 0, 0, size - count)) for placement in placements],
                          [torch.cat([drawn := draw(count), drawn.new_zeros(size - count, *drawn.shape[1:])])
                           for draw in self.draws]))
            self.states[k] = self.generator.get_state()
        placed, noise = (zip(*parts, strict=True) for parts in zip(*steps, strict=True))
        return tuple(torch.cat(clients, -2) for clients in placed), [torch.stack(clients) for clients in noise]


class StackedStep(NamedTuple):
    """One step on S clients' batches: ``S x B`` each, logits ``S x B x num_classes``; filling is not counted."""

    loss: Tensor
    output: Output
    labels: Tensor
    counted: Tensor


def _train(trainer: Trainer, round: int, indices: dict[int, np.ndarray], sent: State,
           states: dict[int, ClientState]) -> Iterator[tuple[int, LocalUpdate | Diverged]]:
    """Train clients that have equally many batches, and equally many steps behind them."""
    settings, device = trainer.training, trainer.labels.device
    before = next(iter(states.values())).steps
    whole = [{**sent, **state.parameters} for state in states.values()]
    parameters = {name: torch.stack([state[name].to(device) for state in whole]) for name in whole[0]}
    batches = -(-max(map(len, indices.values())) // settings.batch_size)
    total = settings.steps_of(max(map(len, indices.values())))
    last_epoch = deque(_steps(trainer, round, indices, parameters, before, total), (total - 1) % batches + 1)
    for s, k in enumerate(indices):
        tally = Tally()
        for step in last_epoch:
            real = step.counted[s] > 0
            kl = None if step.output.kl is None else step.output.kl[s][real]
            tally.add(step.loss[s][real], kl, step.output.logits[s][real], step.labels[s][real])
        trained = {name: value[s].detach().clone() for name, value in parameters.items()}
        try:
            yield k, trainer.local_update(k, round, trained, before + total, tally)
        except Diverged as error:
            yield k, error


def _steps(trainer: Trainer, round: int, indices: dict[int, np.ndarray], parameters: State,
           before: int, total: int) -> Iterator[StackedStep]:
    """Make ``total`` steps; each overwrites ``parameters``, the clients' side by side.

    Args:
        before: steps that each client has made in earlier rounds.
    """
    settings, device = trainer.training, trainer.labels.device
    for value in parameters.values():
        value.requires_grad_()
    optimizer, done = trainer.make_optimizer(parameters), 0
    orders = {k: rng(settings.seed, "order", k, round) for k in indices}
    draws = ClientDraws(trainer, round, indices)
    trainer.model.train()
    gradient = vmap(grad(_objective(trainer, round), has_aux=True))   # a draw in it is an error
    while done < total:   # an epoch
        numbers, counts = _batches({k: orders[k].permutation(images) for k, images in indices.items()},
                                   settings.batch_size)
        real = counts.sum(2).int().tolist()   # by step and client
        for batch, counted, sizes in list(zip(numbers.to(device), counts.to(device), real,
                                              strict=True))[:total - done]:   # S x B
            trainer.set_lr(optimizer, before + done, done, total)
            placements, noise = draws.step(sizes)
            batch, counted = batch[:, :max(sizes)], counted[:, :max(sizes)]   # a last batch may be short
            images = trainer.placed(batch.flatten(), placements).unflatten(0, batch.shape)   # S x B x C x H x W
            labels = trainer.labels[batch]
            values = {name: value.detach() for name, value in parameters.items()}
            with trainer.autocast():
                gradients, (loss, logits, *kl) = gradient(values, images, labels, counted, noise)
            for name, value in parameters.items():   # a fused optimiser takes both in the order of memory
                same = gradients[name].stride() == value.stride()
                value.grad = gradients[name] if same else torch.empty_like(value).copy_(gradients[name])
            optimizer.step()
            done += 1
            yield StackedStep(loss, Output(logits, *kl), labels, counted)


def _objective(trainer: Trainer, round: int) -> Callable:
    """Return one client's objective of its parameters and one batch, for ``vmap``."""
    def objective(parameters: State, images: Tensor, labels: Tensor, counted: Tensor, noise: list[Tensor]):
        with Draws(noise):
            output = functional_call(trainer.model, parameters, (images, labels))
        whole, loss = trainer.objective(images, output, labels, round, {})
        kl = () if output.kl is None else (output.kl,)   # vmap returns tensors only
        return (whole * counted).sum() / counted.sum(), (loss, output.logits, *kl)
    return objective


def _batches(orders: dict[int, np.ndarray], batch_size: int) -> tuple[Tensor, Tensor]:
    """Cut every client's images into batches: image numbers, and 1 for each real one, ``batches x S x B``.

    A short last batch is filled up with the client's first image, which counts 0.
    """
    length = -(-max(map(len, orders.values())) // batch_size) * batch_size
    numbers = np.stack([np.pad(order, (0, length - len(order)), constant_values=order[0])
                        for order in orders.values()])
    counts = np.stack([np.arange(length) < len(order) for order in orders.values()])

    def by_step(values: np.ndarray) -> Tensor:
        return torch.from_numpy(values.reshape(len(orders), -1, batch_size)).transpose(0, 1)
    return by_step(numbers), by_step(counts.astype(np.float32))
