"""Signals that are put off while files are written, and a standard output that cannot fail."""
import errno
import os
import select
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from torch.optim.optimizer import register_optimizer_step_pre_hook

from utils import printable


class Interrupted(BaseException):
    """Ctrl-C or SIGTERM, whose number is its argument."""


class Interrupts:
    """While entered, SIGINT and SIGTERM raise Interrupted; inside ``held()``, at its end.

    Python drops an exception that is raised while it frees an object. So a signal is remembered, and raised once
    more at the next step of an optimiser, at ``check()``, or at the end. Entered in another thread than the main
    one, it leaves signals alone: Python would not deliver them there.
    """

    entered: "list[Interrupts]" = []   # the innermost is the last

    def __enter__(self):
        self.holding, self.pending, self.thread = False, None, threading.current_thread()
        numbers = (signal.SIGINT, signal.SIGTERM) if self.thread is threading.main_thread() else ()
        self.before = {number: signal.signal(number, self._arrived) for number in numbers}
        self.unraisable, sys.unraisablehook = sys.unraisablehook, self._dropped
        self.step_hook = register_optimizer_step_pre_hook(lambda *_: self.check())
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

    def _dropped(self, what) -> None:
        """Print nothing about an Interrupted that Python drops: it comes again."""
        if not isinstance(what.exc_value, Interrupted):
            self.unraisable(what)

    def check(self) -> None:
        """Raise Interrupted if a signal has come, unless signals are held, or another thread asks."""
        if self.pending and not self.holding and threading.current_thread() is self.thread:
            raise Interrupted(self.pending)

    @contextmanager
    def held(self):
        """Put signals off until the end of the block: its writes belong together."""
        self.holding = True
        try:
            yield
        finally:
            self.holding = False
        self.check()


def check() -> None:
    """Raise Interrupted if a signal has come that was dropped. Called where it is safe to stop."""
    for interrupts in Interrupts.entered:
        interrupts.check()


class Steady:
    """A standard stream that never fails: if it cannot be written any more, the text is dropped.

    What the program prints is also in its files. So a full disk behind standard output, or a reader who has
    seen enough (``| head``), is no reason to lose a training. Characters that the stream cannot encode, or that a
    terminal would obey, are shown as escapes: names of files may hold any.
    """

    def __init__(self, stream: TextIO | None, lost: str = ""):
        # None: closed before we began.
        self.stream, self.lost = stream or os.fdopen(os.open(os.devnull, os.O_WRONLY), "w"), lost
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
        except BlockingIOError:   # a terminal that others made non-blocking, full for a moment
            select.select([], [self.stream.fileno()], [], 1.0)
        except OSError as error:
            # What is still in the stream's buffer goes there too.
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())
            if self.lost and error.errno != errno.EPIPE:
                print(f"{self.lost} ({error.strerror})", file=sys.stderr)


@contextmanager
def steady_output(program: str) -> Iterator[None]:
    """While entered, printing cannot fail (``Steady``). If standard output fails, standard error says so once."""
    while os.open(os.devnull, os.O_RDWR) <= 2:   # or a file of ours would become the stream that was closed
        pass
    sys.stderr = Steady(sys.stderr)
    sys.stdout = Steady(sys.stdout, f"{program}: warning: standard output cannot be written, what it would "
                                    "say is lost; files are written as usual")
    try:
        yield
    finally:
        sys.stdout.flush()
