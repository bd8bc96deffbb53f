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
from engine.several import train_each
from update import ClientState, Trainer
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


def way(start, trained):
    """A client's update as one vector."""
    end = {**trained.upload, **trained.client_state.parameters}
    return torch.cat([(end[name].cpu() - start[name].cpu()).flatten() for name in start])


def near(one, other):
    """Rounding may switch a rectifier and turn an update a little; other draws turn it by far."""
    return (one - other).norm() < 0.05 * other.norm()


def set_up(tiny_arrays, name="rve_pfl", draws=True, **changes):
    client, head, private = make(tiny_arrays, name, epochs=2, **{"optimizer": "sgd", "lr": 1e-2, **changes})
    for part in client.model.modules():
        if isinstance(part, nn.Dropout) and not draws:
            part.p = 0.0
    return client, head, private, {**head, **private.parameters}


@pytest.mark.parametrize("name", ["lg_fedavg", "fedavg"])
def test_training_is_the_cpus_to_rounding(tiny_arrays, device, name):
    """Without draws, which are other numbers there; replayed steps, and evaluation."""
    found = []
    for where, kind in ((torch.device("cpu"), on), (device, on), (device, graphed)):
        client, head, private, start = set_up(tiny_arrays, name, draws=False)
        client = kind(where, client)
        trained = client.train(0, 1, INDICES[0], head, private)
        figures = client.evaluate(0, 1, INDICES[0], trained.upload, trained.client_state)
        found.append((way(start, trained), trained.metrics["loss"], figures["loss"]))
    for update, *losses in found[1:]:
        assert near(update, found[0][0])
        assert losses == pytest.approx(found[0][1:], rel=1e-3)


def test_float32_is_no_tf32(device):
    """A product of TF32's ten bits would be off by a thousandth."""
    torch.manual_seed(1)
    a, images, kernel = torch.randn(256, 256), torch.randn(8, 16, 16, 16), torch.randn(16, 16, 3, 3)
    for one, exact in (((a.to(device) @ a.to(device)), a.double() @ a.double()),
                       (nn.functional.conv2d(images.to(device), kernel.to(device)),
                        nn.functional.conv2d(images.double(), kernel.double()))):
        assert (one.cpu() - exact).abs().max() < 1e-4


@pytest.mark.parametrize("changes", [{}, {"optimizer": "adam", "lr": 1e-3}, {"augment": "flip+shift"}])
def test_replays_draw_what_plain_steps_draw(tiny_arrays, device, changes):
    found = []
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="no CUDA graph")
        for kind in (on, graphed):
            client, head, private, start = set_up(tiny_arrays, **changes)
            client = kind(device, client)
            found.append([way(start, client.train(0, number, INDICES[0], head, private)) for number in (1, 2)])
    assert client._replays and all(near(one, other) for one, other in zip(*found, strict=True))
    assert not near(*found[1])   # two rounds' draws


def test_after_a_capture_that_fails_training_goes_on(tiny_arrays, device):
    """A step that waits for the GPU cannot be captured: plain steps, with the draws that they would have had."""
    class Waits(type(set_up(tiny_arrays)[0].model)):
        def forward(self, x, y=None):
            if x.is_cuda:
                x.sum().item()
            return super().forward(x)
    plain, head, private, start = set_up(tiny_arrays)
    expected = way(start, on(device, plain).train(0, 1, INDICES[0], head, private))
    client, head, private, start = set_up(tiny_arrays)
    client.model.__class__ = Waits
    client = graphed(device, client)
    if device.type == "cpu":
        client.capture = lambda step, device: exec("raise RuntimeError('cannot be captured')")
    with pytest.warns(UserWarning, match="no CUDA graph"):
        assert near(way(start, client.train(0, 1, INDICES[0], head, private)), expected)
    seed_torch(1, "after")
    assert torch.rand(100, device=device).std() > 0.1


@pytest.mark.parametrize("augment", ["none", "flip+shift"])
def test_a_stack_draws_what_its_clients_draw_alone(tiny_arrays, device, augment):
    """Also with encoders that wait on another device than others do."""
    found = []
    for most in (1, 2, 8):
        client, head, private, start = set_up(tiny_arrays, augment=augment)
        client = on(device, client)
        there = ClientState({name: value.to(device) for name, value in private.parameters.items()})
        found.append(dict(train_each(client, 2, INDICES, head, lambda k, here=private, there=there:
                                     there if k % 2 else here, most)))
    for stacked in found[1:]:
        assert all(near(way(start, stacked[k]), way(start, found[0][k])) for k in INDICES)


@pytest.mark.parametrize("stack", [1, 4])
def test_a_run_goes_on_there(place, device, stack):
    flags = ("--device", str(device), "--stack", stack, "--num_users", 4)
    assert place.main(*flags, "--rounds", 2) == 0
    rounds = pd.read_csv(place.results / "rounds.csv")
    assert rounds["accuracy"].iloc[-1] > 0.3 and np.isfinite(rounds["loss"]).all()
