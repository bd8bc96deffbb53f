"""What ``--resume`` goes on with: options, images and environment of an earlier run, held against this one's."""
import json
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets
from methods import METHODS
from options import args_parser, common, idle, make_parser
from parsing import shown
from runs import configs
from utils import InputError

# Options that do not change a run's numbers but by rounding, and so may differ when it is resumed.
MAY_DIFFER = {"resume", "overwrite", "checkpoint_seconds", "rendezvous_seconds", "save_rounds", "eval_every",
              "device", "precision", "data_dir", "results_dir", "models_dir"}
HERE = {"resume", "overwrite", "run_name", "results_dir"}   # which say what is resumed, and where it is
# What ``config.json`` says of the machine; of these, what can change a number.
ENVIRONMENT = ("python", "torch", "numpy", "commit", "device", "system", "processes", "precision")
DECIDES = ("precision", "device", "torch", "numpy", "commit")


def arguments(argv: list[str]) -> Namespace:
    """Parse a command line; with ``--run_name`` and ``--resume``, the rest may be in that run's ``config.json``.

    Exits with status 2 and one line on a mistake.
    """
    parser = make_parser()
    given = parser.parse(argv)
    path = given.results_dir / str(given.run_name) / "config.json"
    if not (given.resume and given.run_name and path.exists()):
        return args_parser(argv)
    advice = f"move {path.parent} away, or give another --run_name"
    try:
        configs.of_this_program(path)
        advice = "start again with --overwrite"
        stored = configs.completed(configs.read(path, *(option.name for option in common()))["options"])
    except InputError as error:
        parser.error(f"{error}; {advice}")
    unread = {option.name for option, *_ in idle(stored)}
    stored = {name: stored[name] for name in parser.options.keys() & stored.keys() - unread - HERE}
    parser.set_defaults(**stored)
    now = parser.parse(argv)
    now.dataset = datasets.canonical(now.dataset, now.data_dir)
    if fault := unlike(given.run_name, stored, {name: getattr(now, name) for name in stored}):
        parser.error(fault)
    return args_parser(argv, parser)


def unlike(name: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """Return why a run that had these options cannot go on with those, in one line; None if it can.

    Args:
        name: the run's.
    """
    plain = json.loads(json.dumps(dict(now), default=str))
    for key in sorted(plain.keys() - MAY_DIFFER, key=list(plain).index):
        if plain[key] == before.get(key):
            continue
        if key == "rounds" and plain[key] > before["rounds"]:
            if METHODS[plain["method"]].protects:
                return (f"--rounds {plain[key]}: the noise of --method {plain['method']} depends on their number, "
                        f"which was {before[key]} when run {name} was started; give another --run_name")
            continue
        return (f"--resume: run {name} was started with --{key} {shown(before.get(key))}, not "
                f"{shown(plain[key])}; give the same options, or another --run_name")
    return None


def check(config: Mapping[str, Any], old: Mapping[str, Any]) -> None:
    """Check that a run may go on.

    Args:
        config, old: what ``config.json`` is to say, and what it says.

    Raises:
        InputError: its options, its images or its clients are others.
    """
    options, images = config["options"], old.get("images")
    name = options["run_name"]
    if fault := unlike(name, configs.completed(old["options"]), options):
        raise InputError(fault)
    images = images if isinstance(images, dict) else {}
    if images.get("data") != config["images"]["data"]:
        path = Path(options["data_dir"]) / f"{options['dataset']}.npz"
        raise InputError(f"--resume: {path} does not hold the images and labels that run {name} was started with; "
                         "put them back, or give another --run_name")
    if images.get("dealt") != config["images"]["dealt"]:
        raise InputError(f"--resume: the images are dealt to clients otherwise than when run {name} was started; "
                         "resume it with the NumPy version and the program that began it, or give another "
                         "--run_name")


def environments(config: Mapping[str, Any]) -> list[dict]:
    """Return where a run was computed, in order: ENVIRONMENT by name, and the first round, ``from_round``."""
    later = config.get("resumed")
    first = {"from_round": 1, **{name: config.get(name) for name in ENVIRONMENT}}
    return [first, *(one for one in (later if isinstance(later, list) else [])
                     if isinstance(one, dict) and type(one.get("from_round")) is int)]


def note_environment(config: dict, past: list[dict], done: int) -> str | None:
    """Let ``config.json`` say in which environment each round was computed.

    Args:
        config: of this environment; changed in place.
        past: ``environments`` of the run so far.
        done: the rounds that a checkpoint has. Later ones will be computed again.

    Returns:
        A warning, if this environment may compute other numbers than the last one.
    """
    kept = [one for one in past if one["from_round"] <= done]
    if not kept:
        return None
    now, last = {name: config[name] for name in ENVIRONMENT}, kept[-1]
    changed = [name for name in DECIDES if str(last.get(name)) != str(now[name])]
    config.update({name: kept[0].get(name) for name in ENVIRONMENT})
    if later := [*kept[1:], *([{"from_round": done + 1, **now}] if changed else [])]:
        config["resumed"] = later
    if not changed:
        return None
    what = ", ".join(f"{name} {shown(now[name])} instead of {shown(last.get(name))}" for name in changed)
    return (f"warning: the run goes on with {what}; from round {done + 1} on its numbers are not those of an "
            "uninterrupted run, and config.json says so")
