"""What attack/mi_attack.py found of a run, condensed: each adversary's strongest attack beside a control.

*Image* attacks observe something of single images; the strongest has the highest SSIM, and its leakage is
that minus the best control's, mostly ``nearest_public``: the public image nearest the truth, which only a
lucky guesser would pick. Over 0 it shows what no public image shows. Under 0 it may still tell which image it
was: the true image's mean rank among the client's says so, where it is under every control's. That rank is
the lowest that any image attack reached, those included that choose among candidates and make no image.

*Class* attacks observe none, they draw a class; the strongest is recognised most often by the independent
evaluator. It stands beside grey and noise, what a blank picture gets by chance, and not beside ``class_mean``
and ``nearest_public``: those are real public images, recognised whatever the model tells. So a high share
says that the model shows its classes, and nothing of the client's own images.
"""
import itertools
from pathlib import Path

import numpy as np
import pandas as pd

from attack.access import ADVERSARIES
from attack.attacks import ATTACKS
from options import METHODS, shown
from runs.configs import read_json
from runs.pictures import matplotlib, plt

KEY = ["adversary", "attack", "round", "control"]
# attack/scene.py's, whose import takes seconds; a test compares them.
METRICS = ["mse", "psnr", "ssim", "label_match", "evaluator_correct", "nearest_rank"]
NUMBERS = ["round", "n", *(name + end for name in METRICS for end in ("", "_low", "_high"))]
SUMMARY_COLUMNS = [*KEY, *NUMBERS[1:]]
BLANK = ("grey", "noise")
CONTROLS = (*BLANK, "class_mean", "nearest_public")
KINDS = {"image": ("ssim", CONTROLS), "class": ("evaluator_correct", BLANK)}   # judged by, beside which
FOUND = ["adversary", "round", "kind", "attack", "n", "score", "low", "high", "control", "control_score",
         "leakage", "psnr", "rank_attack", "rank", "control_rank", "budget"]
NONE = pd.DataFrame(columns=FOUND)
WORST = ["image_leakage", "image_ssim", "image_attack", "class_right", "class_attack"]
MARKERS = dict(zip(ADVERSARIES, itertools.cycle("osD^vP")))   # noqa: B905 - a cycle is endless
COLOURS = dict(zip(METHODS, itertools.cycle(matplotlib.colormaps["tab10"].colors)))   # noqa: B905
AXES = {"image": ("leakage", "leakage: SSIM over the best control's"),
        "class": ("score", "share recognised by the evaluator")}


def read(folder: Path) -> pd.DataFrame:
    """A run's ``attack_summary.csv``, condensed; no rows where it was not attacked.

    Raises:
        OSError, ValueError, KeyError, TypeError: it, or ``attack.json``, is not what mi_attack.py writes.
    """
    path = folder / "attack_summary.csv"
    if not path.exists():
        return NONE
    if not path.is_file():   # a pipe would be waited for
        raise ValueError("no plain file")
    table = pd.read_csv(path, keep_default_na=False)
    if list(table.columns) != SUMMARY_COLUMNS:
        raise ValueError("its columns are not those of an attack")
    table[NUMBERS] = table[NUMBERS].apply(pd.to_numeric)
    if not len(table) or not np.isfinite(table[NUMBERS]).all(axis=None):
        raise ValueError("it has gaps")
    for column, known in (("adversary", ADVERSARIES), ("attack", ATTACKS)):
        if foreign := set(table[column]) - set(known):
            raise ValueError(f"{column} {shown(foreign.pop())} is not this version's")
    whole = table.groupby(KEY[:3])["control"].agg(sorted)
    if any(controls != sorted(["", *CONTROLS]) for controls in whole):
        raise ValueError("an attack is not there once, with each control once")
    if (table[["round", "n"]] < 1).any(axis=None) or (table[["round", "n"]] % 1).any(axis=None):
        raise ValueError("a round or a number of images is none")
    spent = read_json(folder / "attack.json")
    restarts, iterations, epochs, public = (
        shown(spent[name]) for name in ("restarts", "iterations", "train_epochs", "public"))
    return condense(table).assign(budget=f"{restarts} x {iterations} iterations, {epochs} epochs, {public}")


def condense(table: pd.DataFrame) -> pd.DataFrame:
    """One row an adversary, round and kind: the strongest attack and its best control."""
    rows, kinds = [], ["class" if ATTACKS[name].observe is None else "image" for name in table["attack"]]
    for (adversary, round, kind), part in table.assign(kind=kinds).groupby(["adversary", "round", "kind"],
                                                                          sort=False):
        judge, controls = KINDS[kind]
        own = part[part["control"] == ""]
        made = own[[not ATTACKS[name].chooses for name in own["attack"]]]
        if not len(made):   # who only chooses among candidates has a rank, and no picture to judge
            unjudged = (judge, f"{judge}_low", f"{judge}_high", "psnr")
            made = own.head(1).assign(**dict.fromkeys(unjudged, np.nan))
        best = made.iloc[int(made[judge].fillna(-1).argmax())]
        lowest = own["nearest_rank"].min()
        nearest = best if best["nearest_rank"] == lowest else own.loc[own["nearest_rank"].idxmin()]
        beside = part[(part["attack"] == best["attack"]) & part["control"].isin(controls)]
        guesses = part[(part["attack"] == nearest["attack"]) & part["control"].isin(controls)]
        control = beside.loc[beside[judge].idxmax()]
        rows.append({"adversary": adversary, "round": int(round), "kind": kind, "attack": best["attack"],
                     "n": int(best["n"]), "score": best[judge], "low": best[f"{judge}_low"],
                     "high": best[f"{judge}_high"], "control": control["control"],
                     "control_score": control[judge], "leakage": best[judge] - control[judge],
                     "psnr": best["psnr"], "rank_attack": nearest["attack"], "rank": nearest["nearest_rank"],
                     "control_rank": guesses["nearest_rank"].min()})
    return pd.DataFrame(rows)


def latest(found: pd.DataFrame) -> pd.DataFrame:
    """Each adversary's last round."""
    return found[found["round"] == found.groupby("adversary")["round"].transform("max")]


def pictures(found: pd.DataFrame) -> list[str]:
    """Patterns of the names of the pictures of each adversary's strongest attacks in its last round."""
    return [f"attack_{row['adversary']}_{row['attack']}_round{row['round']}_client*.png"
            for row in latest(found).to_dict("records")]


def worst(found: pd.DataFrame) -> dict:
    """A run's row of ``WORST``: the adversaries that did best in their last rounds."""
    last, row = latest(found), dict.fromkeys(WORST)
    for kind, (y, _) in AXES.items():
        part = last[(last["kind"] == kind) & last["score"].notna()]
        if len(part):
            best = part.loc[part[y].idxmax()]
            row[f"{kind}_attack"] = f"{best['adversary']} {best['attack']}"
            row |= ({"image_leakage": best["leakage"], "image_ssim": best["score"]} if kind == "image"
                    else {"class_right": best["score"]})
    return row


def over_seeds(rows: list[dict]) -> dict:
    """Means and standard deviations of ``WORST``, and how many of the seeds were attacked."""
    table = pd.DataFrame(rows, columns=WORST)
    found = {"seeds_attacked": int(table[["image_attack", "class_attack"]].notna().any(axis=1).sum()) or None}
    for name in WORST:
        if name.endswith("attack"):
            found[name] = "; ".join(table[name].dropna().unique())
        else:
            values = table[name].astype(float)
            found |= {name: values.mean(), f"{name}_std": values.std()}
    return found


def beside_utility(run) -> pd.DataFrame:
    """A ``report.Finished``'s condensed rows, and the accuracy and KL of what was deployed by then."""
    deployed = run.rounds[run.rounds["stage"] == "deployed"].set_index("round")
    then = [deployed[deployed.index <= round] for round in run.leaks["round"]]
    utility = {name: [part[name].iloc[-1] if len(part) else np.nan for part in then]
               for name in ("accuracy", "kl_nats")}
    return run.leaks.assign(run=run.name, method=run.options["method"], beta=run.options.get("kl_weight"),
                            **utility)


def picture(rows: pd.DataFrame, kind: str, x: str) -> plt.Figure:
    """A kind's leakage over ``accuracy``, a point an adversary of a run, or over ``round``, a line each."""
    figure, axes = plt.subplots(figsize=(5.2, 4.6), layout="constrained")
    y, label = AXES[kind]
    rows = rows[(rows["kind"] == kind) & rows["score"].notna()].sort_values("round")
    shift = rows["control_score"] if y == "leakage" else 0
    rows = rows.assign(bottom=rows["low"] - shift, top=rows["high"] - shift)
    for (_, adversary, method), part in rows.groupby(["run", "adversary", "method"], sort=False):
        # The adversaries of a run stand at one accuracy: side by side they can be told apart.
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
        for end in ("bottom", "top"):   # what is drawn aside moves no axis of itself
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
    """Where a method's runs differ in beta, each run's: over its points, or right of its lines."""
    several = rows.groupby("method")["beta"].transform("nunique") > 1
    for _, part in rows[several].groupby("run"):
        beta, last = f"β={part['beta'].iloc[0]:g}", part[part["round"] == part["round"].max()]
        if x == "accuracy":
            axes.annotate(beta, (part[x].iloc[0], part["top"].max()), fontsize=7, rotation=90, ha="center",
                          xytext=(0, 4), textcoords="offset points")
        else:
            axes.annotate(beta, (last[x].iloc[0], last[y].max()), fontsize=7, va="center", xytext=(8, 0),
                          textcoords="offset points")
    if several.any():   # room for them
        axes.margins(x=0.05 if x == "accuracy" else 0.2, y=0.2)


def _legend(figure: plt.Figure, rows: pd.DataFrame, kind: str) -> None:
    """Below the axes: what shapes, colours and rings mean."""
    shapes = [plt.Line2D([], [], linestyle="", marker=mark, color="dimgrey", label=name.replace("_", " "))
              for name, mark in MARKERS.items() if name in set(rows["adversary"])]
    colours = [plt.Line2D([], [], linewidth=5, color=colour, label=name)
               for name, colour in COLOURS.items() if name in set(rows["method"])]
    ring = [plt.Line2D([], [], linestyle="", marker="o", markersize=11, markerfacecolor="none",
                   markeredgecolor="black", label="rank under every control's")]
    ring *= int(kind == "image" and (rows["rank"] < rows["control_rank"]).any())
    figure.legend(handles=[*shapes, *colours, *ring], loc="outside lower center", ncols=3, fontsize=8.5)
