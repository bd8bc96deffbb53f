"""A run under attack: its options, data and checkpoints.

Round 0 is the start. It has no files: its weights are drawn from the run's seed, and every adversary knows them.
With ``--private_init`` it knows only how a client's encoder is drawn, and guesses one with a seed of its own.
"""
import copy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import datasets
from devices import drawn_from
from methods import METHODS, Method, make_server
from models import Network
from runs import configs
from runs.checkpoints import checked_state, load_checked, read_client, read_shared, same_memory
from server.base import Server, State
from update import ClientState
from utils import InputError, fingerprint, participants


def as_floats(images: np.ndarray) -> Tensor:
    """Convert uint8 ``N x H x W x C`` to ``N x C x H x W`` in [0, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float().div_(255).contiguous()


@dataclass(frozen=True)
class Target:
    """A run under attack."""

    results: Path
    models: Path
    options: dict
    data: datasets.Dataset
    start_digest: str = ""   # the fingerprint of its first weights, if known
    seed: int = 1            # of the adversaries, for their guess of a client's own start

    @property
    def method(self) -> Method:
        """The run's row of METHODS."""
        return METHODS[self.options["method"]]

    @property
    def clients(self) -> int:
        """The number of clients that take part in the rounds; new clients have higher numbers."""
        return participants(self.options)

    @property
    def has_encoder(self) -> bool:
        """True if an encoder stands before the head, so that the head's input is a latent z."""
        return self.method.network.has_encoder

    def pixels(self, numbers: np.ndarray | Tensor) -> Tensor:
        """Return the images of these numbers, ``N x C x H x W`` in [0, 1]."""
        return as_floats(self.data.images[np.asarray(numbers)])

    def labels(self, numbers: np.ndarray | Tensor) -> Tensor:
        """Return the labels of these numbers, ``N``."""
        return torch.from_numpy(self.data.labels[np.asarray(numbers)])

    @cached_property
    def _untrained(self) -> Network:
        """The method's network with the weights that the run's seed gives."""
        with drawn_from(self.options["seed"], "init"):
            return self.method.build(self.data.image_shape, self.data.num_classes, self.options).eval()

    @property
    def seeded(self) -> State:
        """The weights that the run's seed gives. They are no secret."""
        return self._untrained.state_dict()

    def network(self) -> Network:
        """Return a copy of the method's network with the weights that the run's seed gives."""
        return copy.deepcopy(self._untrained)   # faster by far than to draw 20 million weights

    @property
    def uploaded(self) -> State:
        """The parameters that the method's clients upload, of an untrained network."""
        return self.method.shared_and_private(self.seeded)[0]

    def rounds(self) -> list[int]:
        """Return the rounds that have a checkpoint, in order."""
        names = (path.name.removeprefix("round_") for path in self.models.glob("round_*"))
        return sorted(int(name) for name in names if name.isdecimal())

    def latest_round(self) -> int:
        """Return the latest round that has a checkpoint; InputError if none has."""
        if not (rounds := self.rounds()):
            raise InputError(f"--run {self.models.name}: {self.models} holds no checkpoint; go on with the run "
                             "(--resume), or train it again (--overwrite)")
        return rounds[-1]

    def require(self, round: int) -> None:
        """Raise InputError if a round has no checkpoint, or if the start (round 0) cannot be drawn again."""
        if round:
            self.file(round, "shared.pt")
        elif source := self.options.get("encoders_from"):
            raise InputError(f"--rounds 0: this run's clients began with the encoders of run {source}, which no "
                             "seed gives; attack a later round")
        elif fingerprint(self.seeded) != self.start_digest:
            raise InputError(f"--rounds 0: by {self.results / 'config.json'} the run began with other weights "
                             "than its seed gives here; use the PyTorch and the program that trained it")

    def own_start(self, client: int, **changes: int) -> State:
        """Return the parameters that a client alone began with, by the run's options with ``changes``."""
        return self.method.own_start(self.data.image_shape, self.data.num_classes, {**self.options, **changes},
                                     client)

    def file(self, round: int, name: str) -> Path:
        """Return the path of a checkpoint's file; InputError if the round has no checkpoint."""
        folder = self.models / f"round_{round}"
        if not folder.is_dir():
            kept = ", ".join(map(str, self.rounds())) or "none"
            raise InputError(f"--rounds {round}: no checkpoint {folder} (rounds with one: {kept}); train "
                             f"with --save_rounds {round}")
        return folder / name

    def shared(self, round: int) -> dict:
        """Read ``shared.pt``: ``sent``, the head that clients started from, and what arrived (checkpoints.py)."""
        if not round:
            return {"sent": self.sent_next(0), "clients": [], "uploads": {}, "sum": {}}
        shared, _ = self._layout(round)
        return read_shared(self.file(round, "shared.pt"), shared, self.options["num_users"])

    def _layout(self, round: int) -> tuple[State, State]:
        """Return parameters of the shapes of those that are shared, and of those that stay, in a round."""
        return self.row(round).shared_and_private(self.seeded)

    def row(self, round: int) -> Method:
        """Return the row of METHODS that holds in a round; for the start, that of the first round."""
        return self.method.in_round(max(round, 1), self.options)

    def start(self, round: int) -> Network:
        """Return the network that all private parameters began with, as adversaries know it.

        It was sent to all. The guess of a client's own start is that of one more client, by another seed.
        """
        network = self.network()
        network.load_state_dict({**self.seeded, **self.own_start(self.options["num_users"], seed=self.seed)})
        if 0 < (self.options.get("full_sharing_rounds") or 0) < round:
            path = self.file(round, "server.pt")
            _, private = self.row(round).shared_and_private(network.state_dict())
            left = checked_state(load_checked(path).get("private_start"), private, path)
            network.load_state_dict(left, strict=False)
        return network

    def sent_next(self, round: int) -> State:
        """Return the head aggregated at the end of a round, which is sent at the start of the next."""
        if not round:
            return self._layout(0)[0]
        path = self.file(round, "server.pt")
        return checked_state(load_checked(path).get("head"), self._layout(round)[0], path)

    @cached_property
    def first_server(self) -> Server:
        """The run's server as it was before the first round."""
        return make_server(self.options, min(map(len, self.owned()[0][:self.clients])))

    def server(self, round: int) -> Server:
        """Return the run's server after a round; NbAFL's clip, found in round 1, it has at the start, too."""
        server, start = copy.copy(self.first_server), self.first_server.memory
        server.memory = {**self._memory(self.latest_round()), **(self._memory(round) if round else start)}
        return server

    def _memory(self, round: int) -> dict:
        path = self.file(round, "server.pt")
        memory = load_checked(path).get("memory")
        if not (isinstance(memory, dict) and same_memory(memory, self.first_server.memory)):
            raise InputError(f"checkpoint {path} is not of this run; start again with --overwrite")
        return memory

    def private(self, round: int, client: int) -> ClientState:
        """Read ``client_<k>.pt``: the state that never left the client."""
        shared, private = self._layout(round)
        if not round:
            return ClientState({**private, **self.own_start(client)})
        return read_client(self.file(round, f"client_{client}.pt"), private, shared)

    def own_head(self, round: int, client: int, private: ClientState) -> State:
        """Return the head that the client trained, before clip and noise; if it did not train, the aggregated."""
        shared = self.shared(round)
        if client not in shared["clients"]:
            return self.sent_next(round)
        return private.trained_shared or shared["uploads"][client]

    @property
    def secure(self) -> bool:
        """True if the server sees the sum of several clients' uploads only."""
        return self.options["secure_aggregation"]

    @property
    def clients_observed(self) -> int:
        """The number of clients whose uploads the server sees as one: 1, or all of a round with a sum."""
        return max(1, round(self.options["frac"] * self.clients)) if self.secure else 1

    def owned(self) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Return the numbers of each client's training and test images in the data set, for scoring alone."""
        path = self.results / "partition.npz"
        try:
            with np.load(path, allow_pickle=False) as file:
                train, test = ([file[f"{half}_{k}"] for k in range(self.options["num_users"])]
                               for half in ("train", "test"))
        except KeyError as error:
            raise InputError(f"{path}: no fixed training and test images; runs with --resplit or --validate "
                             "cannot be attacked") from error
        except Exception as error:
            raise InputError(f"{path} is missing or damaged; train the run again") from error
        if not all(part.ndim == 1 and part.dtype.kind == "i" and len(part) and part.min() >= 0
                   and part.max() < len(self.data.labels) for part in (*train, *test)):
            raise InputError(f"{path} does not number images of --dataset {self.options['dataset']}; it is "
                             "damaged, or the data set has changed since the run")
        return train, test


def open_target(name: str, results_dir: Path, models_dir: Path, data_dir: Path, *, seed: int = 1) -> Target:
    """Read a run's ``config.json`` and its data set; InputError if there is none, or it is damaged.

    Args:
        seed: of the adversaries.
    """
    config = configs.read(configs.path_of(name, results_dir),
                          "dataset", "method", "num_users", "init_logvar", "seed", "frac", "secure_aggregation")
    options = config["options"]
    data = datasets.load(options["dataset"], data_dir)
    return Target(results_dir / name, models_dir / name, options, data, str(config.get("start", "")), seed)
