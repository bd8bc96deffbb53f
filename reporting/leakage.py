"""Condense a run's attack.csv to each adversary's strongest attacks, beside their controls.

An *image* attack observes something of single images. Its control is the same attack on another image of the
class. The strongest has the largest mean difference in SSIM; beside it stands the one that identifies most
images. A *class* attack draws a class. The strongest is the one that the independent evaluator recognises
most often.
"""
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import pandas as pd

from attack.adversaries import ADVERSARIES
from attack.attacks import ATTACKS
from attack.verdict import FOREIGN, LEVEL, WORDS, Unit, Verdict, judge, read_attack, worst_identified
from utils import shown

KINDS = ("image", "class")
COLUMNS = ["adversary", "round", "kind", "attack", "pictures", "n", "score", "control_score", "rank_attack",
           "rank", "control_rank", "identified", "control_identified", "identified_worst", "word", "few"]
NONE = pd.DataFrame(columns=COLUMNS)
WORST = ["image_leakage", "image_ssim", "image_attack", "class_right", "class_attack"]   # of summary.csv


class Attacked(Protocol):
    """A run with condensed attacks."""

    @property
    def leaks(self) -> pd.DataFrame: ...


def read(folder: Path) -> pd.DataFrame:
    """Return a run's ``attack.csv``, condensed; no rows if the run was not attacked.

    Raises:
        OSError, ValueError: it is not what mi_attack.py writes.
    """
    path = folder / "attack.csv"
    if not path.exists():
        return NONE
    rows = read_attack(path)
    for column, known in (("adversary", ADVERSARIES), ("attack", ATTACKS)):
        if foreign := set(rows[column]) - set(known):
            raise ValueError(f"{column} {shown(foreign.pop())} is unknown")
    return condense(rows)


def condense(rows: pd.DataFrame) -> pd.DataFrame:
    """Return one row for each adversary and kind of attack, of the last round that the adversary attacked.

    The verdict is the word that is worst for the victim. Each attack is judged at a level divided by the number of
    attacks, so that together they call a guess a leak no more often than one would.
    """
    rows = rows[rows["round"] == rows.groupby("adversary")["round"].transform("max")]
    rows, condensed = rows.assign(kind=[ATTACKS[name].kind for name in rows["attack"]]), []
    for (adversary, round, kind), part in rows.groupby(["adversary", "round", "kind"], sort=False):
        attacks = {Unit(adversary, attack, int(round), 0, observed): own
                   for (attack, observed), own in part.groupby(["attack", "observed"], sort=False)}
        verdicts = {unit: judge(own, ATTACKS[unit.attack], LEVEL / len(attacks)) for unit, own in attacks.items()}
        worst = min(verdicts.values(), key=lambda verdict: (WORDS.index(verdict.word), verdict.few))
        shows = {unit: verdict for unit, verdict in verdicts.items() if not ATTACKS[unit.attack].chooses}
        row = {"adversary": adversary, "round": int(round), "kind": kind, "word": worst.word, "few": worst.few,
               "n": worst.count, **strongest(shows, kind)}
        condensed.append(row | identified(attacks) if kind == "image" else row)
    return pd.DataFrame(condensed, columns=COLUMNS)


def strongest(verdicts: dict[Unit, Verdict], kind: str) -> dict[str, object]:
    """Return the columns about the attack that shows most; none if all only choose among candidates."""
    if not verdicts:
        return {}
    first = {unit: verdict.comparisons[0] for unit, verdict in verdicts.items()}
    unit = max(first, key=lambda unit: first[unit].score - (first[unit].control_score if kind == "image" else 0))
    return {"attack": unit.words, "pictures": unit.picture.replace("client0", "client*"),
            "score": first[unit].score, "control_score": first[unit].control_score}


def identified(attacks: dict[Unit, pd.DataFrame]) -> dict[str, object]:
    """Return the columns about the attack that identifies most images."""
    own = {unit: part[(part["control"] == "") & (part["restart"] == 0)] for unit, part in attacks.items()}
    best = max(own, key=lambda unit: (own[unit]["identified"].mean(), -own[unit]["class_rank"].mean()))
    foreign = attacks[best][attacks[best]["control"] == FOREIGN]
    return {"rank_attack": best.words, "rank": own[best]["class_rank"].mean(),
            "control_rank": foreign["class_rank"].mean(), "identified": own[best]["identified"].mean(),
            "control_identified": foreign["identified"].mean(), "identified_worst": worst_identified(own[best])}


def worst(rows: pd.DataFrame) -> dict[str, object]:
    """Return a run's ``WORST``: what its best adversary of each kind found, or None."""
    row = dict[str, object](dict.fromkeys(WORST))
    image, drawn = (rows[(rows["kind"] == kind) & rows["score"].notna()] for kind in KINDS)
    if len(image):
        best = image.iloc[int((image["score"] - image["control_score"]).astype(float).argmax())]
        row |= {"image_leakage": best["score"] - best["control_score"], "image_ssim": best["score"],
                "image_attack": f"{best['adversary']} {best['attack']}"}
    if len(drawn):
        best = drawn.iloc[int(drawn["score"].astype(float).argmax())]
        row |= {"class_right": best["score"], "class_attack": f"{best['adversary']} {best['attack']}"}
    return row


def over_seeds(rows: list[dict]) -> dict[str, object]:
    """Return means and standard deviations of ``WORST`` over seeds, and how many of the seeds were attacked."""
    table = pd.DataFrame(rows, columns=WORST)
    attacked = int(table[["image_attack", "class_attack"]].notna().any(axis=1).sum())
    means: dict[str, object] = {"seeds_attacked": attacked or None}
    for name in WORST:
        if name.endswith("attack"):
            means[name] = "; ".join(table[name].dropna().unique())
        else:
            values = table[name].astype(float)
            means |= {name: values.mean(), f"{name}_std": values.std()}
    return means


class OverSeeds(NamedTuple):
    """The worst word over seeds, how many runs have it and were attacked, and whether all have few images."""

    word: str
    having: int
    attacked: int
    few: bool


def words_over_seeds(runs: Sequence[Attacked], adversary: str) -> dict[str, OverSeeds]:
    """Return what leaked to an adversary by each kind of attack that it ran."""
    rows, leaked = pd.concat([run.leaks[run.leaks["adversary"] == adversary] for run in runs]), {}
    for kind in KINDS:
        same = rows[rows["kind"] == kind]
        if len(same):
            word = next(word for word in WORDS if word in set(same["word"]))
            having = same[same["word"] == word]
            leaked[kind] = OverSeeds(word, len(having), len(same), bool(having["few"].all()))
    return leaked
