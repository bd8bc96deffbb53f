"""Compare the aggregation rules under malicious clients with the oracle, to which these clients upload nothing.

``models`` trains FedAvg's whole models. ``heads`` trains the heads of RVE-PFL behind encoders that a clean run has
trained and that stay as they are, so that no private encoder makes up for a bad head; the clean runs stay under
saved_models/robustness-encoders-* (0.8 GB each).
"""
from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from common import Experiment, Options, Task, dots, main, pd, training

DATA = {"dataset": "mnist10k", "local_ep": 1}
SCOPES: dict[str, Options] = {"models": {"method": "fedavg", "rounds": 5, "local_bs": 32},
                                        "heads": {"method": "rve_pfl", "rounds": 3, "local_bs": 64}}
PARTITIONS = ("shards", "iid", "dirichlet")
FRACTIONS = (0.3, 0.1, 0.2, 0.4)   # of malicious clients
RULES = ("threat_aware", "mean", "median", "trimmed_mean", "krum", "nnm_trimmed_mean", "caf", "norm_clipping")
BEHAVIOURS = ("adaptive", "optimal_ipm", "min_max", "mimic", "scaling", "label_flip", "sybil", "optimal_alie",
              "backdoor_patch", "backdoor_projected")
KEYS = ["scope", "partition", "fraction", "behaviour", "rule"]
WORLD = ["scope", "partition", "fraction", "seed"]


def tasks(seeds: Sequence[int]) -> list[Task]:
    """Return the runs: 30 % malicious clients first; without any, ``behaviour`` is "nobody"."""
    worlds = [(scope, partition, seed) for scope in SCOPES for partition in PARTITIONS for seed in seeds]
    found = [task(*world, 0.0, "nobody", rule) for world in worlds for rule in RULES]
    for fraction in FRACTIONS:
        found += [task(*world, fraction, "oracle", "mean") for world in worlds]
        found += [task(*world, fraction, behaviour, rule)
                  for behaviour in BEHAVIOURS for world in worlds for rule in RULES]
    return found


def task(scope: str, partition: str, seed: int, fraction: float, behaviour: str, rule: str) -> Task:
    """Return one run, preceded by that of its encoders where it trains heads alone."""
    run = f"robustness-{scope}-{partition}-{fraction:g}-{behaviour}-{rule}-seed{seed}"
    options: Options = {**DATA, **SCOPES[scope], "partition": partition, "seed": seed, "aggregation": rule}
    before = []
    if scope == "heads":
        encoders = f"robustness-encoders-{partition}-seed{seed}"
        clean = {**options, "aggregation": "mean", "local_ep": 2}
        before, options = [training(encoders, clean)], {**options, "encoders_from": encoders}
    if fraction:
        options |= {"malicious_frac": fraction, "malicious_behaviour": behaviour}
    key = dict(zip(KEYS, (scope, partition, fraction, behaviour, rule), strict=True))
    return Task(run, key, seed, (*before, training(run, options)))


def measure(folder: Path) -> list[dict]:
    """Return one row: honest clients' accuracy, how often a backdoor opens, and the server's weights.

    ``weight`` is that of malicious clients over what their number would give them; ``trust`` is the least mean
    trust of an honest client.
    """
    rounds, clients, server = (pd.read_csv(folder / f"{name}.csv") for name in ("rounds", "clients", "server"))
    final = rounds[rounds["stage"] == "deployed"].iloc[-1]
    row = {"deployed": final["accuracy"], "deployed_worst": final["accuracy_worst"]}
    if "backdoor" in clients:
        row["backdoor"] = clients.loc[clients["round"] == final["round"], "backdoor"].mean()
    bad = server["malicious"] == 1
    if server["weight"].notna().all() and bad.any():
        row["weight"] = server.loc[bad, "weight"].sum() / server["round"].nunique() / bad.mean()
    if "trust" in server:
        row["trust"] = server[~bad].groupby("client")["trust"].mean().min()
    return [row]


def losses(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the rows with malicious clients, with ``lost``: points of accuracy less than the oracle's."""
    oracle = rows[rows["behaviour"] == "oracle"].set_index(WORLD)["deployed"].rename("oracle")
    tried = rows[~rows["behaviour"].isin(["oracle", "nobody"])].join(oracle, on=WORLD)
    return tried.assign(lost=100 * (tried["oracle"] - tried["deployed"]))


def tabulate(rows: pd.DataFrame) -> pd.DataFrame:
    """Return for each rule, whole models and 30 % malicious clients, the worst behaviour and partition."""
    rows = rows[rows["scope"] == "models"]
    clean = rows[rows["behaviour"] == "nobody"].groupby(["rule", "seed"], sort=False)["deployed"].mean()
    tried = losses(rows[rows["fraction"].isin([0.3])])
    worst = tried.reindex(columns=["rule", "seed", "lost", "backdoor"]).groupby(["rule", "seed"]).max()
    return pd.concat([clean, worst], axis=1).reset_index()


EXPERIMENT = Experiment(
    name="robustness", question="Which aggregation rule withstands malicious clients?",
    tasks=tasks, measure=measure, settings=KEYS, tabulate=tabulate, keys={"rule": "rule"},
    draw=lambda rows: dots(losses(rows[rows["fraction"].isin([0.3])]), ["scope", "rule"], ["lost"]),
    spread="lost", values={
        "deployed": ("accuracy, nobody malicious", "{:.3f}"), "lost": ("points lost, worst behaviour", "{:.1f}"),
        "backdoor": ("backdoor opens", "{:.2f}")})

if __name__ == "__main__":
    sys.exit(main(EXPERIMENT))
