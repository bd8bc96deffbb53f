"""Ctrl-C and SIGTERM: noticed wherever they arrive, put off while files are written."""
import os
import signal
import sys
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


class Deleted:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_interrupts_at_once(number):
    with pytest.raises(Interrupted) as caught, Interrupts():
        os.kill(os.getpid(), number)
        pytest.fail("went on")
    assert caught.value.args == (number,)


def test_one_that_python_drops_comes_again_at_the_next_step_of_an_optimiser(capfd):
    optimizer, steps = torch.optim.Adam([torch.zeros(3, requires_grad=True)]), 0
    for lose in (arrive_while_freeing, Deleted):
        with pytest.raises(Interrupted), Interrupts():
            optimizer.step()
            lose()
            steps += 1   # it was dropped
            optimizer.step()
            pytest.fail("went on")
    assert steps == 2 and capfd.readouterr().err == ""   # and no traceback of it
    optimizer.step()   # outside, nothing is left of it


@pytest.mark.parametrize("again", [signals.check, lambda: None])
def test_it_comes_again_where_it_is_asked_for_and_at_the_end(again):
    passed = []
    with pytest.raises(Interrupted) as caught, Interrupts():
        arrive_while_freeing()
        again()
        passed.append(1)
    assert caught.value.args == (signal.SIGTERM,) and bool(passed) == (again is not signals.check)
    signals.check()


def test_an_error_is_not_hidden_by_one_that_was_dropped():
    with pytest.raises(ValueError, match="mine"), Interrupts():
        arrive_while_freeing()
        raise ValueError("mine")


def test_other_dropped_errors_are_still_said(capsys, monkeypatch):
    said = []
    monkeypatch.setattr(sys, "unraisablehook", said.append)
    with Interrupts():
        thing = Object()
        reference = weakref.ref(thing, lambda _: 1 / 0)
        del thing
    assert [type(what.exc_value) for what in said] == [ZeroDivisionError] and reference() is None
    assert sys.unraisablehook == said.append


def test_signals_are_put_off_while_they_are_held():
    done = []
    with pytest.raises(Interrupted), Interrupts() as interrupts:
        with interrupts.held():
            for number in SIGNALS:
                os.kill(os.getpid(), number)
            interrupts.check()
            signals.check()
            done.append("written")
        done.append("went on")
    assert done == ["written"]


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
