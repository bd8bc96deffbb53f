"""Measure what a curious server reads off a sum of clients' real updates: images and classes.

    python experiments/real_updates.py --run NAME   one finished run, into results/NAME/real_updates.csv

In the round after a run's last, clients train with the project's own Trainer, dropout included, and the server
sees the mean of 1, 10 or 50 uploads. It knows what it sent, the options, and the number of images. It separates
images in the update of the shared dense layer (attack/uploads.py) and reconstructs each. The control counts images
of clients that are not in the sum.
"""
from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
from common import (
    ROOT,
    Experiment,
    Figure,
    Task,
    chosen,
    devices,
    legend,
    main,
    panels,
    pd,
    torch,
    training,
)

from utils import InputError, Late, rng

if TYPE_CHECKING:
    from torch import Tensor

    import update
    from attack import gradients, newton, scoring, uploads
    from attack import target as attacked
    from attack.target import Target
    from server.base import State
else:
    update, attacked, gradients, newton, scoring, uploads = (Late(name) for name in (
        "update", "attack.target", "attack.gradients", "attack.newton", "attack.scoring", "attack.uploads"))

SETTINGS = {"fedavg": "classifier.features", "rve_pfl_trunk": "encoder.trunk"}   # shared layers on images
GRADIENT = {"optimizer": "sgd", "epochs": 1, "batch_size": 10**6, "lr": 1.0, "head_lr": 1.0, "lr_decay": 0.0,
            "lr_warmup": 0.0, "momentum": 0.0}   # a step of SGD: the upload is what was sent less the gradient
CASES = {"1 image, one step": (1, GRADIENT), "1 image, a round": (1, {}), "all images, a round": (10**6, {})}
SUMS = {"fedavg": (1, 10, 50), "rve_pfl_trunk": (1, 10)}   # clients; those of a trunk take long
INPUTS = 1000   # of the dense layer, that the attack uses
SEPARABLE, FOUND = 64, 4   # images in an update that are separated at most; reconstructions
SEARCH_STEPS, SEPARATION_SECONDS = 150, 4
MARGIN = 0.5   # dB
SHOWN = [("1 image, one step", 10), ("1 image, a round", 1), ("1 image, a round", 10), ("all images, a round", 1)]


class Layers:
    """The shared layers that see the image, up to a sample of the first dense layer's inputs."""

    def __init__(self, target: Target, sent: State):
        name = SETTINGS[target.options["method"]]
        layers = target.network().get_submodule(name).requires_grad_(False).eval()
        layers.load_state_dict({key.removeprefix(f"{name}."): value for key, value in sent.items()
                                if key.startswith(f"{name}.")})
        self.before, dense = newton.before_dense(layers)
        self.names = [f"{name}.{dense}.{kind}" for kind in ("weight", "bias")]
        self.inputs = torch.from_numpy(rng(1, "inputs").permutation(sent[self.names[0]].shape[1])[:INPUTS])

    def part(self, state: State) -> Tensor:
        """Return the dense layer's weights of the sampled inputs, and as last column its biases."""
        weight, bias = (state[name] for name in self.names)
        return torch.cat([weight[:, self.inputs], bias[:, None]], 1)

    def images(self, goal: Tensor, shape: tuple[int, ...], signs: bool) -> Tensor:
        """Return images ``N x C x H x W`` that lead to the dense layer's inputs ``goal``, or to their signs."""
        import torch  # whose classes are no functions

        last = max(i for i, layer in enumerate(self.before) if isinstance(layer, torch.nn.ReLU))

        def inputs_of(x: Tensor) -> Tensor:
            if signs:   # a smooth stand-in for whether the last ReLU passes a value
                x = torch.sigmoid(20 * self.before[:last](x))
            return self.before[last + 1 if signs else 0:](x)[:, self.inputs]
        start = (0.3 + 0.1 * torch.randn(1, len(goal), *shape)).clamp(0, 1)
        found = gradients.from_features(inputs_of, goal.clamp(0, 1) if signs else goal, start, SEARCH_STEPS, 1e-4,
                                        True, lr=0.1)[0][0]
        return found.nan_to_num(0.5).clamp(0, 1)


def image_rows(target: Target, round: int, case: str) -> Iterator[dict]:
    """Train clients in the next round, and yield for each number of them what their mean shows."""
    import torch  # whose classes are no functions

    count, changes = CASES[case]
    sent, owned = target.sent_next(round), target.owned()[0][:target.clients]
    precision = devices.choose_precision(target.options["precision"], torch.device("cpu"))
    training = update.Training.from_options(target.options, precision, **changes)
    client = update.Trainer(
        target.network().to(memory_format=torch.channels_last), target.method,
        torch.from_numpy(target.data.images), torch.from_numpy(target.data.labels).long(),
        target.data.num_classes, training)
    layers = Layers(target, sent)
    before, total, numbers, pool = layers.part(sent), torch.zeros(()), np.zeros(0, int), np.concatenate(owned)
    sums = SUMS[target.options["method"]]
    for k in range(min(sums[-1], len(owned) // 2)):
        own, state = rng(1, "real uploads", k, round).permutation(owned[k])[:count], target.private(round, k)
        total = total + layers.part(client.train(k, round + 1, own, sent, state).upload).double()
        numbers = np.concatenate([numbers, own])
        if k + 1 in sums:
            devices.seed_torch(1, "real uploads split", k, round)
            rate = sum(uploads.rates(training, len(own), state.steps))
            change, error = update_of(before, total / (k + 1), k + 1, rate, changes)
            goal = inputs_behind(change, error, len(numbers))
            control = matched(target.data.labels, numbers, np.concatenate(owned[len(owned) // 2:]))
            found = layers.images(goal, target.data.image_shape, k > 0 and not changes)
            yield {"kind": "images", "case": case, "clients": k + 1, "images": len(numbers), "found": len(found),
                   **scores(found, target.pixels(pool), np.isin(pool, numbers), np.isin(pool, control))}


def inputs_behind(change: Tensor, error: Tensor, images: int) -> Tensor:
    """Return at most ``FOUND`` inputs of the dense layer; of too many images, what the update has most of."""
    if images <= SEPARABLE and len(goal := uploads.dense_inputs(change, error, images, SEPARATION_SECONDS)):
        return goal[:FOUND]
    return newton.dense_input({"of.weight": change[:, :-1], "of.bias": change[:, -1]}, "of")[None].clamp_min(0)


def update_of(sent: Tensor, mean: Tensor, clients: int, rate: float, changes: dict) -> tuple[Tensor, Tensor]:
    """Return a matrix whose row space holds the inputs of the dense layer, or their signs, and relative errors.

    A gradient, and the one behind a client's step of Adam, is a sum over images. In a mean of several clients'
    steps of Adam, each about as long as the learning rate, the clients' signs add up.
    """
    if clients == 1 and not changes:
        return uploads.adam_gradient(sent, mean.float(), rate)
    return sent.double() - mean, torch.zeros_like(mean)


def scores(found: Tensor, pool: Tensor, true: np.ndarray, control: np.ndarray) -> dict[str, float]:
    """Score reconstructions by images of the pool that are in the sum (bool), and by control images (bool).

    ``identified`` is the share of reconstructions that are nearer to one of these than to all other images, by
    ``MARGIN``; ``psnr`` is the best of any reconstruction and one of these.
    """
    distance = 10 * np.log10(np.maximum(scoring.distances(found, pool).numpy(), 1e-10))   # -PSNR
    row: dict[str, float] = {}
    for name, counted in (("", true), ("control_", control)):
        nearest, other = (distance[:, part].min(1, initial=np.inf) for part in (counted, ~counted))
        row |= {f"{name}identified": (nearest + MARGIN <= other).mean(), f"{name}psnr": -nearest.min()}
    return row


def matched(labels: np.ndarray, true: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Return, of ``others``, as many image numbers of each class as ``true`` has, or all that there are."""
    counts = zip(*np.unique(labels[true], return_counts=True), strict=True)
    return np.concatenate([others[labels[others] == c][:count] for c, count in counts])


def class_rows(target: Target, round: int) -> list[dict]:
    """Return one row: how well the last layer's updates tell clients' classes; none where every client has all.

    ``auc`` compares classes that a client has with those that it lacks; ``exact`` is the share of clients whose
    set of classes is found. With secure aggregation, all clients of the sum count as one.
    """
    shared, aucs, exact = target.shared(round), [], []
    arrived = [([k], upload) for k, upload in shared["uploads"].items()] or [(shared["clients"], shared["sum"])]
    for clients, upload in arrived:
        class_scores = uploads.class_scores(shared["sent"], upload)
        owned = np.concatenate([target.owned()[0][k] for k in clients])
        has = np.bincount(target.data.labels[owned], minlength=len(class_scores)) > 0
        if not has.all():
            aucs.append(np.mean(class_scores.numpy()[has][:, None] > class_scores.numpy()[~has]))
            exact.append((uploads.owned_classes(class_scores).numpy() == has).all())
    return [{"kind": "classes", "auc": np.mean(aucs), "exact": np.mean(exact)}] if aucs else []


def read_updates(run: str) -> list[dict]:
    """Return the rows about the updates of a finished run."""
    target = attacked.open_target(run, *(ROOT / folder for folder in ("results", "saved_models", "data")))
    if target.options["method"] not in SETTINGS or target.options["optimizer"] != "adam":
        raise InputError(f"--run {run}: is no run of {' or '.join(SETTINGS)} with Adam")
    round = target.latest_round()
    return class_rows(target, round) + [row for case in CASES for row in image_rows(target, round, case)]


def tasks(seeds: Sequence[int]) -> list[Task]:
    """Return the runs, seed after seed: 100 clients of 90 images, of which ten train in a round."""
    options = {"dataset": "mnist10k", "partition": "iid", "num_users": 100, "frac": 0.1, "rounds": 2,
               "local_ep": 1, "local_bs": 64, "eval_every": 2}
    return [Task(run := f"updates-{method}-seed{seed}", {"method": method}, seed,
                 (training(run, {**options, "method": method, "seed": seed}),
                  f"python experiments/real_updates.py --run {run}"))
            for seed in seeds for method in SETTINGS]


def tabulate(rows: pd.DataFrame) -> pd.DataFrame:
    """Return what is read off single steps of ten clients, and off rounds of one client and of ten."""
    rows = chosen(rows[rows["kind"] == "images"], ["method", "case", "clients"],
                  [(method, case, count) for method in SETTINGS for case, count in SHOWN])
    return rows.assign(clients=rows["clients"].astype(int), images=rows["images"].astype(int))


def draw(rows: pd.DataFrame) -> Figure:
    """Draw the share identified against the number of clients, a panel for each update and a dot for each seed."""
    figure, axes = panels(len(CASES), sharey=True)
    for panel, case in zip(axes, CASES, strict=True):
        part = rows[rows["case"] == case].sort_values("clients").astype({"clients": int})
        for i, method in enumerate(SETTINGS):
            own = part[part["method"] == method].astype({"clients": str})
            means = own.groupby("clients", sort=False)[["identified", "control_identified"]].mean()
            panel.plot(means["identified"], color=f"C{i}", label=method)
            panel.plot(means["control_identified"], ":", color=f"C{i}", label=f"{method}, control")
            panel.plot(own["clients"], own["identified"], "o", color=f"C{i}", alpha=0.5)
        panel.set(title=f"each client: {case}", xlabel="clients in the sum")
    axes[0].set_ylabel("share identified")
    legend(figure)
    return figure


KEYS = {"method": "method", "case": "each client's update", "clients": "clients", "images": "images"}
EXPERIMENT = Experiment(
    name="real_updates", question="How many images does a server read off a sum of clients' updates?",
    tasks=tasks, measure=lambda folder: pd.read_csv(folder / "real_updates.csv").to_dict("records"),
    inspect=read_updates, settings=["method", "kind", "case", "clients"],
    tabulate=tabulate, keys=KEYS, spread="identified",
    draw=draw,
    values={"identified": ("identified", "{:.2f}"), "control_identified": ("control", "{:.2f}"),
            "psnr": ("PSNR, dB", "{:.1f}"), "control_psnr": ("control, dB", "{:.1f}")})

if __name__ == "__main__":
    sys.exit(main(EXPERIMENT))
