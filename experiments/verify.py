"""Check that this copy of the project gives the committed results: ``make verify``.

The tables and pictures of docs/ are compared with the CSVs in results/reference/. Then ``make run``'s command is
run into a temporary folder, and what it deployed is compared with the committed rows of this chip's precision.
Processors and numbers of threads round differently, which the tolerances allow.
"""
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd
from common import REFERENCE, ROOT, curve, outdated, read

from parsing import Parser
from utils import InputError, choose_device, choose_precision, error_line

ACCURACY = 0.01   # deployed accuracy may differ by this much: nine of its 890 test images
KL = 0.1          # and the mean KL by this share


def differences(ours: pd.DataFrame, reference: pd.DataFrame) -> list[str]:
    """Return a line for each round whose deployed accuracy or KL differs by more than the tolerances.

    Args:
        ours, reference: rows of ``curve``.
    """
    if list(ours["round"]) != list(reference["round"]):
        return [f"rounds {list(ours['round'])}, not {list(reference['round'])}"]
    found = []
    for ((_, got), (_, expected)) in zip(ours.iterrows(), reference.iterrows(), strict=True):
        number = int(expected["round"])
        if not abs(got["deployed"] - expected["deployed"]) <= ACCURACY:   # NaN is no match either
            found.append(f"round {number}: deployed accuracy {got['deployed']:.4f}, not "
                         f"{expected['deployed']:.4f} within {ACCURACY:g}")
        if not abs(got["kl_nats"] - expected["kl_nats"]) <= KL * expected["kl_nats"]:
            found.append(f"round {number}: KL {got['kl_nats']:.0f} nats, not {expected['kl_nats']:.0f} "
                         f"within {KL:.0%}")
    return found


def train_again(command: str) -> pd.DataFrame:
    """Run a command line of RVE-PFL.py into a temporary folder and return its curve."""
    with tempfile.TemporaryDirectory(prefix="verify-") as folder:
        places = ["--results_dir", folder, "--models_dir", f"{folder}/models", "--run_name", "run"]
        words = [sys.executable, *shlex.split(command)[1:], *places]
        if subprocess.run(words, cwd=ROOT, stdout=subprocess.DEVNULL).returncode:
            raise InputError(f"{command}: failed, see above")
        return pd.DataFrame(curve(Path(folder) / "run"))


def main(argv: list[str] | None = None) -> int:
    """Run the check and return the exit status: 1 if something differs."""
    parser = Parser("verify.py", "Check that this copy of the project gives the committed results.")
    parser.add_argument("--reference", type=Path, default=REFERENCE / "verify.csv", help="CSV to compare with")
    args, began = parser.parse(argv), time.monotonic()
    try:
        rows = read(args.reference)
        precision = str(choose_precision("auto", choose_device("auto"))).removeprefix("torch.")
        rows = rows[rows["precision"] == precision]
        if rows.empty:
            raise InputError(f"{args.reference}: has no rows of {precision}")
        found = outdated()
        print("training as `make run` does: one to five minutes", flush=True)
        found += differences(train_again(rows["command"].iloc[0]), rows)
    except (InputError, OSError) as error:
        print(error_line("verify.py", error), file=sys.stderr)
        return 2
    print("\n".join(f"differs: {line}" for line in found) or
          f"verified: the pages, and a run within {ACCURACY:g} of accuracy and {KL:.0%} of KL, in "
          f"{time.monotonic() - began:.0f} s")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
