"""What is missing when a picture is not found: four rungs of what an adversary knows of the encoder.

    python benchmarks/ladder.py --run mnist10k-shards-rve_pfl-seed1 --public mnist --other fmnist

Whoever holds a latent z needs the encoder to turn it into a picture. The rungs, from most to least:

- own: the victim's encoder, stolen;
- private: an encoder trained by the adversary on the client's own images. No adversary has these: an upper bound;
- aligned many: one trained on other images of the client's classes (--public) until its latents have the moments
  of the latents of --seen of the client's images, as observed: if the server saw so many;
- aligned: the same with the moments of no more than the latents that are decoded;
- public: the same without moments;
- replayed: one trained as the client trains, on as many of these images, through the heads that were sent in all
  rounds with a checkpoint;
- other: one trained on another data set (--other).

Each decodes z as observed (one draw), and z as recovered from the head's gradient of that image
(attack/newton.py). Decoders are trained on --public images, in the last rung on --other. Writes
results/<run>/ladder.csv.
"""
import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from _path import ROOT, Script, count, guarded, index
from torch import Tensor

import datasets
from attack import learnt, newton, scoring
from attack.access import Knowledge, Target, Victim, held, hold, open_target, posterior_in_parts
from attack.attacks import part_of
from attack.scene import CLIENT_LR, as_floats
from methods import METHODS
from models import FlattenHWC
from update import ClientState, Trainer, training_of
from utils import InputError, keep_freed_memory, rng, seed_torch, write_whole

CANDIDATES = 500   # of the client's images that a true one is ranked among
flatten = FlattenHWC()


def public_images(target: Target, name: str, args: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """Images of another data set that the run does not have, and their labels: ``N x C x H x W``, ``N``."""
    data = datasets.load(name, args.data_dir)
    ours = {image.tobytes() for image in target.data.images}
    new = np.flatnonzero([image.tobytes() not in ours for image in data.images])
    chosen = rng(args.seed, "public").permutation(new)
    return as_floats(data.images[chosen]), torch.from_numpy(data.labels[chosen])


def shadow(view: Knowledge, target: Target, images: tuple[Tensor, Tensor], args: argparse.Namespace,
           like: tuple[Tensor, Tensor] | None = None) -> Knowledge:
    """An encoder that the adversary trains on images, from the start that all clients had.

    Args:
        like: latents ``M x ...`` of the victim, and their labels, whose moments it shall have.
    """
    apart = learnt.moments_apart(flatten(like[0]), like[1]) if like else None
    seed_torch(target.options["seed"], "init")
    return learnt.shadow_encoder(view, target.network(), *images, args.train_epochs,
                                 target.options.get("kl_weight") or 0.0, apart)


def scores(found: Tensor, truth: Tensor, pool: Tensor) -> dict[str, float]:
    """PSNR, the true image's median rank in the pool, whose first images are the true ones, and the share that is
    first."""
    like = scoring.similarity(found.clamp(0, 1), truth)
    rank = scoring.rank_of(found, pool, torch.eye(len(truth), len(pool), dtype=torch.bool))
    return {"psnr": like["psnr"].mean().item(), "median_rank": rank.double().median().item(),
            "identified": (rank == 1).double().mean().item()}


def replayed(view: Knowledge, target: Target, round: int, images: tuple[Tensor, Tensor], count: int) -> Knowledge:
    """An encoder by the client's own training on ``count`` of the images, from the start that all clients had."""
    options, method = target.options, METHODS[target.options["method"]]
    seed_torch(options["seed"], "init")
    pixels = (255 * images[0]).round().byte().permute(0, 2, 3, 1)
    trainer = Trainer(target.network(), method, pixels, images[1], target.data.num_classes,
                      training_of(options, torch.float32))
    private = ClientState(trainer.shared_and_private(trainer.state())[1])
    for number in (r for r in target.rounds() if r <= round):
        private = trainer.train(0, number, np.arange(min(count, len(pixels))), target.shared(number)["sent"],
                                private).private
    trainer.model.load_state_dict(private.parameters, strict=False)
    encoder = trainer.model.get_submodule("encoder").eval().requires_grad_(False)
    return Knowledge(view.head, encoder, True, view.image_shape)


def decoder_behind(encoder: Knowledge, images: Tensor, args: argparse.Namespace) -> learnt.Decode:
    """A decoder of the encoder's latents, trained on images."""
    return learnt.latent_decoder(*posterior_in_parts(encoder, images), images, args.train_epochs)


def climb(target: Target, round: int, client: int, args: argparse.Namespace) -> list[dict]:
    """The rows of one client in one round."""
    seed_torch(args.seed, "ladder", client, round)
    victim, own = Victim(target, round, client), target.owned()[0][client]
    drawn = rng(args.seed, "images ladder", client, round).permutation(own)
    pool = as_floats(target.data.images[drawn[:CANDIDATES]])
    labels = torch.from_numpy(target.data.labels[drawn[:args.images]])
    truth = pool[:args.images]
    server, thief = (hold(target, who, round, client) for who in ("curious_server", "stolen_model"))
    # What the server sees: each image's own gradient at the head sent next. The z behind it is noted for scoring.
    behind: list[Tensor] = []
    observed = [part_of(victim.update(truth[i:i + 1], labels[i:i + 1], CLIENT_LR, inputs=behind), "classifier.")
                for i in range(len(truth))]
    z = torch.cat(behind)
    recovered = newton.head_input(held(server.next_head), observed, target.data.image_shape, args.hops, 3)
    cosine = torch.cosine_similarity(recovered.flatten(1), z.flatten(1), dim=1)
    public = public_images(target, args.public, args)
    same = torch.isin(public[1], torch.from_numpy(np.unique(target.data.labels[own]))).nonzero().flatten()
    same = same[:args.public_images]
    other = tuple(part[:args.public_images] for part in public_images(target, args.other, args))
    mine = as_floats(target.data.images[own]), torch.from_numpy(target.data.labels[own])
    chosen = public[0][same], public[1][same]
    many = drawn[-args.seen:]   # mostly other images than those attacked
    many_z = torch.cat([victim.head_input(as_floats(target.data.images[part]))
                        for part in np.split(many, range(256, len(many), 256))])
    many_like = many_z, torch.from_numpy(target.data.labels[many])

    def trained(images: tuple[Tensor, Tensor], like: tuple[Tensor, Tensor] | None = None) -> learnt.Decode:
        return decoder_behind(shadow(server, target, images, args, like), images[0], args)
    rungs: dict[str, Callable[[], learnt.Decode]] = {
        "own": lambda: decoder_behind(thief, chosen[0], args),
        "private": lambda: decoder_behind(shadow(server, target, mine, args), chosen[0], args),
        "aligned many": lambda: trained(chosen, many_like), "aligned": lambda: trained(chosen, (z, labels)),
        "public": lambda: trained(chosen),
        "replayed": lambda: decoder_behind(replayed(server, target, round, chosen, len(own)), chosen[0], args),
        "other": lambda: trained(other)}
    latents, rows = {"observed": z, "recovered": recovered}, []
    for rung, make in rungs.items():
        decode = make()
        for latent, seen in latents.items():
            if rung == "aligned" and seen is recovered:
                decode = trained(chosen, (seen, labels))
            rows.append({"round": round, "client": client, "rung": rung, "latent": latent, "images": len(truth),
                         "cosine": 1.0 if seen is z else cosine.mean().item(),
                         "cosine_min": 1.0 if seen is z else cosine.min().item(),
                         **scores(decode(flatten(seen)), truth, pool)})
            print("  ".join(f"{value:.3g}" if isinstance(value, float) else str(value)
                            for value in rows[-1].values()), flush=True)
    mean = torch.stack([chosen[0][chosen[1] == label].mean(0) for label in labels])
    rows.append({"round": round, "client": client, "rung": "class mean", "latent": "", "images": len(truth),
                 **scores(mean, truth, pool)})
    return rows


@guarded
def main(argv: list[str] | None = None) -> int:
    parser = Script(__file__, __doc__)
    parser.add_argument("--run", required=True, help="a run of a method with an encoder")
    parser.add_argument("--clients", type=index, nargs="+", default=[0])
    parser.add_argument("--rounds", type=count, nargs="+", help="the latest if not given")
    parser.add_argument("--images", type=count, default=8)
    parser.add_argument("--seen", type=count, default=500, help="latents behind the rung `aligned many`")
    parser.add_argument("--hops", type=count, default=7, help="of attack/newton.py")
    parser.add_argument("--train_epochs", type=count, default=8)
    parser.add_argument("--public", default="mnist")
    parser.add_argument("--other", default="fmnist")
    parser.add_argument("--public_images", type=count, default=10_000)
    parser.add_argument("--seed", type=index, default=1)
    for name, folder in (("results_dir", "results"), ("models_dir", "saved_models"), ("data_dir", "data")):
        parser.add_argument(f"--{name}", type=Path, default=ROOT / folder)
    args = parser.parse_args(argv)
    keep_freed_memory()
    target = open_target(args.run, args.results_dir, args.models_dir, args.data_dir)
    if not target.has_encoder:
        raise InputError(f"--run {args.run}: its method has no encoder, and so no ladder")
    rows = [row for round in args.rounds or [target.latest_round()] for client in args.clients
            for row in climb(target, round, client, args)]
    table = pd.DataFrame(rows)
    write_whole(target.results / "ladder.csv", lambda file: table.to_csv(file, index=False, float_format="%.4g"))
    print(table.to_string(index=False, float_format="%.3f", na_rep=""))
    return 0


if __name__ == "__main__":
    sys.exit(main())
