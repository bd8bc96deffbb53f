"""Compare the methods on 10,000 images of each data set under three partitions.

The methods are those of headline.py, variants of RVE-PFL, and other personalised and private methods.
"""
from __future__ import annotations

import sys
from collections.abc import Sequence

from common import Experiment, Options, Task, curve, main
from headline import METHODS as HEADLINE
from headline import PRIVATE, SHARED, by_setting, curves, grid

DP: Options = {**SHARED, "finetune_ep": 1}   # epsilon covers the fine-tuning, too
LONGER: Options = {**PRIVATE, "local_ep": 2}   # a client has 14 steps per epoch
RVE_PFL: Options = {"method": "rve_pfl", "aggregation": "mean"}
ENCODERS: dict[str, Options] = {
    "rve_pfl": RVE_PFL,
    "rve_pfl, class prior": {**RVE_PFL, "prior": "class", "prior_apart": 0.25},
    "rve_pfl, categorical prior": {**RVE_PFL, "prior": "categorical"},
    "rve_pfl_trunk": {"method": "rve_pfl_trunk"},
    "lg_fedavg": {"method": "lg_fedavg"},
    "local": {"method": "local"},
}
CNNS: dict[str, Options] = {
    **{name: HEADLINE[name] for name in ("fedavg", "nbafl", "nbafl_prox")},
    "nbafl, 10 rounds": {"method": "nbafl", "rounds": 10, "local_ep": 10, "finetune_ep": "1 2 10"},
    "local_cnn": {"method": "local_cnn", **LONGER},
    "fedper": {"method": "fedper", **LONGER},
    "fedrep": {"method": "fedrep", **LONGER},
    "ditto": {"method": "ditto", **LONGER},
    "fedsr": {"method": "fedsr", **SHARED},
    "dp_sgd, epsilon 8": {"method": "dp_sgd", "epsilon": 8, **DP},
}
DATASETS, PARTITIONS = ("fmnist10k", "cifar10k", "mnist10k"), ("shards", "dirichlet", "iid")
SHOWN = ("rve_pfl", "local_cnn", "fedper", "fedavg", "fedavg, fine-tuned", "nbafl", "nbafl, 10 rounds",
         "nbafl, 10 rounds, fine-tuned")


def tasks(seeds: Sequence[int]) -> list[Task]:
    """Return the runs, data set after data set. On 28 x 28 pixels, encoders are flat after fewer epochs."""
    def labels(dataset: str) -> dict[str, Options]:
        length = LONGER if dataset == "cifar10k" else PRIVATE
        return {**CNNS, **{name: {**label, **length} for name, label in ENCODERS.items()}}

    return [task for dataset in DATASETS
            for task in grid("partitions", [dataset], PARTITIONS, labels(dataset), seeds, local_bs=64)]


EXPERIMENT = Experiment(
    name="partitions", question="How accurate are the methods on 10,000 images of each data set?",
    tasks=tasks, measure=curve, settings=["dataset", "partition", "method"],
    tabulate=lambda rows: by_setting(rows, ["dataset", "partition"]), spread="rve_pfl",
    keys={"dataset": "data set", "partition": "partition"},
    values={name: (name, "{:.3f}") for name in SHOWN},
    draw=lambda rows: curves(rows, ["dataset", "partition"]))

if __name__ == "__main__":
    sys.exit(main(EXPERIMENT))
