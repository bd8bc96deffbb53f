"""Small clients trained at once, one thread each: for models whose steps are too short to be shared by cores.

A step of a small model is a series of short kernels, and splitting each of them over the cores costs more than it
gains. Here each thread trains one client after another, on one core. A client draws from a generator of its own
the numbers that it draws when it trains alone, so that the order of the threads does not matter.
"""
import copy
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields
from threading import Event
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from devices import torch_rng
from server.base import State
from update import ClientState, Diverged, LocalUpdate, Trainer

# The range in which threads were measured to be faster; beyond, one client at a time has all threads.
SMALL = 4_000_000   # parameters; the steps of larger models wait for memory, and threads would wait together
LARGEST = 256       # images per step; glibc maps what a thread needs of over 64 MB anew each time
MOST = 4            # of PyTorch's threads; measured with two
AHEAD = 4           # clients per thread that are under way or wait, at most


def threads_for(trainer: Trainer) -> int:
    """Return how many clients to train at once: PyTorch's threads on a CPU, if model and batch are small.

    It does not depend on the number of clients, so that a client's numbers do not either.
    """
    threads = torch.get_num_threads()
    small = (sum(p.numel() for p in trainer.model.parameters()) <= SMALL
             and trainer.training.batch_size <= LARGEST)
    return threads if trainer.labels.device.type == "cpu" and small and threads <= MOST else 1


class Stopped(Exception):
    """Nobody waits for this client any more."""


class DrawsFrom(TorchFunctionMode):
    """Let training draw from a generator, the numbers that PyTorch's own would give."""

    def __init__(self, generator: torch.Generator):
        super().__init__()
        self.generator = generator

    def __torch_function__(self, function: Callable, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is torch.rand or function is torch.randint:
            return function(*args, **kwargs, generator=self.generator)
        if function is torch.randn_like:
            return torch.empty_like(args[0], **kwargs).normal_(generator=self.generator)
        if function is F.dropout and kwargs["training"] and 0 < kwargs["p"] < 1:   # else nothing is drawn
            kept = 1 - kwargs["p"]
            return args[0] * torch.empty_like(args[0]).bernoulli_(kept, generator=self.generator).div_(kept)
        return function(*args, **kwargs)


@dataclass
class ThreadsTrainer(Trainer):
    """A thread's trainer, with a working model of its own; if ``stop`` is set, its next step raises Stopped."""

    stop: Event

    def train(self, client: int, round: int, indices: np.ndarray, sent: State,
              client_state: ClientState) -> LocalUpdate:
        with DrawsFrom(torch_rng(self.training.seed, "train", client, round)):
            return super().train(client, round, indices, sent, client_state)

    def seed(self, purpose: str, client: int, round: int) -> None:
        """Leave PyTorch's own generator alone, which all threads share."""

    def autocast(self) -> torch.autocast:
        """Return the context without its cache: threads share it, and emptying it would change gradients."""
        bf16 = self.training.dtype == torch.bfloat16
        return torch.autocast("cpu", torch.bfloat16, bf16, cache_enabled=False)

    def _step(self, *arguments: Any) -> tuple[Tensor, Tensor | None, Tensor]:
        if self.stop.is_set():
            raise Stopped
        return super()._step(*arguments)


def in_threads(trainer: Trainer, round: int, indices: dict[int, np.ndarray], sent: State,
               state_of: Callable[[int], ClientState],
               threads: int) -> Iterator[tuple[int, LocalUpdate | Diverged]]:
    """Train clients in threads, and yield them in order; arguments as of ``engine.clients.train_each``."""
    stop = Event()
    parts = {field.name: getattr(trainer, field.name) for field in fields(Trainer)}
    idle = deque(ThreadsTrainer(**parts | {"model": copy.deepcopy(trainer.model)}, stop=stop)
                 for _ in range(threads))
    waiting: deque[tuple[int, Future]] = deque()

    def train(client: int, images: np.ndarray, state: ClientState) -> LocalUpdate | Diverged:
        worker = idle.popleft()
        try:
            return worker.train(client, round, images, sent, state)
        except Diverged as error:
            return error
        finally:
            idle.append(worker)
    cores = torch.get_num_threads()
    torch.set_num_threads(1)   # threads that start from here on inherit it
    pool = ThreadPoolExecutor(threads)
    try:
        for k, images in indices.items():
            waiting.append((k, pool.submit(train, k, images, state_of(k))))
            if len(waiting) > AHEAD * threads:   # the others go on while a large client is waited for
                first, future = waiting.popleft()
                yield first, future.result()
        while waiting:
            first, future = waiting.popleft()
            yield first, future.result()
    finally:
        stop.set()   # if the caller leaves early, for an error or Ctrl-C
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(cores)
