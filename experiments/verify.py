"""Check that this copy of the project gives the committed results: ``make verify``.

    python experiments/verify.py            redo the runs and attacks of results/reference/verify.csv, and compare
    python experiments/verify.py --write    make that file; delete it first to redo all of it

The tables of docs/ are compared with their CSVs, too. Processors round differently, which the tolerances allow.
"""
from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import common
import leakage
from common import REFERENCE, ROOT, Experiment, Options, Task, curve, dots, flags, outdated, pd, read, training

from engine.signals import steady_output
from parsing import Parser
from utils import InputError, error_line

SCALE: Options = {"dataset": "mnist10k", "local_ep": 1, "local_bs": 80, "precision": "fp32", "seed": 1}
RUNS: dict[str, tuple[Options, Options]] = {   # the run, and the attack on it
    "rve_pfl": ({"rounds": 2, "prior": "normal"},   # as `make run`
                {"adversary": "stolen_model", "attack": "reidentification", "observe": "z", "images": 200}),
    "nbafl": ({"rounds": 2, "method": "nbafl", "classes_per_client": 10},
              {"adversary": "curious_server", "attack": "analytic", "images": 24}),
}
ATTACK: Options = {"restarts": 1, "iterations": 80, "train_epochs": 1}
# The largest difference from a committed figure; that of KL is a share of it.
TOLERANCES = {"deployed": 0.02, "kl_nats": 0.1, "identified": 0.1, "control_identified": 0.1, "ssim": 0.03}
KEYS = ["method", "measured"]


def tasks(seeds: Sequence[int] = ()) -> list[Task]:
    """Return the two runs, of one seed."""
    found = []
    for method, (options, attack) in RUNS.items():
        run = f"verify-{method}"
        attacking = f"python attack/mi_attack.py --run {run} {flags({**attack, **ATTACK})}"
        trained = training(run, {**SCALE, **options})
        found.append(Task(run, {"method": method}, SCALE["seed"], (trained, attacking)))
    return found


def measure(folder: Path) -> list[dict]:
    """Return a row for each round, and one for the attack."""
    return [*({"measured": f"round {row['round']}", **row} for row in curve(folder)),
            *({"measured": row["attack"], **row} for row in leakage.measure(folder) if row["images"] == "all")]


def compare(ours: pd.DataFrame, reference: pd.DataFrame) -> pd.DataFrame:
    """Return a row for each figure: committed, here, the largest difference allowed, and whether it is met."""
    values = [rows.reindex(columns=[*KEYS, *TOLERANCES]).melt(KEYS, var_name="figure").dropna()
              .set_index([*KEYS, "figure"])["value"] for rows in (reference, ours)]
    table = pd.concat(values, axis=1, keys=["committed", "here"]).reset_index()
    table["allowed"] = table["figure"].map(TOLERANCES)
    table.loc[table["figure"] == "kl_nats", "allowed"] *= table["committed"]
    return table.assign(met=(table["here"] - table["committed"]).abs() <= table["allowed"])   # never of a gap


EXPERIMENT = Experiment(
    name="verify", question="Does this copy of the project give the committed results?", tasks=tasks,
    measure=measure, settings=KEYS, tabulate=lambda rows: rows, keys={"method": "method", "measured": "measured"},
    values={"deployed": ("accuracy", "{:.3f}")}, spread="deployed",
    draw=lambda rows: dots(rows, KEYS, ["deployed"]))


def main(argv: list[str] | None = None) -> int:
    """Run the check and return the exit status: 1 if something differs."""
    parser = Parser("verify.py", EXPERIMENT.question)
    parser.add_argument("--write", action="store_true", help="make what results/reference/verify.csv lacks")
    if parser.parse(argv).write:
        return common.main(EXPERIMENT, [])
    for task in tasks():   # of a check that was interrupted, maybe with other code
        for folder in ("results", "saved_models"):
            shutil.rmtree(ROOT / folder / task.run, ignore_errors=True)
    try:
        reference, stale = read(REFERENCE / "verify.csv"), outdated()
        print("two runs and an attack on each: about three minutes", flush=True)
        with tempfile.TemporaryDirectory(prefix="verify-") as out:
            if status := common.main(EXPERIMENT, ["--out", out]):
                return status
            table = compare(read(Path(out) / "verify.csv"), reference)
    except (InputError, OSError) as error:
        print(error_line("verify.py", error), file=sys.stderr)
        return 2
    print(table.to_string(index=False, float_format="{:.4g}".format), *stale, sep="\n")
    found = len(stale) + (~table["met"]).sum()
    print(f"differences: {found}" if found else "verified: the pages, and all figures of two runs and two attacks")
    return int(found > 0)


if __name__ == "__main__":
    with steady_output("verify.py"):
        sys.exit(main())
