"""Compare the methods on full data sets with two classes per client, each trained until its curve is flat.

Every method aggregates by the plain mean, so that methods are compared and not servers. Methods whose shared model
predicts train for 100 rounds of one local epoch and are then fine-tuned; the others are flat sooner. On mnist10k
all train for 100 rounds, which shows that flat stays flat. Needs data/mnist.npz, fmnist.npz and cifar.npz.
"""
from __future__ import annotations

import sys
from collections.abc import Sequence
from itertools import product
from typing import Any

from common import Experiment, Figure, Options, Task, curve, legend, main, panels, pd, slug, training

import methods

SHARED: Options = {"rounds": 100, "eval_every": 5, "finetune_ep": "1 2 10"}
PRIVATE: Options = {"rounds": 20}
CIFAR: Options = {"rounds": 30}   # of methods with private parts, which are flat later there
METHODS: dict[str, Options] = {
    "fedavg": {"method": "fedavg", **SHARED},
    "nbafl": {"method": "nbafl", **SHARED},
    "nbafl, epsilon 100": {"method": "nbafl", "epsilon": 100, **SHARED},
    "nbafl_prox": {"method": "nbafl_prox", **SHARED},
    "fedper": {"method": "fedper", **PRIVATE},
    "local_cnn": {"method": "local_cnn", **PRIVATE},
    "local": {"method": "local", **PRIVATE},
    "rve_pfl": {"method": "rve_pfl", "aggregation": "mean", **PRIVATE},
}
SHOWN = ("rve_pfl", "local", "local_cnn", "fedper", "fedavg", "fedavg, fine-tuned", "nbafl", "nbafl, fine-tuned")


def options_of(label: Options, dataset: str, partition: str) -> Options:
    """Return the options of a labelled method; a data set NAME10k is trained with the defaults of NAME."""
    row, name = methods.METHODS[str(label["method"])], dataset.removesuffix("10k")
    tuned = {option.name: row.default(option, name, partition) for option in row.by_dataset.get(name, {})}
    return {"dataset": dataset, "partition": partition, **tuned, **label}


def grid(name: str, datasets: Sequence[str], partitions: Sequence[str], labels: dict[str, Options],
         seeds: Sequence[int], **more: Any) -> list[Task]:
    """Return a run for each data set, seed, partition and labelled method, with one local epoch per round."""
    found = []
    for dataset, seed, partition, (method, label) in product(datasets, seeds, partitions, labels.items()):
        run = f"{name}-{dataset}-{partition}-{slug(method)}-seed{seed}"
        options = {"seed": seed, "local_ep": 1, **options_of(label, dataset, partition), **more}
        key = {"dataset": dataset, "partition": partition, "method": method}
        found.append(Task(run, key, seed, (training(run, options),)))
    return found


def tasks(seeds: Sequence[int]) -> list[Task]:
    """Return the runs: data set after data set, those on mnist10k last."""
    on_cifar = {name: {**label, **CIFAR} if label["rounds"] < CIFAR["rounds"] else label
                for name, label in METHODS.items()}
    return [*grid("headline", ["fmnist"], ["shards"], METHODS, seeds),
            *grid("headline", ["cifar"], ["shards"], on_cifar, seeds),
            *grid("headline", ["mnist"], ["shards"], METHODS, seeds),
            *grid("headline", ["mnist10k"], ["shards"], METHODS, seeds, rounds=100, eval_every=5, local_bs=64)]


def by_setting(rows: pd.DataFrame, settings: Sequence[str]) -> pd.DataFrame:
    """Return a row for each setting and seed, with each method's deployed accuracy after the last round.

    ``METHOD, fine-tuned`` has the accuracy after ten more local epochs.
    """
    last = rows[rows["round"] == rows.groupby("command")["round"].transform("max")]
    tuned = last.reindex(columns=[*last, *{"finetuned_10"} - {*last}]).dropna(subset="finetuned_10")
    both = pd.concat([last, tuned.assign(method=tuned["method"] + ", fine-tuned", deployed=tuned["finetuned_10"])])
    index = [*settings, "seed"]
    return both.pivot_table(index=index, columns="method", values="deployed", sort=False).reset_index()


def curves(rows: pd.DataFrame, by: Sequence[str]) -> Figure:
    """Draw deployed accuracy over rounds, a panel per setting and a line per method, means over seeds.

    A cross is the accuracy after the last round and ten more local epochs.
    """
    settings = list(rows.groupby([*by], sort=False))
    figure, axes = panels(len(settings))
    for panel, (key, part) in zip(axes, settings, strict=True):
        for i, method in enumerate(dict.fromkeys(rows["method"])):
            means = part[part["method"] == method].groupby("round")["deployed"].mean()
            if len(means):
                panel.plot(means.index, means, ".-", color=f"C{i}", label=method)
                if "finetuned_10" in part:
                    panel.plot(1.1 * means.index[-1], part[part["method"] == method]["finetuned_10"].mean(), "x",
                               color=f"C{i}")
        panel.plot([], "x", color="black", label="after 10 more local epochs")
        panel.set(title=", ".join(map(str, key)), xlabel="round")
    axes[0].set_ylabel("deployed accuracy")
    legend(figure)
    return figure


EXPERIMENT = Experiment(
    name="headline", question="How accurate are the methods with two classes per client?",
    tasks=tasks, measure=curve, settings=["dataset", "method"], keys={"dataset": "data set"},
    tabulate=lambda rows: by_setting(rows, ["dataset"]), spread="rve_pfl",
    values={name: (name, "{:.3f}") for name in SHOWN},
    draw=lambda rows: curves(rows, ["dataset"]))

if __name__ == "__main__":
    sys.exit(main(EXPERIMENT))
