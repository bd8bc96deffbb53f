"""What is claimed, by the paper and by this repository, and whether the committed runs bear it out.

A claim is a row of CLAIMS. Its ``measure`` gives a figure for each seed, and the claim holds in a case, mostly a
data set, if every seed's figure is on its bound or on the better side. Two or three seeds give no confidence
interval worth having, so the interval shown is the least and the greatest over seeds.
"""
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean

import pandas as pd

from reporting.measured import SERVER_SCOPES, SHARE, lost_to_oracle, server_cells
from reporting.sources import DASH, csv, grid
from reporting.sources import study as study_runs
from reporting.study import ALONE, FULL, NBAFL, PAPER, RELEASED, SMALL, Key, accuracies, gap, wanted

Measure = Callable[[Path, str], dict[int, float]]   # project's folder, case -> seed -> figure; {} if not run
STUDY = "python benchmarks/study.py"


@dataclass(frozen=True)
class Claim:
    """One claim.

    Args:
        text: with its bound in words.
        whose: "paper" or "ours".
        command: makes the runs.
        cases: data sets, or whatever else it is asked of.
        bounds: by case; the figure that each seed has to reach, or not to exceed if ``at_most``.
        unit: of the figures.
        minutes: how long one run took, by case; None if that was not noted.
    """

    text: str
    whose: str
    command: str
    measure: Measure
    bounds: dict[str, float]
    unit: str = "points"
    at_most: bool = False
    minutes: Callable[[Path, str], float | None] = lambda root, case: None

    def holds(self, case: str, figures: Sequence[float]) -> bool:
        """Whether every seed bears it out."""
        bound, rounded = self.bounds[case], [round(figure, 6) for figure in figures]   # 98 - 90 is 7.999... here
        return all(figure <= bound if self.at_most else figure >= bound for figure in rounded)


def verdict(claim: Claim, found: dict[str, dict[int, float]]) -> str:
    """``holds``, ``holds only for ...``, ``doesn't hold`` or ``not run``, and where it was not run.

    Args:
        found: by case, the figures by seed.
    """
    tried = [case for case in claim.bounds if found[case]]
    good = [case for case in tried if claim.holds(case, list(found[case].values()))]
    if not tried:
        return "not run"
    word = "holds" if good == tried else f"holds only for {', '.join(good)}" if good else "doesn't hold"
    missing = [case for case in claim.bounds if case not in tried]
    return word + (f"; not run: {', '.join(missing)}" if missing else "")


def claims(root: Path) -> list[str]:
    """The table: a row a claim."""
    rows = []
    for claim in CLAIMS:
        found = {case: claim.measure(root, case) for case in claim.bounds}
        minutes = [claim.minutes(root, case) if found[case] else None for case in claim.bounds]
        rows.append([claim.text, claim.whose, f"**{verdict(claim, found)}**",
                     "; ".join(_interval(case, seeds, claim.unit)
                               for case, seeds in found.items() if seeds) or DASH,
                     f"`{claim.command}`",
                     ", ".join(f"{one:.0f}" for one in minutes if one is not None) or DASH])
    return grid(["claim", "whose", "verdict", "mean (least to greatest over seeds)", "command",
                 "minutes a run"], rows)


def _interval(case: str, seeds: dict[int, float], unit: str) -> str:
    values = list(seeds.values())
    between = f" ({min(values):.1f} to {max(values):.1f})" if len(values) > 1 else ""
    return f"{case} {mean(values):.1f}{between} {unit}, seed{'s' * (len(values) > 1)} {', '.join(map(str, seeds))}"


def chosen(root: Path, dataset: str, less: Sequence[str], stage: str) -> tuple[Key, dict[int, float]] | None:
    """RVE-PFL less the better of some labels of the study, under shards; the scale with most seeds, or rounds."""
    found, most = accuracies(root), None
    for key in wanted(found, [dataset]):
        seeds = gap(found[key], less, stage) if key[1] == "shards" else {}
        if seeds and (most is None or len(seeds) >= len(most[1])):
            most = key, seeds
    return most


def over(root: Path, dataset: str, less: Sequence[str], stage: str) -> dict[int, float]:
    """The figures of ``chosen``."""
    most = chosen(root, dataset, less, stage)
    return most[1] if most else {}


def study_minutes(root: Path, dataset: str, less: Sequence[str]) -> float | None:
    """How long RVE-PFL's first run among those of ``chosen`` took."""
    most = chosen(root, dataset, less, "deployed")
    return next((_minutes(one.rounds) for key, label, _, one in study_runs(root)
                 if most and key == most[0] and f"`{label}`" == RELEASED), None)


def _minutes(rounds: pd.DataFrame) -> float:
    return float(rounds.drop_duplicates("round")["seconds"].sum()) / 60


def candidates(root: Path, dataset: str) -> dict[int, float]:
    """The share of images that a thief with candidates identifies at the default beta, %."""
    return _by_seed(frontier(root, dataset, "published", "candidates_identified"))


def frontier(root: Path, dataset: str, setting: str, column: str) -> pd.Series:
    """A column of frontier.csv, %, by seed, of a setting under shards."""
    table = csv(root, "frontier.csv", ["seed", column], ["dataset", "partition", "setting"])
    table = table[(table["dataset"] == dataset) & (table["setting"] == setting) & (table["partition"] == "shards")]
    return 100 * table.set_index("seed")[column]


def class_prior(root: Path, dataset: str, column: str) -> dict[int, float]:
    """With a prior for each class, by seed, %: candidates identified, or accuracy less the published prior's."""
    ours = frontier(root, dataset, CLASS_PRIOR[dataset], column)
    return _by_seed(ours - frontier(root, dataset, "published", column) if column == "deployed" else ours)


def _by_seed(figures: pd.Series) -> dict[int, float]:
    return {int(seed): float(one) for seed, one in figures.dropna().items()}


def robust(root: Path, scope: str) -> dict[int, float]:
    """The most that the threat-aware weights lose to the oracle, by seed."""
    lost = lost_to_oracle(server_cells(root))
    lost = lost[(lost["rule"] == "threat_aware") & (lost["scope"].map(SERVER_SCOPES) == scope) & (lost["frac"] <= SHARE)]
    return {int(seed): float(one) for seed, one in lost.groupby("seed")["lost"].max().items()}


def opened(root: Path, scope: str) -> dict[int, float]:
    """The share of triggered images that a backdoor turns under the threat-aware weights, at worst, by seed, %."""
    table = server_cells(root)
    table = table[(table["rule"] == "threat_aware") & table["backdoor"].notna() & (table["frac"] <= SHARE)
                  & (table["scope"].map(SERVER_SCOPES) == scope)]
    return {int(seed): 100 * float(one) for seed, one in table.groupby("seed")["backdoor"].max().items()}


# The setting of frontier.py with a prior for each class that a data set's page recommends.
CLASS_PRIOR = {"mnist10k": "class prior, beta 1", "fmnist10k": "class prior, beta 1, nearer",
               "cifar10k": "class prior, beta 0.1"}
SCOPES = tuple(SERVER_SCOPES.values())
SERVER, PRIORS = (f"python benchmarks/{name}.py" for name in ("server", "frontier"))
CLAIMS = [
    Claim("as deployed, RVE-PFL is 8, 20 and 59 points ahead of NbAFL on MNIST, Fashion-MNIST and CIFAR-10",
          "paper", STUDY, partial(over, less=NBAFL, stage="deployed"), dict(PAPER),
          minutes=partial(study_minutes, less=NBAFL)),
    Claim("the same, each after a round of local training", "paper", STUDY,
          partial(over, less=NBAFL, stage="trained"), dict(PAPER), minutes=partial(study_minutes, less=NBAFL)),
    Claim("up to 30 % malicious clients cost the threat-aware weights at most 5 points beside the oracle", "ours",
          SERVER, robust, dict.fromkeys(SCOPES, 5.0), at_most=True),
    Claim("a backdoor of theirs turns at most 20 % of triggered images", "ours", SERVER, opened,
          dict.fromkeys(SCOPES, 20.0), "%", at_most=True),
    Claim("training alone is at most a point ahead of RVE-PFL", "ours", STUDY,
          partial(over, less=ALONE, stage="deployed"), dict.fromkeys((*FULL, *SMALL), -1.0),
          minutes=partial(study_minutes, less=ALONE)),
    Claim("at the default beta a thief with candidates identifies at least 90 % of the images", "ours", PRIORS,
          candidates, dict.fromkeys(CLASS_PRIOR, 90.0), "%"),
    Claim("with a prior for each class that thief identifies at most 20 %", "ours", PRIORS,
          partial(class_prior, column="candidates_identified"), dict.fromkeys(CLASS_PRIOR, 20.0), "%",
          at_most=True),
    Claim("a prior for each class costs at most a point of accuracy", "ours", PRIORS,
          partial(class_prior, column="deployed"), dict.fromkeys(CLASS_PRIOR, -1.0)),
]
