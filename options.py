"""Every option of RVE-PFL.py: edit a default here or in a table, or pass the flag; both are checked.

Options that every run reads are declared here, those of a method in methods.py, those of a rule in
server/rules.py. The symbol in brackets is the paper's. Defaults are the paper's setting, except for errors of its
released code (README, deviations).
"""
import argparse
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import datasets
import methods
from methods import AGGREGATION, METHODS, Method
from parsing import DATA_NAME, HUGE, NAME, TENSORBOARD, TINY, Option, Parser, shown
from server.behaviours import BEHAVIOURS
from server.rules import RULES, Rule
from utils import ROOT, participants, round_down


def rows(table: dict) -> str:
    """Return the names of a table's rows, each with its description, for ``--help``."""
    return ", ".join(f"{name} ({row.about})" for name, row in table.items())


CLASSES_PER_CLIENT = Option("classes_per_client", "classes per client, with --partition shards or pathological "
                            "(default: 2)", int, within=(1, HUGE), group="data")
ALPHA = Option("alpha", "concentration of --partition dirichlet, small is heterogeneous (default: 0.1)", float,
               within=(1e-4, 1e6), group="data")
TEST_SHARE = Option("test_share", "share of each client's images that is held out for testing (default: 0.1)",
                    float, unread=0.1, within=(0.01, 0.9), group="data")
UNEQUAL = Option("unequal", "clients of different sizes (log-normal, sigma 0.5)", bool, False, group="data")
MALICIOUS_BEHAVIOUR = Option("malicious_behaviour", f"behaviour of malicious clients: {rows(BEHAVIOURS)} "
                             "(default: label_flip)", choices=BEHAVIOURS, group="server")
MOMENTUM = Option("momentum", "momentum of --optimizer sgd (default: 0)", float, unread=0.0, within=(0, 0.9999),
                  group="federated")
LOCAL_EP = Option("local_ep", "local epochs [E] (default: 10)", int, within=(1, HUGE), group="federated")
NEW_EP = Option("new_ep", "local epochs of a new client on all its images; on fewer it makes as many steps "
                "(default: 10)", int, within=(1, HUGE), group="federated")
STACK = Option("stack", "clients trained at a time as one stacked model; 1: one after another, on a GPU without "
               "CUDA graphs (default: on a GPU as many as make 500 images per step; on a CPU, if the model is "
               "small, one client per thread)", int, within=(1, 10_000))

PRESETS: dict[str, dict[str, Any]] = {   # name -> defaults; flags override them
    # https://github.com/TsingZ0/PFLlib, the defaults of system/main.py and dataset/utils/dataset_utils.py
    "pfllib": {"partition": "pathological", "num_users": 20, "test_share": 0.25, "rounds": 2000, "frac": 1.0,
               "local_ep": 1, "local_bs": 10, "optimizer": "sgd", "lr": 0.005, "lr_decay": 0.0, "lr_warmup": 0.0,
               "augment": "none"}}

COMMON = [   # in the order of --help
    Option("dataset", "mnist, fmnist, cifar (downloaded on first use), 10,000 images of one of them as in "
           "mnist10k (included), or the NAME of any DATA_DIR/NAME.npz", default="mnist", pattern=DATA_NAME,
           group="data"),
    Option("data_dir", "folder of the data sets", Path, ROOT / "data", group="data"),
    Option("partition", "distribution of the images over clients: at random, a fixed number of classes each, the "
           "same with the classes in order as in PFLlib, Dirichlet class mixtures, or the data file's `client` "
           "array", default="shards",
           choices=("iid", "shards", "pathological", "dirichlet", "file"), group="data"),
    CLASSES_PER_CLIENT,
    ALPHA,
    UNEQUAL,
    TEST_SHARE,
    Option("keep_split", "hold out each client's images of the data file's test half, instead of --test_share",
           bool, False, group="data"),
    Option("resplit", "the released protocol, for comparison: train and test images are drawn anew every round, "
           "so test images have been trained on; file names and CSVs are marked", bool, False, group="data"),
    Option("validate", "for choosing options: evaluate on a tenth of each client's training images, held out, and "
           "never on its test images; file names and CSVs are marked", bool, False, group="data"),

    Option("num_users", "number of clients [K]", int, 10, within=(1, 100_000), group="federated"),
    Option("rounds", "number of rounds [T]", int, 100, within=(1, HUGE), alias="epochs", group="federated"),
    Option("frac", "share of the clients that train in a round [C]", float, 1.0, within=(TINY, 1),
           group="federated"),
    LOCAL_EP,
    Option("local_steps", "steps of local training per round, in place of --local_ep", int, within=(1, HUGE),
           group="federated"),
    Option("local_bs", "local batch size [B]", int, 256, within=(1, HUGE), group="federated"),
    Option("optimizer", "local optimiser", default="adam", choices=("adam", "sgd"), group="federated"),
    Option("lr_decay", "the learning rate is lr / (1 + lr_decay * steps of the client)", float, 1e-3,
           within=(0, 1e3), group="federated"),
    Option("lr_warmup", "share of a round's steps over which lr rises from 0, since a client's optimiser starts "
           "anew in each round", float, 0.2, within=(0, 1), group="federated"),
    MOMENTUM,
    Option("finetune_ep", "after the last round, also evaluate each client's deployed model after this many "
           "more local epochs; several numbers give several models", int, [], within=(1, HUGE), several=True,
           group="federated"),
    Option("new_clients", "share of the clients, rounded down, that take no part in the rounds: after the last "
           "one, each trains its private part (the whole model if predictions need none) behind the final head "
           "on 10, 50 and all of its images, and for comparison the whole model alone", float, 0.0, within=(0, 1),
           group="federated"),
    NEW_EP,

    Option("method", f"method to train: {rows(METHODS)}", default="rve_pfl", choices=METHODS, group="model"),

    Option("malicious_frac", "share of malicious clients, rounded down [F]", float, 0.0, within=(0, 1),
           group="server"),
    MALICIOUS_BEHAVIOUR,
    Option("secure_aggregation", "the server sees the weighted sum of the uploads and nothing else (simulated); "
           "--aggregation is then mean", bool, False, group="server"),

    Option("preset", "defaults of another benchmark, which flags override: " + "; ".join(
        " ".join([f"{name} is", *(f"--{option} {value}" for option, value in values.items())])
        for name, values in PRESETS.items()), choices=PRESETS),
    Option("seed", "seed of every random draw", int, 1, within=(0, 2**31 - 1)),
    Option("device", "auto, cpu, cuda or cuda:N", default="auto",
           pattern=(r"auto|cpu|cuda(:\d{1,3})?", "choose from auto, cpu, cuda, cuda:N")),
    Option("precision", "precision of convolutions and matrix products; auto: bf16 if the chip supports it",
           default="auto", choices=("auto", "fp32", "bf16")),
    STACK,
    Option("eval_every", "evaluate every N rounds, and after the last", int, 1, within=(1, HUGE), metavar="N"),
    Option("run_name", "folder name under RESULTS_DIR and MODELS_DIR (default: "
           "<dataset>-<partition>-<method>-seed<seed>)", pattern=NAME),
    Option("results_dir", "folder for CSVs and pictures", Path, ROOT / "results"),
    Option("models_dir", "folder for checkpoints", Path, ROOT / "saved_models"),
    TENSORBOARD,
    Option("save_rounds", "rounds whose checkpoints are kept, besides the latest", int, [], within=(1, HUGE),
           several=True, metavar="R"),
    Option("checkpoint_seconds", "save for --resume at most this often", float, 60.0, within=(0, HUGE)),
    Option("rendezvous_seconds", "how long the processes of torchrun wait for each other at the start", float,
           300.0, within=(0, HUGE)),
    Option("resume", "continue a run; --rounds may be larger than before, and with --run_name all other options "
           "are read from the run's config.json", bool, False),
    Option("overwrite", "delete an earlier run of this name", bool, False)]


@dataclass(frozen=True)
class Need:
    """A condition on another option, without which nothing reads an option."""

    option: Option
    other: str   # the other option's name
    fits: Callable[[Any], bool]   # other option's value -> whether the option is read
    default: object = None   # the option's value if it is read and not given
    harmless: object = None   # a value that means the same read or not, and so may be given


NEEDS = [
    Need(CLASSES_PER_CLIENT, "partition", lambda kind: kind in ("shards", "pathological"), 2),
    Need(ALPHA, "partition", lambda kind: kind == "dirichlet", 0.1),
    Need(TEST_SHARE, "keep_split", lambda kept: not kept, 0.1, harmless=0.1),
    Need(UNEQUAL, "partition", lambda kind: kind != "file", harmless=False),
    Need(LOCAL_EP, "local_steps", lambda steps: steps is None, 10),
    Need(NEW_EP, "new_clients", bool, 10),
    Need(MALICIOUS_BEHAVIOUR, "malicious_frac", bool, "label_flip"),
    Need(MOMENTUM, "optimizer", lambda kind: kind == "sgd", 0.0, harmless=0.0),
    Need(methods.PRIOR_APART, "prior", lambda kind: kind != "normal"),
    Need(methods.CODES, "prior", lambda kind: kind == "categorical"),
    Need(methods.INIT_LOGVAR, "prior", lambda kind: kind != "categorical"),
    Need(methods.KL_WARMUP, "kl_weight", bool, harmless=0),
    # In full sharing rounds the whole network is sent, and encoders of another run replace the start.
    Need(methods.PRIVATE_INIT, "full_sharing_rounds", lambda rounds: not rounds, harmless=False),
    Need(methods.PRIVATE_INIT, "encoders_from", lambda run: run is None, harmless=False),
    Need(STACK, "private_ep", lambda epochs: epochs is None, harmless=1),
    # Clients are trained one after another if the method has its own loss or trainer, or replays priors.
    Need(STACK, "method", lambda name: not METHODS[name].sequential, harmless=1),
    Need(STACK, "prior", lambda kind: kind == "normal", harmless=1),
    Need(STACK, "encoders_from", lambda run: run is None, harmless=1),
    # Encoders and priors of another run are not trained.
    *(Need(option, "encoders_from", lambda run: run is None)
      for option in (methods.INIT_LOGVAR, methods.PRIOR_APART, methods.KL_WEIGHT, methods.KL_WARMUP))]


def readers(option: Option, table: dict) -> list[str]:
    """Return the names of a table's rows that read an option."""
    return [name for name, row in table.items() if option in row.reads]


def of_rows(table: dict) -> list[Option]:
    """Return the options of a table's rows, each once."""
    return list(dict.fromkeys(option for row in table.values() for option in row.reads))


def read_by(option: Option, table: dict) -> str:
    """Return the rows that read an option and its defaults, for ``--help``."""
    names, others = readers(option, table), [name for name in table if option not in table[name].reads]
    notes = [f"all but {', '.join(others)}" if len(others) < 3 else ", ".join(names)] if others else []
    by_value: dict[object, list[str]] = {}
    for name in names:
        by_value.setdefault(table[name].reads[option], []).append(name)
    if any(option in values for name in names for field in ("by_dataset", "by_partition")
           for values in getattr(table[name], field, {}).values()):
        notes.append("default by data set, partition and method: docs/options.md")
    elif len(by_value) == 1 and None not in by_value:
        notes.append(f"default: {next(iter(by_value))}")
    elif len(by_value) > 1:
        by_value.pop(None, None)
        notes.append("default: " + ", ".join(
            f"else {value}" if len(rows) > len(names) / 2 and len(by_value) > 1 else
            f"{value} with {', '.join(rows)}"
            for value, rows in sorted(by_value.items(), key=lambda item: len(item[1]))))
    notes += dict.fromkeys(f"{values[option]} with --prior {prior}" for name in names
                           for prior, values in getattr(table[name], "by_prior", {}).items() if option in values)
    return f" ({'; '.join(notes)})" if notes else ""


def make_parser() -> Parser:
    """Return the parser of all options, by group."""
    parser = Parser("RVE-PFL.py", "Train a method over simulated clients. Symbols in brackets are the papers'.")
    for heading in ("data", "federated", "model", "server", "privacy", "run"):
        parser.heading(heading)
    for option in COMMON:
        parser.add(option)
    for table in (METHODS, RULES):
        for option in of_rows(table):
            parser.add(option, read_by(option, table))
    return parser


def preset_parser(argv: list[str] | None) -> Parser:
    """Return the parser with the defaults of the command line's ``--preset``, but for unread options."""
    parser = make_parser()
    given = parser.parse(argv)
    unread = {need.option.name for need in NEEDS if not need.fits(getattr(given, need.other))}
    preset = PRESETS.get(given.preset, {})
    parser.set_defaults(**{name: value for name, value in preset.items() if name not in unread})
    return parser


@cache
def shared_parser() -> Parser:
    """Return ``make_parser``'s, made once, for users who leave it as it is."""
    return make_parser()


def args_parser(argv: list[str] | None = None, parser: Parser | None = None) -> argparse.Namespace:
    """Parse and check ``argv`` (the command line if None), and fill in defaults that depend on other options.

    Exits with status 2 and one line if an option is out of range, contradicts another, or is read by nothing.

    Args:
        parser: ``make_parser``'s, with other defaults.
    """
    parser = preset_parser(argv) if parser is None else parser
    args = parser.parse(argv)
    args.dataset = datasets.canonical(args.dataset, args.data_dir)
    given = {name: value for name, value in vars(args).items() if value is not None}
    method = METHODS[args.method]
    if args.secure_aggregation and args.aggregation is None:
        args.aggregation = AGGREGATION.unread
    if fault := misfit(args, method) or contradiction(args) or method.settle and method.settle(args):
        parser.error(fault)
    _fill(args, METHODS, method, lambda option: method.default(option, args.dataset, args.partition, args.prior))
    if fault := parser.fault(vars(args)) or misfit(args, method):   # of defaults that rows were given
        parser.error(fault)
    rule = RULES[args.aggregation]
    _fill(args, RULES, rule, lambda option: rule.reads[option])
    for need in NEEDS:
        if getattr(args, need.option.name) is None:
            fits = need.fits(getattr(args, need.other))
            setattr(args, need.option.name, need.default if fits else need.option.unread)
    for option, setting, harmless in idle(vars(args)):
        if given.get(option.name, harmless) != harmless:
            value = "" if option.kind is bool else f" {shown(given[option.name])}"
            parser.error(f"--{option.name}{value}: {setting} does not read it; leave it out")
    if fault := parser.fault(vars(args)):
        parser.error(fault)
    if args.run_name is None:
        marks = [mark for mark in ("resplit", "validate") if getattr(args, mark)]
        args.run_name = "-".join([args.dataset, args.partition, args.method, f"seed{args.seed}", *marks])
    for name in ("save_rounds", "finetune_ep"):
        setattr(args, name, sorted(set(getattr(args, name))))
    return args


def _fill(args: argparse.Namespace, table: dict, row: Method | Rule, default: Callable[[Option], object]) -> None:
    """Fill a table's options that were not given: with the row's default, or the value of an unread option."""
    for option in of_rows(table):
        if getattr(args, option.name) is None:
            setattr(args, option.name, default(option) if option in row.reads else option.unread)


def idle(values: Mapping[str, Any]) -> Iterator[tuple[Option, str, object]]:
    """Yield each option that nothing reads in a run of these values, the setting that does not read it, and a
    value that may be given all the same."""
    for name, table in (("method", METHODS), ("aggregation", RULES)):
        for option in of_rows(table):
            if option not in table[values[name]].reads:
                yield option, f"--{name} {values[name]}", None
    for need in NEEDS:
        if not need.fits(values[need.other]):
            yield need.option, f"--{need.other} {values[need.other]}", need.harmless


def contradiction(args: argparse.Namespace) -> str | None:
    """Return a contradiction between options in one line, or None."""
    if args.save_rounds and max(args.save_rounds) > args.rounds:
        return f"--save_rounds {max(args.save_rounds)}: there are only --rounds {args.rounds}"
    if args.full_sharing_rounds is not None and args.full_sharing_rounds >= args.rounds:
        return (f"--full_sharing_rounds {args.full_sharing_rounds}: none of --rounds {args.rounds} would be left "
                "for the method's own rule; give fewer")
    for name, clients in (("new_clients", args.num_users), ("malicious_frac", participants(vars(args)))):
        share = getattr(args, name)
        if share and not round_down(share * clients):
            return (f"--{name} {share:g}: of {clients} clients that is none; give {1 / clients:g} or more, or "
                    "leave it out")
    if not participants(vars(args)):
        return f"--new_clients {args.new_clients:g}: no client would be left to train; give less"
    if args.secure_aggregation and args.frac * participants(vars(args)) < 1.5:
        return (f"--secure_aggregation: --frac {args.frac:g} of {participants(vars(args))} clients is one per "
                "round, and its upload is the sum; give more")
    for first, second in (("resume", "overwrite"), ("resplit", "validate"), ("resplit", "keep_split"),
                          ("full_sharing_rounds", "encoders_from")):
        if getattr(args, first) and getattr(args, second):
            return f"--{first} and --{second} contradict each other; leave one out"
    return None


def misfit(args: argparse.Namespace, method: Method) -> str | None:
    """Return what a method cannot be combined with, in one line, or None."""
    if method.server is not None and args.aggregation not in (None, "mean"):
        return (f"--aggregation {args.aggregation}: weights or rules that follow the uploads break the privacy "
                f"accounting of --method {args.method}; leave it out")
    for name in ("malicious_frac", "new_clients"):
        if not method.shared and getattr(args, name):
            return f"--{name} {getattr(args, name):g}: --method {args.method} shares nothing; leave it out"
    if args.secure_aggregation and not method.shared:
        return f"--secure_aggregation: --method {args.method} shares nothing; leave it out"
    if args.secure_aggregation and args.aggregation not in (None, "mean"):
        return (f"--aggregation {args.aggregation}: it looks at single uploads, which --secure_aggregation hides; "
                "leave one out")
    row = BEHAVIOURS.get(args.malicious_behaviour)
    if row is not None and row.whole_head and method.shared and not method.shares_whole_head:
        return (f"--malicious_behaviour {args.malicious_behaviour}: needs the whole head, of which --method "
                f"{args.method} keeps a part private; choose another")
    return None


def stored_fault(options: dict[str, object]) -> str | None:
    """Return what is wrong with the options of a ``config.json``, or None."""
    if fault := shared_parser().fault(options):
        return fault
    method = METHODS.get(str(options.get("method")))
    if method is None:
        return None
    for option in method.reads:
        default = method.default(option, str(options.get("dataset")), str(options.get("partition")),
                                 str(options.get("prior")))
        if default is not None and option.name in options and options[option.name] is None:
            return f"--{option.name} None: --method {options['method']} reads it"
    return None
