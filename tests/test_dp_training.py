"""DP-SGD in each client: its steps by hand, its noise, its accounting by three accountants, and whole runs."""
import json

import dp_accounting as dp
import numpy as np
import pandas as pd
import pytest
import torch
from attacked import Attacked
from dp_accounting.rdp import RdpAccountant
from opacus.accountants import PRVAccountant, RDPAccountant
from test_update import flat, without_draws

import dp_training
from attack import membership
from devices import seed_torch
from dp_training import DPTrainer
from engine.clients import train_each
from methods import METHODS
from server.privacy import composed_epsilon, noise_for
from update import ClientState, Training
from utils import rng

METHOD = METHODS["dp_" "sgd"]
FLAGS = ("--method", "dp_" "sgd", "--num_users", 3, "--rounds", 2)
OPTIONS = {"rounds": 1, "local_ep": 1, "local_bs": 8, "local_steps": None, "finetune_ep": [], "private_ep": None,
           "optimizer": "sgd", "lr": 0.5, "head_lr": 1.0, "lr_decay": 0.0, "lr_warmup": 0.0, "momentum": 0.0,
           "seed": 1, "kl_weight": 0.0, "kl_warmup": 0, "eval_samples": 1, "augment": "none",
           "epsilon": None, "delta": 1e-5, "clip": 0.5, "noise_multiplier": 2.0}


def make(arrays, **changes):
    """Return a trainer without dropout, and the parameters that it starts from."""
    seed_torch(1, "init")
    model = METHOD.build((1, 8, 8), 4, {}).to(memory_format=torch.channels_last)
    trainer = DPTrainer(model, METHOD, torch.from_numpy(arrays["train_images"]),
                        torch.from_numpy(arrays["train_labels"]).long(), 4,
                        Training.from_options({**OPTIONS, **changes}, torch.float32))
    return without_draws(trainer), trainer.state()


def change_of(trainer, start, images, round=1):
    """Return what a round of training subtracts from the parameters, in units of the learning rate."""
    upload = trainer.train(0, round, np.arange(images), start, ClientState({})).upload
    return {name: (value - upload[name]) / trainer.training.lr for name, value in start.items()}


def own_gradient(trainer, start, image):
    """Return the gradient of one image's cross-entropy, by plain PyTorch on a model in the usual layout."""
    model = METHOD.build((1, 8, 8), 4, {})
    model.load_state_dict(start)
    x = trainer.images[image:image + 1].permute(0, 3, 1, 2).float() / 255
    torch.nn.functional.cross_entropy(model.eval()(x).logits, trainer.labels[image:image + 1]).backward()
    return {name: value.grad for name, value in model.named_parameters()}


@pytest.mark.parametrize("optimizer, clip", [("sgd", 1.97), ("adam", 1.97), ("sgd", 1e3)])
def test_a_step_by_hand(tiny_arrays, monkeypatch, optimizer, clip):
    """The sum of the clipped gradients of a Poisson sample, over the expected size of the sample."""
    monkeypatch.setattr(dp_training, "noise_multiplier", lambda options, images: 0.0)
    trainer, start = make(tiny_arrays, optimizer=optimizer, clip=clip, local_steps=1)
    chosen = np.flatnonzero(rng(1, "order", 0, 1).random(20) < 8 / 20)
    own = [own_gradient(trainer, start, image) for image in chosen]
    norms = torch.stack([flat(gradient).norm() for gradient in own])
    assert (norms.min() < clip < norms.max()) == (clip == 1.97)
    factors = (clip / norms).clamp_max(1).tolist()
    mean = {name: sum(gradient[name] * factor for gradient, factor in zip(own, factors, strict=True)) / 8
            for name in start}
    for name, value in change_of(trainer, start, 20).items():
        expected = mean[name] if optimizer == "sgd" else mean[name] / (mean[name].abs() + 1e-7)
        torch.testing.assert_close(value, expected, atol=1e-6 if optimizer == "sgd" else 2e-2, rtol=1e-4)


@pytest.mark.parametrize("epsilon, given", [(None, 2.0), (2.0, None)])
def test_the_noise_of_steps_with_hardly_an_image(tiny_arrays, monkeypatch, epsilon, given):
    """24 steps on batches of one image expected, some of them empty: each has noise z C of its own."""
    drawn, batches = [], DPTrainer.batches
    monkeypatch.setattr(DPTrainer, "batches", lambda *given: drawn.extend(batches(*given)) or drawn[-24:])
    trainer, start = make(tiny_arrays, local_bs=1, clip=1e-3, epsilon=epsilon, noise_multiplier=given)
    z = given or noise_for(epsilon, 1 / 24, 24, 1e-5)
    first = flat(change_of(trainer, start, 24))
    assert len(drawn) == 24 and 0 in map(len, drawn) and max(map(len, drawn)) > 1
    assert first.std().item() == pytest.approx(z * 1e-3 * 24**0.5, rel=0.02)
    assert torch.equal(first, flat(change_of(trainer, start, 24)))
    other = flat(change_of(trainer, start, 24, round=2))   # drawn anew in every round
    assert abs(torch.corrcoef(torch.stack([first, other]))[0, 1]) < 4 / len(first)**0.5


def test_training_on_no_image_at_all(tiny_arrays, monkeypatch):
    monkeypatch.setattr(DPTrainer, "batches", lambda self, orders, indices: [torch.zeros(0, dtype=torch.int64)])
    trainer, start = make(tiny_arrays, local_steps=1)
    update = trainer.train(0, 1, np.arange(20), start, ClientState({}))
    assert update.metrics["n"] == 0 and update.client_state.steps == 1
    assert flat(update.upload).isfinite().all() and not torch.equal(flat(update.upload), flat(start))


@pytest.mark.parametrize("images, changes, steps", [
    (810, {"rounds": 5, "local_ep": 2}, 130),   # by hand: 5 x 2 x ceil(810 / 64)
    (810, {"rounds": 5, "local_steps": 7, "finetune_ep": [1, 2]}, 74), (50, {"rounds": 3}, 3)])
def test_three_accountants_agree_on_epsilon(images, changes, steps):
    """Ours is at most the target and Opacus' numerical one, within 1 %; Renyi DP is looser, in both libraries."""
    options = {**OPTIONS, "local_bs": 64, "epsilon": 8.0, "noise_multiplier": None, **changes}
    rate, z = min(1, 64 / images), dp_training.noise_multiplier(options, images)
    assert dp_training.steps_of(options, images) == steps and dp_training.sampling_rate(options, images) == rate
    epsilon = composed_epsilon(z, rate, steps, 1e-5)
    assert 0.99 * 8 < epsilon <= 8

    def of_opacus(accountant):
        accountant.history = [(z, rate, steps)]
        return accountant.get_epsilon(delta=1e-5)
    if rate < 1:   # else it is not defined
        assert epsilon - 0.001 <= of_opacus(PRVAccountant()) <= 1.01 * epsilon
    event = dp.SelfComposedDpEvent(dp.PoissonSampledDpEvent(rate, dp.GaussianDpEvent(z)), steps)
    renyi = RdpAccountant().compose(event).get_epsilon(1e-5)
    assert of_opacus(RDPAccountant()) == pytest.approx(renyi, rel=0.01) and epsilon < renyi < 1.2 * epsilon


def test_clients_of_other_sizes_have_the_same_epsilon(tiny_arrays):
    facts = make(tiny_arrays, epsilon=2.0, noise_multiplier=None)[0].facts([40, 16, 40])["privacy"]
    small, large = facts["noise_multiplier"]
    assert 1.98 < facts["epsilon"] <= 2 and facts["delta"] == 1e-5 and facts["clip"] == 0.5
    assert (large, small) == tuple(dp_training.noise_multiplier(
        {**OPTIONS, "epsilon": 2.0, "noise_multiplier": None}, n) for n in (16, 40))
    assert small < 0.9 * large
    given = make(tiny_arrays)[0].facts([40, 16])["privacy"]   # of the small client, with one noise for all
    assert given["epsilon"] == composed_epsilon(2.0, 0.5, 2, 1e-5) > composed_epsilon(2.0, 0.2, 5, 1e-5)


def test_clients_are_never_trained_in_threads(tiny_arrays, monkeypatch):
    """Their trainer would be another one, without noise."""
    monkeypatch.setattr("engine.clients.threads_for", lambda trainer: 2)
    trainer, start = make(tiny_arrays)
    trained = dict(train_each(trainer, 1, {0: np.arange(20), 1: np.arange(20, 40)}, start,
                              lambda client: ClientState({}), None))
    own = trainer.train(0, 1, np.arange(20), start, ClientState({}))
    assert torch.equal(flat(trained[0].upload), flat(own.upload)) and len(trained) == 2


@pytest.fixture(scope="module")
def trained(tmp_path_factory, make_place, tiny_arrays):
    runs = {"run": (*FLAGS, "--save_rounds", 1), "observed": (*FLAGS, "--clip", 0.1, "--noise_multiplier", 0.05)}
    return Attacked(make_place(tmp_path_factory.mktemp("dp")), tiny_arrays, membership,
                    ("--references", 1, "--draws", 1), runs)


def test_a_run_is_resumed_to_the_same_bytes_but_not_for_more_rounds(trained, capsys):
    place, folder = trained.place, trained.results("run")
    config = json.loads((folder / "config.json").read_text())
    assert config["privacy"]["epsilon"] <= config["options"]["epsilon"] == 8
    assert config["precision"] == "torch.float32"
    assert "--rounds 3: the noise of --method" in place.refuses(capsys, *FLAGS, "--rounds", 3, "--resume")
    expected = place.clients_csv()
    place.unfinish(2)
    assert place.main(*FLAGS, "--resume") == 0 and place.clients_csv() == expected
    assert json.loads((folder / "config.json").read_text())["privacy"] == config["privacy"]


@pytest.mark.parametrize("flags, line", [
    (("--precision", "bf16"), "--precision bf16: "), (("--new_clients", 0.4), "--new_clients 0.4: "),
    (("--stack", 2), "--stack 2: "),
    (("--epsilon", 1e-12, "--delta", 1e-12), "--epsilon 1e-12: too small")])
def test_what_does_not_fit_is_refused(place, capsys, flags, line):
    assert line in place.refuses(capsys, *FLAGS, *flags)
    assert not place.models.exists()


@pytest.mark.parametrize("rule", [("--aggregation", "median"), ("--secure_aggregation",)])
def test_any_rule_may_follow_what_is_private_already(place, rule):
    assert place.main(*FLAGS, "--rounds", 1, *rule, "--noise_multiplier", 1, "--finetune_ep", 1) == 0
    assert set(pd.read_csv(place.results / "rounds.csv")["stage"]) == {"trained", "deployed", "finetuned_1"}


def test_the_clip_and_the_noise_are_in_what_is_observed(trained):
    victim, (x, y) = trained.victim("observed"), trained.images("observed", 2)
    network = victim.network(victim.sent_next)
    loss = torch.nn.functional.cross_entropy(network(x[:1]).logits, y[:1])
    clean = torch.cat([value.flatten() for value in torch.autograd.grad(loss, list(network.parameters()))])
    assert clean.norm() > 0.1
    for images, sigma in ((1, 0.1 * 0.05), (2, 0.1 * 0.05 / 2)):   # over the size of the batch
        seen = flat(victim.update(x[:images], y[:images], 0.1))
        assert seen.std().item() == pytest.approx(sigma, rel=0.03)
        assert not torch.equal(seen, flat(victim.update(x[:images], y[:images], 0.1)))
    seen = flat(victim.update(x[:1], y[:1], 0.1))
    assert (seen @ clean / clean.norm()).item() == pytest.approx(0.1, abs=4 * 0.1 * 0.05)   # clipped to 0.1


@pytest.mark.slow
def test_accuracy_falls_with_epsilon(place):
    accuracy = {}
    for epsilon in (1000, 4, 0.1):
        assert place.main(*FLAGS, "--partition", "iid", "--local_ep", 4, "--local_bs", 8, "--lr", 3e-3,
                          "--epsilon", epsilon, "--overwrite") == 0
        rounds = pd.read_csv(place.results / "rounds.csv").query("stage == 'deployed'")
        accuracy[epsilon] = rounds["accuracy"].iloc[-1]
    assert accuracy[1000] > accuracy[4] + 0.05 > accuracy[0.1] + 0.1, accuracy


def test_membership_is_inferred_against_references_that_have_its_noise(trained, monkeypatch):
    made, noise = [], dp_training.noise_multiplier
    monkeypatch.setattr(dp_training, "noise_multiplier", lambda *given: made.append(given) or noise(*given))
    assert trained.attack("run", "--clients", 0) == 0
    assert set(trained.csv("run", "membership.csv")["attack"]) == {"loss", "rmia", "fedmia"} and made
