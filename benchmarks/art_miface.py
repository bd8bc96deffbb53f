"""Our plain MI-Face beside that of the Adversarial Robustness Toolbox (ART), on the same network.

    pip install --target ART --no-deps adversarial-robustness-toolbox six     # aside: we do not depend on it
    python RVE-PFL.py --dataset mnist10k --partition iid --method fedavg --rounds 5 --local_ep 2
    PYTHONPATH=ART python benchmarks/art_miface.py --run mnist10k-iid-fedavg-seed1 --public fmnist

Both go from black images by the same learning rate for at most 3 * --iterations steps, all classes in a
batch; options are those of mi_attack.py. Once with the same numbers for when to stop (0.99, 100 steps), and
once without stopping, where both must go the same way. In ART 1.20 an image goes on *while* its cost is under
the threshold, so 0.99 stops nothing that is past a probability of 0.01. The evaluator has seen none of the
clients' images; likeness is that with the client's nearest training image of the class.
"""
import sys
import time
from collections.abc import Callable

import numpy as np
import torch
from _path import guarded
from torch import Tensor, nn

from attack import classes, mi_attack, scoring
from attack.access import Knowledge, hold, open_target
from attack.scene import Scene
from utils import InputError, keep_freed_memory

LR, ENOUGH, PATIENCE = 0.1, 0.99, 100


class Probabilities(nn.Module):
    """What ART calls a model: images to class probabilities."""

    def __init__(self, view: Knowledge):
        super().__init__()
        self.head, self.view = view.head, view

    def forward(self, x: Tensor) -> Tensor:
        return self.view.logits(x).exp()


def art_miface() -> tuple[type, type]:
    """ART's attack and its wrapper of a network, or InputError."""
    try:
        from art.attacks.inference.model_inversion import MIFace
        from art.estimators.classification import PyTorchClassifier
    except ImportError as error:
        raise InputError(f"ART cannot be imported ({error}); install it aside: pip install --target ART "
                         "--no-deps adversarial-robustness-toolbox six, and set PYTHONPATH=ART") from error
    return MIFace, PyTorchClassifier


def contenders(view: Knowledge, labels: Tensor, iterations: int) -> dict[str, Callable[[], Tensor]]:
    """Each way to the images, ``P x C x H x W``."""
    attack, wrapper = art_miface()

    def art(threshold):
        classifier = wrapper(Probabilities(view), nn.CrossEntropyLoss(), view.image_shape,
                             view.head.output.out_features, clip_values=(0.0, 1.0), device_type="cpu")
        found = attack(classifier, iterations, PATIENCE, threshold, LR, len(labels), verbose=False).infer(
            np.zeros((len(labels), *view.image_shape), np.float32), labels.numpy())
        return torch.from_numpy(found)

    def ours(enough, patience):
        return classes.mi_face(view.logits, labels, view.image_shape, iterations, LR, patience, enough)
    return {"ART": lambda: art(ENOUGH), "ours": lambda: ours(ENOUGH, PATIENCE),
            "ART, never stopping": lambda: art(1.0), "ours, never stopping": lambda: ours(1.1, iterations)}


def compare(argv: list[str] | None) -> None:
    """The table."""
    args = mi_attack.make_parser().parse(argv)
    art_miface()
    run = open_target(args.run, args.results_dir, args.models_dir, args.data_dir)
    round, client = (args.rounds or [run.latest_round()])[0], args.clients[0]
    view, scene = hold(run, "curious_server", round, client), Scene(run, args)
    if view.head is None or view.has_encoder:
        raise InputError(f"--run {args.run}: its server cannot go from images to classes; give a fedavg run")
    labels = scene.labels(torch.from_numpy(scene.train[client])).unique()
    print(f"{scene.about()}\n"
          f"{'':<24}{'evaluator':>10}{'least p':>9}{'mean p':>9}{'PSNR':>7}{'SSIM':>7}{'s':>7}")
    for name, invert in contenders(view, labels, 3 * args.iterations).items():
        started = time.perf_counter()
        found = invert()
        took = time.perf_counter() - started
        truth = scene.pixels(scene.nearest(found[None], labels, client)[0][0])
        like = scoring.similarity(found, truth)
        right = int((scene.evaluator.classes(found) == labels).sum())
        with torch.no_grad():
            p = view.logits(found).exp().gather(1, labels[:, None])
        print(f"{name:<24}{right:>7}/{len(labels)}{p.min():9.4f}{p.mean():9.4f}{like['psnr'].mean():7.1f}"
              f"{like['ssim'].mean():7.2f}{took:7.1f}", flush=True)


@guarded
def main(argv: list[str] | None = None) -> int:
    keep_freed_memory()
    compare(argv)
    return 0


if __name__ == "__main__":
    sys.exit(main())
