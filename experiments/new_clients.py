"""Measure what the shared parameters are worth to clients that join after training.

A quarter of 20 clients takes no part in the rounds. Each then trains its private part behind the final head, or
with FedAvg the whole model, on 10, 50 or all of its images; `new_0` is not trained. `alone` is the same network
trained from its start.
"""
from __future__ import annotations

import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path

from common import Experiment, Figure, Options, Task, half_interval, legend, main, panels, pd, training
from headline import options_of

METHODS: dict[str, Options] = {
    "fedavg": {"method": "fedavg"}, "fedrep": {"method": "fedrep"},
    "rve_pfl": {"method": "rve_pfl", "aggregation": "mean"}, "rve_pfl_trunk": {"method": "rve_pfl_trunk"}}
PARTITIONS = ("shards", "iid")
SCALE = {"rounds": 5, "local_ep": 2, "local_bs": 64, "num_users": 20, "new_clients": 0.25, "new_ep": 5,
         "eval_every": 5}
SIZES = ("10", "50", "all")   # images of a new client
COLUMNS = ["new_0", *(f"{kind}_{size}" for size in SIZES for kind in ("new", "alone"))]
HEADINGS = {name: "alone" if name.startswith("alone") else f"{name.removeprefix('new_')} images"
            for name in COLUMNS}


def tasks(seeds: Sequence[int]) -> list[Task]:
    """Return the runs, method after method."""
    found = []
    for method, seed, partition in product(METHODS, seeds, PARTITIONS):
        run = f"new-{partition}-{method}-seed{seed}"
        options = {**options_of(METHODS[method], "fmnist10k", partition), "seed": seed, **SCALE}
        found.append(Task(run, {"partition": partition, "method": method}, seed, (training(run, options),)))
    return found


def measure(folder: Path) -> list[dict]:
    """Return one row: accuracies after the last round, of those that took part and of the new clients."""
    rounds = pd.read_csv(folder / "rounds.csv")
    last = rounds[rounds["split"] == "test"].set_index("stage")["accuracy"]
    return [{name: last[name] for name in ("deployed", *COLUMNS)}]


def draw(rows: pd.DataFrame) -> Figure:
    """Draw the points gained over training alone, with 95 % intervals, a panel per partition."""
    figure, axes = panels(rows["partition"].nunique(), sharey=True)
    for panel, (partition, part) in zip(axes, rows.groupby("partition", sort=False), strict=True):
        for i, (method, own) in enumerate(part.groupby("method", sort=False)):
            gained = pd.DataFrame({size: 100 * (own[f"new_{size}"] - own[f"alone_{size}"]) for size in SIZES})
            places = [j + 0.08 * i for j in range(len(SIZES))]   # side by side
            panel.errorbar(places, gained.mean(), half_interval(gained), fmt="o-", capsize=3, label=method)
        panel.axhline(0, color="grey", linestyle=":")
        panel.set(title=partition, xlabel="images of a new client")
        panel.set_xticks(range(len(SIZES)), SIZES)
    axes[0].set_ylabel("points gained")
    legend(figure)
    return figure


EXPERIMENT = Experiment(
    name="new_clients", question="What are the shared parameters worth to a client that joins later?",
    tasks=tasks, measure=measure, settings=["partition", "method"],
    tabulate=lambda rows: rows.assign(gain=100 * (rows["new_10"] - rows["alone_10"])),
    keys={"partition": "partition", "method": "method"}, spread="gain", draw=draw,
    values={**{name: (heading, "{:.3f}") for name, heading in HEADINGS.items()},
            "gain": ("points gained, 10 images", "{:.1f}")})

if __name__ == "__main__":
    sys.exit(main(EXPERIMENT))
