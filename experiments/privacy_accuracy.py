"""Compare accuracy and re-identification under the default prior and the class prior (CEB, Fischer 2020).

An attacker with client 0's stolen model sees one draw of z, or eight, and chooses among up to 500 of the client's
images. All training images of the client are attacked.
"""
from __future__ import annotations

import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

from common import Experiment, Options, Task, curve, flags, legend, main, panels, pd, slug, training
from headline import options_of
from leakage import measure as attacks_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CLASS = {"prior": "class", "head_lr": 1}
SETTINGS: dict[str, Options] = {
    "default prior, beta 1e-5": {},
    "class prior, beta 1, apart 0.25": {**CLASS, "kl_weight": 1, "prior_apart": 0.25},
    "class prior, beta 1": {**CLASS, "kl_weight": 1},
    "class prior, beta 0.1": {**CLASS, "kl_weight": 0.1},
    "class prior, beta 0.1, apart 0.25": {**CLASS, "kl_weight": 0.1, "prior_apart": 0.25},
    "class prior, beta 0.01": {**CLASS, "kl_weight": 0.01},
    "default prior, beta 1e-3": {"kl_weight": 1e-3},
    "default prior, 2 full rounds": {"full_sharing_rounds": 2},
}
SHOWN = {"mnist10k": list(SETTINGS)[:3], "fmnist10k": list(SETTINGS)[:3],
         "cifar10k": ["default prior, beta 1e-5", "class prior, beta 0.1"]}
SCALES = {"mnist10k": (5, 2), "fmnist10k": (5, 2), "cifar10k": (5, 3)}   # rounds, local epochs
PARTITIONS = ("shards", "dirichlet", "iid")


def tasks(seeds: Sequence[int]) -> list[Task]:
    """Return the runs, seed after seed and partition after partition."""
    found = []
    for seed, partition, dataset, name in product(seeds, PARTITIONS, SCALES, SETTINGS):
        run = f"privacy-{dataset}-{partition}-{slug(name)}-seed{seed}"
        rounds, epochs = SCALES[dataset]
        options = {**options_of({"method": "rve_pfl"}, dataset, partition), "seed": seed, "rounds": rounds,
                   "local_ep": epochs, "local_bs": 64, **SETTINGS[name]}
        attack = {"run": run, "adversary": "stolen_model", "attack": "reidentification", "observe": "z z8",
                  "public": dataset.removesuffix("10k")}
        found.append(Task(run, {"dataset": dataset, "partition": partition, "setting": name}, seed, (
            training(run, options), f"python attack/mi_attack.py {flags(attack)}")))
    return found


def measure(folder: Path) -> list[dict]:
    """Return one row: the last round's accuracy, and what the attacker identifies."""
    row = curve(folder)[-1]
    for attack in attacks_of(folder):
        name = f"identified_{attack['observed']}" + ("" if attack["images"] == "all" else "_worst")
        row |= {name: attack["identified"], f"control_{name}": attack["control_identified"]}
    return [row]


def tabulate(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of ``SHOWN`` with two classes per client."""
    rows = rows[rows["partition"] == "shards"].drop_duplicates([*SETTING, "seed"], keep="last")
    return pd.concat([rows[(rows["dataset"] == dataset) & (rows["setting"] == name)]
                      for dataset, names in SHOWN.items() for name in names])


def draw(rows: pd.DataFrame) -> Figure:
    """Draw accuracy against KL, or the identified share where all were attacked; a dot per seed."""
    rows = tabulate(rows)
    attacked = "identified_z" in rows and rows["identified_z"].notna().all()
    x, label = ("identified_z", "share identified from one z") if attacked else ("kl_nats", "KL, nats per image")
    datasets = list(rows.groupby("dataset", sort=False))
    figure, axes = panels(len(datasets), (3.7, 3), sharey=True)
    for panel, (dataset, part) in zip(axes, datasets, strict=True):
        for name, own in part.groupby("setting", sort=False):
            panel.plot(own[x], own["deployed"], "o", color=f"C{[*SETTINGS].index(name)}", label=name)
        panel.set(xlabel=label, title=dataset, xscale="linear" if attacked else "log", ylabel="deployed accuracy")
    legend(figure)
    return figure


SETTING = ["dataset", "partition", "setting"]
EXPERIMENT = Experiment(
    name="privacy_accuracy", question="What does privacy from an attacker with the stolen model cost in accuracy?",
    tasks=tasks, measure=measure, settings=SETTING, tabulate=tabulate,
    keys={"dataset": "data set", "setting": "setting"}, draw=draw, spread="deployed",
    values={"deployed": ("accuracy", "{:.3f}"), "kl_nats": ("KL, nats", "{:.1f}"),
            "identified_z": ("identified, one z", "{:.3f}"), "identified_z8": ("eight z", "{:.3f}")})

if __name__ == "__main__":
    sys.exit(main(EXPERIMENT))
