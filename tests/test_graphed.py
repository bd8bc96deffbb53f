"""Replayed steps: the plain client's numbers, with a stand-in for the CUDA graph."""
import dataclasses

import numpy as np
import pytest
import torch
from test_update import FIRST, SECOND, make

from engine.graphed import GraphedTrainer
from methods import METHODS


def graphed(client):
    """The same client with steps replayed, and how often each capture was."""
    captures, replays = [], []

    def stand_in(step):
        captures.append(step)
        for _ in range(3):   # as a real capture's warm-up does: runs that must leave no trace
            step()
        return lambda: (replays.append(step), step())
    fields = {field.name: getattr(client, field.name) for field in dataclasses.fields(client)}
    return GraphedTrainer(**fields, capture=stand_in), captures, replays


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("changes", [{}, {"optimizer": "sgd", "lr": 0.05, "momentum": 0.9},
                                     {"kl_warmup": 2, "augment": "flip+shift", "lr_warmup": 0.5}])
def test_replayed_steps_give_the_plain_steps_numbers(tiny_arrays, name, changes):
    if name in ("lg_fedavg", "fedavg") and "kl_warmup" in changes:
        changes = {**changes, "kl_warmup": 0}
    plain, head, private = make(tiny_arrays, name, epochs=2, head_lr=0.3, **changes)
    replayed, captures, replays = graphed(make(tiny_arrays, name, epochs=2, head_lr=0.3, **changes)[0])
    for client, round, own in ((0, 1, FIRST), (1, 1, SECOND), (0, 2, FIRST), (1, 3, SECOND)):
        expected = plain.train(client, round, own, head, private)
        found = replayed.train(client, round, own, head, private)
        for one, other in ((found[0], expected[0]), (found[1].parameters, expected[1].parameters)):
            assert one.keys() == other.keys()
            # not to the bit: here the learning rate is a float32 tensor
            assert all(torch.allclose(one[n], other[n], atol=1e-5) for n in one)
        assert found[2] == pytest.approx(expected[2], rel=1e-4, nan_ok=True)
        figures = [c.evaluate(client, round, own, found[0], found[1]) for c in (plain, replayed)]
        assert figures[0] == pytest.approx(figures[1], rel=1e-3, nan_ok=True)
    assert len(captures) == (3 if "kl_warmup" in changes and changes["kl_warmup"] else 1)   # one a beta
    assert len(replays) == 2 * (3 + 2 + 3 + 2)   # full batches only: of 100 and 80 images


def test_a_batch_too_short_is_never_captured(tiny_arrays):
    replayed, captures, _ = graphed(make(tiny_arrays, batch_size=500)[0])
    _, head, private = make(tiny_arrays)
    assert replayed.train(0, 1, np.arange(200), head, private)[2]["n"] == 200
    assert not captures


def test_where_a_capture_fails_plain_steps_go_on(tiny_arrays):
    def fails(step):
        step()
        raise RuntimeError("not permitted")
    plain, head, private = make(tiny_arrays, lr_decay=0.0)
    replayed, *_ = graphed(make(tiny_arrays, lr_decay=0.0)[0])
    replayed.capture = fails
    expected = plain.train(0, 1, FIRST, head, private)
    with pytest.warns(UserWarning, match="no CUDA graph.*not permitted"):
        found = replayed.train(0, 1, FIRST, head, private)
    assert replayed.capture is None
    for name, value in expected[1].parameters.items():
        assert torch.allclose(found[1].parameters[name], value, atol=1e-5)


def test_what_the_driver_picks(driver, place):
    """No graph on a CPU."""
    args = driver.args_parser(place.argv())
    data = driver.datasets.load("tiny", args.data_dir)
    assert type(driver.make_trainer(args, data, torch.device("cpu"))) is driver.Trainer


def test_a_loss_that_looks_at_what_was_sent_sees_this_rounds(tiny_arrays):
    """FedProx's, with another head each round: what a captured step reads is overwritten, not replaced."""
    def proximal(step):
        now = dict(step.model.named_parameters())
        return 50 * sum((now[name] - value).square().sum() for name, value in step.sent.items())
    plain, head, private = make(tiny_arrays, "fedavg", lr_decay=0.0)
    plain.method = dataclasses.replace(plain.method, loss=proximal)
    replayed, captures, _ = graphed(plain)
    for round in (1, 2, 3):
        sent = {name: value + 0.1 * round for name, value in head.items()}
        expected, found = (client.train(0, round, FIRST, sent, private) for client in (plain, replayed))
        assert all(torch.allclose(found.upload[name], value, atol=1e-5) for name, value in expected.upload.items())
    assert len(captures) == 1
