"""The threat-aware weights: by hand, on recorded honest updates, and under attack."""
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import server_options

from server import threat_aware
from server.base import Round
from server.threat_aware import ThreatAware, copies_of, cosines_with_others, filtered, norm_ratios

GRAMS = dict(np.load(Path(__file__).parent / "honest_grams.npz"))   # inner products of honest updates, 10 x 10
SENT = {"w": torch.zeros(40)}


def server(clients=10, trust=None):
    """A server; ``trust`` is what clients are remembered to have, if they have been seen before."""
    made = ThreatAware(server_options(num_users=clients))
    if trust is not None:
        made.memory |= {"trust": torch.tensor(trust), "seen": torch.ones(clients)}
    return made


def weighed(updates, sizes=None, trust=None, made=None, number=1):
    """Weights and rows of ``server.csv`` after a round of these updates, ``K x P``."""
    made, sent = made or server(len(updates), trust), {"w": torch.zeros(len(updates[0]))}
    uploads = {k: {"w": torch.as_tensor(row, dtype=torch.float32)} for k, row in enumerate(updates)}
    rows = made(Round(number, sent, uploads, dict(enumerate(sizes or [100] * len(updates))))).rows
    return torch.tensor([row["weight"] for row in rows]).double(), rows


def opposed(updates):
    """The updates, the first of which opposes the mean of all."""
    return torch.cat([-updates.mean(0, keepdim=True), updates[1:]])


@pytest.fixture
def honest():
    """Updates of ten clients that have a little in common."""
    torch.manual_seed(7)
    return 0.3 * torch.randn(40) + torch.randn(10, 40)


@pytest.mark.parametrize("case", sorted(GRAMS))
def test_where_nobody_is_malicious_all_weigh_alike(case):
    """Recorded updates of 10 honest clients, 5 rounds of 2 on `mnist10k`, by their inner products. Among them are
    the two rounds in which an earlier filter took all of a client's weight (`fedavg`, IID, seeds 1 and 2)."""
    gram = torch.from_numpy(GRAMS[case]).double()
    values, vectors = torch.linalg.eigh(gram / gram.diag().mean())
    weight, rows = weighed(vectors * values.clamp_min(0).sqrt())
    assert [row["trust"] for row in rows] == pytest.approx([1] * 10, abs=0.2)
    assert 10 * weight.min() > 0.8 and 10 * weight.max() < 1.2


def test_nobody_is_distrusted_where_all_have_the_same_classes():
    """Whole models under IID: updates are alike, so that a little more or less must not count."""
    torch.manual_seed(5)
    common, made = torch.randn(5000), server()
    for number, alike in enumerate((3.0, 1.0, 0.3, 0.1), 1):   # ever less in common, as training goes on
        _, rows = weighed(alike * common + torch.randn(10, 5000), made=made, number=number)
        assert [row["trust"] for row in rows] == pytest.approx([1] * 10, abs=0.05)


def test_norms_cosines_and_copies_by_hand():
    updates = torch.tensor([[3.0, 4], [0, 5], [5, 0], [0, 0], [15, 20]]).double()
    assert norm_ratios(updates @ updates.T).tolist() == pytest.approx([1, 1, 1, 0, 5])
    assert norm_ratios(torch.tensor([1.0, 9.0]).diag()).tolist() == [0.5, 1.5]   # the median of 1 and 3 is 2
    updates = torch.tensor([[1.0, 0], [0, 1], [-1, -1]]).double()
    gram = updates @ updates.T
    cosine = cosines_with_others(gram, torch.tensor([1.0, 1, 0]).double())
    assert cosine.tolist() == pytest.approx([0, 0, -1])   # the third has no say, and opposes the two others
    similarity, copies = copies_of(gram)
    assert similarity.tolist() == pytest.approx([0, 0, -math.sqrt(0.5)]) and copies.tolist() == [1, 1, 1]


@pytest.mark.parametrize("spread, bound", [(0, 1), (0.1, math.exp(0.29652)), (0.5, 1.5)])
def test_a_longer_update_moves_the_mean_less(spread, bound):
    """Orthogonal updates, by hand: norms e^-2s, e^-s, 1, 1, e^s and the last have a median absolute deviation of
    s; the bound is e^(2 x 1.4826 s), 1.5 at most. Beyond it weight falls faster than the norm grows."""
    others, moves = torch.tensor([-2.0, -1, 0, 0, 1]).mul(spread).exp(), []
    for norm in (bound, 2 * bound, 30.0):
        weight, rows = weighed(torch.cat([others, torch.tensor([norm])]).diag())
        assert rows[5]["norm_ratio"] == pytest.approx(norm)
        assert (weight[5] / weight[0]).item() == pytest.approx(min(1, bound / norm) ** 2)
        moves.append(norm * weight[5])
    assert moves[0] > moves[1] > moves[2]


@pytest.mark.parametrize("cosine, trusted", [(-0.8, True), (-0.9, False)])
def test_only_clear_opposition_costs_trust(cosine, trusted):
    updates = torch.zeros(5, 5)
    updates[:4, 0] = 1
    updates[:4] += 0.3 * torch.eye(4, 5)
    mean = torch.nn.functional.normalize(updates[:4].mean(0), dim=0)
    updates[4] = cosine * mean + (1 - cosine**2) ** 0.5 * torch.eye(5)[4]
    weight, rows = weighed(updates)
    assert rows[4]["cosine"] == pytest.approx(cosine, abs=1e-3)
    assert (rows[4]["trust"] > 0.5) == trusted == (weight[4] > 0)


def test_copies_share_the_weight_of_one():
    """Three of ten copy an honest client: in every round it keeps its trust, and a quarter of the weight that it
    would have without them."""
    updates, made = torch.eye(10)[[0, 1, 2, 3, 4, 5, 6, 2, 2, 2]], server()
    for number in (1, 2, 3):
        weight, rows = weighed(updates, made=made, number=number)
        alone, _ = weighed(updates[:7])
        assert weight[[2, 7, 8, 9]].tolist() == pytest.approx([alone[2].item() / 4] * 4, rel=0.1)
        assert [row["trust"] for row in rows] == [1] * 10   # nobody is punished for being copied


def test_order_and_scale_do_not_matter(honest):
    updates = opposed(honest)
    weight, _ = weighed(updates)
    for scale in (1e-3, 1e3):
        assert torch.allclose(weighed(scale * updates)[0], weight, atol=1e-5)
    sent = torch.randn(40)   # in two parameters
    uploads = {k: {"b": sent[9:] + updates[k, 9:], "a": sent[:9] + updates[k, :9]} for k in reversed(range(10))}
    rows = server()(Round(1, {"a": sent[:9], "b": sent[9:]}, uploads, dict.fromkeys(range(10), 100))).rows
    assert [row["weight"] for row in rows] == pytest.approx(weight.tolist(), abs=1e-5)


@pytest.mark.parametrize("clients, left", [(9, 1), (10, 0)])
def test_fewer_than_ten_uploads_are_not_filtered(clients, left):
    """Orthogonal updates but for two with a cosine of 0.9, along whose direction the variance stands out."""
    updates = torch.eye(clients)
    updates[1] = 0.9 * updates[0] + (1 - 0.81)**0.5 * updates[1]
    weight, _ = weighed(updates)
    assert (weight[:2] / weight[2:].mean()).tolist() == pytest.approx([left] * 2, abs=0.05)


def test_to_claim_more_images_gains_nothing():
    weight, _ = weighed(torch.eye(6), sizes=[100_000, 100, 100, 100, 100, 50])
    assert weight.tolist() == pytest.approx([2 / 11] * 5 + [1 / 11])
    weight, _ = weighed(torch.eye(2), sizes=[100, 300])
    assert weight.tolist() == pytest.approx([1 / 3, 2 / 3])   # the median is 200; more is never less


def test_distrusted_clients_are_no_reference_for_others():
    """Cosines are those with the mean of the others that were trusted before."""
    torch.manual_seed(8)
    updates = torch.nn.functional.normalize(torch.randn(10, 30))
    _, rows = weighed(updates, trust=[0.0] * 3 + [1.0] * 7)
    for k in (0, 9):
        others = updates[[j for j in range(3, 10) if j != k]].mean(0)
        expected = torch.cosine_similarity(updates[k], others, dim=0).item()
        assert rows[k]["cosine"] == pytest.approx(expected, abs=1e-5)


def test_trust_is_lost_at_once_and_returns_slowly_and_weights_with_it(honest):
    made, trust = server(), []
    for number, updates in enumerate((honest, opposed(honest), honest, honest), 1):
        trust.append(weighed(updates, made=made, number=number)[1][0]["trust"])
    assert trust[0] > 0.8 and trust[1] < 0.4 and trust[1] < trust[2] < trust[3] < 0.95
    made = server(6)   # an upload that could not be used earns no trust
    weighed([torch.full((6,), torch.nan), *torch.eye(6)[1:]], made=made)
    weight, rows = weighed(torch.eye(6), made=made, number=2)
    assert [row["trust"] for row in rows] == pytest.approx([0.2] + [1] * 5)
    assert weight.tolist() == pytest.approx([0.2 / 5.2] + [1 / 5.2] * 5)


def test_the_fallback_counts_norms_copies_and_sizes_but_no_trust():
    """Three copies, and one that is four times as long as the others, all distrusted before."""
    updates = torch.cat([torch.eye(7), torch.eye(7)[[0, 0]]])[[0, 7, 8, 1, 2, 3, 4]]
    updates[6] *= 4
    made = server(7, trust=[0.0] * 7)
    weight, rows = weighed(updates, sizes=[100] * 5 + [50, 100], made=made)
    assert max(row["trust"] for row in rows) == pytest.approx(0.2) and made.facts == {"fallbacks": 1}
    expected = torch.tensor([1 / 3, 1 / 3, 1 / 3, 1, 1, 0.5, 1 / 4**2]).double()
    assert torch.allclose(weight, expected / expected.sum())


def test_the_filter_takes_weight_from_those_who_push_one_way():
    """Seven orthogonal clients, and three of unit length who push against what the seven have in common, each with
    a part of its own, so that they are no copies: the plain mean is turned round, the filtered one is not."""
    honest, against = torch.eye(10)[:7], -torch.ones(10) / 7**0.5
    against[7:] = 0
    bad = torch.stack([0.9 * against + (1 - 0.81)**0.5 * torch.eye(10)[k] for k in (7, 8, 9)])
    updates, mean = torch.cat([honest, bad]).double(), honest.mean(0).double()
    ratio = threat_aware.EIGENVALUE_RATIO
    weight = filtered(updates @ updates.T, torch.ones(10).double(), ratio, 0.6)
    assert updates.mean(0) @ mean < 0 < (weight / weight.sum()) @ updates @ mean
    assert weight[7:].sum() / weight.sum() < 0.05 and weight[:7].min() > 0.2
    for alike in (torch.ones(5, 5).double(), torch.eye(5).double(), torch.zeros(5, 5).double()):
        assert torch.allclose(filtered(alike, torch.ones(5).double(), ratio, 0.6), torch.ones(5).double())
    # Four updates of which no reweighting that the filter tries makes the largest variance smaller.
    updates = torch.tensor([[0, 0, 0], [-3, -1, -1.9], [0.3, -0.2, 0.2], [0.8, 0.6, -4]]).double()
    assert torch.equal(filtered(updates @ updates.T, torch.ones(4).double(), 0, 0.6), torch.ones(4).double())


def test_nobody_one_and_two_clients_that_undo_each_other():
    assert server()(Round(1, SENT, {}, {0: 10})).head is SENT
    weight, _ = weighed(torch.eye(1))
    assert weight.tolist() == [1]
    made, updates = server(2), torch.tensor([[1.0, 2], [-1, -2]])
    for number in (1, 2, 3):   # nobody is left to compare them with, which acquits neither
        weight, rows = weighed(updates, made=made, number=number)
        assert [row["trust"] for row in rows] == [0, 0] and weight.tolist() == [0.5, 0.5]
        assert made.facts == {"fallbacks": number} and made.memory["trust"].tolist() == [0, 0]
    for number in (4, 5, 6, 7):   # they agree again: trust returns, and weights with it
        weight, rows = weighed(torch.tensor([[1.0, 2], [2, 1]]), made=made, number=number)
    assert [row["trust"] for row in rows] == pytest.approx([1 - 0.8**4] * 2) and made.facts == {"fallbacks": 6}
    assert weight.tolist() == pytest.approx([0.5, 0.5], abs=0.01)


def test_a_warning_says_once_that_two_uploads_are_too_few(place, capsys):
    assert place.main("--rounds", 2) == 0
    warnings = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert warnings == ["warning: --aggregation threat_aware cannot tell who is malicious among fewer than 3 "
                        "uploads; round 1 has 2"]
    assert place.main("--aggregation", "mean", "--overwrite", "--rounds", 1) == 0
    assert "warning" not in capsys.readouterr().err


def test_what_the_server_remembers_is_resumed(place):
    """One of two clients opposes the other, so that every round falls back."""
    flags = ("--aggregation", "threat_aware", "--malicious_frac", 0.5, "--malicious_behaviour", "sign_flip",
             "--save_rounds", 1)
    assert place.main(*flags) == 0
    whole, config = place.clients_csv(), place.results / "config.json"
    place.unfinish(3)
    assert place.main(*flags, "--resume") == 0 and place.clients_csv() == whole
    assert json.loads(config.read_text())["server"] == {"fallbacks": 3}


def test_updates_are_clipped_to_the_median_norm_before_they_are_compared():
    """The third is twice as long, so it has a trust of 1 / 4 as a reference."""
    _, rows = weighed(torch.tensor([[1.0, 0, 0], [0, 1, 0], [2**0.5, 0, 2**0.5]]))
    assert rows[0]["cosine"] == pytest.approx(0.25 * 0.5**0.5 / (1 + 0.25**2) ** 0.5, abs=1e-5)
