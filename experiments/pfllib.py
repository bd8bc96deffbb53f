"""Compare methods on Fashion-MNIST under PFLlib's protocol.

``--preset pfllib`` sets the protocol, apart from the number of rounds. Needs data/fmnist.npz.
"""
from __future__ import annotations

import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path

from common import Experiment, Options, Task, dots, main, pd, training

ROUNDS = 100
METHODS: dict[str, Options] = {"fedavg": {}, "fedper": {}, "rve_pfl": {"aggregation": "mean"}, "local_cnn": {}}


def tasks(seeds: Sequence[int]) -> list[Task]:
    """Return the runs, seed after seed."""
    found = []
    for seed, partition, method in product(seeds, ("pathological", "dirichlet"), METHODS):
        run, key = f"pfllib-{partition}-{method}-seed{seed}", {"partition": partition, "method": method}
        options = {"preset": "pfllib", "dataset": "fmnist", **key, **METHODS[method], "rounds": ROUNDS,
                   "seed": seed}
        found.append(Task(run, key, seed, (training(run, options),)))
    return found


def measure(folder: Path) -> list[dict]:
    """Return the accuracy over all test images as deployed in the best round and in the last."""
    rounds = pd.read_csv(folder / "rounds.csv").query("stage == 'deployed'").set_index("round")
    images = rounds["accuracy_images"]
    return [{"best": images.max(), "best_round": images.idxmax(), "last": images.iloc[-1],
             "rounds": images.index[-1], "last_clients": rounds["accuracy"].iloc[-1]}]


EXPERIMENT = Experiment(
    name="pfllib", question="How accurate are the methods under PFLlib's protocol?", tasks=tasks, measure=measure,
    settings=["partition", "method"], tabulate=lambda rows: rows, spread="best",
    keys={"partition": "partition", "method": "method"},
    values={"best": ("best round", "{:.4f}"), "last": ("last round", "{:.4f}")},
    draw=lambda rows: dots(rows, ["partition", "method"], ["best", "last"], xlabel="accuracy over all images"))

if __name__ == "__main__":
    sys.exit(main(EXPERIMENT))
