"""Observations of adversaries: uploads as they arrive, latents in several ways, and the start of a run."""
import json

import pytest
import torch
from attacked import Attacked, kept, spy
from torch import nn

from attack import adversaries, attacks, gradients, latents, mi_attack, newton, observations
from attack.adversaries import Adversary, Budget, PublicImages
from attack.attacks import CLIENT_LR
from methods import METHODS
from models import ClassPrior, as_image
from runs.checkpoints import load_checked
from update import ClientState, Trainer, Training
from utils import rng

RUNS = {
    "fedavg": ("--method", "fedavg"),
    "ressfl": ("--method", "ressfl", "--loss_weight", 5),
    "quiet": ("--method", "nbafl", "--epsilon", 1e6, "--clip", 12),   # it clips, with hardly any noise
    "nbafl": ("--method", "nbafl", "--epsilon", 2000),
    "prox": ("--method", "nbafl_prox", "--prox", 1, "--epsilon", 1e6, "--clip", 1e6),
    "client_dp": ("--method", "client_dp", "--clip", 0.01, "--noise_multiplier", 1),
    "class": ("--prior", "class", "--kl_weight", 1e-2),
    "rve_pfl": ("--rounds", 3, "--save_rounds", 1, 2, "--init_logvar", -9),
    "private_init": ("--private_init", "--init_logvar", -9),
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
    """Return the sum of the gradients of the project's own client by plain SGD without dropout."""
    target, network = victim.target, victim.network(victim.sent_next)
    for layer in network.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = 0.0
    changes = {"local_ep": 1, "local_bs": batch, "lr": CLIENT_LR, "lr_decay": 0.0, "lr_warmup": 0.0,
               "head_lr": 1.0, "optimizer": "sgd", "momentum": 0.0, "augment": "none"}
    trainer = Trainer(network, METHODS[target.options["method"]], torch.from_numpy(target.data.images),
                      torch.from_numpy(target.data.labels), target.data.num_classes,
                      Training.from_options({**target.options, **changes}, torch.float32))
    upload = trainer.train(0, victim.round + 1, numbers, victim.sent_next, ClientState(victim.private)).upload
    return {name: (value - upload[name]) / CLIENT_LR for name, value in victim.sent_next.items()}


@pytest.mark.parametrize("run, batch", [("fedavg", 1), ("ressfl", 2), ("prox", 1)])
def test_what_is_observed_is_what_a_client_of_this_method_uploads(trained, run, batch):
    """Its own loss and its second step included: ``prox`` pulls back in the second step only."""
    victim = trained.victim(run)
    numbers = victim.target.owned()[0][0][:2]
    order = rng(victim.target.options["seed"], "order", 0, victim.round + 1).permutation(numbers)
    x, y = victim.target.pixels(order), victim.target.labels(order)
    expected, seen = by_training(victim, numbers, batch), victim._steps(x, y, CLIENT_LR, batch, None)
    for name, value in expected.items():
        torch.testing.assert_close(seen[name], value, atol=2e-5, rtol=1e-3)


def observed_beside_clean(trained, run, lr, round=1):
    """Return a victim, what is observed of one image, and the gradient without the method's clip and noise."""
    victim, (x, y) = trained.victim(run, round), trained.images(run, 1)
    return victim, victim.update(x, y, lr), victim._steps(x, y, lr, 1, None)


def test_nbafls_noise_is_on_what_is_observed(trained):
    """Each entry has the run's own uplink noise, divided by the step and by the clip's scale."""
    run, (x, y) = facts(trained, "nbafl"), trained.images("nbafl", 1)
    for lr in (0.1, 0.01):
        victim, seen, clean = observed_beside_clean(trained, "nbafl", lr)
        moved = flat({name: value - lr * clean[name] for name, value in victim.sent_next.items()}).norm().item()
        noise = (flat(seen) - flat(clean)).std().item()
        assert noise == pytest.approx(run["sigma_uplink"] / lr / min(1.0, run["clip"] / moved), rel=0.03)
        assert not torch.equal(flat(victim.update(x, y, lr)), flat(seen))   # an upload has noise of its own
    target = trained.target("nbafl")   # without --clip nobody knows it before; it is found in round 1 and stays
    assert not target.first_server.memory and target.server(0).memory == target.server(1).memory
    assert target.server(0).memory["clip"] == run["clip"] > 0


def test_the_clip_is_undone_by_an_adversary_that_knows_of_it(trained):
    victim, seen, clean = observed_beside_clean(trained, "quiet", 0.1, round=0)
    assert facts(trained, "quiet")["clip"] < 0.9 * flat(victim.sent_next).norm().item()   # it does clip
    assert cosine(flat(seen), flat(clean)) > 0.99


def test_client_level_dp_is_clipped_and_its_server_sees_no_noise(trained):
    _, seen, clean = observed_beside_clean(trained, "client_dp", 0.1)
    assert flat(clean).norm() > 0.1 and cosine(flat(seen), flat(clean)) > 0.9999
    assert flat(seen).norm().item() == pytest.approx(0.01 / 0.1, rel=1e-4)


def note_inputs(monkeypatch, noted):
    """Let ``Victim.update`` append what the head is given to ``noted``."""
    update, network = observations.Victim.update, observations.Victim.network

    def hooked(*given):
        made = network(*given)
        made.classifier.register_forward_pre_hook(lambda _, inputs: noted.append(inputs[0].detach()))
        return made

    def updated(*given):
        with monkeypatch.context() as patch:
            patch.setattr(observations.Victim, "network", hooked)
            return update(*given)
    monkeypatch.setattr(observations.Victim, "update", updated)


def test_a_class_priors_replay_is_in_what_is_observed(trained, monkeypatch):
    victim, (x, y) = trained.victim("class"), trained.images("class", 2)
    drawn, draw, inputs = [], ClassPrior.draw, []
    note_inputs(monkeypatch, inputs)
    monkeypatch.setattr(ClassPrior, "draw", lambda self, y: drawn.append((y, draw(self, y))) or drawn[-1][1])
    seen = victim.update(x, y, CLIENT_LR)
    head, ((classes, replayed),) = victim.network(victim.sent_next).classifier, drawn
    assert len(classes) == 2 and len(inputs) == 2 and inputs[0].shape == x.shape   # and the replay
    clean = gradients.gradient(head, inputs[0], y)
    replay = gradients.gradient(head, as_image(replayed, (1, 8, 8)), classes)
    for name, value in clean.items():
        torch.testing.assert_close(seen[f"classifier.{name}"] - value, replay[name], atol=1e-6, rtol=1e-3)
    assert flat(replay).norm() > 1e-3


def test_every_attack_on_gradients_observes_an_arriving_upload(trained, monkeypatch):
    """The size of the observed step is an option."""
    calls, (x, y) = spy(monkeypatch, observations.Victim, "update"), trained.images("nbafl", 2)
    rows = {name: row for name, row in attacks.ATTACKS.items() if row.adversaries == attacks.SERVER}
    assert {"dlg", "cosine_tv", "analytic", "gauss_newton", "trunk_analytic", "batch", "epoch"} <= set(rows)
    for row in rows.values():
        calls.clear()
        row.observe(trained.victim("nbafl"), x, y, Budget(1, 1, 1, 1, 0.07, 3))
        assert {lr for _, _, _, lr in calls} == {0.07}
    calls.clear()
    assert trained.attack("fedavg", "--attack", "analytic", "--images", 1, "--client_lr", 0.01) == 0
    assert {lr for _, _, _, lr in calls} == {0.01}


def stolen(trained):
    """Return (adversary, victim) where the client's model is stolen."""
    victim = trained.victim("rve_pfl")
    view = adversaries.hold(victim.target, "stolen_model", victim.round, 0)
    public = PublicImages(*trained.images("rve_pfl", 20, client=1))
    return Adversary(view, view.head, public, 0.0, Budget(1, 2, 1, 1, CLIENT_LR, 3)), victim


def observe(victim, x, y, observed):
    return latents.observe(victim, x, y, Budget(1, 1, 1, 1, CLIENT_LR, 3, observed))


def test_latents_are_observed_as_asked(trained):
    adversary, victim = stolen(trained)
    x, y = trained.images("rve_pfl", 3)
    mu, logvar = adversary.knowledge.posterior(x)

    def deviation(observed):
        seen, = observe(victim, x, y, observed)
        assert seen.noisy == (observed != "mu")
        return (seen.draws - mu) / (0.5 * logvar).exp()
    many, single = deviation("z400"), deviation("z")
    assert many.shape == (400, 3, 64) and many.mean().abs() < 0.02
    assert many.std().item() == pytest.approx(1, abs=0.02)
    assert single.shape == (1, 3, 64) and 0.8 < single.std() < 1.2
    assert deviation("mu").abs().max() < 1e-4
    assert deviation("train").std() > 1.5   # dropout moves mu besides
    assert 0.8 < deviation("z").std() < 1.2   # and is off again
    rounds = observe(victim, x, y, "rounds")
    assert len(rounds) == 3
    for round, seen in enumerate(rounds, 1):   # each with the encoder that the client had then
        own = load_checked(victim.target.file(round, "client_0.pt"))["parameters"]
        for name, value in seen.model.encoder.state_dict().items():
            assert torch.equal(value, own[f"encoder.{name}"])
        mu, logvar = seen.model.posterior(x)
        assert 0.8 < ((seen.draws[0] - mu) / (0.5 * logvar).exp()).std() < 1.2


def test_the_posterior_mean_by_hand(trained):
    """Public images weighted by how likely each has made z: the nearest one's share is near 1 in 64 dimensions."""
    adversary, victim = stolen(trained)
    x, y = trained.images("rve_pfl", 2)
    seen, public = observe(victim, x, y, "z"), adversary.public.images
    images, _ = latents.posterior_mean(adversary, seen, 2)
    with torch.no_grad():
        mu, logvar = adversary.knowledge.posterior(public)
        nearest = torch.cdist(adversary.knowledge.posterior(x)[0], mu).argmin(1)
    logs = torch.distributions.Normal(mu, (0.5 * logvar).exp()).log_prob(seen[0].draws[0][:, None]).sum(2)
    expected = (logs.double().softmax(1)[:, :, None, None, None] * public).sum(1)
    torch.testing.assert_close(images[0], expected.float(), atol=1e-3, rtol=1e-3)
    exact = latents.posterior_mean(adversary, observe(victim, x, y, "mu"), 2)[0][0]
    torch.testing.assert_close(exact, public[nearest])


def test_observations_stand_side_by_side(trained):
    flags = ("--adversary", "stolen_model", "--attack", "reidentification", "mi_face")
    assert trained.attack("rve_pfl", "--overwrite", *flags, "--observe", "z", "mu") == 0
    assert trained.attack("rve_pfl", *flags, "--observe", "rounds", "z8", "z") == 0
    table, folder = trained.csv("rve_pfl"), trained.results("rve_pfl")
    assert set(table[table["attack"] == "reidentification"]["observed"]) == {"z", "z8", "mu", "rounds"}
    for observed in ("", "_mu", "_z8"):
        assert (folder / f"attack_stolen_model_reidentification{observed}_round3_client0.png").exists()
    assert set(table[table["attack"] == "mi_face"]["observed"]) == {""}
    assert not table.duplicated(["attack", "observed", "image", "restart", "control", "label"]).any()


@pytest.mark.parametrize("run", ["rve_pfl", "private_init"])
def test_images_are_told_apart_at_the_start(trained, monkeypatch, run):
    """From z, and by the server from the z behind a head's gradient, here without the search for it, unless the
    encoder began from the client's secret."""
    assert adversaries.hold(trained.target("rve_pfl"), "curious_server", 1, 0).encoder is None   # but later
    behind = []
    note_inputs(monkeypatch, behind)
    monkeypatch.setattr(newton, "head_input", lambda *_, **__: torch.cat(behind))
    flags = ("--rounds", 0, "--adversary", "stolen_model", "curious_server")
    assert trained.attack(run, "--overwrite", *flags, "--observe", "z", "--attack",
                          "reidentification", "gradient_reidentification") == 0
    table = trained.csv(run).query("control == ''")
    assert set(table["adversary"]) == {"stolen_model", "curious_server"} and set(table["round"]) == {0}
    identified = table.groupby("adversary")["identified"].mean()
    assert len(table) == 8 and identified["stolen_model"] == 1
    assert identified["curious_server"] == 1 if run == "rve_pfl" else identified["curious_server"] < 0.5


def test_a_start_that_cannot_be_made_again_is_refused(trained, capsys):
    path = trained.results("rve_pfl") / "config.json"
    with kept(path):
        path.write_text(json.dumps({**json.loads(path.read_text()), "start": "0123456789abcdef"}))
        assert "--rounds 0" in trained.refuses(capsys, "rve_pfl", "--rounds", 0, "--attack", "reidentification")
