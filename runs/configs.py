"""The ``config.json`` of an earlier run, checked in one place for all who read it.

It may be of an older version, damaged, or made by somebody else. So its options have to pass the same checks as
those of a command line.
"""
import json
from pathlib import Path

from methods import METHODS
from options import of_rows, stored_fault
from utils import InputError, plain_file, shown

# Protocol -> the split of images that is evaluated, as CSVs and pictures name it.
EVALUATION_SPLIT = {"held-out": "test", "resplit": "test-resplit", "validate": "validation"}
FORMAT = 1   # of config.json, by which this program's are told from others
LARGEST = 16 * 2**20   # bytes of JSON: a few KiB are usual


def read_json(path: Path) -> dict:
    """A file that holds one JSON object.

    Raises:
        OSError: it cannot be read.
        ValueError: it holds something else; the text says what.
    """
    if plain_file(path).stat().st_size > LARGEST:
        raise ValueError(f"over {LARGEST:,} bytes")
    try:
        found = json.loads(path.read_bytes())
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not isinstance(found, dict):
        raise ValueError("no JSON object")
    return found


def completed(options: dict) -> dict:
    """The options of a run, and where an older version lacked one of a method's, the value that it then had."""
    return {**{option.name: option.unread for option in of_rows(METHODS)}, **options}


def of_this_program(path: Path) -> dict:
    """Return what a ``config.json`` holds, if its format is this version's; its options may still be anything.

    Raises:
        InputError: it cannot be read, or is of another version or program.
    """
    try:
        config = read_json(path)
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror or error})") from error
    except ValueError as error:
        raise InputError(f"{path} is damaged ({error})") from error
    if type(config.get("format")) is not int or config["format"] != FORMAT:
        fault = f"its format is {shown(config['format'])}, not {FORMAT}" if "format" in config else "no format"
        raise InputError(f"{path} is not of this version of RVE-PFL.py ({fault})")
    return config


def read(path: Path, *needed: str) -> dict:
    """A ``config.json``: at least its ``status``, ``protocol`` and ``options``.

    Options that it lacks are those of an older version, and so are allowed to, but for the ``needed`` ones;
    options that this version does not know are left as they are.

    Raises:
        InputError: it cannot be read, or is no run's of this version; one line that says why.
    """
    config = of_this_program(path)
    options, fault = config.get("options"), None
    if config.get("status") not in ("unfinished", "finished"):
        fault = "its status is neither unfinished nor finished"
    elif config.get("protocol") not in tuple(EVALUATION_SPLIT):   # which compares what cannot be hashed, too
        fault = f"its protocol is none of {', '.join(EVALUATION_SPLIT)}"
    elif not isinstance(options, dict):
        fault = "it has no options"
    else:
        missing = [name for name in needed if name not in options]
        fault = f"it has no --{missing[0]}" if missing else stored_fault(options)
    if fault:
        raise InputError(f"{path} is not of this version of RVE-PFL.py ({fault})")
    return config
