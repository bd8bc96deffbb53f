"""From options to a run that is ready: data, partition, trainer, server, malicious clients and folders."""
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch

import datasets
import sampling
from devices import check_size, choose_device, choose_precision, environment, seed_torch
from engine.clients import Clients
from engine.graphs import GraphedTrainer
from engine.processes import Ranks
from methods import METHODS, make_server
from runs.checkpoints import finished_source, read_client
from runs.run import Run, open_run
from server.base import Server
from server.malicious import MaliciousClients
from update import ClientState, Trainer, Training
from utils import InputError, fingerprint, keep_freed_memory, participants, rng

VALIDATION_SHARE = 0.1   # of a client's training images, under --validate


@contextmanager
def prepared(args: Namespace, ranks: Ranks) -> Iterator[tuple[Run, Clients, MaliciousClients, Server]]:
    """Load and partition the data, make the first model and the server, and open the run's folders."""
    keep_freed_memory()
    device = choose_device(args.device, ranks.local)
    with ranks.first_before_others():
        data = datasets.load(args.dataset, args.data_dir)
    owned, splits = partition(args, data)
    images, notes = sampling.described(data, owned, splits, args)
    trainer = make_trainer(args, data, device)
    start = trainer.state()
    head, private = trainer.in_round(1).shared_and_private(start)
    protocol = "resplit" if args.resplit else "validate" if args.validate else "held-out"
    config = {
        "status": "unfinished", "protocol": protocol, "options": vars(args), **environment(device),
        "processes": ranks.size, "precision": str(trainer.training.dtype),
        "parameters": trainer.method.count(trainer.model), "start": fingerprint(start), "images": images}
    clients = participants(vars(args))
    sizes = [len(train) for train, _ in splits[:clients]]
    config |= trainer.facts(sizes)
    server = make_server(vars(args), min(sizes))
    if args.encoders_from and not args.resume:   # before anything of this run is written
        finished_source(args)
    malicious = MaliciousClients(args.malicious_behaviour, args.malicious_frac, clients, args.seed)
    own = partial(trainer.method.own_start, data.image_shape, data.num_classes, vars(args))
    with open_run(config, (head, private, own), server, malicious, ranks) as run:
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
        yield run, Clients(args, trainer, malicious, owned, splits, run, start), malicious, server


def partition(args: Namespace, data: datasets.Dataset) -> tuple[list, list]:
    """Return the images of each client, and its (training, held-out) split, as index arrays.

    Raises:
        InputError: there are too few images or classes for that many clients.
    """
    owned = sampling.by_client(data.clients, args.num_users) if args.partition == "file" else sampling.partition(
        data.labels, args.num_users, args.partition, rng(args.seed, "partition"), alpha=args.alpha,
        classes_per_client=args.classes_per_client, unequal=args.unequal,
        min_images=int(np.ceil(args.local_bs / (1 - args.test_share))))   # one full batch to train on
    splits = sampling.by_half(owned, data.train_size) if args.keep_split else sampling.split_all(
        owned, data.labels, args.test_share, args.seed, "split")
    if args.validate:
        splits = sampling.split_all([train for train, _ in splits], data.labels, VALIDATION_SHARE, args.seed,
                                    "validation")
        if not all(len(train) for train, _ in splits):
            raise InputError(f"--num_users {args.num_users} --validate: a client has two images, and none is left "
                             "to train on; use fewer clients")
    return owned, splits


def make_trainer(args: Namespace, data: datasets.Dataset, device: torch.device) -> Trainer:
    """Return the trainer of all clients: the model at its seeded start, and the data on its device."""
    method = METHODS[args.method]
    if args.codes is not None and args.codes < data.num_classes:
        raise InputError(f"--codes {args.codes}: --dataset {args.dataset} has {data.num_classes} classes, each of "
                         f"which needs a code of its own; give at least {data.num_classes}")
    with torch.device("meta"):   # before any memory is taken
        meta = method.build(data.image_shape, data.num_classes, vars(args))
    check_size(method.count(meta)["total"], args.optimizer, device)
    seed_torch(args.seed, "init")
    model = method.build(data.image_shape, data.num_classes, vars(args))
    training = Training.from_options(vars(args), choose_precision(args.precision, device),
                                     part="shared" if args.encoders_from else "all")
    # A graph is captured once, so it can't change what trains within a round.
    graphed = device.type == "cuda" and args.stack is None and not args.private_ep
    kind = method.trainer or (GraphedTrainer if graphed else Trainer)
    return kind(model.to(device).to(memory_format=torch.channels_last), method,
                torch.from_numpy(data.images).to(device), torch.from_numpy(data.labels).to(device),
                data.num_classes, training)
