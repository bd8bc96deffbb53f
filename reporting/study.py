"""Accuracy over methods, data sets and seeds, from runs whose folders are named as the study names them.

A run is DATASET-PARTITION[-Nclients]-ROUNDSxEPOCHS-LABEL-seedN in results/reference/. What is there is shown, and
a dash where nothing is, so a table grows as runs are committed.
"""
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from statistics import mean, stdev

from reporting.sources import DASH, PARTITIONS, grid, of_images, state, study
from reporting.summary import STAGES, last_round

# The labels of a table's columns, as headings.
MAIN = ("`rve_pfl`", "`local`", "`lg_fedavg`", "`fedper`", "`fedavg`", "`nbafl-L1`", "`nbafl-LT`",
        "`nbafl_prox`")
VARIANTS = ("`local`", "`rve_pfl`", "`class`", "`trunk`", "`trunk-slow`", "`trunk-class`", "`fedper`", "`fedavg`")
RESPLIT = ("`rve_pfl-held_out`", "`rve_pfl-resplit`", "`nbafl-held_out`", "`nbafl-resplit`")
RELEASED, ALONE, NBAFL = "`rve_pfl`", ("`local`",), ("`nbafl-L1`", "`nbafl-LT`", "`nbafl_prox`")
PRIVATE = ("`fedavg`", "`client_dp-8`")
UNEVEN = ("`local`", "`rve_pfl`", "`class`", "`trunk`", "`trunk-slow`", "`fedper`", "`fedavg`", "`nbafl-L1`",
          "`nbafl_prox`")
TWENTY = ("`local`", "`trunk`", "`trunk-slow`", "`fedper`")
FULL, SMALL = ("mnist", "fmnist", "cifar"), ("mnist10k", "fmnist10k", "cifar10k")
PAPER = dict(zip(FULL, (8, 20, 59), strict=True))   # points over NbAFL, shards
Key = tuple[str, str, str]   # data set, partition (and clients), rounds x local epochs
Seeds = dict[int, dict[str, float]]   # seed -> stage -> accuracy


def accuracies(root: Path, per_image: bool = False) -> dict[Key, dict[str, Seeds]]:
    """Held-out accuracy in the last round of every run of the study, by key, label, seed and stage.

    Args:
        per_image: the share of all clients' test images, instead of the mean over clients, and only of runs under
            Dirichlet, where clients have different numbers of them.
    """
    return _accuracies(root, per_image, state(root))


@cache
def _accuracies(root: Path, per_image: bool, changed: tuple) -> dict[Key, dict[str, Seeds]]:
    """``accuracies``, once for each state of the runs: most tables and claims begin with it."""
    found = dict[Key, dict[str, Seeds]]()
    for key, label, seed, run in study(root):
        if per_image and key[1] != "dirichlet":
            continue
        ends = {stage: last_round(run, stage)["accuracy"] for stage in STAGES}
        found.setdefault(key, {}).setdefault(f"`{label}`", {})[seed] = {
            stage: of_images(root, run, stage) if per_image else float(end.iloc[0])
            for stage, end in ends.items() if len(end)}
    return found


def wanted(keys: Iterable[Key], datasets: Sequence[str]) -> list[Key]:
    """The keys of some data sets, in the order of these and of PARTITIONS."""
    def place(key: Key) -> tuple:
        partition = key[1].split("-")[0]
        scale = [int(one) for one in key[2].split(" x ")]
        return datasets.index(key[0]), PARTITIONS.index(partition), key[1], scale
    return sorted((key for key in keys if key[0] in datasets), key=place)


def accuracy(root: Path, datasets: Sequence[str], labels: Sequence[str], many: bool = False,
             per_image: bool = False) -> list[str]:
    """``deployed / trained``, a row a data set and partition, a column a label.

    Args:
        many: the runs whose names say how many clients they have, instead of the others.
        per_image: as in ``accuracies``.
    """
    found, rows = accuracies(root, per_image), []
    for key in wanted(found, datasets):
        by = [found[key].get(label, {}) for label in labels]
        if any(by) and key[1].endswith("clients") == many:
            rows.append([*_names(key), *(" / ".join(_over(seeds, stage) for stage in STAGES) if seeds else DASH
                                         for seeds in by)])
    return grid(["data set, partition, rounds", *labels],
                rows or [[DASH] * (len(labels) + 1)])


def _names(key: Key) -> list[str]:
    return [f"`{key[0]}`, {key[1]}, {key[2]}"]


def _over(seeds: Seeds, stage: str) -> str:
    """A mean over seeds; with several also the deviation and how many they are."""
    return spread([stages[stage] for stages in seeds.values() if stage in stages], ".3f")


def spread(values: Sequence[float], form: str) -> str:
    """Mean ± standard deviation and the number of values; one value stands alone, and none is a dash."""
    if not values:
        return DASH
    centre = format(mean(values), form)
    return centre if len(values) < 2 else f"{centre} ± {format(stdev(values), form.lstrip('+'))} ({len(values)})"


def gap(by: Mapping[str, Seeds], less: Sequence[str], stage: str) -> dict[int, float]:
    """By seed, RVE-PFL's accuracy less the best of some labels' in the same seed, in points.

    Seeds in which one of these labels was not run are left out, since their best would be of fewer.
    """
    best = best_of(by, less, stage)
    return {seed: 100 * (own[stage] - best[seed]) for seed, own in by.get(RELEASED, {}).items()
            if stage in own and seed in best}


def best_of(by: Mapping[str, Seeds], labels: Sequence[str], stage: str) -> dict[int, float]:
    """By seed, the best accuracy of those of some labels that were run; seeds in which one is missing are not."""
    there = [by[label] for label in labels if by.get(label)]
    return {seed: max(one[seed][stage] for one in there) for seed in (there[0] if there else ())
            if all(stage in one.get(seed, {}) for one in there)}


def headline(root: Path) -> list[str]:
    """RVE-PFL beside the best NbAFL with two classes a client, as deployed and fine-tuned, and the paper's gap.

    All figures of a row are of the same seeds. 10,000 images stand in for a data set that was not run in full.
    """
    found, rows, shown = accuracies(root), [], set[str]()
    for key in wanted(found, (*FULL, *SMALL)):
        by, name = found[key], key[0].removesuffix("10k")
        lead = {stage: gap(by, NBAFL, stage) for stage in STAGES}
        if key[1] == "shards" and lead["deployed"] and (key[0] == name or name not in shown):
            shown.add(name)
            cells = [spread([by[RELEASED][seed]["deployed"] for seed in lead["deployed"]], ".3f")]
            for stage, ahead in lead.items():
                best = best_of(by, NBAFL, stage)
                cells += [spread([best[seed] for seed in ahead], ".3f"), spread(list(ahead.values()), "+.1f")]
            rows.append([f"`{key[0]}`, {key[2]}", *cells, f"+{PAPER[name]}"])
    head = ["two classes a client", "RVE-PFL, deployed", "NbAFL, deployed", "gap, points", "NbAFL, fine-tuned",
            "gap, fine-tuned", "the paper's gap"]
    return grid(head, rows or [[DASH] * len(head)])


def gaps(root: Path, datasets: Sequence[str]) -> list[str]:
    """RVE-PFL less NbAFL (the best of its settings in each seed) and less training alone, seed by seed."""
    found, rows = accuracies(root), []
    for key in wanted(found, datasets):
        cells = [spread(list(gap(found[key], less, stage).values()), "+.1f")
                 for less in (NBAFL, ALONE) for stage in STAGES]
        if set(cells) != {DASH}:
            paper = f"+{PAPER[key[0]]}" if key[0] in PAPER and key[1] == "shards" else DASH
            rows.append([*_names(key), *cells[:2], paper, *cells[2:]])
    head = ["points", "over NbAFL, `deployed`", "over NbAFL, `trained`", "over NbAFL, the paper",
            "over `local`, `deployed`", "over `local`, `trained`"]
    return grid(head, rows or [[DASH] * len(head)])


STUDY: dict[str, Callable[[Path], list[str]]] = {
    "accuracy": partial(accuracy, datasets=FULL, labels=MAIN),
    "accuracy-small": partial(accuracy, datasets=SMALL, labels=MAIN),
    "accuracy-variants": partial(accuracy, datasets=SMALL, labels=VARIANTS),
    "accuracy-images": partial(accuracy, datasets=SMALL, labels=UNEVEN, per_image=True),
    "headline": headline,
    "accuracy-dp": partial(accuracy, datasets=SMALL, labels=PRIVATE, many=True),
    "accuracy-twenty": partial(accuracy, datasets=SMALL, labels=TWENTY, many=True),
    "accuracy-resplit": partial(accuracy, datasets=(*FULL, *SMALL), labels=RESPLIT),
    "gaps": partial(gaps, datasets=FULL), "gaps-small": partial(gaps, datasets=SMALL)}
