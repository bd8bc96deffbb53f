"""What an adversary trains on public images: a shadow encoder, decoders, and a generator of images."""
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attack.access import Holdings
from models import as_image, kl_to_standard_normal, reparameterise

Loss = Callable[[Tensor], Tensor]   # indices of a batch -> mean loss


def fit(parameters: list[Tensor], loss: Loss, count: int, epochs: int, lr: float = 1e-3,
        batch: int = 128) -> None:
    """Adam over ``count`` examples, its learning rate falling to 0."""
    optimizer = torch.optim.Adam(parameters, lr)
    steps = epochs * -(-count // batch)
    warm = 0.1 if steps != 10 else 0.11   # a first phase that ends at step 0 makes OneCycleLR divide by 0
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, max(2, steps), pct_start=warm)
    for _ in range(epochs):
        for part in torch.randperm(count).split(batch):
            optimizer.zero_grad()
            loss(part).backward()
            optimizer.step()
            schedule.step()


def shadow_encoder(holdings: Holdings, start: nn.Module, images: Tensor, labels: Tensor, epochs: int,
                   kl_weight: float) -> Holdings:
    """An encoder trained on public images against the frozen head, as a client trains its own.

    Args:
        start: the network with the weights that all clients start from, which the protocol makes no secret.
    """
    encoder, head = start.encoder.train(), holdings.head
    for parameter in encoder.parameters():
        parameter.requires_grad_(True)

    def loss(part):
        found = encoder(images[part])
        z, kl = (found, 0.0) if not isinstance(found, tuple) else (
            reparameterise(*found), kl_to_standard_normal(*found).mean())
        return F.cross_entropy(head(as_image(z, holdings.image_shape)), labels[part]) + kl_weight * kl
    fit(list(encoder.parameters()), loss, len(images), epochs)
    for parameter in encoder.parameters():
        parameter.requires_grad_(False)
    return Holdings(head, encoder.eval(), True, holdings.image_shape)


class Decoder(nn.Module):
    """A vector ``N x D`` -> images in [0, 1], ``N x C x H x W``: two hidden layers beside a linear way, since
    an encoder's last layers are linear too."""

    def __init__(self, size: int, image_shape: tuple[int, int, int], width: int = 1024):
        super().__init__()
        pixels = image_shape[0] * image_shape[1] * image_shape[2]
        self.layers = nn.Sequential(nn.Linear(size, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(),
                                    nn.Linear(width, pixels))
        self.linear = nn.Linear(size, pixels)
        self.image_shape = image_shape

    def forward(self, code: Tensor) -> Tensor:
        return (self.layers(code) + self.linear(code)).sigmoid().unflatten(1, self.image_shape)


def decoder(mean: Tensor, logvar: Tensor | None, images: Tensor, epochs: int) -> Callable[[Tensor], Tensor]:
    """A decoder of what is seen of images, trained on public ones for the squared error.

    Args:
        mean: what is seen of each image, ``N x D``.
        logvar: the log variance of the noise on it, drawn anew in every epoch, or None.

    Returns:
        ``M x D`` -> images.
    """
    def seen(part):
        return mean[part] if logvar is None else reparameterise(mean[part], logvar[part])
    made, first = Decoder(mean.shape[1], tuple(images.shape[1:])), seen(torch.arange(len(mean)))
    centre, spread = first.mean(0), first.std(0) + 1e-3 * first.std() + 1e-12
    fit(list(made.parameters()), lambda part: (
        made((seen(part) - centre) / spread) - images[part]).square().mean(), len(images), epochs)
    made.eval().requires_grad_(False)
    return lambda code: made((code - centre) / spread)


def ridge(seen: Tensor, images: Tensor, weights: tuple[float, ...]) -> list[Callable[[Tensor], Tensor]]:
    """Least squares from what is seen to images, one map ``M x D -> M x C x H x W`` for each weight of the
    penalty: ``(S + w I)^-1 Z^T X / N``, S the covariance of Z standardised (Hoerl and Kennard 1970)."""
    centre, spread, mean = seen.mean(0), seen.std(0) + 1e-3 * seen.std() + 1e-12, images.mean(0)
    code, size = (seen - centre) / spread, len(seen)
    square, cross = (code.T @ code / size).double(), (code.T @ (images - mean).flatten(1) / size).double()

    def solved(weight):
        matrix = torch.linalg.solve(square + weight * torch.eye(len(square)), cross).float()
        return lambda z: mean + (((z - centre) / spread) @ matrix).reshape(-1, *mean.shape)
    return [solved(weight) for weight in weights]


def cleaned_ridge(mean: Tensor, logvar: Tensor | None, images: Tensor, epochs: int,
                  weights: tuple[float, ...] = (1e-4, 1e-2, 1.0)) -> Callable[[Tensor], Tensor]:
    """Least squares, then a small convolutional network that cleans up what they leave. Both carry over to
    images unlike the public ones, as hidden layers do not; but least squares magnify errors, so this is for
    latents that are seen as they are. Arguments as of ``decoder``."""
    seen, folds = mean if logvar is None else reparameterise(mean, logvar), torch.arange(len(mean)) % 4
    tried = torch.empty(len(weights), *images.shape)   # each image by maps that have not seen it
    for fold in range(4):
        maps = ridge(seen[folds != fold], images[folds != fold], weights)
        tried[:, folds == fold] = torch.stack([one(seen[folds == fold]) for one in maps])
    best = int((tried - images).square().flatten(1).mean(1).argmin())
    rough, (first,), channels = tried[best], ridge(seen, images, weights[best:best + 1]), images.shape[1]
    clean = nn.Sequential(nn.Conv2d(channels, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1),
                          nn.ReLU(), nn.Conv2d(32, channels, 3, padding=1))
    fit(list(clean.parameters()), lambda part: (
        rough[part] + clean(rough[part]) - images[part]).square().mean(), len(images), epochs)
    clean.eval().requires_grad_(False)

    def decode(code):
        found = first(code)
        return (found + clean(found)).clamp(0, 1)
    return decode


def latent_decoder(mean: Tensor, logvar: Tensor | None, images: Tensor,
                   epochs: int) -> Callable[[Tensor], Tensor]:
    """A decoder of latents that are seen as they are: ``decoder`` or ``cleaned_ridge``, whichever has the
    lower squared error on a tenth of the public images that neither was trained on."""
    order = torch.randperm(len(mean))
    kept, aside = order[len(mean) // 10:], order[:len(mean) // 10]
    noise = None if logvar is None else logvar[kept]
    made = [learn(mean[kept], noise, images[kept], epochs) for learn in (decoder, cleaned_ridge)]
    seen = mean[aside] if logvar is None else reparameterise(mean[aside], logvar[aside])
    return min(made, key=lambda decode: (decode(seen) - images[aside]).square().mean().nan_to_num(torch.inf))


class Generator(nn.Module):
    """A variational autoencoder of public images (Kingma and Welling 2014); its decoder draws new ones."""

    def __init__(self, image_shape: tuple[int, int, int], size: int = 32):
        super().__init__()
        pixels = image_shape[0] * image_shape[1] * image_shape[2]
        self.size = size
        self.encode = nn.Sequential(nn.Flatten(), nn.Linear(pixels, 512), nn.ReLU(), nn.Linear(512, 2 * size))
        self.decode = Decoder(size, image_shape)

    def loss(self, x: Tensor) -> Tensor:
        """Negative evidence bound, the image's term a Gaussian of standard deviation 0.1."""
        mu, logvar = self.encode(x).chunk(2, 1)
        error = (self.decode(reparameterise(mu, logvar)) - x).square().sum((1, 2, 3)) / (2 * 0.1**2)
        return (error + kl_to_standard_normal(mu, logvar)).mean()


def generator(images: Tensor, epochs: int) -> Generator:
    """A generator trained on public images."""
    made = Generator(tuple(images.shape[1:]))
    fit(list(made.parameters()), lambda part: made.loss(images[part]), len(images), epochs)
    return made.eval().requires_grad_(False)
