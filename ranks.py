"""The processes that share a run: one, or as many as torchrun started, each with clients of its own.

    torchrun --nproc-per-node 2 RVE-PFL.py --dataset cifar

Client k belongs to rank ``k mod size`` for good, so a private encoder never leaves its process. Every rank
runs the same program; the first is also the server, and alone writes CSVs. Heads move twice a round: the
uploads to the first rank, and what it made of them to all. They lie in main memory, so they travel over
gloo, whatever device trains.
"""
import datetime
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch.distributed as dist

from utils import InputError

T = TypeVar("T")
DAY = datetime.timedelta(days=1)   # ranks may wait long for one another; one that died is noticed at once


class PeerLost(Exception):
    """Another process of this run is gone."""


class Ranks:
    """This process among those of a run.

    Reads torchrun's environment: without it, a run is one process and nothing is exchanged. Use it as a
    context manager, and ``speaks`` to have one process, whichever is first, tell the user how it ended.

    Raises (every exchange):
        PeerLost: a process of the run has died.
    """

    def __init__(self):
        self.rank, self.size = (int(os.environ.get(name, default))
                                for name, default in (("RANK", "0"), ("WORLD_SIZE", "1")))
        self.alone, self.first = self.size == 1, self.rank == 0

    def __enter__(self) -> "Ranks":
        if not self.alone:
            try:
                dist.init_process_group("gloo", timeout=DAY)
            except (RuntimeError, ValueError) as error:
                raise InputError(f"rank {self.rank} of {self.size} did not reach the others at "
                                 f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')} "
                                 f"({str(error).splitlines()[0]}); check torchrun's --master-addr and "
                                 "--master-port") from error
            self.store = dist.distributed_c10d._get_default_store()
        return self

    def __exit__(self, kind: type | None, *_) -> None:
        if not self.alone and kind is None:
            dist.destroy_process_group()

    def mine(self, clients: Iterable[int]) -> list[int]:
        """Those of the clients that live on this rank."""
        return [k for k in clients if k % self.size == self.rank]

    @contextmanager
    def first_before_others(self) -> Iterator[None]:
        """The first rank leaves the block before the others enter it, so that a download is made once."""
        if not self.first:
            self.share(None)
        yield
        if self.first:
            self.share(None)

    def gather(self, own: dict[int, T]) -> dict[int, T]:
        """Every rank's entries by client, in the clients' order, on the first rank; elsewhere nothing."""
        everyone = [own]
        if not self.alone:
            everyone = [{}] * self.size if self.first else None
            self._exchange(dist.gather_object, own, everyone)
        return dict(sorted((k, v) for part in everyone or [] for k, v in part.items()))

    def share(self, value: T) -> T:
        """The first rank's value, on every rank; also the point where all have arrived."""
        box = [value]
        if not self.alone:
            self._exchange(dist.broadcast_object_list, box)
        return box[0]

    def speaks(self) -> bool:
        """True on one rank, the first to ask: the one that tells the user how the run ended."""
        try:
            return self.alone or self.store.add("said", 1) == 1
        except (AttributeError, RuntimeError):   # the ranks never met, or torchrun is gone
            return True

    @staticmethod
    def _exchange(operation, *arguments) -> None:
        try:
            operation(*arguments)
        except RuntimeError as error:
            raise PeerLost from error
