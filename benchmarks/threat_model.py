"""The server's threat model: rules x behaviours x share of malicious clients x partition, on mnist10k.

    python benchmarks/threat_model.py            train what is missing, then print the table
    python benchmarks/threat_model.py --table    print it from what is there

Each run trains the heads alone, on the encoders of a clean run (``--encoders_from``), so that no encoder
makes up for a bad head. Accuracies are honest clients', held out, deployed after the last round; the oracle
is the plain mean of honest uploads alone. Runs are named server-* and leave no checkpoints; interrupted, it
goes on where it stopped.
"""
import argparse
import contextlib
import gc
import io
import itertools
import shutil

import pandas as pd
from _path import load_driver  # lets this script import the project

from server.malicious import BEHAVIOURS
from server.rules import RULES
from utils import ROOT

OURS = "threat"   # tried at every share; the others, to save time, at the largest only


def plan(scale: argparse.Namespace) -> list[dict]:
    """Every run, clean ones and oracles first."""
    runs = [{"partition": partition, "rule": rule, "frac": 0.0, "behaviour": None}
            for partition in scale.partitions for rule in (OURS, "mean")]
    runs += [{"partition": partition, "rule": "mean", "frac": frac, "behaviour": "absent"}
             for partition in scale.partitions for frac in scale.fracs]
    tried = [behaviour for behaviour in BEHAVIOURS if behaviour != "absent"]
    runs += [{"partition": partition, "rule": rule, "frac": frac, "behaviour": behaviour}
             for rule in scale.rules for frac in scale.fracs if rule == OURS or frac == max(scale.fracs)
             for partition in scale.partitions for behaviour in tried
             if rule == OURS or behaviour != "passive"]
    return runs


def name(run: dict, scale: argparse.Namespace) -> str:
    """Its folder under results/."""
    attack = f"{run['behaviour']}-{run['frac']:g}" if run["behaviour"] else "clean"
    return f"server-{scale.dataset}-{run['partition']}-{run['rule']}-{attack}-seed{scale.seed}"


def call(driver, run: dict, scale: argparse.Namespace, **flags: object) -> None:
    """One run of RVE-PFL.py, silently, unless it is finished; ends this process if it fails."""
    flags = {"dataset": scale.dataset, "partition": run["partition"], "seed": scale.seed, **flags}
    argv = [word for flag, value in flags.items() for word in (f"--{flag}", str(value))]
    with contextlib.redirect_stdout(io.StringIO()):
        status = driver.main([*argv, "--resume"])
    if status:
        raise SystemExit(status)


def encoders(run: dict, scale: argparse.Namespace) -> str:
    """Name of the clean run whose encoders a run takes."""
    return f"server-{scale.dataset}-{run['partition']}-encoders-seed{scale.seed}"


def train(driver, run: dict, scale: argparse.Namespace) -> None:
    """A run of the plan; its checkpoint, most of it encoders that are there already, is not kept."""
    attack = {"malicious_frac": run["frac"], "malicious_behaviour": run["behaviour"]}
    if not run["behaviour"]:
        attack = {}
    call(driver, run, scale, rounds=scale.rounds, local_ep=scale.local_ep, aggregation=run["rule"],
         eval_every=scale.rounds,
         encoders_from=encoders(run, scale), run_name=name(run, scale), **attack)
    shutil.rmtree(ROOT / "saved_models" / name(run, scale), ignore_errors=True)
    gc.collect()   # a run's encoders, a gigabyte, hang on cycles


def outcome(run: dict, scale: argparse.Namespace) -> dict | None:
    """Honest clients' accuracy and, against their share of the clients, the malicious ones' weight."""
    folder = ROOT / "results" / name(run, scale)
    try:
        rounds, server = pd.read_csv(folder / "rounds.csv"), pd.read_csv(folder / "server.csv")
        server["trust"] = server["trust"].fillna(0)   # of an upload that is not finite
    except FileNotFoundError:
        return None
    last = rounds[(rounds["round"] == scale.rounds) & (rounds["stage"] == "deployed")]
    if last.empty:
        return None
    last, bad = last.iloc[0], server[server["malicious"] == 1]
    share = server["malicious"].mean()
    weight = bad.groupby("round")["weight"].sum(min_count=1).mean() / share if len(bad) else float("nan")
    return {**run, "accuracy": last["accuracy"], "worst": last["accuracy_worst"], "weight": weight,
            "auc": auc(server)}


def auc(server: pd.DataFrame) -> float:
    """How often an honest client's trust is over a malicious one's in the same round; ties count half."""
    pairs = [(good > bad) + 0.5 * (good == bad) for _, part in server.groupby("round")
             for good, bad in itertools.product(part.loc[part["malicious"] == 0, "trust"],
                                                part.loc[part["malicious"] == 1, "trust"])]
    return sum(pairs) / len(pairs) if pairs else float("nan")


def table(found: pd.DataFrame) -> str:
    """For each partition, share and rule: points lost to the oracle, worst behaviour first."""
    oracle = found[found["behaviour"] == "absent"].set_index(["partition", "frac"])["accuracy"]
    tried = found[found["behaviour"].notna() & (found["behaviour"] != "absent")].copy()
    tried["lost"] = [100 * (oracle[row.partition, row.frac] - row.accuracy) for row in tried.itertuples()]
    wide = tried.pivot_table(index=["partition", "frac", "rule"], columns="behaviour", values="lost")
    judged = wide.drop(columns=["passive"], errors="ignore")
    wide.insert(0, "worst", judged.max(axis=1))
    order = ["worst", *judged.max().sort_values(ascending=False).index,
             *wide.columns.intersection(["passive"])]
    lines = ["points of accuracy lost to the oracle", wide[order].sort_values(["partition", "frac", "worst"])
             .to_string(float_format="%.1f")]
    trusted = tried[tried["rule"] == "threat"].pivot_table(
        index=["partition", "frac"], columns="behaviour", values=["weight", "auc"])
    for figure in ("weight", "auc") if len(trusted) else ():
        lines += [f"threat: {figure}" + (" of malicious clients, 1 is their share" * (figure == "weight")),
                  trusted[figure].to_string(float_format="%.2f")]
    clean = found[found["behaviour"].isna()]
    lines += ["nobody malicious", clean[["partition", "rule", "accuracy", "worst"]].to_string(index=False)]
    return "\n\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", default="mnist10k")
    parser.add_argument("--seed", type=int, default=4)   # 2 was tuned on, 3 seen before constants changed; of
    # 1, 3, 6 and 8 the malicious own all of a class under shards, which no honest client can then miss
    parser.add_argument("--rules", nargs="+", choices=RULES, default=RULES)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--local_ep", type=int, default=1)
    parser.add_argument("--partitions", nargs="+", default=["shards", "dirichlet"])
    parser.add_argument("--fracs", nargs="+", type=float, default=[0.2, 0.3])
    parser.add_argument("--part", type=int, nargs=2, default=[0, 1], metavar=("I", "N"),
                        help="train each N-th run from the I-th only, so that N processes share the work")
    parser.add_argument("--prepare", action="store_true", help="train the encoders only")
    parser.add_argument("--table", action="store_true", help="train nothing")
    scale = parser.parse_args()
    runs = plan(scale)
    if not scale.table:
        driver = load_driver()
        for partition in scale.partitions:
            run = {"partition": partition}
            call(driver, run, scale, rounds=5, local_ep=2, aggregation="mean", run_name=encoders(run, scale))
        for run in [] if scale.prepare else runs[scale.part[0]::scale.part[1]]:
            train(driver, run, scale)
    found = list(filter(None, (outcome(run, scale) for run in runs)))
    if found and not scale.prepare:
        print(table(pd.DataFrame(found)))


if __name__ == "__main__":
    main()
