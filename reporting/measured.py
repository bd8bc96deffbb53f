"""The tables of docs/ that come from docs/*.csv and from attacked runs of results/reference/.

A function a table; it takes the project's folder and gives the table's lines. What stands in which column is data
above it. Figures are rounded here and nowhere else.
"""
import itertools
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import pandas as pd

from attack.attacks import ATTACKS
from attack.verdict import FOREIGN, LEAKS, Unit, judge, worst_identified
from methods import HEAD_LR, METHODS
from reporting.sources import DASH, PARTITIONS, REFERENCE, attacked, csv, grid, of_images
from reporting.sources import run as finished

# docs/attacks.md: the ladder's rungs, and its runs with what is said of each.
RUNGS = {"own": "own", "private": "private", "aligned many": "many", "aligned": "aligned", "public": "public",
         "replayed": "replayed", "other": "other"}
LADDER = {"m10-all-rve-s1": "beta 1e-5", "m10-rve-1e-5-s1": "beta 1e-5", "m10-rve-1e-4-s1": "beta 1e-4",
          "m10-rve-1e-3-s1": "beta 1e-3", "m10-lg-s1": "`lg_fedavg`", "ck-lg-s1": "CIFAR-10, `lg_fedavg`"}
CONDITIONED = {"m10-lg-s1": "`mnist10k`, `lg_fedavg`", "ck-fedavg-s1": "`cifar10k`, `fedavg`",
               "ck-lg-s1": "`cifar10k`, `lg_fedavg`"}

# docs/attacks.md: which classes a client has.
UPLOADS = {"m10-fedavg": "`fedavg`", "m10-dropout": "`dropout`", "m10-dp": "`client_dp`", "m10-lg": "`lg_fedavg`",
           "m10-rve-1e-5": "`rve_pfl`, beta 1e-5", "m10-rve-1e-4": "`rve_pfl`, beta 1e-4",
           "m10-rve-1e-3": "`rve_pfl`, beta 1e-3", "m10-nbafl": "`nbafl`, L = 1", "m10-nbaflT": "`nbafl`, L = T",
           "m10-dir-fedavg": "`fedavg`, Dirichlet", "m10-dir-rve": "`rve_pfl`, Dirichlet",
           "m10-dir-nbafl": "`nbafl`, L = 1, Dirichlet"}

# docs/real_uploads.md: other seeds and data sets.
OTHER_UPLOADS = {"m10-iid-fedavg-s2": "`mnist10k`, IID, seed 2",
                 "m10-fedavg-s2": "`mnist10k`, two classes, seed 2",
                 "fm-fedavg-s1": "Fashion-MNIST, two classes", "ck-fedavg-s1": "CIFAR-10, two classes"}

# docs/membership.md.
MEMBERS = {"m10-iid-fedavg": "`fedavg`, IID", "m10-fedavg": "`fedavg`, two classes", "m10-lg": "`lg_fedavg`",
           "m10-rve-1e-5": "`rve_pfl`, beta 1e-5", "m10-rve-1e-3": "`rve_pfl`, beta 1e-3"}
ASKED = {("stolen_model", "loss"): "`loss`, stolen model", ("prediction_api", "loss"): "`loss`, service",
         ("curious_server", "fedmia"): "`fedmia`"}

SETTINGS = {"published": "default prior", "trunk": "`rve_pfl_trunk`", "warm": "`--full_sharing_rounds 2`",
            "class prior, beta 1": "`--prior class`, beta 1", "class prior, beta 0.1": "`--prior class`, beta 0.1",
            "class prior, beta 1, nearer": "`--prior class`, beta 1, `--prior_apart 0.25`",
            "class prior, beta 0.1, nearer": "`--prior class`, beta 0.1, `--prior_apart 0.25`"}
FRONTIER_IMAGES = 16   # attacked in each run
RULES = ("threat_aware", "mean", "median", "caf")
OTHERS = ("threat_aware", "trimmed_mean", "krum", "multi_krum", "nnm_trimmed_mean", "geometric_median",
          "centered_clipping", "norm_clipping")
BEHAVED = ["scope", "behaviour"]
SHARE = 0.3   # of malicious clients, in the tables by behaviour
SERVER_SCOPES = {"heads": "heads", "models": "whole models"}


def leakage(root: Path) -> list[str]:
    """What attacks on images found, a row for the seeds of a run and each attack; no line if there are none.

    SSIM and ranks are means over images of all clients and seeds, each with the foreign control's.
    """
    found = dict[tuple[str, Unit], list[pd.DataFrame]]()
    for path in sorted((root / REFERENCE).glob("*/attack.csv")):
        table = attacked(path.parent)
        stem = re.sub(r"-s(?:eed)?\d+$", "", path.parent.name)
        for (adversary, attack, observed), part in table.groupby(["adversary", "attack", "observed"], sort=False):
            if ATTACKS[attack].kind == "image":
                key = stem, Unit(adversary, attack, 0, 0, observed)
                found.setdefault(key, []).append(part[part["round"] == part["round"].max()])
    rows = []
    for (stem, unit), tables in found.items():
        attack = ATTACKS[unit.attack]
        words = [judge(part, attack).word for part in tables]
        together = pd.concat(tables)
        own, foreign = (together[together["control"] == control] for control in ("", FOREIGN))
        worst = [share for part in tables if (share := worst_identified(part[part["control"] == ""])) == share]
        rows.append([f"`{stem}`", f"{unit.adversary.replace('_', ' ')}, `{unit.words}`", str(len(own)),
                     f"{own['identified'].mean():.1%} ({foreign['identified'].mean():.1%})",
                     f"{sum(worst) / len(worst):.0%}" if worst else DASH,
                     DASH if attack.chooses else
                     f"{own['ssim'].mean():.2f} ({foreign['ssim'].mean():.2f})",
                     f"{own['class_rank'].mean():.0f} ({foreign['class_rank'].mean():.0f})",
                     f"{words.count(LEAKS)} of {len(words)}"])
    return grid(["run", "adversary, attack", "images", "identified (another image)", "of the worst 2 %",
                 "SSIM", "rank in its class", "leaks, seeds"], rows) if rows else []


def ladder(root: Path) -> list[str]:
    """Median rank by what is known of the encoder, two rows a run: from z as observed, and as recovered."""
    table = csv(root, "ladder.csv", ["images", "cosine", "cosine_min", "median_rank"],
                ["run", "rung", "latent"])
    rows = []
    for run, about in LADDER.items():
        part = table[table["run"] == run]
        for latent in ("observed", "recovered"):
            seen = part[part["latent"] == latent].set_index("rung")
            first = seen.iloc[0]
            name = f"{about}, {first['images']:.0f} images: z observed" if latent == "observed" else (
                f"z recovered (cosine {first['cosine']:.2f}, least {first['cosine_min']:.2f})")
            rows.append([name, *(f"{seen.loc[rung, 'median_rank']:.0f}" if rung in seen.index else DASH
                                 for rung in RUNGS)])
    return grid(["", *RUNGS.values()], rows)


def conditioning(root: Path) -> list[str]:
    """Rank and spread of the equations for the head's input, over images."""
    table = csv(root, "conditioning.csv", ["unknowns", "rank", "spread"], ["run", "equations"])

    def between(part: pd.Series, form: str) -> str:
        ends = dict.fromkeys(format(end, form) for end in (part.min(), part.max()))
        return " to ".join(ends)
    rows = []
    for run, about in CONDITIONED.items():
        part = table[table["run"] == run]
        rows.append([about, f"{part['unknowns'].max():.0f}", *(
            f"{between(same['rank'], '.0f')}; {between(same['spread'], '.3g')}"
            for _, same in part.groupby("equations"))])
    return grid(["head of", "unknowns", "features alone: rank; spread", "with the convolution's gradient"], rows)


def which_classes(root: Path) -> list[str]:
    """How well the last layer's update tells classes, at the first and the last round; means over seeds."""
    table = csv(root, "which_classes.csv", ["round", "auc", "exact", "rank_correlation"], ["run"])
    table[["stem", "seed"]] = table["run"].str.extract(r"(.*)-s(\d+)")
    rows = []
    for stem, name in UPLOADS.items():
        part = table[table["stem"] == stem]
        mean = part.groupby("round")[["auc", "exact", "rank_correlation"]].mean()
        rows.append([name, ", ".join(dict.fromkeys(part["seed"])),
                     *(_pair([f"{value:.2f}" if value == value else DASH for value in mean[column]])
                       for column in mean)])
    return grid(["", "seeds", "AUC, rounds 1 and 5", "exact, rounds 1 and 5", "rank correlation"], rows)


def _pair(values: Sequence[str]) -> str:
    return DASH if set(values) == {DASH} else ", ".join(values)


def real_uploads(root: Path, run: str, rounds: Sequence[int]) -> list[str]:
    """PSNR and how many images come first, by how a client trained and on how many images."""
    table = csv(root, "real_uploads.csv", ["round", "images", "epochs", "psnr", "identified", "mean_psnr",
                                           "mean_identified"], ["run", "optimizer", "dropout"])
    table = table[(table["run"] == run) & table["round"].isin(rounds)]
    counts, rows = sorted(table["images"].astype(int).unique()), []
    key = ["optimizer", "dropout", "epochs", "round"]
    for (optimizer, dropout, epochs, round), part in table.groupby(key, sort=False):
        name = [optimizer.upper() if optimizer == "sgd" else optimizer.capitalize(),
                "dropout" if dropout == "on" else "no dropout", f"{epochs:.0f} epoch{'s' * (epochs > 1)}",
                *[f"round {round:.0f}"] * (len(rounds) > 1)]
        rows.append([", ".join(name), *_by_images(part, counts, "psnr", "identified")])
    rows += [["class mean" + f", round {round:.0f}" * (len(rounds) > 1),
              *_by_images(part, counts, "mean_psnr", "mean_identified")] for round, part in table.groupby("round")]
    return grid(["images", *map(str, counts)], rows)


def other_uploads(root: Path) -> list[str]:
    """The same of one round of other runs: PSNR, the class mean's, and how many images come first."""
    numbers = ["round", "images", "epochs", "psnr", "identified", "mean_psnr"]
    table, rows = csv(root, "real_uploads.csv", numbers, ["run", "optimizer", "dropout"]), []
    table = table[table["run"].isin(OTHER_UPLOADS) & (table["round"] == 5) & (table["dropout"] == "on")]
    counts = sorted(table["images"].astype(int).unique())
    for run, about in OTHER_UPLOADS.items():
        for (optimizer, epochs), part in table[table["run"] == run].groupby(["optimizer", "epochs"]):
            by = part.set_index("images")
            rows.append([about, f"{optimizer}, {epochs:.0f}", *(
                f"{by.loc[n, 'psnr']:.1f} ({by.loc[n, 'mean_psnr']:.1f}), {by.loc[n, 'identified'] * n:.0f}"
                if n in by.index else DASH for n in counts)])
    return grid(["images", "optimiser, epochs", *map(str, counts)], rows)


def _by_images(part: pd.DataFrame, counts: Sequence[int], psnr: str, share: str) -> list[str]:
    by = part.drop_duplicates("images").set_index("images")
    return [f"{by.loc[n, psnr]:.1f}, {by.loc[n, share] * n:.0f}" if n in by.index else DASH for n in counts]


def membership(root: Path) -> list[str]:
    """AUC over clients and seeds, and how often its whole interval is above a guess."""
    table = csv(root, "membership.csv", ["client", "auc", "auc_low"], ["run", "adversary", "attack"])
    table["stem"] = table["run"].str.replace(r"-s\d+$", "", regex=True)
    rows = []
    for stem, name in MEMBERS.items():
        cells = [name]
        for adversary, attack in ASKED:
            part = table[(table["stem"] == stem) & (table["adversary"] == adversary) & (table["attack"] == attack)]
            auc = part["auc"]
            between = f" ({auc.min():.2f} to {auc.max():.2f})" if len(auc) > 1 else ""
            cells.append(f"{auc.mean():.2f}{between}, {(part['auc_low'] > 0.5).sum()} of {len(auc)}"
                         if len(auc) else DASH)
        rows.append(cells)
    return grid(["", *ASKED.values()], rows)


def frontier(root: Path, dataset: str, partitions: Sequence[str] = ("shards",)) -> list[str]:
    """Accuracy, what z holds, and what a thief finds, a row a partition, setting and seed.

    With other partitions than shards, clients differ in size: there accuracy also counts each image once.
    """
    mixed = tuple(partitions) != ("shards",)
    columns = ["deployed", "worst", "kl_nats", "attacked_nats", "bound_nats", "thief_rank", "thief_mean_rank",
               "candidates_rank", "candidates_identified"]
    table = csv(root, "frontier.csv", ["seed", *columns], ["dataset", "partition", "setting"])
    table, rows = table[table["dataset"] == dataset].sort_values("seed"), []
    for partition, (setting, name) in itertools.product(partitions, SETTINGS.items()):
        same = table[(table["partition"] == partition) & (table["setting"] == setting)]
        for one in same.to_dict("records"):
            words = setting.replace(",", "").replace(" ", "_")
            folder = root / REFERENCE / f"frontier-{dataset}-{partition}-{words}-s{one['seed']:.0f}"
            accuracies = [one["deployed"], *([of_images(root, finished(folder), "deployed")] if mixed else []),
                          one["worst"]]
            rows.append([f"{partition}: {name}" if mixed else name, f"{one['seed']:.0f}",
                         ", ".join(f"{accuracy:.3f}" for accuracy in accuracies), _nats(one["kl_nats"]),
                         ", ".join(dict.fromkeys((_nats(one["attacked_nats"]), _nats(one["bound_nats"])))),
                         f"{one['thief_rank']:g} ({one['thief_mean_rank']:g})",
                         f"{_nats(one['candidates_rank'], 0)}, "
                         f"{one['candidates_identified'] * FRONTIER_IMAGES:.0f} of {FRONTIER_IMAGES}"])
    return grid([f"`{dataset}`, {', '.join(partitions)}", "seed",
                 "deployed, per image, lowest decile" if mixed else "deployed, lowest decile",
                 "KL, all clients", "KL of the attacked client's images, bound", "thief's decoder: median rank",
                 "candidates: mean rank, identified"], rows)


def _nats(value: float, digits: int = 1) -> str:
    return DASH if value != value else f"{value:,.{0 if value >= 100 else digits}f}"


def server_cells(root: Path) -> pd.DataFrame:
    return csv(root, "server.csv", ["seed", "frac", "accuracy", "worst", "backdoor", "least_trust"],
               ["dataset", "scope", "partition", "behaviour", "rule"])


def nobody(root: Path) -> list[str]:
    """Accuracy under `threat` where nobody is malicious, a mean over seeds; the least and the largest weight of a
    client in a round, over what its size gives it."""
    table = csv(root, "server_nobody.csv", ["seed", "accuracy", "worst", "least_weight", "most_weight"],
                ["dataset", "scope", "partition", "rule"])
    return grid(["", "seeds", "accuracy, lowest decile", "least weight", "largest weight"], [
        [f"`{dataset}`, {SERVER_SCOPES[scope]}, {partition}",
         ", ".join(part["seed"].astype(int).sort_values().astype(str)),
         f"{part['accuracy'].mean():.3f}, {part['worst'].mean():.3f}", f"{part['least_weight'].min():.2f}",
         f"{part['most_weight'].max():.2f}"]
        for (dataset, scope, partition), part in table.groupby(["dataset", "scope", "partition"])])


def lost_to_oracle(table: pd.DataFrame) -> pd.DataFrame:
    """Cells with malicious clients; ``oracle`` is the accuracy without them, and ``lost`` is in points."""
    key = ["dataset", "seed", "scope", "partition", "frac"]
    oracle = table[table["behaviour"] == "oracle"].set_index(key)["accuracy"].rename("oracle")
    tried = table[~table["behaviour"].isin(["nobody", "oracle"])].join(oracle, on=key)
    return tried.assign(lost=100 * (tried["oracle"] - tried["accuracy"]))


def behaviours(root: Path, dataset: str, rules: Sequence[str]) -> list[str]:
    """Points lost to the oracle with 30 % malicious clients: mean and worst over partitions and seeds, the worst
    rows of the last rule first. A rule that was tried in fewer worlds than others has a dash."""
    tried = lost_to_oracle(server_cells(root))
    tried = tried[(tried["dataset"] == dataset) & (tried["frac"] == SHARE) & tried["rule"].isin(rules)]
    tried = tried[tried.groupby(BEHAVED)["rule"].transform("nunique") > 1]
    order = {key: part[part["rule"] == rules[-1]]["lost"].max() for key, part in tried.groupby(BEHAVED)}
    rows = []
    for scope, behaviour in sorted(order, key=lambda key: (key[0], -order[key])):
        part = tried[(tried["scope"] == scope) & (tried["behaviour"] == behaviour)]
        lost = part.groupby("rule")["lost"]
        worlds = lost.count().max()
        rows.append([f"`{behaviour}`, {SERVER_SCOPES[scope]}", str(worlds), *(
            f"{lost.mean()[rule]:.1f}, {lost.max()[rule]:.1f}" if lost.count().get(rule) == worlds else DASH
            for rule in rules)])
    return grid(["", "worlds", *(f"`{rule}`" for rule in rules)], rows)


def worst_losses(root: Path) -> list[str]:
    """The most that a rule loses to the oracle, in points, over behaviours, partitions and seeds.

    A rule that was tried in fewer cells than another loses at least that.
    """
    tried, rows = lost_to_oracle(server_cells(root)), []
    for (dataset, scope, share), part in tried.groupby(["dataset", "scope", "frac"]):
        lost = part.groupby("rule")["lost"]
        cells = lost.count()
        rows.append([f"`{dataset}`, {SERVER_SCOPES[scope]}, {100 * share:.0f} %",
                     str(part["behaviour"].nunique()), str(cells.max()), *(
            f"{'' if cells[rule] == cells.max() else 'at least '}{lost.max()[rule]:.1f}" if rule in cells
            else DASH for rule in RULES)])
    return grid(["points lost to the oracle, at worst", "behaviours", "cells", *(f"`{rule}`" for rule in RULES)],
                sorted(rows, key=lambda row: (row[0].split(",")[0] != "`mnist10k`", row[0])))


def backdoors(root: Path) -> list[str]:
    """The share of triggered images that honest clients' models give the target, with 30 % malicious clients:
    mean, least to greatest seed."""
    table, rows = server_cells(root), []
    table = table[table["backdoor"].notna() & (table["frac"] == SHARE)]
    for (dataset, *key), part in table.groupby(["dataset", "behaviour", "scope", "partition"]):
        by = part.groupby("rule")["backdoor"]
        rows.append([f"`{dataset}`, `{key[0]}`, {SERVER_SCOPES[key[1]]}, {key[2]}", *(
            f"{by.mean()[rule]:.2f} ({by.min()[rule]:.2f} to {by.max()[rule]:.2f})" if rule in by.groups else DASH
            for rule in RULES)])
    return grid(["", *(f"`{rule}`" for rule in RULES)], rows)


def scaling(root: Path) -> list[str]:
    """Time and memory over the number of clients; time a round, and memory, over the rounds."""
    table = csv(root, "scaling.csv", ["clients", "round", "seconds", "megabytes", "startup"], ["over"])
    rows = [[f"{one['clients']:,.0f}", f"{one['seconds']:.1f}", f"{1000 * one['seconds'] / one['clients']:.0f}",
             f"{one['megabytes']:,.0f}", f"{one['startup']:.1f}"]
            for one in table[table["over"] == "clients"].to_dict("records")]
    return grid(["clients", "a round, seconds", "a client, ms", "memory, MB", "first step after, seconds"], rows)


def defaults(root: Path) -> list[str]:
    """What METHODS has for the options whose defaults depend on the data set or the partition, and for the head's
    learning rate."""
    varied = {HEAD_LR}.union(*(values for row in METHODS.values()
                               for values in (*row.by_dataset.values(), *row.by_partition.values())))
    alike = dict[tuple[str, ...], list[str]]()   # option and its values -> the methods that have them
    for name, row in METHODS.items():
        for option in varied & row.reads.keys():
            values = (row.default(option, dataset, partition) for dataset, partition in itertools.product(
                ("mnist", "cifar"), PARTITIONS))
            alike.setdefault((f"`--{option.name}`", *map(str, values)), []).append(f"`{name}`")
    return grid(["", "methods", *PARTITIONS, *(f"CIFAR-10, {partition}" for partition in PARTITIONS)],
                sorted([option, ", ".join(names), *values] for (option, *values), names in alike.items()))


MEASURED: dict[str, Callable[[Path], list[str]]] = {
    "leakage": leakage, "ladder": ladder, "conditioning": conditioning,
    "which-classes": which_classes,
    "real-uploads": partial(real_uploads, run="m10-iid-fedavg-s1", rounds=[5]),
    "real-uploads-shards": partial(real_uploads, run="m10-fedavg-s1", rounds=[1, 5]),
    "real-uploads-others": other_uploads,
    "membership": membership, "frontier-digits": partial(frontier, dataset="mnist10k"),
    "frontier-digits-mixed": partial(frontier, dataset="mnist10k", partitions=("dirichlet", "iid")),
    "frontier-clothes": partial(frontier, dataset="fmnist10k"),
    "frontier-clothes-mixed": partial(frontier, dataset="fmnist10k", partitions=("dirichlet", "iid")),
    "frontier-cifar": partial(frontier, dataset="cifar10k"), "server-nobody": nobody,
    "server-behaviours": partial(behaviours, dataset="mnist10k", rules=RULES),
    "server-others": partial(behaviours, dataset="mnist10k", rules=OTHERS),
    "server-worst": worst_losses, "server-backdoors": backdoors,
    "defaults": defaults, "scaling": scaling}
