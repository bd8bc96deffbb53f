"""Clients trained as one stack: the numbers that each has alone."""
import numpy as np
import pytest
import torch
from test_update import make
from torch import nn

from engine.stacked import stack_size, train_each
from update import Diverged, Private

INDICES = {0: np.arange(90), 2: np.arange(90, 160), 3: np.arange(20, 110), 5: np.arange(40)}


def without_draws(client):
    """Turn off dropout, whose draws a stack makes in another order."""
    for part in client.model.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
    return client


def outcomes(client, most, head, private, indices=None):
    get = private if callable(private) else lambda k: private
    return dict(train_each(client, 2, indices or INDICES, head, get, most))


@pytest.mark.parametrize("name", ["fedavg", "lg_fedavg"])
@pytest.mark.parametrize("changes", [{}, {"optimizer": "sgd", "momentum": 0.9, "lr": 0.05}, {"head_lr": 0.1}])
def test_stacked_and_sequential_clients_agree(tiny_arrays, name, changes):
    results = []
    for most in (1, 2, 8):
        client, head, private = make(tiny_arrays, name, epochs=2, **changes)
        results.append(outcomes(without_draws(client), most, head, private))
    alone = results[0]
    for stacked in results[1:]:
        assert stacked.keys() == alone.keys() == INDICES.keys()
        for k, (upload, kept, figures) in alone.items():
            for one, other in ((upload, stacked[k][0]), (kept.parameters, stacked[k][1].parameters)):
                assert one.keys() == other.keys()
                assert all(torch.allclose(one[n], other[n], atol=2e-5) for n in one)
            assert kept.steps == stacked[k][1].steps == 2 * -(-len(INDICES[k]) // 32)
            assert figures == pytest.approx(stacked[k][2], abs=1e-4, nan_ok=True)


def test_a_stack_with_noise_learns_as_its_clients_do_alone(tiny_arrays):
    figures = []
    for most in (1, 4):
        client, head, private = make(tiny_arrays, epochs=12)
        found = outcomes(client, most, head, private, {k: np.arange(180) for k in range(4)})
        assert not torch.equal(found[0][1].parameters["encoder.mu.weight"],
                               found[1][1].parameters["encoder.mu.weight"])
        figures.append({name: np.mean([each[2][name] for each in found.values()])
                        for name in ("accuracy", "kl_nats")})
    assert figures[0]["accuracy"] > 0.9
    assert figures[1]["accuracy"] == pytest.approx(figures[0]["accuracy"], abs=0.05)
    assert figures[1]["kl_nats"] == pytest.approx(figures[0]["kl_nats"], rel=0.3)   # seeds: 8 % around


def test_a_stack_draws_the_same_twice(tiny_arrays):
    client, head, private = make(tiny_arrays)
    first, second = (outcomes(client, 4, head, private) for _ in range(2))
    assert all(torch.equal(first[k][0][n], second[k][0][n]) for k in first for n in first[k][0])


def test_clients_with_other_step_counts_are_not_stacked(tiny_arrays):
    """The learning rate decays with a client's own steps."""
    results = []
    for most in (1, 8):
        client, head, private = make(tiny_arrays, "fedavg", lr_decay=0.1)
        results.append(outcomes(without_draws(client), most, head,
                                lambda k, own=private: Private(own.parameters, 40 * (k == 2))))
    for k in INDICES:
        alone, stacked = (found[k][0] for found in results)
        assert all(torch.allclose(alone[n], stacked[n], atol=2e-5) for n in alone)
        assert results[0][k][1].steps == results[1][k][1].steps


def test_one_client_that_diverges_leaves_the_others_alone(tiny_arrays):
    client, head, private = make(tiny_arrays, "lg_fedavg", epochs=1)
    broken = Private({name: value * float("nan") for name, value in private.parameters.items()})
    found = outcomes(client, 8, head, lambda k: broken if k == 2 else private)
    assert isinstance(found[2], Diverged) and "client 2, round 2" in str(found[2])
    assert all(value.isfinite().all() for k in (0, 3, 5) for value in found[k][0].values())


def test_augmented_images_are_stacked_too(tiny_arrays):
    client, head, private = make(tiny_arrays, "fedavg", augment="flip+shift")
    assert outcomes(client, 8, head, private).keys() == INDICES.keys()


def test_stacks_are_for_gpus():
    assert stack_size(torch.device("cpu"), 10) == 1
    assert stack_size(torch.device("cuda"), 10) == 50
    assert stack_size(torch.device("cuda"), 256) == 1


@pytest.mark.parametrize("name", ["fedavg", "rve_pfl"])
def test_clients_of_a_stack_draw_for_themselves(tiny_arrays, name):
    """On images all alike the order says nothing: dropout and noise alone tell two clients apart."""
    client, head, private = make(tiny_arrays, name)
    client.images, client.labels = torch.full_like(client.images, 90), torch.zeros_like(client.labels)
    found = outcomes(client, 2, head, private, {0: np.arange(64), 1: np.arange(64, 128)})
    one, other = (found[k][0]["classifier.output.weight"] for k in (0, 1))
    assert not torch.allclose(one, other, atol=1e-6)


def test_a_method_with_a_loss_of_its_own_is_never_stacked(tiny_arrays):
    results = []
    for most in (1, 8):
        client, head, private = make(tiny_arrays, "ressfl")
        results.append(outcomes(client, most, head, private))
    assert all(torch.equal(results[0][k].upload[n], results[1][k].upload[n]) for k in INDICES
               for n in results[0][k].upload)


@pytest.mark.parametrize("most", [1, 8])
def test_frozen_encoders_stay_also_in_a_stack(tiny_arrays, most):
    client, head, private = make(tiny_arrays, freezes_private=True)
    found = outcomes(client, most, head, private)
    for trained in found.values():
        kept = trained.private.parameters
        assert all(torch.equal(value, private.parameters[name]) for name, value in kept.items())
        assert any(not torch.equal(value, head[name]) for name, value in trained.upload.items())
