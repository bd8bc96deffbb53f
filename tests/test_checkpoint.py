"""Where client states and uploads wait."""
import weakref

import pytest
import torch

from runs import checkpoints
from runs.checkpoints import ClientStore, WaitingUploads
from update import ClientState


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


def test_uploads_wait_in_memory_as_far_as_it_goes(tmp_path):
    """Half of it for each of two rounds; the others are mapped from files that nobody has to clear away."""
    waiting = WaitingUploads(tmp_path / "waiting", 2000)
    upload = {"w": torch.randn(10, 10)}
    kept = [waiting.keep(k, upload) for k in range(3)]   # of 400 bytes
    assert [found is upload for found in kept] == [True, True, False]
    assert torch.equal(kept[2]["w"], upload["w"]) and not list(tmp_path.glob("*/*"))
    waiting.end_round()
    assert waiting.keep(0, upload) is upload


@pytest.mark.parametrize("flags, most", [(["--checkpoint_seconds", 0], 5), (["--checkpoint_seconds", 1e6], 10)])
def test_a_rounds_uploads_do_not_outlive_its_checkpoint(place, driver, monkeypatch, flags, most):
    """Of five clients: once, not twice; but for rounds without a checkpoint, which a Ctrl-C would write."""
    alive, peak, local_update = set(), [0], driver.Trainer.local_update

    def watched(self, client, round, *arguments):
        result = local_update(self, client, round, *arguments)
        alive.add((client, round))
        peak[0] = max(peak[0], len(alive))
        weakref.finalize(result.upload["classifier.output.bias"], alive.discard, (client, round))
        return result
    monkeypatch.setattr(driver.Trainer, "local_update", watched)
    assert place.main("--rounds", 4, "--num_users", 5, *flags) == 0
    assert peak == [most]


@pytest.mark.parametrize("method", ["rve_pfl", "nbafl"])
def test_waiting_in_files_changes_no_number(place, monkeypatch, method):
    assert place.main("--method", method) == 0
    expected = place.clients_csv()
    monkeypatch.setattr(ClientStore.__init__, "__defaults__", (0,))
    monkeypatch.setattr(WaitingUploads.__init__, "__defaults__", (0,))
    assert place.main("--method", method, "--overwrite") == 0
    assert place.clients_csv() == expected
