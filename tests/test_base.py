"""The server's mean against arithmetic done by hand."""
import pytest
import torch

from server.base import Round, Server, Weighting, moved, updates_of
from utils import round_down


def state(*values):
    return {"weight": torch.tensor([float(v) for v in values]), "bias": torch.tensor(float(values[0]))}


def mean(sent, uploads, sizes):
    head, seen, rows, _ = Server({})(Round(1, sent, uploads, sizes))
    assert seen is uploads
    return head, rows


def test_mean_weighs_by_data_size_and_reports_it():
    head, rows = mean(state(0, 0), {0: state(1, 1), 3: state(5, 9)}, {0: 30, 3: 10})
    torch.testing.assert_close(head, {"weight": torch.tensor([2.0, 3.0]), "bias": torch.tensor(2.0)})
    assert [(row["client"], row["n"], row["weight"]) for row in rows] == [(0, 30, 0.75), (3, 10, 0.25)]


def test_bytes_of_a_round():
    """Three clients are sent 12 bytes each; one diverges and uploads nothing. Then nothing is shared."""
    traffic = Round(1, state(0, 0), {0: state(1, 1), 3: state(2, 2)}, dict.fromkeys((0, 2, 3), 9)).traffic
    assert traffic == {"bytes_up": 2 * 12, "bytes_down": 3 * 12}
    assert Round(1, {}, {0: {}, 1: {}}, {0: 9, 1: 9}).traffic == {"bytes_up": 0, "bytes_down": 0}


def test_the_order_of_arrival_does_not_matter():
    values, sizes = {k: {"weight": torch.randn(100)} for k in range(5)}, {k: 3 + k for k in range(5)}
    forward, backward = (mean({}, uploads, sizes)[0] for uploads in (values, dict(reversed(values.items()))))
    assert torch.equal(forward["weight"], backward["weight"])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_non_finite_or_missing_upload_counts_for_nothing(bad):
    head, rows = mean(state(0, 0), {0: state(2, 4), 1: state(bad, 1)}, {0: 10, 1: 90, 2: 50})
    assert torch.equal(head["weight"], torch.tensor([2.0, 4.0]))
    assert [row["weight"] for row in rows] == [1.0, 0.0, 0.0]
    sent = state(7, 8)
    head, rows = mean(sent, {0: state(bad, 1)}, {0: 10})   # nothing usable: the head stays
    assert head is sent and rows[0]["weight"] == 0


def test_a_weight_belongs_to_its_client_whatever_the_order():
    class Backward(Server):
        def weigh(self, round):
            return Weighting({1: 10.0, 0: 1.0}, self.memory)
    head, _, rows, _ = Backward({})(Round(1, state(0, 0), {0: state(0, 0), 1: state(11, 11)}, {0: 5, 1: 5}))
    assert torch.allclose(head["weight"], torch.tensor([10.0, 10.0]))
    assert [row["weight"] for row in rows] == [1 / 11, 10 / 11]


def test_updates_are_rows_in_the_heads_order():
    sent = {"weight": torch.tensor([[1.0, 2.0], [3.0, 4.0]]), "bias": torch.tensor([5.0])}
    upload = {"bias": torch.tensor([7.0]), "weight": torch.tensor([[1.5, 2.0], [3.0, 3.0]])}
    rows = updates_of(sent, [upload, sent])
    assert rows.tolist() == [[0.5, 0, 0, -1, 2], [0, 0, 0, 0, 0]]
    assert all(torch.equal(value, upload[name]) for name, value in moved(sent, rows[0]).items())
    assert round_down(0.29 * 100) == 29 and round_down(2.99) == 2
