"""Every option of RVE-PFL.py. Edit a default here, or pass the flag; both are checked alike.

The symbol in brackets is the paper's. Defaults are the paper's setting, but for what its released
code gets wrong (README, deviations).
"""
import argparse
import difflib
import math
import os
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent

METHODS = ("rve_pfl", "lg_fedavg", "local", "fedavg", "fedper", "nbafl", "client_dp", "client_dp_adaptive",
           "dropout", "ressfl")
CLIENT_DP = ("client_dp", "client_dp_adaptive")
DP = ("nbafl", *CLIENT_DP)
RULES = ("threat", "mean", "median", "trimmed_mean", "krum", "geometric_median", "centered_clipping")
BEHAVIOURS = ("label_flip", "sign_flip", "gaussian", "scaling", "alie", "ipm", "mimic", "sybil", "false_size",
              "nan", "gan_poison", "adaptive", "passive", "absent")
SPLIT = ("rve_pfl", "lg_fedavg", "local")   # methods with an encoder before the head
SHARING = tuple(method for method in METHODS if method != "local")
NOISY = ("rve_pfl", "local")                # and among them those whose encoder is variational

# What depends on the data set or partition (how each was chosen: docs/options.md); a NAME without a row of
# its own has the first. Then who reads each, and what it is where nobody does.
CHOSEN = {
    "": {"kl_weight": 1e-5, "kl_warmup": 0, "init_logvar": -2.0, "eval_samples": 8, "lr": 1e-3,
         "head_lr": 0.1, "augment": "none", "aggregation": "mean"},
    "cifar": {"augment": "flip+shift"},
}
PLAIN = {"cifar": {"augment": "flip", "lr": 3e-3}}   # for methods without an encoder, whose CNN fits less
PLAIN_MIXED = {"lr": 3e-3}   # and for them under Dirichlet and IID; under shards it gains little
BY_METHOD = {
    "rve_pfl": {"aggregation": "threat"},
    "fedper": {"lr": 3e-3},
    "nbafl": {"epsilon": 50.0, "delta": 0.01, "exposures": 1},
    "ressfl": {"loss_weight": 0.3},
    "client_dp": {"clip": 1.0},
    "client_dp_adaptive": {"clip": 1.0},
}
READ_BY = {"kl_weight": NOISY, "kl_warmup": NOISY, "init_logvar": NOISY, "eval_samples": NOISY,
           "lr": METHODS, "head_lr": SPLIT, "augment": METHODS, "epsilon": DP, "delta": DP, "clip": DP,
           "exposures": ("nbafl",), "noise_multiplier": CLIENT_DP,
           "loss_weight": ("ressfl",), "aggregation": SHARING, "encoders_from": ("rve_pfl", "lg_fedavg")}
UNREAD = {"kl_weight": 0.0, "kl_warmup": 0, "init_logvar": None, "eval_samples": 1, "head_lr": 1.0,
          "aggregation": "mean"}

# What values of an option's type are, and that in words; bool stands for a flag without a value.
KINDS = {int: (int, "a whole number"), float: ((int, float), "a number"), Path: ((str, Path), "a path"),
         None: (str, "text"), bool: (bool, "true or false")}
NAME = r"[A-Za-z0-9_][A-Za-z0-9_.=+-]*", "a name of letters, digits, _ . = + -, not a path"


# What other programs call our options; suggested where a program has the option.
SYNONYMS = {
    "learning_rate": "lr", "eta": "lr", "batch_size": "local_bs", "bs": "local_bs",
    "local_epochs": "local_ep", "epochs": "train_epochs", "comm_round": "rounds",
    "clients": "num_users", "num_clients": "num_users",
    "n_clients": "num_users", "users": "num_users", "fraction": "frac", "participation": "frac",
    "beta": "kl_weight", "max_grad_norm": "clip", "frac_malicious": "malicious_frac", "iid": "partition",
    "non_iid": "partition", "algorithm": "method", "optim": "optimizer", "gpu": "device", "cuda": "device",
    "dtype": "precision", "data": "dataset", "output_dir": "results_dir", "save_dir": "models_dir",
    "checkpoint_dir": "models_dir", "name": "run_name", "exp_name": "run_name", "run": "run_name",
}
ALIKE = 0.75   # of difflib's ratio; what is less alike (--learning_rate, --tolerate) means something else


class Formatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults, but for those that say nothing."""

    def _get_help_string(self, action: argparse.Action) -> str:
        return action.help if action.default in (None, False, []) else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, remembers what each option may be, and checks edited defaults too."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.ranges, self.patterns = {}, {}

    def error(self, message: str):
        said_elsewhere = os.environ.get("RANK", "0") != "0"   # by the first of torchrun's processes
        self.exit(2, None if said_elsewhere else f"{self.prog}: error: {message}\n")

    def add(self, group, *flags: str, within: tuple[float, float] | None = None,
            pattern: tuple[str, str] | None = None, **kwargs) -> None:
        """Declare an option; ``within`` is its closed range, ``pattern`` what it must match, and in words."""
        action = group.add_argument(*flags, **kwargs)
        if within:
            self.ranges[action.dest] = within
        if pattern:
            self.patterns[action.dest] = pattern

    def parse(self, argv: list[str] | None) -> argparse.Namespace:
        """Parse, suggest a name for an unknown flag, and check every value."""
        args, unknown = self.parse_known_args(argv)
        if unknown:
            near = self._suggestion(unknown[0])
            self.error(f"unknown argument {unknown[0]}" + (f" (did you mean --{near}?)" if near else ""))
        if fault := self.fault(vars(args)):
            self.error(fault)
        return args

    def _suggestion(self, flag: str) -> str | None:
        """The option that an unknown flag most likely means: by meaning, else by spelling, if any."""
        if not flag.startswith("-"):
            return None
        name = flag.split("=")[0].strip("-").replace("-", "_").lower()
        ours = [option[2:] for option in self._option_string_actions if option.startswith("--")]
        if name not in ours and SYNONYMS.get(name) in ours:
            return SYNONYMS[name]
        return next(iter(difflib.get_close_matches(name, ours, 1, ALIKE)), None)

    def fault(self, options: dict[str, object]) -> str | None:
        """What is wrong with the first bad value among options, in words; None if all are as declared."""
        for action in self._actions:
            if action.dest not in options:
                continue
            value = options[action.dest]
            if value is None and action.default is None:
                continue
            if action.nargs == "+" and not isinstance(value, list):
                return f"{action.option_strings[0]} {shown(value)}: must be a list"
            for one in value if action.nargs == "+" else [value]:
                if why := self._why_not(action, one):
                    return f"{action.option_strings[0]} {shown(one)}: {why}"
        return None

    def _why_not(self, action: argparse.Action, value: object) -> str | None:
        kind, words = KINDS[bool if action.nargs == 0 else action.type]
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            return f"must be {words}"
        low, high = self.ranges.get(action.dest, (-math.inf, math.inf))
        if isinstance(value, (int, float)) and not low <= value <= high:   # NaN is in no range
            return f"must be between {low:g} and {high:g}"
        if action.choices and value not in action.choices:
            return f"choose from {', '.join(map(str, action.choices))}"
        pattern, words = self.patterns.get(action.dest, ("", ""))
        return words if pattern and not re.fullmatch(pattern, value) else None


def shown(value: object) -> str:
    """A value on one line: of what others wrote, not more than says which it is."""
    plain = value is None or isinstance(value, (str, int, float, Path))   # a list may be nested too deeply
    text = str(value)[:200] if plain else f"a {type(value).__name__}"
    return text if text.isprintable() else ascii(text)


def make_parser() -> Parser:
    """The options, by group."""
    parser = Parser(prog="RVE-PFL.py", description=__doc__.splitlines()[0], allow_abbrev=False,
                    formatter_class=Formatter)
    add, tiny, huge = parser.add, 1e-12, 10**9

    data = parser.add_argument_group("data")
    add(data, "--dataset", default="mnist", pattern=NAME,
        help="mnist, fmnist, cifar (downloaded on first use), mnist10k (ships with the project), or the "
             "NAME of any DATA_DIR/NAME.npz")
    add(data, "--data_dir", type=Path, default=ROOT / "data", help="where data sets are")
    add(data, "--partition", choices=("iid", "shards", "dirichlet"), default="shards",
        help="who owns which image: at random, a fixed number of classes each, or Dirichlet class mixes")
    add(data, "--classes_per_client", type=int, within=(1, huge),
        help="classes a client has, with --partition shards (2 if not given)")
    add(data, "--alpha", type=float, within=(1e-4, 1e6),
        help="concentration of --partition dirichlet, small is heterogeneous (0.1 if not given)")
    add(data, "--unequal", action="store_true", help="clients differ in size (log-normal, sigma 0.5)")
    add(data, "--augment", choices=("none", "flip", "flip+shift"),
        help="of training images, drawn anew in every epoch: mirror half of them; also shift them by up to 4 "
             "pixels (by data set if not given)")
    add(data, "--resplit", action="store_true",
        help="the released protocol, for comparison: train and test images are drawn afresh every round, "
             "so the test images have been trained on; marks every output")
    add(data, "--validate", action="store_true",
        help="for choosing options: evaluate on a tenth of each client's training images, held out, and "
             "leave its test images alone; marks every output")

    federated = parser.add_argument_group("federated")
    add(federated, "--num_users", type=int, default=10, within=(1, 100_000), help="clients [K]")
    add(federated, "--rounds", "--epochs", type=int, default=100, within=(1, huge), help="rounds [T]")
    add(federated, "--frac", type=float, default=1.0, within=(tiny, 1),
        help="share of the clients that train in a round [C]")
    add(federated, "--local_ep", type=int, default=10, within=(1, huge), help="local epochs [E]")
    add(federated, "--local_bs", type=int, default=256, within=(1, huge), help="local batch size [B]")
    add(federated, "--optimizer", choices=("adam", "sgd"), default="adam", help="a client's optimiser")
    add(federated, "--lr", type=float, within=(tiny, 1e3),
        help="learning rate [eta] (by data set, partition and method if not given)")
    add(federated, "--head_lr", type=float, within=(0, 1e3),
        help="the shared head's learning rate as a multiple of --lr (by data set if not given)")
    add(federated, "--lr_decay", type=float, default=1e-3, within=(0, 1e3),
        help="lr / (1 + lr_decay * steps a client has made)")
    add(federated, "--lr_warmup", type=float, default=0.2, within=(0, 1),
        help="share of a round's steps over which lr rises from 0, since a client's optimiser starts anew")
    add(federated, "--momentum", type=float, default=0.0, within=(0, 0.9999), help="of --optimizer sgd")

    model = parser.add_argument_group("model")
    add(model, "--method", choices=METHODS, default="rve_pfl", help="what is compared (README)")
    add(model, "--init_logvar", type=float, within=(-30, 10),
        help="bias of the encoder's log variance at the start (by data set if not given)")
    add(model, "--eval_samples", type=int, within=(1, 1000),
        help="draws of z averaged in a prediction (by data set if not given)")

    server = parser.add_argument_group("server")
    add(server, "--aggregation", choices=RULES,
        help="how uploads become the next head: weights that follow the threat model (threat), by data size "
             "(mean), or a robust rule (threat with rve_pfl, else mean, if not given)")
    add(server, "--tolerate", type=float, within=(0, 0.5),
        help="share of the uploads that trimmed_mean and krum are told may be malicious (0.3 if not given)")
    add(server, "--malicious_frac", type=float, default=0.0, within=(0, 1),
        help="share of the clients that are malicious, rounded down [F]")
    add(server, "--malicious_behaviour", choices=BEHAVIOURS,
        help="what they do (README; label_flip if not given)")
    add(server, "--encoders_from", metavar="RUN",
        help="take the clients' encoders from a finished RUN of the same clients and train the heads alone, "
             "so that no encoder makes up for a bad head")

    privacy = parser.add_argument_group("privacy")
    add(privacy, "--kl_weight", type=float, within=(0, 1e6),
        help="weight of the KL term, summed over z [beta] (by data set if not given)")
    add(privacy, "--kl_warmup", type=int, within=(0, huge),
        help="rounds over which beta rises from 0 (by data set if not given)")

    add(privacy, "--epsilon", type=float, within=(tiny, 1e6),
        help="privacy budget [epsilon]: nominal with nbafl (50 if not given), of the whole run with "
             "client-level DP, whose noise it decides (8 if neither it nor --noise_multiplier is given)")
    add(privacy, "--delta", type=float, within=(tiny, 0.5),
        help="[delta] (0.01 with nbafl, clients^-1.1 with client-level DP if not given)")
    add(privacy, "--clip", type=float, within=(tiny, 1e9),
        help="clipping norm: of what a client uploads with nbafl [C] (the median of the first round's norms "
             "if not given), of its update with client-level DP, at the start if adaptive (1 if not given)")
    add(privacy, "--exposures", type=int, within=(1, huge),
        help="how often nbafl counts an upload as seen [L] (1 if not given)")
    add(privacy, "--noise_multiplier", type=float, within=(1e-3, 1e6),
        help="client-level DP's noise in units of the clip, instead of --epsilon [z]")

    add(privacy, "--loss_weight", type=float, within=(0, 1e6),
        help="weight of ressfl's loss against its inner attacker [lambda] (0.3 if not given)")

    run = parser.add_argument_group("run")
    add(run, "--seed", type=int, default=1, within=(0, 2**31 - 1), help="decides every random draw")
    add(run, "--device", default="auto", help="auto, cpu, cuda or cuda:N",
        pattern=(r"auto|cpu|cuda(:\d{1,3})?", "choose from auto, cpu, cuda, cuda:N"))
    add(run, "--precision", choices=("auto", "fp32", "bf16"), default="auto",
        help="of convolutions and matrix products; auto: bf16 where the chip has it")
    add(run, "--stack", type=int, within=(1, 10_000),
        help="clients trained at a time as one stacked model (if not given: 1 on a CPU; on a GPU as many as "
             "make 500 images a step)")
    add(run, "--eval_every", type=int, default=1, within=(1, huge),
        help="evaluate every so many rounds, and in the last")
    add(run, "--run_name", pattern=NAME, help="folder name under RESULTS_DIR and MODELS_DIR "
                                              "(<dataset>-<partition>-<method>-seed<seed> if not given)")
    add(run, "--results_dir", type=Path, default=ROOT / "results", help="where CSVs and pictures go")
    add(run, "--models_dir", type=Path, default=ROOT / "saved_models", help="where checkpoints go")
    add(run, "--save_rounds", type=int, nargs="+", default=[], within=(1, huge), metavar="R",
        help="rounds whose checkpoints are kept for good, besides the latest")
    add(run, "--checkpoint_seconds", type=float, default=60.0, within=(0, huge),
        help="save for --resume at most this often")
    add(run, "--rendezvous_seconds", type=float, default=300.0, within=(0, huge),
        help="how long the processes of torchrun wait for one another at the start")
    add(run, "--resume", action="store_true", help="go on with an unfinished run")
    add(run, "--overwrite", action="store_true", help="delete an earlier run of this name")
    return parser


def args_parser(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse ``argv`` (the command line if None), check it, and fill in what depends on other options.

    Exits with status 2 and one line when an option is out of range or contradicts another.
    """
    parser = make_parser()
    args = parser.parse(argv)
    _check(parser, args)
    partition, method = f"--partition {args.partition}", f"--method {args.method}"
    _fill(parser, args, "classes_per_client", args.partition == "shards", 2, None, partition)
    _fill(parser, args, "alpha", args.partition == "dirichlet", 0.1, None, partition)
    _check_server(parser, args)
    _fill(parser, args, "malicious_behaviour", args.malicious_frac > 0, "label_flip", None,
          "--malicious_frac 0")
    if args.method in CLIENT_DP:
        _fill_client_dp(parser, args)
    chosen = chosen_for(args.dataset, args.partition, args.method)
    for name, readers in READ_BY.items():
        _fill(parser, args, name, args.method in readers, chosen.get(name), UNREAD.get(name), method)
    _fill(parser, args, "tolerate", args.aggregation in ("trimmed_mean", "krum"), 0.3, 0.3,
          f"--aggregation {args.aggregation}")
    if args.run_name is None:
        marks = [mark for mark in ("resplit", "validate") if getattr(args, mark)]
        args.run_name = "-".join([args.dataset, args.partition, args.method, f"seed{args.seed}", *marks])
    args.save_rounds = sorted(set(args.save_rounds))
    return args


def chosen_for(dataset: str, partition: str, method: str) -> dict[str, object]:
    """The values of options that depend on these."""
    chosen = {**CHOSEN[""], **CHOSEN.get(dataset, {})}
    if method not in SPLIT:
        chosen |= {**PLAIN.get(dataset, {}), **(PLAIN_MIXED if partition != "shards" else {})}
    return chosen | BY_METHOD.get(method, {})


def stored_fault(options: dict[str, object]) -> str | None:
    """What is wrong with options as ``args_parser`` left them in a ``config.json``, or None.

    An option that is not there, or that this version does not declare, is another version's and no fault.
    """
    if fault := make_parser().fault(options):
        return fault
    method = options.get("method")
    for name, value in chosen_for(options.get("dataset"), options.get("partition"), method).items():
        if name in options and options[name] is None and value is not None and method in READ_BY[name]:
            return f"--{name} None: --method {method} reads it"
    return None


def _fill(parser: Parser, args: argparse.Namespace, name: str, is_read: bool, default: object,
          unread: object, setting: str) -> None:
    """Fill an option that only some settings read; given where nothing reads it, it is a mistake."""
    given = getattr(args, name)
    if given is not None and not is_read:
        parser.error(f"--{name} {given}: {setting} does not read it; leave it out")
    if given is None:
        setattr(args, name, default if is_read else unread)


def _check_server(parser: Parser, args: argparse.Namespace) -> None:
    """What a server that adds noise, or receives nothing, cannot do."""
    if args.method in DP and args.aggregation not in (None, "mean"):
        parser.error(f"--aggregation {args.aggregation}: weights or rules that follow the uploads break the "
                     f"privacy accounting of --method {args.method}; leave it out")
    if args.method == "local" and args.malicious_frac:
        parser.error("--malicious_frac: nothing travels with --method local; leave it out")
    if args.method == "fedper":
        for name, value in (("malicious_behaviour", "gan_poison"), ("aggregation", "threat")):
            if getattr(args, name) == value:
                parser.error(f"--{name} {value}: needs the whole head, of which --method fedper keeps a part "
                             "private; choose another")


def _fill_client_dp(parser: Parser, args: argparse.Namespace) -> None:
    """Either epsilon or the noise is given; delta is below one in the number of clients."""
    if args.epsilon is not None and args.noise_multiplier is not None:
        parser.error("--epsilon and --noise_multiplier each decide the other; leave one out")
    if args.epsilon is None and args.noise_multiplier is None:
        args.epsilon = 8.0
    if args.delta is None:
        args.delta = min(0.1, args.num_users**-1.1)


def _check(parser: Parser, args: argparse.Namespace) -> None:
    """What no single option shows."""
    if args.momentum and args.optimizer != "sgd":
        parser.error(f"--momentum {args.momentum}: --optimizer {args.optimizer} does not read it; "
                     "leave it out or use --optimizer sgd")
    if args.save_rounds and max(args.save_rounds) > args.rounds:
        parser.error(f"--save_rounds {max(args.save_rounds)}: there are only --rounds {args.rounds}")
    for first, second in (("resume", "overwrite"), ("resplit", "validate")):
        if getattr(args, first) and getattr(args, second):
            parser.error(f"--{first} and --{second} contradict each other; leave one out")
