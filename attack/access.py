"""What an adversary holds of a run: read from that adversary's files, and from no others.

| adversary        | files                      | holds                                          |
| curious_server   | shared.pt                  | heads sent and uploaded                        |
| stolen_model     | shared.pt, client_<k>.pt   | the victim's encoder and its own head          |
| prediction_api   | shared.pt, client_<k>.pt   | answers of that model, never the model         |
| curious_client   | shared.pt, client_<own>.pt | its own encoder, and the heads it is sent      |

A gradient, a latent or an answer of a chosen image is handed over by ``Victim``, which plays the client and
so reads ``client_<k>.pt``; what it computes with stays there.
"""
import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import configs
import datasets
from checkpoint import read_private, read_shared
from methods import METHODS
from models import as_image, kl_to_standard_normal, reparameterise
from update import State
from utils import InputError

ADVERSARIES = ("curious_server", "stolen_model", "prediction_api", "curious_client")


@dataclass(frozen=True)
class Run:
    """A finished or interrupted run: its description, and the untrained network."""

    results: Path
    models: Path
    options: dict
    data: datasets.Dataset

    @property
    def split(self) -> bool:
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

    def private(self, round: int, client: int) -> State:
        """``client_<k>.pt``: what stayed with the client."""
        stays = METHODS[self.options["method"]].split(self.network().state_dict())[1]
        return read_private(self.file(round, f"client_{client}.pt"), stays).parameters

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


def open_run(name: str, results_dir: Path, models_dir: Path, data_dir: Path) -> Run:
    """Read ``config.json`` and the run's data set.

    Raises:
        InputError: there is no such run, or it is damaged.
    """
    path = results_dir / name / "config.json"
    if not path.exists():
        there = sorted(p.parent.name for p in results_dir.glob("*/config.json"))
        raise InputError(f"--run {name}: no {path}; there: {', '.join(there) or 'no runs'}")
    options = configs.read(path, "dataset", "method", "num_users", "init_logvar", "seed")["options"]
    return Run(results_dir / name, models_dir / name, options, datasets.load(options["dataset"], data_dir))


@dataclass(frozen=True)
class Holdings:
    """What an adversary has of one client in one round; None is what it has not.

    Attributes:
        head: from an image, or with a split method from z as an image, to logits; None where a part of it
            stays with the clients.
        encoder: image to z, or to its mu and log variance: the victim's or, a curious client's, its own.
        split: whether the head's input is z.
    """

    head: nn.Module | None
    encoder: nn.Module | None
    split: bool
    image_shape: tuple[int, int, int]

    def __post_init__(self):
        """Channels last: an attack is a batch of problems, and pools it in a fifteenth of the time."""
        for part in filter(None, (self.head, self.encoder)):
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
        if not self.split:
            return self.head(x).log_softmax(1)
        mu, logvar = self.posterior(x)
        if not draws or logvar is None:
            return self.head(as_image(mu, self.image_shape)).log_softmax(1)
        z = reparameterise(mu.expand(draws, *mu.shape), logvar.expand(draws, *mu.shape))
        each = self.head(as_image(z, self.image_shape)).log_softmax(1)
        return each.unflatten(0, (draws, -1)).logsumexp(0) - float(np.log(draws))


def hold(run: Run, adversary: str, round: int, client: int, own: int = 0) -> Holdings:
    """What the adversary has of ``client`` at ``round``; ``own`` is a curious client's own number."""
    shared, network = run.shared(round), run.network()
    if adversary == "curious_server" and not shared["sent"]:
        raise InputError(f"--adversary curious_server: --method {run.options['method']} sends it nothing")
    parameters = dict(shared["uploads"].get(client, shared["sent"]))
    if adversary == "curious_client":   # it is never shown another's upload
        parameters = dict(shared["sent"])
    if adversary != "curious_server":
        parameters |= run.private(round, own if adversary == "curious_client" else client)
    whole = all(name in parameters for name in network.state_dict() if name.startswith("classifier."))
    network.load_state_dict(parameters, strict=False)
    for parameter in network.parameters():
        parameter.requires_grad_(False)
    has_encoder = run.split and adversary != "curious_server"
    return Holdings(network.classifier if whole else None, network.encoder if has_encoder else None,
                    run.split, run.data.image_shape)


class Victim:
    """One client, playing what it does in a round on images of its own: what leaves it is observed."""

    def __init__(self, run: Run, round: int, client: int):
        self.run = run
        self.shared, self.private = run.shared(round), run.private(round, client)
        self.upload = self.shared["uploads"].get(client, self.shared["sent"])

    def _holdings(self, shared: State) -> Holdings:
        network = self.run.network()
        network.load_state_dict({**shared, **self.private})
        return Holdings(network.classifier, getattr(network, "encoder", None), self.run.split,
                        self.run.data.image_shape)

    @torch.no_grad()
    def head_input(self, x: Tensor) -> Tensor:
        """What the head sees of images: the images, or a draw of z as images."""
        holdings = self._holdings(self.upload)
        return as_image(holdings.sample(x), holdings.image_shape) if self.run.split else x

    @torch.no_grad()
    def noise(self, x: Tensor) -> dict[str, float] | None:
        """What the noise on z leaves of images, means over them: ``kl_nats``, at most what a draw of z can
        tell of one; ``sigma``; ``snr_db``, the variance of mu over images against that of the noise. None
        without noise."""
        if not self.run.split:
            return None
        holdings = self._holdings(self.upload)
        mu, logvar = zip(*(holdings.posterior(part) for part in x.split(256)), strict=True)
        if logvar[0] is None:
            return None
        mu, logvar = torch.cat(mu), torch.cat(logvar)
        return {"kl_nats": kl_to_standard_normal(mu, logvar).mean().item(),
                "sigma": (0.5 * logvar).exp().mean().item(),
                "snr_db": 10 * (mu.var(0).sum() / logvar.exp().mean(0).sum()).log10().item()}

    def update(self, x: Tensor, y: Tensor, change: Callable[[nn.Module, Tensor, Tensor], State]) -> State:
        """What a step, or an epoch, on the head that the server sent lets the server see.

        Dropout is off and the weights are the round's first: the adversary's best case.
        """
        head = copy.deepcopy(self._holdings(self.shared["sent"]).head).eval()
        return change(head, self.head_input(x), y)

    @torch.no_grad()
    def answers(self, x: Tensor, draws: int, keep: int) -> Tensor:
        """The service's probabilities, ``N x num_classes``, but for the ``keep`` largest set to 0."""
        scores = self._holdings(self.upload).logits(x, draws).exp()
        smallest = scores.topk(min(keep, scores.shape[1])).values[:, -1:]
        return torch.where(scores >= smallest, scores, torch.zeros_like(scores))
