"""An earlier run of the same name: resume it, overwrite it, or refuse; and what must be equal to resume it."""
import json
import sys
from argparse import Namespace
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import datasets
from methods import METHODS
from options import COMMON, args_parser, idle, preset_parser
from parsing import Parser
from runs import configs, folders
from utils import InputError, shown

# Options that change a run's numbers by rounding at most, and so may differ when it is resumed.
MAY_DIFFER = {"resume", "overwrite", "checkpoint_seconds", "rendezvous_seconds", "save_rounds", "eval_every",
              "device", "precision", "data_dir", "results_dir", "models_dir", "tensorboard"}
GIVEN = {"resume", "overwrite", "run_name", "results_dir"}   # they say what is resumed, and where it is
# What ``config.json`` says of the machine; of these, what can change a number.
ENVIRONMENT = ("python", "torch", "numpy", "commit", "device", "system", "processes", "precision")
DECISIVE = ("precision", "device", "torch", "numpy", "commit")


def arguments(argv: list[str]) -> Namespace:
    """Parse a command line; with ``--run_name`` and ``--resume``, other options may come from ``config.json``.

    Exits with status 2 and one line on a mistake, or if there is no such data set.
    """
    parser = preset_parser(argv)
    given = parser.parse(argv)
    path = given.results_dir / str(given.run_name) / "config.json"
    if given.resume and given.run_name and path.exists():
        set_stored(parser, argv, path)
    args = args_parser(argv, parser)
    if args.resume and not (args.results_dir / args.run_name).exists():
        print(f"note: there is no run {args.run_name} to resume in {args.results_dir}; it is started",
              file=sys.stderr)
    if fault := datasets.unknown(args.dataset, args.data_dir):
        parser.error(fault)
    return args


def set_stored(parser: Parser, argv: list[str], path: Path) -> None:
    """Make the options of a ``config.json`` the parser's defaults; exits if the command line contradicts them."""
    try:
        stored = configs.completed(configs.read(path, *(option.name for option in COMMON))["options"])
    except InputError as error:
        parser.error(f"{error}; move {path.parent} away, or give another --run_name")
    unread = {option.name for option, *_ in idle(stored)}
    stored = {name: stored[name] for name in parser.options.keys() & stored.keys() - unread - GIVEN}
    parser.set_defaults(**stored)
    now = parser.parse(argv)
    now.dataset = datasets.canonical(now.dataset, now.data_dir)
    if fault := difference(now.run_name, stored, {name: getattr(now, name) for name in stored}):
        parser.error(fault)


def difference(name: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """Return why run ``name`` with options ``before`` cannot go on with ``now``, in one line; None if it can."""
    plain = json.loads(json.dumps(dict(now), default=str))
    for key in plain:
        if key in MAY_DIFFER or plain[key] == before.get(key):
            continue
        if key == "rounds" and plain[key] > before["rounds"]:
            if METHODS[plain["method"]].accounts:
                return (f"--rounds {plain[key]}: the noise of --method {plain['method']} depends on their number, "
                        f"which was {before[key]} when run {name} was started; give another --run_name")
            continue
        return (f"--resume: run {name} was started with --{key} {shown(before.get(key))}, not "
                f"{shown(plain[key])}; give the same options, or another --run_name")
    return None


def lock_folders(results: Path, models: Path, held: ExitStack) -> None:
    """Create and lock both folders of a run until ``held`` closes."""
    for folder in (results, models):
        folder.mkdir(parents=True, exist_ok=True)
        if folder is results or not folder.samefile(results):   # locked already
            folders.lock(folder, held, "--run_name")


def admit(results: Path, models: Path, config: Mapping[str, Any]) -> dict | None:
    """Decide what happens to an earlier run; delete it if it is overwritten.

    Args:
        config: the content of this run's ``config.json``.

    Returns:
        The earlier run's ``config.json``, if it is resumed.

    Raises:
        InputError: it can be neither, or something foreign is in the way; nothing has changed.
    """
    overwrite, path = config["options"]["overwrite"], results / "config.json"
    checkpoints, scraps, old = folders.checkpoints(models), folders.scraps(models), None
    if path.exists():
        try:
            old = configs.of_this_program(path)
        except InputError as error:
            raise InputError(f"{error}; move {results} away, or give another --run_name") from error
    elif foreign := [p.name for p in results.iterdir() if not p.name.startswith(".")]:
        raise InputError(f"{results} holds {shown(foreign[0])} but no config.json, so it is no run of this "
                         "program; move it away or give another --run_name")
    folders.refuse_foreign(*scraps, *(checkpoints.values() if overwrite or old is None else ()))
    if old is None and (checkpoints or scraps) and not overwrite:
        raise InputError(f"{models} holds checkpoints of a run that is not in {results}; use --overwrite to "
                         "delete them, or give another --run_name or --models_dir")
    earlier = None if overwrite or old is None else resumable(path, config, checkpoints)
    if earlier is None:
        delete(results, models, old)
    for folder in scraps:   # nobody else trains here, or attacks
        folders.remove(folder)
    for scrap in folders.half_written(results, rf"{folders.OF_TRAINING}|config\.json"):
        scrap.unlink()
    return earlier


def delete(results: Path, models: Path, config: dict | None) -> None:
    """Delete the files of a run that is overwritten, of which ``config`` is the ``config.json``, if it has one.

    Killed in between, it leaves that run, unfinished, which --resume goes on with: ``config.json`` says so first
    and stays, and the CSVs go when no checkpoint relies on them any more.
    """
    if config is not None and config.get("status") != "unfinished":
        configs.write(results, {**config, "status": "unfinished"})
    attacks = folders.files(results, f"{folders.OF_ATTACKS}|{folders.OF_MEMBERSHIP}")
    for path in sorted(attacks, key=lambda path: (path.name == "attack.json", path.name != "attack.csv")):
        path.unlink()
    for _, folder in sorted(folders.checkpoints(models).items(), reverse=True):
        folders.remove(folder)
    for path in (*folders.files(results, folders.OF_TRAINING), *folders.event_files(results)):
        path.unlink()


def resumable(path: Path, config: Mapping[str, Any], checkpoints: Mapping[int, Path]) -> dict:
    """Return an earlier run's ``config.json``, if this run may go on with it.

    Raises:
        InputError: --resume was not given, or options, images, clients or initial weights differ.
    """
    options, name = config["options"], config["options"]["run_name"]
    try:
        old = configs.read(path, "rounds", "save_rounds")
    except InputError as error:
        raise InputError(f"{error}; start again with --overwrite") from error
    before, finished = old["options"]["rounds"], old["status"] == "finished"
    if not options["resume"]:
        raise InputError(f"run {name} is already there, {old['status']}; use --resume to go on, --overwrite to "
                         "start again, or another --run_name")
    if fault := difference(name, configs.completed(old["options"]), options):
        raise InputError(fault)
    images = old["images"] if isinstance(old.get("images"), dict) else {}
    if images.get("data") != config["images"]["data"]:
        data = Path(options["data_dir"]) / f"{options['dataset']}.npz"
        raise InputError(f"--resume: {data} does not hold the images and labels that run {name} was started with; "
                         "put them back, or give another --run_name")
    for what, differs in (("the images are dealt to clients", images.get("dealt") != config["images"]["dealt"]),
                          ("the initial weights are drawn", old.get("start") != config["start"])):
        if differs:
            raise InputError(f"--resume: {what} otherwise than when run {name} was started; resume it with the "
                             "NumPy and PyTorch versions that began it, or give another --run_name")
    if finished and options["rounds"] > before and before not in checkpoints:
        raise InputError(f"--resume: run {name} has no checkpoint of its last round, {before}, to go on from; "
                         "give another --run_name, or start again with --overwrite")
    return old


def note_environment(config: dict, earlier: Mapping[str, Any], done: int) -> str | None:
    """Record in ``config`` in which environment each round was computed.

    Args:
        config: of this environment; changed in place.
        earlier: of the run so far.
        done: rounds in the checkpoint; later ones will be computed again.

    Returns:
        A warning, if this environment may compute other numbers than the last one.
    """
    if not done:   # everything is computed here
        return None
    now, first = ({name: entry.get(name) for name in ENVIRONMENT} for entry in (config, earlier))
    later = [entry for entry in earlier.get("resumed", []) if entry["from_round"] <= done]
    last = later[-1] if later else first
    changed = [f"{name} {shown(now[name])} instead of {shown(last.get(name))}" for name in DECISIVE
               if str(last.get(name)) != str(now[name])]
    if changed:
        later.append({"from_round": done + 1, **now})
    config.update(first, **({"resumed": later} if later else {}))
    return (f"warning: the run goes on with {', '.join(changed)}; from round {done + 1} on its numbers are not "
            "those of an uninterrupted run, and config.json says so") if changed else None
