"""Attacks on latents: an image's z is observed, or recovered from a gradient, and turned back into the image.

In shapes, S is the number of draws under one encoder, N of images, D of a latent's values and M of candidates.
"""
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from attack import decoders, gradients
from attack.adversaries import Adversary, Budget, Knowledge, flatten, held, posterior_in_parts
from attack.observations import Victim
from attack.scoring import tied
from models import as_image
from server.base import State

PRIOR_STEPS = 600   # of training, at least, before a generator draws what looks like its images
AT_ONCE = 1024      # candidates whose likelihood is computed together


@dataclass(frozen=True)
class Seen:
    """Observed latents of N images under one encoder."""

    draws: Tensor                    # S x N x D
    model: Knowledge | None = None   # None for the encoder of the adversary's own round
    noisy: bool = True               # False for the mean of z

    def posterior(self, adversary: Adversary, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return mean and log variance of a draw, ``M x D`` each, for images; the latter is None without noise."""
        mu, logvar = posterior_in_parts(self.model or adversary.whole_model, images)
        return mu, logvar if self.noisy else None

    def of_mean(self, logvar: Tensor | None) -> Tensor | None:
        """Return the log variance of the mean of the draws, from that of one."""
        return None if logvar is None else logvar - math.log(len(self.draws))


def observe(victim: Victim, x: Tensor, y: Tensor, budget: Budget) -> list[Seen]:
    """Observe latents of images ``N x C x H x W`` as ``budget.observed`` says, an entry for each encoder."""
    observed = budget.observed
    if observed == "rounds":
        return [Seen(drawn(view, x, 1), view) for view in victim.by_round]
    view = victim.stolen
    held(view.encoder).train(observed == "train")
    if observed == "mu":
        return [Seen(posterior_in_parts(view, x)[0][None], noisy=False)]
    return [Seen(drawn(view, x, int(observed[1:] or 1) if observed != "train" else 1))]


def drawn(view: Knowledge, x: Tensor, draws: int) -> Tensor:
    """Draw z of images ``N x C x H x W``: ``S x N x D``."""
    mu, logvar = posterior_in_parts(view, x)
    return decoders.draw(mu.expand(draws, *mu.shape), None if logvar is None else logvar.expand(draws, *mu.shape))


def labels_of(adversary: Adversary, latents: list[Seen]) -> Tensor:
    """Return the label that the heads give each image's latents, by their mean probability: ``N``."""
    shape, probabilities = adversary.knowledge.image_shape, []
    for seen in latents:
        head = held((seen.model or adversary.knowledge).head)
        answers = torch.cat([head(part).softmax(1) for part in as_image(seen.draws, shape).split(512)])
        probabilities.append(answers.unflatten(0, seen.draws.shape[:2]).mean(0))
    return torch.stack(probabilities).mean(0).argmax(1)


def decode(adversary: Adversary, latents: list[Seen], count: int) -> tuple[Tensor, Tensor]:
    """Decode the mean of each encoder's draws, by decoders trained on public images, and average the pictures."""
    labels = labels_of(adversary, latents)
    learn = decoders.cleaned_ridge if adversary.public.of_classes is None else decoders.latent_decoder
    images, _ = adversary.public.of(labels)
    pictures = []
    for seen in latents:
        mu, logvar = seen.posterior(adversary, images)
        pictures.append(learn(mu, seen.of_mean(logvar), images, adversary.budget.epochs)(seen.draws.mean(0)))
    return torch.stack(pictures).mean(0)[None], labels


def search(adversary: Adversary, latents: list[Seen], count: int) -> tuple[Tensor, Tensor]:
    """Search images whose mean latent is that observed (Mahendran and Vedaldi 2015, arXiv 1412.0035)."""
    models = [seen.model or adversary.whole_model for seen in latents]
    goal = torch.cat([seen.draws.mean(0) for seen in latents], 1)
    images, _ = gradients.from_features(
        lambda x: torch.cat([model.posterior(x)[0] for model in models], 1), goal,
        adversary.random_images(count), adversary.budget.iterations, 0.3, True)
    return images, labels_of(adversary, latents)


def most_likely(adversary: Adversary, latents: list[Seen], count: int) -> tuple[Tensor, Tensor]:
    """Search a generator's image with the largest ``log q(z|G(c)) + log N(c; 0, I)``, from that of ``decode``."""
    (rough,), labels = decode(adversary, latents, count)
    (images, _), budget = adversary.public.of(labels), adversary.budget
    generator = decoders.generator(images, budget.epochs, PRIOR_STEPS)
    code = generator.encode(rough)[:, :generator.size].repeat(budget.restarts, 1)
    code[count:] += 0.5 * torch.randn_like(code[count:])   # the first restart is the decoder's own picture
    code.requires_grad_()
    goals = [seen.draws.mean(0).repeat(budget.restarts, 1) for seen in latents]

    def unlikeliness() -> Tensor:
        pictures, value = generator.decode(code), code.square().sum(1)
        for seen, goal in zip(latents, goals, strict=True):
            mu, noise = (seen.model or adversary.whole_model).posterior(pictures)
            logvar = seen.of_mean(noise) if seen.noisy else None
            logvar = torch.zeros_like(mu) if logvar is None else logvar
            value = value + ((goal - mu).square() / logvar.exp() + logvar).sum(1)
        return 0.5 * value
    value = gradients.descend(unlikeliness, code, budget.iterations, 0.05, bounded=False)
    return gradients.best_first(generator.decode(code).detach(), value, budget.restarts)[0], labels


def likelihood(adversary: Adversary, latents: list[Seen], candidates: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``log_likelihood`` and the labels."""
    return log_likelihood(adversary, latents, candidates), labels_of(adversary, latents)


def log_likelihood(adversary: Adversary, latents: list[Seen], images: Tensor) -> Tensor:
    """Return ``log q(z|x)`` of M images over all draws up to a constant, ``N x M``, in double precision."""
    def of_draws(draws: Tensor, mu: Tensor, logvar: Tensor | None) -> Tensor:
        logvar = torch.zeros_like(mu) if logvar is None else logvar
        mu, logvar = mu.double(), logvar.double()
        weight = (-logvar).exp()   # sum (z - mu)^2 / sigma^2, expanded so that no tensor is N x M x D
        # One draw at a time, since there may be hundreds.
        total, squared = sum((torch.stack([z, z.square()]) for z in map(Tensor.double, draws)), torch.zeros(()))
        squares = squared @ weight.T - 2 * total @ (mu * weight).T
        return -0.5 * (squares + len(draws) * (mu.square() * weight + logvar).sum(1))
    return torch.cat([sum((of_draws(seen.draws, *seen.posterior(adversary, part)) for seen in latents),
                          torch.zeros(())) for part in images.split(AT_ONCE)], 1)


def posterior_mean(adversary: Adversary, latents: list[Seen], count: int) -> tuple[Tensor, Tensor]:
    """Average the public images by ``softmax(log q(z|x))``; without noise, those with the nearest latent."""
    labels = labels_of(adversary, latents)
    images, _ = adversary.public.of(labels)
    logs = log_likelihood(adversary, latents, images)
    if all(seen.posterior(adversary, images[:1])[1] is None for seen in latents):
        logs = torch.where(tied(logs, logs.max(1, keepdim=True).values), 0.0, -torch.inf)
    weight = logs.softmax(1).float()
    return (weight @ images.flatten(1)).unflatten(1, images.shape[1:])[None], labels


def gradient_reidentification(adversary: Adversary, observed: list[State],
                              candidates: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``log_likelihood`` of latents recovered by ``gradients.head_inputs``, and the labels."""
    latents = flatten(gradients.head_inputs(adversary, observed))
    return log_likelihood(adversary, [Seen(latents[None])], candidates), gradients.single_labels(observed)


def decode_scores(adversary: Adversary, observed: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Decode scores, by a decoder trained on the service's answers to public images."""
    def centred(answers: Tensor) -> Tensor:
        logs = answers.clamp_min(1e-8).log()
        return logs - logs.mean(1, keepdim=True)
    query, images = held(adversary.knowledge.query), adversary.public.images
    answers = torch.cat([centred(query(part)) for part in images.split(64)])
    decode = decoders.decoder(answers, None, images, adversary.budget.epochs)
    return decode(centred(observed))[None], observed.argmax(1)
