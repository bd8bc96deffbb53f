"""Puts the project's folder on the import path of the scripts beside this file."""
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def load_driver() -> ModuleType:
    """The module of RVE-PFL.py, whose name no import statement can say."""
    spec = importlib.util.spec_from_file_location("driver", ROOT / "RVE-PFL.py")
    driver = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(driver)
    return driver
