"""Compare the aggregation rules under malicious clients with the oracle, to which these clients upload nothing.

``models`` trains FedAvg's whole models. ``heads`` trains the heads of RVE-PFL behind encoders that a clean run has
trained and that stay as they are, so that no private encoder makes up for a bad head. A clean run (0.8 GB) stays
until the last task that needs it.
"""
from __future__ import annotations

import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import numpy as np
from common import Experiment, Figure, Options, Task, chosen, main, panels, pd, training

DATA: Options = {"dataset": "mnist10k", "rounds": 10, "local_ep": 1, "local_bs": 64}
SCOPES: dict[str, Options] = {"models": {"method": "fedavg"},
                              "heads": {"method": "rve_pfl", "precision": "fp32", "eval_every": 10}}
ENCODERS: Options = {"rounds": 5, "local_ep": 2, "aggregation": "mean"}   # of the clean run
PARTITIONS = ("shards", "iid")
MALICIOUS = 0.3   # share of the clients
RULES = ("threat_aware", "mean", "nnm_trimmed_mean", "caf")
BEHAVIOURS = ("adaptive", "optimal_ipm", "mimic", "sybil", "label_flip", "backdoor_patch")
KEYS = ["scope", "partition", "behaviour", "rule"]
WORLD = ["scope", "partition", "seed"]


def tasks(seeds: Sequence[int]) -> list[Task]:
    """Return the runs; without malicious clients, ``behaviour`` is "nobody"."""
    found = []
    for scope, partition, seed in product(SCOPES, PARTITIONS, seeds):
        found.append(task(scope, partition, seed, "oracle", "mean"))
        found += [task(scope, partition, seed, *cell) for cell in product(("nobody", *BEHAVIOURS), RULES)]
    return found


def task(scope: str, partition: str, seed: int, behaviour: str, rule: str) -> Task:
    """Return one run, preceded by that of its encoders where it trains heads alone."""
    run = f"robustness-{scope}-{partition}-{behaviour}-{rule}-seed{seed}"
    options: Options = {**DATA, **SCOPES[scope], "partition": partition, "seed": seed, "aggregation": rule}
    before = []
    if scope == "heads":
        encoders = f"robustness-encoders-{partition}-seed{seed}"
        before, options = [training(encoders, {**options, **ENCODERS})], {**options, "encoders_from": encoders}
    if behaviour != "nobody":
        options |= {"malicious_frac": MALICIOUS, "malicious_behaviour": behaviour}
    key = dict(zip(KEYS, (scope, partition, behaviour, rule), strict=True))
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
    """Return for each partition and rule the mean over behaviours and the worst of them, of whole models."""
    rows, by = rows[rows["scope"] == "models"], ["partition", "rule", "seed"]
    clean = rows[rows["behaviour"] == "nobody"].groupby(by)["deployed"].mean()
    tried = losses(rows).reindex(columns=[*by, "lost", "backdoor"]).groupby(by)
    table = pd.concat([clean, tried["lost"].mean().rename("lost_mean"), tried.max()], axis=1).reset_index()
    return chosen(table, by[:2], list(product(PARTITIONS, RULES)))


def draw(rows: pd.DataFrame) -> Figure:
    """Draw the points lost by behaviour and rule, a panel for each scope and partition."""
    worlds = list(losses(rows).groupby(WORLD[:2], sort=False))
    figure, axes = panels(len(worlds), (4.2, 3.2))
    for panel, (world, part) in zip(axes, worlds, strict=True):
        lost = part.pivot_table(index="behaviour", columns="rule", values="lost")
        lost = lost.reindex(BEHAVIOURS, columns=RULES)
        panel.imshow(lost, cmap="Reds", vmin=0, vmax=80, aspect="auto")
        for (row, column), value in np.ndenumerate(lost.to_numpy()):
            panel.text(column, row, round(value), ha="center", va="center",
                       color="white" if value > 50 else "black")
        panel.set(title=", ".join(world))
        panel.set_xticks(range(len(RULES)), [rule.replace("_", "\n", 1) for rule in RULES], fontsize=8)
        panel.set_yticks(range(len(BEHAVIOURS)), BEHAVIOURS, fontsize=8)
    figure.supxlabel("points of accuracy lost; negative: gained", fontsize=9)
    return figure


EXPERIMENT = Experiment(
    name="robustness", question="How many points of accuracy do malicious clients cost under each rule?",
    tasks=tasks, measure=measure, settings=KEYS, tabulate=tabulate, draw=draw, spread="lost",
    keys={"partition": "partition", "rule": "rule"}, values={
        "deployed": ("accuracy, nobody malicious", "{:.3f}"), "lost_mean": ("points lost, mean", "{:z.1f}"),
        "lost": ("points lost, worst", "{:.1f}"), "backdoor": ("backdoor opens", "{:.2f}")})

if __name__ == "__main__":
    sys.exit(main(EXPERIMENT))
