"""Time training beside a plain PyTorch loop and the machine's floor, and rounds of many small clients.

    python experiments/speed.py --loop ours --workload "rve_pfl mnist, batch 256" --run NAME [--device cuda]
    python experiments/speed.py --clients 1000 --run NAME

The plain loop is as peers write it: DataLoader with per-image transforms, fp32, a copy of the model per client, a
loss read every step. Ours is update.Trainer with the defaults of RVE-PFL.py. The floor is the time of a step's
arithmetic at the rate of a large matrix product, and of its memory traffic at the rate of a large copy. Images are
random: only their shape matters. Each measurement goes to results/NAME/.
"""
import copy
import resource
import statistics
import subprocess
import sys
import time
from argparse import Namespace
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
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms.functional import to_tensor

import models
from engine.clients import train_each
from engine.graphs import GraphedTrainer
from methods import METHODS
from options import args_parser
from parsing import Parser
from server.base import weighted_mean
from update import ClientState, Trainer, Training
from utils import choose_device, choose_precision, keep_freed_memory, seed_torch


class Workload(NamedTuple):
    """A round: ``clients`` train on ``batches`` full batches each."""

    method: str
    image_shape: tuple[int, int, int]
    batch: int
    clients: int
    batches: int

    def model(self) -> models.Network:
        """Return the network at a seeded start."""
        seed_torch(1, "speed")
        return METHODS[self.method].build(self.image_shape, 10, {"init_logvar": -2.0})

    def data(self) -> tuple[np.ndarray, np.ndarray]:
        """Return random images and labels of all clients."""
        channels, height, width = self.image_shape
        count, drawn = self.clients * self.batches * self.batch, np.random.default_rng(1)
        return drawn.integers(0, 256, (count, height, width, channels), np.uint8), drawn.integers(0, 10, count)


GREY, COLOUR = (1, 28, 28), (3, 32, 32)
WORKLOADS = {
    "rve_pfl mnist, batch 256": Workload("rve_pfl", GREY, 256, 2, 3),
    "rve_pfl cifar, batch 256": Workload("rve_pfl", COLOUR, 256, 2, 3),
    "rve_pfl mnist, batch 32": Workload("rve_pfl", GREY, 32, 2, 6),
    "rve_pfl cifar, batch 32": Workload("rve_pfl", COLOUR, 32, 2, 6),
    "fedavg cifar, batch 10": Workload("fedavg", COLOUR, 10, 50, 5),
}
CLIENTS = (10, 100, 1000)
REPEATS = 5


class Images(Dataset):
    """A data set as torchvision's are: an array, and a transform for each image as it is asked for."""

    def __init__(self, images: np.ndarray, labels: np.ndarray):
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        return to_tensor(self.images[i]), int(self.labels[i])


def plain_round(work: Workload, device: torch.device) -> Callable[[], None]:
    """Return a function that trains one round as peers write it."""
    model, data = work.model().to(device), work.data()
    sets = [Images(*part) for part in zip(*(np.split(array, work.clients) for array in data), strict=True)]

    def call() -> None:
        states = []
        for images in sets:
            client = copy.deepcopy(model).train()
            optimizer = torch.optim.Adam(client.parameters(), lr=1e-3)
            for x, y in DataLoader(images, work.batch, shuffle=True):
                optimizer.zero_grad()
                logits, kl, *_ = client(x.to(device))
                loss = F.cross_entropy(logits, y.to(device)) + (0 if kl is None else 1e-5 * kl.mean())
                loss.backward()
                optimizer.step()
                loss.item()
            states.append(client.state_dict())
        model.load_state_dict({name: torch.stack([state[name] for state in states]).mean(0) for name in states[0]})
    return call


def our_trainer(work: Workload, device: torch.device) -> Trainer:
    """Return a trainer with the defaults of RVE-PFL.py."""
    options = vars(args_parser(["--method", work.method, "--local_ep", "1", "--local_bs", str(work.batch)]))
    images, labels = work.data()
    kind = GraphedTrainer if device.type == "cuda" else Trainer
    return kind(work.model().to(device, memory_format=torch.channels_last), METHODS[work.method],
                torch.from_numpy(images).to(device), torch.from_numpy(labels).to(device), 10,
                Training.from_options(options, choose_precision("auto", device)))


def our_round(trainer: Trainer, work: Workload) -> Callable[[], None]:
    """Return a function that trains one round as RVE-PFL.py does."""
    indices = dict(enumerate(np.split(np.arange(len(trainer.labels)), work.clients)))
    head, private = trainer.shared_and_private(trainer.state())
    private = dict.fromkeys(indices, ClientState(private))

    def call() -> None:
        made = dict(train_each(trainer, 1, indices, head, private.__getitem__, None))
        weighted_mean([update.upload for update in made.values()], [1] * len(made))
    return call


def seconds_of(call: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Return the median seconds of a call, the first one not counted."""
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


def floor_of(trainer: Trainer, work: Workload, device: torch.device) -> float:
    """Return the least seconds of a step: its operations and the bytes that it has to move, at measured rates."""
    kept, model, dtype = {}, copy.deepcopy(trainer.model), trainer.training.dtype
    x, y = torch.rand(work.batch, *work.image_shape, device=device), torch.zeros(work.batch, device=device).long()

    def note(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, nn.Parameter):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with FlopCounterMode(display=False) as counter, torch.autograd.graph.saved_tensors_hooks(note, lambda t: t), \
            torch.autocast(device.type, torch.bfloat16, dtype == torch.bfloat16):
        output = model(x)
        loss = F.cross_entropy(output.logits, y)
        (loss if output.kl is None else loss + output.kl.mean()).backward()
    # A gradient written; then Adam reads it, the weight and two moments, and writes these three.
    moved = sum(p.numel() for p in model.parameters()) * 4 * 8
    side, size = (8192, 2**30) if device.type == "cuda" else (2048, 2**28)
    a, b = torch.randn(2, side, side, device=device, dtype=dtype)
    source, target = torch.zeros(2, size // 4, device=device)
    product = seconds_of(lambda: a @ b, device, REPEATS)
    copied = seconds_of(lambda: target.copy_(source), device, REPEATS)
    operations = counter.get_total_flops() / (2 * side**3 / product)
    return operations + (moved + 2 * sum(kept.values())) / (2 * size / copied)


def time_loop(args: Namespace) -> dict:
    """Return the milliseconds per training step of one loop, and of ours also the floor."""
    work, device = WORKLOADS[args.workload], choose_device(args.device)
    if args.loop == "plain":
        call, row = plain_round(work, device), {}
    else:
        keep_freed_memory()
        trainer = our_trainer(work, device)
        call, row = our_round(trainer, work), {"floor": 1e3 * floor_of(trainer, work, device)}
    return {args.loop: 1e3 * seconds_of(call, device, args.repeats) / work.clients / work.batches, **row}


def time_clients(args: Namespace) -> dict:
    """Return the clients per second in the last of three rounds of small clients, and the peak memory."""
    options = {"dataset": "mnist10k", "partition": "iid", "num_users": args.clients, "local_bs": 9, "local_ep": 1,
               "rounds": 3, "method": "fedavg", "run_name": f"{args.run}-rounds"}
    subprocess.run([sys.executable, "RVE-PFL.py", *flags(options).split(), "--overwrite"], cwd=ROOT, check=True,
                   stdout=subprocess.DEVNULL)
    rounds = pd.read_csv(ROOT / "results" / f"{args.run}-rounds" / "rounds.csv")
    return {"per_second": args.clients / rounds["seconds"].iloc[-1],
            "megabytes": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024}


def time_one(argv: list[str]) -> int:
    """Make one measurement and return the exit status."""
    parser = Parser("speed.py", "Make one measurement.")
    parser.add_argument("--run", required=True)
    parser.add_argument("--loop", choices=("plain", "ours"), default="ours")
    parser.add_argument("--workload", choices=WORKLOADS, default=next(iter(WORKLOADS)))
    parser.add_argument("--clients", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--repeats", type=int, default=REPEATS)
    args = parser.parse(argv)
    row = time_clients(args) if args.clients else time_loop(args)
    folder = ROOT / "results" / args.run
    folder.mkdir(parents=True, exist_ok=True)
    pd.DataFrame([row]).to_csv(folder / f"{'clients' if args.clients else args.loop}.csv", index=False)
    print(row)
    return 0


def tasks(seeds: Sequence[int]) -> list[Task]:
    """Return the measurements; a seed is a repetition."""
    found = []
    for seed in seeds:
        for name in WORKLOADS:
            run = f"speed-{slug(name)}-seed{seed}"
            found.append(Task(run, {"workload": name}, seed, tuple(
                f'python experiments/speed.py --loop {loop} --workload "{name}" --run {run}'
                for loop in ("plain", "ours"))))
        for clients in CLIENTS:
            run = f"speed-{clients}-clients-seed{seed}"
            found.append(Task(run, {"workload": f"{clients} clients of FedAvg"}, seed,
                              (f"python experiments/speed.py --clients {clients} --run {run}",)))
    return found


def measure(folder: Path) -> list[dict]:
    """Return one row of all that was measured."""
    parts = [pd.read_csv(path).iloc[0].to_dict() for path in sorted(folder.glob("*.csv"))]
    return [{name: value for part in parts for name, value in part.items()}]


def tabulate(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the workloads with a plain loop."""
    rows = rows[rows["plain"].notna()]
    return rows.assign(ratio=rows["plain"] / rows["ours"], reached=100 * rows["floor"] / rows["ours"])


def draw(rows: pd.DataFrame) -> Figure:
    """Draw the milliseconds per step of the two loops and the floor."""
    means = tabulate(rows).groupby("workload", sort=False)[["plain", "ours", "floor"]].mean()
    figure, axes = plt.subplots(figsize=(7.5, 3.2), layout="constrained")
    for i, name in enumerate(means):
        axes.barh(np.arange(len(means)) + 0.27 * (i - 1), means[name], 0.25, label=name)
    axes.set_yticks(range(len(means)), means.index)
    axes.set(xscale="log", xlabel="milliseconds per training step")
    axes.legend()
    return figure


EXPERIMENT = Experiment(
    name="speed", question="How fast is training beside a plain PyTorch loop?",
    tasks=tasks, measure=measure, settings=["workload"], tabulate=tabulate, keys={"workload": "workload"},
    draw=draw, spread="ratio", values={"plain": ("plain, ms", "{:.1f}"), "ours": ("ours, ms", "{:.1f}"),
                            "ratio": ("times faster", "{:.2f}"), "reached": ("% of the floor", "{:.0f}")})

if __name__ == "__main__":
    sys.exit(time_one(sys.argv[1:]) if "--run" in sys.argv else main(EXPERIMENT))
