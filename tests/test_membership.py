"""Membership inference: its measures, its controls in both directions, and its command line."""
from argparse import Namespace
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from attacked import Attacked
from sklearn.metrics import roc_auc_score, roc_curve
from torch import nn
from torch.distributions import Normal, kl_divergence

from attack import adversaries, members, membership
from attack import target as targets
from attack.target import as_floats
from models import VariationalEncoder
from utils import InputError

KEY = ["adversary", "attack", "round", "client"]
THREE = ("--num_users", 3)


RUNS = {method: (*THREE, "--method", method, "--rounds", 2, "--save_rounds", 1)
        for method in ("rve_pfl", "fedavg", "lg_fedavg", "local", "fedper")}
RUNS["by_heart"] = (*THREE, "--method", "fedavg", "--dataset", "noise", "--partition", "iid", "--rounds", 2,
                    "--save_rounds", 1, "--local_ep", 60)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, make_place, tiny_arrays):
    """Data for runs: ``tiny``, and noise whose labels say nothing, so that it can only be learnt by heart."""
    place = make_place(tmp_path_factory.mktemp("members"))
    data = place.folder / "data"
    rng = np.random.default_rng(1)
    for name, size in (("noise", 600), ("other", 400)):
        images = rng.integers(0, 256, (size, 8, 8, 1)).astype(np.uint8)
        labels = rng.integers(0, 4, size).astype(np.uint8)
        np.savez(data / f"{name}.npz", train_images=images[50:], train_labels=labels[50:],
                 test_images=images[:50], test_labels=labels[:50])
    return Attacked(place, tiny_arrays, membership, ("--references", 2, "--draws", 2), RUNS)


def csv(trained, run):
    return pd.read_csv(trained.results(run) / "membership.csv")


def options(trained, run, *flags):
    """The command's options, as ``main`` would have them."""
    return membership.make_parser().parse(["--run", run, "--public", "public", "--data_dir",
                                           str(trained.place.folder / "data"), *map(str, flags)])


# Measures

def test_auc_and_tpr_against_scikit_learn():
    rng = np.random.default_rng(0)
    for size in (40, 300):
        member = np.arange(size + 25) < size
        scores = np.round(rng.normal(member * 0.7, 1), 1)   # with ties
        weights = rng.random(size)
        every = np.concatenate([weights, np.ones(25)])
        inside, outside = scores[member], scores[~member]
        assert members.auc(inside, outside, weights) == pytest.approx(
            roc_auc_score(member, scores, sample_weight=every))
        false, true, _ = roc_curve(member, scores, sample_weight=every, drop_intermediate=False)
        for rate in (0.001, 0.01, 0.04, 0.1, 0.5):
            assert members.tpr(inside, outside, weights, rate) == pytest.approx(true[false <= rate + 1e-9].max())


def test_a_score_that_knows_the_class_alone_tells_nothing():
    """Three of four members are of class 0, and one of four non-members."""
    classes, member = np.repeat([0, 1, 0, 1], [90, 30, 10, 30]), np.repeat([True, False], [120, 40])
    weights = members.class_weights(classes[member], classes[~member])
    assert weights.mean() == pytest.approx(1)
    assert weights[:90].sum() / weights.sum() == pytest.approx(10 / 40)
    found = members.measure(-1.0 * classes, classes, member)
    assert found["auc"] == found["auc_low"] == found["auc_high"] == 0.5
    assert roc_auc_score(member, -classes) > 0.7   # without weights


def test_scores_that_are_all_alike_do_not_leak(monkeypatch):
    """The weights of the members round: their average of 0.5 may come out as 0.5000000000000001."""
    monkeypatch.setattr(members, "DRAWS", 2)
    rng = np.random.default_rng(0)
    for size in range(50, 80):
        member = np.arange(size) < 40
        found = members.measure(np.zeros(size), np.append(rng.integers(0, 3, size - 3), range(3)), member)
        assert found["auc"] == found["auc_low"] == found["auc_high"] == 0.5


def test_intervals_are_seeded_and_hold_what_they_are_of():
    rng = np.random.default_rng(0)
    member, classes = np.arange(200) < 120, rng.integers(0, 3, 200)
    scores = rng.normal(member * 1.0, 1)
    found = members.measure(scores, classes, member)
    assert found == members.measure(scores, classes, member)
    assert 0.6 < found["auc_low"] < found["auc"] < found["auc_high"] < 0.9
    assert found["tpr_at_fpr_0.01_low"] <= found["tpr_at_fpr_0.01"] <= found["tpr_at_fpr_0.01_high"]


@pytest.mark.parametrize("sizes", [(120, 12), (12, 120)])
def test_intervals_hold_a_guess_as_often_as_they_say(monkeypatch, sizes):
    """A percentile bootstrap of 12 images and 120 holds 0.5 in 90 % of draws of scores that say nothing.

    Fewer than 155 or more than 195 of 200 have a probability under 1e-4 together. If the half of 12 images is not
    resampled, the intervals hold it in 44 %.
    """
    monkeypatch.setattr(members, "DRAWS", 100)
    monkeypatch.setattr(members, "FALSE_POSITIVE_RATES", ())
    rng, member, held = np.random.default_rng(1), np.repeat([True, False], sizes), 0
    for _ in range(200):
        found = members.measure(rng.normal(size=132), np.arange(132) % 2, member)
        held += found["auc_low"] <= 0.5 <= found["auc_high"]
    assert 155 <= held <= 195, held


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
        assert members.obstacle(target, membership.Unit("stolen_model", "loss", 2, 0), [2])
    finally:
        np.savez(partition, **whole)
    found = members.asked(target, 1)
    numbers = np.concatenate([whole["train_1"], whole["test_1"]])
    assert torch.equal(found.labels, torch.from_numpy(labels[numbers]))
    last = target.data.images[numbers[-1], :, :, 0]
    assert torch.equal(found.images[-1, 0], torch.from_numpy(last / 255).float())
    assert found.member.tolist() == [True] * len(whole["train_1"]) + [False] * len(whole["test_1"])


def test_models_answer_as_the_options_say(trained, monkeypatch):
    target, args = trained.target("rve_pfl"), options(trained, "rve_pfl", "--draws", 3, "--scores", 2)
    drawn, logits = [], adversaries.Knowledge.logits
    monkeypatch.setattr(adversaries.Knowledge, "logits", lambda held, x, draws=0: drawn.append(draws) or logits(
        held, x, draws))
    adversary, images = members.MembershipAdversary(target, args, [2], 2, 0), members.asked(target, 0).images
    told = {who: members.answer_of(who, adversary)(images).isfinite().sum(1) for who in members.MODELS}
    assert drawn == [3, 3]
    assert (told["stolen_model"] == 4).all() and (told["prediction_api"] == 2).all()


def test_public_images_are_of_the_classes_asked_about_where_they_mean_the_same(trained, monkeypatch):
    """``public`` is another data set than ``tiny``. Where the images of the classes are too few, all are taken."""
    target, args = trained.target("fedavg"), options(trained, "fedavg", "--public_images", 230)
    same, pair = replace(target, options=target.options | {"dataset": "public"}), torch.tensor([1, 3])
    monkeypatch.setattr(adversaries, "MIN_PUBLIC", 100)
    images, labels = adversaries.public_images(target, args).of(pair)
    assert set(labels.tolist()) == {0, 1, 2, 3} and len(images) == 230
    images, labels = adversaries.public_images(same, args).of(pair)
    assert set(labels.tolist()) == {1, 3} and len(images) == 120
    monkeypatch.setattr(adversaries, "MIN_PUBLIC", 121)
    assert len(adversaries.public_images(same, args).of(pair)[1]) == 230


# Controls

def test_images_of_other_clients_dealt_at_random_are_a_guess(trained):
    """The victim learnt its own images by heart, but is asked of its neighbours' as if half were its own.

    Each score is then exchangeable, and its AUC has a standard deviation of at most ``sqrt((M + N + 1) / 12MN)``,
    as a rank sum has without ties. One of five is over 4.3 of these away with a probability under 1e-4.
    """
    target = trained.target("by_heart")
    partition = target.results / "partition.npz"
    whole = dict(np.load(partition))
    others = np.random.default_rng(1).permutation(np.concatenate([whole["train_1"], whole["train_2"]]))
    inside, outside = np.sort(others[:len(others) // 2]), np.sort(others[len(others) // 2:])
    try:
        np.savez(partition, **{**whole, "train_0": inside, "test_0": outside})
        assert trained.attack("by_heart", "--public", "other", "--references", 1, "--train_epochs", 10,
                              "--overwrite") == 0
    finally:
        np.savez(partition, **whole)
    table, sizes = csv(trained, "by_heart"), (len(inside), len(outside))
    assert len(table) == 5 and min(sizes) > 150
    deviation = np.sqrt((sum(sizes) + 1) / (12 * sizes[0] * sizes[1]))
    assert (abs(table["auc"] - 0.5) < 4.3 * deviation).all(), table[[*KEY, "auc"]]


def test_what_was_learnt_by_heart_leaks(trained, capsys):
    assert trained.attack("by_heart", "--public", "other", "--train_epochs", 60, "--overwrite") == 0
    table = csv(trained, "by_heart").set_index(["adversary", "attack"])
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
    adversary = members.MembershipAdversary(target, args, [1, 2], 2, 0)
    reads, read = [], targets.read_shared
    monkeypatch.setattr(targets, "read_shared", lambda path, *rest: reads.append(path) or read(path, *rest))
    found = members.fedmia("curious_server", adversary, asked.images, asked.labels)
    assert len(reads) == 2   # a round's file holds all heads: once each
    by_hand = ((3 - 1) / np.sqrt(2) + (4 - 3) / np.sqrt(2)) / 2
    assert found.numpy() == pytest.approx(by_hand, rel=1e-6)


def test_rmia_by_hand(trained, monkeypatch):
    """Probabilities given by hand: of the victim, and of two references, for x and for each public z."""
    target = trained.target("fedavg")
    args = Namespace(scaling=0.5, gamma=1.0, draws=1)
    adversary = members.MembershipAdversary(target, args, [2], 2, 0)
    z, x = torch.arange(8.0).reshape(8, 1, 1, 1), torch.tensor([100.0, 101.0, 102.0]).reshape(3, 1, 1, 1)
    victim = {0: 0.2, 1: 0.9, 100: 0.6, 101: 0.9, 102: 0.69}
    reference = {0: 0.4, 1: 0.8, 100: 0.2, 101: 0.9, 102: 0.5}
    adversary.public = adversaries.PublicImages(z, torch.arange(8) % 4)
    monkeypatch.setattr(adversary, "references", lambda images, labels, count: ["low", "high"])
    monkeypatch.setattr(members, "answer_of", lambda name, adversary: "victim")

    def confidence(answer, images, labels):
        assert torch.equal(labels, images.flatten().long() % 4)
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
    labels = torch.arange(3)
    assert members.rmia("stolen_model", adversary, x, labels).tolist() == expected
    args.gamma = 2.0
    expected = [np.mean([ratio[one] >= 2 * ratio[other] for other in (0, 1)]) for one in (100, 101, 102)]
    assert members.rmia("stolen_model", adversary, x, labels).tolist() == expected != [1.0, 0.5, 1.0]


class Shifted(nn.Module):
    """An encoder whose z is the image plus a number."""

    def __init__(self, by):
        super().__init__()
        self.by = by

    def forward(self, x):
        return x.flatten(1) + self.by


def test_fedmia_trains_a_shadow_encoder_behind_the_head_sent_in_each_round(trained, monkeypatch):
    """For as long as clients had trained, from their start, with their KL weight; its z go to the uploads."""
    target, made = trained.target("rve_pfl"), []
    target = replace(target, options=target.options | {"kl_weight": 0.3, "local_ep": 7})
    args = options(trained, "rve_pfl", "--draws", "1")

    def shadow_encoder(knowledge, start, images, labels, epochs, kl_weight):
        made.append((knowledge.head.state_dict(prefix="classifier."), start.state_dict(), epochs, kl_weight))
        return adversaries.Knowledge(knowledge.head, Shifted(len(made)), True, (1, 8, 8))
    monkeypatch.setattr(members, "shadow_encoder", shadow_encoder)
    asked, seen, confidence = members.asked(target, 0), [], members.confidence
    monkeypatch.setattr(members, "confidence", lambda answer, x, y: seen.append(x) or confidence(answer, x, y))
    adversary = members.MembershipAdversary(target, args, [1, 2], 2, 0)
    members.fedmia("curious_server", adversary, asked.images, asked.labels)
    seeded = target.start(0).state_dict()
    for r, (head, start, epochs, kl_weight) in enumerate(made, 1):
        assert all(torch.equal(head[name], value) for name, value in target.shared(r)["sent"].items())
        assert all(torch.equal(start[name], value) for name, value in seeded.items())
        assert (epochs, kl_weight) == (7 * r, 0.3)
    assert len(made) == 2 and len(seen) == 6   # three uploads a round
    assert all(torch.equal(x[:, 0], asked.images + r) for r, x in zip((1, 1, 1, 2, 2, 2), seen, strict=True))


@pytest.mark.parametrize("prior", ["class", "normal"])
def test_kl_by_hand(trained, prior):
    """Against PyTorch's own divergence of two Gaussians, with the priors of ``client_1.pt``."""
    if prior == "class":
        trained.train("priors", *THREE, "--prior", "class", "--kl_weight", 0.1, "--rounds", 2)
    target = trained.target("priors" if prior == "class" else "rve_pfl")
    asked = members.asked(target, 1)
    adversary = members.MembershipAdversary(target, Namespace(draws=1), [2], 2, 1)
    found = members.kl("stolen_model", adversary, asked.images, asked.labels)
    private = target.private(2, 1).parameters
    encoder = VariationalEncoder(target.data.image_shape, 0.0).eval()
    encoder.load_state_dict({key.removeprefix("encoder."): value for key, value in private.items()
                             if key.startswith("encoder.")})
    with torch.no_grad():
        mu, logvar = encoder(asked.images)
    at, spread = torch.zeros(64), torch.ones(64)
    if prior == "class":
        at, spread = private["prior.mu"][asked.labels], (0.5 * private["prior.logvar"][asked.labels]).exp()
    apart = kl_divergence(Normal(mu, (0.5 * logvar).exp()), Normal(at, spread)).sum(1)
    assert torch.allclose(found.float(), -apart, rtol=1e-4) and found.dtype == torch.float64


def test_no_reference_has_seen_the_images_it_is_compared_on(trained, monkeypatch):
    target = trained.target("fedavg")
    args = options(trained, "fedavg", "--references", "2")
    adversary, seen = members.MembershipAdversary(target, args, [2], 2, 0), {}
    monkeypatch.setattr(adversary, "references", lambda images, labels, count: seen.update(
        trained=images, count=count) or [target.start(0).eval()])
    asked, scored = members.asked(target, 0), []
    confidence = members.confidence
    monkeypatch.setattr(members, "confidence", lambda answer, x, y: scored.append(x) or confidence(answer, x, y))
    members.rmia("stolen_model", adversary, asked.images, asked.labels)
    population = scored[0]
    distances = torch.cdist(population.flatten(1), seen["trained"].flatten(1))
    assert len(population) >= 30 and distances.min() > 0 and seen["count"] == len(asked.images)


# Reference models

@pytest.mark.parametrize("flags", [
    ("rve_pfl", "--prior", "class", "--kl_weight", 0.1, "--kl_warmup", 2, "--aggregation", "mean"),
    ("rve_pfl", "--head_lr", 0.5, "--lr_decay", 0.1, "--lr_warmup", 0.9, "--augment", "flip+shift"),
    ("local", "--optimizer", "sgd", "--momentum", 0.5, "--lr", 0.01),
    ("ressfl", "--loss_weight", 2, "--aggregation", "mean"),
    ("nbafl_prox", "--prox", 5, "--rounds", 1)])   # with more rounds, of what the server's noise left
def test_a_reference_is_trained_as_a_client(trained, flags):
    """The only client of a run, and a reference with its images and draws, end with the same parameters."""
    name = "-".join(map(str, flags)).replace("+", "")
    trained.train(name, *THREE, "--method", flags[0], "--num_users", 1, "--partition", "iid", "--rounds", 2,
                  "--local_ep", 2, "--stack", 1, *flags[1:])
    target = trained.target(name)
    last, own, labels = target.latest_round(), target.owned()[0][0], torch.from_numpy(target.data.labels)
    private = target.private(last, 0)
    victim = {**target.own_head(last, 0, private), **private.parameters}
    made = members.train_reference(target, (last, 0, None), 1, target.pixels(own), labels[own])
    assert all(torch.equal(value, victim[key]) for key, value in made.state_dict().items())
    assert not made.training and not any(value.requires_grad for value in made.parameters())


def test_references_differ_in_images_and_draws(trained, monkeypatch):
    target = trained.target("rve_pfl")
    args = options(trained, "rve_pfl", "--references", "3")
    adversary, made = members.MembershipAdversary(target, args, [2], 2, 1), []
    train = members.train_reference
    monkeypatch.setattr(members, "train_reference", lambda target, like, seed, *data: made.append(
        ((like, seed), *data)) or train(target, like, seed, *data))
    images = torch.arange(40.0).div(255)[:, None, None, None].expand(40, 1, 8, 8)
    labels = torch.arange(40) % 4
    found = adversary.references(images, labels, 25)
    assert found is adversary.references(images, labels, 25) and len(found) == len(made) == 3
    assert len({how[1] for how, _, _ in made}) == 3
    assert all(how[0] == (2, 1, None) for how, _, _ in made)
    chosen = [(255 * part[:, 0, 0, 0]).round().long() for _, part, _ in made]
    assert all(len(part.unique()) == 25 for part in chosen) and len({tuple(part.tolist()) for part in chosen}) == 3
    assert all(torch.equal(known, labels[part]) for part, (_, _, known) in zip(chosen, made, strict=True))
    first, *others = (model.state_dict()["encoder.mu.weight"] for model in found)
    assert not any(torch.equal(first, other) for other in others)


def test_a_reference_trains_in_the_rounds_of_its_client(trained, monkeypatch):
    """And in all where everything travels, since then somebody trained the client's model in each."""
    trained.train("some", *THREE, "--rounds", 6, "--frac", 0.6, "--local_ep", 2)
    target = trained.target("some")
    table = pd.read_csv(target.results / "clients.csv").query("stage == 'trained'")

    def schedule(client, epochs=None, **options):
        return members.schedule(replace(target, options=target.options | options), 6, client, epochs)
    for k in range(3):
        asked = set(table[table["client"] == k]["round"])
        assert schedule(k) == [(r, 2) for r in sorted(asked)]
        assert schedule(k, full_sharing_rounds=3) == [(r, 2) for r in sorted({1, 2, 3} | asked)]
        assert schedule(k, method="fedavg") == [(r, 2) for r in range(1, 7)]
    assert len(table[["client", "round"]].drop_duplicates()) == 12   # not 18
    assert schedule(0, 5) == [(1, 2), (2, 2), (3, 1)] and schedule(0, 1) == [(1, 1)]
    seen = []
    monkeypatch.setattr(members.Trainer, "train", lambda self, client, number, indices, sent, private: (
        sent, private, seen.append((number, self.training.epochs))))
    members.train_reference(target, (6, 0, 5), 1, torch.zeros(2, 1, 8, 8), torch.zeros(2, dtype=torch.long))
    assert seen == [(1, 2), (2, 2), (3, 1)]


def test_a_reference_that_cannot_be_trained_is_one_line(trained, tiny_arrays):
    target, images = trained.target("fedavg"), as_floats(tiny_arrays["train_images"])
    labels = torch.from_numpy(tiny_arrays["train_labels"]).long()

    def fault(options):
        with pytest.raises(InputError) as error:
            members.train_reference(replace(target, options=options), (2, 0, None), 1, images, labels)
        return str(error.value)
    diverged = fault(target.options | {"lr": 1e30})
    assert "diverged" in diverged and "--train_epochs" in diverged
    for name in ("lr", "local_ep", "precision", "frac"):
        lacks = fault({key: value for key, value in target.options.items() if key != name})
        assert "config.json" in lacks and f"--{name}" in lacks


# The command line

def fits(method):
    """What fits, by hand."""
    models = {(who, how) for who in ("stolen_model", "prediction_api") for how in ("loss", "rmia")}
    models |= {("stolen_model", "kl")} if method in ("rve_pfl", "local") else set()
    return models if method in ("local", "fedper") else models | {("curious_server", "fedmia")}


@pytest.mark.parametrize("method", ["rve_pfl", "fedavg", "lg_fedavg", "local", "fedper"])
def test_every_attack_that_fits_leaves_a_row(trained, method, capsys):
    assert trained.attack(method, "--clients", 0, 1, "--overwrite") == 0
    table, said = csv(trained, method), capsys.readouterr().out
    assert list(table.columns) == membership.COLUMNS
    assert set(zip(table["adversary"], table["attack"], strict=True)) == fits(method)
    assert len(table) == 2 * len(fits(method)) == said.count(" client ") and set(table["round"]) == {2}
    assert np.isfinite(table[membership.COLUMNS[4:]]).all(axis=None)
    assert ((table["auc_low"] <= table["auc"]) & (table["auc"] <= table["auc_high"])).all()
    rows = table.set_index(KEY)
    for line in filter(lambda line: " client " in line, said.splitlines()):
        who, how, _, r, _, client = line.split(":")[0].split()
        leaks = rows.loc[(who, how, int(r), int(client)), "auc_low"] > 0.5
        assert (": leaks. AUC " in line, ": as a guess. AUC " in line) == (leaks, not leaks)


def test_a_second_call_goes_on_and_keeps_other_rows(trained, capsys, monkeypatch):
    """But for `fedmia`, whose row is of all rounds: of which, the second call says anew."""
    path = trained.target("fedavg").results / "membership.csv"
    flags = ("--adversary", "stolen_model", "--attack", "loss")
    left = path.with_name(f".membership.csv.{10**30}.tmp")   # by a process that was killed
    left.touch()
    assert trained.attack("fedavg", *flags, "--rounds", 2, 1, "--overwrite") == 0 and not left.exists()
    first = csv(trained, "fedavg")
    assert first[KEY].to_numpy().tolist() == [["stolen_model", "loss", r, 0] for r in (1, 2)]
    measured, measure = [], members.measure
    monkeypatch.setattr(members, "measure", lambda *given: measured.append(1) or measure(*given))
    assert trained.attack("fedavg", *flags) == 0 and not measured
    server, row = ("--adversary", "curious_server", "--clients", 0, 0), ("curious_server", "fedmia", 2, 0)
    aucs = []
    for rounds in ((1, 2), (2,)):
        assert trained.attack("fedavg", *server, "--rounds", *rounds) == 0
        table = csv(trained, "fedavg")
        assert len(table) == 3 and len(measured) == len(aucs) + 1
        aucs.append(table.set_index(KEY).loc[row, "auc"])
        others = table[table["attack"] == "loss"].reset_index(drop=True)
        pd.testing.assert_frame_equal(others, first, check_dtype=False)
    assert aucs[0] != aucs[1]
    assert "--gamma" in trained.refuses(capsys, "fedavg", *flags, "--gamma", 2)
    assert not list(path.parent.glob(".membership*"))


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
    assert "none of these attacks fits" in trained.refuses(capsys, "local", *server)
    assert "nothing travels" in trained.refuses(capsys, "local", *server)
    assert "head stays" in trained.refuses(capsys, "fedper", *server)
    assert "needs what" in trained.refuses(capsys, "fedavg", *server, "--attack", "loss")
    assert "encoder with noise" in trained.refuses(capsys, "lg_fedavg", "--attack", "kl")
    assert "encoder with noise" in trained.refuses(capsys, "fedavg", "--attack", "kl")
    target = trained.target("rve_pfl")
    borrowed = replace(target, options=target.options | {"encoders_from": "rve_pfl"})
    assert "--encoders_from" in members.obstacle(borrowed, membership.Unit("stolen_model", "rmia", 2, 0), [2])
    assert members.obstacle(borrowed, membership.Unit("stolen_model", "kl", 2, 0), [2]) is None
    trained.train("pair", *THREE, "--method", "fedavg", "--num_users", 2, "--rounds", 1)
    assert "two others" in trained.refuses(capsys, "pair", *server)
    assert not (trained.place.folder / "results" / "pair" / "membership.csv").exists()


def test_damaged_files_are_one_line_and_change_nothing(trained, capsys):
    path = trained.target("lg_fedavg").results / "membership.csv"
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


def test_scores_that_are_not_numbers_are_no_guess(trained, capsys, monkeypatch):
    monkeypatch.setattr(members, "confidence", lambda answer, x, y: torch.full((len(x),), torch.nan).double())
    assert "not numbers" in trained.refuses(capsys, "lg_fedavg", "--adversary", "curious_server", "--rounds", 1,
                                            "--overwrite")
    path = trained.target("lg_fedavg").results / "membership.csv"
    assert not path.exists() or 1 not in set(csv(trained, "lg_fedavg")["round"])
