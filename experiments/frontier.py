"""Compare accuracy and re-identification under priors that protect and under the default, N(0, I).

An attacker with a client's stolen model observes z of an image: one draw, eight, one draw in each round with that
round's encoder, or the mean. It chooses among up to 500 of the client's images. All training images of three
clients are attacked. Needs data/mnist.npz, fmnist.npz and cifar.npz.
"""
from __future__ import annotations

import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path

from common import (
    Experiment,
    Figure,
    Options,
    Task,
    chosen,
    curve,
    flags,
    legend,
    main,
    panels,
    pd,
    slug,
    training,
)
from headline import options_of
from leakage import measure as attacks_of

DEFAULT = "normal"
SETTINGS: dict[str, Options] = {
    DEFAULT: {"prior": "normal"},
    "normal, private start": {"prior": "normal", "private_init": True},
    "normal, beta 0.001": {"prior": "normal", "kl_weight": 1e-3},
    "normal, beta 0.01": {"prior": "normal", "kl_weight": 1e-2},
    "class": {"prior": "class", "prior_apart": 0.25, "private_init": True},
    "categorical": {"prior": "categorical", "private_init": True},
    "categorical, 256 codes": {"prior": "categorical", "codes": 256, "private_init": True},
}
NO_PANEL = (DEFAULT, "normal, private start")   # no protection after the first round
CODES = {"categorical": 10, "categorical, 256 codes": 256}   # M
DATASETS, PARTITIONS = ("fmnist10k", "cifar10k", "mnist10k"), ("shards", "iid", "dirichlet")
ROUNDS = 5
SCALE: Options = {"rounds": ROUNDS, "local_ep": 2, "local_bs": 128, "aggregation": "mean"}
OBSERVED = {"z": ("one z", "o", 5), "z8": ("8 z", "^", 9), "mu": ("mean of z", "s", 12),
            "rounds": ("every round", "D", 7)}   # name, marker and size
LEAST, CANDIDATES = 5e-4, 500   # the smallest share that the picture shows; of an image, at most
SETTING = ["dataset", "partition", "setting"]
SHOWN = [(dataset, partition, "categorical") for partition in PARTITIONS for dataset in DATASETS
         if (dataset, partition) != ("mnist10k", "dirichlet")]   # of the table: at most eight


def options(dataset: str, partition: str, setting: str, seed: int) -> Options:
    """Return the options of a run."""
    return {**options_of({"method": "rve_pfl"}, dataset, partition), "seed": seed, **SCALE, **SETTINGS[setting]}


def run_of(dataset: str, partition: str, setting: str, seed: int) -> tuple[str, str]:
    """Return the name of a run and the command line that trains it."""
    name = f"frontier-{dataset}-{partition}-{slug(setting)}-seed{seed}"
    kept = {"save_rounds": " ".join(map(str, range(1, ROUNDS + 1)))}
    return name, training(name, {**options(dataset, partition, setting, seed), **kept})


def tasks(seeds: Sequence[int]) -> list[Task]:
    """Return the runs, partition after partition and data set after data set."""
    found = []
    for partition, dataset, seed, name in product(PARTITIONS, DATASETS, seeds, SETTINGS):
        run, train = run_of(dataset, partition, name, seed)
        attack = {"run": run, "adversary": "stolen_model", "attack": "reidentification", "clients": "0 1 2",
                  "observe": "z z8 rounds mu", "public": dataset.removesuffix("10k")}
        key = {"dataset": dataset, "partition": partition, "setting": name}
        found.append(Task(run, key, seed, (
            train, f"python attack/mi_attack.py {flags(attack)}")))
    return found


def measure(folder: Path) -> list[dict]:
    """Return the row of a run: its last accuracy, and what the attacker identifies."""
    row = curve(folder)[-1]
    for attack in attacks_of(folder):
        name = f"identified_{attack['observed']}" + ("" if attack["images"] == "all" else "_worst")
        row |= {name: attack["identified"], f"control_{name}": attack["control_identified"]}
    return [row]


def runs_of(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of runs with what they lose, in points, to the default on the same images."""
    world = ["dataset", "partition", "seed"]
    rows = rows.drop_duplicates([*SETTING, "seed"], keep="last")
    default = rows[rows["setting"] == DEFAULT].set_index(world)["deployed"]
    return rows.join(default.rename("default"), on=world).assign(
        lost=lambda joined: 100 * (joined["default"] - joined["deployed"]))


def draw(rows: pd.DataFrame) -> Figure:
    """Draw accuracy against the share identified: an arrow from the default for each partition and observation."""
    means = runs_of(rows).groupby(SETTING).mean(numeric_only=True)
    shown = [(name, dataset) for name in SETTINGS if name not in NO_PANEL for dataset in DATASETS
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
                panel.plot(*tail, ".", color="black", label="default prior, any of these")
                panel.plot(*tip, marker, color=f"C{colour}", markersize=size, markerfacecolor="none",
                           label=f"{partition}, {words}")
        if codes := CODES.get(name):
            panel.axvline(codes / CANDIDATES, color="grey", linestyle=":",
                          label="bound for one z, 8 z, the mean; 500 images")
        low, high = panel.get_ylim()
        panel.set(title=f"{dataset}: {name}", xscale="log", xlim=(1e-3, 1.5),
                  ylim=(min(low, high - 0.1), min(1, high + 0.03)), ylabel="deployed accuracy",
                  xlabel="share identified")
    legend(figure)
    return figure


EXPERIMENT = Experiment(
    name="frontier", question="What does privacy from an attacker with the stolen model cost in accuracy?",
    tasks=tasks, measure=measure, settings=SETTING, draw=draw,
    tabulate=lambda rows: chosen(runs_of(rows), SETTING, SHOWN),
    keys={"dataset": "data set", "partition": "partition", "setting": "prior"}, spread="lost",
    values={"deployed": ("accuracy", "{:.3f}"), "lost": ("points lost", "{:.1f}"),
            "identified_z": ("one z", "{:.3f}"), "control_identified_z": ("control", "{:.3f}"),
            "identified_z8": ("8 z", "{:.3f}"), "identified_mu": ("mean of z", "{:.3f}"),
            "identified_rounds": ("every round", "{:.3f}")})

if __name__ == "__main__":
    sys.exit(main(EXPERIMENT))
