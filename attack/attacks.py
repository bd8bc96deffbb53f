"""The adversaries, and the table of attacks that reconstruct images or classes, ``ATTACKS``."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from utils import Late

if TYPE_CHECKING:
    from torch import Tensor

    from attack import classes, gradients, latents
    from attack import observations as observe
    from attack.adversaries import Adversary, Budget
    from attack.observations import Victim
    from attack.target import Target
    from server.base import State
else:
    classes, gradients, latents, observe = (
        Late(f"attack.{name}") for name in ("classes", "gradients", "latents", "observations"))

ADVERSARIES = ("curious_server", "stolen_model", "prediction_api", "curious_client")   # adversaries.py
# Default size of the SGD steps whose upload the curious server observes. A run's own steps are some hundred times
# shorter, and noise hides less of a longer step: this is the best case for the adversary.
CLIENT_LR = 0.1

Need = tuple[str, Callable[["Target", str], bool]]   # why an attack cannot be run unless (run, adversary) is true

# What an attack may need beside the right adversary, and what is said where it is missing.
SHARED_HEAD: Need = ("this method shares no parameters",
                     lambda target, adversary: bool(target.uploaded) or adversary == "stolen_model")
OTHER_CLIENT: Need = ("the run has no other client",
                      lambda target, adversary: adversary != "curious_client" or target.clients > 1)
WHOLE_HEAD: Need = ("part of the head stays with the clients",   # of which each client has its own copy
                    lambda target, adversary: adversary != "curious_server"
                    or "classifier.output.bias" in target.uploaded)
FEATURES: Need = ("this method does not share the head's features",   # all but its last layer
                  lambda target, adversary: "classifier.features.0.weight" in target.uploaded)
SINGLE_UPLOADS: Need = ("secure aggregation hides single uploads",
                        lambda target, adversary: adversary != "curious_server" or not target.secure)
SUM: Need = "needs a run with --secure_aggregation", lambda target, adversary: target.secure
LATENTS: Need = "this method has no latents", lambda target, adversary: target.has_encoder
SHARED_TRUNK: Need = ("this method shares no trunk of an encoder",
                      lambda target, adversary: "encoder.trunk.0.weight" in target.uploaded)
NOISE: Need = "needs an encoder with noise", lambda target, adversary: target.method.network.variational


@dataclass(frozen=True, kw_only=True)
class Attack:
    """A row of the table: who can run it, where it was published, and what it needs of the run, in order."""

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
        return next((reason for reason, met in self.needs if not met(target, adversary)), None)


@dataclass(frozen=True, kw_only=True)
class ClassAttack(Attack):
    """An attack that draws classes: ``solve(adversary, labels P)`` gives images ``R x P x C x H x W``."""

    solve: Callable[[Adversary, Tensor], Tensor]
    kind = "class"


@dataclass(frozen=True, kw_only=True)
class ReconstructionAttack(Attack):
    """An attack that reconstructs single images from what is observed of them."""

    observe: Callable[[Victim, Tensor, Tensor, Budget], Any]
    # (adversary, observation, N) -> images R x N x C x H x W, its own choice first, and labels N
    solve: Callable[[Adversary, Any, int], tuple[Tensor, Tensor]]
    unordered: bool = False   # True if the observation does not tell the order of the images
    cheap: bool = False       # True if all of a client's images are attacked by default


@dataclass(frozen=True, kw_only=True)
class IdentificationAttack(Attack):
    """An attack that makes no image, but says how likely each candidate is the observed one."""

    observe: Callable[[Victim, Tensor, Tensor, Budget], Any]
    # (adversary, observation, M candidates) -> log-likelihoods N x M up to a constant, and labels N
    solve: Callable[[Adversary, Any, Tensor], tuple[Tensor, Tensor]]
    cheap: bool = False
    chooses = True


def of_classes(solve: Callable[[Adversary, Tensor], Tensor], source: str) -> ClassAttack:
    """Return the row of an attack on classes by everybody who has a model."""
    return ClassAttack(solve=solve, adversaries=(*SERVER, *STOLEN, "curious_client"), source=source, needs=HEAD)


def of_gradients(solve: Callable[[Adversary, list[State], int], tuple[Tensor, Tensor]], source: str,
                 *needs: Need) -> ReconstructionAttack:
    """Return the row of an attack by the server on the gradient of each image; by default of the whole head."""
    return ReconstructionAttack(observe=observe.observe_gradients, solve=solve, adversaries=SERVER, source=source,
                                needs=needs or HEAD)


def of_update(steps: int, source: str) -> ReconstructionAttack:
    """Return the row of an attack by the server on one update of several images."""
    return ReconstructionAttack(
        observe=partial(observe.observe_update, steps=steps), solve=partial(gradients.invert_update, steps=steps),
        adversaries=SERVER, source=source, needs=HEAD, unordered=True)


def of_latents(solve: Callable[[Adversary, list[latents.Seen], int], tuple[Tensor, Tensor]], source: str,
               cheap: bool = False) -> ReconstructionAttack:
    """Return the row of an attack with the stolen model on latents."""
    return ReconstructionAttack(observe=observe_latents, solve=solve, adversaries=STOLEN, source=source,
                                needs=(LATENTS,), cheap=cheap)


observe_latents = latents.observe   # as --observe says
SERVER, STOLEN = ("curious_server",), ("stolen_model",)
HEAD = (SHARED_HEAD, OTHER_CLIENT, WHOLE_HEAD)
# Those that run unless others are asked for: they tell most of what a run leaks, in little time.
DEFAULT_ATTACKS = ("analytic", "latent_decoder", "reidentification", "score_decoder")
# In the order in which they run. An adversary's attacks share what the first of them trained, so a new row goes
# behind those of its adversary: before them it would change what they find.
ATTACKS: dict[str, ClassAttack | ReconstructionAttack | IdentificationAttack] = {
    "mi_face": of_classes(classes.mi_face, "Fredrikson et al. 2015"),
    "margin": of_classes(classes.margin, "margin, total variation, restarts"),
    "margin_mu": ClassAttack(solve=partial(classes.margin, draws=0), adversaries=STOLEN,
                             source="the same, through the mean of z alone", needs=(NOISE,)),
    "gmi": of_classes(classes.gmi, "after Zhang et al. 2020, arXiv 1911.07135"),
    "dlg": of_gradients(gradients.dlg, "Zhu et al. 2019, arXiv 1906.08935"),
    "cosine_tv": of_gradients(gradients.cosine_tv, "Geiping et al. 2020, arXiv 2003.14053"),
    "analytic": of_gradients(gradients.analytic, "Phong et al. 2018, then a search", SHARED_HEAD, FEATURES),
    "batch": of_update(1, "cosine_tv, of the mean gradient of several images"),
    "epoch": of_update(2, "a local epoch simulated, after Geiping et al."),
    "gauss_newton": of_gradients(gradients.gauss_newton, "exact where it converges"),
    "feature_alignment": of_gradients(
        gradients.feature_alignment,
        "gauss_newton, and a shadow encoder with the moments of its latents, after Xu et al. 2024", *HEAD,
        LATENTS),
    "trunk_analytic": ReconstructionAttack(
        observe=observe.observe_trunk, solve=gradients.trunk_analytic, adversaries=SERVER,
        source="analytic, through a trunk that is shared", needs=(SHARED_HEAD, SHARED_TRUNK)),
    "gradient_reidentification": IdentificationAttack(
        observe=observe.observe_gradients, solve=latents.gradient_reidentification, adversaries=SERVER,
        source="gauss_newton, and the candidate with the largest log q(z|x)", needs=(*HEAD, LATENTS)),
    "latent_decoder": of_latents(latents.decode, "a decoder trained on public images", True),
    "reidentification": IdentificationAttack(
        observe=observe_latents, solve=latents.likelihood, adversaries=STOLEN,
        source="the candidate with the largest log q(z|x)", needs=(LATENTS,), cheap=True),
    "latent_generator": of_latents(latents.most_likely, "a search in a generator of public images"),
    "latent_search": of_latents(latents.search, "Mahendran and Vedaldi 2015"),
    "posterior_mean": of_latents(latents.posterior_mean, "the public images' mean, weighted by q(z|x)", True),
    "score_decoder": ReconstructionAttack(
        observe=lambda victim, x, y, budget: victim.answers(x, budget.draws, budget.top_scores),
        solve=latents.decode_scores, adversaries=("prediction_api",), source="Yang et al. 2019, arXiv 1902.08552",
        cheap=True),
}
