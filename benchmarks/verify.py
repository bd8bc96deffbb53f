"""Checks that this copy of the project gives the published figures: what `make verify` runs.

First the tables of README.md and docs/ are compared with the committed files (`report.py --docs --check`). Then
the command of `make run` is run into a temporary folder, which is removed afterwards, and what it deployed is
compared with the committed run of this chip's precision: bf16 and fp32 differ by an eighth of the KL. Another
processor or number of threads rounds differently, too, which the tolerances allow for.
"""
import contextlib
import io
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd
import torch
from _path import ROOT, Script, guarded, load_driver

import report
from reporting.summary import Finished, read
from utils import choose_device, choose_precision

COMMAND = "--dataset mnist10k --rounds 5 --local_ep 2 --overwrite"   # the Makefile's `run`
RUN = "mnist10k-shards-rve_pfl-seed1"
REFERENCES = {torch.bfloat16: RUN, torch.float32: f"{RUN}-fp32"}   # folders of results/reference/
ACCURACY = 0.01   # deployed accuracy may differ by this much: nine of its 890 test images
KL = 0.1          # and the mean KL by this share


def differences(ours: pd.DataFrame, reference: pd.DataFrame) -> list[str]:
    """What differs by more than the tolerances, a line each.

    Args:
        ours, reference: rounds.csv of two runs.
    """
    ours, reference = (rounds[rounds["stage"] == "deployed"].set_index("round") for rounds in (ours, reference))
    if list(ours.index) != list(reference.index):
        return [f"rounds {', '.join(map(str, ours.index)) or 'none'} instead of "
                f"{', '.join(map(str, reference.index))}"]
    found = []
    for number, expected in reference.iterrows():
        got = ours.loc[number]
        if not abs(got["accuracy"] - expected["accuracy"]) <= ACCURACY:   # NaN is no match either
            found.append(f"round {number}: deployed accuracy {got['accuracy']:.4f}, not "
                         f"{expected['accuracy']:.4f} within {ACCURACY:g}")
        if not abs(got["kl_nats"] - expected["kl_nats"]) <= KL * expected["kl_nats"]:
            found.append(f"round {number}: KL {got['kl_nats']:.0f} nats, not {expected['kl_nats']:.0f} "
                         f"within {KL:.0%}")
    return found


def finished(folder: Path) -> Finished:
    """A finished run; ends this process if there is none."""
    found = read(folder)
    if isinstance(found, str):
        print(f"verify.py: error: {folder}: {found}", file=sys.stderr)
        raise SystemExit(2)
    return found


def again(folder: Path) -> Finished:
    """The run of `make run`, made anew in a folder; ends this process if it fails."""
    flags = [*COMMAND.split(), "--results_dir", str(folder / "results"), "--models_dir", str(folder / "models")]
    with contextlib.redirect_stdout(io.StringIO()):
        status = load_driver().main(flags)
    if status:
        raise SystemExit(status)
    return finished(folder / "results" / RUN)


@guarded
def main(argv: list[str] | None = None) -> int:
    parser = Script(__file__, __doc__)
    parser.add_argument("--reference", type=Path, help="the folder of the run to compare with; the committed one "
                        "of this chip's precision if not given")
    args = parser.parse_args(argv)
    committed = REFERENCES[choose_precision("auto", choose_device("auto"))]
    reference, began = finished(args.reference or ROOT / "results" / "reference" / committed), time.monotonic()
    if status := report.main(["--docs", "--check"]):
        return status
    print("training as `make run` does: one to five minutes", flush=True)
    with tempfile.TemporaryDirectory(prefix="verify-") as name:
        ours = again(Path(name))
    found = differences(ours.rounds, reference.rounds)
    for line in found:
        print(f"differs: {line}")
    if not found:
        print(f"verified: the pages' tables, and {RUN} within {ACCURACY:g} of accuracy and {KL:.0%} of KL, "
              f"in {time.monotonic() - began:.0f} s")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
