"""The networks: the shared classifier head, its pair with a private encoder (encoders.py), and the rivals.

The layers are those that the authors released (Issa et al., IEEE TIFS 2024). Images are floats in [0, 1], shapes
are ``N x C x H x W``. A method's row (methods.py) names the parameters that are shared.
"""
import copy
import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from encoders import (
    ClassPrior,
    CodeEncoder,
    CodePrior,
    Encoder,
    FlattenHWC,
    VariationalEncoder,
    as_image,
    initialise,
    kl_to_standard_normal,
    reparameterise,
)
from server.base import State

DENSE = 256    # width of the head's dense layer
LATENTS = 4096   # draws of z in a head at a time: 8 per image of an evaluation's batch of 512


class Output(NamedTuple):
    """The result of a forward pass on N images."""

    logits: Tensor   # ``N x num_classes``
    kl: Tensor | None = None   # nats per image, ``N``; None for a network without noise
    features: Tensor | None = None   # input of the method's own loss
    auxiliary: Tensor | None = None   # a further loss of the network itself, in training, ``N``; else None


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
        prior: the prior of KL: ``normal`` is N(0, I), as published; ``class`` is a ``ClassPrior``; ``categorical``
            is a ``CodePrior``, behind a ``CodeEncoder``.
        prior_apart: ``apart`` of the ``ClassPrior`` or of the codes.
        codes: number of codes of ``categorical``.
    """

    has_encoder, variational, options = True, True, ("init_logvar", "prior", "prior_apart", "codes")
    classifier: Classifier
    encoder: VariationalEncoder | CodeEncoder
    prior: ClassPrior | CodePrior | None

    def __init__(self, image_shape: tuple[int, int, int], num_classes: int, init_logvar: float,
                 prior: str = "normal", prior_apart: float = 0.5, codes: int | None = None):
        super().__init__()
        self.image_shape = image_shape
        coded = prior == "categorical"
        self.encoder = (CodeEncoder(image_shape, codes or num_classes, prior_apart) if coded
                        else VariationalEncoder(image_shape, init_logvar))
        self.classifier = Classifier(image_shape, num_classes)
        self.prior = (CodePrior(codes or num_classes, num_classes) if coded
                      else ClassPrior(num_classes, image_shape, prior_apart) if prior == "class" else None)

    @property
    def most_nats(self) -> float:
        """Return the most that z can tell of an image in nats, whatever the prior."""
        return math.log(len(self.encoder.means)) if isinstance(self.encoder, CodeEncoder) else math.inf

    def encode(self, x: Tensor, y: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return mu and logvar of z, ``N x D``, and KL to the prior in nats, ``N``.

        KL is None if it depends on the labels ``y`` and they are missing.
        """
        if isinstance(self.encoder, CodeEncoder):
            assert isinstance(self.prior, CodePrior)
            scores = self.encoder.scores(x)
            return *self.encoder.gaussian(scores), None if y is None else self.prior.kl(scores, y)
        mu, logvar = self.encoder(x)
        if self.prior is None:
            return mu, logvar, kl_to_standard_normal(mu, logvar)
        assert isinstance(self.prior, ClassPrior)
        return mu, logvar, None if y is None else self.prior.kl(mu, logvar, y)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Output:
        """Return logits from one draw of z, KL, and in training with a prior of classes the head's replay loss."""
        mu, logvar, kl = self.encode(x, y)
        logits = self.classifier(as_image(reparameterise(mu, logvar), self.image_shape))
        return Output(logits, kl, auxiliary=self.replay(len(x), x.device))

    def replay(self, count: int, device: torch.device) -> Tensor | None:
        """Return the head's cross-entropy on ``count`` draws of random classes' priors; None in evaluation.

        Without it, a client with two classes would train the head to forget the other eight (virtual features, as
        in CCVR, Luo et al. 2021, arXiv 2106.05001, but in every client's own training).
        """
        if self.prior is None or not self.training:
            return None
        y = torch.randint(self.classifier.output.out_features, (count,), device=device)
        z = (reparameterise(*self.encoder.of_codes(self.prior.draw(y))) if isinstance(self.encoder, CodeEncoder)
             else self.prior.draw(y))
        return F.cross_entropy(self.classifier(as_image(z, self.image_shape)), y, reduction="none")

    def predict(self, x: Tensor, draws: int = 1, y: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Return ``p(y|x) = E_q[p(y|z)]`` over ``draws`` draws, and KL; only the head runs for every draw."""
        mu, logvar, kl = self.encode(x, y)
        each = over_draws(lambda z: self.classifier(as_image(z, self.image_shape)).softmax(1), mu, logvar, draws)
        return each.mean(0), kl
