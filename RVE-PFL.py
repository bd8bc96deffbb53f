"""Train RVE-PFL, or a method it is compared with, over simulated clients.

    python RVE-PFL.py                                     the paper's setting: MNIST, 100 rounds
    python RVE-PFL.py --dataset mnist10k --rounds 2 --local_ep 1 --local_bs 80     a first look, no download

Writes CSVs and pictures to results/<run>/ and checkpoints to saved_models/<run>/. Options: options.py.
"""
from __future__ import annotations

import shlex
import signal
import sys
import time
from typing import TYPE_CHECKING

from engine.memory import in_one_line
from engine.signals import Interrupted, Interrupts, PeerLost, first_voice, steady_output
from runs.resume import arguments
from utils import InputError, Late, error_line, printable

if TYPE_CHECKING:
    from argparse import Namespace

    from engine import processes
    from engine.clients import Clients
    from engine.processes import Ranks
    from runs import setup
    from runs.run import Run
    from server.base import Server
    from server.malicious import MaliciousClients
else:   # these import PyTorch, which takes seconds: the options are checked first
    processes, setup = Late("engine.processes"), Late("runs.setup")


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
    with first_voice():
        args = arguments(argv)
    try:
        ranks = processes.Ranks(args.rendezvous_seconds)
    except InputError as error:
        print(error_line("RVE-PFL.py", error), file=sys.stderr)
        return 2
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
    """Prepare a run, run its rounds, draw the plots and print the table."""
    with setup.prepared(args, ranks) as (run, clients, malicious, server):
        if not run.finished:
            federate(run, clients, malicious, server, args.rounds)
            run.finish()
        if ranks.first:
            print(run.table())


if __name__ == "__main__":
    with steady_output("RVE-PFL.py"):
        sys.exit(main())
