"""Membership inference: its measures, its controls in both directions, and its command line."""
from argparse import Namespace
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from attacked import Attacked, kept, spy
from sklearn.metrics import roc_auc_score, roc_curve
from torch.distributions import Normal, kl_divergence

import datasets
from attack import adversaries, members, membership
from attack.target import as_floats
from models import VariationalEncoder
from utils import InputError

KEY = ["adversary", "attack", "round", "client"]
THREE = ("--num_users", 3)
SERVER = ["--adversary", "curious_server"]
RUNS = {method: (*THREE, "--method", method, "--rounds", 2, "--save_rounds", 1)
        for method in ("rve_pfl", "fedavg", "lg_fedavg", "local", "fedper")}
NOISE = (*THREE, "--method", "fedavg", "--dataset", "noise", "--partition", "iid", "--local_ep", 20)
RUNS |= {"by_heart": (*NOISE, "--rounds", 2, "--save_rounds", 1),
         "sum": (*NOISE, "--rounds", 1, "--secure_aggregation"),
         "priors": (*THREE, "--prior", "class", "--kl_weight", 0.1, "--rounds", 2),
         "some": (*THREE, "--rounds", 6, "--frac", 0.6, "--local_ep", 2),
         "pair": ("--method", "fedavg", "--num_users", 2, "--rounds", 1)}


@pytest.fixture(scope="module")
def trained(tmp_path_factory, make_place, tiny_arrays):
    """Data for runs: ``tiny``, and noise whose labels say nothing, so that it can only be learnt by heart."""
    place = make_place(tmp_path_factory.mktemp("members"))
    rng = np.random.default_rng(1)
    for name, size in (("noise", 600), ("other", 400)):
        images = rng.integers(0, 256, (size, 8, 8, 1)).astype(np.uint8)
        labels = rng.integers(0, 4, size).astype(np.uint8)
        np.savez(place.folder / "data" / f"{name}.npz", train_images=images[50:], train_labels=labels[50:],
                 test_images=images[:50], test_labels=labels[:50])
    return Attacked(place, tiny_arrays, membership, ("--references", 2, "--draws", 2), RUNS)


def options(trained, run, *flags):
    """Return the command's options, as ``main`` would have them."""
    return membership.make_parser().parse(trained.argv(run, *flags))


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
    assert weights.mean() == pytest.approx(1) and weights[:90].sum() / weights.sum() == pytest.approx(10 / 40)
    figures = members.measure(-1.0 * classes, classes, member)
    assert figures["auc"] == figures["auc_low"] == figures["auc_high"] == 0.5
    assert roc_auc_score(member, -classes) > 0.7   # without weights


@pytest.mark.parametrize("sizes", [(120, 12), (12, 120)])
def test_intervals_hold_a_guess_as_often_as_they_say(monkeypatch, sizes):
    """A bootstrap of 12 and 120 images holds 0.5 in 90 % of draws; in 44 % if the 12 are not resampled."""
    monkeypatch.setattr(members, "DRAWS", 100)
    monkeypatch.setattr(members, "FALSE_POSITIVE_RATES", ())
    rng, member, held = np.random.default_rng(1), np.repeat([True, False], sizes), 0
    for _ in range(200):
        figures = members.measure(rng.normal(size=132), np.arange(132) % 2, member)
        held += figures["auc_low"] <= 0.5 <= figures["auc_high"]
    assert 155 <= held <= 195, held


def test_confidence_is_in_the_order_of_the_loss():
    """Also where a probability rounds to 1; a label that the service does not tell has the rest."""
    logits = torch.tensor([[30.0, 0, 0], [40.0, 0, 0], [1.0, 2, 0], [0.0, 0, 0]])
    labels = torch.tensor([0, 0, 1, 2])
    score = members.confidence(lambda x: x.log_softmax(1), logits, labels)
    p = logits.double().softmax(1)[torch.arange(4), labels]
    assert torch.allclose(score.sigmoid(), p) and score[1] > score[0] + 9
    told = torch.tensor([[0.7, 0.2, 0.0, 0.0], [0.0, 0.2, 0.7, 0.0]]).double()
    score = members.confidence(lambda x: x.log(), told, torch.tensor([1, 0]))
    assert torch.allclose(score.exp(), torch.tensor([0.2 / 0.7, 0.1 / 0.9]).double())


def test_non_members_are_of_the_clients_classes_and_its_own(trained):
    """Held-out images of another class are left out, and so are members of a class without held-out images."""
    target = trained.target("rve_pfl")
    partition = target.results / "partition.npz"
    whole, labels = dict(np.load(partition)), target.data.labels
    own, held = np.unique(labels[whole["train_0"]]), whole["test_0"]
    strange = np.flatnonzero(~np.isin(labels, own))[:7]
    with kept(partition):
        np.savez(partition, **{**whole, "test_0": np.concatenate([held[labels[held] == own[0]], strange])})
        asked = members.asked(target, 0)
        assert set(asked.labels.tolist()) == {own[0]}
        assert asked.member.sum() == (labels[whole["train_0"]] == own[0]).sum()
        assert (~asked.member).sum() == (labels[held] == own[0]).sum()
        np.savez(partition, **{**whole, "test_0": strange})
        assert members.asked(target, 0) is None
        assert membership.obstacle(target, membership.Unit("stolen_model", "loss", 2, 0), [2])
    borrowed = replace(target, options=target.options | {"encoders_from": "rve_pfl"})
    assert "--encoders_from" in membership.obstacle(borrowed, membership.Unit("stolen_model", "rmia", 2, 0), [2])
    asked = members.asked(target, 1)
    numbers = np.concatenate([whole["train_1"], whole["test_1"]])
    assert torch.equal(asked.labels, target.labels(numbers)) and torch.equal(asked.images, target.pixels(numbers))
    assert asked.member.tolist() == [True] * len(whole["train_1"]) + [False] * len(whole["test_1"])


def test_models_answer_as_the_options_say(trained, monkeypatch):
    target, args = trained.target("rve_pfl"), options(trained, "rve_pfl", "--draws", 3, "--scores", 2)
    drawn, logits = [], adversaries.Knowledge.logits
    monkeypatch.setattr(adversaries.Knowledge, "logits", lambda held, x, draws=0: drawn.append(draws) or logits(
        held, x, draws))
    adversary, images = members.MembershipAdversary(target, args, [2], 2, 0), members.asked(target, 0).images
    told = {name: members.answer_of(name, adversary)(images).isfinite().sum(1) for name in membership.MODELS}
    assert drawn == [3, 3] and (told["stolen_model"] == 4).all() and (told["prediction_api"] == 2).all()


def test_public_images_are_of_the_classes_asked_about_where_they_mean_the_same(trained, monkeypatch):
    """``public`` is another data set than ``tiny``. Where the images of the classes are too few, all are taken."""
    target, args = trained.target("fedavg"), options(trained, "fedavg", "--public_images", 230)
    same, pair = replace(target, options=target.options | {"dataset": "public"}), torch.tensor([1, 3])
    for run, least, classes, count in ((target, 100, {0, 1, 2, 3}, 230), (same, 100, {1, 3}, 120),
                                       (same, 121, {0, 1, 2, 3}, 230)):
        monkeypatch.setattr(datasets, "MIN_PUBLIC", least)
        images, labels = adversaries.public_images(run, args).of(pair)
        assert set(labels.tolist()) == classes and len(images) == count


def test_what_was_learnt_by_heart_leaks(trained, capsys):
    assert trained.attack("by_heart", "--public", "other", "--train_epochs", 20, "--overwrite") == 0
    table = trained.csv("by_heart", "membership.csv")
    assert set(zip(table["adversary"], table["attack"], strict=True)) == fits("fedavg")
    assert (table["auc"] >= 0.7).all(), table["auc"]
    assert capsys.readouterr().out.count("\nleaks ") == 5


def test_the_sum_of_what_was_learnt_by_heart_leaks(trained):
    assert trained.attack("sum", "--public", "other", *SERVER, "--overwrite") == 0
    row, = trained.csv("sum", "membership.csv").to_dict("records")
    assert row["attack"] == "sum_loss" and row["auc_low"] > 0.5, row


def test_fedmia_standardises_by_the_other_clients(trained, monkeypatch):
    """With losses given by hand, one for each round and client."""
    target = trained.target("fedavg")
    asked = members.asked(target, 0)
    uploads = {(r, k): upload for r in (1, 2) for k, upload in target.shared(r)["uploads"].items()}
    losses = {(1, 0): 1.0, (1, 1): 2.0, (1, 2): 4.0, (2, 0): 3.0, (2, 1): 3.0, (2, 2): 5.0}

    def confidence(answer, images, labels):
        head = answer.args[0].state_dict(prefix="classifier.")
        key, = (key for key, state in uploads.items()
                if all(torch.equal(head[name], state[name]) for name in head))
        p = np.exp(-losses[key])
        return torch.full((len(images),), float(np.log(p / (1 - p)))).double()
    monkeypatch.setattr(members, "confidence", confidence)
    adversary = members.MembershipAdversary(target, Namespace(draws=1, seed=1), [1, 2], 2, 0)
    score = members.fedmia("curious_server", adversary, asked.images, asked.labels)
    assert score.numpy() == pytest.approx(((3 - 1) / np.sqrt(2) + (4 - 3) / np.sqrt(2)) / 2, rel=1e-6)


def test_fedmia_trains_a_shadow_encoder_behind_the_head_sent_in_each_round(trained, monkeypatch):
    """For as long as clients had trained, from their start, with their KL weight."""
    target, made = trained.target("rve_pfl"), []
    target = replace(target, options=target.options | {"kl_weight": 0.3, "local_ep": 7})

    def shadow_encoder(knowledge, start, images, labels, epochs, kl_weight):
        made.append((knowledge.head.state_dict(prefix="classifier."), start.state_dict(), epochs, kl_weight))
        return adversaries.Knowledge(knowledge.head, start.encoder, True, (1, 8, 8))
    monkeypatch.setattr(members, "shadow_encoder", shadow_encoder)
    asked, args = members.asked(target, 0), options(trained, "rve_pfl", "--draws", 1)
    adversary = members.MembershipAdversary(target, args, [1, 2], 2, 0)
    members.fedmia("curious_server", adversary, asked.images, asked.labels)
    assert len(made) == 2
    for r, (head, start, epochs, kl_weight) in enumerate(made, 1):
        assert all(torch.equal(head[name], value) for name, value in target.shared(r)["sent"].items())
        assert all(torch.equal(start[name], value) for name, value in target.start(0).state_dict().items())
        assert (epochs, kl_weight) == (7 * r, 0.3)


def test_rmia_by_hand(trained, monkeypatch):
    """Probabilities given by hand: of the victim, and of two references, for x and for each public z."""
    args = Namespace(scaling=0.5, gamma=1.0, draws=1)
    adversary = members.MembershipAdversary(trained.target("fedavg"), args, [2], 2, 0)
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
        table = victim if name == "victim" else reference
        return torch.tensor([table[int(image)] + shift for image in images.flatten()]).double().logit()
    monkeypatch.setattr(members, "confidence", confidence)
    ratio = {image: victim[image] / ((1.5 * reference[image] + 0.5) / 2) for image in victim}
    for gamma in (1.0, 2.0):
        args.gamma = gamma
        shares = [np.mean([ratio[i] >= gamma * ratio[j] for j in (0, 1)]) for i in (100, 101, 102)]
        assert members.rmia("stolen_model", adversary, x, torch.arange(3)).tolist() == shares
        # 101 is easy for everybody; with a = 0, 102 would be, too.
        assert (shares == [1.0, 0.5, 1.0]) == (gamma == 1.0)


def test_kl_by_hand(trained):
    """Against PyTorch's own divergence of two Gaussians, with the class priors of ``client_1.pt``."""
    target = trained.target("priors")
    asked, adversary = members.asked(target, 1), members.MembershipAdversary(target, Namespace(draws=1), [2], 2, 1)
    score = members.kl("stolen_model", adversary, asked.images, asked.labels)
    private = target.private(2, 1).parameters
    encoder = VariationalEncoder(target.data.image_shape, 0.0).eval()
    encoder.load_state_dict({key.removeprefix("encoder."): value for key, value in private.items()
                             if key.startswith("encoder.")})
    with torch.no_grad():
        mu, logvar = encoder(asked.images)
    prior = Normal(private["prior.mu"][asked.labels], (0.5 * private["prior.logvar"][asked.labels]).exp())
    apart = kl_divergence(Normal(mu, (0.5 * logvar).exp()), prior).sum(1)
    assert torch.allclose(score.float(), -apart, rtol=1e-4) and score.dtype == torch.float64


@pytest.mark.parametrize("flags", [
    ("rve_pfl", "--prior", "class", "--no-private_init", "--kl_weight", 0.1, "--kl_warmup", 2, "--aggregation",
     "mean", "--precision", "fp32"),
    pytest.param(("rve_pfl", "--head_lr", 0.5, "--lr_decay", 0.1, "--lr_warmup", 0.9, "--augment", "flip+shift"),
                 marks=pytest.mark.slow),
    pytest.param(("local", "--optimizer", "sgd", "--momentum", 0.5, "--lr", 0.01), marks=pytest.mark.slow),
    pytest.param(("ressfl", "--loss_weight", 2, "--aggregation", "mean"), marks=pytest.mark.slow),
    # With more rounds, of what the server's noise left.
    ("nbafl_prox", "--prox", 5, "--rounds", 1, "--precision", "bf16")])
def test_a_reference_is_trained_as_a_client(trained, flags):
    """The only client of a run, and a reference with its images and draws, end with the same parameters."""
    name = "-".join(map(str, flags)).replace("+", "")
    trained.train(name, "--method", flags[0], "--num_users", 1, "--partition", "iid", "--rounds", 2,
                  "--local_ep", 2, "--stack", 1, *flags[1:])
    target = trained.target(name)
    last, own = target.latest_round(), target.owned()[0][0]
    private = target.private(last, 0)
    victim = {**target.own_head(last, 0, private), **private.parameters}
    made = members.train_reference(target, (last, 0, None), 1, target.pixels(own), target.labels(own))
    assert all(torch.equal(value, victim[key]) for key, value in made.state_dict().items())
    assert not made.training and not any(value.requires_grad for value in made.parameters())


def test_references_differ_in_images_and_draws_and_have_not_seen_the_images_compared(trained, monkeypatch):
    target, args = trained.target("rve_pfl"), options(trained, "rve_pfl", "--references", 3, "--draws", 1)
    adversary, asked = members.MembershipAdversary(target, args, [2], 2, 1), members.asked(target, 1)
    made, scored = (spy(monkeypatch, members, name) for name in ("train_reference", "confidence"))
    for _ in range(2):   # references are trained once
        members.rmia("stolen_model", adversary, asked.images, asked.labels)
    assert len(made) == len({seed for _, _, seed, *_ in made}) == 3
    population = scored[0][1].flatten(1)
    assert len(population) >= 30
    for _, like, _, images, labels in made:
        assert like == (2, 1, None) and len(images) == len(labels) == len(asked.images)
        assert torch.cdist(population, images.flatten(1)).min() > 0
    first, *others = (images for *_, images, _ in made)
    assert not any(torch.equal(first, other) for other in others)


def test_a_reference_trains_in_the_rounds_of_its_client(trained, monkeypatch):
    """And in all where everything travels, since then somebody trained the client's model in each."""
    target = trained.target("some")
    table = pd.read_csv(target.results / "clients.csv").query("stage == 'trained'")

    def schedule(client, epochs=None, **changes):
        return members.schedule(replace(target, options=target.options | changes), 6, client, epochs)
    for k in range(3):
        assert schedule(k) == [(r, 2) for r in sorted(set(table[table["client"] == k]["round"]))]
        assert schedule(k, method="fedavg") == [(r, 2) for r in range(1, 7)]
    assert len(table[["client", "round"]].drop_duplicates()) == 12   # not 18
    assert schedule(0, 5) == [(1, 2), (2, 2), (3, 1)] and schedule(0, 1) == [(1, 1)]


def test_a_reference_that_cannot_be_trained_is_one_line(trained, tiny_arrays):
    target, images = trained.target("fedavg"), as_floats(tiny_arrays["train_images"])
    labels = torch.from_numpy(tiny_arrays["train_labels"]).long()
    without = {key: value for key, value in target.options.items() if key != "lr"}
    for changed, named in ((target.options | {"lr": 1e30}, "diverged.*--train_epochs"),
                           (without, "config.json.*--lr")):
        with pytest.raises(InputError, match=named):
            members.train_reference(replace(target, options=changed), (2, 0, None), 1, images, labels)


def fits(method):
    """Return the attacks that fit, by hand."""
    models = {(adversary, name) for adversary in ("stolen_model", "prediction_api") for name in ("loss", "rmia")}
    models |= {("stolen_model", "kl")} if method in ("rve_pfl", "local") else set()
    return models if method in ("local", "fedper") else models | {("curious_server", "fedmia")}


@pytest.mark.parametrize("method", ["rve_pfl", "fedper", *(pytest.param(name, marks=pytest.mark.slow)
                                                           for name in ("fedavg", "lg_fedavg", "local"))])
def test_every_attack_that_fits_leaves_a_row(trained, method, capsys):
    assert trained.attack(method, "--clients", 0, 1, "--overwrite") == 0
    table, said = trained.csv(method, "membership.csv"), capsys.readouterr().out
    assert list(table.columns) == membership.COLUMNS
    assert set(zip(table["adversary"], table["attack"], strict=True)) == fits(method)
    assert len(table) == 2 * len(fits(method)) and set(table["round"]) == {2}
    assert np.isfinite(table[membership.COLUMNS[4:]]).all(axis=None)
    assert ((table["auc_low"] <= table["auc"]) & (table["auc"] <= table["auc_high"])).all()
    for row in table.itertuples():
        word = "leaks" if row.auc_low > 0.5 else "as a guess"
        auc = f"{row.auc:.2f} ({row.auc_low:.2f}-{row.auc_high:.2f})"
        assert f"\n{word:<10} {row.adversary:<14} {row.attack:<6} {auc:>18} " in said


def test_a_second_call_goes_on_and_keeps_other_rows(trained, capsys, monkeypatch):
    """But for `fedmia`, whose row is of all rounds: of which, the second call says anew."""
    flags = ("--adversary", "stolen_model", "--attack", "loss")
    assert trained.attack("fedavg", *flags, "--rounds", 2, 1, "--overwrite") == 0
    first = trained.csv("fedavg", "membership.csv")
    assert first[KEY].to_numpy().tolist() == [["stolen_model", "loss", r, 0] for r in (1, 2)]
    measured, aucs = spy(monkeypatch, members, "measure"), []
    assert trained.attack("fedavg", *flags) == 0 and not measured
    for rounds in ((1, 2), (2,)):
        assert trained.attack("fedavg", *SERVER, "--clients", 0, 0, "--rounds", *rounds) == 0
        table = trained.csv("fedavg", "membership.csv")
        assert len(table) == 3 and len(measured) == len(aucs) + 1
        aucs.append(table.set_index(KEY).loc[("curious_server", "fedmia", 2, 0), "auc"])
        pd.testing.assert_frame_equal(table[table["attack"] == "loss"].reset_index(drop=True), first,
                                      check_dtype=False)
    assert aucs[0] != aucs[1]
    assert "--gamma" in trained.refuses(capsys, "fedavg", *flags, "--gamma", 2)


@pytest.mark.parametrize("run, flags, named", [
    ("rve_pfl", ["--references", 0], "--references"), ("rve_pfl", ["--scaling", 2], "--scaling"),
    ("rve_pfl", ["--gamma", 0.5], "--gamma"), ("rve_pfl", ["--public", "unowned"], "--public"),
    ("fedavg", [*SERVER, "--attack", "loss"], "needs what"), ("pair", SERVER, "two others"),
    ("lg_fedavg", ["--attack", "kl"], "encoder with noise")])
def test_bad_input(trained, capsys, run, flags, named):
    """What the other command does not refuse, too (test_mi_attack.py)."""
    assert named in trained.refuses(capsys, run, *flags)


def test_damaged_files_and_scores_are_one_line_and_change_nothing(trained, capsys, monkeypatch):
    path, flags = trained.target("lg_fedavg").results / "membership.csv", ("--attack", "loss")
    path.unlink(missing_ok=True)
    client = trained.place.folder / "models" / "lg_fedavg" / "round_2" / "client_0.pt"
    with kept(client):
        client.write_bytes(client.read_bytes()[:100])
        assert "client_0.pt" in trained.refuses(capsys, "lg_fedavg", *flags)
    monkeypatch.setattr(members, "confidence", lambda answer, x, y: torch.full((len(x),), torch.nan).double())
    assert "not numbers" in trained.refuses(capsys, "lg_fedavg", *flags)
    assert not path.exists()
