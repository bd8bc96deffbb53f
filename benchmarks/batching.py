"""What attacks gain from solving all their problems as one batch, rather than an image at a time.

    python benchmarks/batching.py

The same problems, starts and numbers of steps, in one process, by turns; each figure is a median. Nothing
stops early, so both ways do the same work whatever the weights: networks are untrained. MI-Face inverts ten
classes, MI-strong ten from three starts each; both together are the MI-Face set. RVE-PFL's answers are
averaged over draws of z, so for its head even an image alone is a batch, of draws. Gradient inversion
(cosine_tv) is of eight images, one a gradient, from three starts each. Measure on a quiet machine: on a busy
one the threads wait for each other at every operation, of which the loop has more.
"""
import statistics
import sys
import time
from collections.abc import Callable

import torch
from _path import Script, count, guarded, named

from attack import classes, gradients
from attack.access import Knowledge
from attack.attacks import stacked
from models import CNN, RVE
from utils import choose_device, environment, keep_freed_memory, seed_torch

SHAPE, CLASSES, RESTARTS, IMAGES = (1, 28, 28), 10, 3, 8
Way = Callable[[bool], None]   # whether all problems are one batch


def knowledge(split: bool) -> Knowledge:
    """An untrained network as an adversary holds it: RVE-PFL's, or FedAvg's CNN."""
    network = (RVE(SHAPE, CLASSES, -2.0) if split else CNN(SHAPE, CLASSES)).eval().requires_grad_(False)
    return Knowledge(network.classifier, network.encoder if split else None, split, SHAPE)


def class_inversion(view: Knowledge, draws: int, iterations: int) -> tuple[Way, Way]:
    """MI-Face and MI-strong."""
    labels, mean = torch.arange(CLASSES), torch.full(SHAPE, 0.3)
    start = (mean + 0.1 * torch.randn(RESTARTS, CLASSES, *SHAPE)).clamp(0, 1)

    def score(x):
        return view.logits(x, draws)

    def face(together):
        for part in labels.split(CLASSES if together else 1):
            classes.mi_face(score, part, SHAPE, iterations, patience=iterations, enough=2.0)

    def strong(together):
        size = (RESTARTS, CLASSES) if together else (1, 1)
        for row in start.split(size[0]):
            for part, y in zip(row.split(size[1], 1), labels.split(size[1]), strict=True):
                classes.margin(score, y, part, mean, iterations)
    return face, strong


def gradient_inversion(view: Knowledge, iterations: int) -> Way:
    """cosine_tv."""
    x, y, start = torch.rand(IMAGES, *SHAPE), torch.arange(IMAGES), torch.rand(RESTARTS, IMAGES, 1, *SHAPE)
    seen = [gradients.gradient(view.head, x[i:i + 1], y[i:i + 1]) for i in range(IMAGES)]

    def invert(together):
        size = (RESTARTS, IMAGES) if together else (1, 1)
        for row in start.split(size[0]):
            for i, part in enumerate(row.split(size[1], 1)):
                mine = slice(i * size[1], (i + 1) * size[1])
                gradients.invert(lambda a, b: gradients.gradient(view.head, a, b), stacked(seen[mine]),
                                 y[mine, None], part, iterations, 1e-2, True)
    return invert


def seconds(way: Way, repeats: int) -> tuple[float, float]:
    """Medians: an image at a time, and as one batch, by turns after a first of each."""
    took = {False: [], True: []}
    for turn in range(repeats + 1):
        for together, kept in took.items():
            started = time.perf_counter()
            way(together)
            if turn:
                kept.append(time.perf_counter() - started)
    return statistics.median(took[False]), statistics.median(took[True])


@guarded
def main(argv: list[str] | None = None) -> None:
    parser = Script(__file__, __doc__)
    parser.add_argument("--iterations", type=count, default=20, help="of each search")
    parser.add_argument("--repeats", type=count, default=5, help="turns whose median is taken")
    parser.add_argument("--draws", type=count, default=32, help="of z, for RVE-PFL")
    parser.add_argument("--only", default="", help="lines whose name contains this")
    args = parser.parse_args(argv)
    keep_freed_memory()
    seed_torch(1, "batching")
    cnn = knowledge(False)
    lines: dict[str, tuple[Way, ...]] = {
        "FedAvg, MI-Face set": class_inversion(cnn, 0, args.iterations),
        "RVE-PFL, MI-Face set": class_inversion(knowledge(True), args.draws, args.iterations),
        "FedAvg, gradient inversion": (gradient_inversion(cnn, args.iterations),)}
    chosen = named(lines, args.only)
    print(f"{environment(choose_device('cpu'))['device']}, PyTorch {torch.__version__}; "
          f"{args.iterations} steps, {args.draws} draws, medians of {args.repeats}\n"
          f"{'':<30}{'one at a time, s':>18}{'one batch, s':>14}{'x':>7}")
    for name, ways in chosen.items():
        found = [seconds(way, args.repeats) for way in ways]
        parts = zip((" mi_face", " margin"), found, strict=True) if len(found) > 1 else ()
        total = tuple(map(sum, zip(*found, strict=True)))
        for line, (alone, batch) in [*parts, (name, total)]:
            print(f"{line:<30}{alone:18.3f}{batch:14.3f}{alone / batch:7.2f}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
