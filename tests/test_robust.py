"""Robust rules: against arithmetic by hand, their definitions, and uploads that every rule has to survive."""
import pytest
import torch
from conftest import server_options

from server import robust
from server.base import Round, moved, updates_of
from server.rules import RULES

ROBUST = [name for name in RULES if name not in ("threat_aware", "mean")]
SENT = {"weight": torch.tensor([[1.0, 2.0], [3.0, 4.0]]), "bias": torch.tensor([5.0])}


def heads(*updates):
    return {k: moved(SENT, torch.tensor(update)) for k, update in enumerate(updates)}


def aggregate(rule, uploads, **options):
    """The update that a rule makes of heads, and its rows of ``server.csv``; without noise."""
    server = RULES[rule].server(server_options(num_users=len(uploads), **{"clip_noise": 0.0, **options}))
    head, _, rows, _ = server(Round(1, SENT, uploads, dict.fromkeys(uploads, 10)))
    return updates_of(SENT, [head])[0], rows


@pytest.mark.parametrize("rule, expected", [
    ("median", [1.5, 0, 0, 0, 2]),          # of 0, 1, 2, 9: halfway between the two in the middle
    ("trimmed_mean", [1.5, 0, 0, 0, 2]),    # without the least and the most
    ("krum", [1.0, 0, 0, 0, 2]),            # with f = 1, nearest to its two nearest
])
def test_by_hand(rule, expected):
    update, rows = aggregate(rule, heads(*([x, 0, 0, 0, 2.0] for x in (0.0, 1.0, 2.0, 9.0))))
    assert update.tolist() == pytest.approx(expected)
    assert all(row["weight"] is None for row in rows)


def spread_out():
    torch.manual_seed(3)
    return torch.cat([torch.randn(7, 6), 4 + torch.randn(2, 6)])


def test_nnm_and_multi_krum_by_their_definitions():
    updates, f = spread_out(), 2
    nearest = torch.cdist(updates, updates).topk(len(updates) - f, largest=False).indices
    mixed = torch.stack([updates[row].mean(0) for row in nearest])
    torch.testing.assert_close(robust.nnm_trimmed_mean(updates, f), mixed.sort(0).values[f:-f].mean(0),
                               atol=1e-4, rtol=1e-4)
    score = torch.cdist(updates, updates).square().sort(1).values[:, 1:len(updates) - f].sum(1)
    expected = updates[score.argsort()[:len(updates) - f]].mean(0)
    torch.testing.assert_close(robust.of_byzfl("MultiKrum")(updates, f), expected, atol=1e-4, rtol=1e-4)


def test_caf_leaves_out_what_stands_out():
    updates = spread_out()
    left = robust.caf(updates, 2)
    assert (left - updates[:7].mean(0)).norm() < 0.3 * (updates.mean(0) - updates[:7].mean(0)).norm()
    same = torch.ones(4, 3)
    assert torch.equal(robust.caf(same, 1), same[0]) and torch.allclose(robust.caf(updates, 0), updates.mean(0))


@pytest.mark.parametrize("far", [1, 3])
def test_caf_ends_where_an_upload_is_far_longer_than_the_others(far):
    """Far longer than honest updates, as mpaf uploads: byzfl's CAF removes weight for ever."""
    torch.manual_seed(1)
    updates = torch.randn(10, 50)
    updates[10 - far:] = 1e4 * torch.randn(50)
    honest = updates[:10 - far]
    assert (robust.caf(updates, 3) - honest.mean(0)).norm() < 0.5 * honest.norm(dim=1).mean()


def test_norm_clipping_by_hand_and_its_noise():
    plain, _ = aggregate("norm_clipping", heads([3.0, 4, 0, 0, 0], [0, 1, 0, 0, 0], [0, 0, 2, 0, 0]))
    assert plain.tolist() == pytest.approx([1.2 / 3, 2.6 / 3, 2 / 3, 0, 0], abs=1e-6)   # of norms 5, 1 and 2
    sent = {"weight": torch.zeros(10_000)}
    uploads = {k: {"weight": torch.eye(3, 10_000)[k] * (k + 1)} for k in range(3)}
    noisy = [RULES["norm_clipping"].server(server_options(seed=seed, clip_noise=0.5))(
        Round(number, sent, uploads, dict.fromkeys(uploads, 1))).head["weight"]
        for seed, number in ((1, 1), (1, 1), (1, 2), (2, 1))]
    assert torch.equal(noisy[0], noisy[1])
    assert not torch.equal(noisy[0], noisy[2]) and not torch.equal(noisy[0], noisy[3])
    assert noisy[0][3:].norm().item() == pytest.approx(0.5 * 2, rel=0.05)   # half of the median norm


def test_centered_clipping_bounds_what_one_client_can_do():
    near, _ = aggregate("centered_clipping", heads(*[[1.0, 0, 0, 0, 0]] * 9, [0.0, 10, 0, 0, 0]))
    far, _ = aggregate("centered_clipping", heads(*[[1.0, 0, 0, 0, 0]] * 9, [0.0, 1e6, 0, 0, 0]))
    assert (near - far).abs().max() < 0.02 and far[0] > 0.8   # all but its direction is cut off
    still, _ = aggregate("centered_clipping", heads(*[[0.0] * 5] * 3, [1.0, 0, 0, 0, 0]))   # a median norm of 0
    assert torch.equal(still, torch.zeros(5))


@pytest.mark.parametrize("rule", ROBUST)
def test_order_scale_and_lone_clients(rule):
    torch.manual_seed(0)
    rows = torch.randn(7, 5)
    update, _ = aggregate(rule, {k: moved(SENT, rows[k]) for k in range(7)})
    backward, _ = aggregate(rule, {k: moved(SENT, rows[6 - k]) for k in range(7)})
    assert torch.allclose(update, backward, atol=1e-5)
    twice, _ = aggregate(rule, {k: moved(SENT, 2 * rows[k]) for k in range(7)})
    assert torch.allclose(2 * update, twice, atol=1e-4)
    alone, _ = aggregate(rule, {0: moved(SENT, rows[0])})
    assert torch.allclose(alone, rows[0], atol=1e-4)
    nobody, *_ = RULES[rule].server(server_options())(Round(1, SENT, {}, {0: 10}))
    assert nobody is SENT


@pytest.mark.parametrize("value", [1e30, 1e19, -3e38, float("nan"), float("inf")])
@pytest.mark.parametrize("rule", RULES)
def test_uploads_that_overflow_count_for_nothing(rule, value):
    torch.manual_seed(0)
    good = {k: moved(SENT, row) for k, row in enumerate(torch.randn(5, 5))}
    bad = {5: {name: torch.full_like(tensor, value) for name, tensor in SENT.items()}}
    update, rows = aggregate(rule, {**good, **bad})
    assert torch.equal(update, aggregate(rule, good)[0]) and update.isfinite().all()
    assert rows[5]["weight"] == 0


@pytest.mark.parametrize("rule", RULES)
def test_the_longest_uploads_that_are_used_give_a_finite_head(rule):
    """Three of eight: 5 parameters of 1.4e18, just under what float32 holds 4 x 8 squared norms of."""
    torch.manual_seed(0)
    uploads = {k: moved(SENT, row) for k, row in enumerate(torch.randn(8, 5))}
    for k, value in enumerate((1.4e18, -1.4e18, 1.4e18)):
        uploads[k] = {name: torch.full_like(tensor, value) for name, tensor in SENT.items()}
    update, rows = aggregate(rule, uploads)
    assert update.isfinite().all()
    assert rule != "mean" or [row["weight"] for row in rows] == [1 / 8] * 8
    longer = {**uploads, 0: {name: torch.full_like(tensor, 1.5e18) for name, tensor in SENT.items()}}
    assert aggregate(rule, longer)[1][0]["weight"] == 0
