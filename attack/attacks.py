"""The table of attacks, ``ATTACKS``, and what each attack does.

A new attack is one function, and one row of the table that says who can run it and what it needs.
"""
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from attack import classes, gradients, latents, learnt, newton
from attack.access import Target, Victim, held, posterior_in_parts
from attack.adversary import Adversary, Budget, flatten
from methods import METHODS
from server.base import State

# Attacks on classes: (adversary, labels P) -> images R x P x C x H x W. Of each label, the adversary's own
# choice comes first.

def mi_face(adversary: Adversary, labels: Tensor) -> Tensor:
    """One run of ``classes.mi_face``, three times as long, since it has no restarts."""
    return classes.mi_face(adversary.score(adversary.budget.draws), labels, adversary.knowledge.image_shape,
                           3 * adversary.budget.iterations)[None]


def margin(adversary: Adversary, labels: Tensor, draws: int | None = None) -> Tensor:
    """``classes.margin``; ``draws`` of z in place of the budget's, 0 for the mean of z."""
    start = adversary.random_images(len(labels))
    score = adversary.score(adversary.budget.draws if draws is None else draws)
    mean = adversary.public.images.mean(0)
    return classes.margin(score, labels, start, mean, adversary.budget.iterations)[0]


def gmi(adversary: Adversary, labels: Tensor) -> Tensor:
    """``classes.gmi`` with a generator of public images."""
    generator = adversary.generator
    start = torch.randn(adversary.budget.restarts, len(labels), generator.size)
    return classes.gmi(adversary.score(adversary.budget.draws), labels, generator.decode, start,
                            adversary.budget.iterations)[0]


# What is observed of single images: (victim, images N x C x H x W, labels N, budget) -> anything that the
# attack understands. And attacks on them: (adversary, observed, N) -> images R x N x C x H x W, labels N.

def observe_gradients(victim: Victim, x: Tensor, y: Tensor, budget: Budget) -> list[State]:
    """The gradient behind the upload of a step on each image alone, of the head."""
    return [part_of(victim.update(x[i:i + 1], y[i:i + 1], budget.lr), "classifier.") for i in range(len(x))]


def observe_trunk(victim: Victim, x: Tensor, y: Tensor, budget: Budget) -> list[State]:
    """``observe_gradients``, of the head and of an encoder's trunk."""
    updates = [victim.update(x[i:i + 1], y[i:i + 1], budget.lr) for i in range(len(x))]
    return [{**part_of(one, "classifier."), **part_of(one, "encoder.")} for one in updates]


def observe_update(victim: Victim, x: Tensor, y: Tensor, budget: Budget, steps: int) -> list[State]:
    """The sum of the gradients behind one upload, over ``steps`` steps that share the images out, of the head."""
    return [part_of(victim.update(x, y, budget.lr, batch=-(-len(x) // steps)), "classifier.")]


def part_of(update: State, prefix: str) -> State:
    """The values whose names begin with a prefix, without it."""
    return {name.removeprefix(prefix): value for name, value in update.items() if name.startswith(prefix)}


def stacked(observed: list[State]) -> State:
    """P gradients -> one, whose values are ``P x ...``."""
    return {name: torch.stack([one[name] for one in observed]) for name in observed[0]}


def dlg(adversary: Adversary, observed: list[State], count: int) -> tuple[Tensor, Tensor]:
    """``gradients.deep_leakage`` on each image's gradient."""
    head, shape = held(adversary.knowledge.next_head), adversary.knowledge.image_shape
    outputs = len(observed[0]["output.bias"])
    tried = [[gradients.deep_leakage(head, one, 1, outputs, start[None], adversary.budget.iterations)
              for one, start in zip(observed, starts, strict=True)]
             for starts in adversary.random_inputs(len(observed), *shape)]
    found = torch.stack([torch.cat([x for x, _ in row]) for row in tried])
    distance = torch.tensor([[value for _, value in row] for row in tried])
    found, _ = gradients.best_first(found.nan_to_num(0.5), distance)
    labels = torch.cat([gradients.labels_of(one, 1) for one in observed])
    return adversary.decode_inputs(found, labels), labels


def cosine_tv(adversary: Adversary, observed: list[State], count: int) -> tuple[Tensor, Tensor]:
    """``gradients.invert`` on each image's gradient."""
    head, has_encoder = held(adversary.knowledge.next_head), adversary.knowledge.has_encoder
    labels = torch.stack([gradients.labels_of(one, 1) for one in observed])
    start = adversary.random_inputs(len(observed), 1, *adversary.knowledge.image_shape)
    found, _ = gradients.invert(lambda x, y: gradients.gradient(head, x, y), stacked(observed), labels, start,
                                adversary.budget.iterations, adversary.tv_weight(1e-2), not has_encoder)
    return adversary.decode_inputs(found.squeeze(2), labels.squeeze(1)), labels.squeeze(1)


def analytic(adversary: Adversary, observed: list[State], count: int) -> tuple[Tensor, Tensor]:
    """Recover the exact input of the head's dense layer, then search images that lead to it."""
    knowledge, budget = adversary.knowledge, adversary.budget
    layers = list(held(knowledge.next_head).get_submodule("features").children())
    dense = next(i for i, layer in enumerate(layers) if isinstance(layer, nn.Linear))
    recovered = torch.stack([gradients.dense_input(one, f"features.{dense}") for one in observed])
    start = adversary.random_inputs(len(observed), *knowledge.image_shape)
    found, _ = gradients.from_features(nn.Sequential(*layers[:dense]), recovered, start, budget.iterations,
                                       adversary.tv_weight(1e-4), not knowledge.has_encoder, lr=0.1)
    labels = torch.cat([gradients.labels_of(one, 1) for one in observed])
    return adversary.decode_inputs(found, labels), labels


def trunk_analytic(adversary: Adversary, observed: list[State], count: int) -> tuple[Tensor, Tensor]:
    """``analytic``, through an encoder's trunk that travels: its input is the image itself."""
    trunk = held(adversary.knowledge.next_trunk)
    layers = list(trunk.children())
    dense = next(i for i, layer in enumerate(layers) if isinstance(layer, nn.Linear))
    recovered = torch.stack([gradients.dense_input(one, f"trunk.{dense}") for one in observed])
    found, _ = gradients.from_features(nn.Sequential(*layers[:dense]), recovered,
                                       adversary.random_images(len(observed)), adversary.budget.iterations, 1e-4,
                                       True, lr=0.1)
    return found, torch.cat([gradients.labels_of(one, 1) for one in observed])


def gauss_newton(adversary: Adversary, observed: list[State], count: int) -> tuple[Tensor, Tensor]:
    """The head's input by ``newton.head_input``, exact where it converges."""
    knowledge, budget = adversary.knowledge, adversary.budget
    found = newton.head_input(held(knowledge.next_head), observed, knowledge.image_shape,
                              hops=max(1, budget.iterations // 40), copies=budget.restarts)
    labels = torch.cat([gradients.labels_of(one, 1) for one in observed])
    return adversary.decode_inputs(found[None], labels), labels


def feature_alignment(adversary: Adversary, observed: list[State], count: int) -> tuple[Tensor, Tensor]:
    """``newton.head_input``, then a decoder behind a shadow encoder that is aligned with the latents found."""
    knowledge, budget = adversary.knowledge, adversary.budget
    found = flatten(newton.head_input(held(knowledge.next_head), observed, knowledge.image_shape,
                                      hops=max(1, budget.iterations // 40), copies=budget.restarts))
    labels = torch.cat([gradients.labels_of(one, 1) for one in observed])
    images, classes = adversary.public_of(labels)
    shadow = learnt.shadow_encoder(knowledge, adversary.start, images, classes, budget.epochs, adversary.kl_weight,
                                   learnt.moments_apart(found, labels))
    decode = learnt.latent_decoder(*posterior_in_parts(shadow, images), images, budget.epochs)
    return decode(found)[None], labels


def gradient_reidentification(adversary: Adversary, observed: list[State], candidates: Tensor) -> tuple[Tensor, Tensor]:
    """``newton.head_input``, then the log-likelihood ``N x M`` of candidates for the latents found.

    The encoder is the seeded start before the first round, which the server knows, and later a shadow encoder.
    """
    knowledge, budget = adversary.knowledge, adversary.budget
    found = flatten(newton.head_input(held(knowledge.next_head), observed, knowledge.image_shape,
                                      hops=max(1, budget.iterations // 40), copies=budget.restarts))
    labels = torch.cat([gradients.labels_of(one, 1) for one in observed])
    return latents.log_likelihood(adversary, [latents.Seen(found[None])], candidates), labels


def invert_update(adversary: Adversary, observed: list[State], count: int,
                  steps: int) -> tuple[Tensor, Tensor]:
    """``gradients.invert`` on what ``observe_update`` gives, by simulating the same steps."""
    knowledge, budget = adversary.knowledge, adversary.budget
    head, batch = held(knowledge.next_head), -(-count // steps)
    labels = gradients.labels_of(observed[0], count, min(steps, count))
    start = adversary.random_inputs(1, count, *knowledge.image_shape)
    found, _ = gradients.invert(lambda x, y: gradients.epoch_update(head, x, y, budget.lr, batch),
                                stacked(observed), labels[None], start, budget.iterations,
                                adversary.tv_weight(1e-2), not knowledge.has_encoder)
    return adversary.decode_inputs(found.squeeze(1), labels), labels


def observe_scores(victim: Victim, x: Tensor, y: Tensor, budget: Budget) -> Tensor:
    """The prediction service's answers, ``N x num_classes``: the largest ``top_scores``, and 0 elsewhere."""
    return victim.answers(x, budget.draws, budget.top_scores)


def decode_scores(adversary: Adversary, observed: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """A decoder of scores, trained on the service's answers to public images (Yang et al. 2019, arXiv
    1902.08552)."""
    def centred(answers: Tensor) -> Tensor:
        logs = answers.clamp_min(1e-8).log()
        return logs - logs.mean(1, keepdim=True)
    query, images = held(adversary.knowledge.query), adversary.public.images
    answers = torch.cat([centred(query(part)) for part in images.split(64)])
    decode = learnt.decoder(answers, None, images, adversary.budget.epochs)
    return decode(centred(observed))[None], observed.argmax(1)


# What an attack may need beside the right adversary: (target, adversary) -> why it is missing, or None.

def shared_head(target: Target, adversary: str) -> str | None:
    """Some of the head travels, or the adversary does not depend on that."""
    return None if travels(target) or adversary == "stolen_model" else "nothing travels with this method"


def other_client(target: Target, adversary: str) -> str | None:
    """A curious client is another one than the victim."""
    alone = adversary == "curious_client" and target.options["num_users"] == 1
    return "the run has no other client" if alone else None


def whole_head(target: Target, adversary: str) -> str | None:
    """The adversary has every part of the head; a client always has its own copy of what does not travel."""
    lacking = adversary == "curious_server" and "classifier.output.bias" not in travels(target)
    return "part of the head stays with the clients" if lacking else None


def encoder(target: Target, adversary: str) -> str | None:
    """There are latents."""
    return None if target.has_encoder else "this method has no latents"


def shared_trunk(target: Target, adversary: str) -> str | None:
    """The encoder's trunk travels."""
    return None if "encoder.trunk.0.weight" in travels(target) else "no trunk of an encoder travels"


def noise(target: Target, adversary: str) -> str | None:
    """The latents have noise."""
    return None if METHODS[target.options["method"]].network.variational else "this method's encoder has no noise"


def travels(target: Target) -> State:
    """What the method's clients upload, of an untrained network."""
    return METHODS[target.options["method"]].shared_and_private(target.network().state_dict())[0]


@dataclass(frozen=True)
class Attack:
    """A row of the table.

    Attributes:
        solve: the attack's function. An attack on a class is called with the adversary and the labels. One on
            single images is called with the adversary, what was observed of them, and their number; if it
            chooses among candidates, with the candidates ``M x C x H x W`` in place of the number.
        observe: what the adversary observes of single images; None for an attack on a class.
        adversaries: who can run it.
        source: where it was published, or what it does.
        needs: conditions on the run, checked in this order.
        unordered: what is observed says nothing about the order of the images, so scoring pairs
            reconstructions with true images by assignment.
        chooses: the true image is among given candidates. The attack makes no image, but gives the
            log-likelihood of each candidate, ``N x M``, up to a constant.
        cheap: so little an image that all of a client's images are attacked by default.
    """

    solve: Callable[..., Any]
    observe: Callable[..., Any] | None
    adversaries: tuple[str, ...]
    source: str
    needs: tuple[Callable[[Target, str], str | None], ...] = ()
    unordered: bool = False
    chooses: bool = False
    cheap: bool = False

    @property
    def of_latents(self) -> bool:
        """Whether ``--observe`` says what is observed."""
        return self.observe is latents.observe

    @property
    def kind(self) -> str:
        """``class`` or ``image``: whether it draws a class, or observes something of single images."""
        return "class" if self.observe is None else "image"


WHITE_BOX = ("curious_server", "stolen_model", "curious_client")
SERVER, STOLEN, SERVICE = ("curious_server",), ("stolen_model",), ("prediction_api",)
HEAD = (shared_head, other_client, whole_head)
# In the order in which they run. An adversary's attacks share what the first of them trained, so a new row goes
# behind those of its adversary: before them it would change what they find.
ATTACKS = {
    "mi_face": Attack(mi_face, None, WHITE_BOX, "Fredrikson et al. 2015", HEAD),
    "margin": Attack(margin, None, WHITE_BOX, "margin, total variation, restarts", HEAD),
    "margin_mu": Attack(partial(margin, draws=0), None, STOLEN, "the same, through the mean of z alone",
                           (noise,)),
    "gmi": Attack(gmi, None, WHITE_BOX, "after Zhang et al. 2020, arXiv 1911.07135", HEAD),
    "dlg": Attack(dlg, observe_gradients, SERVER, "Zhu et al. 2019, arXiv 1906.08935", HEAD),
    "cosine_tv": Attack(cosine_tv, observe_gradients, SERVER, "Geiping et al. 2020, arXiv 2003.14053", HEAD),
    "analytic": Attack(analytic, observe_gradients, SERVER, "Phong et al. 2018, then a search", HEAD),
    "batch": Attack(partial(invert_update, steps=1), partial(observe_update, steps=1), SERVER,
                    "cosine_tv, of the mean gradient of several images", HEAD, unordered=True),
    "epoch": Attack(partial(invert_update, steps=2), partial(observe_update, steps=2), SERVER,
                    "a local epoch simulated, after Geiping et al.", HEAD, unordered=True),
    "gauss_newton": Attack(gauss_newton, observe_gradients, SERVER, "exact where it converges", HEAD),
    "feature_alignment": Attack(feature_alignment, observe_gradients, SERVER,
                      "gauss_newton, and a shadow encoder with the moments of its latents, after Xu et al. 2024",
                      (*HEAD, encoder)),
    "trunk_analytic": Attack(trunk_analytic, observe_trunk, SERVER, "analytic, through a trunk that is shared",
                             (shared_head, shared_trunk)),
    "gradient_reidentification": Attack(gradient_reidentification, observe_gradients, SERVER,
                                  "gauss_newton, and the candidate with the largest log q(z|x)", (*HEAD, encoder),
                                  chooses=True),
    "latent_decoder": Attack(latents.decode, latents.observe, STOLEN, "a decoder trained on public images",
                             (encoder,), cheap=True),
    "reidentification": Attack(latents.likelihood, latents.observe, STOLEN,
                                "the candidate with the largest log q(z|x)", (encoder,), chooses=True,
                                cheap=True),
    "latent_generator": Attack(latents.most_likely, latents.observe, STOLEN,
                           "a search in a generator of public images", (encoder,)),
    "latent_search": Attack(latents.search, latents.observe, STOLEN, "Mahendran and Vedaldi 2015", (encoder,)),
    "posterior_mean": Attack(latents.posterior_mean, latents.observe, STOLEN,
                             "the public images' mean, weighted by q(z|x)", (encoder,), cheap=True),
    "score_decoder": Attack(decode_scores, observe_scores, SERVICE, "Yang et al. 2019, arXiv 1902.08552",
                            cheap=True),
}


def unfit(name: str, adversary: str, target: Target) -> str | None:
    """Why this adversary of this run cannot use an attack, in words; None if it can."""
    attack = ATTACKS[name]
    if adversary not in attack.adversaries:
        return "needs what this adversary does not have"
    return next(filter(None, (need(target, adversary) for need in attack.needs)), None)
