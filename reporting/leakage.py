"""Condense a run's attack.csv to each adversary's strongest attacks, beside their controls.

An *image* attack observes something of single images. Its control is the same attack on another image of the
class. The strongest has the largest mean difference in SSIM; beside it stands the one that identifies most
images. A *class* attack draws a class. The strongest is the one that the independent evaluator recognises
most often.
"""
from pathlib import Path
from typing import Any

import pandas as pd

from attack.attacks import ADVERSARIES, ATTACKS
from attack.verdict import FOREIGN, LEVEL, WORDS, Unit, Verdict, judge, read_attack, worst_identified
from utils import shown

COLUMNS = ["adversary", "round", "kind", "attack", "pictures", "n", "score", "control_score", "rank_attack",
           "rank", "control_rank", "identified", "control_identified", "identified_worst", "word", "few"]
NONE = pd.DataFrame(columns=COLUMNS)


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
        if unknown := set(rows[column]) - set(known):
            raise ValueError(f"{column} {shown(unknown.pop())} is unknown")
    return condense(rows)


def condense(rows: pd.DataFrame) -> pd.DataFrame:
    """Return one row for each adversary and kind of attack, of the last round that the adversary attacked.

    The verdict is the word that is worst for the victim. Each attack is judged at a level divided by the number of
    attacks, so that together they call a guess a leak no more often than one would.
    """
    rows = rows[rows["round"] == rows.groupby("adversary")["round"].transform("max")]
    rows, condensed = rows.assign(kind=[ATTACKS[name].kind for name in rows["attack"]]), []
    for (adversary, round, kind), part in rows.groupby(["adversary", "round", "kind"], sort=False):
        attacks = {Unit(adversary, attack, int(round), 0, observed): attack_rows
                   for (attack, observed), attack_rows in part.groupby(["attack", "observed"], sort=False)}
        verdicts = {unit: judge(attack_rows, ATTACKS[unit.attack], LEVEL / len(attacks))
                    for unit, attack_rows in attacks.items()}
        worst = min(verdicts.values(), key=lambda verdict: (WORDS.index(verdict.word), verdict.few))
        row = {"adversary": adversary, "round": int(round), "kind": kind, "word": worst.word, "few": worst.few,
               "n": worst.count, **strongest(verdicts, kind)}
        condensed.append(row | identified(attacks) if kind == "image" else row)
    return pd.DataFrame(condensed, columns=COLUMNS)


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
