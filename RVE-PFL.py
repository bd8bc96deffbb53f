"""Train RVE-PFL, or a method it is compared with, over simulated clients.

    python RVE-PFL.py                                     the paper's setting: MNIST, 100 rounds
    python RVE-PFL.py --dataset mnist10k --rounds 5 --local_ep 2     a first look, no download

Writes CSVs and pictures to results/<run>/ and checkpoints to saved_models/<run>/. Options: options.py.
"""
import itertools
import shlex
import signal
import sys
import time
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch

import datasets
import sampling
from engine.graphs import GraphedTrainer
from engine.memory import in_one_line, said_of
from engine.processes import PeerLost, Ranks
from engine.several import train_each
from engine.signals import Interrupted, Interrupts, steady_output
from methods import METHODS, make_server
from metrics import over_clients
from runs.checkpoints import borrowed_encoders, finished_source
from runs.resuming import arguments
from runs.run import Progress, Run, open_run
from server.base import Aggregated, Round, Server, State
from server.malicious import MaliciousClients
from update import ClientState, Diverged, LocalUpdate, Trainer, Training
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

HELD_OUT = 0.1   # of a client's images for testing; under --validate, of the rest for validation


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
        ["python", "RVE-PFL.py", *(a for a in argv if a not in ("--overwrite", "--resume")), "--resume"])
    lost = f"another process of this run died, or torchrun was stopped; to go on: {again}"
    try:
        with Interrupts() as interrupts, ranks:
            run_all(args, ranks, interrupts)
        return 0
    except PeerLost:
        line, status = lost, 1
    except Exception as error:
        said = in_one_line("RVE-PFL.py", error, f"; mend that, then: {again}")
        if said is None:
            raise
        line, status = said, 2
    except Interrupted as stop:
        by_user = ranks.alone or stop.args[0] == signal.SIGINT
        line, status = f"interrupted; to go on: {again}" if by_user else lost, 130
    if ranks.speaks():
        print(printable(line), file=sys.stderr)
    return status


def run_all(args: Namespace, ranks: Ranks, interrupts: Interrupts) -> None:
    """Options -> data -> partition -> rounds -> pictures and table."""
    keep_freed_memory()
    device = choose_device(args.device, ranks.local)
    with ranks.first_before_others():
        data = datasets.load(args.dataset, args.data_dir)
    owned, splits = deal(args, data)
    if ranks.first and (large := said_of(parameters(args, data), args.num_users, args.optimizer, device)):
        print(f"note: {large}", file=sys.stderr)
    images, notes = sampling.described(data, owned, splits, args)
    trainer = make_trainer(args, data, device)
    warm = replace(trainer, method=trainer.method.in_round(1, vars(args))) if args.full_sharing_rounds else trainer
    head, private = warm.shared_and_private(trainer.state())
    protocol = "resplit" if args.resplit else "validate" if args.validate else "held-out"
    config = {
        "status": "unfinished", "protocol": protocol, "options": vars(args), **environment(device),
        "processes": ranks.size,
        "precision": str(trainer.training.dtype), "parameters": trainer.method.count(trainer.model),
        "start": fingerprint(trainer.state()), "images": images}
    server = make_server(vars(args), min(len(train) for train, _ in splits))
    if args.encoders_from and not args.resume:   # before anything of this run is written
        finished_source(args)
    malicious = MaliciousClients(args.malicious_behaviour, args.malicious_frac, args.num_users, args.seed)
    with open_run(config, ClientState(private), head, dict(server.memory), ranks) as run:
        if not run.finished:
            if ranks.first:
                for note in notes:
                    run.say(f"note: {note}")
                run.write_partition(owned, splits, data.labels)
                if malicious.behaviour.trigger is not None:
                    run.write_triggered(data.images[:8], malicious.behaviour.trigger)
            if args.encoders_from and run.progress.round == 0:
                for k, encoder in borrowed_encoders(args, ranks.mine(range(args.num_users)), private):
                    run.private.put(k, encoder)
                run.private.commit()
            try:
                who = (warm, trainer), server, malicious
                federate(Federation(args, *who, owned, splits, ranks), run, interrupts)
                with interrupts.held():
                    run.finish()
            except (Interrupted, InputError):
                if ranks.alone:   # else some may be gone: the last checkpoint stands
                    with interrupts.held():
                        run.save()
                raise
        if ranks.first:
            print(run.table())


def deal(args: Namespace, data: datasets.Dataset) -> tuple[list, list]:
    """What each client owns, and its (training, held-out) split, as index arrays.

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


def parameters(args: Namespace, data: datasets.Dataset) -> int:
    """Count the parameters of a client's network, before any memory is taken for it."""
    with torch.device("meta"):
        return METHODS[args.method].count(METHODS[args.method].build(
            data.image_shape, data.num_classes, vars(args)))["total"]


def make_trainer(args: Namespace, data: datasets.Dataset, device: torch.device) -> Trainer:
    """The working model at its seeded start, the data on its device, and how a client trains."""
    method = METHODS[args.method]
    seed_torch(args.seed, "init")
    model = method.build(data.image_shape, data.num_classes, vars(args))
    if args.encoders_from:   # spares the backward pass; its learning rate is 0 besides
        model.encoder.requires_grad_(False)
    training = Training.from_options(vars(args), choose_precision(args.precision, device),
                           freezes_private=bool(args.encoders_from))
    kind = GraphedTrainer if device.type == "cuda" else Trainer
    return kind(model.to(device).to(memory_format=torch.channels_last), method,
                torch.from_numpy(data.images).to(device), torch.from_numpy(data.labels).to(device),
                data.num_classes, training)


@dataclass(frozen=True)
class Federation:
    """Everyone who takes part in a run, as this process knows them.

    Args:
        trainers: of the first ``--full_sharing_rounds``, in which the whole network travels, and of the others.
        owned: what each client owns.
        splits: what each client trains on, and what is held out.
    """

    args: Namespace
    trainers: tuple[Trainer, Trainer]
    server: Server
    malicious: MaliciousClients
    owned: list
    splits: list
    ranks: Ranks

    def trainer(self, number: int) -> Trainer:
        """Who trains in a round."""
        return self.trainers[number > self.args.full_sharing_rounds]

    def send(self, number: int, run: Run) -> State:
        """What clients receive in a round. In the first after the warm ones, they keep the rest as their own."""
        if number != self.args.full_sharing_rounds + 1 or number == 1:
            return run.progress.head
        head, kept = self.trainer(number).method.shared_and_private(run.progress.head)
        run.private.start_from(kept)
        return head

    def sample(self, number: int) -> list[int]:
        """The clients that are asked to train in a round."""
        draw = rng(self.args.seed, "sample", round=number)
        poisson = self.trainer(number).method.poisson
        return sampling.sample_clients(self.args.num_users, self.args.frac, draw, poisson)

    def splits_in(self, number: int) -> list:
        """Each client's (training, held-out) images in a round: the same in all, but for ``--resplit``."""
        if not self.args.resplit:
            return self.splits
        return sampling.split_all(self.owned, self.trainer(number).labels.cpu().numpy(), HELD_OUT, self.args.seed,
                                  "resplit", number)

    def evaluates(self, number: int) -> bool:
        """Whether a round is evaluated."""
        return number % self.args.eval_every == 0 or number == self.args.rounds

    def train(self, number: int, asked: list[int], sent: State, splits: list,
              run: Run) -> tuple[dict[int, State], list[dict]]:
        """Local training of the clients asked: their uploads and rows of ``clients.csv``, on the first rank.

        A client whose loss does not stay finite uploads nothing, and its encoder stays as it was.
        """
        uploads, rows = {}, {}
        mine = {k: splits[k][0] for k in self.ranks.mine(asked)}
        for k, outcome in self._train_each(number, mine, sent, run):
            if isinstance(outcome, Diverged):
                run.say(f"warning: {outcome}; this client's round is dropped")
                continue
            uploads[k] = run.uploads.keep(k, outcome.upload)
            run.private.put(k, outcome.client_state)
            if self.evaluates(number):
                held_out = self.trainer(number).evaluate(k, number, splits[k][1], outcome.upload, outcome.client_state)
                rows[k] = [row_of(number, k, "trained", "train", outcome.metrics),
                           row_of(number, k, "trained", run.evaluation_split, held_out)]
            run.advance(number, k, len(mine), outcome.metrics["accuracy"])
        arrived = {k: uploads[k] if k in uploads else run.uploads.keep(k, upload)
                   for part in self.ranks.gather_parts(uploads) for k, upload in part.items()}
        uploads = {k: arrived[k] for k in sorted(arrived)}
        if self.ranks.first and asked and not uploads:
            raise InputError(f"round {number}: no client's loss stayed finite; start again with a smaller --lr")
        return uploads, list(itertools.chain(*self.ranks.gather(rows).values()))

    def _train_each(self, number: int, indices: dict[int, np.ndarray], sent: State,
                    run: Run) -> Iterator[tuple[int, LocalUpdate | Diverged]]:
        """Every client's training, malicious clients last and as they behave."""
        for trainer, own in self.malicious.groups(self.trainer(number), indices):
            for k, outcome in train_each(trainer, number, own, sent, run.private.get, self.args.stack):
                if isinstance(outcome, LocalUpdate):
                    outcome = self.malicious.retrained(trainer, k, number, len(own[k]), outcome)
                yield k, outcome

    def warns(self, round: Round, run: Run) -> bool:
        """Whether a round has too few uploads for its rule to tell who is malicious; says so on the first rank."""
        few = self.ranks.first and len(round.uploads) < self.server.min_uploads
        if few:
            run.say(f"warning: --aggregation {self.args.aggregation} cannot tell who is malicious among fewer "
                    f"than {self.server.min_uploads} uploads; round {round.number} has {len(round.uploads)}")
        return few

    def aggregate(self, round: Round) -> Aggregated:
        """What the server makes of a round, on the first rank; elsewhere the new head alone."""
        aggregated = self.server(round) if self.ranks.first else Aggregated(round.sent, {}, [])
        return aggregated._replace(head=self.ranks.share(aggregated.head))

    def evaluate(self, number: int, head: State, splits: list, run: Run) -> list[dict]:
        """Rows of ``clients.csv`` for every client with the head just aggregated, on the first rank."""
        mine = self.ranks.mine(range(self.args.num_users)) if self.evaluates(number) else []
        return list(self.ranks.gather({k: self._deployed(number, k, splits[k][1], head, run)
                                       for k in mine}).values())

    def _deployed(self, number: int, client: int, held_out: np.ndarray, head: State, run: Run) -> dict:
        """A client's row at the stage ``deployed``; an honest one's says how often a backdoor opens, if there is
        one."""
        trainer, private = self.trainer(number), run.private.get(client)
        row = row_of(number, client, "deployed", run.evaluation_split,
                     trainer.evaluate(client, number, held_out, head, private))
        if self.malicious.behaviour.trigger is not None and client not in self.malicious.members:
            row["backdoor"] = self.malicious.backdoor(trainer, client, number, held_out, (head, private))
        return row

    def record(self, round: Round, aggregated: Aggregated, rows: list[dict], seconds: float, run: Run) -> None:
        """Write a round's CSV rows and, if one is due, a checkpoint."""
        bad = self.malicious.members
        honest = [row for row in rows if row["client"] not in bad] or rows
        means = [{"round": round.number, **mean, "seconds": seconds} for mean in over_clients(honest)]
        server = [{"round": round.number, **row, "malicious": int(row["client"] in bad)}
                  for row in aggregated.rows] if self.trainer(round.number).method.shared else []
        progress = Progress(round.number, aggregated.head, round.sent, aggregated.uploads,
                            memory=dict(self.server.memory))
        run.end_round(progress, self.server.facts,
                      {"clients.csv": rows, "rounds.csv": means, "server.csv": server})


def row_of(number: int, client: int, stage: str, split: str, metrics: dict[str, float]) -> dict:
    """A row of ``clients.csv``."""
    return {"round": number, "client": client, "stage": stage, "split": split, **metrics}


def federate(federation: Federation, run: Run, interrupts: Interrupts) -> None:
    """The rounds of RVE-PFL, and of all that it is compared with (Issa et al. 2024)."""
    federation.server.memory.update(run.progress.memory)
    warned = False
    for number in range(run.progress.round + 1, federation.args.rounds + 1):
        interrupts.check()
        started, sent = time.monotonic(), federation.send(number, run)
        splits = federation.splits_in(number)

        # Each client asked trains, and uploads what travels: with RVE-PFL the head, while its encoder stays.
        asked = federation.sample(number)
        uploads, trained = federation.train(number, asked, sent, splits, run)
        sizes = {k: len(splits[k][0]) for k in asked}

        # Malicious clients forge their uploads; the server weighs all uploads and aggregates them.
        arrived = federation.malicious.poison(Round(number, sent, uploads, sizes), federation.server)
        warned = warned or federation.warns(arrived, run)
        aggregated = federation.aggregate(arrived)

        # Every client is evaluated with the new head, behind its own encoder if it has one.
        deployed = federation.evaluate(number, aggregated.head, splits, run)
        with interrupts.held():
            federation.record(arrived, aggregated, trained + deployed, time.monotonic() - started, run)
        del uploads, arrived, aggregated   # else they would live until the next round has its own


if __name__ == "__main__":
    with steady_output("RVE-PFL.py"):
        sys.exit(main())
