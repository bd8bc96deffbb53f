"""Pictures from a real round's upload: how many images, local epochs, which optimiser, with or without dropout.

    python benchmarks/real_uploads.py --run m10-iid-fedavg-s1 --csv docs/real_uploads.csv

A client that owns N images of one of the run's clients trains on them with the project's own Trainer, and uploads.
The curious server knows what it sent, the upload, the options, N and the number of epochs. It does not know
images, labels, their order or what was dropped. It tries, and keeps what simulates the upload best:

- split: undo Adam's step, part the images in the dense layer's gradient (attack/split.py), search each picture;
- once: the same, of those units only that were dropped or dead in all steps but one (several steps of Adam);
- simulate: search images whose simulated steps, without dropout, make the same update (signed Adam, cosine, TV).

One row for each N, number of epochs, optimiser and dropout.
"""
import argparse
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import permutations
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from _path import ROOT, Script, count, guarded, index, positive
from torch import Tensor, nn

from attack import gradients, newton, scoring, split, uploads
from attack.access import Target, open_target
from attack.scene import as_floats
from methods import METHODS
from server.base import State
from update import ClientState, Trainer, training_of
from utils import InputError, keep_freed_memory, rng, seed_torch

CANDIDATES = 500   # of the client's images that a true one is ranked among
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
PREFIX = "classifier."


@dataclass(frozen=True)
class Case:
    """One row: what the client does.

    Attributes:
        rates: the learning rate of each of its steps.
    """

    images: int
    epochs: int
    optimizer: str
    dropout: bool
    rates: tuple[float, ...] = ()


@dataclass
class Server:
    """The curious server, before one upload.

    Attributes:
        head: as it was sent.
        sent, upload: parameters by name.
    """

    head: nn.Module
    sent: State
    upload: State
    case: Case
    batch: int
    args: argparse.Namespace

    @property
    def change(self) -> State:
        """``sent - upload``, by the head's own names."""
        return {name.removeprefix(PREFIX): value - self.upload[name] for name, value in self.sent.items()}

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.head.input_shape

    def labels(self) -> Tensor:
        """A guess of the labels, from the last layer's update: ``N``."""
        scores = uploads.class_scores(self.sent, self.upload)
        total = float(scores.clamp_min(0).sum())
        left, labels = scores.clone(), []
        for _ in range(self.case.images):
            labels.append(int(left.argmax()))
            left[labels[-1]] -= total / self.case.images
        return torch.tensor(sorted(labels))

    def simulated(self, x: Tensor, y: Tensor) -> State:
        """The update that images and labels would cause, up to a factor."""
        if self.case.optimizer == "adam":
            return gradients.adam_update(self.head, x, y, list(self.case.rates), self.batch)
        return gradients.epoch_update(self.head, x.repeat(self.case.epochs, 1, 1, 1), y.repeat(self.case.epochs),
                                      self.case.rates[0], min(self.batch, len(x)))

    def unlikeness(self, x: Tensor) -> float:
        """How badly images explain the upload, by a simulation: the cosine distance.

        Nobody says which image has which label: of few images, all orders are tried; of many, the head's
        own answers.
        """
        labels = self.labels()
        orders = [labels[list(order)] for order in set(permutations(range(len(x))))] if len(x) <= 4 else [
            labels, self.head(x).argmax(1)]
        with torch.no_grad():
            return min(float(gradients.cosine_distance(self.simulated(x, y), self.change).nan_to_num(2.0))
                       for y in orders)

    def entries(self, layer: str, step: int) -> tuple[Tensor, Tensor]:
        """The gradient of a layer, biases as last column, and its relative error, both ``K x (D + 1)``."""
        adam = uploads.AdamStep(list(self.case.rates), step)
        parts = []
        for kind in ("weight", "bias"):
            sent, upload = (state[f"{PREFIX}{layer}.{kind}"] for state in (self.sent, self.upload))
            if self.case.optimizer == "adam":
                parts.append(adam.gradient(sent, upload))
            else:
                moved = sent.double() - upload.double()
                spacing = torch.nextafter(sent.abs(), torch.full_like(sent, torch.inf)) - sent.abs()
                parts.append((moved / sum(self.case.rates), spacing.double() / 2 / moved.abs().clamp_min(1e-30)))
        (weight, weight_error), (bias, bias_error) = parts
        return torch.cat([weight, bias[:, None]], 1), torch.cat([weight_error, bias_error[:, None]], 1)

    def pictures(self, goal: Tensor) -> Tensor:
        """Images ``N x C x H x W`` whose features are ``goal``, ``M x D``; grey for those that are missing."""
        before, _ = newton.layers_before_dense(self.head)
        grey = torch.full((self.case.images, *self.shape), 0.5)
        if not len(goal):
            return grey
        start = (0.3 + 0.1 * torch.randn(self.args.restarts, len(goal), *self.shape)).clamp(0, 1)
        found, _ = gradients.from_features(before, goal, start, self.args.iterations, 1e-4, True, lr=0.1)
        size = goal.norm(dim=1, keepdim=True).clamp_min(1e-12)
        exact, error = newton.gauss_newton(lambda x: (before(x) - goal) / size, found[0], 15)
        with torch.no_grad():
            before_error = ((before(found[0]) - goal) / size).square().sum(1)
        # Newton knows neither bounds nor smoothness: taken where it fits far better.
        better = (error < 0.1 * before_error)[:, None, None, None]
        grey[:len(goal)] = torch.where(better, exact, found[0]).clamp(0, 1)
        return grey


def by_split(server: Server) -> Tensor:
    """One step, or several that are taken as one."""
    server = server if server.case.optimizer == "sgd" else replace(
        server, case=replace(server.case, rates=(sum(server.case.rates),)))
    _, dense = newton.layers_before_dense(server.head)
    gradient, error = server.entries(f"features.{dense}", 0)
    return server.pictures(split.inputs(gradient, error, server.case.images, server.args.seconds))


def by_once(server: Server) -> Tensor:
    """Units that had a gradient in the first step only: their update is as long as that of a large gradient."""
    _, dense = newton.layers_before_dense(server.head)
    full = uploads.AdamStep(list(server.case.rates)).full
    gradient, error = server.entries(f"features.{dense}", 0)
    largest = server.change[f"features.{dense}.weight"].abs().double().max(1).values / full
    gradient = torch.where(((largest < 1 + 1e-4) & (largest > 0.99))[:, None], gradient, 0.0)
    return server.pictures(split.inputs(gradient, error, server.case.images, server.args.seconds))


def by_simulation(server: Server) -> Tensor:
    """``gradients.invert`` on the unrolled steps."""
    args, start = server.args, (0.3 + 0.1 * torch.randn(1, 1, server.case.images, *server.shape)).clamp(0, 1)
    observed = {name: value[None] for name, value in server.change.items()}
    found, _ = gradients.invert(server.simulated, observed, server.labels()[None], start, args.simulations, 1e-2,
                                True)
    return found[0, 0]


READINGS: dict[str, Callable[[Server], Tensor]] = {
    "split": by_split, "once": by_once, "simulate": by_simulation}


def client(target: Target, case: Case, args: argparse.Namespace) -> Trainer:
    """The run's own client, with what the case changes."""
    options, network = target.options, target.network()
    for part in network.modules():
        if isinstance(part, nn.Dropout) and not case.dropout:
            part.p = 0.0
    training = training_of(options, DTYPES[args.precision], epochs=case.epochs, batch_size=args.local_bs,
                           optimizer=case.optimizer)
    return Trainer(network.to(memory_format=torch.channels_last), METHODS[options["method"]],
                   torch.from_numpy(target.data.images), torch.from_numpy(target.data.labels).long(),
                   target.data.num_classes, training)


def row_of(target: Target, round: int, case: Case, args: argparse.Namespace) -> dict:
    """One case: train, upload, attack, score."""
    started = time.monotonic()
    drawn = rng(args.seed, "real uploads", args.client, round).permutation(target.owned()[0][args.client])
    own, pool = drawn[:case.images], as_floats(target.data.images[drawn[:CANDIDATES]])
    truth, sent = pool[:case.images], target.shared(round)["sent"]
    done = (round - 1) * case.epochs * -(-len(own) // args.local_bs)   # as many steps in each earlier round
    case = replace(case, rates=tuple(uploads.rates(target.options, case.epochs, len(own), args.local_bs, done)))
    upload = client(target, case, args).train(args.client, round, own, sent, ClientState({}, done)).upload
    head = target.network().get_submodule("classifier").requires_grad_(False).eval()
    head.load_state_dict({name.removeprefix(PREFIX): value for name, value in sent.items()})
    server = Server(head, sent, upload, case, args.local_bs, args)
    tried = ["split"] + ["once"] * (case.optimizer == "adam" and case.epochs > 1)
    tried += ["simulate"] * (case.images <= args.simulate_up_to)
    best, psnr, found = np.inf, {}, truth
    for name in tried:
        seed_torch(args.seed, f"real uploads {name}", args.client, round)
        images = READINGS[name](server)
        psnr[name] = scores(images, truth, pool)["psnr"]
        if (unlike := server.unlikeness(images)) < best:
            best, found, by = unlike, images, name
    labels = target.data.labels[own]
    others = as_floats(target.data.images[drawn[case.images:]]), target.data.labels[drawn[case.images:]]
    mean = torch.stack([others[0][torch.from_numpy(others[1] == label)].mean(0) for label in labels])
    control = scores(mean, truth, pool)
    return {"run": args.run, "round": round, "images": case.images, "epochs": case.epochs,
            "optimizer": case.optimizer, "dropout": "on" if case.dropout else "off", "by": by,
            **scores(found, truth, pool), "mean_psnr": control["psnr"], "mean_identified": control["identified"],
            **{f"{name}_psnr": psnr.get(name, np.nan) for name in READINGS}, "unlike": best,
            "seconds": time.monotonic() - started}


def scores(found: Tensor, truth: Tensor, pool: Tensor) -> dict[str, float]:
    """Median PSNR, and the share of images first in the pool, which begins with the true ones."""
    found = scoring.in_order_of(truth, found.nan_to_num(0.5).clamp(0, 1))
    like = scoring.similarity(found, truth)
    rank = scoring.rank_of(found, pool, torch.eye(len(truth), len(pool), dtype=torch.bool))
    return {"psnr": like["psnr"].median().item(), "identified": (rank == 1).double().mean().item()}


def cases(args: argparse.Namespace) -> Iterator[Case]:
    """The real one first: Adam, with dropout."""
    for optimizer in args.optimizers:
        for dropout in args.dropout:
            for epochs in args.epochs:
                for images in args.images:
                    yield Case(images, epochs, optimizer, dropout == "on")


def rows(args: argparse.Namespace) -> list[dict]:
    """All rows; the CSV is written after each."""
    target = open_target(args.run, args.results_dir, args.models_dir, args.data_dir)
    sends = METHODS[target.options["method"]].shared_and_private(target.network().state_dict())[0]
    if target.has_encoder or len(sends) < len(target.network().state_dict()):
        raise InputError(f"--run {args.run}: only a method that sends its whole model is attacked")
    if target.options["augment"] != "none":
        raise InputError(f"--run {args.run}: its images are changed in training (--augment)")
    if not 0 <= args.client < target.options["num_users"]:
        raise InputError(f"--client {args.client}: the run has clients 0 to {target.options['num_users'] - 1}")
    args.local_bs = args.local_bs or target.options["local_bs"]
    if min(args.images) < 1 or max(args.images) > len(target.owned()[0][args.client]) or min(args.epochs) < 1:
        raise InputError("--images and --epochs: at least 1, and no more images than the client has")
    found = []
    for round in args.rounds or [target.latest_round()]:
        for case in cases(args):
            found.append(row_of(target, round, case, args))
            print("  ".join(f"{value:.3g}" if isinstance(value, float) else str(value)
                            for value in found[-1].values()), flush=True)
            if args.csv:
                pd.DataFrame(found).to_csv(args.csv, index=False, float_format="%.4g")
    return found


@guarded
def main(argv: list[str] | None = None) -> int:
    parser = Script(__file__, __doc__)
    parser.add_argument("--run", required=True, help="a run of a method whose head sees images")
    parser.add_argument("--rounds", type=count, nargs="+", help="the latest if not given")
    parser.add_argument("--client", type=index, default=0)
    parser.add_argument("--images", type=count, nargs="+", default=[1, 2, 4, 8, 16, 64])
    parser.add_argument("--epochs", type=count, nargs="+", default=[1, 2, 5])
    parser.add_argument("--optimizers", nargs="+", choices=("adam", "sgd"), default=["adam", "sgd"])
    parser.add_argument("--dropout", nargs="+", choices=("on", "off"), default=["on", "off"])
    parser.add_argument("--precision", choices=DTYPES, default="bfloat16", help="of the client's training")
    parser.add_argument("--local_bs", type=count, help="images in a step; the run's if not given")
    parser.add_argument("--iterations", type=count, default=200, help="of the search from features")
    parser.add_argument("--restarts", type=count, default=1, help="of the search from features")
    parser.add_argument("--simulations", type=count, default=100, help="iterations of the simulated steps' search")
    parser.add_argument("--simulate_up_to", type=index, default=1, help="images that simulations are tried on")
    parser.add_argument("--seconds", type=positive, default=12, help="to part the images of one upload")
    parser.add_argument("--seed", type=index, default=1)
    parser.add_argument("--csv", type=Path, help="write the table there, too")
    for name, folder in (("results_dir", "results"), ("models_dir", "saved_models"), ("data_dir", "data")):
        parser.add_argument(f"--{name}", type=Path, default=ROOT / folder)
    args = parser.parse_args(argv)
    keep_freed_memory()
    table = pd.DataFrame(rows(args))
    print(table.to_string(index=False, float_format="%.3f", na_rep="-"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
