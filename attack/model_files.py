"""Files of other programs: a model's Python file, and state dicts, gradients and images as they save them.

Tensors are read with ``weights_only=True``, so their files cannot run code. The model's Python file is run.
"""
import importlib.util
import sys
import traceback
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from runs.checkpoints import load_plain
from server.base import State, is_finite
from utils import ROOT, InputError, shortened

LISTED = 10   # names in an error
PREFIXES = ("module.", "_orig_mod.")   # of torch's DataParallel and torch.compile
WRAPPERS = ("state_dict", "model_state_dict", "model", "net")   # keys under which a checkpoint has its state dict


def first_line(error: BaseException) -> str:
    """Return an error's type and the first line of its text."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {shortened(lines[0], 200)}" if lines else type(error).__name__


def build(source: str, arguments: dict) -> nn.Module:
    """Run the Python file of ``FILE.py:NAME`` and return what its class or function NAME makes."""
    name, attribute = source.rpartition(":")[::2]
    path = Path(name)
    if path.suffix != ".py" or not attribute.isidentifier():
        raise InputError(f"--model {source}: give FILE.py:NAME, a Python file and the class or function in it "
                         "that makes the model")
    if not path.is_file():
        raise InputError(f"--model {source}: there is no file {path}")
    try:
        net = getattr(_run(path), attribute)(**arguments)
    except (Exception, SystemExit) as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__)
                 if Path(frame.filename) == path.resolve()]
        place = f" in line {lines[-1]}" if lines else ""
        raise InputError(f"--model {source}: {first_line(error)}{place}") from error
    if not isinstance(net, nn.Module):
        raise InputError(f"--model {source}: it makes a {type(net).__name__}, not a torch.nn.Module")
    return net


def _run(path: Path) -> Any:
    """Run a Python file as a module that may import files beside it, also if this project has the same names."""
    folder = path.resolve().parent
    beside = {other.stem for other in folder.iterdir()}
    ours = {name: module for name, module in sys.modules.items() if name.split(".")[0] in beside
            and str(getattr(module, "__file__", None) or "").startswith(f"{ROOT}/")}
    spec = importlib.util.spec_from_file_location(f"attacked_{path.stem}", path.resolve())
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    for name in ours:
        del sys.modules[name]
    sys.path.insert(0, str(folder))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(folder))
        sys.modules.update(ours)
    return module


def read_state(path: str, expected: State, also: Collection[str] = (), prefix: str = "") -> State:
    """Read tensors like ``expected`` from a file: a dictionary by name, or a list or .npz in that order.

    Args:
        also: names of tensors that the file may have, too.
        prefix: put before the names of what is returned.
    """
    given = _named(_content(path), expected, path)
    counts = {name for name in expected if name.endswith("num_batches_tracked")}   # old files lack these
    faults = {"missing": [name for name in expected if name not in given and name not in counts],
              "unexpected": [name for name in given if name not in expected and name not in also],
              "of another shape": [f"{name} {tuple(given[name].shape)} in place of {tuple(value.shape)}"
                                   for name, value in expected.items()
                                   if name in given and given[name].shape != value.shape]}
    if any(faults.values()):
        raise InputError(f"{path} does not fit the model: " + "; ".join(
            f"{fault}: {', '.join(names[:LISTED])}" + f" and {len(names) - LISTED} more" * (len(names) > LISTED)
            for fault, names in faults.items() if names))
    state = {name: given.get(name, value).to(value.dtype) for name, value in expected.items()}
    if not is_finite(state):
        raise InputError(f"{path} holds values that are not finite")
    return {f"{prefix}{name}": value for name, value in state.items()}


def _content(path: str) -> Any:
    try:
        if path.endswith(".npz"):
            with np.load(path, allow_pickle=False) as file:
                return [torch.from_numpy(file[name]) for name in file.files]
        return load_plain(Path(path))
    except FileNotFoundError as error:
        raise InputError(f"{path}: there is no such file") from error
    except Exception as error:
        if "weights_only" in str(error).lower():
            raise InputError(f"{path} holds more than tensors, such as a whole pickled model, which could run "
                             "code, and was not opened; save torch.save(model.state_dict(), PATH)") from error
        raise InputError(f"{path} cannot be read ({first_line(error)})") from error


def _named(content: Any, expected: State, path: str) -> dict[str, Tensor]:
    """Return the tensors of a file by name, without the prefixes of PyTorch's wrappers."""
    if isinstance(content, dict):
        content = next((content[key] for key in WRAPPERS if isinstance(content.get(key), dict)), content)
        for prefix in PREFIXES:
            content = {str(name).removeprefix(prefix): value for name, value in content.items()}
    elif isinstance(content, (list, tuple)):
        if len(content) != len(expected):
            raise InputError(f"{path} does not fit the model: it holds {len(content)} tensors, and "
                             f"{len(expected)} are expected")
        content = dict(zip(expected, content, strict=True))
    if not isinstance(content, dict):
        raise InputError(f"{path} holds neither a dictionary nor a list of tensors")
    for name, value in content.items():
        if not isinstance(value, Tensor) or value.is_complex():
            kind = f"{value.dtype} numbers" if isinstance(value, Tensor) else type(value).__name__
            raise InputError(f"{path} holds {kind} in place of a tensor of real numbers for {name}")
    return {name: value.to_dense() for name, value in content.items()}
