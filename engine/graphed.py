"""A trainer whose step is one CUDA graph: captured once, then replayed.

At batch 256 an H100 computes a step in less time than Python needs to launch its hundred kernels. A graph
holds them all, and one launch replays them: on the same addresses, so parameters, optimiser, learning rates
and the batch's image numbers stay where they were captured and are overwritten in place. Short last batches
take the plain step. Not measured yet: its logic is tested on a CPU, with a stand-in for the graph.
"""
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from server.mean import State
from update import Trainer

WARM_UP = 3   # plain steps before a capture: libraries choose their kernels and allocate then


def cuda_graph(step: Callable[[], None]) -> Callable[[], None]:
    """Capture ``step`` -> its replay. It runs a few times before that."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UP):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


Noted = tuple[Tensor, Tensor | None, Tensor]   # what ``Trainer._step`` returns


@dataclass(frozen=True)
class Replay:
    """A captured step: running it overwrites ``noted``."""

    run: Callable[[], None]
    noted: list[Noted]


@dataclass(frozen=True)
class Static:
    """What a captured step reads and writes, always at the same addresses."""

    optimizer: torch.optim.Optimizer
    batch: Tensor   # image numbers
    sent: State = field(default_factory=dict)

    def moments(self) -> list[Tensor]:
        """The optimiser's own state: none before its first step."""
        return [tensor for state in self.optimizer.state.values() for tensor in state.values()
                if isinstance(tensor, Tensor)]


@dataclass
class GraphedTrainer(Trainer):
    """``Trainer`` with full batches' steps replayed; ``capture`` turns a step into its replay.

    A copy of it with other labels, as malicious clients train with, captures its step anew.
    """

    capture: Callable[[Callable[[], None]], Callable[[], None]] | None = cuda_graph
    _static: Static | None = field(default=None, init=False)
    _replays: dict[float, Replay] = field(default_factory=dict, init=False)   # by beta

    def prepare(self, sent: State) -> tuple[torch.optim.Optimizer, State]:
        """``Trainer.prepare`` at the same addresses in every round: the one optimiser, set back to its start, and
        what was sent, copied to where it was sent before."""
        if self._static is None:
            self._static = self._first(*super().prepare(sent))
            return self._static.optimizer, self._static.sent
        for tensor in self._static.moments():
            tensor.zero_()
        for name, place in self._static.sent.items():
            place.copy_(sent[name])
        return self._static.optimizer, self._static.sent

    def _first(self, optimizer: torch.optim.Optimizer, received: State) -> Static:
        """What the first round makes, ready to be captured."""
        device = self.labels.device
        for group in optimizer.param_groups:
            group["lr"] = torch.zeros((), device=device)
            if "capturable" in group:
                group["capturable"] = device.type == "cuda"
        batch = torch.zeros(self.training.batch_size, dtype=torch.int64, device=device)
        return Static(optimizer, batch, {name: value.clone() for name, value in received.items()})

    def _step(self, optimizer: torch.optim.Optimizer, round: int, batch: Tensor, sent: State) -> Noted:
        static = self._static
        if self.capture is None or static is None or len(batch) < self.training.batch_size:
            return super()._step(optimizer, round, batch, sent)
        static.batch.copy_(batch)
        beta = self.training.beta(round)
        if beta not in self._replays:
            try:
                self._replays = {beta: self._captured(static, round)}   # a warm-up's earlier ones are over
            except RuntimeError as error:
                warnings.warn(f"no CUDA graph of the training step, so it is slower: {error}", stacklevel=2)
                self.capture = None
                return super()._step(optimizer, round, batch, sent)
        replay = self._replays[beta]
        replay.run()
        loss, kl, logits = replay.noted[-1]
        return loss.detach().clone(), None if kl is None else kl.detach().clone(), logits.detach().clone()

    def _captured(self, static: Static, round: int) -> Replay:
        """Capture a step, and leave parameters, optimiser and generator as they were before it."""
        noted: list[Noted] = []

        def step() -> None:
            noted[:] = [super(GraphedTrainer, self)._step(static.optimizer, round, static.batch, static.sent)]

        steady = [*self.model.parameters(), *(group["lr"] for group in static.optimizer.param_groups)]
        before = [tensor.detach().clone() for tensor in steady]
        moments = [tensor.clone() for tensor in static.moments()]
        try:
            with torch.random.fork_rng([self.labels.device] if self.labels.is_cuda else []):
                assert self.capture is not None
                return Replay(self.capture(step), noted)
        finally:
            with torch.no_grad():
                for tensor, value in zip(steady, before, strict=True):
                    tensor.copy_(value)
                for i, tensor in enumerate(static.moments()):
                    tensor.copy_(moments[i] if moments else torch.zeros_like(tensor))
