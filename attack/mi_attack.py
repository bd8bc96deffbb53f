"""Attack a trained run, and say of each attack whether it leaks or is as a guess.

    python attack/mi_attack.py --run mnist10k-shards-rve_pfl-seed1

Every attack that fits is run by every adversary, unless options choose some. Written to results/<run>/:

- attack.csv: a row for each reconstruction and each control;
- attack_summary.csv: their means with 95 % bootstrap intervals;
- attack_latents.csv: how much a latent z can tell at most;
- attack_<adversary>_<attack>_round<r>_client<k>.png: reconstructions beside the true images and controls; after
  the attack's name what it observes, if that is not one draw of z.

An adversary reads only its own files (access.py). Whatever it trains, it trains on images that no client
owns, or on another data set (--public). After an interruption, the same command goes on where it stopped.
"""
import json
import sys
import time
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))   # the project, whatever the folder

import pandas as pd
from tqdm import tqdm

import datasets
from attack.access import ADVERSARIES, Target, Victim, open_target
from attack.attacks import ATTACKS, unfit
from attack.command import chosen_rounds, exit_status, folder_options, public_options, service_options
from attack.latents import OBSERVED
from attack.scene import CLIENT_LR, FEW_IMAGES, Scene
from attack.tables import ATTACK_COLUMNS, WORST, Unit, read_attack, summarise, worst_identified
from attack.verdict import judge
from engine.signals import check, steady_output
from parsing import HUGE, Option, Parser
from runs import folders
from runs.configs import read_json
from runs.csvs import read_csv
from utils import InputError, keep_freed_memory, printable, shown, write_whole

SCOPE_OPTIONS = ("adversary", "attack", "observe", "clients", "rounds")   # choose attacks, and do not change them
PLACE_OPTIONS = ("overwrite", "results_dir", "models_dir", "data_dir")
# What is printed of an attack, and how: means over its first choices.
SHOWN = {"ssim": ("SSIM", "{:.2f}"), "class_rank": ("rank in its class", "{:.0f}"),
         "nearest_rank": ("rank", "{:.0f}"), "psnr": ("PSNR", "{:.1f} dB"),
         "evaluator_correct": ("evaluator right", "{:.0%}")}
PICTURED = ("ssim", "psnr")   # say nothing of an attack that makes no image


def make_parser() -> Parser:
    """The options."""
    parser = Parser("mi_attack.py", "Attack a trained run, and say of each attack whether it leaks, is as a "
                    "guess, or fails.")
    for option in (
            Option("run", "the run's folder name under RESULTS_DIR and MODELS_DIR", required=True),
            Option("adversary", "the adversaries", default=list(ADVERSARIES), choices=ADVERSARIES, several=True),
            Option("attack", "the attacks, as far as they fit an adversary and the method: "
                   + ", ".join(f"{name} ({row.source})" for name, row in ATTACKS.items()), default=list(ATTACKS),
                   choices=ATTACKS, several=True),
            Option("clients", "numbers of the victims", int, [0], within=(0, HUGE), several=True),
            Option("rounds", "attack the checkpoints of these rounds (the latest if not given); 0 is the start",
                   int, within=(0, HUGE), several=True),
            Option("observe", "what attacks on latents see of an image: z is one draw, zN are N draws, as z8; "
                   "rounds is one draw in each round so far, with that round's encoder; mu is the mean of z; "
                   "train is one draw with the encoder's dropout", default=["z"], pattern=OBSERVED, several=True),
            Option("images", "how many of a client's training images are attacked at most (if not given: all, "
                   f"where an attack is cheap: {', '.join(name for name, row in ATTACKS.items() if row.cheap)}; "
                   f"{FEW_IMAGES} elsewhere)", int, within=(1, HUGE)),
            Option("restarts", "how often a search starts anew", int, 3, within=(1, 1000)),
            Option("iterations", "steps of a search", int, 300, within=(1, HUGE)),
            Option("client_lr", "size of the client's SGD steps whose upload the curious server observes; where "
                   "uploads are noised, a longer step shows more", float, CLIENT_LR, within=(1e-6, 10)),
            Option("train_epochs", "epochs of training on public images", int, 20, within=(1, HUGE)),
            *service_options(32), *public_options(10_000),
            Option("overwrite", "delete what earlier attacks on this run found", bool, False),
            *folder_options()):
        parser.add(replace(option, group="attack"))
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run a command line and return the exit status."""
    args = make_parser().parse(argv)
    return exit_status("mi_attack.py", args, attack_all,
                       "interrupted; the same command goes on where it stopped")


def attack_all(args: Namespace) -> None:
    """Run every attack that was asked for, fits, and is not done yet.

    Raises:
        InputError: no attack fits, the run cannot be attacked, or an earlier attack had other options.
    """
    keep_freed_memory()
    args.public = datasets.canonical(args.public, args.data_dir)
    target = open_target(args.run, args.results_dir, args.models_dir, args.data_dir)
    rounds = chosen_rounds(target, args)
    scene = Scene(target, args)
    for path in folders.half_written(target.results, folders.OF_ATTACKS):
        path.unlink()
    plan = planned(scene, args, rounds)
    for who, r, k in dict.fromkeys((unit.adversary, unit.round, unit.client) for unit in plan):
        scene.adversary(who, r, k)   # a bad file is refused here, before results of earlier attacks change
        Victim(target, r, k)
    options, rows = begin(target, args)
    run_planned(scene, plan, options, rows)
    # From the rounded figures of the file, as it would be if this attack had gone on with those of an earlier one.
    summary = summarise(read_attack(target.results / "attack.csv").to_dict("records"))
    write_whole(target.results / "attack_summary.csv",
                lambda file: summary.to_csv(file, index=False, float_format="%.5g"))
    latents = write_latents(target, [scene.latents(r, k) for r, k in dict.fromkeys(
        (r, k) for r in rounds for k in args.clients)])
    print("", scene.about(), *latents, sep="\n")
    print(f"results:     {printable(target.results)}/attack.csv, attack_summary.csv, attack_*.png")


def planned(scene: Scene, args: Namespace, rounds: list[int]) -> list[Unit]:
    """The attacks to run, each once; InputError if none fits."""
    why = {(who, how, k): unfit(how, who, scene.target) or scene.unscorable(how, k)
           for who in args.adversary for how in args.attack for k in args.clients}
    plan = [Unit(who, how, r, k, observed) for r in rounds for k in args.clients for who in args.adversary
            for how in args.attack if why[who, how, k] is None
            for observed in (args.observe if ATTACKS[how].of_latents else [""])]
    if not plan:
        reasons = "; ".join(sorted({reason for reason in why.values() if reason}))
        raise InputError(f"--run {args.run}: none of these attacks fits ({reasons})")
    for last in {unit.round for unit in plan if unit.observed == "rounds"}:
        gone = set(range(1, last + 1)) - set(scene.target.rounds())
        if gone or not last:
            raise InputError(f"--observe rounds: there is no checkpoint of round {min(gone, default=1)}; attack a "
                             "later round, and train with --save_rounds and every round up to it")
    return list(dict.fromkeys(plan))


def run_planned(scene: Scene, plan: list[Unit], options: dict, rows: list[dict]) -> None:
    """Run what is not in ``rows`` yet. Add its rows, save them, and print a line about each attack."""
    done = {Unit(*(row[column] for column in Unit._fields)) for row in rows}
    todo = [unit for unit in plan if unit not in done]
    with tqdm(total=len(plan), initial=len(plan) - len(todo), unit="attack", disable=None) as bar:
        for unit in todo:
            bar.set_description(" ".join(map(str, unit)))
            started = time.monotonic()
            found = scene.attack(*unit)
            if not rows:
                write_options(scene.target, options)
            rows += found
            rows.sort(key=place)
            write_rows(scene.target, rows)
            bar.write(f"{unit.adversary} {unit.words} round {unit.round} client {unit.client}: "
                      f"{in_words(found, unit)} ({time.monotonic() - started:.0f} s)")
            bar.update(1)
            check()


def place(row: dict) -> tuple:
    """Return what rows are sorted by: the same file whichever attacks were asked for first."""
    who, how = (list(table).index(row[column]) if row[column] in table else len(table)
                for column, table in (("adversary", ADVERSARIES), ("attack", ATTACKS)))
    return row["round"], row["client"], who, how, row["observed"]


def begin(target: Target, args: Namespace) -> tuple[dict, list[dict]]:
    """The options that decide the rows, and the rows of earlier attacks with the same options, if any.

    Raises:
        InputError: the earlier attacks' files are damaged, or had other options.
    """
    options = {key: value for key, value in json.loads(json.dumps(vars(args), default=str)).items()
               if key not in (*SCOPE_OPTIONS, *PLACE_OPTIONS)}
    described, table = target.results / "attack.json", target.results / "attack.csv"
    if args.overwrite:
        table.unlink(missing_ok=True)
    if not table.exists():   # also where an --overwrite was interrupted: the other files belong to no rows
        for old in folders.own(target.results, folders.OF_ATTACKS):
            old.unlink()
        return options, []
    try:
        before, rows = read_json(described), read_attack(table)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{target.results}: attack.csv or .json is damaged; use --overwrite") from error
    differ = [key for key in options if before.get(key) != options[key]]
    if differ:
        raise InputError(f"--{differ[0]} {options[differ[0]]}: this run was attacked before with "
                         f"{shown(before.get(differ[0]))}; give the same, or --overwrite to start again")
    return options, rows.to_dict("records")


def write_options(target: Target, options: dict) -> None:
    """Write ``attack.json``. It comes just before the first rows, so a refused attack leaves no file."""
    write_whole(target.results / "attack.json",
                lambda file: file.write((json.dumps(options, indent=2) + "\n").encode()))


def write_rows(target: Target, rows: list[dict]) -> None:
    """Write ``attack.csv`` anew, so that an attack is in it with all its rows or not at all."""
    table = pd.DataFrame(rows, columns=ATTACK_COLUMNS)
    write_whole(target.results / "attack.csv",
                lambda file: table.to_csv(file, index=False, float_format="%.6g"))


def write_latents(target: Target, found: list[dict | None]) -> list[str]:
    """Add rows to ``attack_latents.csv``, which has one for each round and client; say in words what is new.

    Raises:
        InputError: the file is there and damaged.
    """
    path, rows = target.results / "attack_latents.csv", list(filter(None, found))
    if not rows:
        return []
    table = pd.DataFrame(rows)
    if path.exists():
        try:
            table = pd.concat([read_csv(path)[list(table)].apply(pd.to_numeric), table])
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path} is damaged; remove it, or use --overwrite") from error
    table = table.drop_duplicates(["round", "client"], keep="last").sort_values(["round", "client"])
    write_whole(path, lambda file: table.to_csv(file, index=False, float_format="%.5g"))
    return [f"round {row['round']} client {row['client']}: z tells at most {row['bound_nats']:.0f} nats "
            f"about an image (sigma {row['sigma']:.3f}, SNR {row['snr_db']:.1f} dB). For Gaussian images, no "
            f"attack on z could have a mean squared error below {row['mse_bound']:.2g}" for row in rows]


def in_words(rows: list[dict], unit: Unit) -> str:
    """An attack's verdict in one line: the word, then scores, those that decide beside their control's."""
    table, attack = pd.DataFrame(rows, columns=ATTACK_COLUMNS), ATTACKS[unit.attack]
    first = table[(table["restart"] == 0) & (table["control"] == "")]
    verdict = judge(table, attack)
    compared, parts = {one.metric: one for one in verdict.comparisons}, []
    for metric, (name, form) in SHOWN.items():
        if attack.chooses and metric in PICTURED:
            continue
        text = f"{name} {form.format(first[metric].mean())}"
        if one := compared.get(metric):
            text += f" ({one.control.replace('_', ' ')} {form.format(one.control_score)}, p = {one.p:.2g})"
        parts.append(text)
    if attack.kind == "image":
        parts.append(f"identified {first['identified'].sum():.0f} of {len(first)} (a guess: "
                     f"{first['guess'].sum():.1f})")
        if (worst := worst_identified(first)) == worst:
            parts.append(f"of the {WORST:.0%} with the highest KL {worst:.0%}")
    things = {"class": ("class", "classes"), "image": ("image", "images")}[attack.kind][verdict.count > 1]
    return f"{verdict.word}{f' (only {verdict.count} {things})' * verdict.few}. {', '.join(parts)}"


if __name__ == "__main__":
    with steady_output("mi_attack.py"):
        sys.exit(main())
