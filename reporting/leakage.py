"""What mi_attack.py found of a run, condensed to each adversary's strongest attacks beside their controls.

An *image* attack observes something of single images. Its control is ``foreign``: what the same attack makes of
another image of the class. Leakage is the mean of the differences in SSIM, image by image. The strongest attack
has the most. Beside it stands the one that identifies most images, of all and of those with the highest KL.

A *class* attack draws a class. The strongest is the one whose pictures the independent evaluator recognises most
often. Where the adversary's public images show the classes, they are among its controls.
"""
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import pandas as pd

from attack.adversaries import ADVERSARIES
from attack.attacks import ATTACKS
from attack.verdict import FOREIGN, LEVEL, WORDS, Unit, Verdict, interval, judge, read_attack, worst_identified
from methods import METHODS
from runs.configs import read_json
from runs.plots import matplotlib, plt
from utils import shown

KINDS = ("image", "class")
FOUND = ["adversary", "round", "kind", "attack", "pictures", "n", "score", "control", "control_score", "leakage",
         "low", "high", "rank_attack", "rank", "control_rank", "identified", "control_identified",
         "identified_worst", "word", "few", "budget"]
NONE = pd.DataFrame(columns=FOUND)
WORST = ["image_leakage", "image_ssim", "image_attack", "class_right", "class_attack"]   # of summary.csv
MARKERS = dict(zip(ADVERSARIES, itertools.cycle("osD^vP")))   # noqa: B905 - a cycle is endless
COLOURS = dict(zip(METHODS, itertools.cycle(plt.get_cmap("tab20")(range(20)).tolist())))   # noqa: B905
AXES = {"image": ("leakage", "leakage: SSIM less that from another image"),
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
    """A run's ``attack.csv``, condensed; no rows if the run was not attacked.

    Raises:
        OSError, ValueError, KeyError, TypeError: it or ``attack.json`` is not what mi_attack.py writes.
    """
    path = folder / "attack.csv"
    if not path.exists():
        return NONE
    rows = read_attack(path)
    for column, known in (("adversary", ADVERSARIES), ("attack", ATTACKS)):
        if foreign := set(rows[column]) - set(known):
            raise ValueError(f"{column} {shown(foreign.pop())} is unknown")
    spent = read_json(folder / "attack.json")
    restarts, iterations, epochs, public = (
        shown(spent[name]) for name in ("restarts", "iterations", "train_epochs", "public"))
    return condense(rows).assign(budget=f"{restarts} x {iterations} iterations, {epochs} epochs, {public}")


def condense(rows: pd.DataFrame) -> pd.DataFrame:
    """One row for each adversary, round and kind of attack: its strongest attacks and its verdict.

    The verdict is the word that is worst for the victim. Each attack is judged at a level divided by the number of
    attacks, so that together they call a guess a leak no more often than one would.
    """
    found, rows = [], rows.assign(kind=[ATTACKS[name].kind for name in rows["attack"]])
    for (adversary, round, kind), part in rows.groupby(["adversary", "round", "kind"], sort=False):
        attacks = {Unit(adversary, attack, int(round), 0, observed): one
                   for (attack, observed), one in part.groupby(["attack", "observed"], sort=False)}
        verdicts = {unit: judge(one, ATTACKS[unit.attack], LEVEL / len(attacks)) for unit, one in attacks.items()}
        worst = min(verdicts.values(), key=lambda verdict: (WORDS.index(verdict.word), verdict.few))
        found.append({"adversary": adversary, "round": int(round), "kind": kind, "word": worst.word,
                      "few": worst.few, **(_images if kind == "image" else _classes)(attacks, verdicts)})
    return pd.DataFrame(found, columns=FOUND)


def _named(unit: Unit) -> dict[str, object]:
    """The columns of ``FOUND`` that name an attack and the files of its pictures."""
    return {"attack": unit.words, "pictures": unit.picture.replace("client0", "client*")}


def _images(attacks: dict[Unit, pd.DataFrame], verdicts: dict[Unit, Verdict]) -> dict[str, object]:
    """``FOUND``'s columns about attacks on images: the one that shows most, and the one that identifies most."""
    row: dict[str, object] = dict.fromkeys(("score", "control_score", "leakage", "low", "high"), np.nan)
    own = {name: part[(part["control"] == "") & (part["restart"] == 0)] for name, part in attacks.items()}
    foreign = {name: part[part["control"] == FOREIGN] for name, part in attacks.items()}
    shows = {name: verdict.comparisons[0] for name, verdict in verdicts.items()
             if not ATTACKS[name.attack].chooses}
    if shows:   # one that only chooses among candidates has a rank, but no picture
        best = max(shows, key=lambda name: shows[name].score - shows[name].control_score)
        key, one = ["client", "image"], shows[best]
        low, high = interval((own[best].set_index(key)["ssim"] - foreign[best].set_index(key)["ssim"]).to_numpy())
        row |= {**_named(best), "score": one.score, "control_score": one.control_score,
                "leakage": one.score - one.control_score, "low": low, "high": high}
    names = max(own, key=lambda name: (own[name]["identified"].mean(), -own[name]["class_rank"].mean()))
    return {**_named(names), "control": FOREIGN, **row, "n": verdicts[names].count, "rank_attack": names.words,
            "rank": own[names]["class_rank"].mean(), "control_rank": foreign[names]["class_rank"].mean(),
            "identified": own[names]["identified"].mean(),
            "control_identified": foreign[names]["identified"].mean(),
            "identified_worst": worst_identified(own[names])}


def _classes(attacks: dict[Unit, pd.DataFrame], verdicts: dict[Unit, Verdict]) -> dict[str, object]:
    """The columns of ``FOUND`` about attacks on classes: the one that is recognised most often."""
    shows = {name: verdict.comparisons[0] for name, verdict in verdicts.items()}
    best = max(shows, key=lambda name: shows[name].score)
    part, one = attacks[best], shows[best]
    own = part[(part["control"] == "") & (part["restart"] == 0)]
    low, high = interval(own["evaluator_correct"].to_numpy(float))
    return {**_named(best), "n": verdicts[best].count, "score": one.score, "control": one.control,
            "control_score": one.control_score, "leakage": one.score - one.control_score, "low": low, "high": high}


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
    for _, part in rows.groupby(["run", "adversary", "method"], sort=False):
        adversary, method = part[["adversary", "method"]].iloc[0]
        # All adversaries of a run have one accuracy, so their points are moved apart to be seen.
        aside = 4 * (list(MARKERS).index(adversary) - 1.5) if x == "accuracy" else 0
        moved = matplotlib.transforms.ScaledTranslation(aside / 72, 0, figure.dpi_scale_trans)
        look = {"color": COLOURS[method], "transform": axes.transData + moved}
        axes.vlines(part[x], part["low"], part["high"], alpha=0.25, **look)
        axes.plot(part[x], part[y], marker=MARKERS[adversary], linewidth=1, markeredgecolor="white",
                  markeredgewidth=0.6, **look)
        for end in ("low", "high"):   # moved points do not extend the axes by themselves
            axes.update_datalim(part[[x, end]].to_numpy(float))
    _betas(axes, rows, y, x)
    axes.autoscale_view()
    if kind == "image":
        axes.axhline(0, color="grey", linewidth=0.8)
    axes.set(xlabel={"accuracy": "deployed accuracy"}.get(x, x), ylabel=label, title=f"{kind} attacks")
    if x == "round":
        axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    _legend(figure, rows)
    return figure


def _betas(axes: plt.Axes, rows: pd.DataFrame, y: str, x: str) -> None:
    """Write each run's beta over its points or right of its lines, where a method's runs differ in it."""
    several = rows.groupby("method")["beta"].transform("nunique") > 1
    for _, part in rows[several].groupby("run"):
        beta, last = f"β={part['beta'].iloc[0]:g}", part[part["round"] == part["round"].max()]
        if x == "accuracy":
            axes.annotate(beta, (part[x].iloc[0], part["high"].max()), fontsize=7, rotation=90, ha="center",
                          xytext=(0, 4), textcoords="offset points")
        else:
            axes.annotate(beta, (last[x].iloc[0], last[y].max()), fontsize=7, va="center", xytext=(8, 0),
                          textcoords="offset points")
    if several.any():   # room for the text
        axes.margins(x=0.05 if x == "accuracy" else 0.2, y=0.2)


def _legend(figure: plt.Figure, rows: pd.DataFrame) -> None:
    """Explain shapes and colours below the axes."""
    shapes = [plt.Line2D([], [], linestyle="", marker=mark, color="dimgrey", label=name.replace("_", " "))
              for name, mark in MARKERS.items() if name in set(rows["adversary"])]
    colours = [plt.Line2D([], [], linewidth=5, color=colour, label=name)
               for name, colour in COLOURS.items() if name in set(rows["method"])]
    figure.legend(handles=[*shapes, *colours], loc="outside lower center", ncols=3, fontsize=8.5)
