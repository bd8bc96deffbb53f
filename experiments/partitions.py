"""Compare the methods on 10,000 images of each data set under three partitions.

The methods are those of headline.py and variants of RVE-PFL.
"""
from __future__ import annotations

import sys
from collections.abc import Sequence

from common import Experiment, Options, Task, curve, main, pd
from headline import METHODS, VALUES, curves, grid, side_by_side

SCALES = {"mnist10k": (5, 2), "fmnist10k": (5, 2), "cifar10k": (8, 5)}   # rounds, local epochs
PARTITIONS = ("iid", "dirichlet", "shards")
VARIANTS: dict[str, Options] = {
    "rve_pfl, class prior": {"method": "rve_pfl", "aggregation": "mean", "head_lr": 1, "prior": "class",
                             "kl_weight": 0.1},
    "rve_pfl_trunk": {"method": "rve_pfl_trunk", "head_lr": 1},
    "rve_pfl_trunk, slow head": {"method": "rve_pfl_trunk"},
    "rve_pfl_trunk, class prior": {"method": "rve_pfl_trunk", "head_lr": 1, "prior": "class", "kl_weight": 1e-2},
}
RELEASED = {"local_bs": 32, "augment": "none", "lr": 1e-3}   # until a network has memorised its images
PROTOCOLS: dict[str, Options] = {   # with --resplit, test images have been trained on
    f"{name}, {protocol}": {**METHODS[name], **RELEASED, **more} for name in ("rve_pfl", "nbafl")
    for protocol, more in (("resplit", {"resplit": True}), ("held out", {}))}


def tasks(seeds: Sequence[int]) -> list[Task]:
    """Return the runs, seed after seed; those of the released protocol last."""
    return [*grid("partitions", SCALES, PARTITIONS, {**METHODS, **VARIANTS}, seeds, local_bs=64),
            *grid("partitions", {"cifar10k": SCALES["cifar10k"]}, ["shards"], PROTOCOLS, seeds, local_bs=64)]


def tabulate(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the accuracies on Fashion-MNIST and CIFAR-10; on MNIST most methods are near 1."""
    rows = rows[(rows["clients"] == 10) & rows["dataset"].isin(["fmnist10k", "cifar10k"])]
    return side_by_side(rows, [*KEYS])


KEYS = {"dataset": "data set", "partition": "partition"}
EXPERIMENT = Experiment(
    name="partitions", question="How accurate are the methods under other partitions?",
    tasks=tasks, measure=curve, settings=["dataset", "partition", "clients", "method"], tabulate=tabulate,
    keys=KEYS, values={**VALUES, "rve_pfl_trunk, slow head": ("shared trunk", "{:.3f}")}, spread="rve_pfl",
    draw=lambda rows: curves(rows, ["dataset", "partition"]))

if __name__ == "__main__":
    sys.exit(main(EXPERIMENT))
