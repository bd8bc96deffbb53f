"""What each trick of a training step is worth: our step with all of them, and with one of them turned off.

    python benchmarks/tricks.py [--only mnist]      three minutes on two cores

Each way is in a process of its own, and they take turns. A figure is the median step, as the program makes it.
"""
import multiprocessing
import statistics
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection

import numpy as np
import torch
from _path import Script, count, guarded, named
from plain import Workload
from speed import WORKLOADS, Ours  # lets this script import the project
from torch import Tensor
from torchvision.transforms.functional import to_tensor

from update import Trainer
from utils import keep_freed_memory


def one_image_at_a_time(ours: Ours) -> None:
    Trainer._pixels = lambda trainer, batch: torch.stack(
        [to_tensor(image) for image in trainer.images[batch].numpy()])


def channels_first(ours: Ours) -> None:
    made = Trainer._pixels
    Trainer._pixels = lambda trainer, batch: made(trainer, batch).contiguous()
    ours.trainer.model.to(memory_format=torch.contiguous_format)


def plain_optimiser(ours: Ours) -> None:
    for name in ("Adam", "SGD"):
        kind = getattr(torch.optim, name)
        setattr(torch.optim, name, lambda *given, fused, kind=kind, **named: kind(*given, **named))


def figures_at_once(ours: Ours) -> None:
    step = Trainer._step

    def reading(trainer: Trainer, optimizer: torch.optim.Optimizer, round: int, batch: Tensor, sent: dict):
        loss, kl, logits = step(trainer, optimizer, round, batch, sent)
        loss.mean().item(), (logits.argmax(1) == trainer.labels[batch]).float().mean().item()
        return loss, kl, logits
    Trainer._step = reading


def one_client(ours: Ours) -> None:
    del ours.endless[1:]


def before_it_is_made(ours: Ours) -> None:
    """``serve`` has turned it off already."""


TRICKS: dict[str, Callable[[Ours], None]] = {
    "all of them": before_it_is_made,
    "fp32 instead of bf16": before_it_is_made,
    "freed memory given back": before_it_is_made,
    "channels first": channels_first,
    "optimiser not fused": plain_optimiser,
    "an image at a time": one_image_at_a_time,
    "figures read each step": figures_at_once,
    "one client at a time": one_client,
}


def serve(connection: Connection, without: str, work: Workload, threads: int) -> None:
    """Time steps in this process, whenever asked for so many."""
    torch.set_num_threads(threads)
    if without != "freed memory given back":
        keep_freed_memory()
    channels, height, width = work.image_shape
    count, drawn = work.batches * work.batch, np.random.default_rng(1)
    alone = Workload(work.network, work.image_shape, work.batch, work.optimizer, 1, work.batches, work.steps)
    ours = Ours(alone, drawn.integers(0, 256, (count, height, width, channels), np.uint8),
                drawn.integers(0, 10, count), torch.device("cpu"),
                "fp32" if without == "fp32 instead of bf16" else "auto")
    TRICKS[without](ours)
    for times in iter(connection.recv, None):
        connection.send(ours.step(times))


def measure(work: Workload, repeats: int) -> dict[str, float]:
    """Median seconds a step by what is turned off."""
    context, ways = multiprocessing.get_context("spawn"), {}
    for without in TRICKS:
        here, there = context.Pipe()
        context.Process(target=serve, args=(there, without, work, torch.get_num_threads()), daemon=True).start()
        here.send(1)
        here.recv()   # made, and warm, before the next one starts
        ways[without] = here
    seconds: dict[str, list[float]] = {without: [] for without in ways}
    for _ in range(repeats):
        for without, connection in ways.items():
            connection.send(work.steps)
            seconds[without].append(connection.recv())
    for connection in ways.values():
        connection.send(None)
    return {without: statistics.median(found) for without, found in seconds.items()}


@guarded
def main(argv: list[str] | None = None) -> None:
    parser = Script(__file__, __doc__)
    parser.add_argument("--repeats", type=count, default=7, help="turns whose median is taken")
    parser.add_argument("--only", default="", help="workloads whose name contains this")
    args = parser.parse_args(argv)
    print(f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}, PyTorch "
          f"{torch.__version__}; milliseconds a step, and times those with all tricks; medians of {args.repeats}")
    for name, work in named(WORKLOADS, args.only).items():
        found = measure(work, args.repeats)
        whole = found["all of them"]
        print(f"\n{name}", *(f"  {without:<26}{1e3 * took:8.1f}{took / whole:7.2f}x"
                             for without, took in found.items()), sep="\n", flush=True)


if __name__ == "__main__":
    sys.exit(main())
