"""Reference models: networks trained as a run's clients train, on public images (LiRA's shadow models).

Carlini et al. 2022 (arXiv 2112.03570) compare a victim with models that differ from it in the training images
only. So a reference has the run's method, start, optimiser, learning rates, KL weight and warm-up, augmentation,
batches and epochs, and trains by the same code. It is a client alone: averaging and the server's noise are not
repeated.
"""
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from attack.access import Target
from methods import METHODS
from models import Network
from sampling import sample_clients
from update import ClientState, Diverged, Trainer, Training
from utils import InputError, choose_precision, rng


@dataclass(frozen=True)
class Alone:
    """A client that trains by itself: in every round it starts from what it trained before.

    Args:
        round: the last round in which it may train.
        client: whose rounds it trains in.
        epochs: local epochs over all rounds, which fill rounds from the first on; None for those of the client.
        seed: of all draws: batches, dropout, augmentation, z, and the classes of the prior replay.
    """

    round: int
    client: int
    epochs: int | None
    seed: int

    def schedule(self, target: Target) -> list[tuple[int, int]]:
        """Return the rounds in which to train, and the local epochs in each.

        They are the rounds in which the client was asked to train. Where it keeps nothing to itself, its model is
        trained in every round by somebody, and so is this one.
        """
        options, names, each = target.options, target.network().state_dict(), target.options["local_ep"]
        if self.epochs:
            return [(done // each + 1, min(each, self.epochs - done)) for done in range(0, self.epochs, each)]

        def trains(number: int) -> bool:
            row, draw = target.row(number), rng(options["seed"], "sample", round=number)
            asked = sample_clients(options["num_users"], options["frac"], draw, row.poisson)
            return self.client in asked or not row.shared_and_private(names)[1]
        return [(number, each) for number in range(1, self.round + 1) if trains(number)]

    def train(self, target: Target, images: Tensor, labels: Tensor) -> Network:
        """Train from the seeded start on images ``N x C x H x W``, which have 256 levels, and labels ``N``.

        Raises:
            InputError: the loss is not finite, or ``config.json`` lacks an option.
        """
        pixels = (images * 255).round().byte().permute(0, 2, 3, 1).contiguous()   # as clients store them
        network = target.start(0).to(memory_format=torch.channels_last)   # of round 0: before the warm rounds
        try:
            precision = choose_precision(target.options["precision"], torch.device("cpu"))
            trainer = Trainer(network, METHODS[target.options["method"]], pixels, labels, target.data.num_classes,
                              Training.from_options(target.options, precision, seed=self.seed))
            shared, stays = trainer.shared_and_private(trainer.state())
            private = ClientState(stays)
            for number, epochs in self.schedule(target):
                now = replace(trainer, training=replace(trainer.training, epochs=epochs))
                shared, private, _ = now.train(self.client, number, np.arange(len(labels)), shared, private)
        except KeyError as error:
            raise InputError(f"{target.results / 'config.json'}: it has no --{error.args[0]}") from error
        except Diverged as error:
            raise InputError(f"a reference model diverged ({error}); try another --train_epochs") from error
        network.load_state_dict({**shared, **private.parameters})
        return network.eval().requires_grad_(False)
