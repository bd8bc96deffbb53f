"""The table of attacks that reconstruct images or classes, ``ATTACKS``.

A new attack is a function, and a row of the table that says who can run it and what it needs.
"""
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from attack import classes, decoders, gradients, latents
from attack import observations as observe
from attack.adversaries import Adversary, Budget, held
from attack.observations import Victim
from attack.target import Target
from server.base import State

Observation = TypeVar("Observation")
Need = Callable[[Target, str], str | None]   # the run, an adversary -> why an attack cannot be run, or None


# What an attack may need beside the right adversary.

def shared_head(target: Target, adversary: str) -> str | None:
    """Need a head of which some travels, or an adversary that does not depend on that."""
    return None if target.uploaded or adversary == "stolen_model" else "nothing travels with this method"


def other_client(target: Target, adversary: str) -> str | None:
    """Need a curious client other than the victim."""
    alone = adversary == "curious_client" and target.options["num_users"] == 1
    return "the run has no other client" if alone else None


def whole_head(target: Target, adversary: str) -> str | None:
    """Need every part of the head; a client always has its own copy of what does not travel."""
    lacking = adversary == "curious_server" and "classifier.output.bias" not in target.uploaded
    return "part of the head stays with the clients" if lacking else None


def encoder(target: Target, adversary: str) -> str | None:
    """Need latents."""
    return None if target.has_encoder else "this method has no latents"


def shared_trunk(target: Target, adversary: str) -> str | None:
    """Need an encoder's trunk that travels."""
    return None if "encoder.trunk.0.weight" in target.uploaded else "no trunk of an encoder travels"


def noise(target: Target, adversary: str) -> str | None:
    """Need noise on the latents."""
    return None if target.method.network.variational else "this method's encoder has no noise"


@dataclass(frozen=True, kw_only=True)
class Attack:
    """A row of the table.

    Attributes:
        adversaries: those that can run it.
        source: where it was published, or what it does.
        needs: conditions on the run, checked in this order.
    """

    adversaries: tuple[str, ...]
    source: str
    needs: tuple[Need, ...] = ()
    kind = "image"      # or "class"
    chooses = False     # True if it makes no image
    unordered = False
    cheap = False

    def unfit(self, target: Target, adversary: str) -> str | None:
        """Return why this adversary of this run cannot run it; None if it can."""
        if adversary not in self.adversaries:
            return "needs what this adversary does not have"
        return next(filter(None, (need(target, adversary) for need in self.needs)), None)


@dataclass(frozen=True, kw_only=True)
class ClassAttack(Attack):
    """An attack that draws classes.

    Attributes:
        solve: (adversary, labels P) -> images ``R x P x C x H x W``, its own choice of each label first.
    """

    solve: Callable[[Adversary, Tensor], Tensor]
    kind = "class"


@dataclass(frozen=True, kw_only=True)
class ReconstructionAttack(Attack, Generic[Observation]):
    """An attack that reconstructs single images from what is observed of them.

    Attributes:
        observe: (victim, images ``N x C x H x W``, labels ``N``, budget) -> what the adversary observes.
        solve: (adversary, observation, N) -> images ``R x N x C x H x W``, its own choice first, and labels ``N``.
        unordered: the observation says nothing about the order of the images, so scoring pairs reconstructions
            with true images by assignment.
        cheap: all of a client's images are attacked by default.
    """

    observe: Callable[[Victim, Tensor, Tensor, Budget], Observation]
    solve: Callable[[Adversary, Observation, int], tuple[Tensor, Tensor]]
    unordered: bool = False
    cheap: bool = False


@dataclass(frozen=True, kw_only=True)
class IdentificationAttack(Attack, Generic[Observation]):
    """An attack that makes no image, but says how likely each of given candidates is the observed one.

    Attributes:
        observe, cheap: as of ``ReconstructionAttack``.
        solve: (adversary, observation of N images, candidates ``M x C x H x W``) -> log-likelihood ``N x M`` up to
            a constant, and labels ``N``.
    """

    observe: Callable[[Victim, Tensor, Tensor, Budget], Observation]
    solve: Callable[[Adversary, Observation, Tensor], tuple[Tensor, Tensor]]
    cheap: bool = False
    chooses = True


def decode_scores(adversary: Adversary, observed: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Decode scores, by a decoder trained on the service's answers to public images."""
    def centred(answers: Tensor) -> Tensor:
        logs = answers.clamp_min(1e-8).log()
        return logs - logs.mean(1, keepdim=True)
    query, images = held(adversary.knowledge.query), adversary.public.images
    answers = torch.cat([centred(query(part)) for part in images.split(64)])
    decode = decoders.decoder(answers, None, images, adversary.budget.epochs)
    return decode(centred(observed))[None], observed.argmax(1)


def of_classes(solve: Callable[[Adversary, Tensor], Tensor], source: str) -> ClassAttack:
    """Return the row of an attack on classes by everybody who has a model."""
    return ClassAttack(solve=solve, adversaries=("curious_server", "stolen_model", "curious_client"),
                       source=source, needs=HEAD)


def of_gradients(solve: Callable[[Adversary, list[State], int], tuple[Tensor, Tensor]], source: str,
                 *needs: Need) -> ReconstructionAttack[list[State]]:
    """Return the row of an attack by the server on the gradient of each image."""
    return ReconstructionAttack[list[State]](observe=observe.observe_gradients, solve=solve, adversaries=SERVER,
                                             source=source, needs=(*HEAD, *needs))


def of_update(steps: int, source: str) -> ReconstructionAttack[list[State]]:
    """Return the row of an attack by the server on one update of several images."""
    return ReconstructionAttack[list[State]](
        observe=partial(observe.observe_update, steps=steps), solve=partial(gradients.invert_update, steps=steps),
        adversaries=SERVER, source=source, needs=HEAD, unordered=True)


def of_latents(solve: Callable[[Adversary, list[latents.Seen], int], tuple[Tensor, Tensor]], source: str,
               cheap: bool = False) -> ReconstructionAttack[list[latents.Seen]]:
    """Return the row of an attack with the stolen model on latents."""
    return ReconstructionAttack[list[latents.Seen]](observe=latents.observe, solve=solve, adversaries=STOLEN,
                                                    source=source, needs=(encoder,), cheap=cheap)


SERVER, STOLEN = ("curious_server",), ("stolen_model",)
HEAD = (shared_head, other_client, whole_head)
# In the order in which they run. An adversary's attacks share what the first of them trained, so a new row goes
# behind those of its adversary: before them it would change what they find.
ATTACKS: dict[str, ClassAttack | ReconstructionAttack[Any] | IdentificationAttack[Any]] = {
    "mi_face": of_classes(classes.attack_mi_face, "Fredrikson et al. 2015"),
    "margin": of_classes(classes.attack_margin, "margin, total variation, restarts"),
    "margin_mu": ClassAttack(solve=partial(classes.attack_margin, draws=0), adversaries=STOLEN,
                             source="the same, through the mean of z alone", needs=(noise,)),
    "gmi": of_classes(classes.attack_gmi, "after Zhang et al. 2020, arXiv 1911.07135"),
    "dlg": of_gradients(gradients.dlg, "Zhu et al. 2019, arXiv 1906.08935"),
    "cosine_tv": of_gradients(gradients.cosine_tv, "Geiping et al. 2020, arXiv 2003.14053"),
    "analytic": of_gradients(gradients.analytic, "Phong et al. 2018, then a search"),
    "batch": of_update(1, "cosine_tv, of the mean gradient of several images"),
    "epoch": of_update(2, "a local epoch simulated, after Geiping et al."),
    "gauss_newton": of_gradients(gradients.gauss_newton, "exact where it converges"),
    "feature_alignment": of_gradients(
        gradients.feature_alignment,
        "gauss_newton, and a shadow encoder with the moments of its latents, after Xu et al. 2024", encoder),
    "trunk_analytic": ReconstructionAttack[list[State]](
        observe=observe.observe_trunk, solve=gradients.trunk_analytic, adversaries=SERVER,
        source="analytic, through a trunk that is shared", needs=(shared_head, shared_trunk)),
    "gradient_reidentification": IdentificationAttack[list[State]](
        observe=observe.observe_gradients, solve=latents.gradient_reidentification, adversaries=SERVER,
        source="gauss_newton, and the candidate with the largest log q(z|x)", needs=(*HEAD, encoder)),
    "latent_decoder": of_latents(latents.decode, "a decoder trained on public images", True),
    "reidentification": IdentificationAttack[list[latents.Seen]](
        observe=latents.observe, solve=latents.likelihood, adversaries=STOLEN,
        source="the candidate with the largest log q(z|x)", needs=(encoder,), cheap=True),
    "latent_generator": of_latents(latents.most_likely, "a search in a generator of public images"),
    "latent_search": of_latents(latents.search, "Mahendran and Vedaldi 2015"),
    "posterior_mean": of_latents(latents.posterior_mean, "the public images' mean, weighted by q(z|x)", True),
    "score_decoder": ReconstructionAttack[Tensor](
        observe=observe.observe_scores, solve=decode_scores, adversaries=("prediction_api",),
        source="Yang et al. 2019, arXiv 1902.08552", cheap=True),
}


def sees_latents(name: str) -> bool:
    """Return True if ``--observe`` says what an attack observes."""
    row = ATTACKS[name]
    return not isinstance(row, ClassAttack) and row.observe is latents.observe
