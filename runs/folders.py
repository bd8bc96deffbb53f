"""What in a run's folders is this program's: nothing else is ever deleted; and the lock of a folder.

A file is ours by its name, if it is a regular file or a link. A link is removed, never what it leads to.
"""
import errno
import fcntl
import os
import re
import stat
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO

from utils import InputError

# Whole names, as regular expressions.
OF_TRAINING = r"(clients|rounds|server)\.csv|partition\.npz|(partition|backdoor|curves|trust)\.png"
OF_ATTACKS = r"attack\.(csv|json)|attack_(summary|latents)\.csv|attack_\w+_round\d+_client\d+\.png"
OF_MEMBERSHIP = r"membership\.(csv|json)"
OF_A_CHECKPOINT = r"(shared|server|client_\d+)\.pt"
WAITING = r"\d+-\d+\.pt|upload-\d+\.pt"   # in .private
CHECKPOINT = r"round_([1-9][0-9]{0,9})"   # a folder; with a point before it, half written or half deleted

MARK = b"RVE-PFL.py "   # a lock begins with it, or is empty


def own(folder: Path, names: str, partial: bool = True) -> list[Path]:
    """Return the files of a folder that have such names.

    Args:
        names: whole names, as a regular expression.
        partial: also those that ``write_whole`` of a killed process left half written.
    """
    matching = re.compile(rf"({names})" + (rf"|\.({names})\.\d+\.tmp" if partial else ""), re.ASCII)
    return sorted(path for path in folder.iterdir()
                  if matching.fullmatch(path.name) and (path.is_symlink() or path.is_file()))


def half_written(folder: Path, names: str) -> list[Path]:
    """Return the files that ``write_whole`` of a killed process left of such names."""
    return sorted(set(own(folder, names)) - set(own(folder, names, partial=False)))


def checkpoints(folder: Path) -> dict[int, Path]:
    """Return the complete checkpoints in a folder, by round."""
    found = {re.fullmatch(CHECKPOINT, path.name): path for path in folder.iterdir()}
    return {int(match[1]): path for match, path in found.items() if match}


def scraps(folder: Path) -> list[Path]:
    """Return the folders beside the checkpoints that a killed process left half written, or half deleted."""
    return sorted(path for path in folder.iterdir() if re.fullmatch(rf"\.{CHECKPOINT}|\.private", path.name))


def refuse_foreign(*folders: Path) -> None:
    """Return if these folders of checkpoints hold nothing but this program's files.

    Raises:
        InputError: one of them does, or is no folder.
    """
    for folder in folders:
        if what := _foreign(folder):
            raise InputError(f"{what} is not this program's; move it away, or give another --run_name")


def remove(folder: Path) -> None:
    """Delete a checkpoint, which is none any more from the first moment on; one that holds other files stays.

    A link is removed, and not what it leads to.
    """
    if folder.is_symlink():
        folder.unlink()
    elif folder.is_dir() and not _foreign(folder):
        if not folder.name.startswith("."):
            partial = folder.with_name(f".{folder.name}")
            remove(partial)
            folder = folder.rename(partial)
        for path in own(folder, f"{OF_A_CHECKPOINT}|{WAITING}"):
            path.unlink()
        folder.rmdir()


def _foreign(folder: Path) -> Path | None:
    """Return something in a checkpoint's folder that is not this program's, or the folder itself if it is none."""
    if folder.is_symlink():
        return None
    if not folder.is_dir():
        return folder
    ours = set(own(folder, f"{OF_A_CHECKPOINT}|{WAITING}"))
    return next((path for path in sorted(folder.iterdir()) if path not in ours), None)


def lock(folder: Path, held: ExitStack, option: str) -> BinaryIO:
    """Lock a run's folder until ``held`` closes, so that nobody else trains or attacks the run.

    Args:
        option: which names the run, for errors.

    Raises:
        InputError: another process has it, or what is there is no lock of this program's.
    """
    path, elsewhere = folder / ".lock", f"move it away, or give another {option}"
    try:   # not through a link, and without waiting for the other end of a pipe
        number = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
            raise
        raise InputError(f"{path} is no plain file; {elsewhere}") from error
    if not stat.S_ISREG(os.fstat(number).st_mode):
        os.close(number)
        raise InputError(f"{path} is no plain file; {elsewhere}")
    file = held.enter_context(os.fdopen(number, "r+b"))
    if os.fstat(number).st_size and file.read(len(MARK)) != MARK:
        raise InputError(f"{path} is not this program's; {elsewhere}")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise InputError(f"{folder} is being trained or attacked by another process; wait for it, or give another "
                         f"{option}") from error
    return file


def owner(file: BinaryIO) -> str:
    """Return which run's checkpoints lie beside a lock, as ``note_owner`` left it; "" if it does not say."""
    file.seek(len(MARK))
    return os.fsdecode(file.read(4096).replace(b"\0", b""))


def note_owner(file: BinaryIO, results: str) -> None:
    """Write into a lock which run's checkpoints lie beside it.

    Args:
        results: the results' folder as a path from the checkpoints', so that both may be moved together.
    """
    file.seek(0)
    file.truncate()
    file.write(MARK + os.fsencode(results))
    file.flush()
