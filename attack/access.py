"""What an adversary holds of a run: read from that adversary's files, and from no others.

| adversary        | files                      | holds                                          |
| curious_server   | shared.pt, server.pt       | the heads it received, sent and sends next     |
| stolen_model     | shared.pt, client_<k>.pt   | the victim's encoder and its own head          |
| prediction_api   | shared.pt, client_<k>.pt   | answers of that model, never the model         |
| curious_client   | shared.pt, client_<own>.pt | its own encoder, and the heads it is sent      |

A client that did not train in the round has the head just aggregated, of server.pt; a malicious one counts
as what it uploaded. A gradient, a latent or an answer of a chosen image is handed over by ``Victim``, which
plays the client and so reads ``client_<k>.pt``; what it computes with stays there.

The gradient that is observed at a checkpoint is that of the step that follows it: on the head just
aggregated, which the server sends next, behind the encoder just stored. The server knows that head, and
matches the gradient on these very weights.
"""
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import datasets
from methods import METHODS
from models import as_image, kl_to_standard_normal, reparameterise
from runs import configs
from runs.checkpoint import load_checked, read_private, read_shared, same_layout
from server.mean import is_finite
from update import Private, State
from utils import InputError

ADVERSARIES = ("curious_server", "stolen_model", "prediction_api", "curious_client")


@dataclass(frozen=True)
class Target:
    """A finished or interrupted run: its description, and the untrained network."""

    results: Path
    models: Path
    options: dict
    data: datasets.Dataset

    @property
    def has_encoder(self) -> bool:
        """Whether the method has an encoder before the head."""
        return hasattr(self.network(), "encoder")

    def network(self) -> nn.Module:
        """The method's network, weights not yet those of anybody."""
        return METHODS[self.options["method"]].build(
            self.data.image_shape, self.data.num_classes, self.options["init_logvar"]).eval()

    def rounds(self) -> list[int]:
        """Rounds whose checkpoints are there."""
        names = (p.name.removeprefix("round_") for p in self.models.glob("round_*"))
        return sorted(int(name) for name in names if name.isdecimal())

    def file(self, round: int, name: str) -> Path:
        """A checkpoint's file, or InputError."""
        folder = self.models / f"round_{round}"
        if not folder.is_dir():
            kept = ", ".join(map(str, self.rounds())) or "none"
            raise InputError(f"--rounds {round}: no checkpoint {folder} (there: {kept}); train with "
                             f"--save_rounds {round}")
        return folder / name

    def shared(self, round: int) -> dict:
        """``shared.pt``: ``sent`` and ``uploads``."""
        travels = METHODS[self.options["method"]].split(self.network().state_dict())[0]
        return read_shared(self.file(round, "shared.pt"), travels, self.options["num_users"])

    def sent_next(self, round: int) -> State:
        """``server.pt``: the head aggregated at the end of the round, which the next one starts from."""
        found = load_checked(self.file(round, "server.pt")).get("head")
        travels = METHODS[self.options["method"]].split(self.network().state_dict())[0]
        if not same_layout(found, travels) or not is_finite(found):
            raise InputError(f"checkpoint {self.models}/round_{round}/server.pt is not of this run's method")
        return found

    def private(self, round: int, client: int) -> Private:
        """``client_<k>.pt``: what stayed with the client."""
        travels, stays = METHODS[self.options["method"]].split(self.network().state_dict())
        return read_private(self.file(round, f"client_{client}.pt"), stays, travels)

    def own_head(self, round: int, client: int, private: Private) -> State:
        """The shared part of the client's own model: what it trained in the round, before anything was done
        to protect it on its way to the server; the head just aggregated if it did not train."""
        uploads, hidden = self.shared(round)["uploads"], METHODS[self.options["method"]].server.protects
        if client in uploads and private.own:
            return private.own
        if client in uploads and not hidden:
            return uploads[client]
        return self.sent_next(round)   # also of a protected run from before ``own`` was stored

    def owned(self) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Each client's training and test indices. For scoring: no adversary has them."""
        path = self.results / "partition.npz"
        try:
            with np.load(path, allow_pickle=False) as file:
                halves = [[file[f"{half}_{k}"] for k in range(self.options["num_users"])]
                          for half in ("train", "test")]
        except KeyError as error:
            raise InputError(f"{path}: no fixed training and test images; runs with --resplit or --validate "
                             "are not attacked") from error
        except Exception as error:
            raise InputError(f"{path} is missing or damaged") from error
        if not all(part.ndim == 1 and part.dtype.kind == "i" and len(part) and part.min() >= 0
                   and part.max() < len(self.data.labels) for half in halves for part in half):
            raise InputError(f"{path} does not number images of --dataset {self.options['dataset']}; it is "
                             "damaged, or the data set is another than then")
        return halves[0], halves[1]


def open_target(name: str, results_dir: Path, models_dir: Path, data_dir: Path) -> Target:
    """Read ``config.json`` and the run's data set.

    Raises:
        InputError: there is no such run, or it is damaged.
    """
    path = results_dir / name / "config.json"
    if not path.exists():
        there = sorted(p.parent.name for p in results_dir.glob("*/config.json"))
        raise InputError(f"--run {name}: no {path}; there: {', '.join(there) or 'no runs'}")
    options = configs.read(path, "dataset", "method", "num_users", "init_logvar", "seed")["options"]
    return Target(results_dir / name, models_dir / name, options, datasets.load(options["dataset"], data_dir))


@dataclass(frozen=True)
class Holdings:
    """What an adversary has of one client in one round; None is what it has not.

    Attributes:
        head: from an image, or with a split method from z as an image, to logits; None where a part of it
            stays with the clients.
        stepped: the curious server's, the head that it sends next, on which it observes a gradient.
        encoder: image to z, or to its mu and log variance: the victim's or, a curious client's, its own.
        split: whether the head's input is z.
    """

    head: nn.Module | None
    encoder: nn.Module | None
    has_encoder: bool
    image_shape: tuple[int, int, int]
    stepped: nn.Module | None = None

    def __post_init__(self):
        """Channels last: an attack is a batch of problems, and pools it in a fifteenth of the time."""
        for part in filter(None, (self.head, self.encoder, self.stepped)):
            part.to(memory_format=torch.channels_last)

    def posterior(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """``N x C x H x W`` -> mu ``N x CHW`` and the log variance, None of a deterministic encoder."""
        found = self.encoder(x)
        return found if isinstance(found, tuple) else (found, None)

    def sample(self, x: Tensor) -> Tensor:
        """One draw of z, ``N x CHW``."""
        mu, logvar = self.posterior(x)
        return mu if logvar is None else reparameterise(mu, logvar)

    def logits(self, x: Tensor, draws: int = 0) -> Tensor:
        """``N x C x H x W`` -> log-probabilities ``N x num_classes``: through mu, or, with ``draws``, the log
        of the probabilities' mean over that many draws of z."""
        if not self.has_encoder:
            return self.head(x).log_softmax(1)
        mu, logvar = self.posterior(x)
        if not draws or logvar is None:
            return self.head(as_image(mu, self.image_shape)).log_softmax(1)
        z = reparameterise(mu.expand(draws, *mu.shape), logvar.expand(draws, *mu.shape))
        each = self.head(as_image(z, self.image_shape)).log_softmax(1)
        return each.unflatten(0, (draws, -1)).logsumexp(0) - float(np.log(draws))


def hold(target: Target, adversary: str, round: int, client: int, own: int = 0) -> Holdings:
    """What the adversary has of ``client`` at ``round``; ``own`` is a curious client's own number."""
    shared, network = target.shared(round), target.network()
    if adversary == "curious_server" and not shared["sent"]:
        raise InputError(f"--adversary curious_server: --method {target.options['method']} sends it nothing")
    if adversary == "curious_server":
        parameters = shared["uploads"].get(client, shared["sent"])
    elif adversary == "curious_client":   # it is never shown another's upload
        parameters = {**shared["sent"], **target.private(round, own).parameters}
    else:
        private = target.private(round, client)
        parameters = {**target.own_head(round, client, private), **private.parameters}
    whole = all(name in parameters for name in network.state_dict() if name.startswith("classifier."))
    network.load_state_dict(parameters, strict=False)
    network.requires_grad_(False)
    stepped = None
    if adversary == "curious_server" and whole:
        stepped = target.network().requires_grad_(False)
        stepped.load_state_dict(target.sent_next(round), strict=False)
        stepped = stepped.classifier
    has_encoder = target.has_encoder and adversary != "curious_server"
    return Holdings(network.classifier if whole else None, network.encoder if has_encoder else None,
                    target.has_encoder, target.data.image_shape, stepped)


class Victim:
    """One client, playing what it does in a round on images of its own: what leaves it is observed."""

    def __init__(self, target: Target, round: int, client: int):
        self.target, self.sent_next = target, target.sent_next(round)
        private = target.private(round, client)
        self.private, self.own = private.parameters, target.own_head(round, client, private)

    def _holdings(self, shared: State) -> Holdings:
        network = self.target.network()
        network.load_state_dict({**shared, **self.private})
        return Holdings(network.classifier, getattr(network, "encoder", None), self.target.has_encoder,
                        self.target.data.image_shape)

    @torch.no_grad()
    def head_input(self, x: Tensor) -> Tensor:
        """What the head sees of images: the images, or a draw of z as images."""
        holdings = self._holdings(self.own)
        return as_image(holdings.sample(x), holdings.image_shape) if self.target.has_encoder else x

    @torch.no_grad()
    def noise(self, x: Tensor) -> dict[str, float] | None:
        """What the noise on z leaves of images, means over them: ``kl_nats``, at most what a draw of z can
        tell of one; ``sigma``; ``snr_db``, the variance of mu over images against that of the noise. None
        without noise."""
        if not self.target.has_encoder:
            return None
        holdings = self._holdings(self.own)
        mu, logvar = zip(*(holdings.posterior(part) for part in x.split(256)), strict=True)
        if logvar[0] is None:
            return None
        mu, logvar = torch.cat(mu), torch.cat(logvar)
        return {"kl_nats": kl_to_standard_normal(mu, logvar).mean().item(),
                "sigma": (0.5 * logvar).exp().mean().item(),
                "snr_db": 10 * (mu.var(0).sum() / logvar.exp().mean(0).sum()).log10().item()}

    def update(self, x: Tensor, y: Tensor, change: Callable[[nn.Module, Tensor, Tensor], State]) -> State:
        """What the next round's first step, or epoch, lets the server see; without dropout, the adversary's
        best case."""
        return change(self._holdings(self.sent_next).head, self.head_input(x), y)

    @torch.no_grad()
    def answers(self, x: Tensor, draws: int, keep: int) -> Tensor:
        """The service's probabilities, ``N x num_classes``, but for the ``keep`` largest set to 0."""
        scores = self._holdings(self.own).logits(x, draws).exp()
        smallest = scores.topk(min(keep, scores.shape[1])).values[:, -1:]
        return torch.where(scores >= smallest, scores, torch.zeros_like(scores))
