"""Replayed steps: the plain client's numbers, with a stand-in for the CUDA graph."""
import contextlib
import dataclasses
from types import SimpleNamespace

import pytest
import torch
from test_update import FIRST, SECOND, equal, make

from engine import graphs as module
from engine.graphs import WARM_UP, GraphedTrainer, cuda_graph
from server.malicious import MaliciousClients
from utils import InputError, choose_device


def graphed(client):
    """The same client with steps replayed, and how often each capture was."""
    captures, replays = [], []

    def stand_in(step, device):
        captures.append(step)
        for _ in range(3):   # as a real capture's warm-up does: runs that must leave no trace
            step()
        return lambda: (replays.append(step), step())
    fields = {field.name: getattr(client, field.name) for field in dataclasses.fields(client)}
    return GraphedTrainer(**fields, capture=stand_in), captures, replays


@pytest.mark.parametrize("name, changes", [
    *((name, {}) for name in ("rve_pfl", "fedavg", "ressfl", "nbafl_prox")),
    ("lg_fedavg", {"optimizer": "sgd", "lr": 0.05, "momentum": 0.9}),
    ("rve_pfl", {"kl_warmup": 2, "augment": "flip+shift", "lr_warmup": 0.5})])
def test_replayed_steps_give_the_plain_steps_numbers(tiny_arrays, name, changes):
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
    # Full batches only, of 100 and 80 images; and once a capture to see whether its replay does anything.
    assert len(replays) == 2 * (3 + 2 + 3 + 2) + len(captures)


def state_of(client):
    """All that a capture must leave alone: parameters, learning rates, moments, and what is drawn next."""
    static = client._static
    return {**client.state(), **{f"rate {i}": group["lr"].clone() for i, group
                                 in enumerate(static.optimizer.param_groups)},
            **{f"moment {i}": tensor.clone() for i, tensor in enumerate(static.moments())},
            "generator": torch.get_rng_state()}


@pytest.mark.parametrize("ends", ["well", "badly", "early"])
def test_a_capture_leaves_no_trace(tiny_arrays, ends):
    """Whether it succeeds, fails in the end, or in its first step."""
    client, _, _ = graphed(make(tiny_arrays)[0])
    _, head, private = make(tiny_arrays)
    client.model.train()
    optimizer, _ = client.prepare({**head, **private.parameters})
    client.set_lr(optimizer, 0, 0, 100)
    batch = torch.arange(32)
    GraphedTrainer.__mro__[1]._step(client, optimizer, 1, batch, {})   # so that there are moments
    before = state_of(client)

    def capture(step, device):
        for _ in range(0 if ends == "early" else 3):
            step()
        torch.rand(5)
        if ends != "well":
            raise RuntimeError("not permitted")
        return step
    if ends == "well":
        client._captured(capture, client._static, 1)
    else:
        with pytest.raises(RuntimeError, match="not permitted"):
            client._captured(capture, client._static, 1)
        assert all(value.grad is None for value in client.model.parameters())
    assert equal(state_of(client), before)


def test_a_replay_that_changes_nothing_ends_the_run(tiny_arrays):
    """An empty graph, as of a capture on another device, would train nothing and say nothing."""
    client, head, private = make(tiny_arrays)
    empty, *_ = graphed(client)
    empty.capture = lambda step, device: (step(), lambda: None)[1]
    with pytest.raises(InputError, match="does nothing on cpu; use --device cpu"):
        empty.train(0, 1, FIRST, head, private)


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


class Cuda:
    """torch.cuda as ``cuda_graph`` uses it: notes what happens, on which stream, and fails where told."""

    def __init__(self, patch, fails=None):
        self.streams, self.said, names = ["main"], [], iter(["side", "other"])
        for name, value in {"device": self.device, "stream": self.stream, "graph": self.graph,
                            "Stream": lambda: self.Stream(next(names), self),
                            "CUDAGraph": lambda: self.Graph(self),
                            "current_device": lambda: 7, "graph_pool_handle": lambda: (0, 5),
                            "current_stream": lambda: self.Stream(self.streams[-1], self)}.items():
            patch.setattr(torch.cuda, name, value)
        for name in ("_cuda_endAllocateToPool", "_cuda_releasePool"):
            patch.setattr(torch._C, name, lambda *words, name=name: self.note(name, *words), raising=False)
        patch.setattr(module, "abandoned", [])
        self.fails = fails

    def note(self, *words):
        self.said.append((*words, self.streams[-1]))
        if words[0] == self.fails:
            raise RuntimeError(f"{words[0]} fails")

    @dataclasses.dataclass
    class Stream:
        name: str
        cuda: object

        def wait_stream(self, other):
            self.cuda.note("wait", self.name, other.name)

    @dataclasses.dataclass
    class Graph:
        cuda: object

        def replay(self):
            self.cuda.note("replay")

        def reset(self):
            self.cuda.note("reset")

    @contextlib.contextmanager
    def device(self, device):
        self.note("device", str(device))
        yield

    @contextlib.contextmanager
    def stream(self, stream):
        depth = len(self.streams)
        self.streams.append(stream.name)
        try:
            yield
        finally:
            del self.streams[depth:]

    @contextlib.contextmanager
    def graph(self, graph, pool, stream):
        """As PyTorch's: where the end fails, its stream stays the current one."""
        self.streams.append(stream.name)
        self.note("begin", pool)
        try:
            yield
        finally:
            self.note("end")
            self.streams.pop()


def test_warm_up_and_capture_share_a_stream_of_the_device(monkeypatch):
    cuda = Cuda(monkeypatch)
    replay = cuda_graph(lambda: cuda.note("step"), torch.device("cuda", 1))
    replay()
    assert cuda.said == [
        ("device", "cuda:1", "main"), ("wait", "side", "main", "main"), *[("step", "side")] * WARM_UP,
        ("begin", (0, 5), "side"), ("step", "side"), ("end", "side"), ("wait", "main", "side", "main"),
        ("replay", "main")]


@pytest.mark.parametrize("fails", ["step", "begin", "end"])
def test_a_capture_that_fails_is_undone(monkeypatch, fails):
    """The main stream is current again, the allocator is told, and the graph stays alive."""
    cuda = Cuda(monkeypatch, fails)
    with pytest.raises(RuntimeError, match=f"{fails} fails"):
        cuda_graph(lambda: cuda.note("step"), torch.device("cuda"))
    assert [words[:3] for words in cuda.said[-3:]] == [
        ("_cuda_endAllocateToPool", 7, (0, 5)), ("reset", "main"), ("_cuda_releasePool", 7, (0, 5))]
    assert len(module.abandoned) == 1


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
