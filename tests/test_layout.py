"""The house: imports go down only, few files on top, no long lists of parameters, one place for each name."""
import ast
import re

import pytest
from conftest import ROOT

# From the ground up. A module imports from rows below its own only.
FLOORS = [
    ["utils"],
    ["runs.csvs", "runs.folders"],
    ["parsing", "engine.signals", "engine.processes", "engine.memory", "models", "metrics",
     "runs.plots", "attack.tables", "attack.roc"],
    ["datasets"],
    ["sampling"],
    ["server.base", "server.filtering"],
    ["server.robust", "server.privacy", "server.threat_aware", "server.forging", "server.triggers"],
    ["server.rules"],
    ["methods"],
    ["update"],
    ["engine.stacks", "engine.threads", "engine.graphs", "server.malicious"],
    ["engine.several"],
    ["options"],
    ["runs.configs", "attack.gradients"],
    ["runs.checkpoints", "runs.resuming"],
    ["runs.run", "attack.access"],
    ["RVE-PFL", "attack.learnt", "attack.picture", "attack.uploads", "attack.split",
     "attack.command"],
    ["attack.classes", "attack.newton", "attack.scoring", "attack.references"],
    ["attack.adversary", "attack.pairs"],
    ["attack.latents"],
    ["attack.attacks"],
    ["attack.scene", "attack.verdict", "reporting.images"],
    ["attack.mi_attack", "attack.members", "reporting.leakage"],
    ["attack.membership", "reporting.summary"],
    ["reporting.page", "reporting.sources", "reporting.docs"],
    ["reporting.measured", "reporting.study"],
    ["reporting.claims"],
    ["reporting.tables"],
    ["report"],
]
PARTS = ("server", "engine", "runs", "attack", "reporting")
CARD = {"RVE-PFL.py", "options.py", "models.py", "sampling.py", "update.py", "utils.py"}
FILES = sorted([*ROOT.glob("*.py"), *(p for part in PARTS for p in (ROOT / part).glob("*.py")
                                      if p.name != "__init__.py")])


def name_of(path):
    """``server/base.py`` -> ``server.base``."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


MODULES = {name_of(path): path for path in FILES}


def imports(path):
    """The project's own modules that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found & MODULES.keys()


def test_imports_go_down_only():
    floor = {module: height for height, row in enumerate(FLOORS) for module in row}
    assert floor.keys() == MODULES.keys()
    up = [(module, other) for module, path in MODULES.items() for other in imports(path)
          if floor[other] >= floor[module]]
    assert not up


def test_few_files_on_top():
    top = {path.name for path in ROOT.glob("*.py")}
    assert len(top) <= 11 and top >= CARD


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_no_function_takes_and_no_call_passes_more_than_eight(path):
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.Lambda)):
            given = node.args
            names = [a.arg for a in (*given.posonlyargs, *given.args, *given.kwonlyargs) if a.arg != "self"]
            assert len(names) <= 8, (path.name, node.lineno, names)
        if isinstance(node, ast.Call) and not ast.unparse(node.func).split(".")[-1][:1].isupper():   # constructors
            assert len(node.args) + len(node.keywords) <= 8, (path.name, node.lineno)


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_an_assertion_only_helps_the_type_checker(path):
    """Under PYTHONOPTIMIZE there are none, so what must be checked is checked otherwise."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Assert):
            assert re.search(r"isinstance\(|is not None$", ast.unparse(node.test)), (path.name, node.lineno)
            assert node.msg is None, (path.name, node.lineno)


def test_a_method_is_named_in_its_row_alone():
    """Nothing outside the table knows a method by name, but for the default of ``--method``."""
    from methods import METHODS
    text = {path: path.read_text() for path in FILES}
    for method in METHODS.keys() - {"local", "dropout"}:   # words of the language, too
        places = [path.name for path in FILES for _ in re.findall(rf'"{method}"', text[path])]
        assert places == ["methods.py"] + ["options.py"] * (method == "rve_pfl"), (method, places)


@pytest.mark.parametrize("package", PARTS)
def test_a_folder_says_when_to_open_it(package):
    assert "Open" in ast.get_docstring(ast.parse((ROOT / package / "__init__.py").read_text()))
