"""Models that an adversary trains on public images alone: decoders of latents or scores, and a generator."""
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from models import kl_to_standard_normal, reparameterise

BATCH = 128
Decode = Callable[[Tensor], Tensor]   # codes M x D -> images M x C x H x W


def fit(parameters: list[Tensor], loss: Callable[[Tensor], Tensor], count: int, epochs: int, batch: int = BATCH,
        least: int = 0) -> None:
    """Minimise a loss of indices over ``count`` examples by Adam, in at least ``least`` steps."""
    optimizer = torch.optim.Adam(parameters, 1e-3)
    epochs = max(epochs, -(-least // -(-count // batch)))
    total = epochs * -(-count // batch)
    warm = 0.1 if total != 10 else 0.11   # with 10 steps, 0.1 would make OneCycleLR divide by zero
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, max(2, total), pct_start=warm)
    for _ in range(epochs):
        for part in torch.randperm(count).split(batch):
            optimizer.zero_grad()
            loss(part).backward()
            optimizer.step()
            schedule.step()


def draw(mean: Tensor, logvar: Tensor | None) -> Tensor:
    """Draw codes of a normal distribution; without a log variance, return the mean."""
    return mean if logvar is None else reparameterise(mean, logvar)


def standardised(code: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean and the deviation, above 0, of each value of codes ``N x D``."""
    return code.mean(0), code.std(0) + 1e-3 * code.std() + 1e-12


class Decoder(nn.Module):
    """Codes ``N x D`` -> images in [0, 1], by two hidden layers and, since encoders end linearly, a linear map."""

    def __init__(self, size: int, image_shape: Sequence[int], width: int = 1024) -> None:
        super().__init__()
        pixels = math.prod(image_shape)
        self.layers = nn.Sequential(nn.Linear(size, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(),
                                    nn.Linear(width, pixels))
        self.linear = nn.Linear(size, pixels)
        self.image_shape = image_shape

    def forward(self, code: Tensor) -> Tensor:
        return (self.layers(code) + self.linear(code)).sigmoid().unflatten(1, self.image_shape)


def decoder(mean: Tensor, logvar: Tensor | None, images: Tensor, epochs: int) -> Decode:
    """Train a ``Decoder`` from codes ``N x D``, with noise of a log variance drawn anew every epoch."""
    def drawn(part: Tensor) -> Tensor:
        return draw(mean[part], None if logvar is None else logvar[part])
    network = Decoder(mean.shape[1], images.shape[1:])
    centre, spread = standardised(drawn(torch.arange(len(mean))))
    fit(list(network.parameters()), lambda part: (
        network((drawn(part) - centre) / spread) - images[part]).square().mean(), len(images), epochs)
    network.eval().requires_grad_(False)
    return lambda code: network((code - centre) / spread)


def ridge(code: Tensor, images: Tensor, weights: tuple[float, ...]) -> list[Decode]:
    """Fit ridge regressions from codes ``N x D`` to images, one for each weight (Hoerl and Kennard 1970)."""
    (centre, spread), mean = standardised(code), images.mean(0)
    standard, size = (code - centre) / spread, len(code)
    square = (standard.T @ standard / size).double()
    cross = (standard.T @ (images - mean).flatten(1) / size).double()

    def solved(weight: float) -> Decode:
        matrix = torch.linalg.solve(square + weight * torch.eye(len(square)), cross).float()
        return lambda z: mean + (((z - centre) / spread) @ matrix).reshape(-1, *mean.shape)
    return [solved(weight) for weight in weights]


def cleaned_ridge(mean: Tensor, logvar: Tensor | None, images: Tensor, epochs: int,
                  weights: tuple[float, ...] = (1e-4, 1e-2, 1.0)) -> Decode:
    """Fit a ridge regression and a small network that removes its errors; also for images unlike the public."""
    code, folds = draw(mean, logvar), torch.arange(len(mean)) % 4
    tried = torch.empty(len(weights), *images.shape)   # each image by maps that were not fitted to it
    for fold in range(4):
        maps = ridge(code[folds != fold], images[folds != fold], weights)
        tried[:, folds == fold] = torch.stack([decode(code[folds == fold]) for decode in maps])
    best = int((tried - images).square().flatten(1).mean(1).argmin())
    rough, (first,), channels = tried[best], ridge(code, images, weights[best:best + 1]), images.shape[1]
    clean = nn.Sequential(nn.Conv2d(channels, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1),
                          nn.ReLU(), nn.Conv2d(32, channels, 3, padding=1))
    fit(list(clean.parameters()), lambda part: (
        rough[part] + clean(rough[part]) - images[part]).square().mean(), len(images), epochs)
    clean.eval().requires_grad_(False)

    def decode(code: Tensor) -> Tensor:
        images = first(code)
        return (images + clean(images)).clamp(0, 1)
    return decode


def latent_decoder(mean: Tensor, logvar: Tensor | None, images: Tensor, epochs: int) -> Decode:
    """Train ``decoder`` and ``cleaned_ridge``; return the one with the lower error on a tenth kept out."""
    order = torch.randperm(len(mean))
    train, test = order[len(mean) // 10:], order[:len(mean) // 10]
    noise = None if logvar is None else logvar[train]
    decoders = [learn(mean[train], noise, images[train], epochs) for learn in (decoder, cleaned_ridge)]
    code = draw(mean[test], None if logvar is None else logvar[test])
    errors = [float((decode(code) - images[test]).square().mean().nan_to_num(torch.inf)) for decode in decoders]
    return decoders[errors.index(min(errors))]


class Generator(nn.Module):
    """A variational autoencoder of images (Kingma and Welling 2014), whose decoder draws new ones."""

    def __init__(self, image_shape: Sequence[int], size: int = 32) -> None:
        super().__init__()
        self.size = size
        self.encode = nn.Sequential(nn.Flatten(), nn.Linear(math.prod(image_shape), 512), nn.ReLU(),
                                    nn.Linear(512, 2 * size))
        self.decode = Decoder(size, image_shape)

    def loss(self, x: Tensor) -> Tensor:
        """Return the negative evidence lower bound, with Gaussian pixels of standard deviation 0.1."""
        mu, logvar = self.encode(x).chunk(2, 1)
        error = (self.decode(reparameterise(mu, logvar)) - x).square().sum((1, 2, 3)) / (2 * 0.1**2)
        return (error + kl_to_standard_normal(mu, logvar)).mean()


def generator(images: Tensor, epochs: int, least: int = 0) -> Generator:
    """Train a generator on images ``N x C x H x W``, in at least ``least`` steps."""
    network = Generator(images.shape[1:])
    fit(list(network.parameters()), lambda part: network.loss(images[part]), len(images), epochs, least=least)
    return network.eval().requires_grad_(False)
