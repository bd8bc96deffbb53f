"""Our gradient inversion beside the published settings of the attack, on the same gradients and the same budget.

    python benchmarks/inverting_gradients.py --run mnist10k-shards-fedavg-seed1 --rounds 1 --iterations 24000

The reference is a plain loop written anew with the settings that `breaching` ships for Geiping et al. 2020
(arXiv 2003.14053): cosine distance, total variation of weight 0.2, signed Adam of step 0.1 divided by ten after
3/8, 5/8 and 7/8 of 24,000 steps, pixels kept in their range, one start from normal noise, one image at a time, a
label known. Ours are attack/attacks.py's rows `cosine_tv`, `analytic` and `gauss_newton`, of --images images.
"""
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from _path import guarded
from torch import Tensor, nn

from attack import attacks, gradients, mi_attack, scoring
from attack.access import Victim, held, open_target
from attack.pairs import candidates
from attack.scene import FEW_IMAGES, Scene
from server.base import State
from utils import InputError, keep_freed_memory, seed_torch

TV, STEP, DECAY = 0.2, 0.1, (3 / 8, 5 / 8, 7 / 8)


def reference(head: nn.Module, observed: State, label: Tensor, start: Tensor, iterations: int) -> Tensor:
    """The image behind one gradient, ``1 x C x H x W``, by the published settings."""
    names, parameters = zip(*head.named_parameters(), strict=True)
    parameters = [p.detach().requires_grad_() for p in parameters]
    goal = [observed[name] for name in names]
    x = start.clone().requires_grad_()
    optimizer = torch.optim.Adam([x], STEP)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [int(share * iterations) for share in DECAY])
    for _ in range(iterations):
        optimizer.zero_grad()
        logits = torch.func.functional_call(head, dict(zip(names, parameters, strict=True)), (x,))
        found = torch.autograd.grad(F.cross_entropy(logits, label), parameters, create_graph=True)
        dot = sum((a * b).sum() for a, b in zip(found, goal, strict=True))
        sizes = [sum(a.square().sum() for a in part).sqrt() for part in (found, goal)]
        variation = (x.diff(dim=2).abs().mean() + x.diff(dim=3).abs().mean())
        (1 - dot / (sizes[0] * sizes[1]) + TV * variation).backward(inputs=[x])
        x.grad.sign_()
        optimizer.step()
        schedule.step()
        x.data.clamp_(0, 1)
    return x.detach()


def compare(argv: list[str] | None) -> None:
    """The table."""
    args = mi_attack.make_parser().parse(argv)
    run = open_target(args.run, args.results_dir, args.models_dir, args.data_dir)
    if run.has_encoder:
        raise InputError(f"--run {args.run}: behind an encoder there are latents; give a fedavg run")
    round, client = (args.rounds or [run.latest_round()])[0], args.clients[0]
    scene = Scene(run, args)
    adversary = scene.adversary("curious_server", round, client)
    head = held(adversary.knowledge.next_head)
    order = scene.order(client, round)
    numbers = order[:args.images or FEW_IMAGES]
    truth, labels = (of(torch.from_numpy(numbers)) for of in (scene.pixels, scene.labels))
    observed = attacks.observe_gradients(Victim(run, round, client), truth, labels, scene.budget)

    def published() -> Tensor:
        return torch.cat([reference(head, one, gradients.labels_of(one, 1), torch.randn_like(truth[:1]),
                                    args.iterations) for one in observed])
    ways: dict[str, Callable[[], Tensor]] = {"published": published}
    for name in ("cosine_tv", "analytic", "gauss_newton"):
        ways[name] = lambda name=name: attacks.ATTACKS[name].solve(adversary, observed, len(truth))[0][0]
    print(f"{args.run}, round {round}, client {client}, {len(truth)} images, {args.iterations} iterations\n"
          f"{'':<14}{'PSNR':>7}{'median':>8}{'least':>7}{'SSIM':>7}{'rank 1':>8}{'s':>8}")
    for name, find in ways.items():
        seed_torch(args.seed, "inverting", client, round)
        started = time.perf_counter()
        found = find()
        took, like = time.perf_counter() - started, scoring.similarity(found, truth)
        first = sum(int((one.rank(scoring.distances(found[one.part], scene.pixels(one.numbers))[None]).rank == 1)
                        .sum()) for one in candidates(run.data.labels, order, numbers))
        psnr = like["psnr"]
        print(f"{name:<14}{psnr.mean():7.1f}{psnr.median():8.1f}{psnr.min():7.1f}{like['ssim'].mean():7.2f}"
              f"{first:>4}/{len(truth):<3}{took:8.0f}", flush=True)


@guarded
def main(argv: list[str] | None = None) -> int:
    keep_freed_memory()
    compare(argv)
    return 0


if __name__ == "__main__":
    sys.exit(main())
