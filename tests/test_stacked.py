"""Clients trained as one stack or in threads: the numbers that each has alone."""
import dataclasses
import threading
import time

import numpy as np
import pytest
import torch
from test_update import equal, make, update_of, without_draws
from torch import vmap

from engine import clients
from engine import threads as threaded
from engine.clients import train_each
from methods import METHODS
from runs.csvs import METRICS
from update import ClientState, Diverged, Trainer

INDICES = {0: np.arange(90), 2: np.arange(90, 160), 3: np.arange(20, 110), 5: np.arange(40)}


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def outcomes(client, most, head, private, indices=None):
    get = private if callable(private) else lambda k: private
    return dict(train_each(client, 2, indices or INDICES, head, get, most))


@pytest.mark.parametrize("name, changes", [("fedavg", {"optimizer": "sgd", "momentum": 0.9, "lr": 0.05}),
                                           ("lg_fedavg", {"head_lr": 0.1})])
def test_stacked_and_sequential_clients_agree(tiny_arrays, name, changes):
    results = []
    for most in (1, 2, 8):
        client, head, private = make(tiny_arrays, name, epochs=2, **changes)
        results.append(outcomes(without_draws(client), most, head, private))
    alone = results[0]
    for stacked in results[1:]:
        assert stacked.keys() == alone.keys() == INDICES.keys()
        for k, (upload, kept, figures) in alone.items():
            torch.testing.assert_close((upload, kept.parameters), (stacked[k][0], stacked[k][1].parameters),
                                       atol=2e-5, rtol=1e-5)
            assert kept.steps == stacked[k][1].steps == 2 * -(-len(INDICES[k]) // 32)
            assert [figures[name] for name in METRICS] == pytest.approx(
                [stacked[k][2][name] for name in METRICS], abs=1e-4, nan_ok=True)


def test_gradients_lie_in_memory_as_their_parameters_do(tiny_arrays, monkeypatch):
    """PyTorch's fused optimisers read both in the order of memory: else they would pair each weight with another's
    gradient. On a GPU convolutions may give them in an order of their own."""
    def transposed(function):
        def run(*given):
            gradients, rest = vmap(function)(*given)
            return {name: value.mT.contiguous().mT if value.dim() > 2 else value
                    for name, value in gradients.items()}, rest
        return run
    client, head, private = make(tiny_arrays)
    expected, strides, make_optimizer = outcomes(client, 4, head, private), [], type(client).make_optimizer

    def spied(self, parameters):
        optimizer = make_optimizer(self, parameters)
        optimizer.register_step_pre_hook(lambda *_: strides.extend(
            (value.stride(), value.grad.stride()) for value in parameters.values()))
        return optimizer
    monkeypatch.setattr(type(client), "make_optimizer", spied)
    monkeypatch.setattr("engine.stacks.vmap", transposed)
    found = outcomes(client, 4, head, private)
    assert len(strides) > 10 and all(value == gradient for value, gradient in strides)
    assert all(equal(found[k].upload, expected[k].upload) for k in INDICES)


def test_clients_draw_in_a_stack_what_they_draw_alone(tiny_arrays):
    """Noise, dropout and augmentation: whoever their neighbours are, and also for a last batch that is short."""
    results, changes = [], {"epochs": 2, "augment": "flip+shift", "optimizer": "sgd", "lr": 1e-2}
    for most, indices in ((1, INDICES), (2, INDICES), (8, INDICES), (8, {2: INDICES[2], 5: INDICES[5]})):
        client, head, private = make(tiny_arrays, **changes)
        results.append(outcomes(client, most, head, private, indices))

    def way(trained):
        return update_of(trained, head, private)
    for stacked in results[1:]:
        for k, trained in stacked.items():
            # Rounding may switch a rectifier and so turn an update by a little; other draws turn it by far.
            alone = way(results[0][k])
            assert (way(trained) - alone).norm() < 0.05 * alone.norm()
            assert [trained.metrics[name] for name in METRICS] == pytest.approx(
                [results[0][k].metrics[name] for name in METRICS], abs=1e-3)
    other = way(results[0][3])
    client, head, private = make(tiny_arrays, **changes)
    client.training = dataclasses.replace(client.training, seed=2)
    assert (way(outcomes(client, 1, head, private)[3]) - other).norm() > 0.2 * other.norm()


@pytest.mark.parametrize("case", ["a network that draws otherwise", "a loss of its own"])
def test_what_cannot_be_stacked_is_trained_one_after_another(tiny_arrays, case):
    """From one generator for the whole stack its draws would depend on its neighbours."""
    class Jittered(type(make(tiny_arrays)[0].model)):
        def forward(self, x, y=None):
            return super().forward(x + 0.1 * torch.rand(x.shape))
    results = []
    for most in (1, 8):
        client, head, private = make(tiny_arrays, "ressfl" if "loss" in case else "rve_pfl")
        if "draws" in case:
            client.model.__class__ = Jittered
        results.append(outcomes(client, most, head, private))
    assert all(equal(results[0][k].upload, results[1][k].upload) for k in INDICES)


def test_clients_with_other_step_counts_are_not_stacked(tiny_arrays):
    """The learning rate decays with a client's own steps."""
    results = []
    for most in (1, 8):
        client, head, private = make(tiny_arrays, "fedavg", lr_decay=0.1)
        results.append(outcomes(without_draws(client), most, head,
                                lambda k, own=private: ClientState(own.parameters, 40 * (k == 2))))
    for k in INDICES:
        alone, stacked = (found[k][0] for found in results)
        assert all(torch.allclose(alone[n], stacked[n], atol=2e-5) for n in alone)
        assert results[0][k][1].steps == results[1][k][1].steps


@pytest.mark.parametrize("most", [8, None])
def test_one_client_that_diverges_leaves_the_others_alone(tiny_arrays, two_threads, most):
    client, head, private = make(tiny_arrays, "lg_fedavg", epochs=1)
    broken = ClientState({name: value * float("nan") for name, value in private.parameters.items()})
    found = outcomes(client, most, head, lambda k: broken if k == 2 else private)
    assert isinstance(found[2], Diverged) and "client 2, round 2" in str(found[2])
    assert all(value.isfinite().all() for k in (0, 3, 5) for value in found[k][0].values())


def test_frozen_encoders_stay_also_where_a_stack_is_asked_for(tiny_arrays):
    client, head, private = make(tiny_arrays, part="shared")
    for trained in outcomes(client, 8, head, private).values():
        assert equal(trained.client_state.parameters, private.parameters) and not equal(trained.upload, head)


def same(one, other):
    return (str(one.metrics) == str(other.metrics) and equal(one.upload, other.upload)
            and one.client_state.steps == other.client_state.steps
            and equal(one.client_state.parameters, other.client_state.parameters))


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
        assert same(found[k], expected[k])
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
        assert same(results[0][k], results[1][k])


def test_whoever_leaves_early_waits_for_a_step_at_most(tiny_arrays, two_threads, monkeypatch):
    """Ctrl-C: clients that still train stop at their next step, and nothing runs on behind the caller's back."""
    steps, step, left = [], Trainer._step, threading.Event()

    def watched(self, *arguments):
        if len(steps) >= 9:   # of the first client, all of its steps
            left.wait(20)
        steps.append(threading.current_thread())
        return step(self, *arguments)
    monkeypatch.setattr(Trainer, "_step", watched)
    client, head, private = make(tiny_arrays, epochs=3)
    going = threaded.in_threads(client, 1, INDICES, head, lambda k: private, 1)
    next(going)
    threading.Timer(0.3, left.set).start()   # when the caller waits for them already
    going.close()
    assert len(steps) <= 10 and torch.get_num_threads() == 2   # of 24
    time.sleep(0.2)
    assert len(steps) <= 10


def test_small_models_on_a_cpu_are_trained_in_threads(tiny_arrays, two_threads, monkeypatch):
    """Unless the user or the method says otherwise."""
    client, head, private = make(tiny_arrays, "fedavg")
    called = []
    monkeypatch.setattr(clients, "in_threads", lambda *a: called.append(a[-1]) or iter(()))
    monkeypatch.setattr(Trainer, "train", lambda *_: None)

    def threads(stack=None):
        called.clear()
        outcomes(client, stack, head, private)
        return list(called)
    assert threads() == [2] and threads(stack=1) == []
    large = dataclasses.replace(client.training, batch_size=257)
    for where, name, value in ((client, "training", large), (threaded, "MOST", 1), (threaded, "SMALL", 10),
                               (client, "method", METHODS["nbafl_prox"])):
        with monkeypatch.context() as patch:
            patch.setattr(where, name, value)
            assert threads() == []
