"""One word for an attack: ``leaks`` or ``as a guess``. mi_attack.py and report.py share it."""
from dataclasses import dataclass

import numpy as np
import pandas as pd

from attack.attacks import Attack
from attack.tables import FOREIGN
from utils import rng

LEAKS, GUESS = "leaks", "as a guess"
WORDS = (LEAKS, GUESS)   # the worst for the victim first
LOWER_IS_BETTER = ("class_rank",)
LEVEL = 0.05     # the greatest rate at which an attack that knows nothing is called a leak
EXACT = 12       # images up to which all signs are tried
SIGNS = 10_000   # drawn for more images


@dataclass(frozen=True)
class Comparison:
    """An attack beside a control that knows nothing of the victim's images, by one metric.

    Attributes:
        score, control_score: means over images.
        control: the control's name.
        p: how probable so great an advantage over the control is where there is none.
    """

    metric: str
    score: float
    control: str
    control_score: float
    p: float


@dataclass(frozen=True)
class Verdict:
    """The word for an attack, and what it rests on.

    Attributes:
        count: how many images, or classes for an attack on classes.
        few: whether these are too few for any attack to be called a leak.
    """

    word: str
    count: int
    few: bool
    comparisons: tuple[Comparison, ...]


def judge(rows: pd.DataFrame, attack: Attack, level: float = LEVEL) -> Verdict:
    """Judge an attack's first choices (restart 0) beside a control, image by image.

    - An attack on images is compared by SSIM and by the rank of the true image among those of its class; one that
      chooses among candidates by the rank alone. The control is ``foreign``: what the same attack makes of another
      image of the class.
    - An attack on classes is compared by the share that the evaluator recognises, with the best of its controls.
      Where the adversary's public images show the classes, these are among them. Then only an attack whose
      pictures are recognised more often than real images counts: the classes themselves are no secret.

    The attack ``leaks`` if its advantage by any metric is significant: if, of all ways to turn the signs of the
    differences, at most a share of ``level``, divided by the number of metrics, has as great a mean. Who chooses
    has to be better than a guess within the class, too. Everything else is ``as a guess``.

    Args:
        rows: of one adversary, attack and round in attack.csv; of one client or of several.
        attack: the attack's row in ``ATTACKS``.

    Raises:
        ValueError: the rows have gaps, or an image does not have a control once.
    """
    of_class = attack.kind == "class"
    key = ["client", "label" if of_class else "image"]
    metrics = ["evaluator_correct"] if of_class else ["class_rank"] if attack.chooses else ["ssim", "class_rank"]
    columns = [*metrics, "class_size"]
    own = _by_image(rows[(rows["control"] == "") & (rows["restart"] == 0)], key, columns)
    names = sorted(set(rows["control"]) - {""}) if of_class else [FOREIGN]
    controls = {name: _by_image(rows[rows["control"] == name], key, columns) for name in names}
    if not len(own) or not controls or not all(one.index.equals(own.index) for one in controls.values()):
        raise ValueError(f"an image does not have the control {' or '.join(names) or FOREIGN} once")
    comparisons = tuple(_compare(metric, own, controls) for metric in metrics)
    level /= len(metrics)
    leaks = any(one.p <= level for one in comparisons)
    if attack.chooses:
        leaks &= bool(own["class_rank"].mean() < (own["class_size"] + 1).mean() / 2)
    return Verdict(LEAKS if leaks else GUESS, len(own), 2.0**-len(own) > level, comparisons)


def _by_image(rows: pd.DataFrame, key: list[str], columns: list[str]) -> pd.DataFrame:
    """Columns of rows, indexed by client and image, or by client and label."""
    table = rows.set_index(key)[columns].astype(float).sort_index()
    if table.index.has_duplicates:
        raise ValueError("an image is there twice")
    if table.isna().any(axis=None):
        raise ValueError("it has gaps")
    return table


def _compare(metric: str, own: pd.DataFrame, controls: dict[str, pd.DataFrame]) -> Comparison:
    sign = -1 if metric in LOWER_IS_BETTER else 1
    best = max(controls, key=lambda name: sign * controls[name][metric].mean())
    advantage = sign * (own[metric] - controls[best][metric]).to_numpy()
    return Comparison(metric, float(own[metric].mean()), best, float(controls[best][metric].mean()),
                      sign_flip(advantage))


def sign_flip(differences: np.ndarray) -> float:
    """The share of all ways to turn the signs of ``N`` differences whose mean is at least the given one.

    It is exact up to ``EXACT`` differences that are not 0, and estimated from ``SIGNS`` seeded draws beyond.
    """
    values = differences[differences != 0]
    if len(values) <= EXACT:
        sums = (1 - 2 * (np.arange(2 ** len(values))[:, None] >> np.arange(len(values)) & 1)) @ values
    else:
        draws = rng(0, "signs")
        sums = np.concatenate([[values.sum()], *(draws.choice([-1.0, 1.0], (100, len(values))) @ values
                                                 for _ in range(SIGNS // 100))])
    return float((sums >= values.sum() - 1e-9 * np.abs(values).sum()).mean())
