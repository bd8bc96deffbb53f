"""A trainer whose step is one CUDA graph: captured once, then replayed.

At batch 256 an H100 computes a step in less time than Python needs to launch its hundred kernels. A graph holds
them all, and one launch replays them: on the same addresses, so parameters, optimiser, learning rates and image
numbers are overwritten in place. It has never run on a GPU: the tests use a stand-in for the graph.
"""
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from devices import generator_of
from server.base import State
from update import Trainer
from utils import InputError

WARM_UP = 3   # plain steps before a capture: libraries choose their kernels and allocate then
WITHOUT = "use --stack 1, which trains without one"

Capture = Callable[[Callable[[], None], torch.device], Callable[[], None]]   # a step -> its replay
Result = tuple[Tensor, Tensor | None, Tensor]   # of ``Trainer._step``


def cuda_graph(step: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """Capture ``step``, which runs a few times before, and return its replay.

    Warm-up and capture share a stream: libraries keep handles and workspaces for each stream, and creating one
    during a capture can make that fail.
    """
    with torch.cuda.device(device):   # a new stream belongs to the current device
        side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                step()
            with torch.cuda.graph(graph, stream=side):
                step()
        torch.cuda.current_stream().wait_stream(side)
    return graph.replay


@dataclass(frozen=True)
class Static:
    """The tensors that a captured step reads and writes, always at the same addresses."""

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

    capture: Capture = cuda_graph
    _static: Static | None = field(default=None, init=False)
    # By beta: the replay, and the results that it overwrites.
    _replays: dict[float, tuple[Callable[[], None], list[Result]]] = field(default_factory=dict, init=False)

    def prepare(self, sent: State, part: str = "all") -> tuple[torch.optim.Optimizer, State]:
        """Return the one optimiser, set back to its start, and what was sent, at the same addresses as before."""
        if self._static is None:
            optimizer, received = super().prepare(sent, part)
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
        if static is None or len(batch) < self.training.batch_size:
            return super()._step(optimizer, round, batch, sent)
        static.batch.copy_(batch)
        beta = self.training.beta(round)
        if beta not in self._replays:
            self._replays = {beta: self._captured(static, round)}   # earlier ones are over
        replay, results = self._replays[beta]
        replay()
        loss, kl, logits = results[-1]
        return loss.clone(), None if kl is None else kl.clone(), logits.clone()

    def _captured(self, static: Static, round: int) -> tuple[Callable[[], None], list[Result]]:
        """Capture a step, and leave parameters, optimiser and generators as they were before it.

        Raises:
            InputError: it could not be captured, or its replay does nothing.
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
            replay = self.capture(step, device)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            why = str(error.__context__ or error).splitlines()[0]   # ending a broken capture fails as well
            raise InputError(f"no CUDA graph of the training step on {device}: {why}; {WITHOUT}") from error
        before.restore()
        if not before.changed_by(replay):
            raise InputError(f"the CUDA graph of the training step does nothing on {device}; {WITHOUT}")
        before.restore()
        return replay, results


class Before:
    """The state before a capture, whose runs of a step change it."""

    def __init__(self, static: Static, parameters: list[Tensor], device: torch.device):
        self.static, self.parameters = static, parameters
        self.rates = [group["lr"] for group in static.optimizer.param_groups]
        self.values = [tensor.detach().clone() for tensor in (*parameters, *self.rates)]
        self.moments = [tensor.clone() for tensor in static.moments()]
        self.generator = generator_of(device)
        self.drawn = self.generator.get_state()

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
