"""Measure what a curious server reads off a client's real update: images and classes.

    python experiments/real_updates.py --run NAME   one finished run, into results/NAME/real_updates.csv

A client that owns N images of one of a run's clients trains on them with the project's own Trainer, dropout
included, and uploads. The server knows what it sent, the upload, N and the options. It treats all of Adam's steps
as one, separates the images in the dense layer's gradient, and reconstructs each. With --secure_aggregation it has
the mean over all clients of a round, each of which trains on N images of its own.
"""
from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from common import ROOT, Experiment, Task, devices, dots, main, pd, slug, torch, training

from methods import METHODS
from utils import InputError, Late, rng

if TYPE_CHECKING:
    from torch import Tensor

    import update
    from attack import gradients, newton, scoring, uploads
    from attack import target as attacked
    from attack.target import Target
    from server import base
    from server.base import State
else:
    update, attacked, gradients, newton, scoring, uploads, base = (Late(name) for name in (
        "update", "attack.target", "attack.gradients", "attack.newton", "attack.scoring", "attack.uploads",
        "server.base"))

SETTINGS = {"fedavg, iid": "iid", "fedavg, shards": "shards"}
CASES = (1, 4, 8, 16)   # images
CANDIDATES = 500   # of the client's images that a true one is ranked among
SEARCH_STEPS, SEPARATION_SECONDS = 200, 12


def images_of(target: Target, sent: State, upload: State, shape: torch.Size, rate: float) -> Tensor:
    """Return the images found in an update, ``N x C x H x W``, grey if missing; ``rate`` sums its steps' rates."""
    head = target.network().get_submodule("classifier").requires_grad_(False).eval()
    head.load_state_dict({name.removeprefix("classifier."): value for name, value in sent.items()})
    before, dense = newton.before_dense(head.get_submodule("features"))
    names = [f"classifier.features.{dense}.{kind}" for kind in ("weight", "bias")]
    (weight, weight_error), (bias, bias_error) = (uploads.adam_gradient(sent[name], upload[name], rate)
                                                  for name in names)
    goal = uploads.dense_inputs(torch.cat([weight, bias[:, None]], 1),
                                torch.cat([weight_error, bias_error[:, None]], 1), shape[0], SEPARATION_SECONDS)
    images = torch.full(shape, 0.5)
    if len(goal):
        start = (0.3 + 0.1 * torch.randn(1, len(goal), *shape[1:])).clamp(0, 1)
        images[:len(goal)] = gradients.from_features(before, goal, start, SEARCH_STEPS, 1e-4, True, lr=0.1)[0][0]
    return images.nan_to_num(0.5).clamp(0, 1)


def image_row(target: Target, round: int, count: int) -> dict:
    """Train on ``count`` images, read the upload, and return the scores beside those of a foreign control."""
    import torch  # whose dtypes are no functions

    batch, clients = target.options["local_bs"], target.clients_observed
    drawn = [rng(1, "real uploads", k, round).permutation(target.owned()[0][k]) for k in range(clients)]
    pool, labels = target.pixels(drawn[0][:CANDIDATES]), target.data.labels[drawn[0][:CANDIDATES]]
    sent, done = target.shared(round)["sent"], (round - 1) * -(-count // batch)
    client = update.Trainer(
        target.network().to(memory_format=torch.channels_last), METHODS["fedavg"],
        torch.from_numpy(target.data.images), torch.from_numpy(target.data.labels).long(),
        target.data.num_classes, update.Training.from_options(target.options, torch.bfloat16, epochs=1))
    trained = [client.train(k, round, numbers[:count], sent, update.ClientState({}, done)).upload
               for k, numbers in enumerate(drawn)]
    devices.seed_torch(1, "real uploads split", 0, round)
    found = images_of(target, sent, base.weighted_mean(trained, [1.0] * clients),
                      torch.Size([clients * count, *pool.shape[1:]]),
                      sum(uploads.rates(target.options, 1, count, batch, done)))
    control = scores(found, pool, foreign(labels, count))
    return {"kind": "images", "images": count, **scores(found, pool, range(count)),
            **{f"control_{name}": value for name, value in control.items()}}


def foreign(labels: np.ndarray, count: int) -> list[int]:
    """Return other images of the same classes as the first ``count``, one for each."""
    left, chosen = list(range(count, len(labels))), []
    for label in labels[:count]:
        chosen.append(next(i for i in left if labels[i] == label))
        left.remove(chosen[-1])
    return chosen


def scores(found: Tensor, pool: Tensor, true: Sequence[int]) -> dict[str, float]:
    """Return the median PSNR, and the share of true images that come first among the candidates."""
    truth, is_true = pool[list(true)], torch.zeros(len(true), len(pool)).bool()
    is_true[range(len(true)), list(true)] = True
    found = scoring.in_order_of(truth, found)
    _, identified = scoring.rank_by(scoring.distances(found, pool), is_true)
    return {"psnr": scoring.similarity(found, truth)["psnr"].median().item(),
            "identified": identified.mean().item()}


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
    """Return the rows about the updates of a finished run of fedavg."""
    target = attacked.open_target(run, *(ROOT / folder for folder in ("results", "saved_models", "data")))
    if (target.options["method"], target.options["optimizer"]) != ("fedavg", "adam"):
        raise InputError(f"--run {run}: is no run of fedavg with Adam")
    round = target.latest_round()
    return class_rows(target, round) + [image_row(target, round, count) for count in CASES]


def tasks(seeds: Sequence[int]) -> list[Task]:
    """Return the runs, seed after seed."""
    options = {"dataset": "mnist10k", "method": "fedavg", "rounds": 3, "local_ep": 2, "local_bs": 64}
    return [Task(run := f"updates-{slug(name)}-seed{seed}", {"setting": name}, seed,
                 (training(run, {**options, "partition": partition, "seed": seed}),
                  f"python experiments/real_updates.py --run {run}"))
            for seed in seeds for name, partition in SETTINGS.items()]


def tabulate(rows: pd.DataFrame) -> pd.DataFrame:
    """Return what is read off, by setting and number of images."""
    rows = rows[rows["kind"] == "images"]
    return rows.assign(images=rows["images"].astype(int))


KEYS = {"setting": "method, partition", "images": "images"}
EXPERIMENT = Experiment(
    name="real_updates", question="How many images does a server read off a client's real update?",
    tasks=tasks, measure=lambda folder: pd.read_csv(folder / "real_updates.csv").to_dict("records"),
    inspect=read_updates, settings=["setting", "kind", "images"],
    tabulate=tabulate, keys=KEYS, spread="identified",
    draw=lambda rows: dots(tabulate(rows), [*KEYS], ["identified", "control_identified"], xlabel="share"),
    values={"identified": ("identified", "{:.2f}"), "control_identified": ("control", "{:.2f}"),
            "psnr": ("PSNR, dB", "{:.1f}"), "control_psnr": ("control, dB", "{:.1f}")})

if __name__ == "__main__":
    sys.exit(main(EXPERIMENT))
