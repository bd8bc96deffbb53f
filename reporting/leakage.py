"""Condense a run's attack.csv to each adversary's strongest attacks, beside their controls.

An *image* attack observes something of single images. Its control is the same attack on another image of the
class. The strongest has the largest mean difference in SSIM; beside it stands the one that identifies most
images. A *class* attack draws a class. The strongest is the one that the independent evaluator recognises
most often.
"""
from __future__ import annotations

from math import nan
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attack.attacks import ADVERSARIES, ATTACKS
from attack.verdict import FOREIGN, LEAKS, LEVEL, WORDS, Unit, Verdict, judge, read_attack, worst_identified
from utils import shown

if TYPE_CHECKING:
    import pandas as pd

# Of attacks on classes, and where all attacks only choose among candidates, some of a row are missing.
MISSING = {"attack": "", "pictures": "", "score": nan, "control_score": nan, "rank_attack": "", "rank": nan,
           "control_rank": nan, "identified": nan, "control_identified": nan, "identified_worst": nan}


def read(folder: Path) -> list[dict[str, Any]]:
    """Return a run's ``attack.csv``, condensed.

    Raises:
        OSError, ValueError: it is not what mi_attack.py writes.
    """
    rows = read_attack(folder / "attack.csv")
    for column, known in (("adversary", ADVERSARIES), ("attack", ATTACKS)):
        if unknown := set(rows[column]) - set(known):
            raise ValueError(f"{column} {shown(unknown.pop())} is unknown")
    condensed = condense(rows)
    for row in condensed:
        row["pictures"] = sorted(path.name for path in folder.glob(row["pictures"] or "no picture"))
    return condensed


def condense(rows: pd.DataFrame) -> list[dict[str, Any]]:
    """Return one row for each adversary and kind of attack, of the last round that the adversary attacked.

    The verdict is the word that is worst for the victim. Each attack is judged at a level divided by the number of
    attacks, so that together they call a guess a leak no more often than one would.
    """
    rows = rows[rows["round"] == rows.groupby("adversary")["round"].transform("max")]
    rows, condensed = rows.assign(kind=[ATTACKS[name].kind for name in rows["attack"]]).copy(), []
    for (adversary, round, kind), part in rows.groupby(["adversary", "round", "kind"], sort=False):
        attacks = {Unit(adversary, attack, int(round), 0, observed): attack_rows
                   for (attack, observed), attack_rows in part.groupby(["attack", "observed"], sort=False)}
        verdicts = {unit: judge(attack_rows, ATTACKS[unit.attack], LEVEL / len(attacks))
                    for unit, attack_rows in attacks.items()}
        worst = min(verdicts.values(), key=lambda verdict: (WORDS.index(verdict.word), verdict.few))
        condensed.append({"adversary": adversary, "round": int(round), "kind": kind, "word": worst.word,
                          "leaks": worst.word == LEAKS, "few": worst.few, "n": worst.count, **MISSING,
                          **strongest(verdicts, kind), **(identified(attacks) if kind == "image" else {})})
    return condensed


def strongest(verdicts: dict[Unit, Verdict], kind: str) -> dict[str, Any]:
    """Return the columns about the attack that shows most; none if all only choose among candidates."""
    first = {unit: verdict.comparisons[0] for unit, verdict in verdicts.items()
             if not ATTACKS[unit.attack].chooses}
    if not first:
        return {}
    unit = max(first, key=lambda unit: first[unit].score - (first[unit].control_score if kind == "image" else 0))
    return {"attack": unit.words, "pictures": unit.picture.replace("client0", "client*"),
            "score": first[unit].score, "control_score": first[unit].control_score}


def identified(attacks: dict[Unit, pd.DataFrame]) -> dict[str, Any]:
    """Return the columns about the attack that identifies most images."""
    own = {unit: rows[(rows["control"] == "") & (rows["restart"] == 0)] for unit, rows in attacks.items()}
    best = max(own, key=lambda unit: (own[unit]["identified"].mean(), -own[unit]["class_rank"].mean()))
    foreign = attacks[best][attacks[best]["control"] == FOREIGN]
    return {"rank_attack": best.words, "rank": own[best]["class_rank"].mean(),
            "control_rank": foreign["class_rank"].mean(), "identified": own[best]["identified"].mean(),
            "control_identified": foreign["identified"].mean(), "identified_worst": worst_identified(own[best])}
