"""Train RVE-PFL, or a method it is compared with, over simulated clients.

    python RVE-PFL.py                                     the paper's setting: MNIST, 100 rounds
    python RVE-PFL.py --dataset mnist10k --rounds 5 --local_ep 2     a first look, no download

Writes CSVs and pictures to results/<run>/ and checkpoints to saved_models/<run>/. Options: options.py.
"""
import shlex
import signal
import sys
import time
from argparse import Namespace

import numpy as np
import torch

import datasets
import sampling
from engine.clients import HELD_OUT, Clients
from engine.graphs import GraphedTrainer
from engine.memory import check_size, in_one_line
from engine.processes import PeerLost, Ranks
from engine.signals import Interrupted, Interrupts, steady_output
from methods import METHODS, make_server
from runs.checkpoints import finished_source, read_client
from runs.resume import arguments
from runs.run import Run, open_run
from server.base import Server
from server.malicious import MaliciousClients
from update import ClientState, Trainer, Training
from utils import (
    InputError,
    choose_device,
    choose_precision,
    environment,
    error_line,
    fingerprint,
    keep_freed_memory,
    printable,
    rng,
    seed_torch,
)


def federate(run: Run, clients: Clients, malicious: MaliciousClients, server: Server, rounds: int) -> None:
    """Run the rounds of RVE-PFL, or of a method it is compared with (Issa et al. 2024)."""
    for number in range(run.progress.round + 1, rounds + 1):
        started = time.monotonic()
        head = clients.send(number)                                      # the shared parameters
        selected = clients.select(number)
        updates, trained = clients.train(number, selected, head)         # only shared parameters are uploaded
        arrived = malicious.poison(updates, server)                      # simulated attackers, if any
        aggregated = run.ranks.aggregate(server, arrived)
        deployed = clients.evaluate(number, aggregated.head)             # every client, on held-out images
        run.record(arrived, aggregated, trained + deployed, time.monotonic() - started)
        del updates, arrived, aggregated   # free the uploads before the next round has its own


def main(argv: list[str] | None = None) -> int:
    """Run a command line (``sys.argv`` if None) and return the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        ranks = Ranks()
    except InputError as error:
        print(error_line("RVE-PFL.py", error), file=sys.stderr)
        return 2
    with ranks.first_voice():
        args = arguments(argv)
    ranks.patience = args.rendezvous_seconds
    again = "the same command with --resume" if not ranks.alone else shlex.join(
        ["python", "RVE-PFL.py", *(word for word in argv if word not in ("--overwrite", "--resume")), "--resume"])
    lost = f"another process of this run died, or torchrun was stopped; to go on: {again}"
    try:
        with Interrupts(), ranks:
            run_all(args, ranks)
        return 0
    except PeerLost:
        line, status = lost, 1
    except Interrupted as stop:
        by_user = ranks.alone or stop.args[0] == signal.SIGINT
        line, status = f"interrupted; to go on: {again}" if by_user else lost, 130
    except Exception as error:
        message = in_one_line("RVE-PFL.py", error, f"; mend that, then: {again}")
        if message is None:
            raise
        line, status = message, 2
    if ranks.speaks():
        print(printable(line), file=sys.stderr)
    return status


def run_all(args: Namespace, ranks: Ranks) -> None:
    """Load and partition the data, run the rounds, draw the plots and print the table."""
    keep_freed_memory()
    device = choose_device(args.device, ranks.local)
    with ranks.first_before_others():
        data = datasets.load(args.dataset, args.data_dir)
    owned, splits = partition(args, data)
    images, notes = sampling.described(data, owned, splits, args)
    trainer = make_trainer(args, data, device)
    head, private = trainer.in_round(1).shared_and_private(trainer.state())
    protocol = "resplit" if args.resplit else "validate" if args.validate else "held-out"
    config = {
        "status": "unfinished", "protocol": protocol, "options": vars(args), **environment(device),
        "processes": ranks.size, "precision": str(trainer.training.dtype),
        "parameters": trainer.method.count(trainer.model), "start": fingerprint(trainer.state()), "images": images}
    server = make_server(vars(args), min(len(train) for train, _ in splits))
    if args.encoders_from and not args.resume:   # before anything of this run is written
        finished_source(args)
    malicious = MaliciousClients(args.malicious_behaviour, args.malicious_frac, args.num_users, args.seed)
    with open_run(config, (head, private), server, malicious, ranks) as run:
        if not run.finished:
            if ranks.first:
                for note in notes:
                    run.say(f"note: {note}")
                run.write_inputs(data, owned, splits)
            if args.encoders_from and run.progress.round == 0:
                source = finished_source(args)
                for k in ranks.mine(range(args.num_users)):
                    run.states.put(k, ClientState(read_client(source / f"client_{k}.pt", private).parameters))
                run.states.commit()
            federate(run, Clients(args, trainer, malicious, owned, splits, run), malicious, server, args.rounds)
            run.finish()
        if ranks.first:
            print(run.table())


def partition(args: Namespace, data: datasets.Dataset) -> tuple[list, list]:
    """Return the images of each client, and its (training, held-out) split, as index arrays.

    Raises:
        InputError: there are too few images or classes for that many clients.
    """
    owned = sampling.by_client(data.clients, args.num_users) if args.partition == "file" else sampling.partition(
        data.labels, args.num_users, args.partition, rng(args.seed, "partition"), alpha=args.alpha,
        classes_per_client=args.classes_per_client, unequal=args.unequal,
        min_images=int(np.ceil(args.local_bs / (1 - HELD_OUT))))   # one full batch to train on
    splits = sampling.by_half(owned, data.train_size) if args.keep_split else sampling.split_all(
        owned, data.labels, HELD_OUT, args.seed, "split")
    if args.validate:
        splits = sampling.split_all([train for train, _ in splits], data.labels, HELD_OUT, args.seed, "validation")
        if not all(len(train) for train, _ in splits):
            raise InputError(f"--num_users {args.num_users} --validate: a client has two images, and none is left "
                             "to train on; use fewer clients")
    return owned, splits


def make_trainer(args: Namespace, data: datasets.Dataset, device: torch.device) -> Trainer:
    """Return the trainer of all clients: the model at its seeded start, and the data on its device."""
    method = METHODS[args.method]
    with torch.device("meta"):   # before any memory is taken
        meta = method.build(data.image_shape, data.num_classes, vars(args))
    check_size(method.count(meta)["total"], args.optimizer, device)
    seed_torch(args.seed, "init")
    model = method.build(data.image_shape, data.num_classes, vars(args))
    if args.encoders_from:   # spares the backward pass; its learning rate is 0 besides
        model.encoder.requires_grad_(False)
    training = Training.from_options(vars(args), choose_precision(args.precision, device),
                                     freezes_private=bool(args.encoders_from))
    kind = GraphedTrainer if device.type == "cuda" and args.stack is None else Trainer
    return kind(model.to(device).to(memory_format=torch.channels_last), method,
                torch.from_numpy(data.images).to(device), torch.from_numpy(data.labels).to(device),
                data.num_classes, training)


if __name__ == "__main__":
    with steady_output("RVE-PFL.py"):
        sys.exit(main())
