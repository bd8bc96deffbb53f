"""The processes of a run: one, or as many as torchrun started, each with clients of its own.

    torchrun --nproc-per-node 2 RVE-PFL.py --dataset cifar

Client k always belongs to rank ``k mod size``, so a private encoder never leaves its process. Every rank runs the
same program; the first is also the server, and it alone writes CSVs. The uploads go to the first rank, and the new
shared parameters to all, in main memory over gloo, whatever device trains.
"""
import datetime
import io
import os
import re
import socket
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, redirect_stderr
from typing import TypeVar

import torch.distributed as dist

from server.base import Aggregated, Round, Server
from utils import InputError, shown

T = TypeVar("T")
DAY = datetime.timedelta(days=1)   # ranks may wait long for one another; one that died is noticed at once
SILENCE = 10      # seconds of waiting for the others before anything is printed
LAST_WORDS = 20   # seconds that the first rank has to print that the options are wrong
MOST = 10_000     # processes


def environment_number(name: str, low: int, high: int, default: str | None = None) -> int:
    """Return an environment variable as a whole number between ``low`` and ``high``; InputError if it is none."""
    text = os.environ.get(name, default)
    if text is None or not re.fullmatch("[0-9]{1,9}", text) or not low <= int(text) <= high:
        fault = "is not set" if text is None else f"is {shown(text)}, not a whole number between {low} and {high}"
        raise InputError(f"the environment's {name} {fault}; start several processes with torchrun, or one "
                         "without RANK and WORLD_SIZE")
    return int(text)


class PeerLost(Exception):
    """Another process of this run is gone."""


class Ranks:
    """This process among those of a run, by torchrun's environment; a context manager.

    Without torchrun a run is one process, and nothing is exchanged. Every exchange raises PeerLost if a process of
    the run has died.

    Attributes:
        patience: seconds within which all must have met.
        local, local_size: its number among the processes on this machine, and their number.
    """

    def __init__(self) -> None:
        self.patience = 300.0
        self.store: dist.Store | None = None   # in which ranks announce themselves
        self.size = environment_number("WORLD_SIZE", 1, MOST, "1")
        self.rank = environment_number("RANK", 0, self.size - 1, "0" if self.size == 1 else None)
        self.alone, self.first = self.size == 1, self.rank == 0
        self.local, self.local_size = 0, 1
        if not self.alone:
            self.local_size = environment_number("LOCAL_WORLD_SIZE", 1, self.size, str(self.size))
            self.local = environment_number("LOCAL_RANK", 0, self.local_size - 1, "0")
            self.port = environment_number("MASTER_PORT", 1, 2**16 - 1)
            self.address = os.environ.get("MASTER_ADDR", "")
            if not self.address:
                raise InputError("the environment's MASTER_ADDR is not set; start several processes with torchrun")

    @contextmanager
    def first_voice(self) -> Iterator[None]:
        """Show the first rank's standard error only while entered: all would print the same.

        The others end LAST_WORDS seconds later, since torchrun stops all processes when one has ended.
        """
        try:
            with redirect_stderr(sys.stderr if self.first else io.StringIO()):
                yield
        except SystemExit as stop:
            if stop.code and not self.first:
                time.sleep(LAST_WORDS)
            raise

    def __enter__(self) -> "Ranks":
        if not self.alone:
            name, place = f"rank {self.rank} of {self.size}", f"{self.address}:{self.port}"
            try:
                self._meet(f"{name} waits for the others at {place}")
                dist.init_process_group("gloo", store=self.store, rank=self.rank, world_size=self.size,
                                        timeout=DAY)
            except (OSError, RuntimeError, ValueError) as error:
                raise InputError(f"{name} did not reach the others at {place} ({str(error).splitlines()[0]}); "
                                 "check torchrun's --master-addr and --master-port, or wait longer with "
                                 "--rendezvous_seconds") from error
        return self

    def __exit__(self, kind: type | None, *_) -> None:
        if not self.alone and kind is None:
            dist.destroy_process_group()

    def _meet(self, waiting: str) -> None:
        """Wait until all ranks are there. PyTorch's own waiting prints nothing and ignores Ctrl-C."""
        began, announced = time.monotonic(), False
        while missing := self._missing():
            waited = time.monotonic() - began
            if waited >= self.patience:
                if self.store is not None:   # for those who come later
                    self.store.delete_key(f"rank {self.rank}")
                raise TimeoutError(f"{missing}, after {waited:.0f} s")
            if waited >= SILENCE and not announced:
                announced = True
                print(f"{waiting} ({missing}), up to {self.patience:g} s", file=sys.stderr, flush=True)
            time.sleep(0.1)

    def _missing(self) -> str:
        """Return why the ranks have not met yet; "" once they have."""
        if self.store is None:
            # As in PyTorch's env://, the first rank is the server, if torchrun itself is not.
            serves = self.first and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
            if not serves:   # PyTorch would print its stack where nobody answers
                try:
                    socket.create_connection((self.address, self.port), timeout=5).close()
                except OSError as error:
                    return error.strerror or str(error)
            store = dist.TCPStore(self.address, self.port, self.size, serves, wait_for_workers=False)
            store.set_timeout(DAY)
            # torchrun keeps its store when it restarts the processes: earlier announcements do not count.
            self.store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
            self.store.set(f"rank {self.rank}", "is here")
        absent = (k for k in range(self.size) if not self.store.check([f"rank {k}"]))
        return next((f"rank {k} is not there" for k in absent), "")

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
        aggregated = server(round) if self.first else Aggregated(round.sent, {}, [])
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
