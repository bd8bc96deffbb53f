"""Privacy against accuracy: what KL, its prior and what travels are worth, and what they give away.

    python benchmarks/frontier.py                train and attack what is missing, then print the table
    python benchmarks/frontier.py --validate     choose a setting on validation images; nothing is attacked
    python benchmarks/frontier.py --table        print the table of what is there
    python benchmarks/frontier.py --csv docs/frontier.csv --out results/reference    and have the pages show it

A run is one setting of SETTINGS on one data set, partition and seed. Its client 0 is attacked after the last
round, by who stole its encoder and head and has --public_images images of its classes. Runs are named frontier-*;
interrupted, it goes on where it stopped.
"""
import argparse
import contextlib
import io
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pandas as pd
from _path import ROOT, Script, count, guarded, index, load_driver
from runs.pictures import plt
from study import publish

from attack import mi_attack
from attack.access import open_target
from attack.attacks import unfit
from methods import METHODS
from reporting.summary import one_line
from runs import configs
from utils import InputError, write_whole

PRIVATE = {"prior": "class", "kl_weight": 1e-2, "head_lr": 1}
SETTINGS: dict[str, dict] = {
    "published": {},   # the default
    "beta 1e-3": {"kl_weight": 1e-3},
    "class prior": PRIVATE,
    "class prior, beta 0.1": {**PRIVATE, "kl_weight": 0.1},
    "class prior, beta 1": {**PRIVATE, "kl_weight": 1},
    "class prior, beta 0.1, nearer": {**PRIVATE, "kl_weight": 0.1, "prior_apart": 0.25},
    "class prior, beta 1, nearer": {**PRIVATE, "kl_weight": 1, "prior_apart": 0.25},
    "trunk": {"method": "rve_pfl_trunk", "head_lr": 1},
    "trunk, class prior": {**PRIVATE, "method": "rve_pfl_trunk"},
    "warm": {"full_sharing_rounds": 2},
    "local": {"method": "local"},
    "lg_fedavg": {"method": "lg_fedavg"},
    "fedper": {"method": "fedper"},
    "fedavg": {"method": "fedavg"},
    "nbafl": {"method": "nbafl"},
}
ADVERSARY, DECODER, CHOOSER = "stolen_model", "latent_decoder", "reidentification"
KEY = ["dataset", "partition", "setting", "seed"]


def name_of(key: dict, validate: bool) -> str:
    """A run's folder under results/."""
    words = key["setting"].replace(",", "").replace(" ", "_")
    return "-".join(["frontier", key["dataset"], key["partition"], words, f"s{key['seed']}", *["val"] * validate])


def train(driver: ModuleType, key: dict, args: argparse.Namespace) -> None:
    """One run, silently, unless it is finished; ends this process if it fails."""
    setting = SETTINGS[key["setting"]]
    row = METHODS[setting.get("method", "rve_pfl")]   # NAME10k is trained with the defaults of NAME
    tuned = {**row.by_dataset.get(key["dataset"].removesuffix("10k"), {}),
             **row.by_partition.get(key["partition"], {})}
    flags = {"dataset": key["dataset"], "partition": key["partition"], "seed": key["seed"], "rounds": args.rounds,
             "local_ep": args.local_ep, "local_bs": args.local_bs, "checkpoint_seconds": 10**9,
             "run_name": name_of(key, args.validate), **{option.name: value for option, value in tuned.items()},
             **setting}
    argv = [word for flag, value in flags.items() for word in (f"--{flag}", str(value))] + places(args)
    with contextlib.redirect_stdout(io.StringIO()):
        status = driver.main([*argv, "--resume", *["--validate"] * args.validate])
    if status:
        raise SystemExit(status)


def places(args: argparse.Namespace) -> list[str]:
    """The three folders, as options."""
    return [word for name in ("results_dir", "models_dir", "data_dir")
            for word in (f"--{name}", str(getattr(args, name)))]


def attack(key: dict, args: argparse.Namespace) -> None:
    """Attack client 0 of a run with all that fits it; ends this process if an attack fails, or at Ctrl-C."""
    name, attacks = name_of(key, False), (DECODER, CHOOSER)
    target = open_target(name, args.results_dir, args.models_dir, args.data_dir)
    if all(unfit(one, ADVERSARY, target) for one in attacks):
        return   # its cells stay empty
    argv = ["--run", name, "--adversary", ADVERSARY, "--attack", *attacks, "--public", args.public or
            key["dataset"].removesuffix("10k"), "--public_images", str(args.public_images), "--images",
            str(args.images), "--train_epochs", str(args.train_epochs), *places(args)]
    with contextlib.redirect_stdout(io.StringIO()):
        status = mi_attack.main(argv)
    if status:
        raise SystemExit(status)


def play(key: dict, args: argparse.Namespace, driver: ModuleType) -> None:
    """Train and attack one run, unless that is done. Its checkpoints go once nothing is left to attack."""
    train(driver, key, args)
    checkpoints = args.models_dir / name_of(key, False)
    if args.validate or not list(checkpoints.glob("round_*")):   # none if it was attacked before
        return
    attack(key, args)
    if not args.keep:
        shutil.rmtree(checkpoints)


def placed(rows: pd.DataFrame, path: Path) -> pd.DataFrame:
    """These rows and those of other runs that the table at ``path`` has, if there is one.

    Raises:
        InputError: the table is damaged.
    """
    if not path.exists():
        return rows
    try:
        others = pd.read_csv(path).set_index(KEY).reset_index()
    except (ValueError, KeyError) as error:
        why = one_line(error)
        raise InputError(f"--csv {path}: no table of this command ({why}); give another name") from error
    return pd.concat([others, rows]).drop_duplicates(KEY, keep="last").sort_values(KEY, kind="stable")


def outcome(key: dict, args: argparse.Namespace) -> dict | None:
    """A row of the table; None if the run is not there."""
    folder = args.results_dir / name_of(key, args.validate)
    config = folder / "config.json"
    if not config.exists() or configs.read(config)["status"] != "finished":
        return None
    rounds = pd.read_csv(folder / "rounds.csv")
    last = rounds[(rounds["round"] == rounds["round"].max()) & (rounds["split"] != "train")].set_index("stage")
    row = {**key, "deployed": last.loc["deployed", "accuracy"], "worst": last.loc["deployed", "accuracy_worst"],
           "trained": last.loc["trained", "accuracy"], "kl_nats": last.loc["deployed", "kl_nats"]}
    if not (folder / "attack_summary.csv").exists():   # what an attack that ended writes last
        return row
    found = pd.read_csv(folder / "attack.csv", keep_default_na=False)
    of = {(attack, control): part["nearest_rank"] for (attack, control), part in
          found[found["restart"] == 0].groupby(["attack", "control"])}
    for name, seen in (("thief", (DECODER, "")), ("thief_mean", (DECODER, "class_mean"))):
        if seen in of:
            row[f"{name}_rank"] = of[seen].median()
    if (chosen := of.get((CHOOSER, ""))) is not None:
        row |= {"candidates_rank": chosen.mean(), "candidates_identified": (chosen == 1).mean()}
    if (folder / "attack_latents.csv").exists():
        told = pd.read_csv(folder / "attack_latents.csv").iloc[-1]
        row |= {"attacked_nats": told["kl_nats"], "bound_nats": told["bound_nats"]}
    return row


def picture(table: pd.DataFrame, dataset: str, path: Path) -> None:
    """Deployed accuracy over the thief's median rank, a panel a partition, a point a run."""
    partitions = list(dict.fromkeys(table["partition"]))
    figure, panels = plt.subplots(1, len(partitions), figsize=(4.6 * len(partitions), 4.2), squeeze=False,
                                  layout="constrained")
    colours = {setting: f"C{i % 10}" for i, setting in enumerate(SETTINGS)}
    for axes, partition in zip(panels[0], partitions, strict=True):
        here = table[table["partition"] == partition]
        for setting, part in here.groupby("setting", sort=False):
            axes.scatter(part["thief_rank"] / part["thief_mean_rank"], part["deployed"], label=setting,
                         color=colours[setting], marker="o" if "prior" in setting else "s", alpha=0.8)
        axes.axvline(1, color="grey", linewidth=1, linestyle=":")
        axes.set(xscale="log", xlabel="median rank of the true image,\nthief's over the class mean's",
                 title=f"{dataset}, {partition}")
        middle, least = sum(axes.get_ylim()) / 2, 0.015   # a narrower scale would make much of single images
        axes.set_ylim(min(axes.get_ylim()[0], middle - least), max(axes.get_ylim()[1], middle + least))
    panels[0][0].set_ylabel("deployed accuracy, held out")
    shown = {label: handle for axes in panels[0]
             for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(shown.values(), shown.keys(), loc="outside lower center", ncols=4, fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


@guarded
def main(argv: list[str] | None = None) -> int:
    parser = Script(__file__, __doc__)
    parser.add_argument("--datasets", nargs="+", default=["mnist10k", "fmnist10k", "cifar10k"])
    parser.add_argument("--partitions", nargs="+", default=["shards", "dirichlet", "iid"])
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--seeds", type=index, nargs="+", default=[11, 12, 13])
    parser.add_argument("--rounds", type=count, default=5)
    parser.add_argument("--local_ep", type=count, default=2)
    parser.add_argument("--local_bs", type=count, default=64)
    parser.add_argument("--public", help="the adversaries' images; NAME's for NAME10k if not given")
    parser.add_argument("--public_images", type=count, default=10_000)
    parser.add_argument("--images", type=count, default=16)
    parser.add_argument("--train_epochs", type=count, default=6)
    parser.add_argument("--validate", action="store_true", help="evaluate on validation images; attack nothing")
    parser.add_argument("--keep", action="store_true", help="keep checkpoints of what has been attacked")
    parser.add_argument("--table", action="store_true", help="train and attack nothing")
    parser.add_argument("--csv", type=Path, help="put the rows into that table, and draw its pictures beside it")
    parser.add_argument("--out", type=Path, help="copy the small files of finished runs there")
    for name, folder in (("results_dir", "results"), ("models_dir", "saved_models"), ("data_dir", "data")):
        parser.add_argument(f"--{name}", type=Path, default=ROOT / folder)
    args = parser.parse_args(argv)
    if args.validate and args.csv:
        parser.error("--csv: is of test images; not with --validate")
    keys = [dict(zip(KEY, (dataset, partition, setting, seed), strict=True)) for seed in args.seeds
            for dataset in args.datasets for partition in args.partitions for setting in args.settings]
    if not args.table:
        driver = load_driver()
        for key in keys:
            play(key, args, driver)
    found = {name_of(key, args.validate): row for key in keys if (row := outcome(key, args))}
    if not found:
        raise InputError("no finished run; leave --table out to train what is missing")
    for name in found if args.out else ():
        publish(args.results_dir / name, args.out / name)
    write(pd.DataFrame(list(found.values())).sort_values(KEY, kind="stable"), args.csv)
    return 0


def write(table: pd.DataFrame, path: Path | None) -> None:
    """Print means over seeds; with a ``path`` put the rows into that table, and draw its pictures beside it."""
    means = table.groupby(KEY[:-1], sort=False).mean(numeric_only=True).drop(columns="seed")
    print(means.to_string(float_format="%.3f", na_rep="-"))
    if path is None:
        return
    table = placed(table, path)
    write_whole(path, lambda file: table.to_csv(file, index=False, float_format="%.4g"))
    for dataset in dict.fromkeys(table["dataset"]):
        own = table[table["dataset"] == dataset]
        if "thief_rank" in own:
            picture(own, dataset, path.with_name(f"{path.stem}_{dataset}.png"))


if __name__ == "__main__":
    sys.exit(main())
