"""The structure of the code: imports without cycles, short functions, one place for each name."""
import ast
import re
from graphlib import TopologicalSorter

import pytest
from conftest import ROOT

PACKAGES = ("server", "engine", "runs", "attack", "experiments", "reporting")
# The packages that none of the others, but for those to the right, may import.
ABOVE = {"attack": ("experiments", "reporting"), "experiments": ("reporting",), "reporting": ("experiments",)}
FILES = sorted(path for folder in (".", *PACKAGES) for path in (ROOT / folder).glob("*.py"))
MODULES = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
           for path in FILES}
TREES = {name: ast.parse(path.read_text()) for name, path in MODULES.items()}
each_module = pytest.mark.parametrize("name", MODULES)


def imports(name):
    """The project's own modules that a module imports, wherever in it."""
    imported = set()
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return imported & MODULES.keys()


def test_imports_have_no_cycles_and_go_down_only():
    TopologicalSorter({name: imports(name) for name in MODULES}).prepare()   # CycleError names them
    upwards = [(name, other) for name in MODULES for other in imports(name)
               for package, importers in ABOVE.items() if other.split(".")[0] == package
               if name.split(".")[0] not in (package, *importers) and name not in ("report", "RVE-PFL")]
    assert not upwards


@each_module
def test_functions_are_short_and_take_few_parameters(name):
    for node in ast.walk(TREES[name]):
        if isinstance(node, (ast.FunctionDef, ast.Lambda)):
            given = node.args
            names = [a.arg for a in (*given.posonlyargs, *given.args, *given.kwonlyargs) if a.arg != "self"]
            assert len(names) <= 8, (name, node.lineno, names)
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 60, (name, node.name)


@each_module
def test_an_assertion_only_helps_the_type_checker(name):
    """Under PYTHONOPTIMIZE there are none, so what must be checked is checked otherwise."""
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Assert):
            assert re.search(r"isinstance\(|is not None$", ast.unparse(node.test)), (name, node.lineno)


def test_a_method_is_named_in_its_row_only():
    """Nothing outside the table knows a method by name, but for the default of ``--method`` and experiments."""
    from methods import METHODS
    for method in METHODS.keys() - {"local", "dropout"}:   # words of the language, too
        places = [name for name in MODULES if not name.startswith(("experiments", "reporting"))
                  for _ in re.findall(rf'"{method}"', MODULES[name].read_text())]
        assert places == ["methods"] + ["options"] * (method == "rve_pfl"), (method, places)
