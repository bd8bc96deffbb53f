"""What adversaries observe: uploads as they arrive, latents in several ways, and the start of a run."""
import json

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from attacked import Attacked
from torch import nn

from attack import adversaries, attacks, decoders, gradients, latents, mi_attack, newton, observations
from attack.adversaries import Adversary, Budget, PublicImages
from attack.evaluation import CLIENT_LR
from attack.target import as_floats
from methods import METHODS
from models import Classifier, ClassPrior, as_image
from runs.checkpoints import load_checked
from update import ClientState, Trainer, Training
from utils import rng, seed_torch

RUNS = {
    "fedavg": ("--method", "fedavg"),
    "ressfl": ("--method", "ressfl", "--loss_weight", 5),
    "quiet": ("--method", "nbafl", "--epsilon", 1e6, "--clip", 12),   # it clips, with hardly any noise
    "nbafl": ("--method", "nbafl", "--epsilon", 2000),
    "prox": ("--method", "nbafl_prox", "--prox", 1, "--epsilon", 1e6, "--clip", 1e6),
    "client_dp": ("--method", "client_dp", "--clip", 0.01, "--noise_multiplier", 1),
    "class": ("--prior", "class", "--kl_weight", 1e-2),
    "rve_pfl": ("--rounds", 3, "--save_rounds", 1, 2, "--init_logvar", -9),
    "gap": ("--rounds", 3, "--save_rounds", 1),
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory, make_place, tiny_arrays):
    flags = ("--images", 4, "--restarts", 1, "--iterations", 3, "--train_epochs", 1)
    runs = {run: ("--rounds", 1, *more) for run, more in RUNS.items()}
    return Attacked(make_place(tmp_path_factory.mktemp("observed")), tiny_arrays, mi_attack, flags, runs)


def facts(trained, run):
    return json.loads((trained.results(run) / "config.json").read_text())["server"]


def flat(state):
    return torch.cat([value.flatten() for value in state.values()])


def cosine(one, other):
    return torch.cosine_similarity(one.flatten(), other.flatten(), dim=0).item()


def by_training(victim, numbers, batch):
    """What the project's own client changes by plain SGD without dropout: the sum of its steps' gradients."""
    target, network = victim.target, victim.network(victim.sent_next)
    for layer in network.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = 0.0
    changes = {"local_ep": 1, "local_bs": batch, "lr": CLIENT_LR, "lr_decay": 0.0, "lr_warmup": 0.0,
               "head_lr": 1.0, "optimizer": "sgd", "momentum": 0.0, "augment": "none"}
    how = Training.from_options({**target.options, **changes}, torch.float32)
    trainer = Trainer(network, METHODS[target.options["method"]], torch.from_numpy(target.data.images),
                      torch.from_numpy(target.data.labels), target.data.num_classes, how)
    upload = trainer.train(0, victim.round + 1, numbers, victim.sent_next, ClientState(victim.private)).upload
    return {name: (value - upload[name]) / CLIENT_LR for name, value in victim.sent_next.items()}


@pytest.mark.parametrize("run, batch", [("fedavg", 2), ("fedavg", 1), ("ressfl", 2), ("prox", 1)])
def test_what_is_observed_is_what_a_client_of_this_method_uploads(trained, run, batch):
    """Its own loss and its second step included: ``prox`` pulls back in the second step only."""
    victim = trained.victim(run)
    numbers = victim.target.owned()[0][0][:2]
    order = rng(victim.target.options["seed"], "order", 0, victim.round + 1).permutation(numbers)
    x = as_floats(victim.target.data.images[order])
    y = torch.from_numpy(victim.target.data.labels[order])
    expected, seen = by_training(victim, numbers, batch), victim._steps(x, y, CLIENT_LR, batch, None)
    for name, value in expected.items():
        torch.testing.assert_close(seen[name], value, atol=2e-5, rtol=1e-3)


def test_without_protection_it_is_the_clean_gradient(trained):
    victim, (x, y) = trained.victim("fedavg"), trained.images("fedavg", 1)
    network = victim.network(victim.sent_next)
    F.cross_entropy(network.classifier(x), y).backward()
    for name, value in victim.update(x, y, CLIENT_LR).items():
        torch.testing.assert_close(value, network.get_parameter(name).grad, atol=1e-7, rtol=1e-5)


def observed_beside_clean(trained, run, lr, round=1):
    """An nbafl run's observation and the gradient without its clip and noise, of one image."""
    victim, (x, y) = trained.victim(run, round), trained.images(run, 1)
    clean = victim._steps(x, y, lr, 1, None)
    return victim, victim.update(x, y, lr), clean


def test_nbafls_noise_is_on_what_is_observed(trained):
    """Each entry has the run's own uplink noise, divided by the step and by the clip's scale."""
    run = facts(trained, "nbafl")
    for lr in (0.1, 0.01):
        victim, seen, clean = observed_beside_clean(trained, "nbafl", lr)
        sent = victim.sent_next
        moved = flat({name: value - lr * clean[name] for name, value in sent.items()}).norm().item()
        scale = min(1.0, run["clip"] / moved)
        noise = (flat(seen) - flat(clean)).std().item()
        assert noise == pytest.approx(run["sigma_uplink"] / lr / scale, rel=0.03)
        x, y = trained.images("nbafl", 1)
        assert not torch.equal(flat(victim.update(x, y, lr)), flat(seen))   # an upload has noise of its own


def test_the_step_is_an_option(trained, capsys, monkeypatch):
    """Hidden by the noise at one size and plain at another."""
    seen, find = [], newton.dense_input
    monkeypatch.setattr(newton, "dense_input", lambda one, layer: seen.append(one) or find(one, layer))
    sizes = []
    for lr in (0.1, 0.001):
        seen.clear()
        flags = ("--adversary", "curious_server", "--attack", "analytic", "--client_lr", lr)
        assert trained.attack("nbafl", "--overwrite", *flags) == 0
        sizes.append(flat(seen[0]).std().item())
    assert sizes[1] > 50 * sizes[0]   # mostly noise, divided by the step
    assert "--client_lr" in trained.refuses(capsys, "nbafl", "--client_lr", 0)


def test_the_clip_is_undone_by_an_adversary_that_knows_of_it(trained):
    victim, seen, clean = observed_beside_clean(trained, "quiet", 0.1, round=0)
    norm = flat(victim.sent_next).norm().item()
    assert facts(trained, "quiet")["clip"] < 0.9 * norm   # it does clip
    assert cosine(flat(seen), flat(clean)) > 0.99
    sent = {name: value.double() for name, value in victim.sent_next.items()}
    arrived = {name: 0.9 * (value - 0.1 * clean[name]) for name, value in sent.items()}
    assert cosine(flat(observations.of_upload(sent, arrived, 0.1, clipped=False)), flat(clean)) < 0.9
    assert cosine(flat(observations.of_upload(sent, arrived, 0.1, clipped=True)), flat(clean)) > 0.999


def test_client_level_dp_is_clipped_and_its_server_sees_no_noise(trained):
    victim, seen, clean = observed_beside_clean(trained, "client_dp", 0.1)
    assert flat(clean).norm() > 0.1 and cosine(flat(seen), flat(clean)) > 0.9999
    assert flat(seen).norm().item() == pytest.approx(0.01 / 0.1, rel=1e-4)


@pytest.mark.parametrize("rows", [1, 2])
def test_a_class_priors_replay_is_in_what_is_observed(trained, monkeypatch, rows):
    victim, (x, y) = trained.victim("class"), trained.images("class", rows)
    drawn, draw, inputs = [], ClassPrior.draw, []
    monkeypatch.setattr(ClassPrior, "draw", lambda self, y: drawn.append((y, draw(self, y))) or drawn[-1][1])
    seen = victim.update(x, y, CLIENT_LR, inputs=inputs)
    head = victim.network(victim.sent_next).classifier
    (classes, replayed), = drawn
    assert len(classes) == rows and len(inputs) == 1 and inputs[0].shape == x.shape

    def gradient(z, labels):
        return gradients.gradient(head, z, labels)
    clean, replay = gradient(inputs[0], y), gradient(as_image(replayed, (1, 8, 8)), classes)
    for name, value in clean.items():
        torch.testing.assert_close(seen[f"classifier.{name}"] - value, replay[name], atol=1e-6, rtol=1e-3)
    assert flat(replay).norm() > 1e-3


def test_every_attack_on_gradients_observes_an_arriving_upload(trained, monkeypatch):
    calls, update = [], observations.Victim.update
    monkeypatch.setattr(observations.Victim, "update", lambda *a, **k: calls.append(1) or update(*a, **k))
    x, y = trained.images("nbafl", 2)
    budget = Budget(1, 1, 1, 1, CLIENT_LR, 3)
    rows = {name: row for name, row in attacks.ATTACKS.items() if row.adversaries == attacks.SERVER}
    for row in rows.values():
        calls.clear()
        row.observe(trained.victim("nbafl"), x, y, budget)
        assert calls
    assert {"dlg", "cosine_tv", "analytic", "gauss_newton", "trunk_analytic", "batch", "epoch"} <= set(rows)


def stolen(trained, run, round=None):
    """(adversary, victim) where the client's model is stolen."""
    victim = trained.victim(run, round)
    view = adversaries.hold(victim.target, "stolen_model", victim.round, 0)
    public = PublicImages(*trained.images(run, 20, client=1))
    return Adversary(view, view.head, public, 0.0, Budget(1, 2, 1, 1, CLIENT_LR, 3)), victim


def observe(victim, x, y, observed):
    return latents.observe(victim, x, y, Budget(1, 1, 1, 1, CLIENT_LR, 3, observed))


def test_latents_are_observed_as_asked(trained):
    adversary, victim = stolen(trained, "rve_pfl")
    x, y = trained.images("rve_pfl", 3)
    with torch.no_grad():
        mu, logvar = adversary.knowledge.posterior(x)

        def deviation(observed):
            seen, = observe(victim, x, y, observed)
            return (seen.draws - mu) / (0.5 * logvar).exp(), seen
        many, seen = deviation("z400")
        assert many.shape == (400, 3, 64) and seen.noisy
        assert many.std().item() == pytest.approx(1, abs=0.02) and many.mean().abs() < 0.02
        one, _ = deviation("z")
        assert one.shape == (1, 3, 64) and 0.8 < one.std() < 1.2
        exact, seen = deviation("mu")
        assert exact.abs().max() < 1e-4 and not seen.noisy
        assert deviation("train")[0].std() > 1.5   # dropout moves mu besides
        assert 0.8 < deviation("z")[0].std() < 1.2   # and is off again


def test_each_round_is_observed_with_its_own_encoder(trained):
    adversary, victim = stolen(trained, "rve_pfl")
    x, y = trained.images("rve_pfl", 3)
    seen = observe(victim, x, y, "rounds")
    assert len(seen) == 3
    for round, one in enumerate(seen, 1):
        own = load_checked(victim.target.file(round, "client_0.pt"))["parameters"]
        for name, value in one.model.encoder.state_dict().items():
            assert torch.equal(value, own[f"encoder.{name}"])
        with torch.no_grad():
            mu, logvar = one.model.posterior(x)
        assert 0.8 < ((one.draws[0] - mu) / (0.5 * logvar).exp()).std() < 1.2
    assert not torch.equal(seen[0].model.encoder.mu.weight, seen[2].model.encoder.mu.weight)


@pytest.mark.parametrize("observed", ["z", "z8", "rounds", "mu", "train"])
def test_the_likelihood_sums_over_draws_and_encoders(trained, observed):
    adversary, victim = stolen(trained, "rve_pfl")
    x, y = trained.images("rve_pfl", 6)
    seen = observe(victim, x[:3], y[:3], observed)
    found, labels = latents.likelihood(adversary, seen, x)
    expected = torch.zeros(3, 6, dtype=torch.double)
    with torch.no_grad():
        for one in seen:
            mu, logvar = (one.model or adversary.knowledge).posterior(x)
            sigma = torch.ones_like(mu) if observed == "mu" else (0.5 * logvar).exp()
            for draw in one.draws:
                expected += torch.distributions.Normal(mu.double(), sigma.double()).log_prob(
                    draw[:, None].double()).sum(2)
    apart = (found - found[:, :1]) - (expected - expected[:, :1])
    assert apart.abs().max() < 1e-3 * expected.std()
    assert observed == "train" or torch.equal(found.argmax(1), torch.arange(3))   # no dropout is as likely as none
    assert len(labels) == 3


def test_several_encoders_and_draws_are_decoded_by_their_mean(trained, monkeypatch):
    adversary, victim = stolen(trained, "rve_pfl")
    x, y = trained.images("rve_pfl", 3)
    told = []
    monkeypatch.setattr(decoders, "cleaned_ridge", lambda mean, logvar, images, epochs: told.append(
        (mean, logvar)) or (lambda z: z.unflatten(1, (1, 8, 8))))
    for observed, count in (("z16", 1), ("mu", 1), ("rounds", 3)):
        told.clear()
        seen = observe(victim, x, y, observed)
        found, _ = latents.decode(adversary, seen, 3)
        assert len(told) == count
        mean = torch.stack([one.draws.mean(0) for one in seen]).mean(0)
        torch.testing.assert_close(found[0].flatten(1), mean)
    _, logvar = adversaries.posterior_in_parts(adversary.knowledge, adversary.public.images)
    told.clear()
    latents.decode(adversary, observe(victim, x, y, "z16"), 3)
    torch.testing.assert_close(told[0][1], logvar - np.log(16))   # the variance of a mean of 16
    latents.decode(adversary, observe(victim, x, y, "mu"), 3)
    assert told[1][1] is None


def test_the_posterior_mean_by_hand(trained):
    """Public images weighted by how likely each has made z: the nearest one's share is near 1 in 64 dimensions."""
    adversary, victim = stolen(trained, "rve_pfl")
    x, y = trained.images("rve_pfl", 2)
    seen = observe(victim, x, y, "z")
    found, _ = latents.posterior_mean(adversary, seen, 2)
    public = adversary.public.images
    with torch.no_grad():
        mu, logvar = adversary.knowledge.posterior(public)
    logs = torch.distributions.Normal(mu, (0.5 * logvar).exp()).log_prob(seen[0].draws[0][:, None]).sum(2)
    expected = (logs.double().softmax(1)[:, :, None, None, None] * public).sum(1)
    torch.testing.assert_close(found[0], expected.float(), atol=1e-3, rtol=1e-3)
    exact = observe(victim, x, y, "mu")
    with torch.no_grad():
        nearest = torch.cdist(adversary.knowledge.posterior(x)[0], mu).argmin(1)
    torch.testing.assert_close(latents.posterior_mean(adversary, exact, 2)[0][0], public[nearest])
    mine = PublicImages(torch.cat([public, x]), torch.zeros(len(public) + 2, dtype=torch.long))
    adversary.public = mine   # where the image itself is public, it is what is found
    torch.testing.assert_close(latents.posterior_mean(adversary, seen, 2)[0][0], x, atol=1e-3, rtol=1e-3)


def test_observations_stand_side_by_side(trained, capsys):
    flags = ("--adversary", "stolen_model", "--attack", "reidentification", "mi_face")
    assert trained.attack("rve_pfl", "--overwrite", *flags, "--observe", "z", "mu") == 0
    assert trained.attack("rve_pfl", *flags, "--observe", "rounds", "z8", "z") == 0
    table, folder = trained.csv("rve_pfl"), trained.results("rve_pfl")
    assert set(table[table["attack"] == "reidentification"]["observed"]) == {"z", "z8", "mu", "rounds"}
    for observed in ("", "_mu", "_z8"):
        assert (folder / f"attack_stolen_model_reidentification{observed}_round3_client0.png").exists()
    assert set(table[table["attack"] == "mi_face"]["observed"]) == {""}
    assert not table.duplicated(["attack", "observed", "image", "restart", "control", "label"]).any()
    summary = pd.read_csv(folder / "attack_summary.csv", keep_default_na=False)
    assert not summary.duplicated(["adversary", "attack", "round", "observed", "control"]).any()
    assert "reidentification (rounds) round 3 client 0" in capsys.readouterr().out


@pytest.mark.parametrize("run, flags, named", [
    ("rve_pfl", ("--observe", "y"), "zN"), ("rve_pfl", ("--observe", "z1"), "zN"),
    ("rve_pfl", ("--observe", "z0"), "zN"), ("rve_pfl", ("--observe", "z99999"), "zN"),
    ("gap", ("--observe", "rounds"), "round 2"),
    ("rve_pfl", ("--observe", "rounds", "--rounds", 0), "round 1")])
def test_observations_that_there_are_not(trained, capsys, run, flags, named):
    line = trained.refuses(capsys, run, "--overwrite", "--adversary", "stolen_model", "--attack", "posterior_mean",
                           *flags)
    assert named in line and "--observe" in line


def test_at_the_start_everybody_knows_the_encoder(trained):
    """It is the seeded one; the curious server holds it too, and only then."""
    target = trained.target("rve_pfl")
    seed_torch(target.options["seed"], "init")
    built = METHODS["rve_pfl"].build((1, 8, 8), 4, target.options).state_dict()
    for who in ("curious_server", "stolen_model", "curious_client"):
        view = adversaries.hold(target, who, 0, 0, own=1)
        for part in ("encoder", "head"):
            for name, value in getattr(view, part).state_dict().items():
                assert torch.equal(value, built[f"{part.replace('head', 'classifier')}.{name}"])
    assert adversaries.hold(target, "curious_server", 1, 0).encoder is None
    first = target.shared(1)["sent"]
    assert all(torch.equal(value, first[name]) for name, value in target.sent_next(0).items())


def test_images_are_told_apart_at_the_start(trained, monkeypatch):
    """From z, and by the server from the z behind a head's gradient, here without the search for it."""
    behind, update = [], observations.Victim.update
    monkeypatch.setattr(observations.Victim, "update", lambda *given: update(*given, inputs=behind))
    monkeypatch.setattr(newton, "head_input", lambda *_, **__: torch.cat(behind))
    flags = ("--rounds", 0, "--adversary", "stolen_model", "curious_server")
    assert trained.attack("rve_pfl", "--overwrite", *flags, "--attack", "reidentification",
                          "gradient_reidentification") == 0
    table = trained.csv("rve_pfl").query("control == ''")
    assert set(table["adversary"]) == {"stolen_model", "curious_server"} and set(table["round"]) == {0}
    assert (table["identified"] == 1).all() and len(table) == 8


def test_a_start_that_cannot_be_made_again_is_refused(trained, capsys):
    path = trained.results("rve_pfl") / "config.json"
    text, flags = path.read_text(), ("--rounds", 0, "--attack", "reidentification")
    config = json.loads(text)
    try:
        for other in (None, "0123456789abcdef"):
            path.write_text(json.dumps({**config, "start": other}))
            assert "--rounds 0" in trained.refuses(capsys, "rve_pfl", *flags)
        path.write_text(json.dumps({**config, "options": {**config["options"], "encoders_from": "fedavg"}}))
        assert "encoders of run fedavg" in trained.refuses(capsys, "rve_pfl", *flags)
    finally:
        path.write_text(text)


def test_nbafls_clip_of_the_first_round_is_that_of_its_uploads(trained):
    """Without --clip nobody knows it before; it is found in round 1 and stays."""
    target = trained.target("nbafl")
    assert not target.first_server.memory and target.server(0).memory == target.server(1).memory
    assert target.server(0).memory["clip"] == facts(trained, "nbafl")["clip"] > 0



def test_a_run_goes_on_from_its_own_start_only(place, capsys):
    flags = ("--method", "fedavg", "--rounds", 2)
    assert place.main(*flags) == 0
    path = place.results / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "start": "0123456789abcdef", "status": "unfinished"}))
    assert "initial weights" in place.refuses(capsys, *flags, "--resume")
    path.write_text(json.dumps({**config, "status": "unfinished"}))
    assert place.main(*flags, "--resume") == 0


def test_noise_is_averaged_over_the_units_of_a_dense_layer():
    """The first singular vector finds the input where weights by the noisy biases do not."""
    seed_torch(1, "dense input")
    units, f = torch.randn(256, 1), torch.rand(1, 400)
    weight, bias = (value + torch.randn_like(value) for value in (units @ f, units[:, 0]))
    found = newton.dense_input({"d.weight": weight, "d.bias": bias}, "d")
    plain = (weight * bias[:, None]).sum(0)
    assert cosine(found, f) > 0.99 > cosine(plain, f)


def test_a_shadow_encoder_pays_for_its_kl():
    """As the client's own does, by --kl_weight."""
    head, start = Classifier((1, 8, 8), 4).eval(), METHODS["rve_pfl"].build((1, 8, 8), 4, {"init_logvar": -4.0})
    x, y = torch.rand(128, 1, 8, 8), torch.arange(128) % 4
    kl = []
    for weight in (0.0, 1.0):
        seed_torch(1, "shadow")
        knowledge = adversaries.Knowledge(head, None, True, (1, 8, 8))
        view = adversaries.shadow_encoder(knowledge, start, x, y, 20, weight)
        with torch.no_grad():
            kl.append(adversaries.kl_of(start, *view.posterior(x), y).mean().item())
    assert kl[1] < 0.8 * kl[0]
