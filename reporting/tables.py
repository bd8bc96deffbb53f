"""TABLES: the name of each generated table, as its marker in a page says it, and the function that makes it."""
from collections.abc import Callable
from pathlib import Path

from reporting.claims import claims
from reporting.measured import MEASURED
from reporting.study import STUDY

TABLES: dict[str, Callable[[Path], list[str]]] = {**MEASURED, **STUDY, "claims": claims}
