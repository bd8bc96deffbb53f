"""What an adversary holds of a run. It is read from that adversary's files and from no others.

| adversary        | files                      | holds                                            |
| curious_server   | shared.pt, server.pt       | the heads it received, sent, and will send next  |
| stolen_model     | shared.pt, client_<k>.pt   | the victim's encoder and the victim's own head   |
| prediction_api   | shared.pt, client_<k>.pt   | answers of that model, but not the model         |
| curious_client   | shared.pt, client_<own>.pt | its own encoder, and the heads that it is sent   |

A client that did not train in the round holds the head that was just aggregated, from server.pt. The head of
a malicious client is the one that it uploaded.

Round 0 is the start, before the first round. It has no files: its weights are drawn from the run's seed again, and
every adversary holds all of them.

``Victim`` plays the attacked client. It reads ``client_<k>.pt``, and hands over only what the adversary
observes: an upload, a latent, or the answer to an image.

An upload that is observed at a checkpoint is that of the next training step. The client takes that step with
the encoder just stored and with the head just aggregated, which the server sends next. The server knows this
head, so it matches the gradient on exactly these weights.
"""
import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn

import datasets
from attack import gradients
from methods import METHODS, Method, make_server
from models import RVE, Network, as_image, over_draws, reparameterise
from runs import configs
from runs.checkpoints import checked_state, load_checked, read_client, read_shared, same_memory
from server.base import Round, Server, State
from server.privacy import NbAFL
from update import ClientState, Trainer, Training
from utils import InputError, fingerprint, plain_file, seed_torch

Query = Callable[[Tensor], Tensor]   # images N x C x H x W -> probabilities N x num_classes
Part = TypeVar("Part")
ADVERSARIES = ("curious_server", "stolen_model", "prediction_api", "curious_client")


@dataclass(frozen=True)
class Target:
    """A run under attack, finished or interrupted.

    Attributes:
        results, models: the run's two folders.
        options: the ``options`` of its ``config.json``.
        start_digest: of the weights that it began with, as ``utils.fingerprint`` gives it; "" if unknown.
    """

    results: Path
    models: Path
    options: dict
    data: datasets.Dataset
    start_digest: str = ""

    @property
    def has_encoder(self) -> bool:
        """Whether an encoder stands before the head, so that the head's input is a latent z."""
        return METHODS[self.options["method"]].network.has_encoder

    def network(self) -> Network:
        """The method's network with fresh weights.

        They are drawn from PyTorch's generator, so another number of calls changes every later draw.
        """
        return METHODS[self.options["method"]].build(
            self.data.image_shape, self.data.num_classes, self.options).eval()

    def rounds(self) -> list[int]:
        """Rounds that have a checkpoint, in order."""
        names = (p.name.removeprefix("round_") for p in self.models.glob("round_*"))
        return sorted(int(name) for name in names if name.isdecimal())

    def latest_round(self) -> int:
        """The latest round that has a checkpoint; InputError if none has."""
        if not (rounds := self.rounds()):
            raise InputError(f"--run {self.models.name}: {self.models} holds no checkpoint; go on with the run "
                             "(--resume), or train it again (--overwrite)")
        return rounds[-1]

    def require(self, round: int) -> None:
        """Check that there is something to attack of a round; 0 is the start, before the first round.

        Raises:
            InputError: the round has no checkpoint, or the start can't be made again.
        """
        if round:
            self.file(round, "shared.pt")
        elif source := self.options.get("encoders_from"):
            raise InputError(f"--rounds 0: this run's clients began with the encoders of run {source}, which no "
                             "seed gives; attack a later round")
        elif fingerprint(self.seeded) != self.start_digest:
            raise InputError(f"--rounds 0: by {self.results / 'config.json'} the run began with other weights "
                             "than its seed gives here; use the PyTorch and the program that trained it")

    @cached_property
    def seeded(self) -> State:
        """The weights that a run begins with, drawn from its seed: no secret of anybody."""
        return self.start(0).state_dict()

    def file(self, round: int, name: str) -> Path:
        """The path of a checkpoint's file; InputError if the round has no checkpoint."""
        folder = self.models / f"round_{round}"
        if not folder.is_dir():
            kept = ", ".join(map(str, self.rounds())) or "none"
            raise InputError(f"--rounds {round}: no checkpoint {folder} (rounds with one: {kept}); train "
                             f"with --save_rounds {round}")
        return folder / name

    def shared(self, round: int) -> dict:
        """``shared.pt``: ``sent``, the head that clients started from, and ``uploads``, theirs by client."""
        if not round:
            return {"sent": self.sent_next(0), "uploads": {}}
        travels = self.row(round).shared_and_private(self.network().state_dict())[0]
        return read_shared(self.file(round, "shared.pt"), travels, self.options["num_users"])

    def row(self, round: int) -> Method:
        """The row of METHODS that held in a round; before the first, that which holds in it."""
        return METHODS[self.options["method"]].in_round(max(round, 1), self.options)

    def start(self, round: int) -> Network:
        """The network that every client's own part began with: the seeded start, or what the warm rounds left.

        It is no secret of any client: all of it was sent to all of them.

        Raises:
            InputError: a file is missing or damaged.
        """
        seed_torch(self.options["seed"], "init")
        network = self.network()
        if 0 < (self.options.get("full_sharing_rounds") or 0) < round:
            path = self.file(round, "server.pt")
            stays = self.row(round).shared_and_private(network.state_dict())[1]
            network.load_state_dict(
                checked_state(load_checked(path).get("private_start"), stays, path), strict=False)
        return network

    def sent_next(self, round: int) -> State:
        """The head in ``server.pt``: aggregated at the end of the round, and sent at the start of the next.

        Raises:
            InputError: the file is damaged, or of another method.
        """
        if not round:
            return self.row(0).shared_and_private(self.seeded)[0]
        path = self.file(round, "server.pt")
        travels = self.row(round).shared_and_private(self.network().state_dict())[0]
        return checked_state(load_checked(path).get("head"), travels, path)

    @cached_property
    def first_server(self) -> Server:
        """The run's server as it was before the first round."""
        return make_server(self.options, min(map(len, self.owned()[0])))

    def server(self, round: int) -> Server:
        """The run's server, with what it remembers after a round.

        What it learned later only, it has too: NbAFL's clip is that of the first uploads, and stays.
        """
        found, start = copy.copy(self.first_server), self.first_server.memory
        found.memory = {**self._memory(self.latest_round()), **(self._memory(round) if round else start)}
        return found

    def _memory(self, round: int) -> dict:
        path = self.file(round, "server.pt")
        memory = load_checked(path).get("memory")
        if not (isinstance(memory, dict) and same_memory(memory, self.first_server.memory)):
            raise InputError(f"checkpoint {path} is not of this run; start again with --overwrite")
        return memory

    def private(self, round: int, client: int) -> ClientState:
        """``client_<k>.pt``: what never left the client."""
        travels, stays = self.row(round).shared_and_private(self.network().state_dict() if round else self.seeded)
        if not round:
            return ClientState(stays)
        return read_client(self.file(round, f"client_{client}.pt"), stays, travels)

    def own_head(self, round: int, client: int, private: ClientState) -> State:
        """The head of the client's own model.

        It is the head that the client trained in this round, before any noise or clipping that protects the
        upload. A client that did not train has the head just aggregated.
        """
        uploads, hidden = self.shared(round)["uploads"], METHODS[self.options["method"]].protects
        if client in uploads and private.trained_shared:
            return private.trained_shared
        if client in uploads and not hidden:
            return uploads[client]
        return self.sent_next(round)   # also for a protected run of an older version, which stored no ``own``

    def owned(self) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Each client's training and test images, as numbers in the data set. Only scoring uses them.

        Raises:
            InputError: ``partition.npz`` is missing, damaged, or of another data set.
        """
        path = self.results / "partition.npz"
        try:
            with np.load(plain_file(path), allow_pickle=False) as file:
                halves = [[file[f"{half}_{k}"] for k in range(self.options["num_users"])]
                          for half in ("train", "test")]
        except KeyError as error:
            raise InputError(f"{path}: no fixed training and test images; runs with --resplit or --validate "
                             "cannot be attacked") from error
        except Exception as error:
            raise InputError(f"{path} is missing or damaged") from error
        if not all(part.ndim == 1 and part.dtype.kind == "i" and len(part) and part.min() >= 0
                   and part.max() < len(self.data.labels) for half in halves for part in half):
            raise InputError(f"{path} does not number images of --dataset {self.options['dataset']}; it is "
                             "damaged, or the data set has changed since the run")
        return halves[0], halves[1]


def open_target(name: str, results_dir: Path, models_dir: Path, data_dir: Path) -> Target:
    """Read a run's ``config.json`` and its data set.

    Raises:
        InputError: there is no such run, or its files are damaged.
    """
    path = results_dir / name / "config.json"
    if not path.exists():
        there = sorted(p.parent.name for p in results_dir.glob("*/config.json"))
        raise InputError(f"--run {name}: there is no {path}; runs there: {', '.join(there) or 'no runs'}")
    config = configs.read(path, "dataset", "method", "num_users", "init_logvar", "seed")
    options = config["options"]
    data = datasets.load(options["dataset"], data_dir)
    return Target(results_dir / name, models_dir / name, options, data, str(config.get("start", "")))


@dataclass(frozen=True)
class Knowledge:
    """What an adversary has of one client in one round. A part that it does not have is None.

    Attributes:
        head: input -> logits. The input is an image or, behind an encoder, a latent z in the shape of an
            image. None if a part of the head stays with the clients.
        encoder: image -> z, or -> mean and log variance of z. It is the victim's, or a curious client's own.
        has_encoder: whether the head's input is z. True also for an adversary that has no encoder itself.
        next_head: the head that the curious server sends next, on which it observes a gradient.
        next_trunk: the encoder's trunk that it sends next, where that travels.
        query: the prediction service.
        known: the parts of the victim's encoder that travelled, by name, where not all of it is held.
    """

    head: nn.Module | None
    encoder: nn.Module | None
    has_encoder: bool
    image_shape: tuple[int, int, int]
    next_head: nn.Module | None = None
    query: Query | None = None
    known: State = field(default_factory=dict)
    next_trunk: nn.Module | None = None

    def __post_init__(self) -> None:
        """Channels last makes max pooling of a large batch about fifteen times as fast."""
        for part in filter(None, (self.head, self.encoder, self.next_head, self.next_trunk)):
            part.to(memory_format=torch.channels_last)

    def posterior(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Images ``N x C x H x W`` -> mean and log variance of z, each ``N x CHW``.

        The log variance is None for an encoder without noise.
        """
        found = held(self.encoder)(x)
        return found if isinstance(found, tuple) else (found, None)

    def sample(self, x: Tensor) -> Tensor:
        """Images ``N x C x H x W`` -> one draw of z for each, ``N x CHW``."""
        mu, logvar = self.posterior(x)
        return mu if logvar is None else reparameterise(mu, logvar)

    def logits(self, x: Tensor, draws: int = 0) -> Tensor:
        """Images ``N x C x H x W`` -> log-probabilities ``N x num_classes``.

        Args:
            draws: how many draws of z the probabilities are averaged over; 0 takes the mean of z instead.
        """
        head = held(self.head)
        if not self.has_encoder:
            return head(x).log_softmax(1)
        mu, logvar = self.posterior(x)
        if not draws or logvar is None:
            return head(as_image(mu, self.image_shape)).log_softmax(1)
        each = over_draws(lambda z: head(as_image(z, self.image_shape)).log_softmax(1), mu, logvar, draws)
        return each.logsumexp(0) - float(np.log(draws))


def held(part: Part | None) -> Part:
    """A part of ``Knowledge`` that the attack needs.

    Raises:
        LookupError: this adversary does not have it.
    """
    if part is None:
        raise LookupError("the attack needs a part of the model that this adversary does not have")
    return part


def hold(target: Target, adversary: str, round: int, client: int, own: int = 0) -> Knowledge:
    """What the adversary has of ``client`` after ``round``. The prediction service's is made by scene.py.

    Args:
        own: the number of the curious client itself.

    Raises:
        InputError: the method sends the curious server nothing, or a file is missing or damaged.
    """
    shared, network = target.shared(round), target.network()
    if adversary == "curious_server" and not shared["sent"]:
        raise InputError(f"--adversary curious_server: --method {target.options['method']} sends it nothing")
    if adversary == "curious_server":
        parameters = shared["uploads"].get(client, shared["sent"]) if round else target.seeded
    elif adversary == "curious_client":   # it never sees the upload of another client
        parameters = {**shared["sent"], **target.private(round, own).parameters}
    else:
        private = target.private(round, client)
        parameters = {**target.own_head(round, client, private), **private.parameters}
    whole = all(name in parameters for name in network.state_dict() if name.startswith("classifier."))
    network.load_state_dict(parameters, strict=False)
    network.requires_grad_(False)
    next_head = next_trunk = None
    if adversary == "curious_server" and whole:
        following, sent_next = target.network().requires_grad_(False), target.sent_next(round)
        following.load_state_dict(sent_next, strict=False)
        next_head = following.get_submodule("classifier")
        if "encoder.trunk.0.weight" in sent_next:
            next_trunk = following.get_submodule("encoder.trunk")
    parts = {name.removeprefix("encoder.") for name in network.state_dict() if name.startswith("encoder.")}
    known = {name: parameters[f"encoder.{name}"] for name in parts if f"encoder.{name}" in parameters}
    encoder = network.get_submodule("encoder") if known and known.keys() == parts else None
    return Knowledge(network.get_submodule("classifier") if whole else None, encoder, target.has_encoder,
                    target.data.image_shape, next_head, known={} if encoder is not None else known,
                    next_trunk=next_trunk)


def posterior_in_parts(knowledge: Knowledge, images: Tensor) -> tuple[Tensor, Tensor | None]:
    """``Knowledge.posterior`` of many images, 256 at a time."""
    with torch.no_grad():
        parts = [knowledge.posterior(part) for part in images.split(256)]
    logvar = [noise for _, noise in parts if noise is not None]
    return torch.cat([mu for mu, _ in parts]), torch.cat(logvar) if logvar else None


class Victim:
    """The attacked client. Its methods give what the adversary observes of given images."""

    def __init__(self, target: Target, round: int, client: int) -> None:
        self.target, self.round, self.client, self.sent_next = target, round, client, target.sent_next(round)
        self.uploads = 0   # observed so far
        private = target.private(round, client)
        self.private, self.own = private.parameters, target.own_head(round, client, private)

    def _network(self, shared: State) -> Network:
        network = self.target.network()
        network.load_state_dict({**shared, **self.private})
        return network

    def _holdings(self, shared: State) -> Knowledge:
        network = self._network(shared)
        return Knowledge(network.get_submodule("classifier"), getattr(network, "encoder", None),
                        self.target.has_encoder, self.target.data.image_shape)

    def stolen(self) -> Knowledge:
        """The client's own model."""
        return self._holdings(self.own)

    @torch.no_grad()
    def head_input(self, x: Tensor) -> Tensor:
        """Images ``N x C x H x W`` -> the head's input: the images, or one draw of z in their shape."""
        knowledge = self._holdings(self.own)
        return as_image(knowledge.sample(x), knowledge.image_shape) if self.target.has_encoder else x

    @torch.no_grad()
    def noise(self, x: Tensor, y: Tensor) -> dict[str, float] | None:
        """How much of images ``N x C x H x W`` the noise on z leaves; None for a method without noise.

        Args:
            y: their labels, ``N``.

        Returns:
            Means over the images: ``kl_nats``, to the prior; ``sigma``, the noise's standard deviation;
            ``snr_db``, in dB, the variance of mu over images divided by that of the noise; ``bound_nats``, an
            upper bound on what one draw of z tells about an image: the KL, and with a prior for each class also
            the entropy of the labels (``models.ClassPrior``).
        """
        if not self.target.has_encoder:
            return None
        knowledge = self._holdings(self.own)
        mu, logvar = posterior_in_parts(knowledge, x)
        if logvar is None:
            return None
        network = self._network(self.own)
        assert isinstance(network, RVE)
        shares = y.bincount() / len(y)
        kl = found.mean().item() if (found := network.kl(mu, logvar, y)) is not None else float("nan")
        return {"kl_nats": kl,
                "sigma": (0.5 * logvar).exp().mean().item(),
                "snr_db": 10 * (mu.var(0).sum() / logvar.exp().mean(0).sum()).log10().item(),
                "bound_nats": kl + (0.0 if network.prior is None else torch.special.entr(shares).sum().item())}

    @torch.no_grad()
    def kl(self, x: Tensor, y: Tensor) -> Tensor | None:
        """KL of the posterior of z to the prior, nats, of each of N images with labels ``y``.

        None for a method without noise.
        """
        network = self._network(self.own)
        if not isinstance(network, RVE):
            return None
        mu, logvar = posterior_in_parts(self._holdings(self.own), x)
        return None if logvar is None else network.kl(mu, logvar, y)

    def update(self, x: Tensor, y: Tensor, lr: float, batch: int | None = None,
               inputs: list[Tensor] | None = None) -> State:
        """Return what the server makes of the upload that a client's next steps cause: the sum of their gradients.

        The client takes SGD steps on images ``x`` with labels ``y`` from the head that it is sent next. Each
        follows the gradient of its whole objective: the cross-entropy, the KL term, the method's own loss and,
        with a prior for each class, the replay of draws from the priors. Its private parameters stay as they are.
        There is no dropout and no augmentation, which is the best case for the adversary.

        Where the method protects uploads, what is observed is ``sent - lr * sum`` as ``Server.receive`` lets it
        through, every upload with noise of its own. The server then divides by the step (``gradients.of_upload``).
        Other uploads give the sum itself; that float32 rounds them is left out.

        Args:
            lr: size of a step, which the server knows.
            batch: images in a step; all of them if not given.
            inputs: the head's inputs are appended to this list, for scoring alone.

        Returns:
            By parameter name, of all parameters that travel.
        """
        total = self._steps(x, y, lr, batch or len(x), inputs)
        if not METHODS[self.target.options["method"]].protects:
            return total
        server = self.target.server(self.round)
        self.uploads += 1
        sent = {name: value.double() for name, value in self.sent_next.items()}
        upload = {name: value - lr * total[name] for name, value in sent.items()}
        arrived = server.receive(Round(self.round + self.uploads, sent, {self.client: upload}, {}))[self.client]
        return gradients.of_upload(sent, arrived, lr, clipped=isinstance(server, NbAFL))

    def _steps(self, x: Tensor, y: Tensor, lr: float, batch: int, inputs: list[Tensor] | None) -> State:
        """The sum of the gradients of a client's steps, of what travels; arguments as of ``update``."""
        target, network = self.target, self._network(self.sent_next)
        network.training = True   # for the priors' replay; the layers themselves stay without dropout
        noted: list[Tensor] = []   # what the head is given in a step: first its input, then the replay
        network.classifier.register_forward_pre_hook(lambda _, given: noted.append(given[0].detach()))
        trainer = Trainer(network, METHODS[target.options["method"]], torch.empty(0), torch.empty(0),
                          target.data.num_classes, Training.from_options(target.options, torch.float32))
        travels = {name: value for name, value in network.named_parameters() if name in self.sent_next}
        total = {name: torch.zeros_like(value) for name, value in travels.items()}
        for part, labels in zip(x.split(batch), y.split(batch), strict=True):
            objective, _ = trainer.objective(part, network(part, labels), labels, self.round + 1, self.sent_next)
            if inputs is not None:
                inputs.append(noted[0])
            noted.clear()
            slopes = torch.autograd.grad(objective.mean(), list(travels.values()), allow_unused=True,
                                         materialize_grads=True)
            with torch.no_grad():
                for (name, value), slope in zip(travels.items(), slopes, strict=True):
                    total[name] += slope
                    value.sub_(lr * slope)
        return total

    @torch.no_grad()
    def answers(self, x: Tensor, draws: int, keep: int) -> Tensor:
        """The prediction service: images ``N x C x H x W`` -> probabilities ``N x num_classes``.

        Args:
            draws: of z, over which the probabilities are averaged.
            keep: how many of the largest it tells; the others are 0.
        """
        scores = self._holdings(self.own).logits(x, draws).exp()
        smallest = scores.topk(min(keep, scores.shape[1])).values[:, -1:]
        return torch.where(scores >= smallest, scores, torch.zeros_like(scores))
