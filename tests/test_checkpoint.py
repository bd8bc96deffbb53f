"""Where private parameters and uploads wait, and files that are read."""
import weakref

import pytest
import torch

from runs import checkpoints as checkpoint
from runs.checkpoints import ClientStore, WaitingUploads, load_checked
from update import ClientState
from utils import InputError


def private(value, steps=1):
    return ClientState({"encoder.x": torch.full((1000,), float(value))}, steps)


@pytest.mark.parametrize("memory", [0, 6000, 10**9])
def test_the_store_keeps_rounds_apart_whatever_the_memory(tmp_path, memory):
    store = ClientStore(tmp_path / "spill", private(0, 0), memory)
    for r in range(1, 4):
        for k in range(3):
            store.put(k, private(10 * k + r, r))
        assert store.get(1).parameters["encoder.x"][0] == 10 + r
        store.commit()
    store.put(1, private(99))   # a round that never ends
    (tmp_path / "out").mkdir()
    store.export(range(5), tmp_path / "out")
    found = [checkpoint.read_client(tmp_path / "out" / f"client_{k}.pt", private(0).parameters)
             for k in range(5)]
    assert [f.parameters["encoder.x"][0].item() for f in found] == [3, 13, 23, 0, 0]
    assert [f.steps for f in found] == [3, 3, 3, 0, 0]
    spilled = list((tmp_path / "spill").glob("*")) if memory < 10**9 else []
    assert len(spilled) == {0: 4, 6000: 3, 10**9: 0}[memory]


@pytest.mark.parametrize("processes, size", [(1, 4000), (2, 4000), (5, 1333)])
def test_processes_share_what_is_free_on_a_gpu(monkeypatch, tmp_path, processes, size):
    """Half of 8,000 bytes on each of two GPUs."""
    monkeypatch.setattr(ClientState, "kind", "cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (8000, 9000))
    assert ClientStore(tmp_path, private(0), processes=processes).free["cuda"] == size


@pytest.mark.parametrize("small", [0, 2**16])
def test_off_heap_copies_keep_values_and_strides(monkeypatch, small):
    monkeypatch.setattr(checkpoint, "SMALL", small)
    state = {"conv": torch.randn(8, 3, 3, 3).to(memory_format=torch.channels_last), "bias": torch.randn(5),
             "scalar": torch.tensor(2.5)}
    copy = checkpoint.off_heap(state)
    for name, value in state.items():
        assert torch.equal(copy[name], value) and copy[name].stride() == value.stride()
    copy["bias"].zero_()
    assert state["bias"].abs().sum() > 0


def test_a_state_is_one_mapping_and_a_small_one_none(monkeypatch):
    """Linux refuses the 65,531st: ten thousand clients of seven tensors each would need more."""
    made, real = [], checkpoint.mmap.mmap
    monkeypatch.setattr(checkpoint.mmap, "mmap", lambda *words: made.append(words) or real(*words))
    checkpoint.off_heap({"large": torch.zeros(2**15), "bias": torch.zeros(5), "one": torch.tensor(1.0)})
    assert len(made) == 1
    checkpoint.off_heap({"small": torch.zeros(100), "bias": torch.zeros(5)})
    assert len(made) == 1


def test_uploads_wait_in_memory_as_far_as_it_goes(tmp_path):
    """This round's and the last's together; the others are mapped from files that nobody has to clear away."""
    waiting = WaitingUploads(tmp_path / "waiting", 1000)
    upload = {"w": torch.randn(10, 10).to(torch.float32), "n": torch.arange(3)}   # 424 bytes
    conv = {"c": torch.randn(8, 3, 3, 3).to(memory_format=torch.channels_last)}
    kept = [waiting.keep(k, upload) for k in range(3)]
    assert [found is upload for found in kept] == [True, True, False]
    mapped = waiting.keep(3, conv)
    assert torch.equal(mapped["c"], conv["c"]) and mapped["c"].stride() == conv["c"].stride()
    assert all(torch.equal(kept[2][name], upload[name]) for name in upload) and not list(tmp_path.glob("*/*"))
    waiting.end_round()
    assert waiting.keep(0, upload) is not upload   # the last round's are still there
    waiting.dropped()
    assert waiting.keep(0, upload) is upload


class Live:
    """Counts the uploads alive, by one tensor of each."""

    def __init__(self):
        self.now = self.peak = 0

    def watch(self, upload):
        self.now += 1
        self.peak = max(self.peak, self.now)
        weakref.finalize(upload["classifier.output.bias"], self.gone)

    def gone(self):
        self.now -= 1


@pytest.mark.parametrize("flags, most", [(["--checkpoint_seconds", 0], 5), (["--checkpoint_seconds", 0, "--method",
                                          "fedavg", "--frac", 0.6], 3), (["--checkpoint_seconds", 1e6], 10)])
def test_a_rounds_uploads_do_not_outlive_its_checkpoint(place, driver, monkeypatch, flags, most):
    """Of five clients: once, not twice; but for rounds without a checkpoint, which a Ctrl-C would write."""
    live, trained = Live(), driver.Trainer.trained

    def watched(self, *arguments):
        found = trained(self, *arguments)
        live.watch(found.upload)
        return found
    monkeypatch.setattr(driver.Trainer, "trained", watched)
    assert place.main("--rounds", 4, "--num_users", 5, *flags) == 0
    assert live.peak == most


@pytest.mark.parametrize("method", ["rve_pfl", "nbafl"])
def test_waiting_in_files_changes_no_number(place, monkeypatch, method):
    assert place.main("--method", method) == 0
    expected = place.clients_csv()
    monkeypatch.setattr(ClientStore.__init__, "__defaults__", (0,))
    monkeypatch.setattr(WaitingUploads.__init__, "__defaults__", (0,))
    assert place.main("--method", method, "--overwrite") == 0
    assert place.clients_csv() == expected


def test_load_checked_says_which_file(tmp_path):
    with pytest.raises(InputError, match="none.pt"):
        load_checked(tmp_path / "none.pt")
