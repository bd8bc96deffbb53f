"""Measured tables in README.md and docs/: written from committed files, and compared with them.

In a page a table lies between two lines that a reader does not see, ``<!-- table: NAME -->`` and ``<!-- end -->``.
NAME is a row of TABLES (reporting/tables.py), whose function gives the lines between them.
"""
import re
from collections.abc import Callable, Mapping
from pathlib import Path

from reporting.summary import one_line
from utils import InputError, write_whole

START, END = re.compile(r"<!--\s*table:\s*(.*?)\s*-->"), re.compile(r"<!--\s*end\s*-->")

Tables = Mapping[str, Callable[[Path], list[str]]]


def update(root: Path, tables: Tables, check: bool) -> dict[str, list[str]]:
    """Bring the tables of README.md and docs/*.md up to date. Nothing is written unless all can be.

    Args:
        root: the project's folder.
        check: whether to write nothing.

    Returns:
        By page, the names of the tables that were out of date.

    Raises:
        InputError: a marker is wrong, or a file behind a table is missing or damaged.
        OSError: a page cannot be read or written.
    """
    stale, texts, made = {}, {}, dict[str, list[str]]()
    for path in [root / "README.md", *sorted(root.glob("docs/*.md"))]:
        name = path.relative_to(root).as_posix()
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise InputError(f"{name} is not UTF-8 ({one_line(error)})") from error
        new, changed = filled(text, name, lambda table: made.get(table) or made.setdefault(
            table, _made(root, tables, table)))
        if changed:
            stale[name], texts[path] = changed, new
    if not check:
        for path, text in texts.items():
            _write(path, text.encode())
    return stale


def filled(text: str, page: str, make: Callable[[str], list[str]]) -> tuple[str, list[str]]:
    """A page's text with its tables as ``make`` gives them, and the names of those that were different.

    Raises:
        InputError: a table has no end, or an end no table.
    """
    lines, changed = list[str](), list[str]()
    name, old = None, list[str]()
    for line in text.split("\n"):
        start, end = START.fullmatch(line.strip()), END.fullmatch(line.strip())
        if start and name is not None or end and name is None:
            raise InputError(f"{page}: " + (f"table {name} has no <!-- end -->" if start else
                                            "<!-- end --> without a table"))
        if start:
            name, old = start[1], []
        elif end and name is not None:
            new = make(name)
            changed += [name] * (new != old)
            lines += new
            name = None
        elif name is not None:
            old.append(line)
            continue
        lines.append(line)
    if name is not None:
        raise InputError(f"{page}: table {name} has no <!-- end -->")
    return "\n".join(lines), changed


def _write(path: Path, content: bytes) -> None:
    write_whole(path, lambda file: file.write(content))


def _made(root: Path, tables: Tables, name: str) -> list[str]:
    if name not in tables:
        raise InputError(f"table {name}: no such table; there are {', '.join(sorted(tables))}")
    try:
        return tables[name](root)
    except InputError as error:
        raise InputError(f"table {name}: {error}") from error
    except (KeyError, IndexError, ValueError, TypeError) as error:   # a file lacks rows, or has strange ones
        raise InputError(f"table {name}: a file behind it lacks something ({one_line(error)})") from error
