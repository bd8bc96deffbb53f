"""Attack a model that another program trained, such as PFLlib, Flower or FL-bench: ``mi_attack.py --model``."""
from __future__ import annotations

import json
import re
from argparse import Namespace
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import datasets
from attack.attacks import ATTACKS
from attack.run_command import MiAttack
from attack.verdict import ATTACK_COLUMNS, Unit, summarise
from parsing import DATA_NAME, HUGE, NAME, Option
from runs import folders
from utils import InputError, Late, digest, fingerprint, nearby, shown

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd

    from attack import any_model, model_evaluation, target
else:
    pd, any_model, model_evaluation = (Late(name) for name in (
        "pandas", "attack.any_model", "attack.model_evaluation"))

ON_GRADIENTS = ("analytic", "cosine_tv", "dlg")
KNOWN = {name: ATTACKS[name] for name in (*ON_GRADIENTS, "mi_face", "margin", "gmi")}
NO_VERDICT = "-"


class ModelAttack(MiAttack):
    """Attacks on a model of another program."""

    description = ("Attack a model that another program trained: invert its classes by its weights, and images by "
                   "their gradient or update.")
    adversaries, attacks = ("curious_server", "stolen_model"), KNOWN
    default_attacks = ("analytic", "cosine_tv", "margin")
    evaluation: model_evaluation.ModelEvaluation

    options = (
        Option("model", "FILE.py:NAME, a Python file, which is run, and the class or function in it that makes "
               "the model", required=True),
        Option("model_args", "arguments of NAME as JSON, such as '{\"num_classes\": 10}'", default="{}"),
        Option("weights", "the model's state dict: a file of torch.save, or an .npz of arrays in its order "
               "(BEFORE of --update if not given)"),
        Option("gradient", "gradients of single training steps at these weights, one file each: a dictionary by "
               "parameter name, or a list in the order of the parameters", several=True),
        Option("update", "BEFORE AFTER: state dicts before and after a client's SGD steps", several=True),
        Option("lr", "learning rate of the SGD steps", float, 0.1, within=(1e-9, 1e3)),
        Option("count", "number of images behind each gradient or update", int, 1, within=(1, 1000)),
        Option("local_steps", "number of SGD steps, of equal batches, behind an update", int, 1, within=(1, 1000)),
        Option("bn", "batch norm of the client's steps: the statistics of its batch (train), as in training, or "
               "running ones (eval)", default="train", choices=("train", "eval")),
        Option("images", "an .npz with `images` and `labels` of the client, for scores and controls; the true "
               "images of given gradients come first. Without given gradients, those of the images are simulated"),
        Option("max_images", "maximum number of images that are attacked, where gradients are simulated", int, 8,
               within=(1, HUGE)),
        Option("shape", "C H W of an image, needed without --images and --public", int, within=(1, HUGE),
               several=True),
        Option("mean", "mean that normalised the model's inputs, of pixels in [0, 1]: a number, or one per "
               "channel", float, [0.0], within=(-1e3, 1e3), several=True),
        Option("std", "standard deviation that normalised them: a number, or one per channel", float, [1.0],
               within=(1e-6, 1e3), several=True),
        Option("public", "NAME of a data set with the model's classes, for an evaluator, for gmi and for controls",
               pattern=DATA_NAME),
        Option("tv", "weight of total variation in cosine_tv", float, 0.2, within=(0, 1e3)),
        Option("run_name", "the folder under RESULTS_DIR (the name of the weights' file if not given)",
               pattern=NAME))

    @classmethod
    def all_options(cls) -> tuple[Option, ...]:
        of_runs = {option.name: option for option in MiAttack.all_options()}
        sources = ", ".join(f"{name} ({attack.source})" for name, attack in KNOWN.items())
        return (*cls.options, Option(
            "attack", f"the attacks, as far as they fit, or `all` of them: {sources}", several=True,
            default=list(cls.default_attacks), choices=[*KNOWN, "all"]), *(of_runs[name] for name in (
                "restarts", "iterations", "train_epochs", "public_images", "seed", "overwrite", "results_dir",
                "data_dir")))

    @classmethod
    @contextmanager
    def locked(cls, args: Namespace) -> Iterator[None]:
        yield   # the folder is made, and locked, once all input is read

    def __init__(self, args: Namespace) -> None:
        check(args)
        args.clients, args.adversary, args.observe, args.known = [0], list(self.adversaries), [], list(KNOWN)
        args.weights = args.weights or args.update[0]
        args.run = args.run_name or re.sub(r"[^\w.=+-]", "_", Path(args.weights).stem, flags=re.ASCII)
        super(MiAttack, self).__init__(args)

    def open(self) -> target.Target:
        self.rounds, args = [0], self.args
        results = args.results_dir / args.run
        if (results / "config.json").exists():
            raise InputError(f"--run_name {args.run}: {results} is a run of RVE-PFL.py; give another name")
        inputs = read_inputs(args)
        self.evaluation = model_evaluation.ModelEvaluation(inputs, args, results)
        # What the files hold decides the rows, too.
        args.weights += f" ({fingerprint(inputs.model.state_dict())})"
        if inputs.given:
            args.gradient = [fingerprint(one) for one in inputs.given]
        if inputs.images is not None and inputs.labels is not None:
            args.images += f" ({digest(inputs.images, inputs.labels)})"
        self.planned()
        return self.evaluation.target

    def run(self) -> None:
        self.target.results.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            folders.lock(self.target.results, stack, "--run_name")
            super().run()

    def units(self) -> Iterator[tuple[Unit, str | None]]:
        for name in dict.fromkeys(self.args.attack):
            who = "curious_server" if name in ON_GRADIENTS else "stolen_model"
            yield Unit(who, name, 0, 0), self.evaluation.unscorable(name, 0)

    def prepare(self, plan: list[Unit]) -> None:
        """Everything was read at the start."""

    def heading(self, round: int, client: int) -> str:
        return self.target.results.name

    def next_commands(self) -> list[str]:
        return []

    def finish(self, rows: list[dict]) -> list[str]:
        self.write(self.path("csv").with_name("attack_summary.csv"),
                   summarise(self.read(self.path("csv"), ATTACK_COLUMNS)), 5)
        inputs = self.evaluation.inputs
        lines = [f"left out: {unit.attack} ({reason})" for unit, reason in self.units() if reason]
        if inputs.public is not None:
            lines.append(f"evaluator: right on {self.evaluation.evaluator.accuracy:.1%} of images that it was not "
                         "trained on")
        if inputs.public is None or (inputs.given and inputs.images is None):
            lines.append("no verdict (-) without true images (--images) or, on classes, public ones (--public)")
        return lines

    def pictures(self, plan: list[Unit], rows: list[dict]) -> list[str]:
        return [f"picture:  {nearby(self.target.results / unit.picture)}" for unit in plan]

    @staticmethod
    def describe(unit: Unit, rows: list[dict]) -> tuple[str, ...]:
        table = pd.DataFrame(rows, columns=ATTACK_COLUMNS)
        judged = "evaluator_correct" if KNOWN[unit.attack].kind == "class" else "ssim"
        if table[judged].isna().all():
            return NO_VERDICT, unit.adversary, unit.words, "-", "-", "-"
        return MiAttack.describe(unit, rows)


def check(args: Namespace) -> None:
    """Raise InputError for options that do not go together."""
    if args.gradient and args.update:
        raise InputError("--gradient and --update: give one of them")
    if args.update and len(args.update) != 2:
        raise InputError("--update: give two state dicts, BEFORE and AFTER")
    if not args.weights and not args.update:
        raise InputError("--weights: give the model's state dict")
    if args.shape and len(args.shape) != 3:
        raise InputError("--shape: give three numbers, C H W")
    if args.local_steps > args.count:
        raise InputError(f"--local_steps {args.local_steps}: more than the images (--count {args.count})")
    if args.gradient and (args.local_steps > 1 or len(args.gradient) > 1 < args.count):
        raise InputError("--gradient: several steps are an --update, and several images have one gradient")


def shape_of(args: Namespace, images: np.ndarray | None, public: datasets.Dataset | None) -> tuple[int, ...]:
    """Return ``(C, H, W)`` as the options tell it; InputError if none does, or they differ."""
    known: dict[str, tuple[int, ...]] = {"--shape": tuple(args.shape)} if args.shape else {}
    if images is not None:
        known["--images"] = (images.shape[3], *images.shape[1:3])
    if public is not None:
        known["--public"] = public.image_shape
    if not known:
        raise InputError("--shape: give C H W of an image")
    if len(set(known.values())) > 1:
        raise InputError("images of one shape are needed: " + ", ".join(
            f"{option} has {' x '.join(map(str, shape))}" for option, shape in known.items()))
    return next(iter(known.values()))


def arguments_of(args: Namespace) -> dict:
    """Return --model_args."""
    try:
        if isinstance(arguments := json.loads(args.model_args), dict):
            return arguments
    except ValueError:
        pass
    raise InputError(f"--model_args {shown(args.model_args)}: give a JSON object, such as "
                     "'{\"num_classes\": 10}'")


def read_inputs(args: Namespace) -> model_evaluation.Inputs:
    """Read all that the options name."""
    images = labels = public = None
    if args.images:
        images, labels = datasets.read_labelled(Path(args.images), "--images")
    if args.public:
        public = datasets.load(args.public, args.data_dir, "public")
    shape, arguments = shape_of(args, images, public), arguments_of(args)
    model, at = (any_model.load_model(args.model, path, shape, args.mean, args.std, arguments)
                 for path in (args.weights, args.update[0] if args.update else args.weights))
    given = [any_model.load_gradient(path, at) for path in args.gradient or []]
    if args.update:
        before, after = args.update
        given = [any_model.load_update(before, after, at, args.lr)]
    if public is not None and public.num_classes != model.num_classes:
        raise InputError(f"--public {args.public}: it has {public.num_classes} classes; the model has "
                         f"{model.num_classes}")
    return model_evaluation.Inputs(model, at, given, images, labels, public)
