"""Where client states wait; and a run's config.json: what is written is accepted, and nothing else is."""
import json

import pytest
import torch

from methods import METHODS
from options import args_parser, make_parser
from runs import checkpoints, configs
from runs.checkpoints import ClientStore
from server.rules import RULES
from update import ClientState
from utils import InputError


def state(value, steps=1):
    return ClientState({"encoder.x": torch.full((1000,), float(value))}, steps)


@pytest.mark.parametrize("memory, spilled", [(0, 4), (6000, 3), (10**9, 0)])
def test_the_store_keeps_rounds_apart_whatever_the_memory(tmp_path, memory, spilled):
    store = ClientStore(tmp_path / "spill", state(0, 0), memory)
    for r in range(1, 4):
        for k in range(3):
            store.put(k, state(-1))   # which the next replaces
            store.put(k, state(10 * k + r, r))
        assert store.get(1).parameters["encoder.x"][0] == 10 + r
        store.commit()
    store.put(1, state(99))   # a round that never ends
    (tmp_path / "out").mkdir()
    store.export(range(5), tmp_path / "out")
    files = [checkpoints.read_client(tmp_path / "out" / f"client_{k}.pt", state(0).parameters) for k in range(5)]
    assert [f.parameters["encoder.x"][0].item() for f in files] == [3, 13, 23, 0, 0]
    assert [f.steps for f in files] == [3, 3, 3, 0, 0]
    assert len(list((tmp_path / "spill").glob("*"))) == spilled
    assert store.free == memory - 4000 * (4 - spilled)


def test_off_heap_copies_keep_values_and_strides_in_one_mapping(monkeypatch):
    """Linux refuses the 65,531st mapping: small states make none."""
    made, real = [], checkpoints.mmap.mmap
    monkeypatch.setattr(checkpoints.mmap, "mmap", lambda *words: made.append(words) or real(*words))
    conv = torch.randn(800, 3, 6, 6).to(memory_format=torch.channels_last)
    for large in (conv, conv[:8]):
        original = {"conv": large, "bias": torch.randn(5), "scalar": torch.tensor(2.5)}
        copy = checkpoints.off_heap(original)
        for name, value in original.items():
            assert torch.equal(copy[name], value) and copy[name].stride() == value.stride()
        copy["bias"].zero_()
        assert original["bias"].abs().sum() > 0
    assert len(made) == 1


def stored(*flags):
    """Options as RVE-PFL.py leaves them in config.json."""
    return json.loads(json.dumps(vars(args_parser(list(flags))), default=str))


@pytest.fixture
def write(tmp_path):
    """Leave a config.json of these options; its path."""
    def make(options, /, **others):
        path = tmp_path / "config.json"
        path.write_text(json.dumps({"format": configs.FORMAT, "status": "finished", "protocol": "held-out",
                                    "options": options, **others}))
        return path
    return make


def test_whatever_is_written_is_accepted(write):
    for flags in (*(["--method", method, "--partition", "dirichlet", "--resplit"] for method in METHODS),
                  *(["--method", "fedavg", "--aggregation", rule, "--malicious_frac", "0.3"] for rule in RULES),
                  ["--encoders_from", "other run", "--lr_decay", "0", "--device", "cuda:1"],
                  ["--method", "fedavg", "--stack", "3", "--local_steps", "7"],
                  ["--method", "client_dp", "--noise_multiplier", "1", "--data_dir", "/tmp/é ü"]):
        options = stored(*flags)
        assert configs.read(write(options, server={"epsilon": float("inf")}), *options)["options"] == options
        del options["seed"]
        with pytest.raises(InputError, match="not of this version .*--seed"):
            configs.read(write(options), "seed")


def test_each_option_is_held_against_its_declaration(write):
    wrong = [(action.dest, {}) for action in make_parser()._actions if action.dest != "help"]
    wrong += [("seed", "1"), ("seed", 1.5), ("seed", True), ("seed", 10**400), ("rounds", 0), ("rounds", None),
              ("kl_weight", float("nan")), ("method", "x"), ("dataset", "../../etc/x"), ("run_name", ".."),
              ("device", "x"), ("resplit", 1), ("save_rounds", ["1"]), ("data_dir", 3), ("aggregation", "vote")]
    for name, value in wrong:
        with pytest.raises(InputError, match=f"not of this version .*--{name} ") as caught:
            configs.read(write({**stored(), name: value}))
        assert "\n" not in str(caught.value) and "config.json" in str(caught.value)


@pytest.mark.parametrize("part, wrong", [
    *(("format", number) for number in (None, configs.FORMAT + 1, "1", True, [1])),
    ("status", ["finished"]), ("protocol", {}), ("options", []), ("options", None)])
def test_another_format_is_another_programs(write, part, wrong):
    with pytest.raises(InputError, match=f"not of this version .*{part}"):
        configs.read(write(stored(), **{part: wrong}))
