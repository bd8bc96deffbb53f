"""Signals that wait while files are written, and standard streams: one that cannot fail, one voice of several."""
import errno
import io
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from typing import TextIO

from utils import Late, printable

LAST_WORDS = 20   # seconds that the first of several processes has to print that the options are wrong
optimizer = Late("torch.optim.optimizer")


class Interrupted(BaseException):
    """Ctrl-C or SIGTERM; the argument is the signal's number."""


class PeerLost(Exception):
    """Another process of this run is gone."""


class Interrupts:
    """Raise Interrupted for SIGINT and SIGTERM while entered; inside ``held()``, at its end.

    Python drops an exception that is raised while it frees an object, so a signal is remembered, and raised again
    at the next optimiser step, at ``check()``, or at the end. In threads other than the main one it does nothing.
    """

    entered: "list[Interrupts]" = []   # the innermost is the last

    def __enter__(self):
        self.holds, self.pending, self.thread = 0, None, threading.current_thread()
        numbers = (signal.SIGINT, signal.SIGTERM) if self.thread is threading.main_thread() else ()
        self.before = {number: signal.signal(number, self._arrived) for number in numbers}
        self.unraisable, sys.unraisablehook = sys.unraisablehook, self._dropped
        self.step_hook = optimizer.register_optimizer_step_pre_hook(lambda *_: self.check())
        self.entered.append(self)
        return self

    def __exit__(self, kind, *_):
        self.entered.remove(self)
        self.step_hook.remove()
        sys.unraisablehook = self.unraisable
        for number, handler in self.before.items():
            signal.signal(number, handler)
        if kind is None:
            self.check()

    def _arrived(self, number, frame):
        self.pending = number
        self.check()

    def _dropped(self, unraisable) -> None:
        """Print nothing about an Interrupted that Python drops: it is raised again."""
        if not isinstance(unraisable.exc_value, Interrupted):
            self.unraisable(unraisable)

    def check(self) -> None:
        """Raise Interrupted if a signal has arrived, unless signals are held or another thread asks."""
        if self.pending and not self.holds and threading.current_thread() is self.thread:
            raise Interrupted(self.pending)


def check() -> None:
    """Raise Interrupted if a signal has arrived; call it where it is safe to stop."""
    for interrupts in Interrupts.entered:
        interrupts.check()


@contextmanager
def held() -> Iterator[None]:
    """Hold signals back until the end of the block, whose writes belong together."""
    for interrupts in Interrupts.entered:
        interrupts.holds += 1
    try:
        yield
    finally:
        for interrupts in Interrupts.entered:
            interrupts.holds -= 1
    check()


class Steady:
    """A standard stream that never fails: a full disk behind it, or ``| head``, must not end a training.

    Characters that the stream cannot encode, or that a terminal would obey, are written as escapes.
    """

    def __init__(self, stream: TextIO | None, warning: str = ""):
        self.stream = stream or os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")   # None: closed before the start
        self.warning = warning
        if hasattr(self.stream, "reconfigure"):
            self.stream.reconfigure(errors="backslashreplace")

    def __getattr__(self, name: str):
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        self._try(self.stream.write, printable(text, kept="\n\r\t"))
        return len(text)

    def flush(self) -> None:
        self._try(self.stream.flush)

    def _try(self, operation, *arguments) -> None:
        try:
            operation(*arguments)
        except BlockingIOError:   # a non-blocking terminal, full for a moment
            select.select([], [self.stream.fileno()], [], 1.0)
        except OSError as error:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())   # also for what is still buffered
            if self.warning and error.errno != errno.EPIPE:
                print(f"{self.warning} ({error.strerror})", file=sys.stderr)


@contextmanager
def steady_output(program: str) -> Iterator[None]:
    """Make printing unable to fail while entered; standard error says once that standard output fails.

    Ctrl-C ends the program with one line, also while modules are imported, unless something else handles it.
    """
    while os.open(os.devnull, os.O_RDWR) <= 2:   # else a file of ours would become a stream that was closed
        pass
    sys.stderr = Steady(sys.stderr)
    sys.stdout = Steady(sys.stdout, f"{program}: warning: standard output cannot be written, what it would "
                                    "say is lost; files are written as usual")

    def stop(*_) -> None:
        print(f"{program}: interrupted", file=sys.stderr)
        sys.stdout.flush()
        os._exit(130)
    before = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        sys.stdout.flush()


@contextmanager
def first_voice() -> Iterator[None]:
    """Show the standard error of torchrun's first process only while entered: all would print the same.

    The others end LAST_WORDS seconds later, since torchrun stops all processes when one has ended.
    """
    first = os.environ.get("RANK", "0") == "0" or os.environ.get("WORLD_SIZE", "1") == "1"
    try:
        with redirect_stderr(sys.stderr if first else io.StringIO()):
            yield
    except SystemExit as stop:
        if stop.code and not first:
            time.sleep(LAST_WORDS)
        raise
