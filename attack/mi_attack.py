"""Attack a run with everything that fits each adversary, and score it beside controls.

    python attack/mi_attack.py --run mnist10k-shards-rve_pfl-seed1

Writes to results/<run>/: attack.csv, a row for each reconstruction and control; attack_summary.csv, their
means with 95 % bootstrap intervals; attack_latents.csv, what z can tell; and
attack_<adversary>_<attack>_round<r>_client<k>.png. An adversary reads its own files only (access.py); what it
trains, it trains on images that no client owns, or on another data set (--public). Interrupted, it goes on
where it stopped.
"""
import json
import sys
import time
from argparse import Namespace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))   # the project, whatever the folder

import numpy as np
import pandas as pd
from tqdm import tqdm

from attack.access import ADVERSARIES, Target, Victim, open_target
from attack.attacks import ATTACKS, unfit
from attack.scene import ATTACK_COLUMNS, METRICS, POOL, UNIT, Scene
from engine.signals import Interrupted, Interrupts, steady_output
from options import NAME, ROOT, Formatter, Parser, shown
from runs.configs import read_json
from utils import InputError, keep_freed_memory, remove_leftovers, rng, write_whole

WHOLE = ("round", "client", "label", "image", "restart")   # columns of whole numbers
SCOPE_OPTIONS = ("adversary", "attack", "clients", "rounds")   # may differ between calls


def make_parser() -> Parser:
    """The options."""
    parser = Parser(prog="mi_attack.py", description=__doc__.splitlines()[0], allow_abbrev=False,
                    formatter_class=Formatter)
    add, group, huge = parser.add, parser.add_argument_group("attack"), 10**9
    add(group, "--run", required=True, help="the run's folder name under RESULTS_DIR and MODELS_DIR")
    add(group, "--adversary", nargs="+", choices=ADVERSARIES, default=list(ADVERSARIES), help="who attacks")
    add(group, "--attack", nargs="+", choices=tuple(ATTACKS), default=list(ATTACKS), help="how")
    add(group, "--clients", nargs="+", type=int, default=[0], within=(0, huge), help="whom")
    add(group, "--rounds", nargs="+", type=int, within=(1, huge),
        help="rounds whose checkpoints are attacked (the latest if not given)")
    add(group, "--images", type=int, default=8, within=(1, POOL),
        help="of the client's training images, for attacks on single images")
    add(group, "--restarts", type=int, default=3, within=(1, 1000), help="of each search")
    add(group, "--iterations", type=int, default=300, within=(1, huge), help="of each search")
    add(group, "--train_epochs", type=int, default=20, within=(1, huge),
        help="of what an adversary trains on public images")
    add(group, "--draws", type=int, default=32, within=(1, 1000), help="of z, averaged in an answer")
    add(group, "--scores", type=int, default=3, within=(1, huge), help="class scores that a service tells")
    add(group, "--public", default="unowned", pattern=NAME,
        help="what adversaries train on: `unowned`, the run's images that no client has, or another data "
             "set's NAME, of the same shape")
    add(group, "--public_images", type=int, default=10_000, within=(200, huge),
        help="of those at most, in what an adversary trains on them")
    add(group, "--seed", type=int, default=1, within=(0, 2**31 - 1), help="decides every random draw")
    add(group, "--overwrite", action="store_true", help="forget what an earlier attack on this run found")
    for name, where in (("results_dir", "results"), ("models_dir", "saved_models"), ("data_dir", "data")):
        add(group, f"--{name}", type=Path, default=ROOT / where, help="as in RVE-PFL.py")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Target a command line and return the exit status."""
    args = make_parser().parse(argv)
    try:
        with Interrupts():
            attack_all(args)
        return 0
    except InputError as error:
        line, status = f"mi_attack.py: error: {error}", 2
    except OSError as error:
        line, status = f"mi_attack.py: error: {error.filename or 'a file'}: {error.strerror or error}", 2
    except Interrupted:
        line, status = "interrupted; the same command goes on where it stopped", 130
    print(line, file=sys.stderr)
    return status


def attack_all(args: Namespace) -> None:
    """Every adversary, attack, round and client that is asked for, fits and is not done yet."""
    keep_freed_memory()
    target = open_target(args.run, args.results_dir, args.models_dir, args.data_dir)
    rounds = args.rounds or target.rounds()[-1:]
    if not rounds:
        raise InputError(f"--run {args.run}: {target.models} holds no checkpoint yet")
    last = target.options["num_users"] - 1
    if max(args.clients) > last:
        raise InputError(f"--clients {max(args.clients)}: the run's clients are 0 to {last}")
    for r in rounds:
        target.file(r, "shared.pt")
    scene = Scene(target, args)
    remove_leftovers(target.results, "attack*")
    unfits = {(who, how, k): unfit(how, who, target) or scene.unfit(how, k)
              for who in args.adversary for how in args.attack for k in args.clients}
    plan = list(dict.fromkeys(   # given twice, it is attacked once
        (who, how, r, k) for r in rounds for k in args.clients for who in args.adversary
        for how in args.attack if unfits[who, how, k] is None))
    if not plan:
        reasons = "; ".join(sorted(set(unfits.values())))
        raise InputError(f"--run {args.run}: no attack asked for fits ({reasons})")
    for who, r, k in dict.fromkeys((who, r, k) for who, _, r, k in plan):
        scene.adversary(who, r, k)   # a file that is refused is so before an earlier attack is touched
        Victim(target, r, k)
    options, rows = begin(target, args)
    done = {tuple(row[column] for column in UNIT) for row in rows}
    with tqdm(total=len(plan), initial=len([u for u in plan if u in done]), unit="attack",
              disable=None) as bar:
        for unit in (unit for unit in plan if unit not in done):
            bar.set_description(" ".join(map(str, unit)))
            started = time.monotonic()
            found = scene.attack(*unit)
            if not rows:
                write_options(target, options)
            rows += found
            write_rows(target, rows)
            bar.write(f"{unit[0]} {unit[1]} round {unit[2]} client {unit[3]}: "
                      f"{outcome(rows, unit)} ({time.monotonic() - started:.0f} s)")
            bar.update(1)
    summary = summarise(rows)
    write_whole(target.results / "attack_summary.csv",
                lambda file: summary.to_csv(file, index=False, float_format="%.5g"))
    latents = write_latents(target, [scene.latents(r, k) for r, k in dict.fromkeys(
        (r, k) for r in rounds for k in args.clients)])
    print("", scene.about(), *latents, sep="\n")
    print(f"results:     {target.results / 'attack.csv'}, attack_summary.csv, attack_*.png")


def begin(target: Target, args: Namespace) -> tuple[dict, list[dict]]:
    """The options that rows depend on, and the rows of an earlier attack with the same, if any."""
    options = {key: value for key, value in json.loads(json.dumps(vars(args), default=str)).items()
               if key not in (*SCOPE_OPTIONS, "overwrite", "results_dir", "models_dir", "data_dir")}
    described, table = target.results / "attack.json", target.results / "attack.csv"
    if args.overwrite:   # also what would stand beside the new attack as if it were its own
        # The rows first and what they were made with last: killed in between, no row is left without that.
        for old in sorted(target.results.glob("attack*"),
                          key=lambda path: (path == described, path != table)):
            old.unlink()
    if not table.exists():
        return options, []
    try:
        before, rows = read_json(described), pd.read_csv(table, keep_default_na=False, na_values=[""],
                                                         dtype={"control": str})[ATTACK_COLUMNS]
        kinds = [rows[name].dtype.kind for name in (*WHOLE, *METRICS)]
        if set(kinds[:len(WHOLE)]) != {"i"} or not set(kinds) <= {"i", "f"}:
            raise ValueError("not numbers")
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{target.results}: attack.csv or .json is damaged; use --overwrite") from error
    if options.keys() - before.keys():
        raise InputError(f"{described} is of an older version, with other attacks; use --overwrite")
    differ = [key for key in options if before[key] != options[key]]
    if differ:
        raise InputError(f"--{differ[0]} {options[differ[0]]}: this run was attacked before with "
                         f"{shown(before[differ[0]])}; give the same, or --overwrite to start again")
    return options, rows.fillna({"control": ""}).to_dict("records")


def write_options(target: Target, options: dict) -> None:
    """``attack.json``, before the first row and not sooner: an attack that is refused leaves none.

    Without ``attack.csv``, after a kill, it says nothing; an earlier summary would pass for this attack's.
    """
    (target.results / "attack_summary.csv").unlink(missing_ok=True)
    write_whole(target.results / "attack.json",
                lambda file: file.write((json.dumps(options, indent=2) + "\n").encode()))


def write_rows(target: Target, rows: list[dict]) -> None:
    """``attack.csv``, whole: an attack is in it entirely or not at all."""
    table = pd.DataFrame(rows, columns=ATTACK_COLUMNS)
    write_whole(target.results / "attack.csv",
                lambda file: table.to_csv(file, index=False, float_format="%.6g"))


def write_latents(target: Target, found: list[dict | None]) -> list[str]:
    """``attack_latents.csv``, a row a round and client, earlier calls' included; what the new ones say."""
    path, rows = target.results / "attack_latents.csv", list(filter(None, found))
    if not rows:
        return []
    table = pd.DataFrame(rows)
    if path.exists():
        try:
            table = pd.concat([pd.read_csv(path)[list(table)].apply(pd.to_numeric), table])
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path} is damaged; remove it, or use --overwrite") from error
    table = table.drop_duplicates(["round", "client"], keep="last").sort_values(["round", "client"])
    write_whole(path, lambda file: table.to_csv(file, index=False, float_format="%.5g"))
    return [f"round {row['round']} client {row['client']}: z tells at most {row['kl_nats']:.0f} nats of an "
            f"image (sigma {row['sigma']:.3f}, SNR {row['snr_db']:.1f} dB); were images Gaussian, nobody who "
            f"holds z could do better than a mean squared error of {row['mse_bound']:.2g}" for row in rows]


def outcome(rows: list[dict], unit: tuple) -> str:
    """An attack's first choices in a few words."""
    mine = [row for row in rows if tuple(row[c] for c in UNIT) == unit and row["restart"] == 0
            and not row["control"]]
    mean = {name: np.mean([row[name] for row in mine]) for name in METRICS}
    rank = np.median([row["nearest_rank"] for row in mine])
    return (f"PSNR {mean['psnr']:.1f} dB, SSIM {mean['ssim']:.2f}, evaluator right "
            f"{mean['evaluator_correct']:.0%}, median rank {rank:.0f}")


def summarise(rows: list[dict], draws: int = 1000) -> pd.DataFrame:
    """Means with 95 % bootstrap intervals over images, of an adversary's first choices and of controls."""
    table = pd.DataFrame(rows, columns=ATTACK_COLUMNS)
    table = table[(table["restart"] == 0) | (table["control"] != "")]
    found = []
    for key, part in table.groupby(["adversary", "attack", "round", "control"], sort=False):
        picks = rng(0, "bootstrap").integers(len(part), size=(draws, len(part)))
        row = dict(zip(("adversary", "attack", "round", "control"), key, strict=True), n=len(part))
        for name in METRICS:
            values = part[name].to_numpy(float)
            low, high = np.quantile(values[picks].mean(1), (0.025, 0.975))
            row |= {name: values.mean(), f"{name}_low": low, f"{name}_high": high}
        found.append(row)
    return pd.DataFrame(found)


if __name__ == "__main__":
    with steady_output("mi_attack.py"):
        sys.exit(main())
