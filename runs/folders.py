"""The files in a run's folders that are this program's, which alone it ever deletes, and the lock of a folder.

A file is this program's by its name, if it is a regular file or a link. A link is removed, never its target.
"""
import fcntl
import os
import re
from contextlib import ExitStack
from pathlib import Path

from utils import InputError

# Whole names, as regular expressions.
OF_TRAINING = r"(clients|rounds|server)\.csv|partition\.npz|(partition|backdoor|curves|trust)\.png"
PICTURE = r"attack_\w+_round\d+_client\d+\.png"
OF_ATTACKS = rf"attack\.(csv|json)|attack_(summary|latents)\.csv|{PICTURE}"
OF_MEMBERSHIP = r"membership\.(csv|json)"
OF_A_CHECKPOINT = r"(shared|server|client_\d+)\.pt|\d+-\d+\.pt|upload-\d+\.pt"   # the last two in .private
EVENTS = "tensorboard"   # the folder of event files
CHECKPOINT = r"round_([1-9][0-9]{0,9})"   # a folder; with a dot before it, half written or half deleted


def files(folder: Path, names: str, partial: bool = True) -> list[Path]:
    """Return the files of a folder with such names, and the partial ones that a killed process left of them."""
    matching = re.compile(rf"({names})" + (rf"|\.({names})\.\d+\.tmp" if partial else ""), re.ASCII)
    return sorted(path for path in folder.iterdir()
                  if matching.fullmatch(path.name) and (path.is_symlink() or path.is_file()))


def event_files(results: Path, kind: str = r"(rounds|attack)") -> list[Path]:
    """Return this program's event files of a run, or those of one kind."""
    folder = results / EVENTS
    return files(folder, rf"events\.out\.tfevents\..*\.{kind}", partial=False) if folder.is_dir() else []


def half_written(folder: Path, names: str) -> list[Path]:
    """Return the unfinished files that a killed process left of such names."""
    return sorted(set(files(folder, names)) - set(files(folder, names, partial=False)))


def checkpoints(folder: Path) -> dict[int, Path]:
    """Return the complete checkpoints in a folder, by round."""
    matches = {re.fullmatch(CHECKPOINT, path.name): path for path in folder.iterdir()}
    return {int(match[1]): path for match, path in matches.items() if match}


def scraps(folder: Path) -> list[Path]:
    """Return the folders that a killed process left half written, or half deleted, beside the checkpoints."""
    return sorted(path for path in folder.iterdir() if re.fullmatch(rf"\.{CHECKPOINT}|\.private", path.name))


def refuse_foreign(*folders: Path) -> None:
    """Raise InputError if one of these folders of checkpoints holds files of others, or is no folder."""
    for foreign in filter(None, map(_foreign, folders)):
        raise InputError(f"{foreign} is not this program's; move it away, or give another --run_name")


def remove(folder: Path) -> None:
    """Delete a checkpoint, which stops being one at once; a folder with other files stays."""
    if folder.is_symlink():
        folder.unlink()
    elif folder.is_dir() and not _foreign(folder):
        if not folder.name.startswith("."):
            partial = folder.with_name(f".{folder.name}")
            remove(partial)
            folder = folder.rename(partial)
        for path in files(folder, OF_A_CHECKPOINT):
            path.unlink()
        folder.rmdir()


def _foreign(folder: Path) -> Path | None:
    """Return something in a checkpoint's folder that is not this program's, or the folder itself if it is none."""
    if folder.is_symlink():
        return None
    if not folder.is_dir():
        return folder
    ours = set(files(folder, OF_A_CHECKPOINT))
    return next((path for path in sorted(folder.iterdir()) if path not in ours), None)


def lock(folder: Path, held: ExitStack, option: str) -> None:
    """Lock a run's folder until ``held`` closes, so that nobody else trains or attacks the run.

    Args:
        option: the option that names the run, for errors.

    Raises:
        InputError: another process has the lock.
    """
    file = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
    held.callback(os.close, file)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise InputError(f"{folder} is being trained or attacked by another process; wait for it, or give another "
                         f"{option}") from error
