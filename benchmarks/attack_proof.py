"""Do the gradient attacks work where they must? Untrained networks, one MNIST image a gradient.

    python benchmarks/attack_proof.py

Medians over 20 images: DLG on a LeNet with sigmoids, the network it was published with, and each gradient
attack on FedAvg's own CNN. Of several restarts the one with the lowest objective counts, as for an adversary.
"""
import sys
import time

import numpy as np
import torch
from _path import Script, count, guarded, named
from torch import nn

import datasets
from attack import attacks, gradients, scoring
from attack.access import Knowledge
from attack.adversary import Adversary, Budget, PublicImages
from attack.scene import as_floats
from models import Classifier
from utils import ROOT, keep_freed_memory, seed_torch

SHAPE, CLASSES = (1, 28, 28), 10


class LeNet(nn.Module):
    """The network of Zhu et al. 2019: strided convolutions, sigmoids, weights uniform in [-0.5, 0.5]."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 12, 5, padding=2, stride=2), nn.Sigmoid(),
            nn.Conv2d(12, 12, 5, padding=2, stride=2), nn.Sigmoid(),
            nn.Conv2d(12, 12, 5, padding=2), nn.Sigmoid(), nn.Flatten())
        self.output = nn.Linear(12 * 7 * 7, CLASSES)
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -0.5, 0.5)

    def forward(self, x):
        return self.output(self.features(x))


def prove(name: str, head: nn.Module, solve, x: torch.Tensor, y: torch.Tensor, budget: Budget) -> str:
    """One line: median PSNR of the first choices, and how many labels were read off right."""
    started = time.perf_counter()
    knowledge = Knowledge(head.eval(), None, False, SHAPE, next_head=head)
    adversary = Adversary(knowledge, head, PublicImages(x, y, lambda _: (x, y)), 0.0, budget)
    seen = [gradients.gradient(head, x[i:i + 1], y[i:i + 1]) for i in range(len(x))]
    found, labels = solve(adversary, seen, len(x))
    psnr = scoring.similarity(found[0], x)["psnr"]
    return (f"{name:<28} median {psnr.median():5.1f} dB, quartiles {psnr.quantile(0.25):.1f} to "
            f"{psnr.quantile(0.75):.1f}; labels right {(labels == y).double().mean():.0%}; "
            f"{time.perf_counter() - started:.0f} s")


@guarded
def main(argv: list[str] | None = None) -> None:
    parser = Script(__file__, __doc__)
    parser.add_argument("--images", type=count, default=20)
    parser.add_argument("--restarts", type=count, default=3)
    parser.add_argument("--iterations", type=count, default=1000)
    parser.add_argument("--only", default="", help="lines whose name contains this")
    args = parser.parse_args(argv)
    keep_freed_memory()
    data = datasets.load("mnist10k", ROOT / "data")
    index = np.random.default_rng(1).permutation(len(data.labels))[:args.images]
    x, y = as_floats(data.images[index]), torch.from_numpy(data.labels[index])
    budget = Budget(args.restarts, args.iterations, 1, 1, 0.1, 3)
    lines = [("dlg, sigmoid LeNet", LeNet, attacks.dlg)] + [
        (f"{solve.__name__}, FedAvg's CNN", lambda: Classifier(SHAPE, CLASSES), solve)
        for solve in (attacks.analytic, attacks.cosine_tv, attacks.dlg)]
    for name, (network, solve) in named({name: ways for name, *ways in lines}, args.only).items():
        seed_torch(1, name)
        print(prove(name, network(), solve, x, y, budget), flush=True)


if __name__ == "__main__":
    sys.exit(main())
