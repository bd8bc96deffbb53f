"""Errors, seeded draws, digests, files that are written whole, and imports that wait until they are used."""
from __future__ import annotations

import ctypes
import errno
import hashlib
import importlib
import logging
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

if TYPE_CHECKING:
    import torch

ROOT = Path(__file__).resolve().parent   # the project's folder
# Matplotlib, which torchmetrics imports too, need not warn where it cannot keep its cache.
logging.getLogger("matplotlib").setLevel(logging.ERROR)

MOST_SHOWN = 80      # characters of a value in a message
LONGEST_WORD = 256   # characters of a message without a space; no file name is longer


class InputError(Exception):
    """A user's mistake or a fault of the system; its text is the one line that the user sees."""


def printable(text: object, kept: str = "") -> str:
    """Return a text whose unprintable characters, except those in ``kept``, are written as escapes."""
    return "".join(c if c.isprintable() or c in kept else ascii(c)[1:-1] for c in str(text))


def shortened(text: str, most: int = MOST_SHOWN) -> str:
    """Return a text shortened to ``most`` characters: its beginning and its end."""
    return text if len(text) <= most else f"{text[:most - 23]}...{text[-20:]}"


def shown(value: object) -> str:
    """Return a value of a command line or a file for a message: printable, and at most MOST_SHOWN characters."""
    plain = value is None or isinstance(value, (str, int, float, Path))   # a list may be nested too deeply
    return shortened(printable(value)) if plain else f"a {type(value).__name__}"


def error_line(program: str, error: Exception | str, hint: str = "") -> str:
    """Return an error as one printable line, with long words shortened; ``hint`` says what to do."""
    text = f"{error.filename or 'a file'}: {error.strerror or error}" if isinstance(error, OSError) else error
    line = printable(f"{program}: error: {text}{hint}")
    return shortened(re.sub(rf"\S{{{LONGEST_WORD},}}", lambda word: shortened(word[0]), line), 10 * LONGEST_WORD)


class Late:
    """A module that is imported when something of it is used, since PyTorch takes seconds to import.

    Its classes and functions can be named before that, as in a row of a table: ``Late("models").CNN`` is a
    ``LateName``. Constants cannot, since nobody calls them.
    """

    def __init__(self, module: str):
        self._module = module

    def __getattr__(self, name: str) -> LateName:
        self.__dict__[name] = late = LateName(self._module, name)   # the same object each time
        return late


class LateName:
    """A class or function of a module, which is imported when it is called or asked for an attribute."""

    def __init__(self, module: str, name: str):
        self._module, self._name = module, name

    def imported(self) -> Any:
        """Import the module and return what the name stands for."""
        return getattr(importlib.import_module(self._module), self._name)

    def __call__(self, *given: Any, **named: Any) -> Any:
        return self.imported()(*given, **named)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.imported(), name)


def round_down(count: float) -> int:
    """Return the whole clients in a share; 0.3 x 10 is 3 despite floating point."""
    return int(count + 1e-9)


def participants(options: Mapping[str, Any]) -> int:
    """Return the number of clients that take part in the rounds: the first ones, without the new clients."""
    return options["num_users"] - round_down(options["new_clients"] * options["num_users"])


def nearby(path: Path) -> str:
    """Return a path for the user: relative to the working folder if it is inside."""
    path, here = path.absolute(), Path.cwd()
    return printable(path.relative_to(here) if path.is_relative_to(here) else path)


def typed(script: str, options: Mapping[str, object], *names: str) -> str:
    """Return a command of this project with some options, to be typed in the working folder."""
    usual = {"results_dir": ROOT / "results", "models_dir": ROOT / "saved_models", "data_dir": ROOT / "data",
             "public": "unowned"}   # left out
    words = [word for name in names if str(options[name]) != str(usual.get(name))
             for word in (f"--{name}", str(options[name]))]
    return printable(shlex.join([sys.orig_argv[0], nearby(ROOT / script), *words]))


def duration(seconds: float) -> str:
    """Return seconds as hours, minutes and seconds, such as `1 min 20 s`."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h " * (hours > 0) + f"{minutes} min " * (hours + minutes > 0) + f"{seconds} s"


def rng(seed: int, purpose: str, client: int = 0, round: int = 0) -> np.random.Generator:
    """Return the generator of one draw, independent of all others, so that their order does not matter."""
    digest = hashlib.blake2b(purpose.encode(), digest_size=4).digest()
    return np.random.default_rng([seed, int.from_bytes(digest, "little"), client, round])


def keep_freed_memory() -> None:
    """Let glibc keep large blocks for reuse: to map and zero them anew takes half of a training step on a CPU."""
    m_trim_threshold, m_top_pad, m_mmap_max = -1, -2, -4   # <malloc.h>
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    mallopt(m_mmap_max, 0)
    mallopt(m_trim_threshold, 2**31 - 1)
    mallopt(m_top_pad, 64 * 2**20)


def fingerprint(state: dict[str, torch.Tensor]) -> str:
    """Return a digest of a state dict's values, 16 hexadecimal digits."""
    return digest(*(state[name].cpu().numpy() for name in sorted(state)))


def digest(*arrays: np.ndarray) -> str:
    """Return a digest of arrays' values, 16 hexadecimal digits."""
    hashed = hashlib.blake2b(digest_size=8)
    for array in arrays:
        hashed.update(np.ascontiguousarray(array).data)
    return hashed.hexdigest()


def write_whole(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Let ``write`` fill a file beside ``path``, then rename it: a reader sees all of it or nothing.

    Raises:
        OSError: the file cannot be written (no room, no permission); nothing is left behind.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(partial, "wb") as file:
            write(file)
        partial.replace(path)
    except OSError as error:   # a full disk's names no file, or the partial one
        raise OSError(error.errno, error.strerror, str(path)) from error
    except RuntimeError as error:   # torch.save's for a failed write
        if isinstance(cause := error.__context__, OSError):
            raise OSError(cause.errno, cause.strerror, str(path)) from error
        raise OSError(errno.EIO, f"could not be written ({str(error).splitlines()[0]})", str(path)) from error
    finally:
        partial.unlink(missing_ok=True)


def commit(*paths: str) -> str:
    """Return the commit that runs, marked if it has edits, or "unknown" without a readable repository.

    Args:
        paths: git's names of the files in which edits count; all tracked ones by default.
    """
    git = ["git", "-C", str(ROOT)]
    try:
        head, edits = (subprocess.run([*git, *words], capture_output=True, check=True, text=True).stdout.strip()
                       for words in (("rev-parse", "HEAD"), ("status", "--porcelain", "-uno", "--", *paths)))
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head[:12] + (" with edits" if edits else "")
