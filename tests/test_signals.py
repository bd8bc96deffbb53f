"""Ctrl-C and SIGTERM: noticed wherever they arrive, put off while files are written."""
import os
import signal
import threading
import weakref

import pytest
import torch

from engine import signals
from engine.signals import Interrupted, Interrupts

SIGNALS = [signal.SIGINT, signal.SIGTERM]


class Object:
    """Something that a weak reference can point to."""


def arrive_while_freeing(number=signal.SIGTERM):
    """Send the signal while Python frees an object: it drops what is raised there."""
    thing = Object()
    reference = weakref.ref(thing, lambda _: os.kill(os.getpid(), number))
    del thing
    return reference


@pytest.mark.parametrize("again", ["optimizer", "check", "end"])
def test_one_that_python_drops_comes_again(again, capfd):
    optimizer, passed = torch.optim.Adam([torch.zeros(3, requires_grad=True)]), []
    with pytest.raises(Interrupted) as caught, Interrupts():
        optimizer.step()
        arrive_while_freeing()
        passed.append("dropped")
        {"optimizer": optimizer.step, "check": signals.check, "end": lambda: None}[again]()
        passed.append("end")
    assert passed == ["dropped", "end"][:1 + (again == "end")] and caught.value.args == (signal.SIGTERM,)
    assert capfd.readouterr().err == ""   # no traceback of it
    optimizer.step()   # outside, nothing is left of it
    with pytest.raises(ValueError, match="mine"), Interrupts():
        arrive_while_freeing()
        raise ValueError("mine")   # which it does not hide


def test_signals_are_put_off_while_they_are_held():
    """And interrupt at once when they are not."""
    done = []
    with pytest.raises(Interrupted) as caught, Interrupts():
        with signals.held():
            for number in SIGNALS:
                os.kill(os.getpid(), number)
            with signals.held():
                signals.check()
            done.append("written")
        done.append("went on")
    assert done == ["written"] and caught.value.args == (signal.SIGTERM,)


def test_threads_neither_handle_signals_nor_are_stopped_by_them():
    before, seen = signal.getsignal(signal.SIGINT), []

    def work():
        with Interrupts():
            seen.append(signal.getsignal(signal.SIGINT))
            signals.check()
            torch.optim.SGD([torch.zeros(1, requires_grad=True)]).step()
            seen.append("went on")
    with Interrupts() as outer:
        outer.pending = signal.SIGINT   # as if Python had dropped it
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        outer.pending = None
    assert seen == [outer._arrived, "went on"] and signal.getsignal(signal.SIGINT) == before
