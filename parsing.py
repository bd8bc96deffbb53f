"""Command lines: ``Option`` declares an option once, and ``Parser`` reports every mistake in one line.

The same checks serve command lines, edited defaults and the ``config.json`` of earlier runs.
"""
import argparse
import difflib
import importlib.util
import math
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

from utils import error_line, shown

# Type of an option -> the types of its values, and their description; bool is a flag without a value.
KINDS: dict[type, tuple[tuple[type, ...], str]] = {
    int: ((int,), "a whole number"), float: ((int, float), "a number"), Path: ((str, Path), "a path"),
    str: ((str,), "text"), bool: ((bool,), "true or false")}
NAME = r"[A-Za-z0-9_][A-Za-z0-9_.=+-]*", "a name of letters, digits, _ . = + -, not a path"
DATA_NAME = NAME[0], f"{NAME[1]}; for a file DIR/NAME.npz give --data_dir DIR --dataset NAME"
TINY, HUGE = 1e-12, 10**9   # bounds of options without natural ones

# Names of our options in other programs -> ours, which are suggested.
SYNONYMS = {
    "learning_rate": "lr", "eta": "lr", "batch_size": "local_bs", "bs": "local_bs",
    "local_epochs": "local_ep", "epochs": "train_epochs", "comm_round": "rounds", "clients": "num_users",
    "num_clients": "num_users", "n_clients": "num_users", "users": "num_users", "fraction": "frac",
    "participation": "frac", "beta": "kl_weight", "max_grad_norm": "clip", "frac_malicious": "malicious_frac",
    "iid": "partition", "non_iid": "partition", "algorithm": "method", "optim": "optimizer", "gpu": "device",
    "cuda": "device", "dtype": "precision", "data": "dataset", "output_dir": "results_dir", "run": "run_name",
    "save_dir": "models_dir", "checkpoint_dir": "models_dir", "name": "run_name", "exp_name": "run_name",
    "global_rounds": "rounds", "join_ratio": "frac", "local_learning_rate": "lr", "test_size": "test_share",
}
ALIKE = 0.75   # least difflib ratio for a suggestion


@dataclass(frozen=True, eq=False)   # hashed by identity: keys of rows
class Option:
    """One option."""

    name: str   # without dashes; also its key in ``config.json``
    help: str   # one sentence; the parser adds the default
    # ``int``, ``float``, ``str``, ``Path``, or ``bool`` for a flag without a value; if a row has the default,
    # the flag ``--no-NAME`` is its opposite
    kind: type = str
    default: object = None   # its value if not given; None if the row that reads it has the default
    unread: object = None   # its value if nothing reads it
    within: tuple[float, float] | None = None   # closed range of a number
    choices: Collection[str] | None = None   # the allowed texts
    pattern: tuple[str, str] | None = None   # the regular expression of a text, and its description
    several: bool = False   # whether it takes one or more values
    required: bool = False
    metavar: str | None = None
    alias: str | None = None   # another name of the flag
    package: str | None = None   # an optional package that it needs, of requirements-PACKAGE.txt
    group: str = "run"   # the heading in ``--help``


TENSORBOARD = Option("tensorboard", "also write scalars and the attacks' pictures as event files for TensorBoard",
                     bool, False, package="tensorboard")


class Formatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults, except None, False, empty texts and empty lists."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        default = action.default
        if default is None or default is False or default in ("", []):
            return action.help
        if isinstance(default, list):
            every = action.choices is not None and list(action.choices) == default
            return f"{action.help} (default: {'all' if every else ' '.join(map(str, default))})"
        return super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """Reports mistakes in one line, and checks edited defaults too."""

    def __init__(self, prog: str, description: str):
        super().__init__(prog=prog, description=description, allow_abbrev=False, formatter_class=Formatter)
        self.options: dict[str, Option] = {}

    def error(self, message: str):
        self.exit(2, f"{error_line(self.prog, message)}\n")

    def heading(self, name: str) -> argparse._ArgumentGroup:
        """Return a heading of ``--help``; headings appear in the order of their first use."""
        groups = {str(group.title): group for group in self._action_groups}
        return groups.get(name) or self.add_argument_group(name)

    def add(self, option: Option, help_suffix: str = "") -> None:
        """Add an option under its group's heading."""
        self.options[option.name] = option
        flags = [f"--{name}" for name in (option.name, option.alias) if name]
        text = (option.help + help_suffix).replace("%", "%%")
        if option.kind is bool:
            action = argparse.BooleanOptionalAction if option.default is None else "store_true"
            self.heading(option.group).add_argument(*flags, action=action, help=text)
            return
        self.heading(option.group).add_argument(
            *flags, type=_converter(option.kind), default=option.default, nargs="+" if option.several else None,
            choices=None if option.choices is None else tuple(option.choices), required=option.required,
            metavar=option.metavar, help=text)

    def parse(self, argv: list[str] | None) -> argparse.Namespace:
        """Parse and check every value; an unknown flag is answered with a suggestion."""
        args, unknown = self.parse_known_args(argv)
        if unknown:
            near = self._suggestion(unknown[0])
            self.error(f"unknown argument {shown(unknown[0])}" + (f" (did you mean --{near}?)" if near else ""))
        if fault := self.fault(vars(args)):
            self.error(fault)
        for name, option in self.options.items():
            if option.package and getattr(args, name) and importlib.util.find_spec(option.package) is None:
                self.error(f"--{name}: the package {option.package} is not installed; leave it out, or install "
                           f"requirements-{option.package}.txt")
        return args

    def _suggestion(self, flag: str) -> str | None:
        """Return the option that an unknown flag most likely means, by meaning or by spelling, if any."""
        if not flag.startswith("-"):
            return None
        name = flag.split("=")[0].strip("-").replace("-", "_").lower()
        ours = [option[2:] for option in self._option_string_actions if option.startswith("--")]
        if name not in ours and SYNONYMS.get(name) in ours:
            return SYNONYMS[name]
        return next(iter(difflib.get_close_matches(name, ours, 1, ALIKE)), None)

    def fault(self, values: dict[str, object]) -> str | None:
        """Return the first fault among these values in one line, or None."""
        for name, option in self.options.items():
            if name not in values:
                continue
            value = values[name]
            if value is None and self.get_default(name) is None:
                continue
            if option.several and not isinstance(value, list):
                return f"--{name} {shown(value)}: must be a list"
            for item in value if isinstance(value, list) and option.several else [value]:
                if why := _fault_of(option, item):
                    return f"--{name} {shown(item)}: {why}"
        return None


def _converter(kind: type) -> Callable[[str], object]:
    """Return a type for argparse whose error describes the expected value."""
    def convert(text: str) -> object:
        try:
            return kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{shown(text)}: must be {KINDS[kind][1]}") from None
    return convert


def _fault_of(option: Option, value: object) -> str | None:
    """Return why an option cannot have a value, or None."""
    kinds, words = KINDS[option.kind]
    if not isinstance(value, kinds) or (isinstance(value, bool) and option.kind is not bool):
        return f"must be {words}"
    low, high = option.within or (-math.inf, math.inf)
    if isinstance(value, (int, float)) and not low <= value <= high:   # NaN is in no range
        return "must be between {} and {}".format(*(x if isinstance(x, int) else f"{x:g}" for x in (low, high)))
    if option.choices is not None and value not in option.choices:
        return f"choose from {', '.join(map(str, option.choices))}"
    pattern, words = option.pattern or ("", "")
    return words if pattern and not re.fullmatch(pattern, str(value)) else None
