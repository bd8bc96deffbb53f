"""Small clients trained at once, a thread each: for models whose steps are too short to be shared by cores.

A step of a small model is a row of short kernels, and to split each of them over the cores costs more than it
gains. Here each thread trains one client after another, on one core. A client draws from a generator of its own
the numbers that it draws when it trains alone, so that it does not matter how threads take turns.
"""
import copy
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, fields
from threading import Event
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from server.base import State
from update import ClientState, Diverged, LocalUpdate, Trainer
from utils import torch_rng

# Where this was measured to be faster; beyond, one client at a time has all threads.
SMALL = 4_000_000   # parameters; the steps of larger models wait for memory, and threads would wait together
LARGEST = 256       # images a step; glibc maps what a thread needs of over 64 MB anew each time
MOST = 4            # of PyTorch's threads; measured with two
AHEAD = 4           # clients a thread that are under way or wait, at most


def threads_for(trainer: Trainer) -> int:
    """How many clients to train at once: as many as PyTorch has threads on a CPU, if model and batch are small.

    It does not depend on how many clients train, so that a client's numbers do not either.
    """
    threads = torch.get_num_threads()
    small = (sum(p.numel() for p in trainer.model.parameters()) <= SMALL
             and trainer.training.batch_size <= LARGEST)
    return threads if trainer.labels.device.type == "cpu" and small and threads <= MOST else 1


class Stopped(Exception):
    """Nobody waits for this client any more."""


class DrawsFrom(TorchFunctionMode):
    """Answers what training draws from a generator, with the numbers that PyTorch's own would have given."""

    def __init__(self, generator: torch.Generator):
        super().__init__()
        self.generator = generator

    def __torch_function__(self, function: Callable, types: Any, given: tuple = (),
                           named: dict[str, Any] | None = None) -> Any:
        named = named or {}
        if function is torch.rand or function is torch.randint:
            return function(*given, **named, generator=self.generator)
        if function is torch.randn_like:
            return torch.empty_like(given[0], **named).normal_(generator=self.generator)
        if function is F.dropout and named["training"] and 0 < named["p"] < 1:   # else nothing is drawn
            kept = 1 - named["p"]
            return given[0] * torch.empty_like(given[0]).bernoulli_(kept, generator=self.generator).div_(kept)
        return function(*given, **named)


@dataclass
class ThreadsTrainer(Trainer):
    """A thread's trainer, with a working model of its own.

    Args:
        stop: where it is set, the next step raises Stopped.
    """

    stop: Event

    def train(self, client: int, round: int, indices: np.ndarray, sent: State, private: ClientState) -> LocalUpdate:
        with DrawsFrom(torch_rng(self.training.seed, "train", client, round)):
            return super().train(client, round, indices, sent, private)

    def seed(self, purpose: str, client: int, round: int) -> None:
        """Leave PyTorch's own generator, which all threads share, alone: ``train`` has one of its own."""
        if purpose != "train":
            super().seed(purpose, client, round)

    def autocast(self) -> torch.autocast:
        """Without its cache, which all threads share: one that empties it would change how another's gradients of
        a weight that is used twice are summed."""
        bf16 = self.training.dtype == torch.bfloat16
        return torch.autocast("cpu", torch.bfloat16, bf16, cache_enabled=False)

    def _step(self, *arguments: Any) -> tuple[Tensor, Tensor | None, Tensor]:
        if self.stop.is_set():
            raise Stopped
        return super()._step(*arguments)


@contextmanager
def one_thread_each(threads: int) -> Iterator[ThreadPoolExecutor]:
    """So many threads; as long as they are there, each kernel of this process runs on one core."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)   # threads that start from here on have it from this
    pool = ThreadPoolExecutor(threads)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(before)


def at_once(trainer: Trainer, number: int, indices: dict[int, np.ndarray], sent: State,
            private: Callable[[int], ClientState], threads: int) -> Iterator[tuple[int, LocalUpdate | Diverged]]:
    """``update.one_by_one`` in so many threads; what comes out of each client, in their order."""
    stop = Event()
    parts = {field.name: getattr(trainer, field.name) for field in fields(Trainer)}
    free = deque(ThreadsTrainer(**parts | {"model": copy.deepcopy(trainer.model)}, stop=stop)
                 for _ in range(threads))
    waiting: deque[tuple[int, Future]] = deque()

    def train(client: int, own: np.ndarray, mine: ClientState) -> LocalUpdate | Diverged:
        worker = free.popleft()
        try:
            return worker.train(client, number, own, sent, mine)
        except Diverged as error:
            return error
        finally:
            free.append(worker)
    with one_thread_each(threads) as pool:
        try:
            for k, own in indices.items():
                waiting.append((k, pool.submit(train, k, own, private(k))))
                if len(waiting) > AHEAD * threads:   # a large client is waited for; the others go on meanwhile
                    first, outcome = waiting.popleft()
                    yield first, outcome.result()
            while waiting:
                first, outcome = waiting.popleft()
                yield first, outcome.result()
        finally:
            stop.set()   # where the caller leaves early, for an error or Ctrl-C
