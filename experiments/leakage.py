"""Measure what attackers find of the images that clients trained on, method by method.

Each method is trained on 10,000 MNIST images with two classes per client. Three clients of each are attacked by
the server, by an attacker with the stolen model, and by a user of the prediction service. Each attack is compared
with itself on another image of the same class. The gallery shows reconstructions. Needs data/mnist.npz.
"""
from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

from common import PAGES, ROOT, Experiment, Options, Task, chosen, flags, main, panels, pd, slug, training

from attack import mi_attack
from attack.attacks import ATTACKS
from attack.verdict import FOREIGN, WORST, Unit, read_attack
from utils import InputError, Late

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.figure import Figure

    from attack import evaluation, scoring, target
else:
    np = Late("numpy")
    evaluation, scoring, target = (Late(f"attack.{name}") for name in ("evaluation", "scoring", "target"))

ROUNDS = 5
SCALE: Options = {"dataset": "mnist10k", "partition": "shards", "rounds": ROUNDS, "local_ep": 2, "local_bs": 128}
RVE: Options = {"method": "rve_pfl", "aggregation": "mean"}
METHODS: dict[str, Options] = {
    "fedavg": {"method": "fedavg"},
    "nbafl": {"method": "nbafl"},
    "nbafl, short step": {"method": "nbafl"},
    "rve_pfl": {**RVE, "prior": "normal"},
    "rve_pfl, categorical prior": {**RVE, "prior": "categorical"},
    "rve_pfl, class prior": {**RVE, "prior": "class", "prior_apart": 0.25},
    "rve_pfl_trunk": {"method": "rve_pfl_trunk", "prior": "normal"},
    "fedper": {"method": "fedper"},
    "fedsr": {"method": "fedsr"},
    "local_cnn": {"method": "local_cnn"},
}
# The server observes an upload of one more step: after round 0, the start, that is the first of all.
SERVER: Options = {"adversary": "curious_server", "rounds": f"0 {ROUNDS}"}
OUTPUTS: Options = {"adversary": "prediction_api", "rounds": ROUNDS, "attack": "score_decoder"}
WITH_ENCODER: list[Options] = [
    {**SERVER, "attack": "gradient_reidentification trunk_analytic"},
    {"adversary": "stolen_model", "rounds": ROUNDS, "attack": "reidentification", "observe": "z z8 mu"}, OUTPUTS]
ATTACKS_ON: dict[str, list[Options]] = {
    "rve_pfl": WITH_ENCODER, "rve_pfl_trunk": WITH_ENCODER, "local_cnn": [OUTPUTS],
    **dict.fromkeys(("fedavg", "nbafl", "fedper", "fedsr"), [{**SERVER, "attack": "analytic"}, OUTPUTS])}
BUDGET: Options = {"restarts": 1, "iterations": 75, "train_epochs": 4, "draws": 8,
                   "public": "mnist", "public_images": 2000}
CLIENT_LR = {"nbafl, short step": 0.001}   # of the step that the server observes; 0.1 leaks more through noise
MEASURES = {"identified": "identified", "class_rank": "rank", "ssim": "ssim"}
UNIT = ["adversary", "attack", "round", "observed"]
# Columns of the picture: adversary, round and observation.
SEEN = {"server, first step": ("curious_server", 0, ""), "server, last round": ("curious_server", ROUNDS, ""),
        "stolen model, one z": ("stolen_model", ROUNDS, "z"), "stolen model, 8 z": ("stolen_model", ROUNDS, "z8"),
        "stolen model, mean of z": ("stolen_model", ROUNDS, "mu"),
        "prediction service": ("prediction_api", ROUNDS, "")}
# Of the table: at most eight.
SHOWN = [("fedavg", "server, last round"), ("nbafl", "server, last round"),
         ("nbafl, short step", "server, last round"),
         ("rve_pfl", "server, first step"), ("rve_pfl", "server, last round"),
         ("rve_pfl", "stolen model, one z"), ("rve_pfl, class prior", "stolen model, one z"),
         ("rve_pfl, categorical prior", "stolen model, mean of z")]
# Of the gallery: method, adversary, observation and attacks, of which that with the highest mean SSIM is shown.
GALLERY: dict[str, tuple[str, str, str, list[str]]] = {
    "FedAvg: gradient": ("fedavg", "curious_server", "", ["analytic"]),
    "NbAFL: upload": ("nbafl", "curious_server", "", ["analytic"]),
    "RVE-PFL: gradient": ("rve_pfl", "curious_server", "", ["analytic"]),
    **{f"{words}: {sight}": (method, "stolen_model", observed, ["latent_decoder", "posterior_mean"])
       for method, words in (("rve_pfl", "RVE-PFL"), ("rve_pfl, categorical prior", "categorical prior"))
       for observed, sight in (("z", "one z"), ("z8", "8 z"), ("z100", "100 z"), ("mu", "mean of z"))}}
PER_CLASS = 4   # images of the gallery: the first of each of client 0's classes


def run_of(name: str, seed: int) -> tuple[str, str]:
    """Return the name of a method's run and the command line that trains it."""
    run = f"leakage-{slug(name)}-seed{seed}"
    return run, training(run, {**SCALE, **METHODS[name], "seed": seed})


def tasks(seeds: Sequence[int]) -> list[Task]:
    """Return the gallery, and the runs: every method, seed after seed."""
    runs = [gallery_task(seeds[0])]
    for seed, name in product(seeds, METHODS):
        run, train = run_of(name, seed)
        attacks = ATTACKS_ON[METHODS[name]["method"]]
        budget = {"clients": "0 1 2", "slow_images": 8 if attacks is WITH_ENCODER else 48, **BUDGET,
                  **({"client_lr": CLIENT_LR[name]} if name in CLIENT_LR else {})}
        runs.append(Task(run, {"method": name}, seed, (train, *(
            f"python attack/mi_attack.py --run {run} {flags({**attack, **budget})}"
            for attack in attacks))))
    return runs


def gallery_task(seed: int) -> Task:
    """Return the task that trains a run of each method of the gallery, and draws it."""
    run, names = f"leakage-gallery-seed{seed}", dict.fromkeys(name for name, *_ in GALLERY.values())
    return Task(run, {}, seed, (*(run_of(name, seed)[1] for name in names),
                                f"python experiments/leakage.py --run {run}"))


def draw_gallery(run: str) -> list[dict]:
    """Draw the gallery from the runs of ``gallery_task``, and return its rows."""
    if not re.fullmatch(r"leakage-gallery-seed\d+", run):
        raise InputError(f"--run {run}: is no gallery; give leakage-gallery-seedN, as in --list")
    pictures, captions, rows = {}, {}, []
    for words, (name, adversary, observed, attacks) in GALLERY.items():
        scene, numbers = opened(run_of(name, int(run.rpartition("seed")[2]))[0])
        tried = []
        for attack in attacks:
            unit = Unit(adversary, attack, ROUNDS, 0, observed)
            outcomes = scene.outcomes(unit)
            made = pd.DataFrame(scene.rows(unit, outcomes[""], ""))
            tried.append((made["ssim"].mean(), attack, outcomes[""].images[0], made))
            rows.append({"method": name, **{part: unit._asdict()[part] for part in UNIT}, "images": "gallery",
                         "n": len(made), **{to: made[column].mean() for column, to in MEASURES.items()}})
        _, attack, pictures[words], made = max(tried, key=lambda tried: tried[0])
        captions[words] = evaluation.captions(made.to_dict("records"))
    truth, labels = scene.target.pixels(numbers), scene.target.labels(numbers)
    means = scoring.class_means(scene.public.images, scene.public.labels, labels)
    pictures = {"truth": truth, **pictures, "class mean": means}
    captions["class mean"] = [f"SSIM {value:.2f}" for value in scoring.ssim(means, truth)]
    evaluation.save_picture(PAGES / "gallery.png", pictures, captions, labels, "")
    return rows


@cache
def opened(run: str) -> tuple[evaluation.Evaluation, np.ndarray]:
    """Return a run of the gallery, to be attacked, and the numbers of the images."""
    victim = target.open_target(run, ROOT / "results", ROOT / "saved_models", ROOT / "data")
    own, labels = victim.owned()[0][0], victim.data.labels
    numbers = np.concatenate([own[labels[own] == c][:PER_CLASS] for c in np.unique(labels[own])])
    words = flags({"run": run, **BUDGET, "public_images": 4000, "image_numbers": " ".join(map(str, numbers)),
                   "data_dir": ROOT / "data"})
    return evaluation.Evaluation(victim, mi_attack.make_parser().parse(words.split())), numbers


def measure(folder: Path) -> list[dict]:
    """Return two rows for each attack, of all images and of those with the highest KL; or the gallery's rows."""
    if (gallery := folder / "leakage.csv").exists():
        return pd.read_csv(gallery, keep_default_na=False).to_dict("records")
    rows = read_attack(folder / "attack.csv")
    rows = rows[(rows["restart"] == 0) | (rows["control"] == FOREIGN)]
    return [row for key, part in rows.groupby(UNIT, sort=False) if ATTACKS[key[1]].kind == "image"
            for row in attack_rows(dict(zip(UNIT, key, strict=True)), part)]


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


def strongest(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of the attack that identifies most, for each method and column of ``SEEN``."""
    names = {key: name for name, key in SEEN.items()}
    rows = rows[rows["images"] == "all"].assign(observed=lambda rows: rows["observed"].astype(object).fillna(""))
    keys = zip(rows["adversary"], rows["round"], rows["observed"], strict=True)
    rows = rows.assign(seen=[names.get(key) for key in keys]).dropna(subset=["seen"])
    means = rows.groupby(["method", "seen", "attack"])["identified"].mean().reset_index()
    best = means.loc[means.groupby(["method", "seen"])["identified"].idxmax()]
    return rows.merge(best[["method", "seen", "attack"]])


def draw(rows: pd.DataFrame) -> Figure:
    """Draw the share that the strongest attack identifies, method by adversary, with its control in brackets."""
    from matplotlib.colors import LogNorm  # slow to import

    means = strongest(rows).groupby(["method", "seen"])[["identified", "control_identified"]].mean()
    methods = [name for name in METHODS if name in means.index]
    shares = means["identified"].unstack().reindex(index=methods, columns=[*SEEN])
    figure, (panel,) = panels(1, (9.0, 0.6 + 0.5 * len(methods)))
    image = panel.imshow(shares.clip(LEAST).to_numpy(float), cmap="Reds", norm=LogNorm(LEAST, 1), aspect="auto")
    for (name, seen), row in means.iterrows():
        colour = "white" if row["identified"] > 0.2 else "black"
        panel.text([*SEEN].index(seen), methods.index(name), color=colour, ha="center", va="center", fontsize=9,
                   s=f"{row['identified']:.3f}\n({row['control_identified']:.3f})")
    panel.set_facecolor("0.9")
    panel.set_xticks(range(len(SEEN)), [name.replace(" ", "\n", 1).replace(", ", ",\n") for name in SEEN])
    panel.set_yticks(range(len(methods)), methods)
    panel.tick_params(length=0, labelsize=9, top=True, labeltop=True, bottom=False, labelbottom=False)
    figure.colorbar(image, label="share identified")
    return figure


LEAST = 2e-3   # the smallest share that the picture's colours tell apart: about that of a guess
EXPERIMENT = Experiment(
    name="leakage", question="How many of a client's training images does each attacker identify?",
    tasks=tasks, measure=measure, inspect=draw_gallery, settings=["method", *UNIT, "images"],
    tabulate=lambda rows: chosen(strongest(rows), ["method", "seen"], SHOWN), draw=draw, spread="identified",
    keys={"method": "method", "seen": "adversary", "attack": "strongest attack"},
    values={"identified": ("identified", "{:.3f}"), "control_identified": ("control", "{:.3f}"),
            "rank": ("rank in class", "{:.0f}"), "class_size": ("images of the class", "{:.0f}")})

if __name__ == "__main__":
    sys.exit(main(EXPERIMENT))
