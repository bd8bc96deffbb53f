"""The tables that an attack writes: the names of their columns, how attack.csv is read, and its summary."""
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from runs.csvs import read_csv
from utils import rng


class Unit(NamedTuple):
    """One attack by one adversary on one client after one round: columns of attack.csv.

    Attributes:
        observed: what an attack on latents sees of them (``--observe``); "" for other attacks.
    """

    adversary: str
    attack: str
    round: int
    client: int
    observed: str = ""

    @property
    def words(self) -> str:
        """The attack's name, and what it observes unless that is one draw of z."""
        return self.attack if self.observed in ("", "z") else f"{self.attack} ({self.observed})"

    @property
    def picture(self) -> str:
        """The file name of the attack's picture."""
        observed = "" if self.observed in ("", "z") else f"_{self.observed}"
        return f"attack_{self.adversary}_{self.attack}{observed}_round{self.round}_client{self.client}.png"


METRICS = ["mse", "psnr", "ssim", "label_match", "evaluator_correct", "nearest_rank", "class_rank",
           "feature_distance", "knn_distance", "identified"]
ATTACK_COLUMNS = [*Unit._fields, "label", "image", "restart", "control", *METRICS, "guess", "class_size",
                  "kl_nats"]
WHOLE_NUMBERS = ["round", "client", "label", "image", "restart"]   # columns of attack.csv
SUMMARY_KEY = ["adversary", "attack", "round", "observed", "control"]
FOREIGN = "foreign"   # the control of attacks on images: what the attack makes of another image of the class
WORST = 0.02          # share of images with the highest KL that are shown apart


def read_attack(path: Path) -> pd.DataFrame:
    """An ``attack.csv``: one row for each reconstruction, whose ``control`` is "", and for each control.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not what mi_attack.py writes.
    """
    rows = read_csv(path, keep_default_na=False, na_values=[""], dtype={"control": str, "observed": str})
    if missing := [name for name in ATTACK_COLUMNS if name not in rows]:
        raise ValueError(f"no column {missing[0]}; attack the run again")
    rows = rows[ATTACK_COLUMNS]
    numbers = [name for name in ATTACK_COLUMNS if name not in ("adversary", "attack", "observed", "control")]
    if ({rows[name].dtype.kind for name in WHOLE_NUMBERS} != {"i"}
            or not {rows[name].dtype.kind for name in numbers} <= {"i", "f"}):
        raise ValueError("a column holds something else than numbers")
    return rows.fillna({"control": "", "observed": ""})


def worst_identified(rows: pd.DataFrame) -> float:
    """The share identified of the ``WORST`` images by KL, at least one; not a number without KL."""
    known = rows[rows["kl_nats"].notna()]
    return known.nlargest(max(1, round(WORST * len(known))), "kl_nats")["identified"].mean()


def interval(values: np.ndarray, draws: int = 1000) -> tuple[float, float]:
    """The 95 % bootstrap interval of a mean over images. Its draws are seeded, so it is always the same."""
    picks = rng(0, "bootstrap").integers(len(values), size=(draws, len(values)))
    low, high = np.quantile(values[picks].mean(1), (0.025, 0.975))
    return float(low), float(high)


def summarise(rows: Sequence[dict]) -> pd.DataFrame:
    """Means over images with 95 % bootstrap intervals: of each attack's first choices, and of each control.

    Args:
        rows: as in attack.csv.
    """
    table = pd.DataFrame(rows, columns=ATTACK_COLUMNS)
    table = table[(table["restart"] == 0) | (table["control"] != "")]
    found = []
    for key, part in table.groupby(SUMMARY_KEY, sort=False):
        row: dict[str, object] = {**dict(zip(SUMMARY_KEY, key, strict=True)), "n": len(part)}
        for name in METRICS:
            values = part[name].to_numpy(float)
            low, high = interval(values)
            row |= {name: values.mean(), f"{name}_low": low, f"{name}_high": high}
        found.append({**row, "guess": part["guess"].mean(), "identified_worst": worst_identified(part)})
    return pd.DataFrame(found)
