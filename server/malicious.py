"""Simulated malicious clients: who they are, and what each behaviour does to training, upload and size.

A behaviour knows what its adversary could: its own data and update, and, where the published attack says so
(ALIE, IPM, mimic, sign flip), everybody's updates. All malicious clients of a run behave alike.
"""
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

from engine.stacked import Outcome, train_each
from server.mean import Server, State, is_finite, moved, updates_of
from server.robust import round_down
from update import Client, Diverged
from utils import rng, torch_rng

Judge = Callable[[Tensor], float]   # forged updates -> the least trust that the server would have in one


@dataclass(frozen=True)
class Seen:
    """What a forger works with: updates as rows."""

    own: Tensor      # M x P, of the malicious clients, as trained
    honest: Tensor   # H x P; their own where nobody is honest
    draw: torch.Generator
    judge: Judge


def sign_flip(seen: Seen) -> Tensor:
    """The honest mean, turned round."""
    from byzfl import SignFlipping
    return SignFlipping()(seen.honest).expand_as(seen.own)


def gaussian(seen: Seen) -> Tensor:
    """Noise three times as long as the honest updates."""
    size = 3 * seen.honest.square().mean().sqrt()
    return size * torch.randn(seen.own.shape, generator=seen.draw)


def scaling(seen: Seen) -> Tensor:
    """Their own, ten times as long: model replacement (Bagdasaryan et al. 2020, arXiv 1807.00459)."""
    return 10 * seen.own


def alie(seen: Seen) -> Tensor:
    """Honest mean and 1.5 standard deviations: a little is enough (Baruch et al. 2019, arXiv 1902.06156)."""
    from byzfl import ALittleIsEnough
    honest = seen.honest if len(seen.honest) > 1 else seen.honest.repeat(2, 1)
    return ALittleIsEnough(tau=1.5)(honest).expand_as(seen.own)


def ipm(seen: Seen) -> Tensor:
    """Minus twice the honest mean: inner product manipulation (Xie et al. 2020, arXiv 1903.03936)."""
    from byzfl import InnerProductManipulation
    return InnerProductManipulation(tau=2.0)(seen.honest).expand_as(seen.own)


def mimic(seen: Seen) -> Tensor:
    """All send one honest client's update, whose data then count too much (Karimireddy et al. 2022,
    arXiv 2006.09365)."""
    from byzfl import Mimic
    return Mimic(epsilon=0)(seen.honest).expand_as(seen.own)


def sybil(seen: Seen) -> Tensor:
    """One client's poison sent by all, each with a hundredth of noise of its own (Fung et al. 2020,
    arXiv 1808.04866)."""
    poison = seen.own.mean(0)
    noise = torch.randn(seen.own.shape, generator=seen.draw)
    return poison + 0.01 * poison.square().mean().sqrt() * noise


def nan(seen: Seen) -> Tensor:
    """Not a number."""
    return torch.full_like(seen.own, torch.nan)


def adaptive(seen: Seen, trusted: float = 0.9, steps: int = 12) -> Tensor:
    """Their own honest update minus as much of the honest mean as the server's rule, which they know, still
    trusts at ``trusted`` or more (after min-max, Shejwalkar and Houmansadr, NDSS 2021)."""
    against = -seen.honest.mean(0)
    low, high = 0.0, 20.0
    if seen.judge(seen.own + high * against) >= trusted:
        return seen.own + high * against
    for _ in range(steps):
        middle = (low + high) / 2
        low, high = (middle, high) if seen.judge(seen.own + middle * against) >= trusted else (low, middle)
    return seen.own + low * against


@dataclass(frozen=True)
class Behaviour:
    """How malicious clients differ from honest ones."""

    about: str
    flips: bool = False                                  # trains on label C - 1 - y instead of y
    forge: Callable[[Seen], Tensor] | None = None        # what it uploads instead of what it trained
    inflates: int = 1                                    # claims so many times its images
    invents: bool = False                                # trains the head on inputs of its own making
    uploads: bool = True


BEHAVIOURS = {
    "label_flip": Behaviour("labels turned round", flips=True),
    "sign_flip": Behaviour("the honest mean turned round", forge=sign_flip),
    "gaussian": Behaviour("noise", forge=gaussian),
    "scaling": Behaviour("flipped labels, ten times as long", flips=True, forge=scaling),
    "alie": Behaviour("a little is enough", forge=alie),
    "ipm": Behaviour("inner product manipulation", forge=ipm),
    "mimic": Behaviour("copies of one honest upload", forge=mimic),
    "sybil": Behaviour("one poison from all", flips=True, forge=sybil),
    "false_size": Behaviour("flipped labels, ten times the images claimed", flips=True, inflates=10),
    "nan": Behaviour("not a number", forge=nan),
    "gan_poison": Behaviour("mislabelled inputs made with the head itself", invents=True),
    "adaptive": Behaviour("as much harm as keeps the server's trust", forge=adaptive),
    "passive": Behaviour("honest, but watching"),
    "absent": Behaviour("uploads nothing: the oracle that the others are compared with", uploads=False),
}


class Crowd:
    """The malicious clients of a run.

    Args:
        frac: share of the clients, rounded down.
    """

    def __init__(self, behaviour: str | None, frac: float, clients: int, seed: int):
        self.behaviour, self.seed = BEHAVIOURS[behaviour or "passive"], seed
        count = round_down(frac * clients)
        self.members = frozenset(rng(seed, "malicious").permutation(clients)[:count].tolist())

    def train_each(self, client: Client, round: int, indices: dict[int, np.ndarray], sent: State,
                   private: Callable, stack: int) -> Iterator[tuple[int, Outcome]]:
        """``stacked.train_each``, the malicious ones on what they make of their data."""
        yield from train_each(client, round, {k: own for k, own in indices.items() if k not in self.members},
                              sent, private, stack)
        bad = {k: own for k, own in indices.items() if k in self.members}
        if bad and self.behaviour.flips:
            client = replace(client, labels=client.num_classes - 1 - client.labels)
        for k, outcome in train_each(client, round, bad, sent, private, stack):
            if self.behaviour.invents and not isinstance(outcome, Diverged):
                outcome = (self._invented(client, k, round, indices[k], outcome[0]), *outcome[1:])
            yield k, outcome

    def forge(self, server: Server, round: int, sent: State, uploads: dict[int, State],
              sizes: dict[int, int]) -> tuple[dict[int, State], dict[int, int]]:
        """What reaches the server: the uploads and the sizes claimed, after the malicious clients' turn."""
        bad = [k for k in sorted(uploads) if k in self.members]
        claimed = {k: n * (self.behaviour.inflates if k in self.members else 1) for k, n in sizes.items()}
        if bad and not self.behaviour.uploads:
            return ({k: upload for k, upload in uploads.items() if k not in self.members},
                    {k: n for k, n in claimed.items() if k not in self.members})
        if not bad or self.behaviour.forge is None:
            return uploads, claimed
        own = updates_of(sent, [uploads[k] for k in bad])
        honest = [k for k in sorted(uploads) if k not in self.members and is_finite(uploads[k])]

        def arrived(forged: Tensor) -> dict[int, State]:
            return {**uploads, **{k: moved(sent, row) for k, row in zip(bad, forged, strict=True)}}

        def judge(forged: Tensor) -> float:
            trust = server.trust(round, sent, arrived(forged), claimed)
            return min(trust[k] for k in bad)
        seen = Seen(own, updates_of(sent, [uploads[k] for k in honest]) if honest else own,
                    torch_rng(self.seed, "forge", round=round), judge)
        return arrived(self.behaviour.forge(seen)), claimed

    def _invented(self, client: Client, k: int, round: int, indices: np.ndarray, head: State) -> State:
        """The head trained on: inputs that it takes for each class in turn, made by gradient ascent from
        noise, labelled as the next class (after PoisonGAN, Zhang et al. 2021, with the ascent in place of a
        generator, since the head's input is a latent here)."""
        drawn = torch_rng(self.seed, "invent", k, round)
        network, state = client.model.classifier.eval(), {
            name.removeprefix("classifier."): value.to(client.labels.device, copy=True).requires_grad_()
            for name, value in head.items()}
        count = min(len(indices), client.batch_size)
        labels = torch.arange(count) % client.num_classes
        shape = client.images.shape[3], *client.images.shape[1:3]
        x = torch.randn(count, *shape, generator=drawn).to(client.labels.device).requires_grad_()
        labels = labels.to(x.device)
        for optimizer, wanted, steps in ((torch.optim.Adam([x], 0.1), labels, 20),
                                         (torch.optim.Adam(state.values(), client.lr),
                                          (labels + 1) % client.num_classes, 4 * client.epochs)):
            for _ in range(steps):
                optimizer.zero_grad()
                F.cross_entropy(functional_call(network, state, (x,)), wanted).backward()
                optimizer.step()
        return {f"classifier.{name}": value.detach().cpu() for name, value in state.items()}
