"""Compare accuracy and re-identification under priors that protect and under the default, N(0, I).

An attacker with a client's stolen model observes z of an image: one draw, eight, one draw in each round with that
round's encoder, or the mean. It chooses among up to 500 of the client's images. All training images of three
clients are attacked. The strip shows reconstructions. Needs data/mnist.npz, fmnist.npz and cifar.npz.
"""
from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

from common import (
    PAGES,
    ROOT,
    Experiment,
    Options,
    Task,
    curve,
    flags,
    legend,
    main,
    panels,
    pd,
    plots,
    slug,
    training,
)
from headline import options_of
from leakage import measure as attacks_of

from attack import mi_attack
from utils import Late, write_whole

if TYPE_CHECKING:
    import torch
    from matplotlib.figure import Figure
    from torch import Tensor

    from attack import evaluation, latents, scoring, target
else:
    torch = Late("torch")
    evaluation, latents, scoring, target = (
        Late(f"attack.{name}") for name in ("evaluation", "latents", "scoring", "target"))

DEFAULT = "normal"
SETTINGS: dict[str, Options] = {
    DEFAULT: {"prior": "normal"},
    "class": {"prior": "class", "prior_apart": 0.25, "private_init": True},
    "categorical": {"prior": "categorical", "private_init": True},
    "categorical, 256 codes": {"prior": "categorical", "codes": 256, "private_init": True},
}
DATASETS, PARTITIONS = ("fmnist10k", "cifar10k", "mnist10k"), ("shards", "iid", "dirichlet")
ROUNDS = 5
SCALE: Options = {"rounds": ROUNDS, "local_ep": 2, "local_bs": 128, "aggregation": "mean"}
OBSERVED = {"z": ("one z", "o", 5), "z8": ("8 z", "^", 9), "mu": ("mean of z", "s", 12)}   # name, marker and size
LEAST = 5e-4   # the smallest share that the picture shows
SETTING = ["dataset", "partition", "setting"]
# Of the table: at most eight.
SHOWN = [("fmnist10k", "shards", "class"), *((dataset, "shards", "categorical") for dataset in DATASETS),
         ("fmnist10k", "shards", "categorical, 256 codes"),
         *((dataset, partition, "categorical") for partition, dataset in (
             ("iid", "fmnist10k"), ("iid", "cifar10k"), ("dirichlet", "fmnist10k")))]
STRIP = ("mnist10k", "shards")   # the images of the strip
IN_STRIP = [*SETTINGS][:3]
PICTURED = 6                     # images in the strip


def options(dataset: str, partition: str, setting: str, seed: int) -> Options:
    """Return the options of a run."""
    return {**options_of({"method": "rve_pfl"}, dataset, partition), "seed": seed, **SCALE, **SETTINGS[setting]}


def run_of(dataset: str, partition: str, setting: str, seed: int) -> tuple[str, str]:
    """Return the name of a run and the command line that trains it."""
    name = f"frontier-{dataset}-{partition}-{slug(setting)}-seed{seed}"
    kept = {"save_rounds": " ".join(map(str, range(1, ROUNDS + 1)))}
    return name, training(name, {**options(dataset, partition, setting, seed), **kept})


def tasks(seeds: Sequence[int]) -> list[Task]:
    """Return the runs, partition after partition and data set after data set, behind the strip."""
    found = [strip_task(seeds[0])]
    for partition, dataset, seed, name in product(PARTITIONS, DATASETS, seeds, SETTINGS):
        run, train = run_of(dataset, partition, name, seed)
        attack = {"run": run, "adversary": "stolen_model", "attack": "reidentification", "clients": "0 1 2",
                  "observe": "z z8 rounds mu", "public": dataset.removesuffix("10k")}
        key = {"kind": "run", "dataset": dataset, "partition": partition, "setting": name}
        found.append(Task(run, key, seed, (
            train, f"python attack/mi_attack.py {flags(attack)}")))
    return found


def strip_task(seed: int) -> Task:
    """Return the task that trains a run of each setting that the strip shows, and draws it."""
    run, (dataset, partition) = f"frontier-strip-seed{seed}", STRIP
    return Task(run, {"kind": "picture", "dataset": dataset, "partition": partition}, seed, (
        *(run_of(*STRIP, name, seed)[1] for name in IN_STRIP), f"python experiments/frontier.py --run {run}"))


def measure(folder: Path) -> list[dict]:
    """Return the rows of the strip, or of a run one row: its last accuracy, and what the attacker identifies."""
    if (strip := folder / "frontier.csv").exists():
        return pd.read_csv(strip).to_dict("records")
    row = curve(folder)[-1]
    for attack in attacks_of(folder):
        name = f"identified_{attack['observed']}" + ("" if attack["images"] == "all" else "_worst")
        row |= {name: attack["identified"], f"control_{name}": attack["control_identified"]}
    return [row]


def reconstruct(name: str, setting: str) -> tuple[dict[str, Tensor], list[dict]]:
    """Return reconstructions of images of a run by what is observed, and rows with the errors of two attacks.

    That of the two attacks with the lower mean squared error over all images is returned.
    """
    args = mi_attack.make_parser().parse(["--run", name, "--public", STRIP[0].removesuffix("10k"),
                                          "--train_epochs", "4", "--data_dir", str(ROOT / "data")])
    run = target.open_target(name, ROOT / "results", ROOT / "saved_models", args.data_dir)
    scene, last = evaluation.Evaluation(run, args), run.latest_round()
    adversary, victim = scene.adversary("stolen_model", last, 0), evaluation.Victim(run, last, 0)
    numbers = scene.order(0, 0)
    truth, labels = run.pixels(numbers), run.labels(numbers)
    found = {"truth": truth, "class mean": scoring.class_means(scene.public.images, scene.public.labels, labels)}
    rows = [{"observed": "class mean", "mse": (found["class mean"] - truth).square().mean().item()}]
    for observed, words in (("z", "one z"), ("z8", "8 z"), ("z100", "100 z"), ("mu", "mean of z")):
        torch.manual_seed(args.seed)
        seen = latents.observe(victim, truth, labels, replace(scene.budget, observed=observed))
        by_error: dict[float, Tensor] = {}
        for attack, solve in (("posterior_mean", latents.posterior_mean), ("latent_decoder", latents.decode)):
            images = solve(adversary, seen, len(truth))[0][0]
            mse = (images - truth).square().mean().item()
            rows.append({"observed": observed, "attack": attack, "mse": mse})
            by_error[mse] = images
        found[words] = by_error[min(by_error)]
    return found, [{"setting": setting, **row} for row in rows]


def draw_strip(run: str) -> list[dict]:
    """Draw the strip from the runs of ``strip_task``, and return its rows."""
    strips, rows = {}, []
    for setting in IN_STRIP:
        strips[setting], errors = reconstruct(run_of(*STRIP, setting, int(run.rpartition("seed")[2]))[0], setting)
        rows += errors
    figure, axes = panels(len(strips), (3.6, 3.2))
    for panel, (setting, pictures) in zip(axes, strips.items(), strict=True):
        grid = torch.cat([torch.cat([*images[:PICTURED]], 2) for images in pictures.values()], 1)
        side = grid.shape[1] / len(pictures)
        panel.imshow(plots.drawable(grid.permute(1, 2, 0).numpy()), cmap="gray", vmin=0, vmax=1)
        panel.set(title=f"prior: {setting}", xticks=[], yticks=[])
    axes[0].set_yticks([side * (i + 0.5) for i in range(len(pictures))], [*pictures])
    write_whole(PAGES / "frontier_strip.png", lambda file: figure.savefig(file, format="png", dpi=110))
    return rows


def runs_of(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of runs with what they lose, in points, to the default on the same images."""
    world = ["dataset", "partition", "seed"]
    rows = rows[rows["kind"] == "run"].drop_duplicates([*SETTING, "seed"], keep="last")
    default = rows[rows["setting"] == DEFAULT].set_index(world)["deployed"]
    return rows.join(default.rename("default"), on=world).assign(
        lost=lambda joined: 100 * (joined["default"] - joined["deployed"]))


def tabulate(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of ``SHOWN``."""
    by = runs_of(rows).set_index(SETTING, drop=False).sort_index()
    return pd.concat([by.loc[[key]] for key in SHOWN if key in by.index] or [by[:0]]).reset_index(drop=True)


def draw(rows: pd.DataFrame) -> Figure:
    """Draw accuracy against the share identified: an arrow from the default for each partition and observation."""
    means = runs_of(rows).groupby(SETTING).mean(numeric_only=True)
    shown = [(name, dataset) for name in SETTINGS if name != DEFAULT for dataset in DATASETS
             if any({(dataset, partition, DEFAULT), (dataset, partition, name)} <= {*means.index}
                    for partition in PARTITIONS)]
    figure, axes = panels(max(1, len(shown)), (3.6, 2.9))
    for panel, (name, dataset) in zip(axes, shown, strict=False):
        for colour, partition in enumerate(PARTITIONS):
            if not {(dataset, partition, setting) for setting in (DEFAULT, name)} <= {*means.index}:
                continue
            start, end = (means.loc[(dataset, partition, setting)] for setting in (DEFAULT, name))
            for observed, (words, marker, size) in OBSERVED.items():
                tail, tip = ((max(run[f"identified_{observed}"], LEAST), run["deployed"]) for run in (start, end))
                panel.annotate("", tip, tail, arrowprops={"arrowstyle": "->", "color": f"C{colour}"})
                panel.plot(*tail, ".", color=f"C{colour}")
                panel.plot(*tip, marker, color=f"C{colour}", markersize=size, markerfacecolor="none",
                           label=f"{partition}, {words}")
        panel.axvline(1 / 500, color="grey", linestyle=":")
        low, high = panel.get_ylim()
        panel.set(title=f"{dataset}: {DEFAULT} to {name}", xscale="log", xlim=(1e-3, 1.5),
                  ylim=(min(low, high - 0.1), min(1, high + 0.03)), ylabel="deployed accuracy",
                  xlabel="share identified (dotted line: a guess)")
    legend(figure)
    return figure


EXPERIMENT = Experiment(
    name="frontier", question="What does privacy from an attacker with the stolen model cost in accuracy?",
    tasks=tasks, measure=measure, inspect=draw_strip, settings=["kind", *SETTING], tabulate=tabulate, draw=draw,
    keys={"dataset": "data set", "partition": "partition", "setting": "prior"}, spread="lost",
    values={"deployed": ("accuracy", "{:.3f}"), "lost": ("points lost", "{:.1f}"),
            "identified_z": ("one z", "{:.3f}"), "identified_z_worst": ("worst 2 %", "{:.3f}"),
            "identified_z8": ("8 z", "{:.3f}"), "identified_rounds": ("every round", "{:.3f}"),
            "identified_mu": ("mean of z", "{:.3f}")})

if __name__ == "__main__":
    sys.exit(main(EXPERIMENT))
