"""A client whose training step is one CUDA graph: captured once, then replayed.

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

from update import Client, State

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


@dataclass
class GraphedClient(Client):
    """``Client`` with full batches' steps replayed; ``capture`` turns a step into its replay."""

    capture: Callable[[Callable[[], None]], Callable[[], None]] | None = cuda_graph
    made: torch.optim.Optimizer | None = field(default=None, init=False)
    replays: dict[float, Callable[[], None]] = field(default_factory=dict, init=False)   # by beta

    def make_optimizer(self, parameters: State) -> torch.optim.Optimizer:
        """The one optimiser of the working model, set back to its start; a new one for other parameters."""
        if next(iter(parameters.values())) is not next(self.model.parameters()):   # a stack's
            return super().make_optimizer(parameters)
        if self.made is None:
            self.made = super().make_optimizer(parameters)
            device = self.labels.device
            for group in self.made.param_groups:
                group["lr"] = torch.zeros((), device=device)
                if "capturable" in group:
                    group["capturable"] = device.type == "cuda"
            self.batch = torch.zeros(self.batch_size, dtype=torch.int64, device=device)
        for tensor in self._moments():
            tensor.zero_()
        return self.made

    def _step(self, optimizer: torch.optim.Optimizer, round: int,
              batch: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        if self.capture is None or optimizer is not self.made or len(batch) < self.batch_size:
            return super()._step(optimizer, round, batch)
        self.batch.copy_(batch)
        beta = self.beta(round)
        if beta not in self.replays:
            try:
                self.replays = {beta: self._captured(round)}   # a warm-up's earlier ones are over
            except RuntimeError as error:
                warnings.warn(f"no CUDA graph of the training step, so it is slower: {error}", stacklevel=2)
                self.capture = None
                return super()._step(optimizer, round, batch)
        self.replays[beta]()
        return tuple(None if value is None else value.detach().clone() for value in self.noted)

    def _captured(self, round: int) -> Callable[[], None]:
        """Capture a step, and leave parameters, optimiser and generator as they were before it."""
        def step() -> None:
            self.noted = super(GraphedClient, self)._step(self.made, round, self.batch)

        steady = [*self.model.parameters(), *(group["lr"] for group in self.made.param_groups)]
        before = [tensor.detach().clone() for tensor in steady]
        moments = [tensor.clone() for tensor in self._moments()]   # none yet before the very first step
        try:
            with torch.random.fork_rng([self.labels.device] if self.labels.is_cuda else []):
                return self.capture(step)
        finally:
            with torch.no_grad():
                for tensor, value in zip(steady, before, strict=True):
                    tensor.copy_(value)
                for i, tensor in enumerate(self._moments()):
                    tensor.copy_(moments[i] if moments else torch.zeros_like(tensor))

    def _moments(self) -> list[Tensor]:
        return [tensor for state in self.made.state.values() for tensor in state.values()
                if isinstance(tensor, Tensor)]
