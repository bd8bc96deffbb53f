"""An adversary: what it holds, what it may train on and spend, and what it trains once for all its attacks."""
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from attack import classes, learnt
from attack.access import Knowledge, posterior_in_parts
from models import FlattenHWC

flatten = FlattenHWC()


@dataclass(frozen=True)
class Budget:
    """What every adversary may spend, whatever the method."""

    restarts: int     # of each search
    iterations: int   # of each search
    epochs: int       # of training on public images
    draws: int        # of z, averaged in an answer of the model
    lr: float         # the client's learning rate, in a simulated local epoch
    top_scores: int   # class scores that the prediction service tells


@dataclass(frozen=True)
class PublicImages:
    """Images that every adversary may train on.

    Attributes:
        images, labels: ``N x C x H x W`` in [0, 1], and ``N``.
        of_classes: labels -> public images of these classes only, and their labels; None if the public images
            show other classes than the victim's.
    """

    images: Tensor
    labels: Tensor
    of_classes: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None


class Adversary:
    """One adversary of one client in one round. What it trains, it trains once and uses in all its attacks.

    Args:
        start: the network with the weights that all clients start from.
        kl_weight: of the KL term in a client's loss.
        seed: seeds PyTorch for what several attacks use, by its name.
    """

    def __init__(self, knowledge: Knowledge, start: nn.Module, public: PublicImages, kl_weight: float,
                 budget: Budget, seed: Callable[[str], None] = lambda name: None) -> None:
        self.knowledge, self.start, self.public = knowledge, start, public
        self.kl_weight, self.budget, self.seed = kl_weight, budget, seed
        self.decoders: dict[tuple[int, ...], learnt.Decode] = {}   # by the classes they were trained on

    @contextmanager
    def shared(self, name: str) -> Iterator[None]:
        """Draw by a seed of its own: which attack came first then changes neither it nor that attack."""
        with torch.random.fork_rng(devices=[]):
            self.seed(name)
            yield

    @cached_property
    def whole_model(self) -> Knowledge:
        """A model from images to logits: the real one, or the real head behind a shadow encoder."""
        if not self.knowledge.has_encoder or self.knowledge.encoder is not None:
            return self.knowledge
        with self.shared("shadow"):
            return learnt.shadow_encoder(self.knowledge, self.start, self.public.images, self.public.labels,
                                         self.budget.epochs, self.kl_weight)

    def posterior(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """``Knowledge.posterior`` of many images, by the victim's encoder or by the shadow encoder."""
        return posterior_in_parts(self.whole_model, images)

    def public_of(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Public images of these labels' classes if possible, else all: ``M x C x H x W``, and their labels."""
        choose = self.public.of_classes
        return (self.public.images, self.public.labels) if choose is None else choose(labels.unique())

    def train_decoder(self, learn: Callable[..., learnt.Decode], labels: Tensor) -> learnt.Decode:
        """A decoder from latents to images, trained on public images, of these labels' classes if possible.

        Args:
            learn: ``learnt.decoder`` or another function with its arguments.
        """
        images, _ = self.public_of(labels)
        return learn(*self.posterior(images), images, self.budget.epochs)

    @cached_property
    def generator(self) -> learnt.Generator:
        """A generator of images that look like the public ones."""
        with self.shared("generator"):
            return learnt.generator(self.public.images, self.budget.epochs)

    def score(self, draws: int) -> classes.Score:
        """A function from images to log-probabilities, averaged over draws of z."""
        return lambda x: self.whole_model.logits(x, draws)

    def decode_inputs(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """Recovered inputs of the head, ``R x N x C x H x W``, and labels ``N`` -> images of the same shape.

        Behind an encoder the inputs are inexact latents, so ``learnt.decoder`` decodes them.
        """
        if not self.knowledge.has_encoder:
            return inputs.clamp(0, 1)
        key = tuple(labels.unique().tolist())
        if key not in self.decoders:
            with self.shared(f"decoder of {key}"):
                self.decoders[key] = self.train_decoder(learnt.decoder, labels)
        return torch.stack([self.decoders[key](flatten(one)) for one in inputs])

    def tv_weight(self, weight: float) -> float:
        """The weight of total variation in gradient inversion; 0 for latents, which are not smooth."""
        return 0.0 if self.knowledge.has_encoder else weight

    def random_inputs(self, *shape: int) -> Tensor:
        """Random inputs of the head where the restarts of a search start, ``R x shape``."""
        noise = torch.randn(self.budget.restarts, *shape)
        return noise if self.knowledge.has_encoder else (0.5 + 0.2 * noise).clamp(0, 1)

    def random_images(self, count: int) -> Tensor:
        """Noisy copies of the mean public image where the restarts start, ``R x count x C x H x W``."""
        mean = self.public.images.mean(0)
        return (mean + 0.1 * torch.randn(self.budget.restarts, count, *mean.shape)).clamp(0, 1)
