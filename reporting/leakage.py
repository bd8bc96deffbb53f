"""What mi_attack.py found of a run, condensed to each adversary's strongest attacks beside a control.

An *image* attack observes something of single images. The strongest has the highest SSIM, and its leakage is
this SSIM minus the best control's. The best control is mostly ``nearest_public``, the public image nearest
the true one, which only a very lucky guess would find. So leakage above 0 means that the attack shows what no
public image shows. An attack with less can still tell which image it was: then the true image's rank is lower
than every control's. The rank given is the lowest mean rank of all image attacks, also of those that choose
among candidates and make no image. Beside it stands how many images that attack ranks first, and a guess would.

A *class* attack draws a class. The strongest is the one whose images the independent evaluator recognises
most often. The controls beside it are grey and noise, which are recognised by chance. Class means and public
images are no controls here, since they are real and always recognised. A high share means that the model
shows its classes. It says nothing about a client's own images.

The word for an adversary (attack/verdict.py) compares with other controls: those that know nothing of the
victim, so never with ``nearest_public``.
"""
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import pandas as pd

from attack.access import ADVERSARIES
from attack.attacks import ATTACKS
from attack.tables import (
    BLANK_CONTROLS,
    CONTROLS,
    SUMMARY_COLUMNS,
    SUMMARY_KEY,
    SUMMARY_NUMBERS,
    Unit,
    read_attack,
    with_newer,
)
from attack.verdict import WORDS, judge
from methods import METHODS
from runs.configs import read_json
from runs.pictures import matplotlib, plt
from utils import shown

NUMBERS = ["round", *SUMMARY_NUMBERS]
KINDS = {"image": ("ssim", CONTROLS), "class": ("evaluator_correct", BLANK_CONTROLS)}   # metric, beside which
FOUND = ["adversary", "round", "kind", "attack", "pictures", "n", "score", "low", "high", "control",
         "control_score", "leakage", "psnr", "rank_attack", "rank", "control_rank", "identified", "guess",
         "attacks", "budget", "word", "few"]
NONE = pd.DataFrame(columns=FOUND)
WORST = ["image_leakage", "image_ssim", "image_attack", "class_right", "class_attack"]   # of summary.csv
MARKERS = dict(zip(ADVERSARIES, itertools.cycle("osD^vP")))   # noqa: B905 - a cycle is endless
COLOURS = dict(zip(METHODS, itertools.cycle(plt.get_cmap("tab20")(range(20)).tolist())))   # noqa: B905
AXES = {"image": ("leakage", "leakage: SSIM minus the best control's"),
        "class": ("score", "share recognised by the evaluator")}


class Attacked(Protocol):
    """The part of ``summary.Finished`` that is needed here."""

    @property
    def name(self) -> str: ...
    @property
    def options(self) -> dict: ...
    @property
    def rounds(self) -> pd.DataFrame: ...
    @property
    def leaks(self) -> pd.DataFrame: ...


def read(folder: Path) -> pd.DataFrame:
    """A run's ``attack_summary.csv``, condensed, without words yet; no rows if the run was not attacked.

    Raises:
        OSError, ValueError, KeyError, TypeError: it or ``attack.json`` is not what mi_attack.py writes.
    """
    path = folder / "attack_summary.csv"
    if not path.exists():
        return NONE
    if not path.is_file():   # reading a pipe would wait for ever
        raise ValueError("no plain file")
    table = pd.read_csv(path, keep_default_na=False)
    table = with_newer(table, SUMMARY_COLUMNS)
    table[NUMBERS] = table[NUMBERS].apply(pd.to_numeric)
    if not len(table) or not np.isfinite(table[NUMBERS]).all(axis=None):
        raise ValueError("it has gaps")
    for column, known in (("adversary", ADVERSARIES), ("attack", ATTACKS)):
        if foreign := set(table[column]) - set(known):
            raise ValueError(f"{column} {shown(foreign.pop())} is unknown to this version")
    whole = table.groupby(SUMMARY_KEY[:-1])["control"].agg(sorted)
    if any(controls != sorted(["", *CONTROLS]) for controls in whole):
        raise ValueError("an attack does not have one row of its own and one of each control")
    if (table["n"] < 1).any() or (table["round"] < 0).any() or (table[["round", "n"]] % 1).any(axis=None):
        raise ValueError("a round or a number of images is not a whole number that it can be")
    spent = read_json(folder / "attack.json")
    restarts, iterations, epochs, public = (
        shown(spent[name]) for name in ("restarts", "iterations", "train_epochs", "public"))
    budget = f"{restarts} x {iterations} iterations, {epochs} epochs, {public}"
    return condense(table).assign(budget=budget, word=None, few=None)


def with_words(found: pd.DataFrame, folder: Path) -> pd.DataFrame:
    """``read``'s rows with the verdict on each adversary, from the run's ``attack.csv``, pooled over clients.

    ``word`` is the word of the adversary's attack of the kind that is worst for the victim, and ``few`` tells
    whether it rests on few images. Both stay None if there is no ``attack.csv``.

    Raises:
        OSError, ValueError, KeyError, TypeError: it is not what mi_attack.py writes, or lacks attacks.
    """
    path = folder / "attack.csv"
    if not len(found) or not path.exists():
        return found
    rows = read_attack(path)
    if foreign := set(rows["attack"]) - set(ATTACKS):
        raise ValueError(f"attack {shown(foreign.pop())} is unknown to this version")
    rows["kind"] = [ATTACKS[name].kind for name in rows["attack"]]
    words, few = [], []
    for one in found.to_dict("records"):
        same = rows[(rows["adversary"] == one["adversary"]) & (rows["round"] == one["round"])
                    & (rows["kind"] == one["kind"])]
        verdicts = {key: judge(part, ATTACKS[str(key[0])]) for key, part in same.groupby(["attack", "observed"])}
        for key, count in one["attacks"].items():
            if key not in verdicts or verdicts[key].count < count:
                raise ValueError(f"it lacks rows of {key[0]} by {one['adversary']} in round {one['round']}")
        worst = min(verdicts.values(), key=lambda verdict: (WORDS.index(verdict.word), verdict.few))
        words.append(worst.word)
        few.append(worst.few)
    return found.assign(word=words, few=few)


def condense(table: pd.DataFrame) -> pd.DataFrame:
    """One row for each adversary, round and kind: the strongest attack and its best control."""
    rows, table = [], table.assign(kind=[ATTACKS[name].kind for name in table["attack"]])
    for _, part in table.groupby(["adversary", "round", "kind"], sort=False):
        adversary, round, kind = part[["adversary", "round", "kind"]].iloc[0]
        metric, controls = KINDS[kind]
        own = part[part["control"] == ""]
        made = own[[not ATTACKS[name].chooses for name in own["attack"]]]
        if not len(made):   # one that only chooses among candidates has a rank, but no image to compare
            unknown = (metric, f"{metric}_low", f"{metric}_high", "psnr")
            made = own.head(1).assign(**dict.fromkeys(unknown, np.nan))
        best = made.iloc[int(made[metric].fillna(-1).argmax())]
        ranked = own.iloc[int(own["nearest_rank"].argmin())]
        if best["nearest_rank"] == ranked["nearest_rank"]:
            ranked = best
        beside, guesses = (part[(part["attack"] == one["attack"]) & (part["observed"] == one["observed"])
                                & part["control"].isin(controls)] for one in (best, ranked))
        control = beside.iloc[int(beside[metric].argmax())]
        rows.append({"adversary": adversary, "round": int(round), "kind": kind, "attack": unit_of(best).words,
                     "pictures": unit_of(best).picture.replace("client0", "client*"),
                     "n": int(best["n"]), "score": best[metric], "low": best[f"{metric}_low"],
                     "high": best[f"{metric}_high"], "control": control["control"],
                     "control_score": control[metric], "leakage": best[metric] - control[metric],
                     "psnr": best["psnr"], "rank_attack": unit_of(ranked).words, "rank": ranked["nearest_rank"],
                     "control_rank": guesses["nearest_rank"].min(),
                     "identified": ranked["identified"], "guess": ranked["guess"],
                     "attacks": dict(zip(zip(own["attack"], own["observed"], strict=True), own["n"],
                                         strict=True))})
    return pd.DataFrame(rows)


def unit_of(row: pd.Series) -> Unit:
    """Return the attack of a row of ``attack_summary.csv``, on client 0."""
    return Unit(row["adversary"], row["attack"], int(row["round"]), 0, row["observed"])


def latest(found: pd.DataFrame) -> pd.DataFrame:
    """The rows of each adversary's last round."""
    return found[found["round"] == found.groupby("adversary")["round"].transform("max")]


def pictures(found: pd.DataFrame) -> list[str]:
    """Patterns that match the file names of the pictures of ``latest``'s attacks."""
    return list(latest(found)["pictures"])


def worst(found: pd.DataFrame) -> dict[str, object]:
    """A run's ``WORST``: what the best adversary of each kind found in its last round, or None."""
    last, row = latest(found), dict[str, object](dict.fromkeys(WORST))
    for kind, (y, _) in AXES.items():
        part = last[(last["kind"] == kind) & last["score"].notna()]
        if len(part):
            best = part.iloc[int(part[y].astype(float).argmax())]
            row[f"{kind}_attack"] = f"{best['adversary']} {best['attack']}"
            row |= ({"image_leakage": best["leakage"], "image_ssim": best["score"]} if kind == "image"
                    else {"class_right": best["score"]})
    return row


def over_seeds(rows: list[dict]) -> dict[str, object]:
    """Means and standard deviations of ``WORST`` over seeds, and how many of the seeds were attacked."""
    table = pd.DataFrame(rows, columns=WORST)
    attacked = int(table[["image_attack", "class_attack"]].notna().any(axis=1).sum())
    found: dict[str, object] = {"seeds_attacked": attacked or None}
    for name in WORST:
        if name.endswith("attack"):
            found[name] = "; ".join(table[name].dropna().unique())
        else:
            values = table[name].astype(float)
            found |= {name: values.mean(), f"{name}_std": values.std()}
    return found


class OverSeeds(NamedTuple):
    """What leaks to an adversary in runs that differ in the seed.

    Attributes:
        word: the one of the runs' words that is worst for the victim; None if none is known.
        having, attacked: how many runs have this word, and how many were attacked.
        few: whether it rests on few images in each of the runs that have it.
    """

    word: str | None
    having: int
    attacked: int
    few: bool


def words_over_seeds(runs: Sequence[Attacked], adversary: str) -> dict[str, OverSeeds]:
    """For each kind of attack that the adversary ran, what leaked in the last round that it attacked."""
    found = {}
    last = [latest(run.leaks) for run in runs]
    rows = pd.concat([one[one["adversary"] == adversary] for one in last])
    for kind in KINDS:
        same = rows[rows["kind"] == kind]
        if len(same):
            word = next((word for word in WORDS if word in set(same["word"])), None)
            having = same[same["word"] == word]
            found[kind] = OverSeeds(word, len(having), len(same), bool(having["few"].all()))
    return found


def beside_utility(run: Attacked) -> pd.DataFrame:
    """A run's condensed rows beside the accuracy and KL of what was deployed by the round of each."""
    deployed = run.rounds[run.rounds["stage"] == "deployed"].set_index("round")
    then = [deployed[deployed.index <= round] for round in run.leaks["round"]]
    utility = {name: [part[name].iloc[-1] if len(part) else np.nan for part in then]
               for name in ("accuracy", "kl_nats")}
    return run.leaks.assign(run=run.name, method=run.options["method"], beta=run.options.get("kl_weight"),
                            **utility)


def picture(rows: pd.DataFrame, kind: str, x: str) -> plt.Figure:
    """Leakage of one kind, over ``accuracy`` or over ``round``.

    Over accuracy, each adversary of a run is a point; over rounds, a line.

    Args:
        rows: of ``beside_utility``, of any runs.
        x: ``accuracy`` or ``round``.
    """
    figure, axes = plt.subplots(figsize=(5.2, 4.6), layout="constrained")
    y, label = AXES[kind]
    rows = rows[(rows["kind"] == kind) & rows["score"].notna()].sort_values("round")
    shift = rows["control_score"] if y == "leakage" else 0
    rows = rows.assign(bottom=rows["low"] - shift, top=rows["high"] - shift)
    for _, part in rows.groupby(["run", "adversary", "method"], sort=False):
        adversary, method = part[["adversary", "method"]].iloc[0]
        # All adversaries of a run have one accuracy, so their points are moved apart to be seen.
        aside = 4 * (list(MARKERS).index(adversary) - 1.5) if x == "accuracy" else 0
        moved = matplotlib.transforms.ScaledTranslation(aside / 72, 0, figure.dpi_scale_trans)
        place = axes.transData + moved
        look = {"color": COLOURS[method], "transform": place}
        axes.vlines(part[x], part["bottom"], part["top"], alpha=0.25, **look)
        axes.plot(part[x], part[y], marker=MARKERS[adversary], linewidth=1, markeredgecolor="white",
                  markeredgewidth=0.6, **look)
        hits = part[(part["rank"] < part["control_rank"]) & (kind == "image")]
        axes.plot(hits[x], hits[y], "o", markersize=11, markerfacecolor="none", markeredgecolor="black",
                  transform=place)
        for end in ("bottom", "top"):   # moved points do not extend the axes by themselves
            axes.update_datalim(part[[x, end]].to_numpy(float))
    _betas(axes, rows, y, x)
    axes.autoscale_view()
    if kind == "image":
        axes.axhline(0, color="grey", linewidth=0.8)
    axes.set(xlabel={"accuracy": "deployed accuracy"}.get(x, x), ylabel=label, title=f"{kind} attacks")
    if x == "round":
        axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    _legend(figure, rows, kind)
    return figure


def _betas(axes: plt.Axes, rows: pd.DataFrame, y: str, x: str) -> None:
    """Write each run's beta over its points or right of its lines, where a method's runs differ in it."""
    several = rows.groupby("method")["beta"].transform("nunique") > 1
    for _, part in rows[several].groupby("run"):
        beta, last = f"β={part['beta'].iloc[0]:g}", part[part["round"] == part["round"].max()]
        if x == "accuracy":
            axes.annotate(beta, (part[x].iloc[0], part["top"].max()), fontsize=7, rotation=90, ha="center",
                          xytext=(0, 4), textcoords="offset points")
        else:
            axes.annotate(beta, (last[x].iloc[0], last[y].max()), fontsize=7, va="center", xytext=(8, 0),
                          textcoords="offset points")
    if several.any():   # room for the text
        axes.margins(x=0.05 if x == "accuracy" else 0.2, y=0.2)


def _legend(figure: plt.Figure, rows: pd.DataFrame, kind: str) -> None:
    """Explain shapes, colours and rings below the axes."""
    shapes = [plt.Line2D([], [], linestyle="", marker=mark, color="dimgrey", label=name.replace("_", " "))
              for name, mark in MARKERS.items() if name in set(rows["adversary"])]
    colours = [plt.Line2D([], [], linewidth=5, color=colour, label=name)
               for name, colour in COLOURS.items() if name in set(rows["method"])]
    ring = [plt.Line2D([], [], linestyle="", marker="o", markersize=11, markerfacecolor="none",
                   markeredgecolor="black", label="rank below every control's")]
    ring *= int(kind == "image" and (rows["rank"] < rows["control_rank"]).any())
    figure.legend(handles=[*shapes, *colours, *ring], loc="outside lower center", ncols=3, fontsize=8.5)
