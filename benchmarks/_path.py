"""Puts the project's folder on the import path of the scripts beside this file; their command lines and errors."""
import argparse
import functools
import importlib.util
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import TypeVar

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from engine.memory import in_one_line  # noqa: E402, after the path
from parsing import HUGE, TINY, Parser  # noqa: E402
from utils import InputError  # noqa: E402

T = TypeVar("T")


def load_driver() -> ModuleType:
    """The module of RVE-PFL.py, whose name no import statement can say."""
    spec = importlib.util.spec_from_file_location("driver", ROOT / "RVE-PFL.py")
    driver = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(driver)
    return driver


class Script(Parser):
    """A command line whose mistakes are one line."""

    def __init__(self, file: str, doc: str):
        super().__init__(Path(file).name, doc.splitlines()[0])


def _number(kind: type, low: float, high: float, words: str) -> Callable[[str], float]:
    """Make an argparse type of the numbers in a closed range."""
    def convert(text: str) -> float:
        try:
            if low <= (value := kind(text)) <= high:   # NaN is in no range
                return value
        except ValueError:
            pass
        raise argparse.ArgumentTypeError(f"{text}: must be {words}")
    return convert


count = _number(int, 1, HUGE, f"a whole number from 1 to {HUGE:,}")
index = _number(int, 0, HUGE, f"a whole number from 0 to {HUGE:,}")
positive = _number(float, TINY, HUGE, f"a number over 0, to {HUGE:,}")
share = _number(float, 0, 1, "a number from 0 to 1")


def device(text: str) -> str:
    """The argparse type of ``--device``."""
    if not re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?", text):
        raise argparse.ArgumentTypeError(f"{text}: choose from auto, cpu, cuda, cuda:N")
    return text


def named(lines: Mapping[str, T], only: str) -> dict[str, T]:
    """Return the lines of a table whose name contains ``only``; InputError if none does."""
    if not (found := {name: line for name, line in lines.items() if only in name}):
        raise InputError(f"--only {only}: no line has that in its name; lines: {', '.join(lines)}")
    return found


def guarded(main: Callable[..., int | None]) -> Callable[..., int]:
    """Let a script's ``main`` end with status 2 and one line where files, options or the memory are at fault."""
    @functools.wraps(main)
    def call(argv: list[str] | None = None) -> int:
        name = Path(main.__code__.co_filename).name
        try:
            return main(argv) or 0
        except KeyboardInterrupt:
            line, status = f"{name}: interrupted", 130
        except subprocess.CalledProcessError:   # it has said why
            return 2
        except Exception as error:
            line, status = in_one_line(name, error), 2
            if line is None:
                raise
        print(line, file=sys.stderr)
        return status
    return call
