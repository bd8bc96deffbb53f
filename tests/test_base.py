"""The server's mean against arithmetic done by hand."""
import torch

from server.base import Round, Server, Setting, Weighting, weighted_mean


def state(*values):
    return {"weight": torch.tensor([float(v) for v in values]), "bias": torch.tensor(float(values[0]))}


def mean(sent, uploads, sizes):
    head, seen, report = Server(Setting())(Round(1, sent, uploads, sizes))
    assert seen is uploads
    return head, report


def test_weighted_mean_by_hand():
    result = weighted_mean([state(1, 2), state(4, 8)], [1, 2])
    assert torch.allclose(result["weight"], torch.tensor([3.0, 6.0]))   # (1 + 2*4) / 3, (2 + 2*8) / 3
    assert torch.allclose(result["bias"], torch.tensor(3.0))


def test_mean_weighs_by_data_size_and_reports_it():
    head, report = mean(state(0, 0), {0: state(1, 1), 3: state(5, 9)}, {0: 30, 3: 10})
    assert torch.allclose(head["weight"], torch.tensor([2.0, 3.0]))
    assert [(row["client"], row["n"], row["weight"]) for row in report] == [(0, 30, 0.75), (3, 10, 0.25)]


def test_nothing_is_carried_over_between_rounds():
    uploads, sizes = {0: state(1, 1), 1: state(3, 3)}, {0: 1, 1: 1}
    first, _ = mean(state(0, 0), uploads, sizes)
    second, _ = mean(first, uploads, sizes)
    assert torch.equal(first["weight"], second["weight"])


def test_the_order_of_arrival_does_not_matter():
    values = {k: {"weight": torch.randn(100)} for k in range(5)}
    sizes = {k: 3 + k for k in range(5)}
    forward, _ = mean({}, values, sizes)
    backward, _ = mean({}, dict(reversed(values.items())), sizes)
    assert torch.equal(forward["weight"], backward["weight"])


def test_a_non_finite_or_missing_upload_counts_for_nothing():
    for bad in (float("nan"), float("inf")):
        head, report = mean(state(0, 0), {0: state(2, 4), 1: state(bad, 1)}, {0: 10, 1: 90, 2: 50})
        assert torch.equal(head["weight"], torch.tensor([2.0, 4.0]))
        assert [row["weight"] for row in report] == [1.0, 0.0, 0.0]


def test_with_nothing_usable_the_head_stays():
    sent = state(7, 8)
    head, report = mean(sent, {0: state(float("nan"), 1)}, {0: 10})
    assert head is sent and report[0]["weight"] == 0


def test_a_weight_belongs_to_its_client_whatever_the_order():
    class Backward(Server):
        def judge(self, round):
            return Weighting({1: 10.0, 0: 1.0}, self.memory)
    head, _, rows = Backward(Setting())(Round(1, state(0, 0), {0: state(0, 0), 1: state(11, 11)}, {0: 5, 1: 5}))
    assert torch.allclose(head["weight"], torch.tensor([10.0, 10.0]))
    assert [row["weight"] for row in rows] == [1 / 11, 10 / 11]
