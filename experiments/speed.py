"""Time a training step beside plain PyTorch loops and the machine's floor, and rounds of many small clients.

    python experiments/speed.py --run NAME      one measurement, into results/NAME/speed.csv; NAME has the workload

The plain loop is as peers write it: DataLoader with per-image transforms, fp32, a loss read every step. The tuned
loop adds what any user can set: bf16 autocast where the chip is fast at it, and glibc's memory settings. Ours is
update.Trainer with the defaults of RVE-PFL.py. The floor is the time of a step's arithmetic at the rate of
the fastest large matrix product, and of Adam's memory traffic at the rate of a large copy. Images are random.
"""
import copy
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from common import Experiment, Task, dots, main, slug, training
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms.functional import to_tensor

from devices import choose_device, choose_precision, seed_torch
from engine.graphs import GraphedTrainer
from methods import METHODS
from options import args_parser
from update import ClientState, Trainer, Training
from utils import InputError, keep_freed_memory

WORKLOADS = {   # method, shape of an image, batch
    "rve_pfl mnist, batch 256": ("rve_pfl", (1, 28, 28), 256),
    "rve_pfl cifar, batch 256": ("rve_pfl", (3, 32, 32), 256),
    "rve_pfl mnist, batch 32": ("rve_pfl", (1, 28, 28), 32),
    "rve_pfl cifar, batch 32": ("rve_pfl", (3, 32, 32), 32),
    "fedavg cifar, batch 10": ("fedavg", (3, 32, 32), 10),
}
STEPS, IMAGES = 4, 256   # of a call, at least
PRODUCTS = 4   # of a call: one alone is over before the chip's clock has settled
REPEATS, SECONDS = 3, 12   # of a measurement, at least; a first call is not counted


class Images(TensorDataset):
    """A data set as torchvision's are: each image is transformed as it is asked for."""

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        image, label = super().__getitem__(i)
        return to_tensor(image.numpy()), label


def our_trainer(method: str, shape: tuple[int, int, int], batch: int, device: torch.device) -> Trainer:
    """Return a trainer with the defaults of RVE-PFL.py, on random images of a shape C x H x W."""
    options = vars(args_parser(["--method", method, "--local_ep", "1", "--local_bs", str(batch)]))
    seed_torch(1, "speed")
    steps = max(STEPS, IMAGES // batch)
    images = torch.randint(256, (steps * batch, *shape[1:], shape[0]), dtype=torch.uint8)
    labels = torch.randint(10, (len(images),))
    model = METHODS[method].build(shape, 10, {"init_logvar": -2.0}).to(device)
    kind = GraphedTrainer if device.type == "cuda" else Trainer
    return kind(model.to(memory_format=torch.channels_last), METHODS[method], images.to(device), labels.to(device),
                10, Training.from_options(options, choose_precision("auto", device)))


def plain_loop(trainer: Trainer, batch: int, precision: AbstractContextManager) -> Callable[[], None]:
    """Return a function that trains a client as peers write it, on a trainer's model and images."""
    images, device = Images(trainer.images.cpu(), trainer.labels.cpu()), trainer.labels.device

    def call() -> None:
        model = copy.deepcopy(trainer.model).train()
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        for x, y in DataLoader(images, batch, shuffle=True):
            optimizer.zero_grad()
            with precision:
                logits, kl, *_ = model(x.to(device))
                loss = F.cross_entropy(logits, y.to(device)) + (0 if kl is None else 1e-5 * kl.mean())
            loss.backward()
            optimizer.step()
            loss.item()
    return call


def seconds_of(device: torch.device, **calls: Callable[[], object]) -> dict[str, float]:
    """Return the median seconds of each call. They are made in turn, so that another program slows all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    begun = time.perf_counter()
    while (done := len(seconds[[*calls][-1]])) <= REPEATS or time.perf_counter() - begun < SECONDS:
        for name, call in [*calls.items()][::1 if done % 2 else -1]:
            start = time.perf_counter()
            call()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values[1:]) for name, values in seconds.items()}


def work_of(trainer: Trainer, batch: int) -> tuple[int, int]:
    """Return the floating-point operations of a step, and the bytes that Adam moves."""
    model, (height, width, channels) = copy.deepcopy(trainer.model), trainer.images.shape[1:]
    with FlopCounterMode(display=False) as counter:
        output = model(torch.rand(batch, channels, height, width, device=trainer.labels.device))
        F.cross_entropy(output.logits, trainer.labels[:batch]).backward()
    # A gradient written; then Adam reads it, the weight and two moments, and writes these three.
    return counter.get_total_flops(), sum(p.numel() for p in model.parameters()) * 4 * 8


def yardsticks(trainer: Trainer) -> tuple[dict[str, Callable[[], object]], int, int]:
    """Return calls that show the machine's rates, the products' operations, and the bytes that the copy moves.

    On a CPU, `a @ b` in float32 is MKL's, which is slow on AMD's chips; oneDNN's is fast on both.
    """
    device = trainer.labels.device
    side, size = (8192, 2**30) if device.type == "cuda" else (2048, 2**28)
    a, b = torch.randn(2, side, side, device=device, dtype=trainer.training.dtype)
    source, target = torch.zeros(2, size // 4, device=device)
    calls: dict[str, Callable[[], object]] = {"copy": lambda: target.copy_(source),
                                              "product": lambda: [a @ b for _ in range(PRODUCTS)]}
    if device.type == "cpu" and torch.backends.mkldnn.is_available():
        calls["product_onednn"] = lambda: [torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")
                                           for _ in range(PRODUCTS)]
    return calls, PRODUCTS * 2 * side**3, 2 * size


def time_step(run: str) -> list[dict]:
    """Return the milliseconds per step of the three loops and of the floor, for the workload in a run's name."""
    name = next((name for name in WORKLOADS if slug(name) in run), None)
    if name is None:
        raise InputError(f"--run {run}: names no workload; take one of {', '.join(map(slug, WORKLOADS))}")
    (method, shape, batch), device = WORKLOADS[name], choose_device("auto")
    trainer = our_trainer(method, shape, batch, device)
    head, private = trainer.shared_and_private(trainer.state())
    images = np.arange(len(trainer.labels))
    seconds = seconds_of(device, plain=plain_loop(trainer, batch, nullcontext()))
    keep_freed_memory()
    calls, of_product, copied = yardsticks(trainer)
    seconds |= seconds_of(
        device, ours=lambda: trainer.train(0, 1, images, head, ClientState(private)),
        tuned=plain_loop(trainer, batch, trainer.autocast()), **calls)
    operations, moved = work_of(trainer, batch)
    product = min(value for name, value in seconds.items() if name.startswith("product"))
    floor = operations / of_product * product + moved / copied * seconds["copy"]
    row = {name: 1e3 * seconds[name] * batch / len(images) for name in ("plain", "tuned", "ours")}
    return [{**row, "floor": 1e3 * floor}]


def tasks(seeds: Sequence[int]) -> list[Task]:
    """Return the measurements; a seed is a repetition."""
    small = {"dataset": "mnist10k", "partition": "iid", "method": "fedavg", "local_ep": 1, "local_bs": 9,
             "rounds": 3}
    found = []
    for seed in seeds:
        for name in (*WORKLOADS, *(f"{count} clients" for count in (10, 100, 1000))):
            run = f"speed-{slug(name)}-seed{seed}"
            command = f"python experiments/speed.py --run {run}" if name in WORKLOADS else training(
                run, {**small, "num_users": name.split()[0], "seed": seed})
            found.append(Task(run, {"workload": name}, seed, (command,)))
    return found


def measure(folder: Path) -> list[dict]:
    """Return the milliseconds of a step, or the clients per second in the last round of small clients."""
    if (folder / "speed.csv").exists():
        return pd.read_csv(folder / "speed.csv").to_dict("records")
    rounds, clients = (pd.read_csv(folder / f"{name}.csv") for name in ("rounds", "clients"))
    return [{"per_second": clients["client"].nunique() / rounds["seconds"].iloc[-1]}]


def tabulate(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the workloads with a plain loop."""
    rows = rows[rows["plain"].notna()]
    return rows.assign(ratio=rows["plain"] / rows["ours"], tuned_ratio=rows["tuned"] / rows["ours"],
                       reached=100 * rows["floor"] / rows["ours"])


EXPERIMENT = Experiment(
    name="speed", question="How fast is training beside a plain PyTorch loop?",
    tasks=tasks, measure=measure, inspect=time_step, settings=["workload"], tabulate=tabulate,
    keys={"workload": "workload"}, spread="ratio",
    draw=lambda rows: dots(tabulate(rows), ["workload"], ["plain", "tuned", "ours", "floor"],
                           xlabel="ms per step", xscale="log"),
    values={"plain": ("plain, ms", "{:.1f}"), "tuned": ("tuned, ms", "{:.1f}"), "ours": ("ours, ms", "{:.1f}"),
            "ratio": ("plain / ours", "{:.2f}"), "tuned_ratio": ("tuned / ours", "{:.2f}"),
            "reached": ("% of the floor", "{:.0f}")})

if __name__ == "__main__":
    sys.exit(main(EXPERIMENT))
