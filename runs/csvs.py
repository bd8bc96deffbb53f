"""The columns of a run's CSVs, which only grow by whole rows, and are cut back to a checkpoint."""
import csv
import io
import os
from pathlib import Path

from server.rules import RULES
from utils import InputError, write_whole

METRICS = ("loss", "accuracy", "precision", "recall", "f1", "kl_nats")   # of a client's model


def csv_columns(num_classes: int, backdoor: bool = False) -> dict[str, list[str]]:
    """Return the columns of each CSV; ``server.csv`` has those of every rule, empty where another rule ran.

    Args:
        backdoor: whether ``clients.csv`` has the success of the malicious clients' backdoor.
    """
    of_rules = dict.fromkeys(name for rule in RULES.values() for name in rule.columns)
    return {
        "clients.csv": ["round", "client", "stage", "split", "n", *METRICS, *["backdoor"] * backdoor],
        "rounds.csv": ["round", "stage", "split", "loss", "accuracy", "accuracy_std", "accuracy_worst",
                       "accuracy_images", *(f"accuracy_class_{c}" for c in range(num_classes)), *METRICS[2:],
                       "bytes_up", "bytes_down", "seconds"],
        "server.csv": ["round", "client", "n", *of_rules, "weight", "malicious"]}


def append_csv(path: Path, columns: list[str], rows: list[dict]) -> int:
    """Append the ``columns`` of rows, all rows or, on an error, none; NaN is an empty field.

    Returns:
        The file's new length in bytes, for ``cut_csv``.
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", extrasaction="ignore", lineterminator="\n")
    writer.writerows([{key: _format(value) for key, value in row.items()} for row in rows])
    with open(path, "r+b", buffering=0) as file:
        end, data = file.seek(0, os.SEEK_END), text.getvalue().encode()
        try:
            while data:
                data = data[file.write(data):]
        except OSError as error:
            file.truncate(end)
            raise OSError(error.errno, error.strerror, str(path)) from error   # with the file's name
        return file.tell()


def check_csv(path: Path, columns: list[str], size: int) -> None:
    """Raise InputError if a CSV cannot be cut to ``size`` bytes: it is shorter, or no line ends there."""
    if not path.is_file() or path.stat().st_size < size:
        raise InputError(f"{path} is shorter than when it was saved; start again with --overwrite")
    saved, header = path.read_bytes()[:size], (",".join(columns) + "\n").encode()
    if not saved.startswith(header) or not saved.endswith(b"\n"):
        raise InputError(f"{path} is not as it was saved; start again with --overwrite")


def cut_csv(path: Path, columns: list[str], size: int | None) -> None:
    """Cut a CSV to ``size`` bytes, its length at a checkpoint; None: to its header."""
    if size is None:
        write_whole(path, lambda file: file.write((",".join(columns) + "\n").encode()))
    else:
        os.truncate(path, size)


def _format(value: object) -> object:
    if isinstance(value, float):
        return "" if value != value else format(value, ".8g")
    return value
