"""Small clients trained in threads: the numbers that each has alone, whoever takes turns."""
import dataclasses
import threading
import time

import pytest
import torch
import torch.nn.functional as F
from test_stacked import INDICES, outcomes
from test_update import make

from engine import clients
from engine import threads as threaded
from methods import METHODS
from update import ClientState, Diverged, Trainer


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_dropout_draws_as_pytorchs_own(p):
    x, mode = torch.ones(50, 3), threaded.DrawsFrom(torch.Generator().manual_seed(5))
    torch.manual_seed(5)
    expected = F.dropout(x, p), torch.randn_like(x), torch.rand(2, 3), torch.randint(4, (5,))
    with mode:
        found = F.dropout(x, p), torch.randn_like(x), torch.rand(2, 3), torch.randint(4, (5,))
    assert all(torch.equal(one, other) for one, other in zip(expected, found, strict=True))


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def same(one, other):
    assert one.metrics == pytest.approx(other.metrics, abs=0, nan_ok=True)
    assert one.client_state.steps == other.client_state.steps
    for a, b in ((one.upload, other.upload), (one.client_state.parameters, other.client_state.parameters)):
        assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("method, augment, dtype", [
    ("rve_pfl", "none", torch.float32), ("rve_pfl", "flip+shift", torch.bfloat16),
    ("fedavg", "flip", torch.float32)])
def test_clients_in_threads_are_those_alone_to_the_bit(tiny_arrays, two_threads, method, augment, dtype):
    """Noise, dropout, augmentation, order and optimiser, and PyTorch's own generator is left alone."""
    client, head, private = make(tiny_arrays, method, epochs=2, augment=augment, dtype=dtype)
    torch.set_num_threads(1)   # each kernel on one core, as in a thread
    expected = outcomes(client, 1, head, private)
    torch.set_num_threads(2)
    client, head, private = make(tiny_arrays, method, epochs=2, augment=augment, dtype=dtype)
    torch.manual_seed(4)
    before = torch.random.get_rng_state()
    found = dict(threaded.in_threads(client, 2, INDICES, head, lambda k: private, 2))
    assert list(found) == list(INDICES)
    for k in INDICES:
        same(found[k], expected[k])
    assert torch.equal(before, torch.random.get_rng_state())
    assert torch.get_num_threads() == 2


def test_a_weight_that_is_used_twice_is_summed_the_same_whoever_takes_turns(tiny_arrays, two_threads):
    """The head that rehearses, in bf16: autocast's cache of weights belongs to the process."""
    results = []
    for _ in range(2):
        client, *_ = make(tiny_arrays, epochs=2, dtype=torch.bfloat16)
        torch.manual_seed(1)
        client.model = METHODS["rve_pfl"].build(client.model.image_shape, client.num_classes,
                                                {"init_logvar": -2.0, "prior": "class"})
        head, private = client.shared_and_private(client.state())
        results.append(dict(threaded.in_threads(client, 2, INDICES, head, lambda k, p=private: ClientState(p), 3)))
    for k in INDICES:
        same(results[0][k], results[1][k])


def test_whoever_leaves_early_waits_for_a_step_at_most(tiny_arrays, two_threads, monkeypatch):
    """Ctrl-C: clients that still train stop at their next step, and nothing runs on behind the caller's back."""
    steps, step, train = [], Trainer._step, threaded.ThreadsTrainer.train
    here, left = threading.local(), threading.Event()

    def noting(self, client, *rest):
        here.client = client
        return train(self, client, *rest)

    def watched(self, *arguments):
        if here.client != 0:
            left.wait(20)
        steps.append(here.client)
        return step(self, *arguments)
    monkeypatch.setattr(threaded.ThreadsTrainer, "train", noting)
    monkeypatch.setattr(Trainer, "_step", watched)
    client, head, private = make(tiny_arrays, epochs=3)
    going = threaded.in_threads(client, 1, INDICES, head, lambda k: private, 2)
    next(going)
    closing = threading.Timer(0.3, left.set)   # when the caller waits for them already
    closing.start()
    going.close()
    made = len(steps)
    assert steps.count(0) == 9 and made <= 11   # a step each of those that were under way, of 24
    assert torch.get_num_threads() == 2
    time.sleep(0.2)
    assert len(steps) == made


def test_one_that_diverges_and_one_that_fails(tiny_arrays, two_threads, monkeypatch):
    client, head, private = make(tiny_arrays)
    bad = ClientState({name: value * float("nan") for name, value in private.parameters.items()})
    found = dict(threaded.in_threads(client, 2, INDICES, head, lambda k: bad if k == 2 else private, 2))
    assert isinstance(found[2], Diverged) and "client 2, round 2" in str(found[2])
    assert not any(isinstance(found[k], Diverged) for k in (0, 3, 5))
    monkeypatch.setattr(Trainer, "local_update", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        list(threaded.in_threads(client, 2, INDICES, head, lambda k: private, 2))


def test_who_trains_in_threads(tiny_arrays, two_threads, monkeypatch):
    """Small models on a CPU of several threads, unless the user or the method says otherwise."""
    client, head, private = make(tiny_arrays, "fedavg")
    assert threaded.threads_for(client) == 2
    called = []
    monkeypatch.setattr(clients, "in_threads", lambda *a: called.append(a[-1]) or iter(()))

    def threads(stack=None):
        called.clear()
        list(clients.train_each(client, 1, INDICES, head, lambda k: private, stack))
        return list(called)
    assert threads() == [2] and threads(stack=1) == threads(stack=2) == []
    large = dataclasses.replace(client.training, batch_size=257)
    for where, name, value in ((client, "training", large), (threaded, "MOST", 1), (threaded, "SMALL", 10),
                               (client, "method", METHODS["nbafl_prox"])):
        with monkeypatch.context() as patch:
            patch.setattr(Trainer, "train", lambda *_: None)
            patch.setattr(where, name, value)
            assert threads() == []
    network = type(client.model)
    client.model.__class__ = type("Jittered", (network,), {
        "forward": lambda self, x, y=None: network.forward(self, x + 0.1 * torch.rand(x.shape))})
    assert threads() == []   # its draws are not known
