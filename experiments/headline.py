"""Compare the methods on full data sets with two classes per client.

Every method aggregates by the plain mean, so that methods are compared and not servers. ``deployed`` is the model
after the last aggregation, ``trained`` the one after a client's local training before it: for a shared model, a
round of fine-tuning. Needs data/mnist.npz, fmnist.npz and cifar.npz.
"""
from __future__ import annotations

import sys
from collections.abc import Sequence
from itertools import product
from typing import TYPE_CHECKING, Any

from common import Experiment, Options, Task, curve, legend, main, panels, pd, slug, training

import methods

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHORT = {"mnist": (5, 2), "fmnist": (5, 2), "cifar": (6, 5)}   # rounds, local epochs
LONG = dict.fromkeys(SHORT, (100, 1))
METHODS: dict[str, Options] = {
    "rve_pfl": {"method": "rve_pfl", "aggregation": "mean"},
    "nbafl": {"method": "nbafl"},
    "nbafl_prox": {"method": "nbafl_prox"},
    "fedavg": {"method": "fedavg"},
    "local": {"method": "local"},
    "local_cnn": {"method": "local_cnn"},
    "lg_fedavg": {"method": "lg_fedavg"},
    "fedper": {"method": "fedper"},
}


def options_of(label: Options, dataset: str, partition: str) -> Options:
    """Return the options of a labelled method; a data set NAME10k is trained with the defaults of NAME."""
    row, name = methods.METHODS[str(label["method"])], dataset.removesuffix("10k")
    tuned = {option.name: row.default(option, name, partition) for option in row.by_dataset.get(name, {})}
    return {"dataset": dataset, "partition": partition, **tuned, **label}


def grid(name: str, scales: dict[str, tuple[int, int]], partitions: Sequence[str], labels: dict[str, Options],
         seeds: Sequence[int], **more: Any) -> list[Task]:
    """Return a run for each seed, data set (with rounds and local epochs), partition and labelled method."""
    found = []
    for seed, (dataset, (rounds, epochs)), partition in product(seeds, scales.items(), partitions):
        for method, label in labels.items():
            run = f"{name}-{dataset}-{partition}-{slug(method)}-seed{seed}"
            options = {"seed": seed, "rounds": rounds, "local_ep": epochs, **more,
                       **options_of(label, dataset, partition)}
            key = {"dataset": dataset, "partition": partition, "clients": 10, "rounds": rounds, "method": method}
            found.append(Task(run, key, seed, (training(run, options),)))
    return found


def tasks(seeds: Sequence[int]) -> list[Task]:
    """Return the runs: short ones of every seed first, then long ones."""
    return [task for name, scales in (("headline", SHORT), ("headline-long", LONG))
            for task in grid(name, scales, ["shards"], METHODS, seeds)]


def side_by_side(rows: pd.DataFrame, keys: Sequence[str]) -> pd.DataFrame:
    """Return a row for each setting and seed after the last round: columns METHOD and ``METHOD, trained``."""
    rows = rows[rows["round"] == rows.groupby("command")["round"].transform("max")]
    parts = [rows.pivot_table(index=[*keys, "seed"], columns="method", values=value, sort=False).add_suffix(suffix)
             for suffix, value in (("", "deployed"), (", trained", "trained"))]
    return pd.concat(parts, axis=1).reset_index()


def tabulate(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the accuracies of the longest runs of each data set."""
    rows = rows[rows["rounds"] == rows.groupby("dataset")["rounds"].transform("max")]
    return side_by_side(rows, [*KEYS])


def curves(rows: pd.DataFrame, by: Sequence[str]) -> Figure:
    """Draw deployed accuracy over rounds, a panel per setting and a line per method, means over seeds."""
    settings = list(rows.groupby([*by], sort=False))
    figure, axes = panels(len(settings))
    for panel, (key, part) in zip(axes, settings, strict=True):
        for i, method in enumerate(dict.fromkeys(rows["method"])):
            means = part[part["method"] == method].groupby("round")["deployed"].mean()
            if len(means):
                panel.plot(means.index, means, ".-", color=f"C{i}", label=method)
        panel.set(title=", ".join(map(str, key)), xlabel="round")
    axes[0].set_ylabel("deployed accuracy")
    legend(figure)
    return figure


KEYS = {"dataset": "data set", "rounds": "rounds"}
VALUES = {"rve_pfl": ("RVE-PFL", "{:.3f}"), "nbafl": ("NbAFL", "{:.3f}"),
          "nbafl_prox": ("NbAFL, proximal", "{:.3f}"), "nbafl, trained": ("NbAFL, trained", "{:.3f}"),
          "fedavg": ("FedAvg", "{:.3f}"), "fedavg, trained": ("FedAvg, trained", "{:.3f}"),
          "local": ("alone", "{:.3f}"), "local_cnn": ("CNN alone", "{:.3f}")}
EXPERIMENT = Experiment(
    name="headline", question="How accurate are the methods with two classes per client?",
    tasks=tasks, measure=curve, settings=["dataset", "rounds", "method"], tabulate=tabulate, keys=KEYS,
    values=VALUES, spread="rve_pfl", draw=lambda rows: curves(rows, ["dataset", "rounds"]))

if __name__ == "__main__":
    sys.exit(main(EXPERIMENT))
