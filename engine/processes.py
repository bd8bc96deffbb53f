"""The processes that share a run: one, or as many as torchrun started, each with clients of its own.

    torchrun --nproc-per-node 2 RVE-PFL.py --dataset cifar

Client k always belongs to rank ``k mod size``, so a private encoder never leaves its process. Every rank runs
the same program. The first is also the server, and it alone writes CSVs. Heads travel twice a round: the uploads
to the first rank, and the new head to all. They are in main memory and travel over gloo, whatever device trains.
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

from utils import InputError, shown

T = TypeVar("T")
DAY = datetime.timedelta(days=1)   # ranks may wait long for one another; one that died is noticed at once
SILENCE = 10   # seconds of waiting for the others before anything is printed


LAST_WORDS = 20   # seconds that the first rank has to say that the options are wrong
MOST = 10_000   # processes


def number(name: str, low: int, high: int, default: int | None) -> int:
    """Return a variable of the environment as a whole number between ``low`` and ``high``.

    Raises:
        InputError: it is something else, or not set and has no default.
    """
    text = os.environ.get(name)
    if text is None and default is not None:
        return default
    if text is None or not re.fullmatch("[0-9]{1,9}", text) or not low <= int(text) <= high:
        said = "is not set" if text is None else f"is {shown(text)}, not a whole number between {low} and {high}"
        raise InputError(f"the environment's {name} {said}; start several processes with torchrun, or one without "
                         "RANK and WORLD_SIZE")
    return int(text)


class PeerLost(Exception):
    """Another process of this run is gone."""


class Ranks:
    """This process among those of a run.

    Reads torchrun's environment: without it, a run is one process and nothing is exchanged. Use it as a
    context manager, and ``speaks`` to have one process, whichever is first, tell the user how it ended.

    Attributes:
        patience: seconds within which all must have met.
        local, local_size: its number among the processes on this machine, and theirs.

    Raises:
        InputError (at the start): the environment does not describe such a process.
        PeerLost (every exchange): a process of the run has died.
    """

    def __init__(self) -> None:
        self.patience = 300.0
        self.store: dist.Store | None = None   # where ranks say that they are there
        self.size = number("WORLD_SIZE", 1, MOST, 1)
        self.rank = number("RANK", 0, self.size - 1, 0 if self.size == 1 else None)
        self.alone, self.first = self.size == 1, self.rank == 0
        self.local, self.local_size = 0, 1
        if not self.alone:
            self.local_size = number("LOCAL_WORLD_SIZE", 1, self.size, self.size)
            self.local = number("LOCAL_RANK", 0, self.local_size - 1, 0)
            self.port = number("MASTER_PORT", 1, 2**16 - 1, None)
            self.address = os.environ.get("MASTER_ADDR", "")
            if not self.address:
                raise InputError("the environment's MASTER_ADDR is not set; start several processes with torchrun")

    @contextmanager
    def first_voice(self) -> Iterator[None]:
        """While entered, only the first rank's standard error is shown: all would say the same.

        The others end LAST_WORDS seconds later: torchrun stops all processes when one has ended.
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
            me = f"rank {self.rank} of {self.size}"
            place = f"{self.address}:{self.port}"
            try:
                self._meet(f"{me} waits for the others at {place}")
                dist.init_process_group("gloo", store=self.store, rank=self.rank, world_size=self.size,
                                        timeout=DAY)
            except (OSError, RuntimeError, ValueError) as error:
                raise InputError(f"{me} did not reach the others at {place} ({str(error).splitlines()[0]}); "
                                 "check torchrun's --master-addr and --master-port, or wait longer with "
                                 "--rendezvous_seconds") from error
        return self

    def _meet(self, waiting: str) -> None:
        """Return once all ranks are there. PyTorch's own waiting prints nothing and ignores Ctrl-C."""
        began, said = time.monotonic(), False
        while missing := self._missing():
            waited = time.monotonic() - began
            if waited >= self.patience:
                if self.store is not None:   # for those who come later, it is not there
                    self.store.delete_key(f"rank {self.rank}")
                raise TimeoutError(f"{missing}, after {waited:.0f} s")
            if waited >= SILENCE and not said:
                said = True
                print(f"{waiting} ({missing}), up to {self.patience:g} s", file=sys.stderr, flush=True)
            time.sleep(0.1)

    def _missing(self) -> str:
        """What keeps the ranks from having met; nothing once they have."""
        if self.store is None:
            # As PyTorch's env:// has it: the first rank is the server, if torchrun itself is not.
            serves = self.first and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
            if not serves:   # PyTorch would print its stack where nobody answers
                try:
                    socket.create_connection((self.address, self.port), timeout=5).close()
                except OSError as error:
                    return error.strerror or str(error)
            store = dist.TCPStore(self.address, self.port, self.size, serves, wait_for_workers=False)
            store.set_timeout(DAY)
            # torchrun keeps its store when it starts the processes again: what they said before is over.
            self.store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
            self.store.set(f"rank {self.rank}", "is here")
        for k in range(self.size):
            if not self.store.check([f"rank {k}"]):
                return f"rank {k} is not there"
        return ""

    def __exit__(self, kind: type | None, *_) -> None:
        if not self.alone and kind is None:
            dist.destroy_process_group()

    def mine(self, clients: Iterable[int]) -> list[int]:
        """Those of the clients that live on this rank."""
        return [k for k in clients if k % self.size == self.rank]

    @contextmanager
    def first_before_others(self) -> Iterator[None]:
        """The first rank leaves the block before the others enter it, so that a download happens once."""
        if not self.first:
            self.wait()
        yield
        if self.first:
            self.wait()

    def gather(self, own: dict[int, T]) -> dict[int, T]:
        """Every rank's entries by client, in the clients' order, on the first rank; elsewhere nothing."""
        everyone: list[dict[int, T]] | None = [own]
        if not self.alone:
            everyone = [{}] * self.size if self.first else None
            self._exchange(dist.gather_object, own, everyone)
        found = {k: value for part in everyone or [] for k, value in part.items()}
        return {k: found[k] for k in sorted(found)}

    def gather_parts(self, own: dict[int, T], at_a_time: int = 16) -> Iterator[dict[int, T]]:
        """``gather``, some of each rank's entries at a time: what is under way is in memory several times."""
        if self.alone:
            yield own
            return
        keys, counts = list(own), self.gather({self.rank: len(own)})
        for start in range(0, self.share(max(counts.values(), default=0)), at_a_time):
            yield self.gather({k: own[k] for k in keys[start:start + at_a_time]})

    def share(self, value: T) -> T:
        """The first rank's value, on every rank; what the others hand in is not looked at."""
        box = [value]
        if not self.alone:
            self._exchange(dist.broadcast_object_list, box)
        return box[0]

    def wait(self) -> None:
        """Go on when every rank has arrived here."""
        if not self.alone:
            self._exchange(dist.barrier)

    def speaks(self) -> bool:
        """True for the first rank that asks: it tells the user how the run ended."""
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
