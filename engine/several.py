"""How the clients of a round are trained, one after another or several at once: to rounding, it is the same."""
from collections.abc import Callable, Iterator

import numpy as np

from engine.stacks import draws_of, in_stacks, stack_size
from engine.threads import at_once, threads_for
from server.base import State
from update import ClientState, Diverged, LocalUpdate, Trainer, one_by_one


def train_each(trainer: Trainer, round: int, indices: dict[int, np.ndarray], sent: State,
               private: Callable[[int], ClientState], stack: int | None) -> Iterator[tuple[int, LocalUpdate | Diverged]]:
    """``update.one_by_one``, or several clients at once: small ones in stacks on a GPU, in threads on a CPU.

    A method with a loss of its own, which looks into the model, is always trained one client after another, and so
    is a network that draws otherwise than ``draws_of`` knows.

    Args:
        stack: how many to train as one stacked model, 1 for one after another; None for what is fastest.
    """
    most = stack or stack_size(trainer.labels.device, trainer.training.batch_size)
    threads = 1 if stack else threads_for(trainer)
    if most == threads == 1 or trainer.method.loss is not None or draws_of(trainer) is None:
        yield from one_by_one(trainer, round, indices, sent, private)
    elif most > 1:
        yield from in_stacks(trainer, round, indices, sent, private, most)
    else:
        yield from at_once(trainer, round, indices, sent, private, threads)
