"""One word for an attack: ``leaks``, ``as a guess`` or ``fails``. mi_attack.py and report.py share it."""
from dataclasses import dataclass

import pandas as pd

from attack.attacks import Attack
from attack.tables import BLANK_CONTROLS, BLIND_CONTROLS, METRICS, interval

LEAKS, GUESS, FAILS = "leaks", "as a guess", "fails"
WORDS = (LEAKS, GUESS, FAILS)   # the worst for the victim first
LOWER_IS_BETTER = ("nearest_rank",)
FEW = 6   # below, chance alone puts all images on one side more often than in 1 case of 40 (2**-5 > 0.025)


@dataclass(frozen=True)
class Comparison:
    """An attack beside the best control that knows nothing of the victim's images, by one metric.

    Attributes:
        score, control_score: means over images.
        control: the control's name.
        low, high: 95 % bootstrap interval of the attack's mean advantage over the control, image by image. It
            is positive where the attack is better, also for a rank, where less is better.
    """

    metric: str
    score: float
    control: str
    control_score: float
    low: float
    high: float


@dataclass(frozen=True)
class Verdict:
    """The word for an attack, and what it rests on.

    Attributes:
        count: how many images, or classes for an attack on classes.
    """

    word: str
    count: int
    comparisons: tuple[Comparison, ...]

    @property
    def few(self) -> bool:
        """Whether so few images or classes were attacked that chance alone could have given the word."""
        return self.count < FEW


def judge(rows: pd.DataFrame, attack: Attack) -> Verdict:
    """Judge an attack's first choices (restart 0) beside the controls that know nothing of the victim.

    An attack on single images is compared by SSIM and by the rank of the true image; one that chooses among
    candidates, by the rank alone. The controls are grey, noise and the class mean. An attack on classes is
    compared by the share that the evaluator recognises, and the controls are grey and noise. The control
    ``nearest_public`` knows the true image, so it does not count. For each metric, the control with the best
    mean counts. The difference is taken image by image, and its mean gets a 95 % bootstrap interval.

    - ``leaks``: for at least one metric, the whole interval is on the attack's better side.
    - ``fails``: for every metric, the whole interval is on its worse side. A control would have done better.
    - ``as a guess``: anything else, so also where one metric is worse and the other is level.

    Args:
        rows: of one adversary, attack and round in attack.csv; of one client or of several.
        attack: the attack's row in ``ATTACKS``.

    Raises:
        ValueError: the rows have gaps, or an image does not have each control once.
    """
    of_class = attack.kind == "class"
    key = ["client", "label" if of_class else "image"]
    own = _by_image(rows[(rows["control"] == "") & (rows["restart"] == 0)], key)
    controls = {name: _by_image(rows[rows["control"] == name], key)
                for name in (BLANK_CONTROLS if of_class else BLIND_CONTROLS)}
    if not len(own) or not all(one.index.equals(own.index) for one in controls.values()):
        raise ValueError("an image does not have each control once")
    metrics = ["evaluator_correct"] if of_class else ["nearest_rank"] if attack.chooses else [
        "ssim", "nearest_rank"]
    comparisons = tuple(_compare(metric, own, controls) for metric in metrics)
    if any(one.low > 0 for one in comparisons):
        word = LEAKS
    elif all(one.high < 0 for one in comparisons):
        word = FAILS
    else:
        word = GUESS
    return Verdict(word, len(own), comparisons)


def _by_image(rows: pd.DataFrame, key: list[str]) -> pd.DataFrame:
    """The metrics of rows, indexed by client and image, or by client and label."""
    table = rows.set_index(key)[METRICS].astype(float).sort_index()
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
                      *interval(advantage))
