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


@dataclass
class GraphedTrainer(Trainer):
    """``Trainer`` with full batches' steps replayed; ``capture`` turns a step into its replay.

    What a captured step reads stays at one address: the optimiser, the batch's image numbers, what was sent.
    """

    capture: Callable[[Callable[[], None]], Callable[[], None]] | None = cuda_graph
    _optimizer: torch.optim.Optimizer | None = field(default=None, init=False)
    _batch: Tensor | None = field(default=None, init=False)
    _sent: State = field(default_factory=dict, init=False)
    _replays: dict[float, Replay] = field(default_factory=dict, init=False)   # by beta

    def make_optimizer(self, parameters: State) -> torch.optim.Optimizer:
        """The one optimiser of the working model, set back to its start; a new one for other parameters."""
        if next(iter(parameters.values())) is not next(self.model.parameters()):   # a stack's
            return super().make_optimizer(parameters)
        if self._optimizer is None:
            self._optimizer = super().make_optimizer(parameters)
            device = self.labels.device
            for group in self._optimizer.param_groups:
                group["lr"] = torch.zeros((), device=device)
                if "capturable" in group:
                    group["capturable"] = device.type == "cuda"
            self._batch = torch.zeros(self.training.batch_size, dtype=torch.int64, device=device)
        for tensor in self._moments():
            tensor.zero_()
        return self._optimizer

    def received(self, sent: State) -> State:
        """``Trainer.received``, always at the same address."""
        found = super().received(sent)
        if not self._sent:
            self._sent = {name: value.clone() for name, value in found.items()}
        for name, value in found.items():
            self._sent[name].copy_(value)
        return self._sent

    def _step(self, optimizer: torch.optim.Optimizer, round: int, batch: Tensor, sent: State) -> Noted:
        if self.capture is None or optimizer is not self._optimizer or len(batch) < self.training.batch_size:
            return super()._step(optimizer, round, batch, sent)
        self._batch.copy_(batch)
        beta = self.training.beta(round)
        if beta not in self._replays:
            try:
                self._replays = {beta: self._captured(round, sent)}   # a warm-up's earlier ones are over
            except RuntimeError as error:
                warnings.warn(f"no CUDA graph of the training step, so it is slower: {error}", stacklevel=2)
                self.capture = None
                return super()._step(optimizer, round, batch, sent)
        replay = self._replays[beta]
        replay.run()
        loss, kl, logits = replay.noted[-1]
        return loss.detach().clone(), None if kl is None else kl.detach().clone(), logits.detach().clone()

    def _captured(self, round: int, sent: State) -> Replay:
        """Capture a step, and leave parameters, optimiser and generator as they were before it."""
        noted: list[Noted] = []

        def step() -> None:
            noted[:] = [super(GraphedTrainer, self)._step(self._optimizer, round, self._batch, sent)]

        steady = [*self.model.parameters(), *(group["lr"] for group in self._optimizer.param_groups)]
        before = [tensor.detach().clone() for tensor in steady]
        moments = [tensor.clone() for tensor in self._moments()]   # none yet before the very first step
        try:
            with torch.random.fork_rng([self.labels.device] if self.labels.is_cuda else []):
                return Replay(self.capture(step), noted)
        finally:
            with torch.no_grad():
                for tensor, value in zip(steady, before, strict=True):
                    tensor.copy_(value)
                for i, tensor in enumerate(self._moments()):
                    tensor.copy_(moments[i] if moments else torch.zeros_like(tensor))

    def _moments(self) -> list[Tensor]:
        return [tensor for state in self._optimizer.state.values() for tensor in state.values()
                if isinstance(tensor, Tensor)]
