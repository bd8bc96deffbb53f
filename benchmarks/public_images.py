"""What more public images are worth to who stole a client's encoder and head and sees its latents.

    python benchmarks/public_images.py --run mnist10k-shards-rve_pfl-seed1 --public mnist

Runs attack/mi_attack.py once for each number of public images, always with about the same number of training steps
of a decoder, on a copy of the run's results. So what differs is the images. A decoder takes those of the victim's
classes, so that 10,000 images of two classes of ten are found among 50,000.
"""
import argparse
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
from _path import ROOT

import datasets
from attack import mi_attack
from attack.access import open_target
from attack.learnt import BATCH
from attack.tables import CONTROLS
from utils import InputError

SHOWN = ["psnr", "ssim", "nearest_rank"]


def available(args: argparse.Namespace) -> int:
    """How many public images there are of the first victim's classes, at most."""
    target = open_target(args.run, args.results_dir, args.models_dir, args.data_dir)
    own = np.unique(target.data.labels[target.owned()[0][args.clients[0]]])
    return int(np.isin(datasets.load(args.public, args.data_dir).labels, own).sum())


def attacked(args: argparse.Namespace, count: int, there: int) -> pd.DataFrame:
    """Mean scores of the attacks with ``count`` public images, of ``there``, and of their controls."""
    epochs = max(1, round(args.steps * BATCH / min(count, there)))
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / args.run
        copy.mkdir()
        for name in ("config.json", "partition.npz"):
            shutil.copy(args.results_dir / args.run / name, copy)
        status = mi_attack.main([
            "--run", args.run, "--adversary", "stolen_model", "--attack", *args.attack, "--clients",
            *map(str, args.clients), "--images", str(args.images), "--iterations", str(args.iterations),
            "--restarts", "1", "--train_epochs", str(epochs),
            "--public", args.public, "--public_images", str(count), "--seed", str(args.seed),
            "--results_dir", folder, "--models_dir", str(args.models_dir), "--data_dir", str(args.data_dir)])
        if status:
            raise SystemExit(status)
        rows = pd.read_csv(copy / "attack.csv", keep_default_na=False)
    rows["identified"] = (rows["nearest_rank"] == 1).astype(float)
    rows["attack"] = rows["attack"].where(rows["control"] == "", rows["control"])
    found = rows.groupby("attack", sort=False)[[*SHOWN, "identified"]].mean()
    found.insert(len(SHOWN), "median_rank", rows.groupby("attack")["nearest_rank"].median())
    order = [*args.attack, *(name for name in CONTROLS if name in found.index)]
    return found.loc[order].reset_index().assign(run=args.run, public_images=count)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", required=True, help="a run of a method with an encoder")
    parser.add_argument("--public", default="mnist")
    parser.add_argument("--counts", type=int, nargs="+", default=[300, 1000, 3000, 10_000, 30_000, 50_000])
    parser.add_argument("--attack", nargs="+", default=["latent_decoder", "latent_prior"])
    parser.add_argument("--clients", type=int, nargs="+", default=[0])
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--iterations", type=int, default=300)
    parser.add_argument("--steps", type=int, default=1000, help="of training a decoder")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--csv", type=Path, help="write the table there, too")
    for name, folder in (("results_dir", "results"), ("models_dir", "saved_models"), ("data_dir", "data")):
        parser.add_argument(f"--{name}", type=Path, default=ROOT / folder)
    args = parser.parse_args(argv)
    try:
        there = available(args)
        table = pd.concat([attacked(args, count, there) for count in args.counts])
    except InputError as error:
        print(f"public_images.py: error: {error}", file=sys.stderr)
        return 2
    front = ["run", "public_images"]
    table = table[[*front, *(name for name in table if name not in front)]]
    print(table.to_string(index=False, float_format="%.3f"))
    if args.csv:
        table.to_csv(args.csv, index=False, float_format="%.4g")
    return 0


if __name__ == "__main__":
    sys.exit(main())
