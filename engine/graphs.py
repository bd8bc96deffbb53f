"""A trainer whose step is one CUDA graph: captured once, then replayed.

At batch 256 an H100 computes a step in less time than Python needs to launch its hundred kernels. A graph holds
them all, and one launch replays them: on the same addresses, so parameters, optimiser, learning rates and image
numbers are overwritten in place. It has never run on a GPU: the tests use a stand-in for the graph.
"""
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

import torch
from torch import Tensor

from server.base import State
from update import Trainer
from utils import InputError, generator_of

WARM_UP = 3   # plain steps before a capture: libraries choose their kernels and allocate then

Capture = Callable[[Callable[[], None], torch.device], Callable[[], None]]   # a step -> its replay
Result = tuple[Tensor, Tensor | None, Tensor]   # of ``Trainer._step``

# Graphs whose capture failed: PyTorch's allocator of pinned memory may go on asking them, so none may be freed.
abandoned: list[torch.cuda.CUDAGraph] = []


def cuda_graph(step: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """Capture ``step``, which runs a few times before, and return its replay.

    Warm-up and capture share a stream: libraries keep handles and workspaces for each stream, and creating one
    during a capture can make that fail. After a failure the stream from before is current again.

    Raises:
        RuntimeError: there is no graph; what PyTorch remembers of the capture is undone.
    """
    with torch.cuda.device(device):   # a new stream belongs to the current device
        side, pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()
        side.wait_stream(torch.cuda.current_stream())
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.stream(side):
                for _ in range(WARM_UP):
                    step()
                with torch.cuda.graph(graph, pool=pool, stream=side):
                    step()
        except BaseException:
            _abandon(graph, pool, device)
            raise
        torch.cuda.current_stream().wait_stream(side)
    return graph.replay


def _abandon(graph: torch.cuda.CUDAGraph, pool: tuple[int, int], device: torch.device) -> None:
    """Undo a capture that failed; parts that are undone already raise an error.

    PyTorch, up to 2.12 at least, ends a capture in the allocator only where CUDA's own end of it succeeds. Until
    then the allocator asks the graph about each allocation, and the pool is never freed.
    """
    index = torch.cuda.current_device() if device.index is None else device.index
    for undo in (lambda: torch._C._cuda_endAllocateToPool(index, pool), graph.reset,
                 lambda: torch._C._cuda_releasePool(index, pool),
                 lambda: torch.cuda.synchronize(index)):   # kernels may still write what is about to be put back
        with suppress(RuntimeError):
            undo()
    abandoned.append(graph)


@dataclass(frozen=True)
class Static:
    """What a captured step reads and writes, always at the same addresses."""

    optimizer: torch.optim.Optimizer
    batch: Tensor   # image numbers
    sent: State

    def moments(self) -> list[Tensor]:
        """Return the optimiser's own tensors; none before its first step."""
        return [tensor for state in self.optimizer.state.values() for tensor in state.values()
                if isinstance(tensor, Tensor)]


@dataclass
class GraphedTrainer(Trainer):
    """``Trainer`` with full batches' steps replayed; ``capture`` turns a step into its replay.

    A copy of it with other labels, as malicious clients train with, captures a step of its own.
    """

    capture: Capture | None = cuda_graph
    _static: Static | None = field(default=None, init=False)
    # By beta and swaps: the replay, and the results that it overwrites.
    _replays: dict[tuple[float, int], tuple[Callable[[], None], list[Result]]] = field(
        default_factory=dict, init=False)

    def prepare(self, sent: State) -> tuple[torch.optim.Optimizer, State]:
        """Return the one optimiser, set back to its start, and what was sent, at the same addresses as before."""
        if self._static is None:
            optimizer, received = super().prepare(sent)
            device = self.labels.device
            for group in optimizer.param_groups:
                group["lr"] = torch.zeros((), device=device)
                if "capturable" in group:
                    group["capturable"] = device.type == "cuda"
            batch = torch.zeros(self.training.batch_size, dtype=torch.int64, device=device)
            self._static = Static(optimizer, batch, {name: value.clone() for name, value in received.items()})
        else:
            for tensor in self._static.moments():
                tensor.zero_()
            for name, place in self._static.sent.items():
                place.copy_(sent[name])
        return self._static.optimizer, self._static.sent

    def _step(self, optimizer: torch.optim.Optimizer, round: int, batch: Tensor, sent: State) -> Result:
        static = self._static
        if self.capture is None or static is None or len(batch) < self.training.batch_size:
            return super()._step(optimizer, round, batch, sent)
        static.batch.copy_(batch)
        key = self.training.beta(round), Before.swaps
        if key not in self._replays:
            try:
                self._replays = {key: self._captured(self.capture, static, round)}   # earlier ones are over
            except RuntimeError as error:
                why = error.__context__ or error   # the first of two: ending a broken capture fails as well
                warnings.warn(f"no CUDA graph of the training step, so it is slower: {why}", stacklevel=2)
                self.capture = None
                return super()._step(optimizer, round, batch, sent)
        replay, results = self._replays[key]
        replay()
        loss, kl, logits = results[-1]
        return loss.clone(), None if kl is None else kl.clone(), logits.clone()

    def _captured(self, capture: Capture, static: Static,
                  round: int) -> tuple[Callable[[], None], list[Result]]:
        """Capture a step, and leave parameters, optimiser and generators as they were before it.

        Raises:
            RuntimeError: it could not be captured.
            InputError: its replay does nothing.
        """
        results: list[Result] = []

        def step() -> None:
            loss, kl, logits = super(GraphedTrainer, self)._step(
                static.optimizer, round, static.batch, static.sent)
            # Detached: else the step's autograd graph would live on, and tie later steps to the capture's stream.
            results[:] = [(loss.detach(), None if kl is None else kl.detach(), logits.detach())]

        device = self.labels.device
        before = Before(static, list(self.model.parameters()), device)
        try:
            replay = capture(step, device)
            before.restore()
            if not before.changed_by(replay):
                raise InputError(f"the CUDA graph of the training step does nothing on {device}; use --device "
                                 "cpu, or --stack 2, which trains without it")
        except BaseException:
            before.restore()
            before.leave()
            raise
        before.restore()
        return replay, results


class Before:
    """The state before a capture, whose runs of a step change it.

    Attributes:
        swaps: how often ``leave`` gave a generator another state. Graphs from before still draw from the old one.
    """

    swaps = 0

    def __init__(self, static: Static, parameters: list[Tensor], device: torch.device):
        self.static, self.parameters = static, parameters
        self.rates = [group["lr"] for group in static.optimizer.param_groups]
        self.values = [tensor.detach().clone() for tensor in (*parameters, *self.rates)]
        self.moments = [tensor.clone() for tensor in static.moments()]
        self.generator = generator_of(device)
        self.drawn, self.untouched = self.generator.get_state(), self.generator.clone_state()

    @torch.no_grad()
    def restore(self) -> None:
        """Put back parameters, learning rates, the optimiser's moments and generators."""
        for tensor, value in zip((*self.parameters, *self.rates), self.values, strict=True):
            tensor.copy_(value)
        for i, tensor in enumerate(self.static.moments()):
            tensor.copy_(self.moments[i] if self.moments else torch.zeros_like(tensor))
        self.generator.set_state(self.drawn)

    def changed_by(self, run: Callable[[], None]) -> bool:
        """Return whether a run changes a parameter, at a learning rate that no rounding hides."""
        for rate in self.rates:
            rate.fill_(1.0)
        run()
        return any(not torch.equal(tensor, value)
                   for tensor, value in zip(self.parameters, self.values, strict=False))

    def leave(self) -> None:
        """Recover from a capture that failed: drop gradients, which lie in the graph's memory, and give the
        generator a state that no capture has touched; in PyTorch 2.11 the old one waits for the capture's end."""
        self.static.optimizer.zero_grad(set_to_none=True)
        if self.generator.device.type == "cuda":
            self.generator.graphsafe_set_state(self.untouched)
            Before.swaps += 1
