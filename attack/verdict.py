"""The tables that an attack writes, and the word for it: ``leaks`` or ``as a guess``."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from utils import Late, rng

if TYPE_CHECKING:
    import pandas as pd

    from attack.attacks import Attack
else:
    pd = Late("pandas")


class Unit(NamedTuple):
    """One attack by one adversary on one client after one round, and what it observes of latents: columns."""

    adversary: str
    attack: str
    round: int
    client: int
    observed: str = ""

    @property
    def words(self) -> str:
        """The attack's name, and what it observes of a latent."""
        return f"{self.attack} ({self.observed})" if self.observed else self.attack

    @property
    def picture(self) -> str:
        """The file name of the attack's picture."""
        observed = "" if self.observed in ("", "z") else f"_{self.observed}"
        return f"attack_{self.adversary}_{self.attack}{observed}_round{self.round}_client{self.client}.png"


TEXTS = ["adversary", "attack", "observed", "control"]   # all other columns are numbers
WHOLE_NUMBERS = ["round", "client", "label", "image", "restart"]
METRICS = ["mse", "psnr", "ssim", "label_match", "evaluator_correct", "nearest_rank", "class_rank",
           "feature_distance", "knn_distance", "identified"]
ATTACK_COLUMNS = [*Unit._fields, "label", "image", "restart", "control", *METRICS, "guess", "class_size",
                  "kl_nats"]
SUMMARY_KEY = ["adversary", "attack", "round", "observed", "control"]
FOREIGN = "foreign"   # the control of attacks on images: what the attack makes of another image of the class
WORST = 0.02          # share of images with the highest KL that are shown apart
FALSE_POSITIVE_RATES = (0.001, 0.01)   # of attacks on membership
LEAKS, GUESS = "leaks", "as a guess"
WORDS = (LEAKS, GUESS)   # the worst for the victim first
LOWER_IS_BETTER = ("class_rank",)
DRAWS = 1000     # of the bootstrap
LEVEL = 0.05     # the greatest rate at which an attack that knows nothing is called a leak
EXACT = 12       # images up to which all signs are tried
SIGNS = 10_000   # drawn for more images


def read_attack(path: Path, columns: Sequence[str] = ATTACK_COLUMNS) -> pd.DataFrame:
    """Read ``attack.csv`` or a table with other columns; ValueError if it is not what the command writes."""
    texts = [name for name in columns if name in TEXTS]
    rows = pd.read_csv(path, keep_default_na=False, na_values=[""], dtype=dict.fromkeys(texts, str))
    if missing := [name for name in columns if name not in rows]:
        raise ValueError(f"no column {missing[0]}; attack the run again")
    rows = rows[list(columns)]
    kinds = {name: "i" if name in WHOLE_NUMBERS else "if" for name in columns if name not in TEXTS}
    if not all(rows[name].dtype.kind in kind for name, kind in kinds.items()):
        raise ValueError("a column holds something else than numbers")
    return rows.fillna(dict.fromkeys(texts, ""))


def worst_identified(rows: pd.DataFrame) -> float:
    """Return the share identified of the ``WORST`` images by KL, at least one; not a number without KL."""
    known = rows[rows["kl_nats"].notna()]
    return known.nlargest(max(1, round(WORST * len(known))), "kl_nats")["identified"].mean()


def summarise(rows: Sequence[dict]) -> pd.DataFrame:
    """Return means over images with 95 % bootstrap intervals, of each attack's first choices and each control."""
    table = pd.DataFrame(rows, columns=ATTACK_COLUMNS)
    table = table[(table["restart"] == 0) | (table["control"] != "")]
    summary = []
    for key, part in table.groupby(SUMMARY_KEY, sort=False):
        row: dict[str, object] = {**dict(zip(SUMMARY_KEY, key, strict=True)), "n": len(part)}
        picks = rng(0, "bootstrap").integers(len(part), size=(DRAWS, len(part)))
        for name in METRICS:
            values = part[name].to_numpy(float)
            low, high = np.quantile(values[picks].mean(1), (0.025, 0.975))
            row |= {name: values.mean(), f"{name}_low": low, f"{name}_high": high}
        summary.append({**row, "guess": part["guess"].mean(), "identified_worst": worst_identified(part)})
    return pd.DataFrame(summary)


class Comparison(NamedTuple):
    """An attack beside a control by one metric: means over images, and the probability of such an advantage."""

    metric: str
    score: float
    control: str
    control_score: float
    p: float


@dataclass(frozen=True)
class Verdict:
    """The word for an attack of ``count`` images or classes; ``few`` if these are too few for any leak."""

    word: str
    count: int
    few: bool
    comparisons: tuple[Comparison, ...]


def judge(rows: pd.DataFrame, attack: Attack, level: float = LEVEL) -> Verdict:
    """Judge an attack's first choices (restart 0) beside a control, image by image.

    An attack on images is compared by SSIM and rank in the class with what it makes of another image of the class;
    one on classes by the share that the evaluator recognises, with its best control. It ``leaks`` if its advantage
    is significant by a sign-flip test, Bonferroni-corrected, and a choice is better than a guess within the class.
    """
    of_class = attack.kind == "class"
    key = ["client", "label" if of_class else "image"]
    metrics = ["evaluator_correct"] if of_class else ["class_rank"] if attack.chooses else ["ssim", "class_rank"]
    controls = sorted(set(rows["control"]) - {""}) if of_class else [FOREIGN]
    own, *others = _by_image(rows, key, [*metrics, "class_size"], ["", *controls])
    if not own or not others or any(other.keys() != own.keys() for other in others):
        raise ValueError(f"an image does not have the control {' or '.join(controls) or FOREIGN} once")
    # Control (or none), image, metric or size of the class.
    figures = np.array([[table[image] for image in sorted(own)] for table in (own, *others)])
    comparisons = tuple(_compare(metric, figures[0, :, i], dict(zip(controls, figures[1:, :, i], strict=True)))
                        for i, metric in enumerate(metrics))
    level /= len(metrics)
    leaks = any(comparison.p <= level for comparison in comparisons)
    if attack.chooses:
        ranks, sizes = figures[0].T
        leaks &= bool(ranks.mean() < (sizes + 1).mean() / 2)
    return Verdict(LEAKS if leaks else GUESS, len(own), 2.0**-len(own) > level, comparisons)


def _by_image(rows: pd.DataFrame, key: list[str], columns: list[str], controls: list[str]) -> list[dict]:
    """Return columns of first choices ("") and controls, each by client and image, or by client and label."""
    tables: dict[str, dict[tuple, np.ndarray]] = {control: {} for control in controls}
    images = zip(*(rows[name].tolist() for name in key), strict=True)
    for control, restart, image, values in zip(rows["control"], rows["restart"], images,
                                               rows[columns].to_numpy(float), strict=True):
        if control in tables and (control or restart == 0):
            if image in tables[control] or np.isnan(values).any():
                raise ValueError("an image is there twice, or the rows have gaps")
            tables[control][image] = values
    return list(tables.values())


def _compare(metric: str, own: np.ndarray, controls: dict[str, np.ndarray]) -> Comparison:
    """Compare with the control that has the best mean."""
    sign = -1 if metric in LOWER_IS_BETTER else 1
    best = max(controls, key=lambda name: sign * controls[name].mean())
    return Comparison(metric, float(own.mean()), best, float(controls[best].mean()),
                      sign_flip(sign * (own - controls[best])))


def sign_flip(differences: np.ndarray) -> float:
    """Return the one-sided p-value of a sign-flip test of the mean, exact for at most EXACT values."""
    values = differences[differences != 0]
    if len(values) <= EXACT:
        sums = (1 - 2 * (np.arange(2 ** len(values))[:, None] >> np.arange(len(values)) & 1)) @ values
    else:
        draws = rng(0, "signs")
        kept = np.concatenate([draws.integers(2, size=(100, len(values)), dtype=bool).astype(float) @ values
                               for _ in range(SIGNS // 100)])   # the sum of the values whose sign is kept
        sums = np.concatenate([[values.sum()], 2 * kept - values.sum()])
    return float((sums >= values.sum() - 1e-9 * np.abs(values).sum()).mean())
