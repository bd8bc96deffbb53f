"""Encoders from images to latents z, and the priors that the KL term compares them with.

An encoder returns the mean and the log variance of z, ``N x D`` each, for images ``N x C x H x W``; D = CHW.
"""
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HIDDEN = 512   # width of the encoder's dense layer
PATCH = 4      # side in pixels of the patches of constant value in the means of classes and codes
OWN_CODES = 0.95   # probability of the codes of a class under CodePrior


class FlattenHWC(nn.Module):
    """Flatten ``N x C x H x W`` to ``N x HWC``: Keras's order, and a free view of a channels-last tensor."""

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(0, 2, 3, 1).flatten(1)


def as_image(z: Tensor, image_shape: tuple[int, int, int]) -> Tensor:
    """Reshape ``... x HWC`` to ``(...) x C x H x W``, the inverse of ``FlattenHWC``; leading axes are merged."""
    channels, height, width = image_shape
    return z.reshape(-1, height, width, channels).permute(0, 3, 1, 2)


def initialise(module: nn.Module) -> None:
    """Set Glorot-uniform weights and zero biases, as the released Keras layers have.

    PyTorch's own initial weights are several times smaller here and learn more slowly.
    """
    for part in module.modules():
        if isinstance(part, (nn.Conv2d, nn.Linear)):
            nn.init.xavier_uniform_(part.weight)
            if part.bias is not None:
                nn.init.zeros_(part.bias)


def reparameterise(mu: Tensor, logvar: Tensor) -> Tensor:
    """Draw ``z = mu + sigma * eps``, eps ~ N(0, I) (Kingma and Welling 2014, section 2.4)."""
    return torch.addcmul(mu, torch.exp(0.5 * logvar), torch.randn_like(mu))


def kl_to_standard_normal(mu: Tensor, logvar: Tensor) -> Tensor:
    """Return ``KL(N(mu, sigma^2) || N(0, I))`` in nats, summed over z: ``N x D -> N`` (ibid., appendix B).

    Its mean bounds the information of one draw of z about the image, ``I(x; z) <= E KL``. This is the variational
    information bottleneck, VIB (Alemi et al. 2017, arXiv 1612.00410); as a defence against inversion it is MID
    (Wang et al. 2021, arXiv 2009.05241).
    """
    return 0.5 * (mu.square() + logvar.exp() - 1 - logvar).sum(1)


def coarse_pictures(count: int, image_shape: tuple[int, int, int], apart: float) -> Tensor:
    """Draw random pictures of patches of constant value, with standard deviation ``apart``: ``count x CHW``."""
    channels, height, width = image_shape
    coarse = torch.randn(count, channels, -(-height // PATCH), -(-width // PATCH))
    return FlattenHWC()(F.interpolate(apart * coarse, scale_factor=PATCH)[..., :height, :width]).contiguous()


def trunk(image_shape: tuple[int, int, int]) -> nn.Sequential:
    """Return the layers that all encoders begin with; images are at least 5 x 5 pixels."""
    channels, height, width = image_shape
    return nn.Sequential(
        nn.Conv2d(channels, 32, 3), nn.ReLU(inplace=True),   # N x 32 x H-2 x W-2
        nn.Conv2d(32, 64, 3), nn.ReLU(inplace=True),         # N x 64 x H-4 x W-4
        FlattenHWC(),
        nn.Linear(64 * (height - 4) * (width - 4), HIDDEN),   # no activation, as released
        nn.Dropout(0.25))


class Encoder(nn.Module):
    """A deterministic encoder ``x -> z``, z of the image's size."""

    def __init__(self, image_shape: tuple[int, int, int]):
        super().__init__()
        self.trunk = trunk(image_shape)
        self.mu = nn.Linear(HIDDEN, math.prod(image_shape))
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """Encode ``N x C x H x W`` to ``N x CHW``."""
        return self.mu(self.trunk(x)).float()


class VariationalEncoder(nn.Module):
    """An encoder ``q(z|x) = N(mu(x), diag(sigma(x)^2))``, z of the image's size.

    ``init_logvar`` is the initial bias of the log-variance layer. Near 0, sigma is near 1 and mu near 0, a signal
    too weak to learn from quickly.
    """

    def __init__(self, image_shape: tuple[int, int, int], init_logvar: float):
        super().__init__()
        self.trunk = trunk(image_shape)
        self.mu = nn.Linear(HIDDEN, math.prod(image_shape))
        initialise(self)
        self.logvar = nn.Linear(HIDDEN, self.mu.out_features)
        initialise(self.logvar)
        nn.init.constant_(self.logvar.bias, init_logvar)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return mu and logvar, each ``N x CHW``, in float32 also under autocast."""
        hidden = self.trunk(x)
        return self.mu(hidden).float(), self.logvar(hidden).float()


class CodeEncoder(nn.Module):
    """An encoder that chooses one of M codes; ``z ~ N(m_c, I)``, where c is the code of the image.

    Given the encoder, z depends on the image through c alone. So z, mu, any number of draws of z, and the gradient
    of whatever follows z tell at most ``log2 M`` bits of the image (data processing inequality). The means ``m_c``
    are coarse random pictures, the same for all clients, and are not trained.

    Args:
        codes: M.
        apart: standard deviation over codes of each component of the means.
    """

    means: Tensor   # M x D

    def __init__(self, image_shape: tuple[int, int, int], codes: int, apart: float):
        super().__init__()
        self.trunk = trunk(image_shape)
        self.code = nn.Linear(HIDDEN, codes)
        initialise(self)
        self.register_buffer("means", coarse_pictures(codes, image_shape, apart))

    def scores(self, x: Tensor) -> Tensor:
        """Return the score of each code, ``N x M``; the highest is chosen."""
        return self.code(self.trunk(x)).float()

    def of_codes(self, codes: Tensor) -> tuple[Tensor, Tensor]:
        """Return mu and logvar of z for the numbers of codes ``N``."""
        mu = self.means[codes]
        return mu, torch.zeros_like(mu)

    def gaussian(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Return mu and logvar of z for scores ``N x M``.

        The value is that of the chosen code, to the last bit. The gradient is that of the mean over codes with
        probabilities ``softmax(scores)`` (straight-through, Bengio et al. 2013, arXiv 1308.3432).
        """
        mu, logvar = self.of_codes(scores.argmax(1))
        average = scores.softmax(1) @ self.means
        return mu + (average - average.detach()), logvar

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return mu and logvar, each ``N x CHW``."""
        return self.gaussian(self.scores(x))


class ClassPrior(nn.Module):
    """A Gaussian prior per class, ``p(z|y) = N(m_y, diag(s_y^2))``, learned with the encoder.

    The objective is the conditional entropy bottleneck, CEB (Fischer 2020, arXiv 2002.05379); the prior is its
    backward encoder. KL bounds the information of one draw of z beyond the class: ``I(x; z|y) <= E KL(q(z|x) ||
    p(z|y))``. Means and variances are parameters of the client and never leave it.

    The means start apart, as coarse random pictures that are the same for all clients: started at 0, a large beta
    would leave every class there. Two classes start ``apart^2 C H W`` nats apart in the mean, which is about the
    KL of an image that the encoder takes for another class.

    Args:
        num_classes: number of classes.
        image_shape: ``(C, H, W)``, the shape of z as an image.
        apart: standard deviation over classes of each component of the means.
    """

    def __init__(self, num_classes: int, image_shape: tuple[int, int, int], apart: float = 0.5):
        super().__init__()
        self.mu = nn.Parameter(coarse_pictures(num_classes, image_shape, apart))
        self.logvar = nn.Parameter(torch.zeros_like(self.mu))

    def draw(self, y: Tensor) -> Tensor:
        """Draw one z per label ``N``, ``N x D``, without gradient to the prior."""
        return reparameterise(self.mu.detach()[y], self.logvar.detach()[y])

    def kl(self, mu: Tensor, logvar: Tensor, y: Tensor) -> Tensor:
        """Return ``KL(N(mu, sigma^2) || N(m_y, s_y^2))`` in nats, summed over z: ``N x D``, labels ``N`` ->
        ``N``."""
        prior = self.logvar[y]
        distance = ((mu - self.mu[y]).square() + logvar.exp()) * torch.exp(-prior)
        return 0.5 * (distance - 1 - logvar + prior).sum(1)


class CodePrior(nn.Module):
    """A categorical prior ``p(c|y)`` over the codes of a ``CodeEncoder``.

    Code c belongs to class ``c mod num_classes``. The codes of class y share a probability of OWN_CODES. Nothing
    in it is trained, so a code means the same class to all clients.

    Args:
        codes: M, at least ``num_classes``.
    """

    own: Tensor   # bool num_classes x M

    def __init__(self, codes: int, num_classes: int):
        super().__init__()
        own = torch.arange(codes) % num_classes == torch.arange(num_classes)[:, None]
        self.register_buffer("own", own, persistent=False)   # no parameter: it is never averaged or stored

    def draw(self, y: Tensor) -> Tensor:
        """Draw a code for each label ``N`` from those of its class.

        The numbers are those of ``torch.multinomial``, which waits for the device and so is in no CUDA graph.
        """
        own = self.own[y].float()
        return (own / torch.empty_like(own).exponential_()).argmax(1)

    def kl(self, scores: Tensor, y: Tensor) -> Tensor:
        """Return KL in nats for scores ``N x M`` and labels ``N``: ``N``.

        In training it is ``-log q(codes of y | x)`` with q the softmax of the scores: KL from the nearest
        distribution over the codes of y to q. The opposite direction has no gradient where q is sure and wrong.
        In evaluation it is ``-log p(c|y)`` of the chosen code c, whose mean bounds what c tells beyond the class,
        ``I(x; c|y)``.
        """
        own = self.own[y]
        if self.training:
            return -scores.log_softmax(1).masked_fill(~own, -torch.inf).logsumexp(1)
        mine, others = own.sum(1, keepdim=True), (~own).sum(1, keepdim=True)
        shares = torch.where(own, OWN_CODES / mine, (1 - OWN_CODES) / others)
        return -shares.gather(1, scores.argmax(1, keepdim=True)).squeeze(1).log()
