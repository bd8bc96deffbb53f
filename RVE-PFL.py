"""Train RVE-PFL, or a method it is compared with, over simulated clients.

    python RVE-PFL.py                                     the paper's setting: MNIST, 100 rounds
    python RVE-PFL.py --dataset mnist10k --rounds 5 --local_ep 2     a first look, no download

Writes CSVs and pictures to results/<run>/ and checkpoints to saved_models/<run>/. Options: options.py.
"""
import copy
import itertools
import shlex
import signal
import sys
import time
from argparse import Namespace

import numpy as np
import torch

import datasets
import sampling
from engine.graphed import GraphedClient
from engine.ranks import PeerLost, Ranks
from engine.signals import Interrupted, Interrupts, steady_output
from engine.stacked import stack_size
from methods import METHODS
from metrics import over_clients
from options import args_parser
from runs.checkpoint import borrowed_encoders
from runs.run import Progress, Run, open_run
from server import mean, robust
from server.malicious import Crowd
from server.threat_aware import ThreatAware
from update import Client, Diverged, Private
from utils import InputError, choose_device, choose_precision, environment, keep_freed_memory, rng, seed_torch

HELD_OUT = 0.1   # of a client's images for testing; under --validate, of the rest for validation


def main(argv: list[str] | None = None) -> int:
    """Run a command line (``sys.argv`` if None) and return the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    args = args_parser(argv)
    ranks = Ranks(args.rendezvous_seconds)
    again = "the same command with --resume" if not ranks.alone else shlex.join(
        ["python", "RVE-PFL.py", *(a for a in argv if a not in ("--overwrite", "--resume")), "--resume"])
    lost = f"another process of this run died, or torchrun was stopped; to go on: {again}"
    try:
        with Interrupts() as interrupts, ranks:
            run_all(args, ranks, interrupts)
        return 0
    except InputError as error:
        line, status = f"RVE-PFL.py: error: {error}", 2
    except OSError as error:
        line, status = (f"RVE-PFL.py: error: {error.filename or 'a file'}: {error.strerror or error}; "
                        f"mend that, then: {again}"), 2
    except PeerLost:
        line, status = lost, 1
    except Interrupted as stop:
        by_user = ranks.alone or stop.args[0] == signal.SIGINT
        line, status = f"interrupted; to go on: {again}" if by_user else lost, 130
    if ranks.speaks():
        print(line, file=sys.stderr)
    return status


def run_all(args: Namespace, ranks: Ranks, interrupts: Interrupts) -> None:
    """Options -> data -> partition -> rounds -> pictures and table."""
    keep_freed_memory()
    device = choose_device(args.device)
    with ranks.first_before_others():
        data = datasets.load(args.dataset, args.data_dir)
    owned, splits = deal(args, data.labels)
    client = make_client(args, data, device)
    head, private = client.split(client.state())
    protocol = "resplit" if args.resplit else "validate" if args.validate else "held-out"
    config = {
        "status": "unfinished", "protocol": protocol, "options": vars(args), **environment(device),
        "processes": ranks.size,
        "precision": str(client.dtype), "parameters": client.method.count(client.model),
        "images": {"pooled": len(data.labels), "owned": sum(map(len, owned)), "classes": data.num_classes}}
    server = make_server(args, client, splits)
    crowd = Crowd(args.malicious_behaviour, args.malicious_frac, args.num_users, args.seed)
    with open_run(config, Private(private), head, dict(server.memory), ranks) as run:
        if not run.finished:
            if ranks.first:
                run.write_partition(owned, splits, data.labels)
            if args.encoders_from and run.progress.round == 0:
                for k, encoder in borrowed_encoders(args, ranks.mine(range(args.num_users)), private):
                    run.private.put(k, encoder)
                run.private.commit()
            try:
                federate(args, client, server, crowd, run, owned, splits, ranks, interrupts)
                with interrupts.held():
                    run.finish()
            except (Interrupted, InputError):
                if ranks.alone:   # else some may be gone: the last checkpoint stands
                    run.save()
                raise
        if ranks.first:
            print(run.table())


def deal(args: Namespace, labels: np.ndarray) -> tuple[list, list]:
    """What each client owns, and its (training, held-out) split, as index arrays."""
    owned = sampling.partition(
        labels, args.num_users, args.partition, rng(args.seed, "partition"), alpha=args.alpha,
        classes_per_client=args.classes_per_client, unequal=args.unequal,
        min_images=int(np.ceil(args.local_bs / (1 - HELD_OUT))))   # one full batch to train on
    splits = sampling.split_all(owned, labels, HELD_OUT, args.seed, "split")
    if args.validate:
        splits = sampling.split_all([train for train, _ in splits], labels, HELD_OUT, args.seed, "validation")
    return owned, splits


def make_client(args: Namespace, data: datasets.Dataset, device: torch.device) -> Client:
    """The working model at its seeded start, the data on its device, and how a client trains."""
    method = METHODS[args.method]
    seed_torch(args.seed, "init")
    model = method.build(data.image_shape, data.num_classes, args.init_logvar)
    if args.encoders_from:   # spares the backward pass; its learning rate is 0 besides
        model.encoder.requires_grad_(False)
    kind = GraphedClient if device.type == "cuda" else Client
    return kind(
        model.to(device, memory_format=torch.channels_last), method, torch.from_numpy(data.images).to(device),
        torch.from_numpy(data.labels).to(device), data.num_classes, seed=args.seed, epochs=args.local_ep,
        batch_size=args.local_bs, optimizer=args.optimizer, lr=args.lr, head_lr=args.head_lr,
        lr_decay=args.lr_decay, lr_warmup=args.lr_warmup, momentum=args.momentum, kl_weight=args.kl_weight,
        kl_warmup=args.kl_warmup, eval_samples=args.eval_samples, loss_weight=args.loss_weight,
        augment=args.augment, dtype=choose_precision(args.precision, device), frozen=bool(args.encoders_from))


def make_server(args: Namespace, client: Client, splits: list) -> mean.Server:
    """How the method aggregates: with noise of its own, or by the rule asked for."""
    setting = mean.Setting(
        seed=args.seed, clients=args.num_users, frac=args.frac, rounds=args.rounds,
        smallest=min(len(train) for train, _ in splits), epsilon=args.epsilon, delta=args.delta,
        clip=args.clip, exposures=args.exposures, noise_multiplier=args.noise_multiplier,
        tolerate=args.tolerate, rule=args.aggregation)
    if args.aggregation == "threat":
        return ThreatAware(setting, copy.deepcopy(client.model.classifier).cpu().eval())
    return (METHODS[args.method].server if args.aggregation == "mean" else robust.Robust)(setting)


def federate(args: Namespace, client: Client, server: mean.Server, crowd: Crowd, run: Run, owned: list,
             splits: list, ranks: Ranks, interrupts: Interrupts) -> None:
    """The rounds: send the head, train the clients, aggregate what they upload, evaluate everyone."""
    labels, stack = client.labels.cpu().numpy(), args.stack or stack_size(client.labels.device, args.local_bs)
    server.memory.update(run.progress.memory)
    for r in range(run.progress.round + 1, args.rounds + 1):
        started, evaluating = time.monotonic(), r % args.eval_every == 0 or r == args.rounds
        if args.resplit:
            splits = sampling.split_all(owned, labels, HELD_OUT, args.seed, "resplit", r)
        sent, uploads, rows = run.progress.head, {}, {}
        asked = sampling.sample_clients(args.num_users, args.frac, rng(args.seed, "sample", round=r),
                                        client.method.poisson)
        mine = {k: splits[k][0] for k in ranks.mine(asked)}
        for k, outcome in crowd.train_each(client, r, mine, sent, run.private.get, stack):
            if isinstance(outcome, Diverged):
                run.say(f"warning: {outcome}; this client's round is dropped")
                continue
            uploads[k], kept, figures = outcome
            run.private.put(k, kept)
            if evaluating:
                held_out = client.evaluate(k, r, splits[k][1], uploads[k], kept)
                rows[k] = [{"round": r, "client": k, "stage": "trained", "split": "train", **figures},
                           {"round": r, "client": k, "stage": "trained", "split": run.aside, **held_out}]
            run.advance(r, k, len(mine), figures["accuracy"])
        uploads, trained = ranks.gather(uploads), ranks.gather(rows)
        if ranks.first and asked and not uploads:
            raise InputError(f"round {r}: no client's loss stayed finite; start again with a smaller --lr")
        report = []
        if ranks.first:
            uploads, sizes = crowd.forge(server, r, sent, uploads, {k: len(splits[k][0]) for k in asked})
            head, uploads, report = server(r, sent, uploads, sizes)
        head = ranks.share(head if ranks.first else None)
        deployed = ranks.gather({k: {"round": r, "client": k, "stage": "deployed", "split": run.aside,
                                     **client.evaluate(k, r, splits[k][1], head, run.private.get(k))}
                                 for k in ranks.mine(range(args.num_users)) if evaluating})
        rows = [*itertools.chain(*trained.values()), *deployed.values()]
        honest = [row for row in rows if row["client"] not in crowd.members] or rows
        means = [{"round": r, **mean, "seconds": time.monotonic() - started} for mean in over_clients(honest)]
        with interrupts.held():
            run.end_round(Progress(r, head, sent, uploads, memory=dict(server.memory)), server.facts, {
                "clients.csv": rows, "rounds.csv": means,
                "server.csv": [{"round": r, **row, "malicious": int(row["client"] in crowd.members)}
                               for row in report] if head else []})


if __name__ == "__main__":
    with steady_output("RVE-PFL.py"):
        sys.exit(main())
