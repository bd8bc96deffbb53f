"""Files that are whole or not there: written beside their place, then renamed; CSVs that only grow."""
import csv
import errno
import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from utils import InputError


def write_whole(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Have ``write`` fill a file beside ``path``, then rename it: a reader sees all of it or nothing.

    Raises:
        OSError: the file cannot be written (no room, no permission); nothing is left behind.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(partial, "wb") as file:
            write(file)
        partial.replace(path)
    except RuntimeError as error:   # torch.save's name for a write that failed
        raise OSError(errno.EIO, f"could not be written ({str(error).splitlines()[0]})", str(path)) from error
    finally:
        partial.unlink(missing_ok=True)


def remove_leftovers(folder: Path, names: str) -> None:
    """Delete what ``write_whole`` of a killed process left of files whose names fit the pattern ``names``.

    Where no lock says that nobody else writes there: a process that still lives is left its files.
    """
    for path in folder.glob(f".{names}.tmp"):
        owner = path.name.split(".")[-2]
        if owner.isdecimal() and not _lives(int(owner)):
            path.unlink(missing_ok=True)


def _lives(pid: int) -> bool:
    """Whether another process has this number; our own is no writer's yet."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:   # somebody else's
        return True
    return pid != os.getpid()


def append_csv(path: Path, columns: list[str], rows: list[dict]) -> int:
    """Add rows to a CSV, all of them or, on an error, none; NaN is an empty field.

    Returns:
        The file's length in bytes after that, for ``cut_csv``.
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writerows([{key: _format(value) for key, value in row.items()} for row in rows])
    with open(path, "r+b", buffering=0) as file:
        end, data = file.seek(0, os.SEEK_END), text.getvalue().encode()
        try:
            while data:
                data = data[file.write(data):]
        except OSError:
            file.truncate(end)
            raise
        return file.tell()


def cut_csv(path: Path, columns: list[str], size: int | None) -> None:
    """Leave of a CSV its first ``size`` bytes, what it held at a checkpoint; without one, its header.

    Raises:
        InputError: the file is shorter than that, or not one that ended a line there.
    """
    header = (",".join(columns) + "\n").encode()
    if size is None:
        write_whole(path, lambda file: file.write(header))
    elif not path.exists() or path.stat().st_size < size:
        raise InputError(f"{path} is shorter than when it was saved; start again with --overwrite")
    else:
        with open(path, "r+b") as file:
            first, _ = file.read(len(header)), file.seek(max(size, 1) - 1)
            if first != header or size < len(header) or file.read(1) != b"\n":
                raise InputError(f"{path} is not as it was saved; start again with --overwrite")
            file.truncate(size)


def _format(value: object) -> object:
    if isinstance(value, float):
        return "" if value != value else format(value, ".8g")
    return value
