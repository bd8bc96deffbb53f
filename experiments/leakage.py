"""Measure what model inversion and re-identification find of the images that clients trained on.

Four methods are trained on 10,000 MNIST images with two classes per client. Three clients of each are attacked by
the server, by an attacker with the stolen model, and by a user of the prediction service. Each attack is compared
with itself on another image of the same class. Needs data/mnist.npz.
"""
from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from common import Experiment, Options, Task, dots, flags, main, pd, slug, training

from attack.attacks import ATTACKS
from attack.verdict import FOREIGN, WORST, read_attack

SCALE = {"dataset": "mnist10k", "partition": "shards", "rounds": 5, "local_ep": 2, "local_bs": 64}
METHODS: dict[str, Options] = {
    "fedavg": {"method": "fedavg"},
    "nbafl": {"method": "nbafl"},
    "rve_pfl": {"method": "rve_pfl", "aggregation": "mean"},
    "rve_pfl, class prior": {"method": "rve_pfl", "aggregation": "mean", "prior": "class", "kl_weight": 1,
                             "prior_apart": 0.25, "head_lr": 1},
}
COMMON = {"restarts": 1, "iterations": 80, "train_epochs": 4, "public": "mnist", "public_images": 4000}
PIXELS: list[Options] = [   # of methods without an encoder
    {"adversary": "curious_server", "attack": "analytic cosine_tv", "clients": "0 1 2"},
    {"adversary": "prediction_api", "attack": "score_decoder", "clients": "0 1 2"}]
LATENTS: list[Options] = [
    {"adversary": "stolen_model", "attack": "reidentification", "observe": "z z8 mu", "clients": "0 1 2"},
    {"adversary": "stolen_model", "attack": "latent_decoder", "observe": "mu", "clients": "0 1 2"},
    {"adversary": "curious_server", "attack": "analytic", "clients": "0 1 2"},
    {"adversary": "prediction_api", "attack": "score_decoder", "clients": 0}]
MEASURES = {"identified": "identified", "class_rank": "rank", "ssim": "ssim"}
SHOWN = [("fedavg", "analytic", "", "all"), ("nbafl", "analytic", "", "all"),
         ("rve_pfl", "reidentification", "z", "all"),
         *(("rve_pfl, class prior", "reidentification", observed, "all") for observed in ("z", "z8", "mu")),
         ("rve_pfl, class prior", "reidentification", "z", "worst 2 %")]


def tasks(seeds: Sequence[int]) -> list[Task]:
    """Return the runs: every method, seed after seed."""
    found = []
    for seed in seeds:
        for name, options in METHODS.items():
            run = f"leakage-{slug(name)}-seed{seed}"
            attacks = LATENTS if options["method"] == "rve_pfl" else PIXELS
            found.append(Task(run, {"method": name}, seed, (
                training(run, {**SCALE, **options, "seed": seed}),
                *(f"python attack/mi_attack.py --run {run} {flags({**attack, **COMMON})}" for attack in attacks))))
    return found


def measure(folder: Path) -> list[dict]:
    """Return two rows for each attack: one of all images, one of the 2 % with the highest KL."""
    rows = read_attack(folder / "attack.csv")
    rows = rows[(rows["restart"] == 0) | (rows["control"] == FOREIGN)]
    return [row for key, part in rows.groupby(["adversary", "attack", "observed"], sort=False)
            if ATTACKS[key[1]].kind == "image"
            for row in attack_rows(dict(zip(("adversary", "attack", "observed"), key, strict=True)), part)]


def attack_rows(key: dict, part: pd.DataFrame) -> Iterator[dict]:
    """Yield the rows of one attack, with the means of its first choices beside those of its foreign control."""
    own = part[part["control"] == ""].set_index(["client", "image"])
    foreign = part[part["control"] == FOREIGN].set_index(["client", "image"])
    chosen = {"all": own.index}
    if own["kl_nats"].notna().all():
        chosen["worst 2 %"] = own.nlargest(max(1, round(WORST * len(own))), "kl_nats").index
    for images, index in chosen.items():
        row = {**key, "images": images, "n": len(index), "class_size": own.loc[index, "class_size"].mean()}
        for column, name in MEASURES.items():
            row |= {name: own.loc[index, column].mean(), f"control_{name}": foreign.loc[index, column].mean()}
        yield row


def tabulate(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the attacks that the table and the picture show, in their order."""
    rows = rows.assign(observed=rows["observed"].astype(object).fillna(""))
    by = rows.set_index(["method", "attack", "observed", "images"], drop=False).sort_index()
    return pd.concat([by.loc[[key]] for key in SHOWN if key in by.index]).reset_index(drop=True)


KEYS = {"method": "method", "attack": "attack", "observed": "observes", "images": "images"}
EXPERIMENT = Experiment(
    name="leakage", question="How many of a client's training images do attackers identify?",
    tasks=tasks, measure=measure, settings=["method", "adversary", "attack", "observed", "images"],
    tabulate=tabulate, keys=KEYS, spread="identified",
    draw=lambda rows: dots(tabulate(rows), [*KEYS], ["identified", "control_identified"], xlabel="share"),
    values={"identified": ("identified", "{:.3f}"), "control_identified": ("control", "{:.3f}"),
            "rank": ("rank in class", "{:.0f}"), "class_size": ("images of the class", "{:.0f}")})

if __name__ == "__main__":
    sys.exit(main(EXPERIMENT))
