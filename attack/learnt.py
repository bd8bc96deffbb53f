"""Models that an adversary trains on public images: a shadow encoder, decoders, and a generator."""
import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attack.access import Knowledge, held
from models import RVE, as_image, kl_to_standard_normal, reparameterise

Loss = Callable[[Tensor], Tensor]     # indices of a batch -> mean loss
Apart = Callable[[Tensor, Tensor], Tensor]   # latents N x D, labels N -> how far from what they should be
Decode = Callable[[Tensor], Tensor]   # codes M x D -> images M x C x H x W


BATCH = 128
ALIGNED_STEPS = 128   # of training, at least, before an encoder's moments are those of the victim


def steps(images: Tensor, batch: int = BATCH) -> int:
    """Steps in an epoch of ``fit`` over ``N x C x H x W``."""
    return -(-len(images) // batch)


def fit(parameters: list[Tensor], loss: Loss, count: int, epochs: int, lr: float = 1e-3,
        batch: int = BATCH) -> None:
    """Minimise a loss over ``count`` examples by Adam, with a learning rate that falls to 0."""
    optimizer = torch.optim.Adam(parameters, lr)
    steps = epochs * -(-count // batch)
    warm = 0.1 if steps != 10 else 0.11   # with 10 steps, 0.1 would make OneCycleLR divide by zero
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, max(2, steps), pct_start=warm)
    for _ in range(epochs):
        for part in torch.randperm(count).split(batch):
            optimizer.zero_grad()
            loss(part).backward()
            optimizer.step()
            schedule.step()


def shadow_encoder(knowledge: Knowledge, start: nn.Module, images: Tensor, labels: Tensor, epochs: int,
                   kl_weight: float, apart: Apart | None = None) -> Knowledge:
    """Train an encoder on public images in front of the frozen head, as a client trains its own.

    Args:
        knowledge: gives the head, and the parts of the victim's encoder that travelled, which are kept as they are.
        start: the network with the weights that all clients start from. They are no secret.
        images, labels: public ones, ``N x C x H x W`` and ``N``.
        kl_weight: of the KL term in a client's loss.
        apart: added to the loss, for an encoder whose latents shall be like given ones (``moments_apart``).

    Returns:
        Knowledge with the head and the new encoder.
    """
    start = copy.deepcopy(start)   # whoever trains another one starts from the same weights
    encoder, head = start.get_submodule("encoder").train(), held(knowledge.head)
    encoder.load_state_dict(knowledge.known, strict=False)
    own: list[Tensor] = [parameter for name, parameter in start.named_parameters()
           if not name.startswith("classifier.") and name.removeprefix("encoder.") not in knowledge.known]
    for parameter in own:
        parameter.requires_grad_(True)

    def loss(part: Tensor) -> Tensor:
        found = encoder(images[part])
        z, kl = found, torch.zeros(())
        if isinstance(found, tuple):
            mu, logvar = found
            z, kl = reparameterise(mu, logvar), kl_of(start, mu, logvar, labels[part]).mean()
        value = F.cross_entropy(head(as_image(z, knowledge.image_shape)), labels[part]) + kl_weight * kl
        return value if apart is None else value + apart(z, labels[part])
    batch = BATCH
    if apart is not None:   # moments need many images of each class, and time
        batch *= 2
        epochs = max(epochs, -(-ALIGNED_STEPS // steps(images, batch)))
    fit(own, loss, len(images), epochs, batch=batch)
    for parameter in own:
        parameter.requires_grad_(False)
    return Knowledge(head, encoder.eval(), True, knowledge.image_shape)


def kl_of(network: nn.Module, mu: Tensor, logvar: Tensor, y: Tensor) -> Tensor:
    """KL of posteriors ``N x D`` to the network's prior, ``N``; to N(0, I) if it has none of its own."""
    found = network.kl(mu, logvar, y) if isinstance(network, RVE) else None
    return kl_to_standard_normal(mu, logvar) if found is None else found


def moments_apart(seen: Tensor, classes: Tensor) -> Apart:
    """How far latents are from some of the victim's, by each class's mean, standard deviation and covariance.

    Latents of a class have these in common whichever images they are of, so no image has to be known. It is in
    the spirit of FORA (Xu et al., CVPR 2024, arXiv 2405.04115), which aligns by a discriminator and kernel means.

    Args:
        seen, classes: the victim's latents, ``M x D``, and their labels, ``M``. A class with a single latent is
            left out.

    Returns:
        Latents ``N x D`` and labels ``N`` -> a number, 0 where the moments are the same; in units of the spread of
        those seen. A class with fewer than two latents in the batch adds nothing.
    """
    unit = seen.std().clamp_min(1e-12)

    def moments(z: Tensor) -> list[Tensor]:
        centred = (z - z.mean(0)) / unit
        covariance = centred.T @ centred / (len(z) - 1)
        # Most entries of the D x D are near 0, so their mean square is small beside the other two.
        return [z.mean(0) / unit, covariance.diagonal().clamp_min(1e-12).sqrt(), 10 * covariance]

    goals = {c: moments(seen[classes == c]) for c in classes.unique().tolist() if (classes == c).sum() > 1}

    def apart(z: Tensor, labels: Tensor) -> Tensor:
        value = z.new_zeros(())
        for c, goal in goals.items():
            if (labels == c).sum() > 1:
                value = value + sum((one - other).square().mean()
                                    for one, other in zip(moments(z[labels == c]), goal, strict=True))
        return value
    return apart


class Decoder(nn.Module):
    """Codes ``N x D`` -> images in [0, 1], ``N x C x H x W``.

    Two hidden layers, and beside them one linear map, because the last layers of an encoder are linear too.
    """

    def __init__(self, size: int, image_shape: tuple[int, int, int], width: int = 1024) -> None:
        super().__init__()
        pixels = image_shape[0] * image_shape[1] * image_shape[2]
        self.layers = nn.Sequential(nn.Linear(size, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(),
                                    nn.Linear(width, pixels))
        self.linear = nn.Linear(size, pixels)
        self.image_shape = image_shape

    def forward(self, code: Tensor) -> Tensor:
        return (self.layers(code) + self.linear(code)).sigmoid().unflatten(1, self.image_shape)


def decoder(mean: Tensor, logvar: Tensor | None, images: Tensor, epochs: int) -> Decode:
    """Train a ``Decoder`` on public images for the squared error.

    Args:
        mean: the code of each image, ``N x D``: its latent without noise, or its scores.
        logvar: log variance of the noise on the code, ``N x D``, or None. Noise is drawn anew every epoch.
        images: ``N x C x H x W``.

    Returns:
        The way from codes to images.
    """
    def drawn(part: Tensor) -> Tensor:
        return mean[part] if logvar is None else reparameterise(mean[part], logvar[part])
    made, first = Decoder(mean.shape[1], shape_of(images)), drawn(torch.arange(len(mean)))
    centre, spread = first.mean(0), first.std(0) + 1e-3 * first.std() + 1e-12
    fit(list(made.parameters()), lambda part: (
        made((drawn(part) - centre) / spread) - images[part]).square().mean(), len(images), epochs)
    made.eval().requires_grad_(False)
    return lambda code: made((code - centre) / spread)


def ridge(code: Tensor, images: Tensor, weights: tuple[float, ...]) -> list[Decode]:
    """Ridge regression from codes to images (Hoerl and Kennard 1970).

    With Z the standardised codes, S their covariance and X the centred images, a map is
    ``(S + w I)^-1 Z^T X / N``.

    Args:
        code: ``N x D``.
        weights: of the penalty, w.

    Returns:
        One map for each weight.
    """
    centre, spread, mean = code.mean(0), code.std(0) + 1e-3 * code.std() + 1e-12, images.mean(0)
    standard, size = (code - centre) / spread, len(code)
    square = (standard.T @ standard / size).double()
    cross = (standard.T @ (images - mean).flatten(1) / size).double()

    def solved(weight: float) -> Decode:
        matrix = torch.linalg.solve(square + weight * torch.eye(len(square)), cross).float()
        return lambda z: mean + (((z - centre) / spread) @ matrix).reshape(-1, *mean.shape)
    return [solved(weight) for weight in weights]


def cleaned_ridge(mean: Tensor, logvar: Tensor | None, images: Tensor, epochs: int,
                  weights: tuple[float, ...] = (1e-4, 1e-2, 1.0)) -> Decode:
    """Ridge regression, then a small convolutional network that removes its errors.

    Both also work on images that are unlike the public ones, where the hidden layers of ``decoder`` do not.
    But ridge regression magnifies errors, so the codes have to be exact. Arguments are those of ``decoder``.
    """
    code, folds = mean if logvar is None else reparameterise(mean, logvar), torch.arange(len(mean)) % 4
    tried = torch.empty(len(weights), *images.shape)   # each image by maps that were not fitted to it
    for fold in range(4):
        maps = ridge(code[folds != fold], images[folds != fold], weights)
        tried[:, folds == fold] = torch.stack([one(code[folds == fold]) for one in maps])
    best = int((tried - images).square().flatten(1).mean(1).argmin())
    rough, (first,), channels = tried[best], ridge(code, images, weights[best:best + 1]), images.shape[1]
    clean = nn.Sequential(nn.Conv2d(channels, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1),
                          nn.ReLU(), nn.Conv2d(32, channels, 3, padding=1))
    fit(list(clean.parameters()), lambda part: (
        rough[part] + clean(rough[part]) - images[part]).square().mean(), len(images), epochs)
    clean.eval().requires_grad_(False)

    def decode(code: Tensor) -> Tensor:
        found = first(code)
        return (found + clean(found)).clamp(0, 1)
    return decode


def latent_decoder(mean: Tensor, logvar: Tensor | None, images: Tensor, epochs: int) -> Decode:
    """The better of ``decoder`` and ``cleaned_ridge``, for latents that are observed exactly.

    Better is the lower squared error on a tenth of the public images that neither was trained on. Arguments
    are those of ``decoder``.
    """
    order = torch.randperm(len(mean))
    train, test = order[len(mean) // 10:], order[:len(mean) // 10]
    noise = None if logvar is None else logvar[train]
    made = [learn(mean[train], noise, images[train], epochs) for learn in (decoder, cleaned_ridge)]
    code = mean[test] if logvar is None else reparameterise(mean[test], logvar[test])
    errors = [float((decode(code) - images[test]).square().mean().nan_to_num(torch.inf)) for decode in made]
    return made[errors.index(min(errors))]


def shape_of(images: Tensor) -> tuple[int, int, int]:
    """``N x C x H x W`` -> ``(C, H, W)``."""
    channels, height, width = images.shape[1:]
    return channels, height, width


class Generator(nn.Module):
    """A variational autoencoder of images (Kingma and Welling 2014), whose decoder draws new ones."""

    def __init__(self, image_shape: tuple[int, int, int], size: int = 32) -> None:
        super().__init__()
        pixels = image_shape[0] * image_shape[1] * image_shape[2]
        self.size = size
        self.encode = nn.Sequential(nn.Flatten(), nn.Linear(pixels, 512), nn.ReLU(), nn.Linear(512, 2 * size))
        self.decode = Decoder(size, image_shape)

    def loss(self, x: Tensor) -> Tensor:
        """The negative evidence lower bound, with Gaussian pixels of standard deviation 0.1."""
        mu, logvar = self.encode(x).chunk(2, 1)
        error = (self.decode(reparameterise(mu, logvar)) - x).square().sum((1, 2, 3)) / (2 * 0.1**2)
        return (error + kl_to_standard_normal(mu, logvar)).mean()


def generator(images: Tensor, epochs: int) -> Generator:
    """Train a generator on images ``N x C x H x W``."""
    made = Generator(shape_of(images))
    fit(list(made.parameters()), lambda part: made.loss(images[part]), len(images), epochs)
    return made.eval().requires_grad_(False)
