"""The table of attacks, and one adversary's side of each: what it holds, what it trains, what it hands in."""
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import Tensor, nn

from attack import classes, gradients, learnt
from attack.access import Holdings, Target, Victim
from methods import METHODS
from models import FlattenHWC, as_image
from options import NOISY
from update import State

flatten = FlattenHWC()


@dataclass(frozen=True)
class Budget:
    """What every method's adversary may spend."""

    restarts: int
    iterations: int
    epochs: int     # of what it trains on public images
    draws: int      # of z averaged in an answer
    lr: float       # the client's, of its simulated local epoch
    keep: int       # scores that a service tells


class Adversary:
    """One adversary's knowledge of one client in one round, and what it trains with it, once.

    Attributes:
        of_classes: public images of given classes alone; None where the public images show other things.
    """

    def __init__(self, holdings: Holdings | None, query: Callable[[Tensor], Tensor] | None, start: nn.Module,
                 public: Tensor, labels: Tensor, of_classes: Callable[[Tensor], Tensor] | None,
                 kl_weight: float, budget: Budget):
        self.holdings, self.query, self.start, self.budget = holdings, query, start, budget
        self.public, self.labels, self.of_classes, self.kl_weight = public, labels, of_classes, kl_weight
        self.decoders: dict[tuple, Callable[[Tensor], Tensor]] = {}   # by the classes they were trained on

    @cached_property
    def view(self) -> Holdings:
        """A way from images to logits: the model itself, or the head behind a shadow encoder."""
        if not self.holdings.has_encoder or self.holdings.encoder is not None:
            return self.holdings
        return learnt.shadow_encoder(self.holdings, self.start, self.public, self.labels, self.budget.epochs,
                                     self.kl_weight)

    def posterior(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """``Holdings.posterior`` of many images, a part at a time."""
        view = self.view   # which may have to be trained first, so not under no_grad
        with torch.no_grad():
            mu, logvar = zip(*(view.posterior(part) for part in images.split(256)), strict=True)
        return torch.cat(mu), None if logvar[0] is None else torch.cat(logvar)

    def latents_to_images(self, learn: Callable, labels: Tensor) -> Callable[[Tensor], Tensor]:
        """A decoder learnt on public images, of the classes seen where that can be."""
        images = self.public if self.of_classes is None else self.of_classes(labels.unique())
        return learn(*self.posterior(images), images, self.budget.epochs)

    @cached_property
    def generator(self) -> learnt.Generator:
        """A prior of images."""
        return learnt.generator(self.public, self.budget.epochs)

    def score(self, draws: int) -> classes.Score:
        """Images to log-probabilities."""
        return lambda x: self.view.logits(x, draws)

    def images_of(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """Recovered inputs of the head, ``N x C x H x W``, and their labels -> images."""
        if not self.holdings.has_encoder:
            return inputs.clamp(0, 1)
        classes = tuple(labels.unique().tolist())
        if classes not in self.decoders:   # of latents that have errors
            self.decoders[classes] = self.latents_to_images(learnt.decoder, labels)
        return self.decoders[classes](flatten(inputs))

    def smooth(self, weight: float) -> float:
        """The weight of total variation in a gradient's inversion: images are smooth, latents are not."""
        return 0.0 if self.holdings.has_encoder else weight

    def starts(self, *shape: int) -> Tensor:
        """Restarts: noise of the size of images, or of latents."""
        noise = torch.randn(self.budget.restarts, *shape)
        return noise if self.holdings.has_encoder else (0.5 + 0.2 * noise).clamp(0, 1)


# Class attacks: (adversary, labels P) -> R x P x C x H x W, of each label the adversary's own choice first.

def mi_face(adversary: Adversary, labels: Tensor) -> Tensor:
    return classes.mi_face(adversary.score(adversary.budget.draws), labels, adversary.holdings.image_shape,
                           3 * adversary.budget.iterations)[None]   # cheaper than others by their restarts


def mi_strong(adversary: Adversary, labels: Tensor, draws: int | None = None) -> Tensor:
    mean = adversary.public.mean(0)
    start = (mean + 0.1 * torch.randn(adversary.budget.restarts, len(labels), *mean.shape)).clamp(0, 1)
    score = adversary.score(adversary.budget.draws if draws is None else draws)
    return classes.mi_strong(score, labels, start, mean, adversary.budget.iterations)[0]


def mi_strong_mu(adversary: Adversary, labels: Tensor) -> Tensor:
    return mi_strong(adversary, labels, draws=0)


def mi_prior(adversary: Adversary, labels: Tensor) -> Tensor:
    made = adversary.generator
    start = torch.randn(adversary.budget.restarts, len(labels), made.size)
    return classes.mi_prior(adversary.score(adversary.budget.draws), labels, made.decode, start,
                            adversary.budget.iterations)[0]


# Image attacks: what is observed of some images; (adversary, observed) -> R x N x C x H x W and labels N.

def one_step(victim: Victim, x: Tensor, y: Tensor, budget: Budget) -> list[State]:
    """The gradient of each image alone."""
    return [victim.update(x[i:i + 1], y[i:i + 1], gradients.gradient) for i in range(len(x))]


def together(victim: Victim, x: Tensor, y: Tensor, budget: Budget, steps: int) -> list[State]:
    """The change over ``steps`` steps that share all images out: of one step, the gradient of the batch."""
    batch = -(-len(x) // steps)
    return [victim.update(x, y, lambda head, z, t: gradients.epoch_update(head, z, t, budget.lr, batch))]


def stacked(observed: list[State]) -> State:
    return {name: torch.stack([one[name] for one in observed]) for name in observed[0]}


def dlg(adversary: Adversary, observed: list[State], count: int) -> tuple[Tensor, Tensor]:
    head, shape = adversary.holdings.stepped, adversary.holdings.image_shape
    outputs = len(observed[0]["output.bias"])
    tried = [[gradients.deep_leakage(head, one, 1, outputs, start[None], adversary.budget.iterations)
              for one, start in zip(observed, starts, strict=True)]
             for starts in adversary.starts(len(observed), *shape)]
    found = torch.stack([torch.cat([x for x, _ in row]) for row in tried])
    value = torch.tensor([[v for _, v in row] for row in tried])
    found, _ = gradients.best_first(found.nan_to_num(0.5), value)
    labels = torch.cat([gradients.labels_of(one, 1) for one in observed])
    return every(adversary, found, labels), labels


def cosine_tv(adversary: Adversary, observed: list[State], count: int) -> tuple[Tensor, Tensor]:
    head, labels = adversary.holdings.stepped, torch.stack([gradients.labels_of(one, 1) for one in observed])
    start = adversary.starts(len(observed), 1, *adversary.holdings.image_shape)
    found, _ = gradients.invert(lambda x, y: gradients.gradient(head, x, y), stacked(observed), labels, start,
                                adversary.budget.iterations, adversary.smooth(1e-2),
                                not adversary.holdings.has_encoder)
    return every(adversary, found.squeeze(2), labels.squeeze(1)), labels.squeeze(1)


def analytic(adversary: Adversary, observed: list[State], count: int) -> tuple[Tensor, Tensor]:
    head, shape = adversary.holdings.stepped, adversary.holdings.image_shape
    place = next(i for i, part in enumerate(head.features) if isinstance(part, nn.Linear))
    recovered = torch.stack([gradients.dense_input(one, f"features.{place}") for one in observed])
    start = adversary.starts(len(observed), *shape)
    found, _ = gradients.from_features(head.features[:place], recovered, start, adversary.budget.iterations,
                                       adversary.smooth(1e-4), not adversary.holdings.has_encoder, lr=0.1)
    labels = torch.cat([gradients.labels_of(one, 1) for one in observed])
    return every(adversary, found, labels), labels


def update(adversary: Adversary, observed: list[State], count: int, steps: int) -> tuple[Tensor, Tensor]:
    """The inversion of ``together``."""
    head, lr, batch = adversary.holdings.stepped, adversary.budget.lr, -(-count // steps)
    labels = gradients.labels_of(observed[0], count, min(steps, count))
    start = adversary.starts(1, count, *adversary.holdings.image_shape)
    found, _ = gradients.invert(lambda x, y: gradients.epoch_update(head, x, y, lr, batch), stacked(observed),
                                labels[None], start, adversary.budget.iterations, adversary.smooth(1e-2),
                                not adversary.holdings.has_encoder)
    return every(adversary, found.squeeze(1), labels), labels


def latents(victim: Victim, x: Tensor, y: Tensor, budget: Budget) -> Tensor:
    """One draw of z of each image, ``N x CHW``."""
    return flatten(victim.head_input(x))


def decode_latent(adversary: Adversary, z: Tensor, count: int) -> tuple[Tensor, Tensor]:
    labels = label_of_latent(adversary, z)
    # To images of another kind least squares carry over, as hidden layers do not.
    learn = learnt.cleaned_ridge if adversary.of_classes is None else learnt.latent_decoder
    return adversary.latents_to_images(learn, labels)(z)[None], labels


def optimise_latent(adversary: Adversary, z: Tensor, count: int) -> tuple[Tensor, Tensor]:
    mean = adversary.public.mean(0)
    start = (mean + 0.1 * torch.randn(adversary.budget.restarts, len(z), *mean.shape)).clamp(0, 1)
    found, _ = gradients.from_features(lambda x: adversary.view.posterior(x)[0], z, start,
                                       adversary.budget.iterations, 0.3, True)
    return found, label_of_latent(adversary, z)


def likelihood_of_latent(adversary: Adversary, z: Tensor, candidates: Tensor) -> tuple[Tensor, Tensor]:
    """``log q(z|x)`` of each of ``M`` candidates, up to a constant, ``N x M``; without noise, minus half the
    squared distance of their latents."""
    mu, logvar = adversary.posterior(candidates)
    labels = label_of_latent(adversary, z)
    z, mu, logvar = (value.double() for value in (z, mu, torch.zeros_like(mu) if logvar is None else logvar))
    weight = (-logvar).exp()   # sum (z - mu)^2 / sigma^2 as products, so that nothing is N x M x D
    distance = z.square() @ weight.T - 2 * z @ (mu * weight).T + (mu.square() * weight + logvar).sum(1)
    return -0.5 * distance, labels


def label_of_latent(adversary: Adversary, z: Tensor) -> Tensor:
    """What the head says of it."""
    return adversary.holdings.head(as_image(z, adversary.holdings.image_shape)).argmax(1)


def every(adversary: Adversary, inputs: Tensor, labels: Tensor) -> Tensor:
    """``images_of`` over restarts."""
    return torch.stack([adversary.images_of(one, labels) for one in inputs])


def scores(victim: Victim, x: Tensor, y: Tensor, budget: Budget) -> Tensor:
    """The service's answers, ``N x num_classes``, of which it tells the largest ``keep``."""
    return victim.answers(x, budget.draws, budget.keep)


def decode_scores(adversary: Adversary, observed: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """A decoder of truncated scores, trained on the service's answers to public images (Yang et al. 2019,
    arXiv 1902.08552)."""
    def of(answers):
        logs = answers.clamp_min(1e-8).log()
        return logs - logs.mean(1, keepdim=True)
    answers = torch.cat([of(adversary.query(part)) for part in adversary.public.split(64)])
    decode = learnt.decoder(answers, None, adversary.public, adversary.budget.epochs)
    return decode(of(observed))[None], observed.argmax(1)


@dataclass(frozen=True)
class Attack:
    """One attack.

    Attributes:
        observe: None for a class attack, which sees nothing of single images.
        unordered: what is observed says nothing of the images' order; scoring matches found and true ones.
        chooses: it has candidates in hand, the true image among them, and says how likely each is, ``N x M``,
            instead of making an image.
    """

    solve: Callable
    observe: Callable | None
    adversaries: tuple[str, ...]
    source: str
    unordered: bool = False
    chooses: bool = False


KNOW_MODEL = ("curious_server", "stolen_model", "curious_client")
ATTACKS = {
    "mi_face": Attack(mi_face, None, KNOW_MODEL, "Fredrikson et al. 2015"),
    "mi_strong": Attack(mi_strong, None, KNOW_MODEL, "margin, total variation, restarts"),
    "mi_strong_mu": Attack(mi_strong_mu, None, ("stolen_model",), "the same, through mu alone"),
    "mi_prior": Attack(mi_prior, None, KNOW_MODEL, "after Zhang et al. 2020, arXiv 1911.07135"),
    "dlg": Attack(dlg, one_step, ("curious_server",), "Zhu et al. 2019, arXiv 1906.08935"),
    "cosine_tv": Attack(cosine_tv, one_step, ("curious_server",), "Geiping et al. 2020, arXiv 2003.14053"),
    "analytic": Attack(analytic, one_step, ("curious_server",), "Phong et al. 2018, then features inverted"),
    "batch": Attack(partial(update, steps=1), partial(together, steps=1), ("curious_server",),
                    "the same, of several images' mean gradient", unordered=True),
    "epoch": Attack(partial(update, steps=2), partial(together, steps=2), ("curious_server",),
                    "a local epoch simulated, after Geiping et al.", unordered=True),
    "latent_decoder": Attack(decode_latent, latents, ("stolen_model",), "decoder trained on public images"),
    "latent_likelihood": Attack(likelihood_of_latent, latents, ("stolen_model",),
                                "which of some 500 candidates: the largest log q(z|x)", chooses=True),
    "latent_search": Attack(optimise_latent, latents, ("stolen_model",), "Mahendran and Vedaldi 2015"),
    "score_decoder": Attack(decode_scores, scores, ("prediction_api",), "Yang et al. 2019, arXiv 1902.08552"),
}


def unfit(name: str, adversary: str, target: Target) -> str | None:
    """Why an attack does not fit an adversary of a run, or None."""
    attack, method = ATTACKS[name], METHODS[target.options["method"]]
    travels = method.split(target.network().state_dict())[0]
    if adversary not in attack.adversaries:
        return "needs what this adversary does not have"
    if adversary in ("curious_server", "curious_client") and not travels:
        return "nothing travels with this method"
    if adversary == "curious_client" and target.options["num_users"] == 1:
        return "the run has no other client"
    if adversary == "curious_server" and "classifier.output.bias" not in travels:
        return "part of the head stays with the clients"
    if attack.observe is latents and not target.has_encoder:
        return "this method has no latents"
    if name == "mi_strong_mu" and target.options["method"] not in NOISY:
        return "this method's encoder has no noise"
    return None
