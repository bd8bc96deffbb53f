"""The server's threat model: rules x behaviours x share of malicious clients x partition x what travels.

    python benchmarks/server.py --out FOLDER                  play what is missing, worst cells first
    python benchmarks/server.py --out FOLDER --table          print the tables from what is there
    python benchmarks/server.py --out FOLDER --sensitivity    each constant of `threat`, halved and doubled

Clients, data, behaviours and rules are the program's own; only the loop of rounds is here, without its files, so
that a cell takes seconds. A cell plays a few short rounds on a part of each client's images. `heads` trains the
heads of rve_pfl alone from their initial weights, on latents of encoders that clean rounds have trained and that
stay as they are: no private encoder then makes up for a bad head. `models` trains fedavg's whole models, which as
many clean rounds under the plain mean have begun. Rules are told the true share of malicious clients, 0.3 where
nobody is. Results go to FOLDER/cells.csv, a line a cell; interrupted, it goes on where it stopped. All of a FOLDER
is played at one scale, that of FOLDER/scale.json.
"""
import argparse
import csv
import itertools
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from _path import Script, count, guarded, index, share
from torch import Tensor

import datasets
import sampling
from methods import METHODS
from metrics import over_clients
from models import Classifier, Network, Output, kl_to_standard_normal, reparameterise
from options import args_parser
from runs.configs import read_json
from server import threat_aware, triggers
from server.base import Round, Server, Setting
from server.malicious import BEHAVIOURS, MaliciousClients
from server.rules import RULES
from update import ClientState, Diverged, Trainer, one_by_one, training_of
from utils import ROOT, InputError, choose_precision, keep_freed_memory, rng, seed_torch, write_whole

SCOPES = {"heads": "rve_pfl", "models": "fedavg"}
PARTITIONS = ("shards", "dirichlet", "iid")
FRACS = (0.3, 0.1, 0.2, 0.4)
# The behaviours that cost most on the seeds that were looked at first, in that order.
FIRST = ("adaptive", "optimal_ipm", "min_max", "mimic", "scaling", "label_flip", "backdoor_projected",
         "backdoor_patch", "optimal_alie", "mpaf", "min_sum")
SCALE = {"rounds": 3, "local_ep": 1, "local_bs": 32, "images": 300, "after": 0}   # what no line of a CSV says
CLEAN_ROUNDS = 3   # behind the encoders, and before the cells with whole models
TRIGGERS = {triggers.patch: 1, triggers.blend: 2}   # trigger -> which third of a latent row
# What the constants of `threat` are halved and doubled in; of COS_COPY and TRUST_DECAY it is what is left to 1.
CONSTANTS = ("MAX_NORM_RATIO", "SPREADS", "COS_FULL_TRUST", "COS_COPY", "TRUST_DECAY", "EIGENVALUE_RATIO", "MAX_FILTERED", "SHARE")
LEFT_TO_ONE = ("COS_COPY", "TRUST_DECAY")


class Cell(NamedTuple):
    """One line of the grid; ``behaviour`` is "nobody" where no client is malicious."""

    dataset: str
    seed: int
    scope: str
    partition: str
    frac: float
    behaviour: str
    rule: str


class HeadOnLatents(Network):
    """The head of RVE-PFL on latents that are there already, ``N x 2 x C x H x W``: mu and log variance."""

    variational = True
    classifier: Classifier

    def __init__(self, image_shape: tuple[int, int, int], num_classes: int):
        super().__init__()
        self.classifier = Classifier(image_shape, num_classes)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Output:
        mu, logvar = x.unbind(1)
        return Output(self.classifier(reparameterise(mu, logvar)))

    def predict(self, x: Tensor, draws: int = 1, y: Tensor | None = None) -> tuple[Tensor, Tensor]:
        mu, logvar = x.unbind(1)
        drawn = [self.classifier(reparameterise(mu, logvar)).softmax(1) for _ in range(draws)]
        return torch.stack(drawn).mean(0), kl_to_standard_normal(mu.flatten(1), logvar.flatten(1))


class LatentTrainer(Trainer):
    """A trainer whose images are latents, ``N x 6 x C x H x W``: those of the image, with a patch, and blended."""

    def _pixels(self, batch: Tensor) -> Tensor:
        return self.images[batch, :2].float()


class World:
    """What cells of one data set, seed, scope and partition have in common: clients, data, initial weights."""

    def __init__(self, cell: Cell, scale: argparse.Namespace):
        flags = {"dataset": cell.dataset, "partition": cell.partition, "seed": cell.seed,
                 "method": SCOPES[cell.scope], "rounds": scale.rounds, "local_ep": scale.local_ep,
                 "local_bs": scale.local_bs, "run_name": "benchmark"}
        self.args = args_parser([word for name, value in flags.items() for word in (f"--{name}", str(value))])
        data = datasets.load(cell.dataset, ROOT / "data")
        owned = sampling.partition(
            data.labels, 10, cell.partition, rng(cell.seed, "partition"), alpha=self.args.alpha or 0.1,
            classes_per_client=self.args.classes_per_client or 2, min_images=scale.local_bs)
        splits = sampling.split_all(owned, data.labels, 0.1, cell.seed, "split")
        self.sizes = {k: len(train) for k, (train, _) in enumerate(splits)}
        self.splits, kept = {}, []
        for k, (train, held_out) in enumerate(splits):   # from here on, numbers count the images that are used
            train = np.sort(rng(cell.seed, "benchmark", k).permutation(train)[:scale.images])
            start = sum(map(len, kept))
            self.splits[k] = (np.arange(start, start + len(train)),
                              np.arange(start + len(train), start + len(train) + len(held_out)))
            kept += [train, held_out]
        numbers = np.concatenate(kept)
        images, labels = torch.from_numpy(data.images[numbers]), torch.from_numpy(data.labels[numbers])
        method = METHODS[SCOPES[cell.scope]]
        seed_torch(cell.seed, "init")
        model = method.build(data.image_shape, data.num_classes, vars(self.args))
        training = training_of(vars(self.args), choose_precision("auto", torch.device("cpu")))
        self.trainer = Trainer(model.to(memory_format=torch.channels_last), method, images, labels,
                               data.num_classes, training)
        name = "-".join(map(str, (*cell[:4], scale.images, scale.local_bs)))
        path = scale.out / "worlds" / f"{name}.pt"   # what takes longest is kept
        kept = torch.load(path, weights_only=True) if path.exists() else None
        if cell.scope == "heads":
            kept = self._latents(data.image_shape) if kept is None else kept
            self._go_on_with_latents(kept, data.image_shape)
        self.head, private = self.trainer.shared_and_private(self.trainer.state())
        if cell.scope == "models":
            kept = self._clean_rounds(self.head, private)[0] if kept is None else kept
            self.head = kept
        if not path.exists():
            write_whole(path, lambda file: torch.save(kept, file))
        self.private, self.after = ClientState(private), scale.after
        self.first: dict = {}   # what clients made of the initial weights, by client and what it trained on

    def _latents(self, image_shape: tuple[int, int, int]) -> Tensor:
        """Train encoders in a few clean rounds; the latents of all images, ``N x 6 x C x H x W``."""
        trainer, (head, private) = self.trainer, self.trainer.shared_and_private(self.trainer.state())
        _, own = self._clean_rounds(head, private)
        latents = torch.empty(len(trainer.images), 6, *image_shape, dtype=torch.float16)
        for k, pair in self.splits.items():
            trainer.model.load_state_dict({**head, **own[k].parameters})
            trainer.model.eval()
            numbers = torch.from_numpy(np.concatenate(pair))
            for i, view in enumerate((lambda x: x, triggers.patch, triggers.blend)):
                for part in numbers.split(512):
                    shown = view(trainer.images[part]).permute(0, 3, 1, 2).float().div(255)
                    with torch.inference_mode(), trainer.autocast():
                        mu, logvar = trainer.model.encoder(shown)
                    height_last = (-1, *image_shape[1:], image_shape[0])
                    for j, value in enumerate((mu, logvar)):
                        latents[part, 2 * i + j] = value.reshape(height_last).permute(0, 3, 1, 2).half()
        return latents

    def _go_on_with_latents(self, latents: Tensor, image_shape: tuple[int, int, int]) -> None:
        """Let the trainer train heads on latents in place of images, from the same initial head."""
        trainer, (head, _) = self.trainer, self.trainer.shared_and_private(self.trainer.state())
        model = HeadOnLatents(image_shape, trainer.num_classes)
        model.load_state_dict(head)
        self.trainer = LatentTrainer(model.to(memory_format=torch.channels_last), trainer.method, latents,
                                     trainer.labels, trainer.num_classes,
                                     replace(trainer.training, augment="none"))

    def _clean_rounds(self, head: dict, private: dict) -> tuple[dict, dict[int, ClientState]]:
        """The head and the private parts after CLEAN_ROUNDS rounds of two epochs under the plain mean."""
        trainer = replace(self.trainer, training=replace(self.trainer.training, epochs=2))
        own, indices = {k: ClientState(private) for k in self.splits}, {k: pair[0] for k, pair in self.splits.items()}
        for number in range(101, 101 + CLEAN_ROUNDS):   # numbers, and so draws, that no cell's rounds have
            made = dict(one_by_one(trainer, number, indices, head, own.__getitem__))
            own = {k: one.private for k, one in made.items()}
            uploads = {k: one.upload for k, one in made.items()}
            head = Server(Setting())(Round(number, head, uploads, self.sizes)).head
        return head, own

    def server(self, rule: str, told: float) -> Server:
        """A rule's server, told the share of malicious clients."""
        reads = {option.name: value for option, value in RULES[rule].reads.items()}
        return RULES[rule].server(Setting(seed=self.args.seed, clients=10, rounds=self.args.rounds, tolerate=told,
                                          options={**vars(self.args), **reads}))

    def malicious(self, cell: Cell) -> MaliciousClients:
        """The malicious clients of a cell; on latents a trigger picks the latents of triggered images."""
        found = MaliciousClients(None if cell.behaviour == "nobody" else cell.behaviour, cell.frac, 10, cell.seed)
        trigger = found.behaviour.trigger
        if trigger is not None and cell.scope == "heads":
            which = TRIGGERS[trigger]
            found.behaviour = replace(found.behaviour, trigger=lambda latents: latents.roll(-2 * which, 1))
        return found

    def train(self, number: int, sent: dict, malicious: MaliciousClients) -> dict:
        """Every client's upload; what clients make of the initial weights is kept for the next cells."""
        uploads, behaviour = {}, malicious.behaviour
        for bad, (trainer, indices) in zip((False, True), malicious.groups(self.trainer, {
                k: train for k, (train, _) in self.splits.items()}), strict=False):
            name = (behaviour.relabel, behaviour.retrain, behaviour.trigger and behaviour.about) if bad else None
            for k, own in indices.items():
                if number == 1 and (k, name) in self.first:
                    uploads[k] = self.first[k, name]
                    continue
                (_, made), = one_by_one(trainer, number, {k: own}, sent, lambda _: self.private)
                if isinstance(made, Diverged):
                    continue
                made = malicious.retrained(trainer, k, number, len(own), made)
                uploads[k] = made.upload
                if number == 1:
                    self.first[k, name] = made.upload
        return uploads

    def play(self, cell: Cell) -> dict:
        """A cell's figures, over honest clients."""
        started = time.monotonic()
        malicious, server = self.malicious(cell), self.server(cell.rule, cell.frac or 0.3)
        head, report = self.head, []
        for number in range(self.after + 1, self.after + self.args.rounds + 1):
            uploads = self.train(number, head, malicious)
            arrived = malicious.forge(Round(number, head, uploads, dict(self.sizes)), server)
            head, _, rows = server(arrived)
            report += rows
        honest = [k for k in self.splits if k not in malicious.members]
        found = {k: self.trainer.evaluate(k, number, self.splits[k][1], head, self.private) for k in honest}
        mean, = over_clients([{"stage": "", "split": "", **row} for row in found.values()])
        opened = [malicious.backdoor(self.trainer, k, number, self.splits[k][1], (head, self.private))
                  for k in honest]
        table = pd.DataFrame(report)
        bad = table["client"].isin(malicious.members)
        trust = table.loc[~bad].groupby("client")["trust"].mean().min() if "trust" in table else float("nan")
        weight = table.loc[bad, "weight"].astype(float).sum() / self.args.rounds / bad.mean() if bad.any() else 0.0
        least, most = weights_over_expected(table) if cell.behaviour == "nobody" else (float("nan"),) * 2
        opened = [share for share in opened if share == share]
        return {"accuracy": mean["accuracy"], "worst": mean["accuracy_worst"],
                "backdoor": float(np.mean(opened)) if opened else float("nan"), "least_trust": trust,
                "weight": weight if table["weight"].notna().all() else float("nan"),
                "least_weight": least, "most_weight": most,
                "seconds": time.monotonic() - started}


def weights_over_expected(report: pd.DataFrame) -> tuple[float, float]:
    """Return the least and the largest weight of a client in a round, over what its size would give it.

    Sizes count up to the round's median, as under `threat`; at equal sizes this is K times the weight.

    Args:
        report: ``n`` and ``weight`` of 10 clients a round, round after round.
    """
    sizes = report["n"].to_numpy().reshape(-1, 10)
    sizes = np.minimum(sizes, np.median(sizes, axis=1, keepdims=True))
    over = report["weight"].astype(float).to_numpy().reshape(-1, 10) * sizes.sum(1, keepdims=True) / sizes
    return over.min(), over.max()


FIGURES = ("accuracy", "worst", "backdoor", "least_trust", "weight", "least_weight", "most_weight", "seconds")


def plan(scale: argparse.Namespace) -> Iterator[Cell]:
    """Every cell that was asked for: oracles and nobody malicious first, then by share and by behaviour."""
    worlds = list(itertools.product(scale.datasets, scale.seeds, scale.scopes, scale.partitions))
    for world in worlds:
        for rule in scale.rules:
            yield Cell(*world, 0.0, "nobody", rule)
        for frac in scale.fracs:
            yield Cell(*world, frac, "oracle", "mean")
    for frac, behaviour in itertools.product(scale.fracs, scale.behaviours):
        for world, rule in itertools.product(worlds, scale.rules):
            yield Cell(*world, frac, behaviour, rule)


def read(path: Path) -> pd.DataFrame:
    """The cells that are there."""
    if not path.exists():
        return pd.DataFrame(columns=[*Cell._fields, *FIGURES])
    return pd.read_csv(path)


def keep_to_one_scale(scale: argparse.Namespace) -> None:
    """Note the scale of a new folder; InputError if what is there was played at another."""
    path, own = scale.out / "scale.json", {name: getattr(scale, name) for name in SCALE}
    older = any((scale.out / name).exists() for name in ("cells.csv", "sensitivity.csv"))
    try:
        there = read_json(path) if path.exists() else SCALE if older else own   # older: had no such file
    except ValueError as error:
        raise InputError(f"{path} is damaged ({error}); give another --out") from error
    for name, value in own.items():
        if there.get(name) != value:
            raise InputError(f"--{name} {value}: {scale.out} was played with {there.get(name)}; give the same, or "
                             "another --out")
    write_whole(path, lambda file: file.write((json.dumps(own) + "\n").encode()))


def run(scale: argparse.Namespace) -> None:
    """Play the cells that are missing, a world at a time within each share and behaviour."""
    path, worlds = scale.out / "cells.csv", {}
    done = {Cell(*row) for row in read(path)[list(Cell._fields)].itertuples(index=False)}
    for cell in list(plan(scale))[scale.part[0]::scale.part[1]]:
        if cell in done:
            continue
        key = cell[:4]
        if key not in worlds:
            worlds[key] = World(cell, scale)
        figures = worlds[key].play(cell)
        new = not path.exists()
        with open(path, "a", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            if new:
                writer.writerow([*Cell._fields, *FIGURES])
            writer.writerow([*cell, *(format(figures[name], ".5g") for name in FIGURES)])
        print(*cell, *(f"{name} {figures[name]:.4g}" for name in FIGURES), flush=True)


def sensitivity(scale: argparse.Namespace) -> None:
    """What `threat` reaches with each constant halved and doubled, with nobody malicious and under `adaptive`."""
    path = scale.out / "sensitivity.csv"
    done = pd.read_csv(path) if path.exists() else pd.DataFrame(columns=["constant", "factor", "behaviour"])
    worlds = itertools.product(scale.datasets, scale.seeds, scale.scopes, scale.partitions)
    for key in worlds:
        world = None
        for constant, factor in [("as it is", 1.0), *itertools.product(CONSTANTS, (0.5, 2.0))]:
            for frac, behaviour in ((0.0, "nobody"), (0.3, "adaptive")):
                cell = Cell(*key, frac, behaviour, "threat_aware")
                seen: dict[str, object] = dict(zip(Cell._fields, cell, strict=True))
                seen |= {"constant": constant, "factor": factor}
                if len(done) and (done[list(seen)] == pd.Series(seen)).all(axis=1).any():
                    continue
                world = world or World(cell, scale)
                old = getattr(threat_aware, constant, None)
                if old is not None:
                    new = 1 - factor * (1 - old) if constant in LEFT_TO_ONE else factor * old
                    setattr(threat_aware, constant, min(new, 1.0) if constant == "MAX_FILTERED" else new)
                try:
                    figures = world.play(cell)
                finally:
                    if old is not None:
                        setattr(threat_aware, constant, old)
                row = pd.DataFrame([{**seen, **{name: figures[name] for name in FIGURES}}])
                row.to_csv(path, mode="a", header=not path.exists(), index=False, float_format="%.5g")
                print(constant, factor, behaviour, f"{figures['accuracy']:.4f}", flush=True)


def tables(cells: pd.DataFrame) -> str:
    """What each rule loses to the oracle, the worst behaviour first; backdoors; and what a rule costs when nobody
    is malicious. Points are means over seeds."""
    world = ["dataset", "scope", "partition"]
    oracle = cells[cells["behaviour"] == "oracle"].set_index([*world, "seed", "frac"])["accuracy"]
    tried = cells[~cells["behaviour"].isin(["oracle", "nobody", "passive"])].copy()
    keys = tried[[*world, "seed", "frac"]].itertuples(index=False, name=None)
    tried["lost"] = [100 * (oracle.get(key, float("nan")) - accuracy)
                     for key, accuracy in zip(keys, tried["accuracy"], strict=True)]
    lost = tried.pivot_table(index=[*world, "frac", "behaviour"], columns="rule", values="lost")
    worst = lost.groupby(["scope", "frac"]).max()
    lines = ["the worst over behaviours and partitions, points lost to the oracle",
             worst.to_string(float_format="%.1f")]
    order = lost.max(axis=1).sort_values(ascending=False).index
    lines += ["points of honest clients' accuracy lost to the oracle",
              lost.loc[order].to_string(float_format="%.1f")]
    opened = tried[tried["backdoor"].notna()].pivot_table(
        index=[*world, "frac", "behaviour"], columns="rule", values="backdoor")
    lines += ["share of triggered images that honest clients' models give the target",
              opened.to_string(float_format="%.2f")]
    clean = cells[cells["behaviour"] == "nobody"].copy()
    for name in ("accuracy", "worst"):
        wide = clean.pivot_table(index=[*world, "seed"], columns="rule", values=name)
        lines += [f"nobody malicious: {name}", wide.to_string(float_format="%.4f")]
    weights = clean[clean["rule"] == "threat_aware"].set_index([*world, "seed"])[["least_weight", "most_weight"]]
    lines += ["nobody malicious: weights over what a size gives", weights.to_string(float_format="%.2f")]
    return "\n\n".join(lines)


@guarded
def main(argv: list[str] | None = None) -> int:
    keep_freed_memory()
    parser = Script(__file__, __doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of cells.csv")
    parser.add_argument("--datasets", nargs="+", default=["mnist10k"])
    parser.add_argument("--seeds", type=index, nargs="+", default=[11, 12])
    parser.add_argument("--scopes", nargs="+", choices=SCOPES, default=list(SCOPES))
    parser.add_argument("--partitions", nargs="+", choices=PARTITIONS, default=list(PARTITIONS))
    parser.add_argument("--fracs", nargs="*", type=share, default=list(FRACS))
    parser.add_argument("--rules", nargs="+", choices=RULES, default=list(RULES))
    rest = [name for name in BEHAVIOURS if name not in (*FIRST, "oracle", "passive")]
    parser.add_argument("--behaviours", nargs="*", choices=BEHAVIOURS, default=[*FIRST, *rest])
    parser.add_argument("--rounds", type=count)
    parser.add_argument("--local_ep", type=count)
    parser.add_argument("--local_bs", type=count)
    parser.add_argument("--images", type=count, help="training images a client at most")
    parser.add_argument("--after", type=index, metavar="ROUND",
                        help="number rounds from there, and so train by other draws: what chance alone moves")
    parser.add_argument("--part", type=index, nargs=2, default=[0, 1], metavar=("I", "N"),
                        help="each N-th cell from the I-th only, so that N processes share the work")
    parser.add_argument("--table", action="store_true", help="play nothing")
    parser.add_argument("--sensitivity", action="store_true", help="vary the constants of `threat` instead")
    parser.set_defaults(**SCALE)
    scale = parser.parse_args(argv)
    if scale.part[0] >= scale.part[1]:
        parser.error(f"--part {scale.part[0]} {scale.part[1]}: I is from 0 to N - 1")
    if scale.sensitivity or not scale.table:
        keep_to_one_scale(scale)
        (sensitivity if scale.sensitivity else run)(scale)
    if not scale.sensitivity and len(cells := read(scale.out / "cells.csv")):
        print(tables(cells))
    return 0


if __name__ == "__main__":
    sys.exit(main())
