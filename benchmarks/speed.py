"""A training step and a round of ours, beside a plain PyTorch loop and the machine's floor.

    python benchmarks/speed.py [--repeats 5] [--only cifar]      under five minutes on two cores

The two take turns and each figure is a median. `plain` is the loop as peers write it: DataLoader with per-
image transforms, fp32, a copy of the model a client, a loss read every step. `ours` is update.Trainer with
the defaults of RVE-PFL.py. Each is in a process of its own, where the other waits: ours sets how its process
allocates memory, and in one process the other would profit from it. The floor is what the step's arithmetic
would take at the rate of a large matrix product in the precision used, plus its memory traffic at the rate
of a large copy: each parameter's gradient and optimiser state, and each tensor kept for the backward pass,
once out and once in. Images are random: only their shape matters here.
"""
import argparse
import contextlib
import copy
import dataclasses
import io
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from _path import Script, count, guarded, load_driver, named
from _path import device as device_name
from engine.graphed import GraphedTrainer
from engine.stacked import side_by_side, stack_size, steps_of
from engine.threaded import one_thread_each, threads_for
from plain import Plain, SmallCNN, TutorialCNN, Workload
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import models
from engine.several import train_each
from metrics import Tally
from server.base import weighted_mean
from update import ClientState, Trainer, Training
from utils import choose_device, choose_precision, environment, keep_freed_memory

ROUNDS = 3   # turns of whole rounds, at most
GREY, COLOUR = (1, 28, 28), (3, 32, 32)
WORKLOADS = {
    "rve_pfl mnist, batch 256": Workload(models.RVE, GREY, 256, "adam", 2, 3, 1),
    "rve_pfl cifar, batch 256": Workload(models.RVE, COLOUR, 256, "adam", 2, 3, 1),
    "rve_pfl mnist, batch 32": Workload(models.RVE, GREY, 32, "adam", 2, 6, 4),
    "rve_pfl cifar, batch 32": Workload(models.RVE, COLOUR, 32, "adam", 2, 6, 4),
    # A round of pfl-research's benchmark, and a fifth of the clients of a round of BlazeFL's.
    "50 small clients cifar, batch 10": Workload(SmallCNN, COLOUR, 10, "sgd", 50, 5, 20),
    "20 tiny clients cifar, batch 50": Workload(TutorialCNN, COLOUR, 50, "sgd", 20, 50, 20),
}


def trainer_on(device: torch.device) -> type[Trainer]:
    """What RVE-PFL.py trains with there."""
    return GraphedTrainer if device.type == "cuda" else Trainer


class Ours:
    """The project's own client, at its defaults."""

    def __init__(self, work: Workload, images: np.ndarray, labels: np.ndarray, device: torch.device,
                 precision: str):
        self.trainer = trainer_on(device)(
            work.model().to(device, memory_format=torch.channels_last), work.method,
            torch.from_numpy(images).to(device), torch.from_numpy(labels).to(device), 10,
            Training(seed=1, epochs=1, batch_size=work.batch, optimizer=work.optimizer, lr=1e-3, head_lr=0.1,
                     lr_decay=1e-3, lr_warmup=0.2, momentum=0.0, kl_weight=1e-5, kl_warmup=0, eval_samples=8,
                     augment="none", dtype=choose_precision(precision, device)))
        self.parts = np.split(np.arange(len(labels)), work.clients)
        self.head, private = self.trainer.shared_and_private(self.trainer.state())
        self.private = dict.fromkeys(range(work.clients), ClientState(private))
        self.rounds, self.batch = 0, work.batch
        self.stack = min(stack_size(device, work.batch), work.clients)
        self.endless = [self._stacked()] if self.stack > 1 else [
            self._endless() for _ in range(threads_for(self.trainer))]

    def _stacked(self) -> Iterator:
        """As ``_endless``, but a step of each client of a stack."""
        trainer = dataclasses.replace(
            self.trainer, training=dataclasses.replace(self.trainer.training, epochs=10**9))
        parameters = side_by_side([trainer.state()] * self.stack, trainer.labels.device)
        return steps_of(trainer, 1, dict(enumerate(self.parts[:self.stack])), parameters, 0)

    def _endless(self):
        """A client's training, step by step; what ``Trainer.train`` does around it is timed by ``round``."""
        trainer = dataclasses.replace(self.trainer, model=copy.deepcopy(self.trainer.model).train())
        (optimizer, received), tally = trainer.prepare({}), Tally()
        while True:
            for batch in torch.randperm(len(self.parts[0])).to(trainer.labels.device).split(self.batch):
                tally.add(*trainer._step(optimizer, 1, batch, received), trainer.labels[batch])
                yield

    def step(self, times: int) -> float:
        """Seconds a step, of as many clients at once as the program trains."""
        def some(client: Iterator) -> None:
            for _ in range(times):
                next(client)
        if len(self.endless) == 1:
            return timed(lambda: some(self.endless[0]), self.trainer.labels.device) / times / self.stack
        with one_thread_each(len(self.endless)) as pool:
            whole = timed(lambda: list(pool.map(some, self.endless)), self.trainer.labels.device)
        return whole / times / len(self.endless)

    def round(self, times: int) -> float:
        """Seconds a round."""
        def whole() -> None:
            self.rounds += 1
            uploads = {}
            for k, outcome in train_each(self.trainer, self.rounds, dict(enumerate(self.parts)), self.head,
                                         self.private.__getitem__, None):
                uploads[k], self.private[k], _ = outcome
            self.head = weighted_mean(list(uploads.values()), [1] * len(uploads))
        return timed(whole, self.trainer.labels.device, times)


def timed(call: Callable[[], object], device: torch.device, times: int = 1) -> float:
    """Seconds a call."""
    start = time.perf_counter()
    for _ in range(times):
        call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - start) / times


class Elsewhere:
    """A ``Plain`` in a process of its own."""

    def __init__(self, *arguments):
        context = multiprocessing.get_context("spawn")
        self.connection, there = context.Pipe()
        self.process = context.Process(target=self._serve, args=(there, arguments), daemon=True)
        self.process.start()

    @staticmethod
    def _serve(connection: Connection, arguments: tuple) -> None:
        plain = Plain(*arguments)
        while True:
            name, times = connection.recv()
            connection.send(timed(getattr(plain, name), plain.device, times))

    def timed(self, name: str, times: int) -> float:
        """Seconds a call of its method ``name``."""
        self.connection.send((name, times))
        return self.connection.recv()


def in_turns(plain: Elsewhere, ours: Ours, name: str, repeats: int, times: int) -> list[float]:
    """Median seconds of the method ``name`` of each, called by turns; the first turn does not count.

    A step, or several timed together where they are short, follows an untimed one, so that caches are warm; a
    round warms them itself.
    """
    seconds = []
    for _ in tqdm(range(repeats + 1), desc=name, leave=False, disable=None):
        if name == "step":
            plain.timed(name, 1)
        theirs = plain.timed(name, times)
        if name == "step":
            ours.step(1)
        seconds.append((theirs, getattr(ours, name)(times)))
    return [statistics.median(column) for column in zip(*seconds[1:], strict=True)]


def rates(dtype: torch.dtype, device: torch.device, repeats: int) -> tuple[float, float]:
    """Operations a second of a large matrix product, bytes a second of a large copy (read and written)."""
    side, size = (8192, 2**30) if device.type == "cuda" else (2048, 2**28)
    a, b = torch.randn(2, side, side, device=device, dtype=dtype)
    source, target = torch.zeros(2, size // 4, device=device)
    product, copied = [], []
    for _ in range(repeats + 2):
        product.append(timed(lambda: a @ b, device))
        copied.append(timed(lambda: target.copy_(source), device))
    return 2 * side**3 / statistics.median(product[2:]), 2 * size / statistics.median(copied[2:])


def counted(work: Workload, ours: Ours) -> tuple[int, int]:
    """A step's operations, and the bytes it cannot help moving (see the file's docstring)."""
    kept, trainer = {}, ours.trainer
    model = copy.deepcopy(trainer.model)
    batch = torch.arange(work.batch, device=trainer.labels.device)

    def note(tensor):
        if not isinstance(tensor, nn.Parameter):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with FlopCounterMode(display=False) as counter, \
            torch.autograd.graph.saved_tensors_hooks(note, lambda t: t), \
            torch.autocast(batch.device.type, torch.bfloat16, trainer.training.dtype == torch.bfloat16):
        output = model(trainer._pixels(batch))
        loss = F.cross_entropy(output.logits, trainer.labels[batch])
        (loss if output.kl is None else loss + output.kl.mean()).backward()
    parameters = sum(p.numel() for p in model.parameters())
    # a gradient written; then SGD reads it and the weight and writes the weight; Adam two moments besides
    update = 4 * (1 + 3) if work.optimizer == "sgd" else 4 * (1 + 7)
    return counter.get_total_flops(), parameters * update + 2 * sum(kept.values())


def measure(name: str, work: Workload, args: argparse.Namespace, device: torch.device,
            rate: tuple[float, float]) -> str:
    """One line of the table."""
    channels, height, width = work.image_shape
    count = work.clients * work.batches * work.batch
    drawn = np.random.default_rng(1)
    images = drawn.integers(0, 256, (count, height, width, channels), np.uint8)
    labels = drawn.integers(0, 10, count)
    plain, ours = Elsewhere(work, images, labels, device), Ours(work, images, labels, device, args.precision)
    operations, moved = counted(work, ours)
    floor = operations / rate[0] + moved / rate[1]
    step = in_turns(plain, ours, "step", args.repeats, work.steps)
    whole = in_turns(plain, ours, "round", min(args.repeats, ROUNDS), 1)
    plain.process.kill()
    return (f"{name:<34}{1e3 * step[0]:9.1f}{1e3 * step[1]:9.1f}{step[0] / step[1]:7.2f}{1e3 * floor:9.1f}"
            f"{floor / step[1]:8.0%}{whole[0]:9.2f}{whole[1]:9.2f}{whole[0] / whole[1]:7.2f}"
            f"   {operations / 1e9:.1f} GFLOP, {moved / 1e9:.2f} GB a step")


def round_over_steps(work: Workload, device: torch.device, precision: str) -> float:
    """How much longer a whole round of RVE-PFL.py takes, evaluation and files included, than its steps.

    Clients train one after another, also where the program would stack them: a stack has no step of one client.
    Two rounds of ten local epochs, two clients of three batches: a tenth of the paper's data, so that what
    does not grow with the data weighs ten times as much as there. The first round does not count.
    """
    driver, kind = load_driver(), trainer_on(device)
    stepping, ends, step, end = [0.0], [], kind._step, driver.Run.end_round

    def timed_step(self, *arguments):
        start = time.perf_counter()
        found = step(self, *arguments)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        stepping[-1] += time.perf_counter() - start
        return found

    def timed_end(self, *arguments):
        end(self, *arguments)
        ends.append(time.perf_counter())
        stepping.append(0.0)

    drawn, channels = np.random.default_rng(1), work.image_shape[0]
    count = round(2 * 3 * work.batch / 0.9)
    images = drawn.integers(0, 256, (count, *work.image_shape[1:], channels), np.uint8)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()), \
            mock.patch.object(kind, "_step", timed_step), \
            mock.patch.object(driver.Run, "end_round", timed_end):
        np.savez(f"{folder}/drawn.npz", train_images=images[1:], test_images=images[:1],
                 train_labels=drawn.integers(0, 10, count - 1), test_labels=np.array([9]))
        driver.main(["--dataset", "drawn", "--data_dir", folder, "--results_dir", folder, "--models_dir",
                     f"{folder}/models", "--partition", "iid", "--num_users", "2", "--rounds", "2", "--stack", "1",
                     "--local_bs", str(work.batch), "--device", str(device), "--precision", precision])
    return (ends[1] - ends[0]) / stepping[1]


@guarded
def main(argv: list[str] | None = None) -> None:
    parser = Script(__file__, __doc__)
    parser.add_argument("--repeats", type=count, default=5,
                        help=f"turns whose median is taken; of rounds, which are longer, {ROUNDS} at most")
    parser.add_argument("--only", default="", help="workloads whose name contains this")
    parser.add_argument("--device", type=device_name, default="auto")
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto", help="of ours")
    args = parser.parse_args(argv)
    chosen = named(WORKLOADS, args.only)
    keep_freed_memory()
    device = choose_device(args.device)
    dtype = choose_precision(args.precision, device)
    rate = rates(dtype, device, args.repeats)
    print(f"{environment(device)['device']}, PyTorch {torch.__version__}, ours in {dtype}; "
          f"products {rate[0] / 1e9:.0f} GFLOP/s, copies {rate[1] / 1e9:.1f} GB/s; medians of {args.repeats}")
    print(f"{'':<34}{'step, ms':^42}{'round, s':^25}\n{'':<34}{'plain':>9}{'ours':>9}{'x':>7}{'floor':>9}"
          f"{'reached':>8}{'plain':>9}{'ours':>9}{'x':>7}")
    for name, work in chosen.items():
        tqdm.write(measure(name, work, args, device, rate))
    print("\na whole round of RVE-PFL.py, evaluation and files included, over its training steps, "
          "one client after another:")
    for name, work in chosen.items():
        if work.network is models.RVE:
            print(f"{name:<34}{round_over_steps(work, device, args.precision):9.2f}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
