"""Check that this copy of the project gives the committed results: ``make verify``.

The tables of docs/ are compared with the CSVs in results/reference/. Then ``make run``'s command is run into a
temporary folder, and what it deployed is compared with the committed rows. Processors and numbers of threads round
differently, which the tolerances allow.
"""
from __future__ import annotations

import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

from common import REFERENCE, ROOT, curve, outdated, pd, read

from parsing import Parser
from utils import InputError, error_line

ACCURACY = 0.01   # deployed accuracy may differ by this much: nine of its 890 test images
KL = 0.1          # and the mean KL by this share


def differences(ours: pd.DataFrame, reference: pd.DataFrame) -> list[str]:
    """Return a line for each figure of ``curve`` that differs by more than the tolerances."""
    ours, reference = (rows.set_index("round") for rows in (ours, reference))
    if list(ours.index) != list(reference.index):
        return [f"rounds {list(ours.index)}, not {list(reference.index)}"]
    found = []
    for name, tolerance in (("deployed", ACCURACY), ("kl_nats", KL * reference["kl_nats"])):
        off = ~((ours[name] - reference[name]).abs() <= tolerance)   # NaN is no match either
        found += [f"round {number}: {name} {ours[name][number]:.4g}, not {reference[name][number]:.4g}"
                  for number in ours.index[off]]
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
    Parser("verify.py", "Check that this copy of the project gives the committed results.").parse(argv)
    try:
        rows = read(REFERENCE / "verify.csv")
        print("training as `make run` does: about one minute", flush=True)
        found = outdated() + differences(train_again(rows["command"].iloc[0]), rows)
    except (InputError, OSError) as error:
        print(error_line("verify.py", error), file=sys.stderr)
        return 2
    print("\n".join(f"differs: {line}" for line in found) or
          f"verified: the pages, and a run within {ACCURACY:g} of accuracy and {KL:.0%} of KL")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
