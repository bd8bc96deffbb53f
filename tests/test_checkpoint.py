"""Where private parameters wait, and files that are read."""
import pytest
import torch

from runs import checkpoint
from runs.checkpoint import PrivateStore, load_checked
from update import Private
from utils import InputError


def private(value, steps=1):
    return Private({"encoder.x": torch.full((1000,), float(value))}, steps)


@pytest.mark.parametrize("memory", [0, 6000, 10**9])
def test_the_store_keeps_rounds_apart_whatever_the_memory(tmp_path, memory):
    store = PrivateStore(tmp_path / "spill", private(0, 0), memory)
    for r in range(1, 4):
        for k in range(3):
            store.put(k, private(10 * k + r, r))
        assert store.get(1).parameters["encoder.x"][0] == 10 + r
        store.commit()
    store.put(1, private(99))   # a round that never ends
    (tmp_path / "out").mkdir()
    store.export(range(5), tmp_path / "out")
    found = [checkpoint.read_private(tmp_path / "out" / f"client_{k}.pt", private(0).parameters)
             for k in range(5)]
    assert [f.parameters["encoder.x"][0].item() for f in found] == [3, 13, 23, 0, 0]
    assert [f.steps for f in found] == [3, 3, 3, 0, 0]
    spilled = list((tmp_path / "spill").glob("*")) if memory < 10**9 else []
    assert len(spilled) == {0: 4, 6000: 3, 10**9: 0}[memory]


def test_off_heap_copies_keep_values_and_strides():
    state = {"conv": torch.randn(8, 3, 3, 3).to(memory_format=torch.channels_last), "bias": torch.randn(5),
             "scalar": torch.tensor(2.5)}
    copy = checkpoint.off_heap(state)
    for name, value in state.items():
        assert torch.equal(copy[name], value) and copy[name].stride() == value.stride()
    copy["bias"].zero_()
    assert state["bias"].abs().sum() > 0


def test_waiting_in_files_changes_no_number(place, monkeypatch):
    assert place.main() == 0
    expected = place.clients_csv()
    monkeypatch.setattr(PrivateStore.__init__, "__defaults__", (0,))
    assert place.main("--overwrite") == 0
    assert place.clients_csv() == expected


def test_load_checked_says_which_file(tmp_path):
    with pytest.raises(InputError, match="none.pt"):
        load_checked(tmp_path / "none.pt")
