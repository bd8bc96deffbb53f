"""Membership inference: its measures, its controls in both directions, and its command line."""
from argparse import Namespace

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import roc_auc_score, roc_curve
from test_mi_attack import guard, opened, watching  # noqa: F401 - guard is a fixture

from attack import access, members, membership, roc

KEY = ["adversary", "attack", "round", "client"]


class Trained:
    """A folder with trained runs in it, and the attack on them."""

    def __init__(self, place):
        self.place = place

    def train(self, name, *flags):
        assert self.place.main("--run_name", name, "--num_users", 3, *flags) == 0

    def folders(self):
        return tuple(self.place.folder / name for name in ("results", "models", "data"))

    def target(self, run):
        return access.open_target(run, *self.folders())

    def attack(self, run, *flags):
        results, models, data = self.folders()
        return membership.main(["--run", run, "--references", "2", "--draws", "2", "--public", "public",
                                "--results_dir", str(results), "--models_dir", str(models),
                                "--data_dir", str(data), *map(str, flags)])

    def csv(self, run):
        return pd.read_csv(self.place.folder / "results" / run / "membership.csv")

    def refuses(self, capsys, run, *flags):
        capsys.readouterr()
        try:
            status = self.attack(run, *flags)
        except SystemExit as stop:
            status = stop.code
        lines = capsys.readouterr().err.strip().splitlines()
        assert status == 2 and len(lines) == 1 and lines[0].startswith("membership.py: error: "), lines
        return lines[0]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, make_place, tiny_arrays):
    """Runs on ``tiny``, and one of noise whose labels say nothing, so that they can only be learnt by heart."""
    place = make_place(tmp_path_factory.mktemp("members"))
    data = place.folder / "data"
    arrays = {name: values if "labels" in name else 255 - values for name, values in tiny_arrays.items()}
    np.savez(data / "public.npz", **arrays)
    rng = np.random.default_rng(1)
    for name, size in (("noise", 600), ("other", 400)):
        images = rng.integers(0, 256, (size, 8, 8, 1)).astype(np.uint8)
        labels = rng.integers(0, 4, size).astype(np.uint8)
        np.savez(data / f"{name}.npz", train_images=images[50:], train_labels=labels[50:],
                 test_images=images[:50], test_labels=labels[:50])
    found = Trained(place)
    for method in ("rve_pfl", "fedavg", "lg_fedavg", "local", "fedper"):
        found.train(method, "--method", method, "--rounds", 2, "--save_rounds", 1)
    noise = ("--method", "fedavg", "--dataset", "noise", "--partition", "iid", "--rounds", 2, "--save_rounds", 1)
    found.train("untrained", *noise, "--lr", 1e-12)
    found.train("by_heart", *noise, "--local_ep", 60)
    return found


# Measures

def test_auc_and_tpr_against_scikit_learn():
    rng = np.random.default_rng(0)
    for size in (40, 300):
        member = np.arange(size + 25) < size
        scores = np.round(rng.normal(member * 0.7, 1), 1)   # with ties
        weights = rng.random(size)
        every = np.concatenate([weights, np.ones(25)])
        inside, outside = scores[member], scores[~member]
        assert roc.auc(inside, outside, weights) == pytest.approx(
            roc_auc_score(member, scores, sample_weight=every))
        false, true, _ = roc_curve(member, scores, sample_weight=every, drop_intermediate=False)
        for rate in (0.001, 0.01, 0.04, 0.1, 0.5):
            assert roc.tpr(inside, outside, weights, rate) == pytest.approx(true[false <= rate + 1e-9].max())


def test_measures_by_hand():
    inside, outside = np.array([3.0, 1.0, 2.0]), np.array([2.0, 0.0])
    ones = np.ones(3)
    assert roc.auc(inside, outside, ones) == pytest.approx((2 + 1 + 1.5) / 6)
    assert roc.tpr(inside, outside, ones, 0.01) == pytest.approx(1 / 3)   # over 2: only the 3
    assert roc.tpr(inside, outside, ones, 0.5) == 1                       # over 0: all
    assert roc.tpr(inside, outside, np.array([2.0, 1, 1]), 0.01) == pytest.approx(0.5)


def test_a_score_that_knows_the_class_alone_tells_nothing():
    """Three of four members are of class 0, and one of four non-members."""
    classes, member = np.repeat([0, 1, 0, 1], [90, 30, 10, 30]), np.repeat([True, False], [120, 40])
    weights = roc.class_weights(classes[member], classes[~member])
    assert weights.mean() == pytest.approx(1)
    assert weights[:90].sum() / weights.sum() == pytest.approx(10 / 40)
    found = roc.measure(-1.0 * classes, classes, member)
    assert found["auc"] == found["auc_low"] == found["auc_high"] == 0.5
    assert roc_auc_score(member, -classes) > 0.7   # without weights


def test_intervals_are_seeded_and_hold_what_they_are_of():
    rng = np.random.default_rng(0)
    member, classes = np.arange(200) < 120, rng.integers(0, 3, 200)
    scores = rng.normal(member * 1.0, 1)
    found = roc.measure(scores, classes, member)
    assert found == roc.measure(scores, classes, member)
    assert 0.6 < found["auc_low"] < found["auc"] < found["auc_high"] < 0.9
    assert found["tpr_at_fpr_0.01_low"] <= found["tpr_at_fpr_0.01"] <= found["tpr_at_fpr_0.01_high"]


def test_the_score_is_in_the_order_of_the_loss_and_exact_where_a_probability_rounds_to_one():
    logits = torch.tensor([[30.0, 0, 0], [40.0, 0, 0], [1.0, 2, 0], [0.0, 0, 0]])
    labels = torch.tensor([0, 0, 1, 2])
    found = members.confidence(lambda x: x.log_softmax(1), logits, labels)
    p = logits.double().softmax(1)[torch.arange(4), labels]
    assert torch.allclose(found.sigmoid(), p) and found[1] > found[0] + 9


def test_a_label_that_the_service_does_not_tell_has_the_rest():
    told = torch.tensor([[0.7, 0.2, 0.0, 0.0], [0.0, 0.2, 0.7, 0.0]]).double()
    found = members.confidence(lambda x: x.log(), told, torch.tensor([1, 0]))
    assert torch.allclose(found.exp(), torch.tensor([0.2 / 0.7, 0.1 / 0.9]).double())


# Who is asked about

def test_non_members_are_of_the_clients_classes_and_its_own(trained, tiny_arrays):
    """Held-out images of another class are left out, and so are members of a class without held-out images."""
    target = trained.target("rve_pfl")
    partition = target.results / "partition.npz"
    whole, labels = dict(np.load(partition)), target.data.labels
    own, held = np.unique(labels[whole["train_0"]]), whole["test_0"]
    strange = np.flatnonzero(~np.isin(labels, own))[:7]
    try:
        np.savez(partition, **{**whole, "test_0": np.concatenate([held[labels[held] == own[0]], strange])})
        found = members.asked(target, 0)
        assert set(found.labels.tolist()) == {own[0]}
        assert found.member.sum() == (labels[whole["train_0"]] == own[0]).sum()
        assert (~found.member).sum() == (labels[held] == own[0]).sum()
        np.savez(partition, **{**whole, "test_0": strange})
        assert members.asked(target, 0) is None
        assert membership.unfit(target, membership.Unit("stolen_model", "loss", 2, 0), [2])
    finally:
        np.savez(partition, **whole)
    found = members.asked(target, 1)
    numbers = np.concatenate([whole["train_1"], whole["test_1"]])
    assert torch.equal(found.labels, torch.from_numpy(labels[numbers]))
    last = target.data.images[numbers[-1], :, :, 0]
    assert torch.equal(found.images[-1, 0], torch.from_numpy(last / 255).float())
    assert found.member.tolist() == [True] * len(whole["train_1"]) + [False] * len(whole["test_1"])


# Controls

def test_nothing_trained_on_is_a_guess(trained):
    assert trained.attack("untrained", "--public", "other", "--clients", 0, 1) == 0
    table = trained.csv("untrained")
    assert len(table) == 10
    assert ((table["auc_low"] <= 0.5) & (table["auc_high"] >= 0.5)).all(), table[[*KEY, "auc_low", "auc_high"]]


def test_what_was_learnt_by_heart_leaks(trained, capsys):
    assert trained.attack("by_heart", "--public", "other") == 0
    table = trained.csv("by_heart").set_index(["adversary", "attack"])
    assert set(table.index) == {(who, how) for who in ("stolen_model", "prediction_api")
                                for how in ("loss", "rmia")} | {("curious_server", "fedmia")}
    assert (table["auc"] >= 0.7).all(), table["auc"]
    assert capsys.readouterr().out.count(": leaks. AUC ") == 5


def test_fedmia_standardises_by_the_other_clients(trained, monkeypatch):
    """With losses given by hand, a client's number its loss but for the victim's own."""
    target, args = trained.target("fedavg"), Namespace(draws=1, seed=1)
    asked = members.asked(target, 0)
    uploads = {(r, k): upload for r in (1, 2) for k, upload in target.shared(r)["uploads"].items()}
    losses = {(1, 0): 1.0, (1, 1): 2.0, (1, 2): 4.0, (2, 0): 3.0, (2, 1): 3.0, (2, 2): 5.0}

    def confidence(answer, images, labels):
        head = answer.args[0].state_dict(prefix="classifier.")
        whose, = (key for key, one in uploads.items() if all(torch.equal(head[name], one[name]) for name in head))
        p = np.exp(-losses[whose])
        return torch.full((len(images),), float(np.log(p / (1 - p)))).double()
    monkeypatch.setattr(members, "confidence", confidence)
    adversary = members.Adversary(target, args, [1, 2], 2, 0)
    reads, read = [], access.read_shared
    monkeypatch.setattr(access, "read_shared", lambda path, *rest: reads.append(path) or read(path, *rest))
    found = members.fedmia("curious_server", adversary, asked.images, asked.labels)
    assert len(reads) == 2   # a round's file holds all heads: once each
    by_hand = ((3 - 1) / np.sqrt(2) + (4 - 3) / np.sqrt(2)) / 2
    assert found.numpy() == pytest.approx(by_hand, rel=1e-6)


def test_rmia_by_hand(trained, monkeypatch):
    """Probabilities given by hand: of the victim, and of two references, for x and for each public z."""
    target = trained.target("fedavg")
    args = Namespace(scaling=0.5, gamma=1.0, draws=1)
    adversary = members.Adversary(target, args, [2], 2, 0)
    z, x = torch.arange(8.0).reshape(8, 1, 1, 1), torch.tensor([100.0, 101.0, 102.0]).reshape(3, 1, 1, 1)
    victim = {0: 0.2, 1: 0.9, 100: 0.6, 101: 0.9, 102: 0.69}
    reference = {0: 0.4, 1: 0.8, 100: 0.2, 101: 0.9, 102: 0.5}
    monkeypatch.setattr(adversary, "public_of", lambda labels: (z, torch.zeros(8, dtype=torch.long)))
    monkeypatch.setattr(adversary, "references", lambda images, labels, count: ["low", "high"])
    monkeypatch.setitem(members.MODELS, "stolen_model", lambda adversary: "victim")

    def confidence(answer, images, labels):
        name = answer if isinstance(answer, str) else answer.args[0]
        shift = {"victim": 0, "low": -0.1, "high": 0.1}[name]   # the mean is the table's
        p = [(victim if name == "victim" else reference)[int(one)] + shift for one in images.flatten()]
        return torch.tensor(p).double().logit()
    monkeypatch.setattr(members, "confidence", confidence)

    def usual(p):
        return (1.5 * p + 0.5) / 2
    ratio = {one: victim[one] / usual(reference[one]) for one in victim}
    expected = [np.mean([ratio[one] >= args.gamma * ratio[other] for other in (0, 1)]) for one in (100, 101, 102)]
    assert expected == [1.0, 0.5, 1.0]   # 101 is easy for everybody; with a = 0, 102 would be, too
    labels = torch.zeros(3, dtype=torch.long)
    assert members.rmia("stolen_model", adversary, x, labels).tolist() == expected
    args.gamma = 2.0
    expected = [np.mean([ratio[one] >= 2 * ratio[other] for other in (0, 1)]) for one in (100, 101, 102)]
    assert members.rmia("stolen_model", adversary, x, labels).tolist() == expected != [1.0, 0.5, 1.0]


def test_no_reference_has_seen_the_images_it_is_compared_on(trained, monkeypatch):
    target = trained.target("fedavg")
    args = membership.make_parser().parse(["--run", "fedavg", "--public", "public", "--references", "2",
                                           "--data_dir", str(trained.folders()[2])])
    adversary, seen = members.Adversary(target, args, [2], 2, 0), {}
    monkeypatch.setattr(adversary, "references", lambda images, labels, count: seen.update(
        trained=images, count=count) or [adversary.start().eval()])
    asked, scored = members.asked(target, 0), []
    confidence = members.confidence
    monkeypatch.setattr(members, "confidence", lambda answer, x, y: scored.append(x) or confidence(answer, x, y))
    members.rmia("stolen_model", adversary, asked.images, asked.labels)
    population = scored[0]
    distances = torch.cdist(population.flatten(1), seen["trained"].flatten(1))
    assert len(population) >= 30 and distances.min() > 0 and seen["count"] == len(asked.images)


# What an adversary reads

@pytest.mark.parametrize("how, who, allowed", [
    ("loss", "stolen_model", {"shared.pt", "client_0.pt"}),
    ("rmia", "stolen_model", {"shared.pt", "client_0.pt"}),
    ("fedmia", "curious_server", {"shared.pt", "server.pt"})])
def test_an_adversary_opens_its_own_files_only(trained, how, who, allowed):
    """And of the run's other files none: what is asked about is handed to it."""
    target = trained.target("rve_pfl")
    args = membership.make_parser().parse(["--run", "rve_pfl", "--public", "public", "--references", "1",
                                           "--data_dir", str(trained.folders()[2])])
    adversary, asked = members.Adversary(target, args, [1, 2], 2, 0), members.asked(target, 0)
    assert len(adversary.public[1])
    opened.clear()
    watching.set()
    try:
        members.ATTACKS[how].score(who, adversary, asked.images, asked.labels)
    finally:
        watching.clear()
    ours = [name for name in opened if name.startswith(str(trained.place.folder))]
    assert {name.rsplit("/", 1)[-1] for name in ours} == allowed and all("/models/" in name for name in ours)


# The command line

def fits(method):
    """What fits, by hand."""
    models = {(who, how) for who in ("stolen_model", "prediction_api") for how in ("loss", "rmia")}
    return models if method in ("local", "fedper") else models | {("curious_server", "fedmia")}


@pytest.mark.parametrize("method", ["rve_pfl", "fedavg", "lg_fedavg", "local", "fedper"])
def test_every_attack_that_fits_leaves_a_row(trained, method, capsys):
    assert trained.attack(method, "--clients", 0, 1) == 0
    table, said = trained.csv(method), capsys.readouterr().out
    assert list(table.columns) == membership.COLUMNS
    assert set(zip(table["adversary"], table["attack"], strict=True)) == fits(method)
    assert len(table) == 2 * len(fits(method)) == said.count(" client ") and set(table["round"]) == {2}
    assert np.isfinite(table[membership.NUMBERS]).all(axis=None)
    assert ((table["auc_low"] <= table["auc"]) & (table["auc"] <= table["auc_high"])).all()
    rows = table.set_index(KEY)
    for line in filter(lambda line: " client " in line, said.splitlines()):
        who, how, _, r, _, client = line.split(":")[0].split()
        leaks = rows.loc[(who, how, int(r), int(client)), "auc_low"] > 0.5
        assert (": leaks. AUC " in line, ": as a guess. AUC " in line) == (leaks, not leaks)


def test_a_second_call_replaces_its_rows_and_keeps_others(trained):
    path = trained.place.folder / "results" / "fedavg" / "membership.csv"
    path.unlink(missing_ok=True)
    flags = ("--adversary", "stolen_model", "--attack", "loss")
    left = path.with_name(f".membership.csv.{10**30}.tmp")   # by a process that was killed
    left.touch()
    assert trained.attack("fedavg", *flags, "--rounds", 1, 2) == 0 and not left.exists()
    first = trained.csv("fedavg")
    assert first[KEY].to_numpy().tolist() == [["stolen_model", "loss", r, 0] for r in (1, 2)]
    path.write_text(path.read_text().replace("stolen_model,loss,2,0,", "stolen_model,loss,2,0,9"))
    assert trained.attack("fedavg", *flags) == 0
    pd.testing.assert_frame_equal(trained.csv("fedavg"), first)
    assert trained.attack("fedavg", "--adversary", "curious_server", "--rounds", 1, 1, "--clients", 0, 0) == 0
    assert trained.csv("fedavg")[KEY].to_numpy().tolist()[0] == ["curious_server", "fedmia", 1, 0]
    assert len(trained.csv("fedavg")) == 3
    assert not list(path.parent.glob(".membership*"))


def test_the_same_seed_gives_the_same_rows(trained):
    flags = ("--adversary", "stolen_model", "curious_server", "--train_epochs", 1)
    assert trained.attack("rve_pfl", *flags) == 0
    first = trained.csv("rve_pfl")
    assert trained.attack("rve_pfl", *flags) == 0
    pd.testing.assert_frame_equal(trained.csv("rve_pfl"), first)


@pytest.mark.parametrize("flags, named", [
    (["--clients", 3], "0 to 2"), (["--rounds", 7], "--save_rounds 7"), (["--attack", "lossy"], "--attack"),
    (["--references", 0], "--references"), (["--public", "nothing"], "nothing.npz"),
    (["--scaling", 2], "--scaling"),
    (["--refrences", 4], "--references"), (["--public", "unowned"], "--public"), (["--seed", -1], "--seed"),
    (["--adversary", "curious_client"], "--adversary"), (["--gamma", 0.5], "--gamma")])
def test_bad_input(trained, capsys, flags, named):
    assert named in trained.refuses(capsys, "rve_pfl", *flags)


def test_what_does_not_fit_says_why(trained, capsys):
    server = ("--adversary", "curious_server")
    assert "no attack asked for fits" in trained.refuses(capsys, "local", *server)
    assert "nothing travels" in trained.refuses(capsys, "local", *server)
    assert "head stays" in trained.refuses(capsys, "fedper", *server)
    assert "needs what" in trained.refuses(capsys, "fedavg", *server, "--attack", "loss")
    trained.train("pair", "--method", "fedavg", "--num_users", 2, "--rounds", 1)
    assert "two others" in trained.refuses(capsys, "pair", *server)
    assert not (trained.place.folder / "results" / "pair" / "membership.csv").exists()


def test_damaged_files_are_one_line_and_change_nothing(trained, capsys):
    path = trained.place.folder / "results" / "lg_fedavg" / "membership.csv"
    path.write_text("adversary\nx\n")
    assert "damaged" in trained.refuses(capsys, "lg_fedavg", "--attack", "loss")
    path.unlink()
    client = trained.place.folder / "models" / "lg_fedavg" / "round_2" / "client_0.pt"
    whole = client.read_bytes()
    try:
        client.write_bytes(whole[:100])
        assert "client_0.pt" in trained.refuses(capsys, "lg_fedavg", "--attack", "loss")
    finally:
        client.write_bytes(whole)
    assert not path.exists()
    assert "there: " in trained.refuses(capsys, "none")


def test_no_public_images_are_needed_where_nothing_is_trained(trained):
    assert trained.attack("fedavg", "--attack", "loss", "fedmia", "--public", "unowned") == 0


def test_scores_that_are_not_numbers_are_no_guess(trained, capsys, monkeypatch):
    monkeypatch.setattr(members, "confidence", lambda answer, x, y: torch.full((len(x),), torch.nan).double())
    assert "not numbers" in trained.refuses(capsys, "lg_fedavg", "--adversary", "curious_server", "--rounds", 1)
    path = trained.place.folder / "results" / "lg_fedavg" / "membership.csv"
    assert not path.exists() or 1 not in set(trained.csv("lg_fedavg")["round"])
