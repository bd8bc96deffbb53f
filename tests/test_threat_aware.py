"""The server's threat model: what its weights see, and rules and behaviours end to end."""
import copy
import math
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from models import Classifier
from sampling import partition as partition_of
from server import threat_aware
from server.base import Round, Setting, State, moved, updates_of
from server.filtering import filtered
from server.forging import ForgerView, trusted_most
from server.malicious import BEHAVIOURS, MaliciousClients
from server.rules import RULES
from server.threat_aware import (
    ThreatAware,
    Updates,
    against_others,
    capped,
    lengths,
    likenesses,
    norms,
    shared_out,
)
from utils import rng

SHAPE, CLASSES = (1, 28, 28), 10
GRAMS = dict(np.load(Path(__file__).parent / "honest_grams.npz"))   # inner products of honest updates, 10 x 10


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(3)
    return Classifier(SHAPE, CLASSES).eval()


@pytest.fixture(scope="module")
def crowd(network):
    """A head, what ten honest clients of two classes each make of it, and the same with labels turned."""
    torch.manual_seed(4)
    sent = {f"classifier.{name}": value.clone() for name, value in network.state_dict().items()}
    patterns = torch.randn(CLASSES, *SHAPE)

    def trained(start: State, classes, turn=False, steps=8, lr=1e-4):
        state = {name.removeprefix("classifier."): value.clone().requires_grad_()
                 for name, value in start.items()}
        optimizer = torch.optim.Adam(state.values(), lr)
        for _ in range(steps):
            y = torch.tensor(list(classes)).repeat(16)
            x = patterns[y] + torch.randn(len(y), *SHAPE)
            logits = torch.func.functional_call(network, state, (x,))
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(logits, CLASSES - 1 - y if turn else y).backward()
            optimizer.step()
        return {f"classifier.{name}": value.detach() for name, value in state.items()}
    sent = trained(sent, range(CLASSES), steps=20, lr=1e-3)
    mine = [(0, 1), (2, 3), (4, 5), (6, 7), (8, 9), (0, 2), (4, 6), (8, 1), (3, 5), (7, 9)]
    return sent, {k: trained(sent, c) for k, c in enumerate(mine)}, {k: trained(sent, c, turn=True)
                                                                    for k, c in enumerate(mine)}


def server(clients=10):
    return ThreatAware(Setting(clients=clients))


def sizes(uploads):
    return dict.fromkeys(uploads, 100)


def test_honest_clients_of_few_classes_are_trusted(crowd):
    sent, honest, _ = crowd
    trust = server().trust(Round(1, sent, honest, sizes(honest)))
    assert min(trust.values()) > 0.5 and sum(trust.values()) > 9


def test_copies_share_what_one_would_get(crowd):
    sent, honest, _ = crowd
    uploads = {**honest, 10: honest[0], 11: honest[0]}
    report = server(12)(Round(1, sent, uploads, sizes(uploads)))[2]
    weight = [row["weight"] for row in report]
    assert weight[0] == weight[10] == weight[11] == pytest.approx(weight[1] / 3, rel=0.05)
    assert [row["trust"] for row in report] == [1] * 12   # nobody is punished for being copied


def test_mimics_leave_the_copied_one_its_share(crowd):
    """Three of ten copy an honest client: in every round it keeps its trust, and a quarter of the weight that it
    would have without them."""
    sent, honest, _ = crowd
    uploads, made = {k: honest[k if k < 7 else 2] for k in honest}, server()
    seven = {k: honest[k] for k in range(7)}
    for r in (1, 2, 3):
        report = made(Round(r, sent, uploads, sizes(uploads)))[2]
        alone = server(7)(Round(r, sent, seven, sizes(seven)))[2][2]["weight"]
        assert [report[k]["weight"] for k in (2, 7, 8, 9)] == pytest.approx([alone / 4] * 4, rel=0.1)
        assert report[2]["trust"] == 1


def test_nobody_is_distrusted_where_all_have_the_same_classes(crowd):
    """Whole models under IID: updates are alike, so that a little more or less must not count."""
    sent, _, _ = crowd
    torch.manual_seed(5)
    common = torch.randn(sum(value.numel() for value in sent.values()))
    made = server()
    for r, alike in enumerate((3.0, 1.0, 0.3, 0.1), 1):   # ever less in common, as training goes on
        uploads = {k: moved(sent, 1e-3 * (alike * common + torch.randn(len(common)))) for k in range(10)}
        report = made(Round(r, sent, uploads, sizes(uploads)))[2]
        assert [row["trust"] for row in report] == pytest.approx([1] * 10, abs=0.01)


def test_length_buys_nothing_and_opposition_is_seen(crowd):
    sent, honest, _ = crowd
    own = {k: {name: value - sent[name] for name, value in upload.items()} for k, upload in honest.items()}
    mean = {name: sum(update[name] for update in own.values()) / len(own) for name in sent}
    for factor, which in ((50, own[0]), (1e30, own[0]), (-1, mean), (-30, mean)):
        bad = {name: value + factor * which[name] for name, value in sent.items()}
        head, _, report = server()(Round(1, sent, {**honest, 0: bad}, sizes(honest)))
        assert all(value.isfinite().all() for value in head.values())
        assert report[0]["weight"] < 0.03 and min(row["weight"] for row in report[1:]) > 0.05


def test_order_and_scale_do_not_matter(crowd):
    sent, honest, flipped = crowd
    uploads = {**honest, 0: opposite(sent, honest[0])}
    first = server()(Round(1, sent, uploads, sizes(uploads)))
    again = server()(Round(1, sent, dict(reversed(uploads.items())), sizes(uploads)))
    assert all(torch.allclose(value, again[0][name], atol=1e-6) for name, value in first[0].items())
    updates = torch.randn(5, 9).double()
    gram = updates @ updates.T
    for scale in (1e-3, 1e3):   # of all updates alike
        assert torch.allclose(lengths(norms(updates)), lengths(norms(scale * updates)))
        assert torch.allclose(likenesses(gram)[0], likenesses(scale * gram)[0])
        assert torch.allclose(against_others(gram, torch.ones(5).double()),
                              against_others(scale * gram, torch.ones(5).double()))


def test_lengths_by_hand():
    assert lengths(norms(torch.tensor([[3.0, 4], [0, 5], [5, 0], [0, 0], [15, 20]]))).tolist() == pytest.approx(
        [1, 1, 1, 0, 5])
    assert lengths(torch.tensor([1.0, 3.0])).tolist() == [0.5, 1.5]   # the median of two lies halfway


def test_directions_by_hand():
    updates = torch.tensor([[1.0, 0], [0, 1], [-1, -1]]).double()
    cosine = against_others(updates @ updates.T, torch.tensor([1.0, 1, 0]).double())
    assert cosine.tolist() == pytest.approx([0, 0, -1])   # the third has no say, and opposes the two others
    alike, copies = likenesses(updates @ updates.T)
    assert alike.tolist() == pytest.approx([0, 0, -math.sqrt(0.5)]) and copies.tolist() == [1, 1, 1]


def test_the_cap_by_hand():
    assert capped(torch.tensor([100, 100, 100, 100_000.0])).tolist() == [100] * 4
    assert capped(torch.tensor([100.0, 300.0])).tolist() == [100, 200]   # more images are never less weight
    for weights, expected in (([100, 1, 1, 1], [3 / 4, 1 / 12, 1 / 12, 1 / 12]),
                              ([2, 1, 1], [1 / 2, 1 / 4, 1 / 4]), ([1, 0.5], [2 / 3, 1 / 3]), ([7], [1]),
                              # 0.8 is lifted over 3 / 8 by what 100 loses, and held there as well
                              ([100, 0.8, 0.1, 0.1, 0.1, 0.1, 0, 0], [3 / 8, 3 / 8, *[1 / 16] * 4, 0, 0]),
                              ([100, 1, 0, 0, 0, 0, 0, 0], [1 / 2, 1 / 2, *[0] * 6])):   # too few for the cap
        assert shared_out(torch.tensor(weights).double()).tolist() == pytest.approx(expected)
    torch.manual_seed(2)
    for size in (4, 12, 40):
        shares = shared_out(torch.rand(size).double() ** 30)
        assert shares.max() <= 3 / size + 1e-12 and shares.sum() == pytest.approx(1)


def judged(updates, sizes=None, trust=None):
    """Weights, and rows of ``server.csv``, after a round of these updates ``K x P``; ``trust`` is what clients are
    remembered to have, if they have been seen before."""
    made, sent = server(len(updates)), {"w": torch.zeros(len(updates[0]))}
    if trust is not None:
        made.memory |= {"trust": torch.tensor(trust), "seen": torch.ones(len(updates))}
    uploads = {k: {"w": torch.as_tensor(row, dtype=torch.float32)} for k, row in enumerate(updates)}
    rows = made(Round(1, sent, uploads, dict(enumerate(sizes or [100] * len(updates))))).rows
    return torch.tensor([row["weight"] for row in rows]).double(), rows


@pytest.mark.parametrize("case", sorted(GRAMS))
def test_where_nobody_is_malicious_all_weigh_alike(case):
    """Recorded updates of 10 honest clients, 5 rounds of 2 on `mnist10k`, by their inner products. Among them are
    the two rounds in which an earlier filter took all of a client's weight (`fedavg`, IID, seeds 1 and 2)."""
    gram = torch.from_numpy(GRAMS[case]).double()
    values, vectors = torch.linalg.eigh(gram / gram.diag().mean())
    weight, rows = judged(vectors * values.clamp_min(0).sqrt())
    assert [row["trust"] for row in rows] == pytest.approx([1] * 10, abs=0.2)
    assert 10 * weight.min() > 0.8 and 10 * weight.max() < 1.25


@pytest.mark.parametrize("clients", [10, 20])
@pytest.mark.parametrize("partition", ["shards", "dirichlet", "iid"])
def test_whoever_has_which_classes_nothing_stands_out(partition, clients):
    """Updates whose cosines are those of their clients' classes, and a tenth their own."""
    labels = np.arange(4000) % 10
    for seed in range(1, 11):
        parts = partition_of(labels, clients, partition, rng(seed, "partition"), alpha=0.1, classes_per_client=2,
                             min_images=5)
        counts = torch.stack([torch.from_numpy(np.bincount(labels[part], minlength=10)) for part in parts])
        classes = (counts / counts.sum(1, keepdim=True)).double().sqrt()
        weight, _ = judged(torch.cat([0.9**0.5 * classes, 0.1**0.5 * torch.eye(clients)], 1))
        assert clients * weight.min() > 0.8 and clients * weight.max() < 1.25, seed


@pytest.mark.parametrize("spread, bar", [(0, 1), (0.1, math.exp(0.29652)), (0.5, 1.5)])
def test_a_longer_update_moves_the_mean_less(spread, bar):
    """Orthogonal updates, by hand: norms e^-2s, e^-s, 1, 1, e^s and the last have a median absolute deviation of
    s; the bar is e^(2 x 1.4826 s), 1.5 at most. Beyond it weight falls faster than length grows."""
    others = torch.tensor([-2.0, -1, 0, 0, 1]).mul(spread).exp()
    moves = []
    for norm in (bar, 2 * bar, 30.0):
        weight, rows = judged(torch.cat([others, torch.tensor([norm])]).diag())
        assert rows[5]["norm_ratio"] == pytest.approx(norm)
        assert (weight[5] / weight[0]).item() == pytest.approx(min(1, bar / norm) ** 2)
        moves.append(norm * weight[5])
    assert moves[0] > moves[1] > moves[2]


@pytest.mark.parametrize("clients, left", [(9, 1), (10, 0)])
def test_fewer_than_ten_uploads_are_not_filtered(clients, left):
    """Orthogonal updates but for two with a cosine of 0.9, along whose direction the variance stands out."""
    updates = torch.eye(clients)
    updates[1] = 0.9 * updates[0] + (1 - 0.81)**0.5 * updates[1]
    weight, _ = judged(updates)
    assert (weight[:2] / weight[2:].mean()).tolist() == pytest.approx([left] * 2, abs=0.05)


def test_who_claims_more_images_weighs_no_more():
    weight, _ = judged(torch.eye(6), sizes=[100_000, 100, 100, 100, 100, 50])
    assert weight.tolist() == pytest.approx([2 / 11] * 5 + [1 / 11])


def test_nobody_weighs_more_than_three_times_its_share():
    """The only trusted one of those that have many images: 100 of 204 without the cap."""
    weight, rows = judged(torch.eye(10), sizes=[100] * 6 + [1] * 4, trust=[1.0] + [0.0] * 5 + [1.0] * 4)
    assert [row["trust"] for row in rows] == pytest.approx([1] + [0.2] * 5 + [1] * 4)
    assert weight.tolist() == pytest.approx([0.3] + [0.7 * 20 / 104] * 5 + [0.7 / 104] * 4)


def test_what_was_distrusted_is_no_measure_of_others():
    """Cosines are those with the mean of the others that were trusted before."""
    torch.manual_seed(8)
    updates = torch.nn.functional.normalize(torch.randn(10, 30))
    _, rows = judged(updates, trust=[0.0] * 3 + [1.0] * 7)
    for k in (0, 9):
        others = updates[[j for j in range(3, 10) if j != k]].mean(0)
        expected = torch.cosine_similarity(updates[k], others, dim=0).item()
        assert rows[k]["cosine"] == pytest.approx(expected, abs=1e-5)


def test_an_upload_that_could_not_be_used_earns_no_trust():
    made, sent = server(6), {"w": torch.zeros(6)}
    uploads = {k: {"w": row} for k, row in enumerate(torch.eye(6))}
    made(Round(1, sent, {**uploads, 0: {"w": torch.full((6,), torch.nan)}}, sizes(uploads)))
    report = made(Round(2, sent, uploads, sizes(uploads))).rows
    assert [row["trust"] for row in report] == pytest.approx([0.2] + [1] * 5)


def test_the_fall_back_counts_norms_copies_and_sizes_but_no_trust():
    """Three copies, and one that is four times as long as the others, all distrusted before."""
    updates = torch.cat([torch.eye(7), torch.eye(7)[[0, 0]]])[[0, 7, 8, 1, 2, 3, 4]]
    updates[6] *= 4
    weight, rows = judged(updates, sizes=[100] * 5 + [50, 100], trust=[0.0] * 7)
    assert max(row["trust"] for row in rows) == pytest.approx(0.2)
    expected = torch.tensor([1 / 3, 1 / 3, 1 / 3, 1, 1, 0.5, 1 / 4**2]).double()
    assert torch.allclose(weight, expected / expected.sum())


def test_the_filter_takes_weight_from_those_who_push_one_way():
    """Seven orthogonal clients, and three of unit length who push against what the seven have in common, each with
    a part of its own, so that they are no copies: the plain mean is turned round, the filtered one is not."""
    honest, against = torch.eye(10)[:7], -torch.ones(10) / 7**0.5
    against[7:] = 0
    bad = torch.stack([0.9 * against + (1 - 0.81)**0.5 * torch.eye(10)[k] for k in (7, 8, 9)])
    updates, mean = torch.cat([honest, bad]).double(), honest.mean(0).double()
    bar = threat_aware.EIGENVALUE_RATIO
    weight = filtered(updates @ updates.T, torch.ones(10).double(), bar, 0.6)
    assert updates.mean(0) @ mean < 0 < (weight / weight.sum()) @ updates @ mean
    assert weight[7:].sum() / weight.sum() < 0.05 and weight[:7].min() > 0.2
    assert torch.allclose(filtered(4 * updates @ updates.T, torch.ones(10).double(), bar, 0.6), weight)
    for alike in (torch.ones(5, 5).double(), torch.eye(5).double(), torch.zeros(5, 5).double()):
        assert torch.allclose(filtered(alike, torch.ones(5).double(), bar, 0.6), torch.ones(5).double())


def test_the_filter_returns_the_weights_under_which_updates_differ_least():
    """Four updates of which no reweighting that the filter tries makes the largest variance smaller."""
    updates = torch.tensor([[0, 0, 0], [-3, -1, -1.9], [0.3, -0.2, 0.2], [0.8, 0.6, -4]]).double()
    assert torch.equal(filtered(updates @ updates.T, torch.ones(4).double(), 0, 0.6), torch.ones(4).double())


def test_the_fall_back_is_no_worse_than_the_best_plain_rule():
    """Where nobody is trusted, three of ten that push against the rest cost it less than any rule of byzfl's,
    and what they cost CAF, whose filter it has."""
    torch.manual_seed(7)
    sent, common = {"w": torch.zeros(400)}, 0.5 * torch.randn(400)
    honest = common + torch.randn(10, 400)
    mean, lost = honest[3:].mean(0), {}
    for strength in (0.5, 1.2, 3.0, 8.0):
        updates = honest.clone()
        updates[:3] -= strength * mean
        round = Round(1, sent, {k: {"w": row} for k, row in enumerate(updates)}, dict.fromkeys(range(10), 1))
        for name in ("median", "trimmed_mean", "nnm_trimmed_mean", "caf", "geometric_median", "centered_clipping"):
            head = RULES[name].server(Setting(clients=10))(round).head["w"]
            lost.setdefault(name, []).append(1 - (head @ mean / mean.square().sum()).item())
        made = ThreatAware(Setting(clients=10))
        made.memory = {"trust": torch.zeros(10), "seen": torch.ones(10), "fallbacks": 0}
        head = made(round).head["w"]
        assert made.facts == {"fallbacks": 1}
        lost.setdefault("fall-back", []).append(1 - (head @ mean / mean.square().sum()).item())
    worst = {name: max(values) for name, values in lost.items()}
    assert worst["fall-back"] < worst.pop("caf") + 0.02, worst
    assert min(worst, key=worst.__getitem__) == "fall-back", worst


def test_trust_goes_at_once_and_returns_slowly(crowd):
    sent, honest, flipped = crowd
    made, seen = server(), []
    mean = {name: sum(upload[name] for upload in honest.values()) / len(honest) for name in sent}
    for r, uploads in enumerate((honest, {**honest, 0: opposite(sent, mean)}, honest, honest), 1):
        report = made(Round(r, sent, uploads, sizes(uploads)))[2]
        seen.append(report[0]["trust"])
    assert seen[0] > 0.8 and seen[1] < 0.4 and seen[1] < seen[2] < seen[3] < 0.95


def test_one_client_nobody_and_all_malicious(crowd):
    sent, honest, flipped = crowd
    head, _, report = server()(Round(1, sent, {3: honest[3]}, {3: 10}))
    assert report[0]["weight"] == 1 and torch.allclose(
        head["classifier.output.bias"], honest[3]["classifier.output.bias"], atol=1e-6)
    assert server()(Round(1, sent, {}, {0: 10}))[0] is sent
    nan = {name: torch.full_like(value, torch.nan) for name, value in sent.items()}
    head, _, report = server()(Round(1, sent, {0: nan}, {0: 10}))
    assert head is sent and report[0]["weight"] == 0
    head, _, report = server()(Round(1, sent, {**honest, 0: nan}, sizes(honest)))
    assert report[0]["weight"] == 0 and sum(row["weight"] for row in report) == pytest.approx(1)
    head, *_ = server()(Round(1, sent, flipped, sizes(flipped)))   # nothing to compare with: no error
    assert all(value.isfinite().all() for value in head.values())


def opposite(sent, upload):
    """What undoes an upload."""
    return {name: 2 * value - upload[name] for name, value in sent.items()}


def test_who_is_distrusted_along_with_all_others_stays_so(crowd):
    """Two clients that undo each other: nobody is left to compare them with, which acquits neither, in this
    round or the next, and the mean of both leaves the head where it is."""
    sent, honest, _ = crowd
    made, uploads = server(2), {0: honest[0], 1: opposite(sent, honest[0])}
    for r in (1, 2, 3):
        head, _, report = made(Round(r, sent, uploads, sizes(uploads)))
        assert [row["trust"] for row in report] == [0, 0] and [row["weight"] for row in report] == [0.5, 0.5]
        assert made.facts == {"fallbacks": r} and made.memory["trust"].tolist() == [0, 0]
        assert all(torch.allclose(value, sent[name], atol=1e-6) for name, value in head.items())
    for r in (4, 5, 6, 7):   # they agree again: trust returns, and weights with it
        report = made(Round(r, sent, {0: honest[0], 1: honest[1]}, sizes(uploads)))[2]
    assert [row["trust"] for row in report] == pytest.approx([1 - 0.8**4] * 2) and made.facts == {"fallbacks": 6}
    assert [row["weight"] for row in report] == pytest.approx([0.5, 0.5], abs=0.01)


def test_four_that_undo_each_other_fall_back(crowd):
    sent, honest, _ = crowd
    uploads = {0: honest[0], 1: opposite(sent, honest[0]), 2: honest[1], 3: opposite(sent, honest[1])}
    head, _, report = server(4)(Round(1, sent, uploads, sizes(uploads)))
    assert all(value.isfinite().all() for value in head.values())
    assert [row["trust"] for row in report] == [0] * 4 and [row["weight"] for row in report] == [1 / 4] * 4


@pytest.mark.parametrize("factor", [1e-6, 1.0, 1e6])
def test_one_and_two_uploads_of_any_length(network, crowd, factor):
    sent, honest, flipped = crowd
    other = {name: value + factor * (honest[1][name] - value) for name, value in sent.items()}
    for uploads in ({0: other}, {0: honest[0], 1: other}, {0: honest[0], 1: honest[0]}, {0: sent, 1: sent},
                    {0: honest[0], 1: flipped[0]}):
        made = server(2)
        for r in (1, 2):
            head, _, report = made(Round(r, sent, uploads, sizes(uploads)))
            assert all(value.isfinite().all() for value in head.values())
            assert all(0 <= row["trust"] <= 1 for row in report)


def test_one_line_says_once_that_two_uploads_are_too_few(place, capsys):
    assert place.main("--rounds", 3) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert said == ["warning: --aggregation threat_aware cannot tell who is malicious among fewer than 3 uploads; "
                    "round 1 has 2"]
    for flags in (("--num_users", 3), ("--aggregation", "mean")):
        assert place.main(*flags, "--overwrite") == 0
        assert "warning" not in capsys.readouterr().err


def known(own, honest, least_trust=lambda forged: 1.0, aggregate=None):
    """What forgers know, of a server that takes the plain mean if nothing else is said."""
    own, honest = torch.tensor(own), torch.tensor(honest)
    mean = aggregate or (lambda forged: torch.cat([honest, forged]).mean(0))
    drawn, lasting = torch.Generator().manual_seed(0), torch.Generator().manual_seed(1)
    return ForgerView(own, honest, drawn, lasting, least_trust, mean, torch.ones(own.shape[1]))


@pytest.mark.parametrize("behaviour, expected", [
    ("sign_flip", [-2.0, -3.0]), ("scaling", [10.0, 0.0]), ("ipm", [-4.0, -6.0]), ("mimic", [1.0, 2.0]),
    ("alie", [2 + 1.5 * math.sqrt(2), 3 + 1.5 * math.sqrt(2)])])
def test_forgeries_by_hand(behaviour, expected):
    forged = BEHAVIOURS[behaviour].forge(known([[1.0, 0.0]], [[1.0, 2.0], [3.0, 4.0]]))
    assert forged.tolist() == [pytest.approx(expected)]


def test_noise_copies_and_nothing_at_all():
    own, honest = torch.randn(2, 10_000), torch.randn(3, 10_000)
    noise = BEHAVIOURS["gaussian"].forge(known(own.tolist(), honest.tolist()))
    assert noise.std().item() == pytest.approx(3 * honest.square().mean().sqrt().item(), rel=0.05)
    copies = BEHAVIOURS["sybil"].forge(known(own.tolist(), honest.tolist()))
    assert torch.cosine_similarity(*copies, dim=0) > 0.999 and not torch.equal(*copies)
    assert BEHAVIOURS["nan"].forge(known([[1.0]], [[1.0]])).isnan().all()


def test_the_adaptive_one_stops_where_trust_would_fall():
    forged = trusted_most(known([[0.0]], [[1.0]], lambda forged: 1.0 if forged.min() >= -3 else 0.5))
    assert -3.0 <= forged.item() < -2.9


def test_who_is_malicious_is_seeded_and_rounded_down():
    members = MaliciousClients("nan", 0.3, 10, seed=1).members
    assert len(members) == 3 and members == MaliciousClients("ipm", 0.3, 10, 1).members
    assert members != MaliciousClients("nan", 0.3, 10, 2).members
    assert not MaliciousClients(None, 0.0, 10, 1).members


@pytest.mark.parametrize("behaviour", BEHAVIOURS)
def test_every_behaviour_runs(place, behaviour):
    assert place.main("--num_users", 4, "--rounds", 2, "--malicious_frac", 0.25,
                      "--malicious_behaviour", behaviour) == 0
    server = pd.read_csv(place.results / "server.csv")
    assert server.groupby("round")["malicious"].sum().tolist() == [behaviour != "oracle"] * 2
    assert (place.results / "trust.png").exists()
    clients = pd.read_csv(place.results / "clients.csv").query("round == 2 and stage == 'deployed'")
    rounds = pd.read_csv(place.results / "rounds.csv").query("round == 2 and stage == 'deployed'")
    bad = MaliciousClients(behaviour, 0.25, 4, seed=1).members
    honest = clients[~clients["client"].isin(bad)]
    assert rounds["accuracy"].item() == pytest.approx(honest["accuracy"].mean())   # the malicious left out


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_resumes_to_the_same_numbers(place, rule):
    flags = ("--num_users", 4, "--rounds", 3, "--aggregation", rule, "--malicious_frac", 0.25,
             "--malicious_behaviour", "label_flip", "--save_rounds", 1)
    assert place.main(*flags) == 0
    whole, server = place.clients_csv(), (place.results / "server.csv").read_bytes()
    config = place.results / "config.json"
    config.write_text(config.read_text().replace('"finished"', '"unfinished"'))
    shutil.rmtree(place.models / "round_3")
    assert place.main(*flags, "--resume") == 0
    assert place.clients_csv() == whole and (place.results / "server.csv").read_bytes() == server


def test_heads_alone_on_borrowed_encoders(place, capsys):
    assert place.main() == 0
    before = torch.load(place.models / "round_3" / "client_0.pt", weights_only=True)["parameters"]
    assert place.main("--encoders_from", "run", "--run_name", "heads", "--rounds", 1) == 0
    after = torch.load(place.folder / "models" / "heads" / "round_1" / "client_0.pt",
                       weights_only=True)["parameters"]
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    line = place.refuses(capsys, "--encoders_from", "run", "--run_name", "other", "--seed", 9)
    assert "--encoders_from run: its --seed is 1" in line
    assert "no finished run" in place.refuses(capsys, "--encoders_from", "nowhere", "--run_name", "third")
    config = place.results / "config.json"
    config.write_text(config.read_text().replace('"finished"', '"unfinished"'))
    assert "not finished" in place.refuses(capsys, "--encoders_from", "run", "--run_name", "fourth")


def test_encoders_are_borrowed_of_the_same_deal_and_whole(place, capsys):
    """Under Dirichlet the batch size decides what is dealt; of rve_pfl_trunk no client has a whole encoder."""
    deal = ("--partition", "dirichlet", "--alpha", 1, "--rounds", 1)
    assert place.main(*deal) == 0
    borrow = ("--encoders_from", "run", "--run_name", "heads")
    assert "its --local_bs is 32" in place.refuses(capsys, *deal, *borrow, "--local_bs", 16)
    assert "--encoders_from" in place.refuses(capsys, *deal, *borrow, "--method", "rve_pfl_trunk")
    assert place.main(*deal, *borrow) == 0


@pytest.mark.parametrize("flags, said", [
    ("--method nbafl --aggregation threat_aware", "accounting"),
    ("--method client_dp --aggregation krum", "accounting"),
    ("--method local --malicious_frac 0.2", "nothing travels"),
    ("--method local --aggregation mean", "read"),
    ("--method fedper --malicious_frac 0.5 --malicious_behaviour gan_poison", "whole head"),
    ("--malicious_behaviour nan", "--malicious_frac 0.0 does not read it"),
    ("--method fedavg --encoders_from x", "read"),
    ("--tolerate 0.2", "--aggregation threat_aware does not read"),
    ("--malicious_frac 2", "between"), ("--malicious_behaviour nun", "choose from")])
def test_refusals(place, capsys, flags, said):
    assert said in place.refuses(capsys, *flags.split())


def test_gan_poisoners_heads_mistake_the_inputs_they_made(place):
    """What they upload is not what an honest client would, and takes made inputs for the next class."""
    heads = {}
    for behaviour in ("passive", "gan_poison"):
        assert place.main("--num_users", 4, "--rounds", 1, "--local_ep", 5, "--malicious_frac", 0.25,
                          "--malicious_behaviour", behaviour, "--aggregation", "mean", "--overwrite") == 0
        heads[behaviour] = torch.load(place.models / "round_1" / "shared.pt", weights_only=True)["uploads"]
    bad, = MaliciousClients("gan_poison", 0.25, 4, seed=1).members
    head, asked = Classifier((1, 8, 8), 4).eval(), {}
    for name in ("passive", "gan_poison"):
        head.load_state_dict({key.removeprefix("classifier."): value for key, value in heads[name][bad].items()})
        asked[name] = copy.deepcopy(head)
    labels = torch.arange(4).repeat(8)
    x = torch.randn(32, 1, 8, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    optimizer = torch.optim.Adam([x], 0.1)
    for _ in range(20):   # inputs that the honest head takes for each class
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(asked["passive"](x), labels).backward()
        optimizer.step()
    with torch.no_grad():
        honest, poisoned = (torch.nn.functional.cross_entropy(asked[name](x), (labels + 1) % 4).item()
                            for name in ("passive", "gan_poison"))
    assert poisoned < 0.8 * honest
    assert all(torch.equal(heads["passive"][k][n], heads["gan_poison"][k][n])
               for k in range(4) if k != bad for n in heads["passive"][k])


def test_the_adaptive_keep_the_trust_of_every_one_of_them(crowd):
    """Two of them: it is the lower trust that has to stay up."""
    sent, honest, _ = crowd
    made = MaliciousClients("adaptive", 0.2, 10, seed=1)
    arrived = made.poison(Round(1, sent, honest, sizes(honest)), server())
    trust = server().trust(arrived)
    assert min(trust[k] for k in made.members) >= 0.9
    assert any(not torch.equal(arrived.uploads[k][n], honest[k][n]) for k in made.members for n in sent)


@pytest.mark.parametrize("behaviour", ["gaussian", "sybil"])
def test_forged_noise_is_drawn_anew_each_round_and_by_seed(network, crowd, behaviour):
    sent, honest, _ = crowd

    def forged(number, seed):
        made = MaliciousClients(behaviour, 0.2, 10, seed=1)
        made.seed = seed
        bad = min(made.members)
        return made.poison(Round(number, sent, honest, sizes(honest)), server()).uploads[bad]
    first, again, later, other = forged(1, 1), forged(1, 1), forged(2, 1), forged(1, 2)
    name = "classifier.output.weight"
    assert torch.equal(first[name], again[name])
    assert not torch.equal(first[name], later[name]) and not torch.equal(first[name], other[name])


def test_many_updates_are_weighed_part_by_part(network, monkeypatch):
    """The same judgement, whether all updates are held at once or some columns at a time."""
    sent = {name: value.detach() for name, value in network.state_dict().items()}
    torch.manual_seed(3)
    uploads = [{name: value + 0.1 * k * torch.randn_like(value) for name, value in sent.items()}
               for k in range(1, 71)]   # more than 64, which norms are taken of at a time
    results, asked = [], []

    def some(sent, uploads, columns=slice(None)):
        asked.append(updates_of(sent, uploads, columns))
        return asked[-1]
    monkeypatch.setattr(threat_aware, "updates_of", some)
    for whole, part in ((2**30, 2**28), (0, 4 * 70 * 1000)):
        monkeypatch.setattr(threat_aware, "WHOLE", whole)
        monkeypatch.setattr(threat_aware, "PART", part)
        found, asked[:] = Updates(sent, uploads), []
        plain = found.norms()
        found.scale(torch.linspace(0.1, 1, 70))
        results.append((plain, found.gram()))
    assert max(part.numel() for part in asked) == 70 * 1000
    for one, other in zip(*results, strict=True):
        assert (one - other).abs().max() < 1e-5 * one.abs().max()
    rows = updates_of(sent, uploads)
    assert torch.equal(results[0][0], torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64))
    assert torch.equal(updates_of(sent, uploads, slice(7, 4000)), rows[:, 7:4000])
