"""Does one image's gradient determine the head's input? Singular values of attack/newton.py's equations there.

    python benchmarks/conditioning.py --run mnist10k-shards-rve_pfl-seed1

Two systems of equations for each image: the features before the dense layer alone, which ReLU and max pooling have
made of the input, and together with the gradient of the last convolution, which says what each pool chose. A rank
as great as the number of unknowns means that no other input nearby has the same gradient: a search that does not
find it has failed, and not met a defence. How near it has to start is another question. Writes
results/<run>/conditioning.csv.
"""
import sys
from pathlib import Path

import pandas as pd
import torch
from _path import ROOT, Script, count, guarded, index
from torch.func import jvp, vmap

from attack import newton
from attack.access import Victim, held, hold, open_target
from attack.attacks import part_of
from attack.scene import CLIENT_LR, as_floats
from utils import InputError, keep_freed_memory, rng, seed_torch, write_whole

AT_ONCE = 32       # columns of a Jacobian
NOTHING = 1e-4     # of the largest: a singular value below it counts as 0


def singular_values(problem: newton.Problem, x: torch.Tensor, with_routed: bool) -> torch.Tensor:
    """Of one problem's Jacobian at its solution ``1 x C x H x W``, in falling order, ``C H W``."""
    residuals = problem.residuals(torch.tensor([0]), with_routed)
    columns = [vmap(lambda way: jvp(residuals, (x,), (way,))[1][0])(part.unflatten(1, x.shape))
               for part in torch.eye(x.numel()).split(AT_ONCE)]
    jacobian = torch.cat(columns).double()
    return torch.linalg.eigvalsh(jacobian @ jacobian.T).clamp_min(0).sqrt().flip(0)


def examine(victim: Victim, head: torch.nn.Module, image: torch.Tensor, label: torch.Tensor) -> list[dict]:
    """The rows of one image ``1 x C x H x W``."""
    behind: list[torch.Tensor] = []
    update = victim.update(image, label, CLIENT_LR, inputs=behind)
    problem = newton.problem_of(head, [part_of(update, "classifier.")])
    rows = []
    for equations in ("features", "features and gradient"):
        values = singular_values(problem, behind[0], equations != "features")
        rank = int((values > NOTHING * values[0]).sum())
        rows.append({"equations": equations, "active": (problem.features > 0).double().mean().item(),
                     "unknowns": len(values), "rank": rank, "spread": (values[0] / values[rank - 1]).item()})
    return rows


@guarded
def main(argv: list[str] | None = None) -> int:
    parser = Script(__file__, __doc__)
    parser.add_argument("--run", required=True)
    parser.add_argument("--round", type=count, help="the latest if not given")
    parser.add_argument("--client", type=index, default=0)
    parser.add_argument("--images", type=count, default=3)
    parser.add_argument("--seed", type=index, default=1)
    for name, folder in (("results_dir", "results"), ("models_dir", "saved_models"), ("data_dir", "data")):
        parser.add_argument(f"--{name}", type=Path, default=ROOT / folder)
    args = parser.parse_args(argv)
    keep_freed_memory()
    target = open_target(args.run, args.results_dir, args.models_dir, args.data_dir)
    round = target.latest_round() if args.round is None else args.round
    if not 0 <= args.client < target.options["num_users"]:
        raise InputError(f"--client {args.client}: clients are 0 to {target.options['num_users'] - 1}")
    victim = Victim(target, round, args.client)
    head = held(hold(target, "curious_server", round, args.client).next_head)
    seed_torch(args.seed, "conditioning")
    drawn = rng(args.seed, "conditioning").permutation(target.owned()[0][args.client])[:args.images]
    images, labels = as_floats(target.data.images[drawn]), torch.from_numpy(target.data.labels[drawn])
    rows = [{"round": round, "client": args.client, "image": i, **row} for i in range(len(drawn))
            for row in examine(victim, head, images[i:i + 1], labels[i:i + 1])]
    table = pd.DataFrame(rows)
    write_whole(target.results / "conditioning.csv", lambda file: table.to_csv(
        file, index=False, float_format="%.4g"))
    print(table.to_string(index=False, float_format="%.3g"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
