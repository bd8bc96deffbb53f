"""Replayed steps: the plain client's numbers, with a stand-in for the CUDA graph; on CUDA, where it is, itself."""
import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_update import FIRST, SECOND, make, update_of, without_draws

from devices import choose_device
from engine.graphs import GraphedTrainer
from runs.csvs import METRICS
from server.malicious import MaliciousClients
from update import Trainer
from utils import InputError

CPU = torch.device("cpu")
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]


def on(device, client, kind=Trainer, **changes):
    """The client on a device."""
    fields = {field.name: getattr(client, field.name) for field in dataclasses.fields(Trainer)}
    return kind(**{**fields, "model": client.model.to(device), "images": client.images.to(device),
                   "labels": client.labels.to(device)}, **changes)


def graphed(client, device=CPU):
    """Train the client with replayed steps; return it, and the captures and replays. On a GPU they are real."""
    captures, replays = [], []

    def stand_in(step, device):
        captures.append(step)
        for _ in range(3):   # as a real capture's warm-up does: runs that must leave no trace
            step()
        return lambda: (replays.append(step), step())
    return on(device, client, GraphedTrainer, **{"capture": stand_in} if device.type == "cpu" else {}), \
        captures, replays


@pytest.mark.parametrize("name, changes", [
    ("rve_pfl", {}), ("nbafl_prox", {}), pytest.param("ressfl", {}, marks=pytest.mark.slow),
    ("lg_fedavg", {"optimizer": "sgd", "lr": 0.05, "momentum": 0.9}),
    ("rve_pfl", {"kl_warmup": 2, "augment": "flip+shift", "lr_warmup": 0.5}),
    ("rve_pfl", {"prior": "categorical", "kl_weight": 1.0})])
def test_replayed_steps_give_the_plain_steps_numbers(tiny_arrays, name, changes):
    plain, head, private = make(tiny_arrays, name, epochs=2, head_lr=0.3, **changes)
    replayed, captures, replays = graphed(make(tiny_arrays, name, epochs=2, head_lr=0.3, **changes)[0])

    def as_float32(optimizer, *steps):   # as a graph holds it: Adam can make much of the last bit
        Trainer.set_lr(plain, optimizer, *steps)
        for group in optimizer.param_groups:
            group["lr"] = float(np.float32(group["lr"]))
    plain.set_lr = as_float32
    for client, round, own in ((0, 1, FIRST), (1, 1, SECOND), (0, 2, FIRST), (1, 3, SECOND)):
        expected = plain.train(client, round, own, head, private)
        trained = replayed.train(client, round, own, head, private)
        torch.testing.assert_close((trained.upload, trained.client_state.parameters),
                                   (expected.upload, expected.client_state.parameters), atol=1e-5, rtol=1e-5)
        assert [trained.metrics[name] for name in METRICS] == pytest.approx(
            [expected.metrics[name] for name in METRICS], rel=1e-4, nan_ok=True)
    assert len(captures) == (3 if changes.get("kl_warmup") else 1)   # one a beta
    # Full batches only, of 100 and 80 images; and once a capture to see whether its replay does anything.
    assert len(replays) == 2 * (3 + 2 + 3 + 2) + len(captures)


@pytest.mark.parametrize("capture, fault", [
    (lambda step, device: (step(), lambda: None)[1], "does nothing on cpu"),   # an empty graph, of another device
    (lambda step, device: exec("raise RuntimeError('not permitted')"), "no CUDA graph .* not permitted")])
def test_a_capture_that_fails_ends_the_run_and_says_how_to_go_on(tiny_arrays, capture, fault):
    client, head, private = make(tiny_arrays)
    broken, *_ = graphed(client)
    broken.capture = capture
    with pytest.raises(InputError, match=f"{fault}; use --stack 1"):
        broken.train(0, 1, FIRST, head, private)


def test_malicious_clients_capture_once(tiny_arrays, behaviour="backdoor_patch"):
    """Their trainer, with other labels or triggered copies, lives as long as the honest one."""
    client, head, private = make(tiny_arrays)
    honest, captures, _ = graphed(client)
    made = MaliciousClients(behaviour, 0.5, 2, 1)
    for round, second in ((1, SECOND), (2, SECOND), (3, SECOND[:-3])):   # under --resplit, images change
        for trainer, own in made.groups(honest, {0: FIRST, 1: second}):
            for k, indices in own.items():
                assert (trainer is honest) == (k not in made.members)
                trainer.train(k, round, indices, head, private)
    assert len(captures) == 2
    other, *_ = graphed(make(tiny_arrays)[0])
    assert made.groups(other, {0: FIRST, 1: SECOND})[1][0].model is other.model


@pytest.mark.parametrize("name, local, index", [("cuda", 2, 0), ("cuda:1", 0, 1), ("auto", 1, 1)])
def test_a_process_makes_its_gpu_the_current_one(monkeypatch, name, local, index):
    """Streams, graphs and generators that name no device belong to it; and float32 is computed as such."""
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.backends.cuda, "matmul", SimpleNamespace(allow_tf32=True))
    monkeypatch.setattr(torch.backends, "cudnn", SimpleNamespace(allow_tf32=True))
    assert choose_device(name, local) == torch.device("cuda", index) and chosen == [torch.device("cuda", index)]
    assert not torch.backends.cuda.matmul.allow_tf32 and not torch.backends.cudnn.allow_tf32


def near(one, other):
    """Rounding may switch a rectifier and turn an update a little; other draws turn it by far."""
    return (one - other).norm() < 0.05 * other.norm()


@pytest.mark.parametrize("name", DEVICES)
def test_a_device_computes_what_the_cpu_does(tiny_arrays, name):
    """To rounding and without draws, which are other numbers there; and replays draw what plain steps draw."""
    device, changes = choose_device(name), {"epochs": 2, "optimizer": "sgd", "lr": 1e-2}
    results = []
    for where in (CPU, device):
        client, head, private = make(tiny_arrays, "lg_fedavg", **changes)
        client = on(where, without_draws(client))
        trained = client.train(0, 1, FIRST, head, private)
        results.append((update_of(trained, head, private), trained.metrics["loss"],
                        client.evaluate(0, 1, FIRST, trained.upload, trained.client_state)["loss"]))
    assert near(results[1][0], results[0][0]) and results[1][1:] == pytest.approx(results[0][1:], rel=1e-3)
    draws = []
    for kind in (on, lambda device, client: graphed(client, device)[0]):
        client, head, private = make(tiny_arrays, augment="flip+shift", **changes)
        client = kind(device, client)
        draws.append([update_of(client.train(0, r, FIRST, head, private), head, private) for r in (1, 2)])
    assert client._replays and all(near(one, other) for one, other in zip(*draws, strict=True))
    assert not near(*draws[1])   # two rounds' draws


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("flags", [["--prior", "normal"], ["--prior", "categorical"], ["--stack", 1],
                                   ["--prior", "normal", "--stack", 4]])
def test_a_run_goes_on_there(place, flags):
    assert place.main("--device", "cuda", *flags, "--num_users", 4, "--rounds", 2) == 0
    losses = np.loadtxt(place.results / "rounds.csv", delimiter=",", skiprows=1, usecols=3)
    assert np.isfinite(losses).all()
