"""Measure whether an attacker can tell a client's training images from its held-out ones.

Three clients of each run are attacked. An AUC of 0.5 is a guess. Needs data/mnist.npz.
"""
from __future__ import annotations

import sys
from collections.abc import Sequence

from common import Experiment, Figure, Options, Task, dots, flags, main, pd, slug, training

SCALE = {"dataset": "mnist10k", "rounds": 5, "local_ep": 2, "local_bs": 64, "save_rounds": 1}
SETTINGS: dict[str, Options] = {
    "fedavg, iid": {"method": "fedavg", "partition": "iid"},
    "fedavg, shards": {"method": "fedavg", "partition": "shards"},
    "rve_pfl, iid": {"method": "rve_pfl", "partition": "iid"},
    "rve_pfl, shards": {"method": "rve_pfl", "partition": "shards"},
    "rve_pfl, class prior, shards": {"method": "rve_pfl", "partition": "shards", "prior": "class", "kl_weight": 1,
                                     "prior_apart": 0.25, "head_lr": 1},
    "lg_fedavg, shards": {"method": "lg_fedavg", "partition": "shards"},
}
ATTACK = {"attack": "loss kl fedmia", "clients": "0 1 2", "public": "mnist", "public_images": 2000}
SHOWN = {"loss": "stolen_model", "fedmia": "curious_server"}   # attack -> adversary


def tasks(seeds: Sequence[int]) -> list[Task]:
    """Return the runs, seed after seed."""
    found = []
    for seed in seeds:
        for name, options in SETTINGS.items():
            run = f"members-{slug(name)}-seed{seed}"
            found.append(Task(run, {"setting": name}, seed, (
                training(run, {**SCALE, **options, "seed": seed}),
                f"python attack/membership.py {flags({'run': run, **ATTACK})}")))
    return found


def tabulate(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the AUC of each setting under the attacks of ``SHOWN``, means over clients."""
    wide = [rows[(rows["attack"] == attack) & (rows["adversary"] == adversary)]
            .groupby(["setting", "seed"], sort=False)["auc"].mean().rename(attack)
            for attack, adversary in SHOWN.items()]
    return pd.concat(wide, axis=1).reset_index()


def draw(rows: pd.DataFrame) -> Figure:
    """Draw the table's AUCs, a dot for each seed."""
    figure = dots(tabulate(rows), ["setting"], [*SHOWN], xlabel="AUC (dotted line: a guess)")
    figure.axes[0].axvline(0.5, color="grey", linestyle=":")
    return figure


EXPERIMENT = Experiment(
    name="member_inference", question="Can an attacker tell training images from held-out ones?",
    tasks=tasks, measure=lambda folder: pd.read_csv(folder / "membership.csv").to_dict("records"),
    settings=["setting", "adversary", "attack", "client"], tabulate=tabulate,
    keys={"setting": "setting"}, spread="loss",
    draw=draw,
    values={"loss": ("AUC, loss, stolen model", "{:.3f}"), "fedmia": ("AUC, FedMIA, server", "{:.3f}")})

if __name__ == "__main__":
    sys.exit(main(EXPERIMENT))
