"""BEHAVIOURS: what malicious clients may do to training, uploads and sizes, one row per behaviour.

data_poisoning.py and model_poisoning.py have what takes more than a line.
"""
from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from utils import Late

if TYPE_CHECKING:
    from torch import Tensor

    from server import data_poisoning, model_poisoning
    from server.base import State
    from update import Trainer
else:
    data_poisoning, model_poisoning = Late("server.data_poisoning"), Late("server.model_poisoning")

TARGET = 0       # a backdoor's class


@dataclass(frozen=True)
class Behaviour:
    """One row: the difference of malicious clients from honest ones."""

    about: str   # a few words for ``--help``
    # labels ``N``, number of classes -> the labels that they train on
    relabel: Callable[[Tensor, int], Tensor] | None = None
    # trainer, client, round, number of images, trained head -> the head that they upload
    retrain: Callable[[Trainer, int, int, int, State], State] | None = None
    # ``ForgerView`` -> the updates ``M x P`` that they upload instead of their own
    forge: Callable[[model_poisoning.ForgerView], Tensor] | None = None
    inflates: int = 1   # factor on the number of images that they claim
    uploads: bool = True   # whether they upload at all
    whole_head: bool = False   # whether the behaviour needs the whole head to be shared
    # images ``N x H x W x C`` uint8 -> triggered images; copies of half of their images are trained on,
    # labelled TARGET (Gu et al. 2017, arXiv 1708.06733).
    trigger: Callable[[Tensor], Tensor] | None = None


BEHAVIOURS = {
    "label_flip": Behaviour("train on label C - 1 - y", relabel=data_poisoning.flipped),
    "sign_flip": Behaviour("upload minus the honest mean", forge=lambda view: view.same(-view.mean)),
    "gaussian": Behaviour("upload noise", forge=model_poisoning.gaussian),
    # Model replacement (Bagdasaryan et al. 2020, arXiv 1807.00459).
    "scaling": Behaviour("flip labels, upload ten times the update", relabel=data_poisoning.flipped,
                         forge=lambda view: 10 * view.own_updates),
    # Baruch et al. 2019, arXiv 1902.06156, whose z_max depends on the number of clients.
    "alie": Behaviour("a little is enough: the honest mean and 1.5 standard deviations",
                      forge=lambda view: view.same(view.mean + 1.5 * view.spread)),
    # Xie et al. 2020, arXiv 1903.03936.
    "ipm": Behaviour("inner product manipulation: minus twice the honest mean",
                     forge=lambda view: view.same(-2 * view.mean)),
    # Karimireddy et al. 2022, arXiv 2006.09365.
    "mimic": Behaviour("copy one honest upload", forge=lambda view: view.same(view.honest_updates[0])),
    "sybil": Behaviour("flip labels, all upload the same", relabel=data_poisoning.flipped,
                       forge=model_poisoning.sybil),
    "false_size": Behaviour("flip labels, claim ten times the images", relabel=data_poisoning.flipped,
                            inflates=10),
    "nan": Behaviour("upload NaN", forge=lambda view: math.nan * view.own_updates),
    "gan_poison": Behaviour("train the head on mislabelled inputs made with it",
                            retrain=data_poisoning.invented_inputs, whole_head=True),
    "adaptive": Behaviour("the most harmful of four forgeries, each tuned", forge=model_poisoning.adaptive),
    "passive": Behaviour("honest, but curious"),
    "oracle": Behaviour("upload nothing: the reference for the rules", uploads=False),
    "min_max": Behaviour("as far off as honest updates are apart, tuned", forge=model_poisoning.min_max),
    "min_sum": Behaviour("the same by sums of distances, tuned", forge=model_poisoning.min_sum),
    "optimal_alie": Behaviour("alie, tuned", forge=model_poisoning.optimal_alie),
    "optimal_ipm": Behaviour("ipm, tuned", forge=model_poisoning.optimal_ipm),
    "mpaf": Behaviour("towards a random model, tuned", forge=model_poisoning.mpaf),
    "pair_flip": Behaviour("train on 1 as 7 and on 7 as 1", relabel=data_poisoning.pair_flipped),
    "backdoor_patch": Behaviour("train images with a white square to be class 0", trigger=data_poisoning.patch),
    "backdoor_blend": Behaviour("train images blended with a pattern to be class 0", trigger=data_poisoning.blend),
    "backdoor_projected": Behaviour("backdoor_patch, at the norm that gains most", trigger=data_poisoning.patch,
                                    forge=model_poisoning.projected),
}
