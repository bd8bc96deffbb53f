"""Time a training step beside a plain PyTorch loop and the machine's floor, and rounds of many small clients.

    python experiments/speed.py --run NAME --workload "rve_pfl mnist, batch 256" [--device cuda]
    python experiments/speed.py --run NAME --clients 1000

The plain loop is as peers write it: DataLoader with per-image transforms, fp32, a copy of the model per client, a
loss read every step. Ours is update.Trainer with the defaults of RVE-PFL.py. The floor is the time of a step's
arithmetic at the rate of a large matrix product, and of Adam's memory traffic at the rate of a large copy. Images
are random: only their shape matters. A measurement goes to results/NAME/speed.csv.
"""
import copy
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from common import ROOT, Experiment, Task, flags, main, slug
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms.functional import to_tensor

from engine.graphs import GraphedTrainer
from methods import METHODS
from options import args_parser
from parsing import Parser
from update import ClientState, Trainer, Training
from utils import InputError, choose_device, choose_precision, error_line, keep_freed_memory, seed_torch


class Workload(NamedTuple):
    """One client's training; images are C x H x W."""

    method: str
    image_shape: tuple[int, int, int]
    batch: int


WORKLOADS = {
    "rve_pfl mnist, batch 256": Workload("rve_pfl", (1, 28, 28), 256),
    "rve_pfl cifar, batch 256": Workload("rve_pfl", (3, 32, 32), 256),
    "rve_pfl mnist, batch 32": Workload("rve_pfl", (1, 28, 28), 32),
    "rve_pfl cifar, batch 32": Workload("rve_pfl", (3, 32, 32), 32),
    "fedavg cifar, batch 10": Workload("fedavg", (3, 32, 32), 10),
}
STEPS = 6   # timed at once
CLIENTS = (10, 100, 1000)
REPEATS = 5


class Images(TensorDataset):
    """A data set as torchvision's are: each image is transformed as it is asked for."""

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        image, label = super().__getitem__(i)
        return to_tensor(image.numpy()), label


def our_trainer(work: Workload, device: torch.device) -> Trainer:
    """Return a trainer with the defaults of RVE-PFL.py, on random images."""
    options = vars(args_parser(["--method", work.method, "--local_ep", "1", "--local_bs", str(work.batch)]))
    seed_torch(1, "speed")
    count, (channels, height, width) = STEPS * work.batch, work.image_shape
    model = METHODS[work.method].build(work.image_shape, 10, {"init_logvar": -2.0})
    images = torch.randint(256, (count, height, width, channels), dtype=torch.uint8)
    kind = GraphedTrainer if device.type == "cuda" else Trainer
    return kind(model.to(device).to(memory_format=torch.channels_last), METHODS[work.method], images.to(device),
                torch.randint(10, (count,)).to(device), 10,
                Training.from_options(options, choose_precision("auto", device)))


def plain_loop(trainer: Trainer, batch: int) -> Callable[[], None]:
    """Return a function that trains a client as peers write it, on a trainer's model and images."""
    images, device = Images(trainer.images.cpu(), trainer.labels.cpu()), trainer.labels.device

    def call() -> None:
        model = copy.deepcopy(trainer.model).train()
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        for x, y in DataLoader(images, batch, shuffle=True):
            optimizer.zero_grad()
            logits, kl, *_ = model(x.to(device))
            loss = F.cross_entropy(logits, y.to(device)) + (0 if kl is None else 1e-5 * kl.mean())
            loss.backward()
            optimizer.step()
            loss.item()
    return call


def our_loop(trainer: Trainer) -> Callable[[], object]:
    """Return a function that trains a client as RVE-PFL.py does."""
    head, private = trainer.shared_and_private(trainer.state())
    return lambda: trainer.train(0, 1, np.arange(len(trainer.labels)), head, ClientState(private))


def seconds_of(call: Callable[[], object], device: torch.device) -> float:
    """Return the median seconds of a call, the first one not counted."""
    seconds = []
    for _ in range(REPEATS + 1):
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


def floor_of(trainer: Trainer, batch: int, device: torch.device) -> float:
    """Return the least seconds of a step: its operations and the bytes that Adam moves, at measured rates."""
    model, (height, width, channels) = copy.deepcopy(trainer.model), trainer.images.shape[1:]
    with FlopCounterMode(display=False) as counter:
        output = model(torch.rand(batch, channels, height, width, device=device))
        F.cross_entropy(output.logits, trainer.labels[:batch]).backward()
    # A gradient written; then Adam reads it, the weight and two moments, and writes these three.
    moved = sum(p.numel() for p in model.parameters()) * 4 * 8
    side, size = (8192, 2**30) if device.type == "cuda" else (2048, 2**28)
    a, b = torch.randn(2, side, side, device=device, dtype=trainer.training.dtype)
    source, target = torch.zeros(2, size // 4, device=device)
    operations = counter.get_total_flops() / (2 * side**3) * seconds_of(lambda: a @ b, device)
    return operations + moved / (2 * size) * seconds_of(lambda: target.copy_(source), device)


def time_step(work: Workload, device: torch.device) -> dict[str, float]:
    """Return the milliseconds per training step of both loops and of the floor."""
    trainer = our_trainer(work, device)
    plain = seconds_of(plain_loop(trainer, work.batch), device) / STEPS
    keep_freed_memory()
    ours = seconds_of(our_loop(trainer), device) / STEPS
    return {"plain": 1e3 * plain, "ours": 1e3 * ours, "floor": 1e3 * floor_of(trainer, work.batch, device)}


def time_clients(count: int, run: str) -> dict[str, float]:
    """Return the clients per second in the last of three rounds of small clients, and the peak memory."""
    options = {"dataset": "mnist10k", "partition": "iid", "num_users": count, "local_bs": 9, "local_ep": 1,
               "rounds": 3, "method": "fedavg", "run_name": run, "overwrite": True}
    process = subprocess.run([sys.executable, "RVE-PFL.py", *flags(options).split()], cwd=ROOT,
                             capture_output=True, text=True)
    if process.returncode:
        raise InputError(process.stderr.strip().rpartition("\n")[-1])
    rounds = pd.read_csv(ROOT / "results" / run / "rounds.csv")
    return {"per_second": count / rounds["seconds"].iloc[-1],
            "megabytes": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024}


def time_one(argv: list[str]) -> int:
    """Make one measurement and return the exit status."""
    parser = Parser("speed.py", "Make one measurement.")
    parser.add_argument("--run", required=True, help="folder of the measurement under results/")
    parser.add_argument("--workload", choices=WORKLOADS, default=next(iter(WORKLOADS)))
    parser.add_argument("--clients", type=int, help="time rounds of so many clients instead")
    parser.add_argument("--device", default="auto")
    args = parser.parse(argv)
    try:
        row = time_clients(args.clients, args.run) if args.clients else time_step(
            WORKLOADS[args.workload], choose_device(args.device))
        folder = ROOT / "results" / args.run
        folder.mkdir(parents=True, exist_ok=True)
        pd.DataFrame([row]).to_csv(folder / "speed.csv", index=False)
    except (InputError, OSError) as error:
        print(error_line("speed.py", error), file=sys.stderr)
        return 2
    print(row)
    return 0


def tasks(seeds: Sequence[int]) -> list[Task]:
    """Return the measurements; a seed is a repetition."""
    modes = {**{name: f'--workload "{name}"' for name in WORKLOADS},
             **{f"{count} clients of FedAvg": f"--clients {count}" for count in CLIENTS}}
    return [Task(run := f"speed-{slug(name)}-seed{seed}", {"workload": name}, seed,
                 (f"python experiments/speed.py --run {run} {mode}",))
            for seed in seeds for name, mode in modes.items()]


def measure(folder: Path) -> list[dict]:
    """Return the row of a measurement."""
    return pd.read_csv(folder / "speed.csv").to_dict("records")


def tabulate(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the workloads with a plain loop."""
    rows = rows[rows["plain"].notna()]
    return rows.assign(ratio=rows["plain"] / rows["ours"], reached=100 * rows["floor"] / rows["ours"])


def draw(rows: pd.DataFrame) -> Figure:
    """Draw the milliseconds per step of the two loops and the floor."""
    figure, axes = plt.subplots(figsize=(7.5, 3.2), layout="constrained")
    tabulate(rows).groupby("workload", sort=False)[["plain", "ours", "floor"]].mean().plot.barh(ax=axes)
    axes.set(xscale="log", xlabel="milliseconds per training step", ylabel="")
    return figure


EXPERIMENT = Experiment(
    name="speed", question="How fast is training beside a plain PyTorch loop?",
    tasks=tasks, measure=measure, settings=["workload"], tabulate=tabulate, keys={"workload": "workload"},
    draw=draw, spread="ratio",
    values={"plain": ("plain, ms", "{:.1f}"), "ours": ("ours, ms", "{:.1f}"), "ratio": ("times faster", "{:.2f}"),
            "reached": ("% of the floor", "{:.0f}")})

if __name__ == "__main__":
    sys.exit(time_one(sys.argv[1:]) if "--run" in sys.argv else main(EXPERIMENT))
