"""The ``config.json`` of a run: written, read, and checked in one place for all who read it.

The file may be damaged or made by somebody else, so its options pass the same checks as a command line's.
"""
import json
from pathlib import Path

from methods import METHODS
from options import of_rows, stored_fault
from utils import InputError, shown, write_whole

# Protocol -> the split of images that is evaluated, by its name in CSVs and plots.
EVALUATION_SPLIT = {"held-out": "test", "resplit": "test-resplit", "validate": "validation"}
FORMAT = 3   # of config.json, of the CSVs beside it, and of checkpoints


def write(folder: Path, config: dict) -> None:
    """Write a run's ``config.json``."""
    text = json.dumps(config, indent=2, default=str) + "\n"
    write_whole(folder / "config.json", lambda file: file.write(text.encode()))


def path_of(name: str, results_dir: Path) -> Path:
    """Return the path of the ``config.json`` of ``--run``; InputError if there is none."""
    path = results_dir / name / "config.json"
    if not path.exists():
        runs = sorted(other.parent.name for other in results_dir.glob("*/config.json"))
        raise InputError(f"--run {name}: there is no {path}; runs there: {', '.join(runs) or 'no runs'}")
    return path


def read_json(path: Path) -> dict:
    """Read a file with one JSON object; OSError if it cannot be read, ValueError if it holds something else."""
    try:
        content = json.loads(path.read_bytes())
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not isinstance(content, dict):
        raise ValueError("no JSON object")
    return content


def completed(options: dict) -> dict:
    """Return the options of a run, and of the methods' options that it lacks, the value for methods without it."""
    return {**{option.name: option.unread for option in of_rows(METHODS)}, **options}


def of_this_program(path: Path) -> dict:
    """Return the content of a ``config.json``, if its format is this program's; its options may be anything."""
    try:
        config = read_json(path)
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror or error})") from error
    except ValueError as error:
        raise InputError(f"{path} is damaged ({error})") from error
    if type(config.get("format")) is not int or config["format"] != FORMAT:
        fault = f"its format is {shown(config.get('format'))}, not {FORMAT}"
        raise InputError(f"{path} is not of this version of RVE-PFL.py ({fault})")
    return config


def read(path: Path, *needed: str) -> dict:
    """Return a ``config.json`` with valid ``status``, ``protocol`` and ``options``.

    Args:
        needed: options that it must have.

    Raises:
        InputError: it cannot be read, or a value is not of this program; one line says which.
    """
    config = of_this_program(path)
    options = config.get("options")
    allowed = {"status": ["unfinished", "finished"], "protocol": [*EVALUATION_SPLIT]}
    faults: list[str | None] = [f"its {name} is none of {', '.join(values)}" for name, values in allowed.items()
                                if config.get(name) not in values]
    if isinstance(options, dict):
        faults += [*(f"it has no --{name}" for name in needed if name not in options), stored_fault(options)]
    else:
        faults.append("it has no options")
    later = config.get("resumed", [])
    if not isinstance(later, list) or not all(isinstance(entry, dict) and isinstance(entry.get("from_round"), int)
                                              for entry in later):
        faults.append("its resumed is no list of environments")
    if fault := next(filter(None, faults), None):
        raise InputError(f"{path} is not of this version of RVE-PFL.py ({fault})")
    return config
