"""Which classes a client has, read off its upload by the curious server, and off nothing else.

    python benchmarks/which_classes.py --runs mnist10k-shards-rve_pfl-seed1 ...

One row for each run and each round with a checkpoint. AUC: classes that a client has against those that it has
not. Exact: the share of clients whose set of classes is found without knowing how many they are. A guess that
knows the number is right for one client in 45 with two classes of ten. Rank correlation: between the scores and
the numbers of images, over the classes that a client has, where they are at least three.
"""
import argparse
import sys
from pathlib import Path

import numpy as np
import pandas as pd
from _path import ROOT, Script, guarded
from scipy.stats import spearmanr

from attack.access import open_target
from attack.uploads import BIAS, class_scores, owned_classes
from utils import InputError


def rows_of(name: str, args: argparse.Namespace) -> list[dict]:
    """The rows of one run."""
    target = open_target(name, args.results_dir, args.models_dir, args.data_dir)
    train, _ = target.owned()
    rows = []
    target.latest_round()   # refuses a run without checkpoints, of which there is nothing to say
    for round in target.rounds():
        shared = target.shared(round)
        if BIAS not in shared["sent"]:
            raise InputError(f"--runs {name}: its method does not send the last layer")
        aucs, exact, order = [], [], []
        for k, upload in shared["uploads"].items():
            scores = class_scores(shared["sent"], upload)
            counts = np.bincount(target.data.labels[train[k]], minlength=len(scores))
            has, score = counts > 0, scores.numpy()
            if not has.all():   # pairs of a class it has and one it has not
                aucs.append(np.mean(score[has][:, None] > score[~has]))
                exact.append((owned_classes(scores).numpy() == has).all())
            if has.sum() >= 3:
                order.append(spearmanr(score[has], counts[has]).statistic)
        rows.append({"run": name, "method": target.options["method"], "partition": target.options["partition"],
                     "round": round, "clients": len(shared["uploads"]), "auc": np.mean(aucs or np.nan),
                     "exact": np.mean(exact or np.nan), "rank_correlation": np.mean(order or np.nan)})
    return rows


@guarded
def main(argv: list[str] | None = None) -> int:
    parser = Script(__file__, __doc__)
    parser.add_argument("--runs", nargs="+", required=True)
    parser.add_argument("--csv", type=Path, help="write the table there, too")
    for name, folder in (("results_dir", "results"), ("models_dir", "saved_models"), ("data_dir", "data")):
        parser.add_argument(f"--{name}", type=Path, default=ROOT / folder)
    args = parser.parse_args(argv)
    table = pd.DataFrame([row for name in args.runs for row in rows_of(name, args)])
    print(table.to_string(index=False, float_format="%.3f", na_rep="-"))
    if args.csv:
        table.to_csv(args.csv, index=False, float_format="%.4g")
    return 0


if __name__ == "__main__":
    sys.exit(main())
