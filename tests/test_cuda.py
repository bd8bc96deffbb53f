"""What has to hold on CUDA, where it is; elsewhere the CPU stands in, so that the tests do not grow stale."""
import dataclasses
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from test_update import make
from torch import nn

from engine.graphs import GraphedTrainer
from update import Trainer
from utils import choose_device, seed_torch

INDICES = {0: np.arange(90), 2: np.arange(90, 160), 3: np.arange(20, 110), 5: np.arange(40)}
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]


@pytest.fixture(params=DEVICES)
def device(request):
    return choose_device(request.param)


def on(device, client, kind=Trainer):
    """The client on a device."""
    fields = {field.name: getattr(client, field.name) for field in dataclasses.fields(Trainer)}
    return kind(**{**fields, "model": client.model.to(device), "images": client.images.to(device),
                   "labels": client.labels.to(device)})


def graphed(device, client):
    """A client with its steps replayed; on a CPU a step is its own replay."""
    made = on(device, client, GraphedTrainer)
    if device.type == "cpu":
        made.capture = lambda step, device: step
    return made


def change(start, trained):
    """A client's update as one vector."""
    end = {**trained.upload, **trained.client_state.parameters}
    return torch.cat([(end[name].cpu() - start[name].cpu()).flatten() for name in start])


def near(one, other):
    """Rounding may switch a rectifier and turn an update a little; other draws turn it by far."""
    return (one - other).norm() < 0.05 * other.norm()


def set_up(tiny_arrays, name="rve_pfl", draws=True, **changes):
    client, head, private = make(tiny_arrays, name, epochs=2, **{"optimizer": "sgd", "lr": 1e-2, **changes})
    for module in client.model.modules():
        if isinstance(module, nn.Dropout) and not draws:
            module.p = 0.0
    return client, head, private, {**head, **private.parameters}


def test_training_is_the_cpus_to_rounding(tiny_arrays, device):
    """Without draws, which are other numbers there; replayed steps, and evaluation; and float32 is no TF32."""
    results = []
    for where, kind in ((torch.device("cpu"), on), (device, on), (device, graphed)):
        client, head, private, start = set_up(tiny_arrays, "lg_fedavg", draws=False)
        client = kind(where, client)
        trained = client.train(0, 1, INDICES[0], head, private)
        figures = client.evaluate(0, 1, INDICES[0], trained.upload, trained.client_state)
        results.append((change(start, trained), trained.metrics["loss"], figures["loss"]))
    for update, *losses in results[1:]:
        assert near(update, results[0][0]) and losses == pytest.approx(results[0][1:], rel=1e-3)
    a = torch.randn(256, 256, generator=torch.Generator().manual_seed(1))
    assert ((a.to(device) @ a.to(device)).cpu() - a.double() @ a.double()).abs().max() < 1e-4


@pytest.mark.parametrize("changes", [{}, {"optimizer": "adam", "lr": 1e-3, "augment": "flip+shift"}])
def test_replays_draw_what_plain_steps_draw(tiny_arrays, device, changes):
    results = []
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="no CUDA graph")
        for kind in (on, graphed):
            client, head, private, start = set_up(tiny_arrays, **changes)
            client = kind(device, client)
            results.append([change(start, client.train(0, r, INDICES[0], head, private)) for r in (1, 2)])
    assert client._replays and all(near(one, other) for one, other in zip(*results, strict=True))
    assert not near(*results[1])   # two rounds' draws


def test_after_a_capture_that_fails_training_goes_on(tiny_arrays, device):
    """A step that waits for the GPU cannot be captured: plain steps, with the draws that they would have had."""
    class Waits(type(set_up(tiny_arrays)[0].model)):
        def forward(self, x, y=None):
            if x.is_cuda:
                x.sum().item()
            return super().forward(x)
    plain, head, private, start = set_up(tiny_arrays)
    expected = change(start, on(device, plain).train(0, 1, INDICES[0], head, private))
    client, head, private, start = set_up(tiny_arrays)
    client.model.__class__ = Waits
    client = graphed(device, client)
    if device.type == "cpu":
        client.capture = lambda step, device: exec("raise RuntimeError('cannot be captured')")
    with pytest.warns(UserWarning, match="no CUDA graph"):
        assert near(change(start, client.train(0, 1, INDICES[0], head, private)), expected)
    seed_torch(1, "after")
    assert torch.rand(100, device=device).std() > 0.1


@pytest.mark.parametrize("stack", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_a_run_goes_on_there(place, device, stack):
    assert place.main("--device", str(device), "--stack", stack, "--num_users", 4, "--rounds", 2) == 0
    rounds = pd.read_csv(place.results / "rounds.csv")
    assert rounds["accuracy"].iloc[-1] > 0.3 and np.isfinite(rounds["loss"]).all()
