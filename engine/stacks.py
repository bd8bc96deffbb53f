"""Clients trained side by side as one stacked model: for small models on a GPU.

A step on ten images leaves a GPU idle but for the launching of kernels. Here the parameters of S clients are
stacked, S x ..., and torch.func.vmap makes one step of their S steps. Every client keeps its own data order, its
own optimiser (Adam and SGD work element by element) and its own loss. What it draws, for augmentation, dropout
and the encoder's noise, are the numbers that it draws when it trains alone: neither its neighbours in the stack
nor the number of processes change them.
"""
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call, grad, vmap
from torch.overrides import TorchFunctionMode

from metrics import Tally
from models import Output
from server.base import State
from update import ClientState, Diverged, LocalUpdate, Trainer
from utils import generator_of, rng, seed_torch

FULL = 500   # images a step that keep a GPU busy


def stack_size(device: torch.device, batch_size: int) -> int:
    """How many clients to train at a time where the user did not say: one on a CPU, where stacking loses."""
    return max(1, FULL // batch_size) if device.type == "cuda" else 1


def in_stacks(trainer: Trainer, round: int, indices: dict[int, np.ndarray], sent: State,
              private: Callable[[int], ClientState], most: int) -> Iterator[tuple[int, LocalUpdate | Diverged]]:
    """``update.one_by_one``, up to ``most`` clients at a time."""
    alike: dict[tuple[int, int], dict[int, ClientState]] = {}   # by steps a round and steps made
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


Draw = Callable[[int], Tensor]   # for so many images; from PyTorch's own generator


class Asked(TorchFunctionMode):
    """Notes what a network draws, and lets it draw nothing.

    Attributes:
        draws: in the order in which they are asked for.
        shapes: of what was asked for.
    """

    def __init__(self) -> None:
        super().__init__()
        self.draws: list[Draw] = []
        self.shapes: list[torch.Size] = []

    def __torch_function__(self, function: Callable, types: Any, given: tuple = (),
                           named: dict[str, Any] | None = None) -> Any:
        named = named or {}
        if function is F.dropout and named["training"]:
            self._note(given[0], lambda start: F.dropout(start.fill_(1), named["p"]))
            return given[0]
        if function is torch.randn_like:
            self._note(given[0], torch.randn_like)
            return torch.zeros_like(given[0])
        return function(*given, **named)

    def _note(self, like: Tensor, draw: Callable[[Tensor], Tensor]) -> None:
        self.shapes.append(like.shape)
        self.draws.append(lambda count: draw(like.new_empty(count, *like.shape[1:])))


class Given(TorchFunctionMode):
    """Answers what a network asks for with what was drawn before: vmap has one generator for all clients."""

    def __init__(self, drawn: Iterable[Tensor]):
        super().__init__()
        self.drawn = iter(drawn)

    def __torch_function__(self, function: Callable, types: Any, given: tuple = (),
                           named: dict[str, Any] | None = None) -> Any:
        named = named or {}
        if function is F.dropout and named["training"]:
            return given[0] * next(self.drawn)
        if function is torch.randn_like:
            return next(self.drawn)
        return function(*given, **named)


@torch.no_grad()
def draws_of(trainer: Trainer) -> list[Draw] | None:
    """What one step of a client's network draws; None if that cannot be drawn client by client."""
    generator, images = generator_of(trainer.labels.device), 2
    before = generator.get_state()
    trainer.model.train()
    with Asked() as asked, trainer.autocast():
        trainer.model(trainer.images[:images].permute(0, 3, 1, 2).float())
    untouched = torch.equal(before, generator.get_state())
    by_image = all(shape[:1] == (images,) for shape in asked.shapes)
    return asked.draws if untouched and by_image else None


class OwnDraws:
    """Every client's draws, each from PyTorch's generator as it is when the client trains alone."""

    def __init__(self, trainer: Trainer, round: int, clients: Iterable[int]):
        self.trainer, self.draws = trainer, draws_of(trainer) or []
        self.generator = generator_of(trainer.labels.device)
        self.states: dict[int, Tensor] = {}
        for k in clients:
            seed_torch(trainer.training.seed, "train", k, round)
            self.states[k] = self.generator.get_state()

    @contextmanager
    def _of(self, client: int) -> Iterator[None]:
        self.generator.set_state(self.states[client])
        yield
        self.states[client] = self.generator.get_state()

    def step(self, counts: list[int]) -> tuple[tuple[Tensor, ...], list[Tensor]]:
        """One step's: ``Trainer.placements`` of all clients' images in a row, and the network's, ``S x B x ...``.

        Args:
            counts: of images, by client; where it is less than the largest, what fills up is 0.
        """
        size, each = max(counts), []
        for k, count in zip(self.states, counts, strict=True):
            with self._of(k):
                each.append(([F.pad(drawn, (0, 0, 0, size - count)) for drawn in self.trainer.placements(count)],
                             [_filled(draw(count), size) for draw in self.draws]))
        placed, noise = (zip(*parts, strict=True) for parts in zip(*each, strict=True))
        return tuple(torch.cat(of_all, -2) for of_all in placed), [torch.stack(of_all) for of_all in noise]


def _filled(values: Tensor, size: int) -> Tensor:
    """``n x ...`` -> ``size x ...``, filled up with 0."""
    return values if len(values) == size else torch.cat(
        [values, values.new_zeros(size - len(values), *values.shape[1:])])


def side_by_side(states: list[State], device: torch.device) -> State:
    """State dicts -> one, ``S x ...``, on a device: some wait in main memory, some on the GPU."""
    return {name: torch.stack([state[name].to(device) for state in states]) for name in states[0]}


def _train(trainer: Trainer, round: int, indices: dict[int, np.ndarray], sent: State,
           privates: dict[int, ClientState]) -> Iterator[tuple[int, LocalUpdate | Diverged]]:
    """``Trainer.train`` for clients with as many batches, and steps behind them, as one another."""
    how, device = trainer.training, trainer.labels.device
    received = {name: value.to(device) for name, value in sent.items()}
    parameters = side_by_side([{**received, **own.parameters} for own in privates.values()], device)
    before = next(iter(privates.values())).steps
    batches = -(-max(map(len, indices.values())) // how.batch_size)   # as many for all
    epoch = deque(steps_of(trainer, round, indices, parameters, before), batches)   # the last one
    for s, k in enumerate(indices):
        tally = Tally()
        for step in epoch:
            own = step.counted[s] > 0
            kl = None if step.output.kl is None else step.output.kl[s][own]
            tally.add(step.loss[s][own], kl, step.output.logits[s][own], step.labels[s][own])
        try:
            yield k, trainer.trained(k, round, {name: value[s].detach().clone() for name, value
                                                in parameters.items()}, before + how.epochs * batches, tally)
        except Diverged as error:
            yield k, error


def steps_of(trainer: Trainer, round: int, indices: dict[int, np.ndarray], parameters: State,
             before: int) -> Iterator[StackedStep]:
    """All steps of ``epochs`` local epochs; each overwrites ``parameters``, the clients' side by side.

    Args:
        before: steps that each client has made in earlier rounds.
    """
    how, device = trainer.training, trainer.labels.device
    for value in parameters.values():
        value.requires_grad_()
    optimizer, done = trainer.make_optimizer(parameters), 0
    largest = max(map(len, indices.values()))
    orders = {k: rng(how.seed, "order", k, round) for k in indices}
    draws = OwnDraws(trainer, round, indices)
    trainer.model.train()
    gradient = vmap(grad(_objective(trainer, round), has_aux=True))   # a draw in it is an error
    for _ in range(how.epochs):
        numbers, counts = _batches({k: orders[k].permutation(own) for k, own in indices.items()},
                                   how.batch_size)
        real = counts.sum(2).int().tolist()   # by step and client
        for batch, counted, images_of in zip(numbers.to(device), counts.to(device), real, strict=True):   # S x B
            trainer.set_lr(optimizer, before + done, done, largest)
            placed, noise = draws.step(images_of)
            size = max(images_of)   # no client has more: a last batch may be short for all
            batch, counted = batch[:, :size], counted[:, :size]
            images = trainer.placed(batch.flatten(), placed).unflatten(0, batch.shape)   # S x B x C x H x W
            labels = trainer.labels[batch]
            values = {name: value.detach() for name, value in parameters.items()}
            with trainer.autocast():
                found, (loss, logits, *kl) = gradient(values, images, labels, counted, noise)
            for name, value in parameters.items():   # a fused optimiser takes both in the order of memory
                same = found[name].stride() == value.stride()
                value.grad = found[name] if same else torch.empty_like(value).copy_(found[name])
            optimizer.step()
            done += 1
            yield StackedStep(loss, Output(logits, *kl), labels, counted)


def _objective(trainer: Trainer, round: int) -> Callable:
    """One client's objective, of its parameters and one batch, for ``vmap`` to spread over the stack."""
    def objective(parameters: State, images: Tensor, labels: Tensor, counted: Tensor, noise: list[Tensor]):
        with Given(noise):
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
