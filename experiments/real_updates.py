"""Measure what a curious server reads off a client's real update: images and classes.

    python experiments/real_updates.py --run NAME       one finished run's updates, into results/NAME/updates.csv

A client that owns N images of one of a run's clients trains on them with the project's own Trainer, dropout
included, and uploads. The server knows what it sent, the upload, N and the options. It undoes the optimiser's
steps as one, parts the images in the dense layer's gradient, and searches a picture for each.
"""
import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from common import ROOT, Experiment, Task, main, slug, training
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from torch import Tensor, nn

from attack import gradients, newton, scoring, uploads
from attack.target import Target, as_floats, open_target
from methods import METHODS
from parsing import Parser
from server.base import State
from update import ClientState, Trainer, Training
from utils import InputError, error_line, rng, seed_torch

SETTINGS = {"fedavg, iid": "iid", "fedavg, shards": "shards"}
CASES = [(images, optimizer, epochs) for optimizer, epochs in (("adam", 1), ("sgd", 1), ("adam", 5))
         for images in (1, 4, 8, 16)]
CANDIDATES = 500   # of the client's images that a true one is ranked among
SEARCH_STEPS, PARTING_SECONDS = 200, 12
PREFIX = "classifier."


@dataclass(frozen=True)
class Update:
    """What the server knows of one upload.

    Attributes:
        head: the model as it was sent.
        sent, upload: parameters by name.
        images: how many the client trained on.
        rate: the sum of its steps' learning rates.
    """

    head: nn.Module
    sent: State
    upload: State
    images: int
    optimizer: str
    rate: float

    def gradient(self, layer: str) -> tuple[Tensor, Tensor]:
        """Return a layer's gradient, biases as last column, and its relative error, both ``K x (D + 1)``."""
        parts = []
        for kind in ("weight", "bias"):
            sent, upload = (state[f"{PREFIX}{layer}.{kind}"] for state in (self.sent, self.upload))
            if self.optimizer == "adam":
                parts.append(uploads.adam_gradient(sent, upload, self.rate))
            else:
                moved = sent.double() - upload.double()
                spacing = torch.nextafter(sent.abs(), torch.full_like(sent, torch.inf)) - sent.abs()
                parts.append((moved / self.rate, spacing.double() / 2 / moved.abs().clamp_min(1e-30)))
        (weight, weight_error), (bias, bias_error) = parts
        return torch.cat([weight, bias[:, None]], 1), torch.cat([weight_error, bias_error[:, None]], 1)

    def pictures(self) -> Tensor:
        """Return the pictures that are found, ``N x C x H x W``; grey for those that are missing."""
        before, dense = newton.before_dense(self.head.get_submodule("features"))
        goal = uploads.dense_inputs(*self.gradient(f"features.{dense}"), self.images, PARTING_SECONDS)
        grey = torch.full((self.images, *self.head.input_shape), 0.5)
        if not len(goal):
            return grey
        start = (0.3 + 0.1 * torch.randn(1, len(goal), *self.head.input_shape)).clamp(0, 1)
        found, _ = gradients.from_features(before, goal, start, SEARCH_STEPS, 1e-4, True, lr=0.1)
        size = goal.norm(dim=1, keepdim=True).clamp_min(1e-12)
        exact, error = newton.gauss_newton(lambda x: (before(x) - goal) / size, found[0], 15)
        with torch.no_grad():
            before_error = ((before(found[0]) - goal) / size).square().sum(1)
        better = (error < 0.1 * before_error)[:, None, None, None]   # Newton's steps know no bounds
        grey[:len(goal)] = torch.where(better, exact, found[0]).clamp(0, 1)
        return grey


def image_row(target: Target, round: int, case: tuple[int, str, int]) -> dict:
    """Train on one case, read its upload, and return the scores beside those of a foreign control."""
    count, optimizer, epochs = case
    batch = target.options["local_bs"]
    drawn = rng(1, "real uploads", 0, round).permutation(target.owned()[0][0])
    pool, labels = as_floats(target.data.images[drawn[:CANDIDATES]]), target.data.labels[drawn[:CANDIDATES]]
    sent, done = target.shared(round)["sent"], (round - 1) * epochs * -(-count // batch)
    changes = {"epochs": epochs, "batch_size": batch, "optimizer": optimizer}
    client = Trainer(target.network().to(memory_format=torch.channels_last), METHODS[target.options["method"]],
                     torch.from_numpy(target.data.images), torch.from_numpy(target.data.labels).long(),
                     target.data.num_classes,
                     Training.from_options(target.options, torch.bfloat16, **changes))
    upload = client.train(0, round, drawn[:count], sent, ClientState({}, done)).upload
    head = target.network().get_submodule("classifier").requires_grad_(False).eval()
    head.load_state_dict({name.removeprefix(PREFIX): value for name, value in sent.items()})
    rate = sum(uploads.rates(target.options, epochs, count, batch, done))
    seed_torch(1, "real uploads split", 0, round)
    found = Update(head, sent, upload, count, optimizer, rate).pictures().nan_to_num(0.5).clamp(0, 1)
    control = scores(found, pool, foreign(labels, count))
    return {"kind": "images", "images": count, "optimizer": optimizer, "epochs": epochs,
            **scores(found, pool, range(count)), **{f"control_{name}": value for name, value in control.items()}}


def foreign(labels: np.ndarray, count: int) -> list[int]:
    """Return other images of the same classes as the first ``count``, one for each."""
    left, chosen = list(range(count, len(labels))), []
    for label in labels[:count]:
        chosen.append(next(i for i in left if labels[i] == label))
        left.remove(chosen[-1])
    return chosen


def scores(found: Tensor, pool: Tensor, true: Sequence[int]) -> dict[str, float]:
    """Return the median PSNR, and the share of true images that come first among the candidates."""
    truth, belongs = pool[list(true)], torch.zeros(len(true), len(pool), dtype=torch.bool)
    belongs[range(len(true)), list(true)] = True
    found = scoring.in_order_of(truth, found)
    rank = scoring.rank_by(scoring.distances(found, pool), belongs)
    return {"psnr": scoring.similarity(found, truth)["psnr"].median().item(),
            "identified": (rank == 1).double().mean().item()}


def class_rows(target: Target, round: int) -> list[dict]:
    """Return one row: how well the last layer's updates tell clients' classes; none where every client has all.

    ``auc`` compares classes that a client has with those that it lacks; ``exact`` is the share of clients whose
    set of classes is found.
    """
    shared, aucs, exact = target.shared(round), [], []
    for k, upload in shared["uploads"].items():
        scores = uploads.class_scores(shared["sent"], upload)
        has = np.bincount(target.data.labels[target.owned()[0][k]], minlength=len(scores)) > 0
        if not has.all():
            aucs.append(np.mean(scores.numpy()[has][:, None] > scores.numpy()[~has]))
            exact.append((uploads.owned_classes(scores).numpy() == has).all())
    return [{"kind": "classes", "auc": np.mean(aucs), "exact": np.mean(exact)}] if aucs else []


def read_updates(argv: list[str]) -> int:
    """Read the updates of a finished run of fedavg and return the exit status."""
    parser = Parser("real_updates.py", "Read images and classes off the updates of one finished run.")
    parser.add_argument("--run", required=True)
    for name, folder in (("results_dir", "results"), ("models_dir", "saved_models"), ("data_dir", "data")):
        parser.add_argument(f"--{name}", type=Path, default=ROOT / folder)
    args: Namespace = parser.parse(argv)
    try:
        target = open_target(args.run, args.results_dir, args.models_dir, args.data_dir)
        if target.options["method"] != "fedavg":
            raise InputError(f"--run {args.run}: its method is {target.options['method']}, not fedavg")
        round = target.latest_round()
        rows = [*class_rows(target, round), *(image_row(target, round, case) for case in CASES)]
        pd.DataFrame(rows).to_csv(args.results_dir / args.run / "updates.csv", index=False)
        return 0
    except (InputError, OSError) as error:
        print(error_line("real_updates.py", error), file=sys.stderr)
        return 2


def tasks(seeds: Sequence[int]) -> list[Task]:
    """Return the runs, seed after seed."""
    found = []
    for seed in seeds:
        for name, partition in SETTINGS.items():
            run = f"updates-{slug(name)}-seed{seed}"
            options = {"dataset": "mnist10k", "partition": partition, "method": "fedavg", "rounds": 3,
                       "local_ep": 2, "local_bs": 64, "seed": seed}
            found.append(Task(run, {"setting": name}, seed,
                              (training(run, options), f"python experiments/real_updates.py --run {run}")))
    return found


def measure(folder: Path) -> list[dict]:
    """Return the rows of updates.csv."""
    return pd.read_csv(folder / "updates.csv").to_dict("records")


def tabulate(rows: pd.DataFrame) -> pd.DataFrame:
    """Return what is read off one epoch of Adam, by setting and number of images."""
    rows = rows[(rows["kind"] == "images") & (rows["optimizer"] == "adam") & (rows["epochs"] == 1)]
    return rows.assign(images=rows["images"].astype(int))


def draw(rows: pd.DataFrame) -> Figure:
    """Draw the identified share over the number of images, a line per optimiser and epochs: means over seeds."""
    rows = rows[rows["kind"] == "images"]
    figure, axes = plt.subplots(1, len(SETTINGS), figsize=(8, 3.4), layout="constrained", sharey=True)
    for panel, name in zip(axes, SETTINGS, strict=True):
        own = rows[rows["setting"] == name]
        for (optimizer, epochs), part in own.groupby(["optimizer", "epochs"]):
            means = part.groupby("images")[["identified", "control_identified"]].mean()
            line, = panel.plot(means.index, means["identified"], "o-", label=f"{optimizer}, {epochs:.0f} epochs")
            panel.plot(means.index, means["control_identified"], ":", color=line.get_color())
        panel.set(title=name, xlabel="images in the update", xscale="log")
    axes[0].set_ylabel("share of images identified")
    axes[0].legend(fontsize=8)
    return figure


EXPERIMENT = Experiment(
    name="real_updates", question="How many images does a server read off a client's real update?",
    tasks=tasks, measure=measure, settings=["setting", "kind", "images", "optimizer", "epochs"],
    tabulate=tabulate, keys={"setting": "method, partition", "images": "images"}, draw=draw, spread="identified",
    values={"identified": ("identified", "{:.2f}"), "control_identified": ("control", "{:.2f}"),
            "psnr": ("PSNR, dB", "{:.1f}"), "control_psnr": ("control, dB", "{:.1f}")})

if __name__ == "__main__":
    sys.exit(read_updates(sys.argv[1:]) if "--run" in sys.argv else main(EXPERIMENT))
