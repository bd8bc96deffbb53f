"""The processes of a run: one, or as many as torchrun started, each with clients of its own.

    torchrun --nproc-per-node 2 RVE-PFL.py --dataset cifar

Client k always belongs to rank ``k mod size``, so a private encoder never leaves its process. Every rank runs the
same program; the first is also the server, and it alone writes CSVs. The uploads go to the first rank, and the new
shared parameters to all, in main memory over gloo, whatever device trains.
"""
import datetime
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch.distributed as dist

from engine.signals import PeerLost
from server.base import Aggregated, Round, Server
from utils import InputError

T = TypeVar("T")
DAY = datetime.timedelta(days=1)   # ranks may wait long for one another; one that died is noticed at once


class Ranks:
    """This process among those of a run, by torchrun's environment; a context manager.

    Without torchrun a run is one process, and nothing is exchanged. Every exchange raises PeerLost if a process of
    the run has died.

    Attributes:
        patience: seconds within which all must have met.
        local: its number among the processes on this machine.
    """

    def __init__(self, patience: float = 300.0) -> None:
        self.patience = patience
        self.store: dist.Store | None = None
        try:
            self.size, self.local = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("LOCAL_RANK", 0))
            self.rank = int(os.environ["RANK"]) if self.size > 1 else 0
        except (KeyError, ValueError) as error:
            raise InputError(f"RANK, WORLD_SIZE or LOCAL_RANK in the environment is wrong ({error}); start "
                             "several processes with torchrun, or one without these") from error
        self.alone, self.first = self.size == 1, self.rank == 0

    def __enter__(self) -> "Ranks":
        if not self.alone:
            try:
                wait = datetime.timedelta(seconds=self.patience)
                self.store, *_ = next(dist.rendezvous("env://", timeout=wait))
                dist.init_process_group("gloo", store=self.store, rank=self.rank, world_size=self.size,
                                        timeout=DAY)
            except (OSError, RuntimeError, ValueError) as error:
                raise InputError(f"rank {self.rank} of {self.size} did not reach the others "
                                 f"({str(error).splitlines()[0]}); check torchrun's --master-addr and "
                                 "--master-port, or wait longer with --rendezvous_seconds") from error
        return self

    def __exit__(self, kind: type | None, *_) -> None:
        if not self.alone and kind is None:
            dist.destroy_process_group()

    def mine(self, clients: Iterable[int]) -> list[int]:
        """Return those of the clients that belong to this rank."""
        return [k for k in clients if k % self.size == self.rank]

    @contextmanager
    def first_before_others(self) -> Iterator[None]:
        """Let the first rank leave the block before the others enter it, so that a download happens once."""
        if not self.first:
            self.wait()
        yield
        if self.first:
            self.wait()

    def gather(self, entries: dict[int, T]) -> dict[int, T]:
        """Return every rank's entries by client, sorted, on the first rank; elsewhere nothing."""
        everyone: list[dict[int, T]] | None = [entries]
        if not self.alone:
            everyone = [{}] * self.size if self.first else None
            self._exchange(dist.gather_object, entries, everyone)
        return dict(sorted((k, value) for some in everyone or [] for k, value in some.items()))

    def gather_parts(self, entries: dict[int, T], at_a_time: int = 16) -> Iterator[dict[int, T]]:
        """Yield ``gather`` of a few entries per rank at a time: those under way are in memory several times."""
        if self.alone:
            yield entries
            return
        keys, counts = list(entries), self.gather({self.rank: len(entries)})
        for start in range(0, self.share(max(counts.values(), default=0)), at_a_time):
            yield self.gather({k: entries[k] for k in keys[start:start + at_a_time]})

    def share(self, value: T) -> T:
        """Return the first rank's value on every rank."""
        box = [value]
        if not self.alone:
            self._exchange(dist.broadcast_object_list, box)
        return box[0]

    def aggregate(self, server: Server, round: Round) -> Aggregated:
        """Aggregate a round on the first rank; the others get the new shared parameters alone."""
        aggregated = server(round) if self.first else Aggregated(round.sent, {}, [], {})
        return aggregated._replace(head=self.share(aggregated.head))

    def wait(self) -> None:
        """Wait until every rank has arrived here."""
        if not self.alone:
            self._exchange(dist.barrier)

    def speaks(self) -> bool:
        """Return True for the first rank that asks: it tells the user how the run ended."""
        try:
            return self.alone or self.store is None or self.store.add("said", 1) == 1
        except RuntimeError:   # torchrun is gone
            return True

    @staticmethod
    def _exchange(operation, *arguments) -> None:
        try:
            operation(*arguments)
        except RuntimeError as error:
            raise PeerLost from error
