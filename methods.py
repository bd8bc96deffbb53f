"""METHODS: one row per method, which is its difference from FedAvg.

A row states the network, the shared parameters, an additional loss, the server, and the options that the method
reads, with their defaults. Everything else (update.py, RVE-PFL.py) is common to all methods.
"""
from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from parsing import HUGE, TINY, Option
from server.rules import RULES
from utils import Late, participants

if TYPE_CHECKING:
    from torch import Tensor, nn

    import devices
    import losses
    import models
    from server import privacy
    from server.base import Server, State
else:
    devices, losses, models, privacy = Late("devices"), Late("losses"), Late("models"), Late("server.privacy")
dp_training = Late("dp_training")   # it imports this file

# Options that some methods read; their defaults stand in the rows.
LR = Option("lr", "learning rate [eta]", float, within=(TINY, 1e3), group="federated")
HEAD_LR = Option("head_lr", "learning rate of the shared head as a multiple of --lr", float, unread=1.0,
                 within=(0, 1e3), group="federated")
AUGMENT = Option("augment", "augmentation of training images, anew in every epoch: half of them mirrored; also "
                 "shifted by up to 4 pixels", choices=("none", "flip", "flip+shift"), group="data")
INIT_LOGVAR = Option("init_logvar", "initial bias of the encoder's log variance", float, within=(-30, 10),
                     group="model")
EVAL_SAMPLES = Option("eval_samples", "draws of z averaged in a prediction", int, unread=1, within=(1, 1000),
                      group="model")
AGGREGATION = Option("aggregation", "how uploads become the next head: " + ", ".join(
    f"{name} ({rule.about})" for name, rule in RULES.items()), unread="mean", choices=RULES, group="server")
ENCODERS_FROM = Option("encoders_from", "use the encoders of a finished RUN of the same clients and train only "
                       "the heads: no encoder compensates for a bad head", metavar="RUN", group="server")
KL_WEIGHT = Option("kl_weight", "weight of the KL term, summed over z [beta]", float, unread=0.0,
                   within=(0, 1e6), group="privacy")
KL_WARMUP = Option("kl_warmup", "rounds over which beta rises from 0", int, unread=0, within=(0, HUGE),
                   group="privacy")
PRIOR = Option("prior", "prior of the KL term: normal is N(0, I), as published; class is a private Gaussian per "
               "class, learned with the encoder (the conditional entropy bottleneck, CEB); categorical is over "
               "--codes, of which the encoder chooses one per image", unread="normal",
               choices=("normal", "class", "categorical"), group="privacy")
PRIOR_APART = Option("prior_apart", "standard deviation over classes of the means of --prior class at the start; "
                     "with categorical, over codes", float, unread=0.5, within=(0, 10), group="privacy")
CODES = Option("codes", "number of codes M of --prior categorical, at least the number of classes (default: "
               "that number): z tells at most log2 M bits of an image", int, within=(2, 65536), group="privacy")
PRIVATE_INIT = Option("private_init", "each client draws the initial weights of its private encoder from a secret "
                      "of its own; else all begin alike, with weights that are no secret", bool, unread=False,
                      group="privacy")
FULL_SHARING_ROUNDS = Option("full_sharing_rounds", "number of first rounds in which the whole network is shared",
                             int, unread=0, within=(0, HUGE), group="federated")
EPSILON = Option("epsilon", "privacy budget [epsilon]: nominal with NbAFL; else of the whole run, for a client or "
                 "with DP-SGD for an image, and the noise follows from it (8 if neither it nor --noise_multiplier "
                 "is given)", float, within=(TINY, 1e6), group="privacy")
DELTA = Option("delta", "[delta]; with client-level DP (number of clients)^-1.1 by default", float,
               within=(TINY, 0.5), group="privacy")
CLIP = Option("clip", "clipping norm: of NbAFL's uploaded parameters [C] (median of the first round's norms by "
              "default); with client-level DP of the update, if adaptive at the start; with DP-SGD of an image's "
              "gradient", float, within=(TINY, 1e9), group="privacy")
EXPOSURES = Option("exposures", "NbAFL's number of exposures of an upload [L]", int, within=(1, HUGE),
                   group="privacy")
NOISE_MULTIPLIER = Option("noise_multiplier", "noise of client-level DP or DP-SGD in units of the clip, instead "
                          "of --epsilon", float, within=(1e-3, 1e6), group="privacy")
LOSS_WEIGHT = Option("loss_weight", "weight of the loss against the inner attacker [lambda]", float,
                     within=(0, 1e6), group="privacy")
PROX = Option("prox", "weight of the proximal term, half the squared distance to the parameters sent [mu; Ditto's "
              "lambda]", float, unread=0.0, within=(0, 1e3), group="federated")
PRIVATE_EP = Option("private_ep", "epochs that train the private parameters alone, before the local epochs, which "
                    "then train the shared ones alone", int, within=(1, HUGE), group="federated")
L2_WEIGHT = Option("l2_weight", "weight of the norm of z", float, within=(0, 1e3), group="privacy")

Values = Mapping[Option, object]


@dataclass(frozen=True)
class Method:
    """One row."""

    about: str   # a few words
    source: str   # its publication
    network: type[models.Network]   # that a client trains
    # Prefixes of the parameters that leave a client: ``classifier.`` is the head, and all of the plain CNN.
    shared: tuple[str, ...]
    reads: Values   # the options that it reads besides those of all methods, with their defaults
    # Other defaults for a data set, a partition or a prior; the last of them that has one takes precedence.
    by_dataset: Mapping[str, Values] = field(default_factory=dict)
    by_partition: Mapping[str, Values] = field(default_factory=dict)
    by_prior: Mapping[str, Values] = field(default_factory=dict)
    server: type[Server] | None = None   # its own; ``--aggregation`` must then be ``mean``
    loss: Callable[[losses.Step], Tensor] | None = None   # step -> additional loss, per image or of the batch
    trainer: Callable[..., Any] | None = None   # its own subclass of ``update.Trainer``
    poisson: bool = False   # whether clients are sampled independently, as accounting of client-level DP needs
    settle: Callable[[Namespace], str | None] | None = None   # fills other options; returns an error or None

    def default(self, option: Option, dataset: str, partition: str, prior: str | None = None) -> object:
        """Return the default of an option for a data set, a partition and a prior (None: the method's own)."""
        own = str(prior or self.reads.get(PRIOR))
        for tuned, key in ((self.by_prior, own), (self.by_partition, partition), (self.by_dataset, dataset)):
            if option in tuned.get(key, {}):
                return tuned[key][option]
        return self.reads[option]

    @property
    def shares_whole_head(self) -> bool:
        """Return whether every parameter of the head is shared."""
        return bool(self.shared) and "classifier.".startswith(self.shared)

    @property
    def predicts_privately(self) -> bool:
        """Return whether a prediction depends on private parameters."""
        return not self.shares_whole_head or self.network.has_encoder or self.network.predictor != "classifier"

    def in_round(self, number: int, options: Mapping[str, Any]) -> Method:
        """Return the row of a round: everything is shared in the first ``full_sharing_rounds``."""
        return replace(self, shared=("",)) if number <= (options.get("full_sharing_rounds") or 0) else self

    @property
    def protects(self) -> bool:
        """Return whether uploads are clipped or noised before the server sees them."""
        return self.server is not None and self.server.protects

    @property
    def accounts(self) -> bool:
        """Return whether the noise depends on the number of rounds, which then is fixed."""
        return DELTA in self.reads

    @property
    def sequential(self) -> bool:
        """Return whether clients train one after another, never stacked or in threads."""
        return self.loss is not None or self.trainer is not None

    def shared_and_private(self, state: State) -> tuple[State, State]:
        """Split a state dict into the shared part and the part that stays with the client."""
        shared = {name: value for name, value in state.items() if name.startswith(self.shared)}
        return shared, {name: value for name, value in state.items() if name not in shared}

    def count(self, model: nn.Module) -> dict[str, int]:
        """Return the numbers of parameters of each module, in total, and shared."""
        sizes = {name: value.numel() for name, value in model.state_dict().items()}
        parts = {part: sum(n for name, n in sizes.items() if name.startswith(f"{part}."))
                 for part, _ in model.named_children()}
        shared = self.shared_and_private(model.state_dict())[0]
        return {**parts, "total": sum(sizes.values()), "shared": sum(sizes[name] for name in shared)}

    def build(self, image_shape: tuple[int, int, int], num_classes: int,
              options: Mapping[str, object]) -> models.Network:
        """Return the network at its start, drawn from PyTorch's generator, with its options of the run."""
        chosen = {name: options[name] for name in self.network.options if name in options}
        return self.network(image_shape, num_classes, **chosen)

    def own_start(self, image_shape: tuple[int, int, int], num_classes: int, options: Mapping[str, Any],
                  client: int) -> State:
        """Draw the encoder's private parameters anew, with a client's secret; none without ``--private_init``.

        The secret is simulated: it follows from the seed and the client's number, so that a run can be repeated.
        """
        if not options.get("private_init"):
            return {}
        with devices.drawn_from(options["seed"], "private start", client):
            parameters: State = dict(self.build(image_shape, num_classes, options).named_parameters())
        private = self.in_round(1, options).shared_and_private(parameters)[1]
        return {name: value.detach() for name, value in private.items() if name.startswith("encoder.")}


def make_server(options: Mapping[str, Any], smallest: int) -> Server:
    """Return the server of a run: the method's own, or that of its rule; arguments as for ``Server``."""
    return (METHODS[options["method"]].server or RULES[options["aggregation"]].server)(options, smallest)


def clip_without_uploads(args: Namespace) -> str | None:
    """Refuse secure aggregation if the clip would be computed from single uploads."""
    if args.secure_aggregation and args.clip is None:
        return (f"--secure_aggregation: it hides the norms of uploads, so --method {args.method} cannot take its "
                "clip from them; give --clip")
    return None


def dp_budget(args: Namespace) -> str | None:
    """Set epsilon if it is not given; epsilon and the noise exclude each other."""
    if args.epsilon is not None and args.noise_multiplier is not None:
        return "--epsilon and --noise_multiplier each decide the other; leave one out"
    if args.epsilon is None and args.noise_multiplier is None:
        args.epsilon = 8.0
    return None


def client_dp_budget(args: Namespace) -> str | None:
    """Set epsilon as ``dp_budget`` does, and delta if it is not given."""
    if args.delta is None:
        args.delta = min(0.1, participants(vars(args))**-1.1)   # below one in the number of clients
    return dp_budget(args)


def dp_sgd_budget(args: Namespace) -> str | None:
    """Set epsilon as ``dp_budget`` does, and full precision: bfloat16 would round the norms that are clipped."""
    if args.precision == "bf16":
        return f"--precision bf16: --method {args.method} clips gradients in fp32; leave it out"
    if args.new_clients:
        return f"--new_clients {args.new_clients:g}: --method {args.method} has no noise for them; leave it out"
    args.precision = "fp32"
    return dp_budget(args)


TRAINING = {LR: 1e-3, AUGMENT: "none", AGGREGATION: "mean"}
PRIVATE_ENCODER = {**TRAINING, HEAD_LR: 0.1, PRIVATE_INIT: False}
VARIATIONAL = {**PRIVATE_ENCODER, PRIOR: "normal", PRIOR_APART: 0.5, CODES: None, KL_WEIGHT: 1e-5, KL_WARMUP: 0,
               INIT_LOGVAR: -2.0, EVAL_SAMPLES: 8}
NBAFL = {**TRAINING, EPSILON: 50.0, DELTA: 0.01, CLIP: None, EXPOSURES: 1}
CLIENT_DP = {**TRAINING, EPSILON: None, DELTA: None, CLIP: 1.0, NOISE_MULTIPLIER: None}
DP_SGD = {**CLIENT_DP, LR: 3e-3, DELTA: 1e-5}

# KL to a prior of classes bounds what z tells beyond the class only, and the head trains on draws of the prior.
WITH_CLASSES = dict.fromkeys(("class", "categorical"), {KL_WEIGHT: 1.0, HEAD_LR: 1.0, PRIVATE_INIT: True})

HEAD = ("classifier.",)   # of the comparison CNN, this is all of it
ON_CIFAR = {"cifar": {AUGMENT: "flip+shift"}}
# Without an encoder, and with clients that have most classes, a larger learning rate is better.
CNN_ON_CIFAR = {"cifar": {AUGMENT: "flip", LR: 3e-3}}
CNN_ON_MIXED = dict.fromkeys(("dirichlet", "iid"), {LR: 3e-3})
# The proximal term helps the more, the more clients' classes differ; under IID it only slows training.
PROX_ON_MIXED = {"dirichlet": {LR: 3e-3, PROX: 0.1}, "iid": {LR: 3e-3, PROX: 0.0}}

METHODS = {
    "rve_pfl": Method(
        "the paper", "Issa et al. 2024, doi 10.1109/TIFS.2024.3368879", models.RVE, HEAD,
        {**VARIATIONAL, AGGREGATION: "threat_aware", ENCODERS_FROM: None, FULL_SHARING_ROUNDS: 0}, ON_CIFAR,
        by_prior=WITH_CLASSES),
    "lg_fedavg": Method(
        "RVE-PFL without noise", "Liang et al. 2020, arXiv 2001.01523", models.EncoderClassifier,
        HEAD, {**PRIVATE_ENCODER, ENCODERS_FROM: None, FULL_SHARING_ROUNDS: 0}, ON_CIFAR),
    "local": Method(
        "RVE-PFL's model, nothing shared", "", models.RVE, (),
        {option: value for option, value in VARIATIONAL.items() if option is not AGGREGATION}, ON_CIFAR,
        by_prior=WITH_CLASSES),
    "fedavg": Method(
        "everything shared", "McMahan et al. 2017, arXiv 1602.05629", models.CNN, HEAD, TRAINING,
        CNN_ON_CIFAR, CNN_ON_MIXED),
    "local_cnn": Method(
        "the CNN, nothing shared", "", models.CNN, (), {LR: 3e-3, AUGMENT: "none"}, CNN_ON_CIFAR, CNN_ON_MIXED),
    "fedprox": Method(
        "a proximal term", "Li et al. 2020, arXiv 1812.06127", models.CNN, HEAD, {**TRAINING, PROX: 1.0},
        CNN_ON_CIFAR, dict.fromkeys(("dirichlet", "iid"), {LR: 3e-3, PROX: 0.01}), loss=losses.proximal),
    "fedper": Method(
        "a private last layer", "Arivazhagan et al. 2019, arXiv 1912.00818", models.CNN,
        ("classifier.features.",), {**TRAINING, LR: 3e-3}, CNN_ON_CIFAR, CNN_ON_MIXED),
    "fedrep": Method(
        "a private last layer, trained before the others", "Collins et al. 2021, arXiv 2102.07078", models.CNN,
        ("classifier.features.",), {**TRAINING, LR: 3e-3, PRIVATE_EP: 5}, CNN_ON_CIFAR, CNN_ON_MIXED),
    "ditto": Method(
        "a private CNN beside the shared one, held near it", "Li et al. 2021, arXiv 2012.04221", models.Ditto,
        HEAD, {**TRAINING, PROX: 0.01}, CNN_ON_CIFAR, CNN_ON_MIXED, loss=losses.ditto),
    "fedsr": Method(
        "noisy features, held near a private class prior", "Nguyen et al. 2022, NeurIPS", models.FedSR, HEAD,
        {**TRAINING, LR: 3e-3, KL_WEIGHT: 1e-3, L2_WEIGHT: 0.01}, CNN_ON_CIFAR, CNN_ON_MIXED),
    "nbafl": Method(
        "noise before aggregation", "Wei et al. 2020, arXiv 1911.00222", models.CNN, HEAD,
        NBAFL, CNN_ON_CIFAR, CNN_ON_MIXED, server=privacy.NbAFL, settle=clip_without_uploads),
    "client_dp": Method(
        "client-level DP", "McMahan et al. 2018, arXiv 1710.06963", models.CNN, HEAD, CLIENT_DP,
        CNN_ON_CIFAR, CNN_ON_MIXED, server=privacy.ClientDP, poisson=True, settle=client_dp_budget),
    "client_dp_adaptive": Method(
        "client-level DP, with a clip that follows the median", "Andrew et al. 2021, arXiv 1905.03871", models.CNN,
        HEAD, CLIENT_DP, CNN_ON_CIFAR, CNN_ON_MIXED, server=privacy.AdaptiveClientDP, poisson=True,
        settle=client_dp_budget),
    "dp_sgd": Method(
        "example-level DP in each client", "Abadi et al. 2016, arXiv 1607.00133", models.CNN, HEAD, DP_SGD,
        CNN_ON_CIFAR, trainer=dp_training.DPTrainer, settle=dp_sgd_budget),
    "dropout": Method(
        "one more dropout layer, before the last layer", "Zheng 2021, arXiv 2108.11106", models.DropoutCNN, HEAD,
        TRAINING, CNN_ON_CIFAR, CNN_ON_MIXED),
    "ressfl": Method(
        "trained against an inverter in each client", "after Li et al. 2022, CVPR", models.ResSFL, HEAD,
        {**TRAINING, LOSS_WEIGHT: 0.3}, CNN_ON_CIFAR, CNN_ON_MIXED, loss=losses.inner_attacker),
    "rve_pfl_trunk": Method(
        "RVE-PFL whose encoders share all but mu and logvar", "", models.RVE, (*HEAD, "encoder.trunk."),
        {**VARIATIONAL, FULL_SHARING_ROUNDS: 0}, ON_CIFAR, by_prior=WITH_CLASSES),
    "nbafl_prox": Method(
        "NbAFL with its proximal term", "Wei et al. 2020, arXiv 1911.00222", models.CNN, HEAD,
        {**NBAFL, PROX: 1.0}, {"cifar": {**CNN_ON_CIFAR["cifar"], PROX: 0.1}}, PROX_ON_MIXED, server=privacy.NbAFL,
        loss=losses.proximal, settle=clip_without_uploads),
}
