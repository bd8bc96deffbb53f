"""The networks: a private variational encoder, the shared classifier head, and the pair they make.

The layers are those that the authors released (Issa et al., IEEE TIFS 2024). Images are floats in [0, 1], shapes
are ``N x C x H x W``. A method's row (methods.py) names the parameters that are shared.
"""
import copy
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from server.base import State

HIDDEN = 512   # width of the encoder's dense layer
DENSE = 256    # width of the head's dense layer
PATCH = 4      # side in pixels of the patches of constant value in the initial means of ClassPrior
LATENTS = 4096   # draws of z in a head at a time: 8 per image of an evaluation's batch of 512


class Output(NamedTuple):
    """The result of a forward pass on N images.

    Args:
        logits: ``N x num_classes``.
        kl: nats per image, ``N``; None for a network without noise.
        features: input of the method's own loss.
        auxiliary: a further loss of the network itself, in training, ``N``; else None.
    """

    logits: Tensor
    kl: Tensor | None = None
    features: Tensor | None = None
    auxiliary: Tensor | None = None


class Network(nn.Module):
    """The interface of all networks.

    Attributes:
        has_encoder: whether an ``encoder`` precedes the head.
        variational: whether the encoder is noisy, so that KL bounds the information in a latent.
        predictor: the name of the part that predicts, on images or latents.
        options: the names of the options that the constructor takes besides shape and classes.
    """

    has_encoder = False
    variational = False
    predictor = "classifier"
    options: tuple[str, ...] = ()
    classifier: nn.Module

    def forward(self, x: Tensor, y: Tensor | None = None) -> Output:
        """Return the output for images ``N x C x H x W``; with a ``ClassPrior``, KL needs their labels ``N``."""
        raise NotImplementedError

    @staticmethod
    def joined(sent: State, private: State) -> State:
        """Return the private parameters with which a new client begins, given what it is sent."""
        return private

    def predict(self, x: Tensor, draws: int = 1, y: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Return class probabilities ``N x num_classes``, averaged over draws of z, and KL in nats ``N`` or None.

        Only KL may depend on the labels ``y``; if it does and they are missing, it is None.
        """
        return self(x).logits.softmax(1), None


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


class EncoderLayers(nn.Module):
    """The trunk and the layer for mu of both encoders; images are at least 5 x 5 pixels."""

    def __init__(self, image_shape: tuple[int, int, int]):
        super().__init__()
        channels, height, width = image_shape
        self.trunk = nn.Sequential(
            nn.Conv2d(channels, 32, 3), nn.ReLU(inplace=True),   # N x 32 x H-2 x W-2
            nn.Conv2d(32, 64, 3), nn.ReLU(inplace=True),         # N x 64 x H-4 x W-4
            FlattenHWC(),
            nn.Linear(64 * (height - 4) * (width - 4), HIDDEN),   # no activation, as released
            nn.Dropout(0.25),
        )
        self.mu = nn.Linear(HIDDEN, channels * height * width)
        initialise(self)


class Encoder(EncoderLayers):
    """A deterministic encoder ``x -> z``, z of the image's size."""

    def forward(self, x: Tensor) -> Tensor:
        """Encode ``N x C x H x W`` to ``N x CHW``."""
        return self.mu(self.trunk(x)).float()


class VariationalEncoder(EncoderLayers):
    """An encoder ``q(z|x) = N(mu(x), diag(sigma(x)^2))``, z of the image's size.

    ``init_logvar`` is the initial bias of the log-variance layer. Near 0, sigma is near 1 and mu near 0, a signal
    too weak to learn from quickly.
    """

    def __init__(self, image_shape: tuple[int, int, int], init_logvar: float):
        super().__init__(image_shape)
        self.logvar = nn.Linear(HIDDEN, self.mu.out_features)
        initialise(self.logvar)
        nn.init.constant_(self.logvar.bias, init_logvar)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return mu and logvar, each ``N x CHW``, in float32 also under autocast."""
        hidden = self.trunk(x)
        return self.mu(hidden).float(), self.logvar(hidden).float()


class Classifier(nn.Module):
    """The head ``p(y|z)`` and, applied straight to the image, the comparison CNN; at least 4 x 4 pixels."""

    def __init__(self, image_shape: tuple[int, int, int], num_classes: int):
        super().__init__()
        channels, height, width = self.input_shape = image_shape
        self.features = nn.Sequential(   # ReLU after pooling: the same numbers, of a quarter of the pixels
            nn.Conv2d(channels, 32, 3, padding=1), nn.MaxPool2d(2), nn.ReLU(),   # N x 32 x H/2 x W/2
            nn.Conv2d(32, 64, 3, padding=1), nn.MaxPool2d(2), nn.ReLU(),         # N x 64 x H/4 x W/4
            FlattenHWC(),
            nn.Linear(64 * (height // 4) * (width // 4), DENSE), nn.ReLU(), nn.Dropout(0.25),
        )
        self.output = nn.Linear(DENSE, num_classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits ``N x num_classes``, in float32 also under autocast."""
        return self.output(self.features(x)).float()


def reparameterise(mu: Tensor, logvar: Tensor) -> Tensor:
    """Draw ``z = mu + sigma * eps``, eps ~ N(0, I) (Kingma and Welling 2014, section 2.4)."""
    return torch.addcmul(mu, torch.exp(0.5 * logvar), torch.randn_like(mu))


def over_draws(answer: Callable[[Tensor], Tensor], mu: Tensor, logvar: Tensor, draws: int) -> Tensor:
    """Answer several draws of z per image: mu and logvar ``N x D`` -> ``draws x N x C``.

    At most LATENTS draws are in memory at a time, or one per image. For a gradient, activations are recomputed.

    Args:
        answer: latents ``M x D`` -> ``M x C``.
    """
    def part(count: int) -> Tensor:
        z = reparameterise(mu.expand(count, *mu.shape), logvar.expand(count, *mu.shape))   # count x N x D
        return answer(z.flatten(0, 1)).unflatten(0, (count, -1))
    at_once = max(1, LATENTS // max(1, len(mu)))
    if draws <= at_once:
        return part(draws)
    run = partial(checkpoint, part, use_reentrant=False) if torch.is_grad_enabled() else part
    return torch.cat([run(min(at_once, draws - done)) for done in range(0, draws, at_once)])


def kl_to_standard_normal(mu: Tensor, logvar: Tensor) -> Tensor:
    """Return ``KL(N(mu, sigma^2) || N(0, I))`` in nats, summed over z: ``N x D -> N`` (ibid., appendix B).

    Its mean bounds the information of one draw of z about the image, ``I(x; z) <= E KL``. This is the variational
    information bottleneck, VIB (Alemi et al. 2017, arXiv 1612.00410); as a defence against inversion it is MID
    (Wang et al. 2021, arXiv 2009.05241).
    """
    return 0.5 * (mu.square() + logvar.exp() - 1 - logvar).sum(1)


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
        channels, height, width = image_shape
        coarse = torch.randn(num_classes, channels, -(-height // PATCH), -(-width // PATCH))
        pictures = F.interpolate(apart * coarse, scale_factor=PATCH)[..., :height, :width]
        self.mu = nn.Parameter(FlattenHWC()(pictures).contiguous())
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


class CNN(Network):
    """The comparison network: the head applied straight to the image."""

    classifier: Classifier

    def __init__(self, image_shape: tuple[int, int, int], num_classes: int):
        super().__init__()
        self.classifier = Classifier(image_shape, num_classes)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Output:
        return Output(self.classifier(x))


class Ditto(CNN):
    """Two CNNs: a shared one, and the client's own, which predicts (Li et al. 2021, arXiv 2012.04221).

    Both start alike. One step trains both, since their losses have no parameter in common.
    """

    predictor = "personal"

    def __init__(self, image_shape: tuple[int, int, int], num_classes: int):
        super().__init__(image_shape, num_classes)
        self.personal = copy.deepcopy(self.classifier)

    @staticmethod
    def joined(sent: State, private: State) -> State:
        """Return the shared CNN as the client's own."""
        return {name.replace("classifier.", "personal.", 1): value.clone() for name, value in sent.items()}

    def forward(self, x: Tensor, y: Tensor | None = None) -> Output:
        """Return the logits of the client's own CNN, and in training the cross-entropy of the shared one."""
        logits, loss = self.personal(x), None
        if self.training and y is not None:
            loss = F.cross_entropy(self.classifier(x), y, reduction="none")
        return Output(logits, auxiliary=loss)


class NoisyClassifier(nn.Module):
    """A CNN whose last features are noisy: ``z = mu + sigma * eps`` of DENSE numbers, and one layer behind it."""

    def __init__(self, image_shape: tuple[int, int, int], num_classes: int):
        super().__init__()
        channels, height, width = self.input_shape = image_shape
        self.features = nn.Sequential(*Classifier(image_shape, num_classes).features[:7],
                                      nn.Linear(64 * (height // 4) * (width // 4), 2 * DENSE))   # mu and logvar
        self.output = nn.Linear(DENSE, num_classes)
        initialise(self)

    def posterior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return mu and logvar of z, each ``N x DENSE``, in float32 also under autocast."""
        mu, logvar = self.features(x).float().chunk(2, 1)
        return mu, logvar

    def forward(self, x: Tensor) -> Tensor:
        """Return logits ``N x num_classes`` from the mean of z."""
        return self.output(self.posterior(x)[0]).float()


class FedSR(Network):
    """FedSR's probabilistic network (Nguyen et al. 2022, NeurIPS), all of which is shared but its prior.

    Its loss adds ``l2_weight ||z||`` and ``kl_weight KL(q(z|x) || p(z|y))``. The prior is a private
    ``ClassPrior``, which starts as N(0, I) for each class.
    """

    options = ("l2_weight",)
    classifier: NoisyClassifier

    def __init__(self, image_shape: tuple[int, int, int], num_classes: int, l2_weight: float):
        super().__init__()
        self.l2_weight = l2_weight
        self.classifier = NoisyClassifier(image_shape, num_classes)
        self.prior = ClassPrior(num_classes, (DENSE, 1, 1), apart=0.0)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Output:
        """Return logits, from one draw of z in training, and KL if the labels are given."""
        mu, logvar = self.classifier.posterior(x)
        z = reparameterise(mu, logvar) if self.training else mu
        kl = None if y is None else self.prior.kl(mu, logvar, y)
        return Output(self.classifier.output(z).float(), kl, auxiliary=self.l2_weight * z.norm(dim=1))

    def predict(self, x: Tensor, draws: int = 1, y: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Return class probabilities from the mean of z, and KL."""
        output = self(x, y)
        return output.logits.softmax(1), output.kl


class DropoutCNN(CNN):
    """The CNN with one more dropout before its last layer: an inverter does not know the dropped units."""

    def __init__(self, image_shape: tuple[int, int, int], num_classes: int, p: float = 0.5):
        super().__init__(image_shape, num_classes)
        self.classifier.features.append(nn.Dropout(p))


class ResSFL(CNN):
    """A CNN trained against an inverter of its first features (after Li et al. 2022, CVPR, "ResSFL").

    The original is for split learning, where the features themselves leave the client, and trains the inverter and
    the first layers in a stage of their own. Here only weights leave, all layers train at once, and the inverter
    is private to the client. As there, the features pass a bottleneck of few channels.
    """

    def __init__(self, image_shape: tuple[int, int, int], num_classes: int, width: int = 8):
        super().__init__(image_shape, num_classes)
        channels, *size = image_shape
        self.classifier.features.insert(3, nn.Sequential(
            nn.Conv2d(32, width, 3, padding=1), nn.ReLU()))   # N x 8 x H/2 x W/2, what the inverter sees
        self.classifier.features.insert(4, nn.Sequential(nn.Conv2d(width, 32, 3, padding=1), nn.ReLU()))
        self.attacker = nn.Sequential(
            nn.Conv2d(width, 32, 3, padding=1), nn.ReLU(), nn.Upsample(tuple(size)),
            nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, channels, 3, padding=1), nn.Sigmoid())
        initialise(self)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Output:
        features = self.classifier.features[:4](x)
        return Output(self.classifier.output(self.classifier.features[4:](features)).float(), None, features)

    def resistance(self, x: Tensor, features: Tensor, weight: float) -> Tensor:
        """Return the additional loss of each image, ``N``.

        It is ``weight * max(0, SSIM(inverted, x) - 0.5)``, which trains the features alone, plus the inverter's
        squared error, which trains the inverter alone.
        """
        fixed = {name: value.detach() for name, value in self.attacker.named_parameters()}
        inverted = functional_call(self.attacker, fixed, (features,)).float()
        error = (self.attacker(features.detach()).float() - x).square().mean((1, 2, 3))
        from torchmetrics.functional.image import structural_similarity_index_measure  # slow to import

        with torch.autocast(x.device.type, enabled=False):
            similar = structural_similarity_index_measure(inverted, x, data_range=1.0, reduction="none")
        assert isinstance(similar, Tensor)   # a tuple where more was asked for
        return weight * (similar - 0.5).clamp_min(0) + error


class EncoderClassifier(Network):
    """A private deterministic encoder and the shared head: RVE-PFL without its noise."""

    has_encoder = True

    def __init__(self, image_shape: tuple[int, int, int], num_classes: int):
        super().__init__()
        self.image_shape = image_shape
        self.encoder = Encoder(image_shape)
        self.classifier = Classifier(image_shape, num_classes)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Output:
        return Output(self.classifier(as_image(self.encoder(x), self.image_shape)))


class RVE(Network):
    """RVE-PFL's model: a private variational encoder and the shared head.

    Args:
        init_logvar: as in ``VariationalEncoder``.
        prior: the prior of KL: ``normal`` is N(0, I), as published; ``class`` is a ``ClassPrior``.
        prior_apart: ``apart`` of the ``ClassPrior``.
    """

    has_encoder, variational, options = True, True, ("init_logvar", "prior", "prior_apart")
    classifier: Classifier

    def __init__(self, image_shape: tuple[int, int, int], num_classes: int, init_logvar: float,
                 prior: str = "normal", prior_apart: float = 0.5):
        super().__init__()
        self.image_shape = image_shape
        self.encoder = VariationalEncoder(image_shape, init_logvar)
        self.classifier = Classifier(image_shape, num_classes)
        self.prior = ClassPrior(num_classes, image_shape, prior_apart) if prior == "class" else None

    def kl(self, mu: Tensor, logvar: Tensor, y: Tensor | None) -> Tensor | None:
        """Return KL from posterior to prior in nats, ``N``; None if it needs labels and they are missing."""
        if self.prior is None:
            return kl_to_standard_normal(mu, logvar)
        return None if y is None else self.prior.kl(mu, logvar, y)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Output:
        """Return logits from one draw of z, KL, and with a ``ClassPrior`` the head's replay loss."""
        mu, logvar = self.encoder(x)
        logits = self.classifier(as_image(reparameterise(mu, logvar), self.image_shape))
        return Output(logits, self.kl(mu, logvar, y), auxiliary=self.replay(len(x), x.device))

    def replay(self, count: int, device: torch.device) -> Tensor | None:
        """Return the head's cross-entropy on ``count`` draws of random classes' priors; None in evaluation.

        Without it, a client with two classes would train the head to forget the other eight (virtual features, as
        in CCVR, Luo et al. 2021, arXiv 2106.05001, but in every client's own training).
        """
        if self.prior is None or not self.training:
            return None
        y = torch.randint(self.classifier.output.out_features, (count,), device=device)
        logits = self.classifier(as_image(self.prior.draw(y), self.image_shape))
        return F.cross_entropy(logits, y, reduction="none")

    def predict(self, x: Tensor, draws: int = 1, y: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Return ``p(y|x) = E_q[p(y|z)]`` over ``draws`` draws, and KL; only the head runs for every draw."""
        mu, logvar = self.encoder(x)
        each = over_draws(lambda z: self.classifier(as_image(z, self.image_shape)).softmax(1), mu, logvar, draws)
        return each.mean(0), self.kl(mu, logvar, y)
