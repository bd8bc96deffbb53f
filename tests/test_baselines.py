"""The baselines' local training, fine-tuning, local steps, and new clients: each against training by hand."""
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from test_update import FIRST, equal, make, update_of, without_draws

from attack import adversaries, members, mi_attack
from engine import clients
from engine.clients import train_each
from losses import Step
from methods import METHODS
from models import ClassPrior
from update import ClientState


def with_prox(client, weight):
    return replace(client, training=replace(client.training, options={"prox": weight}))


def test_fedprox_without_its_term_is_fedavg_and_with_it_stays_nearer(tiny_arrays):
    plain, head, private = make(tiny_arrays, "fedavg", epochs=2)
    expected = plain.train(0, 1, FIRST, head, private)
    client, *_ = make(tiny_arrays, "fedprox", epochs=2)
    lengths = []
    for weight in (0.0, 1.0, 100.0):
        trained = with_prox(client, weight).train(0, 1, FIRST, head, private)
        lengths.append(update_of(trained, head, private).norm())
        same = all(torch.allclose(trained.upload[name], value) for name, value in expected.upload.items())
        assert same == (weight == 0)
    assert lengths[0] > 1.1 * lengths[1] > 1.2 * lengths[2]


def test_fedrep_trains_the_private_layer_and_then_the_others(tiny_arrays, monkeypatch):
    client, head, private = make(tiny_arrays, "fedrep", private_ep=2)
    trained, seen = [], type(client)._step

    def step(self, *arguments):
        result = seen(self, *arguments)
        parameters = self.model.named_parameters()
        trained.append({name.split(".")[1] for name, value in parameters if value.requires_grad})
        return result
    monkeypatch.setattr(type(client), "_step", step)
    result = client.train(0, 1, FIRST, head, private)
    assert trained == 8 * [{"output"}] + 4 * [{"features"}]   # of 100 images in batches of 32
    assert result.client_state.steps == 12
    assert not equal(result.client_state.parameters, private.parameters) and not equal(result.upload, head)
    alone = replace(client, training=replace(client.training, epochs=2, private_ep=None, part="private"))
    first = alone.train(0, 1, FIRST, head, private)   # the same two epochs
    assert equal(first.client_state.parameters, result.client_state.parameters) and equal(first.upload, head)


def test_ditto_without_its_term_is_fedavg_beside_a_cnn_alone(tiny_arrays):
    client, head, private = make(tiny_arrays, "ditto", epochs=2)
    fedavg, shared, nothing = make(tiny_arrays, "fedavg", epochs=2)
    assert equal(shared, head) and set(private.parameters) == {
        name.replace("classifier", "personal") for name in head}   # both start alike
    expected = without_draws(fedavg).train(0, 1, FIRST, shared, nothing).upload
    without = with_prox(without_draws(client), 0.0).train(0, 1, FIRST, head, private)
    near = with_prox(without_draws(client), 1e3).train(0, 1, FIRST, head, private)
    for name, value in expected.items():
        own = name.replace("classifier", "personal")
        for trained in (without.upload[name], without.client_state.parameters[own], near.upload[name]):
            torch.testing.assert_close(trained, value, atol=1e-6, rtol=1e-4)

    def moved(trained):
        kept = trained.client_state.parameters
        return sum((kept[name] - value).square().sum() for name, value in private.parameters.items())
    assert moved(near) < 0.2 * moved(without)


def test_ditto_predicts_with_its_own_cnn(tiny_arrays):
    client, head, private = make(tiny_arrays, "ditto")
    broken = {name: torch.zeros_like(value) for name, value in head.items()}
    losses = [client.evaluate(0, 1, FIRST, shared, private)["loss"] for shared in (broken, head)]
    assert losses[0] == losses[1] != client.evaluate(0, 1, FIRST, head, ClientState(
        {name: torch.zeros_like(value) for name, value in private.parameters.items()}))["loss"]


def test_fedsrs_loss_is_its_three_terms(tiny_arrays):
    client, *_ = make(tiny_arrays, "fedsr", kl_weight=0.5)
    images, labels = torch.rand(6, 1, 8, 8), torch.tensor([0, 1, 2, 3, 0, 1])
    model = client.model.train()
    torch.manual_seed(3)
    whole, loss = client.objective(images, model(images, labels), labels, 1, {})
    torch.manual_seed(3)
    mu, logvar = model.classifier.posterior(images)
    z = mu + (0.5 * logvar).exp() * torch.randn_like(mu)
    by_hand = F.cross_entropy(model.classifier.output(z), labels, reduction="none")
    sigma = (0.5 * logvar).exp()   # the prior starts as N(0, I) of every class
    kl = torch.distributions.kl_divergence(torch.distributions.Normal(mu, sigma), torch.distributions.Normal(0, 1))
    torch.testing.assert_close(loss, by_hand)
    torch.testing.assert_close(whole, by_hand + 0.5 * kl.sum(1) + 0.01 * z.square().sum(1).sqrt())
    torch.testing.assert_close(model.eval().predict(images)[0], model.classifier.output(mu).softmax(1))
    assert isinstance(model.prior, ClassPrior) and not model.prior.mu.any()


@pytest.mark.parametrize("most", [1, 4])   # clients in a stack
@pytest.mark.parametrize("epochs, steps", [(2, 8), (1, 3), (2, 6)])
def test_local_steps_are_the_first_steps_of_the_epochs(tiny_arrays, epochs, steps, most):
    client, head, private = make(tiny_arrays, "fedavg", epochs=epochs, lr_warmup=0.0)
    counted = replace(client, training=replace(client.training, local_steps=steps))
    everyone = {0: FIRST, 1: FIRST}
    few = dict(train_each(counted, 1, everyone, head, lambda _: private, most))
    assert few[0].client_state.steps == steps and few[0].metrics["n"] == {8: 100, 3: 96, 6: 64}[steps]
    whole = dict(train_each(client, 1, everyone, head, lambda _: private, most))
    assert all(torch.allclose(few[0].upload[name], value, atol=1e-6) == (steps == 8)
               for name, value in whole[0].upload.items() if "output.weight" in name)


def stages(place, number):
    rows = pd.read_csv(place.results / "clients.csv")
    return {stage: part.set_index("client") for stage, part in rows[(rows["round"] == number)
                                                                   & (rows["split"] == "test")].groupby("stage")}


@pytest.fixture
def trained(monkeypatch):
    """What each call of ``train_each`` from here on trains: client, round, trainer, images, start, outcome."""
    noted = []

    def note(trainer, round, indices, sent, state_of, stack):
        for k, outcome in train_each(trainer, round, indices, sent, state_of, stack):
            noted.append((k, round, trainer, len(indices[k]), (sent, state_of(k)), outcome))
            yield k, outcome
    monkeypatch.setattr(clients, "train_each", note)
    return noted


@pytest.mark.parametrize("method", ["rve_pfl", "fedrep"])
def test_fine_tuning_changes_nothing_but_its_own_rows(place, method, trained):
    flags = ("--method", method, "--rounds", 2, "--aggregation", "mean", "--local_steps", 2)
    assert place.main(*flags) == 0
    plain, head = place.clients_csv().decode(), place.saved(2, "server.pt")["head"]
    assert place.main(*flags, "--overwrite", "--finetune_ep", 3, 1) == 0
    lines = place.clients_csv().decode().splitlines(keepends=True)
    assert "".join(line for line in lines if ",finetuned_" not in line) == plain
    assert equal(place.saved(2, "server.pt")["head"], head)
    last = stages(place, 2)
    assert not [stage for stage in stages(place, 1) if "finetuned" in stage]
    assert set(last["finetuned_1"].index) == set(last["finetuned_3"].index) == {0, 1}
    for epochs, calls in ((1, trained[-4:-2]), (3, trained[-2:])):
        for _, _, _, images, (sent, state), outcome in calls:   # each from the deployed model
            assert equal(sent, head)
            private = 5 if method == "fedrep" else 0   # epochs of its private part, which come first
            assert outcome.client_state.steps - state.steps == -(-images // 32) * (private + epochs)
    assert (last["finetuned_3"]["loss"] < last["deployed"]["loss"]).all()


def test_new_clients_fine_tune_a_whole_model_whose_private_part_does_not_predict():
    private = {name for name, row in METHODS.items() if row.shared and row.predicts_privately}
    assert private == {"rve_pfl", "rve_pfl_trunk", "lg_fedavg", "fedper", "fedrep", "ditto"}


@pytest.mark.parametrize("method", ["rve_pfl", "fedavg", "ditto"])
def test_new_clients_train_behind_the_final_head_and_alone(place, method, trained):
    assert place.main("--method", method, "--num_users", 4, "--new_clients", 0.5, "--rounds", 2, "--new_ep", 2,
                      "--local_bs", 8, "--save_rounds", 1) == 0
    final, begun = place.saved(2, "server.pt")["head"], place.saved(1, "shared.pt")
    assert set(begun["uploads"]) == {0, 1}
    kinds = {"new_0", *(f"{kind}_{size}" for kind in ("new", "alone") for size in ("10", "50", "all"))}
    rows = stages(place, 2)
    assert set(rows) == kinds | {"trained", "deployed"} and set(rows["deployed"].index) == {0, 1}
    assert all(set(rows[kind].index) == {2, 3} for kind in kinds)
    received = pd.read_csv(place.results / "clients.csv").query("stage == 'new_0' and client == 2")["loss"].item()
    trainer, (_, state) = trained[-12][2], trained[-12][4]   # of client 2
    held_out = np.load(place.results / "partition.npz")["test_2"]
    assert trainer.evaluate(2, 3, held_out, final, state)["loss"] == pytest.approx(received)
    later = [entry for entry in trained if entry[0] >= 2]
    assert len(later) == 12 and {entry[1] for entry in later} == {3}
    for behind, alone in zip([*later[:3], *later[6:9]], [*later[3:6], *later[9:]], strict=True):
        _, _, trainer, size, (sent, state), outcome = behind
        *_, by_itself, alone_size, (start, own), result = alone
        assert equal(sent, final) and equal(start, begun["sent"]) and size == alone_size
        assert trainer.training.part == ("all" if method == "fedavg" else "private")
        assert by_itself.training.options["prox"] == 0
        assert equal(outcome.upload, sent) == (method != "fedavg")   # the shared part is frozen
        if method == "ditto":   # its own CNN starts as the shared one
            sent = {name.replace("classifier", "personal"): value for name, value in sent.items()}
            assert equal(state.parameters, sent) and not equal(own.parameters, sent)
        else:
            assert equal(own.parameters, state.parameters)   # the private parameters' common start
        assert outcome.client_state.steps == result.client_state.steps == 2 * -(-later[2][3] // 8)
    assert [entry[3] for entry in later[:3]] == [10, min(50, later[2][3]), later[2][3]]


def test_new_clients_are_neither_malicious_nor_attacked(place, capsys):
    for seed in (1, 2, 3):
        assert place.main("--method", "fedavg", "--num_users", 4, "--new_clients", 0.5, "--malicious_frac", 0.5,
                          "--rounds", 1, "--new_ep", 1, "--seed", seed, "--overwrite") == 0
        assert pd.read_csv(place.results / "server.csv").groupby("round")["malicious"].sum().tolist() == [1]
    places = (f"--{name}_dir={place.folder / name}" for name in ("results", "models", "data"))
    assert mi_attack.main(["--run", "run", "--clients", "2", *places]) == 2
    assert "--clients 2: the clients that train in the run are 0 to 1" in capsys.readouterr().err


def test_attackers_of_ditto_hold_its_own_cnn_or_the_shared_one(place, trained):
    """And a reference model makes the local steps of the run."""
    assert place.main("--method", "ditto", "--rounds", 2, "--local_steps", 3) == 0
    run = place.target()
    own, upload = place.saved(2, "client_0.pt")["parameters"], place.saved(2, "shared.pt")["uploads"][0]
    for adversary, state, name in (("stolen_model", own, "personal."), ("curious_server", upload, "classifier.")):
        held = adversaries.hold(run, adversary, 2, 0).head.state_dict()
        assert equal({f"{name}{key}": value for key, value in held.items()}, state)
    steps = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(clients.Trainer, "train", lambda self, *given: (
            steps.append(self.training.local_steps), ({}, given[-1], {}))[1])
        patch.setattr(torch.nn.Module, "load_state_dict", lambda *given: None)
        for epochs in (None, 2):
            members.train_reference(run, (2, 0, epochs), 1, torch.rand(20, 1, 8, 8), torch.arange(20) % 4)
    assert steps == [3, 3, None, None]


def test_proximal_terms_by_hand(tiny_arrays):
    """Half of ``--prox`` times the squared distance to what was sent: of the shared parameters, or Ditto's own."""
    client, head, private = make(tiny_arrays, "ditto")
    client.model.load_state_dict({**head, **private.parameters})
    sent = {name: value + 0.1 for name, value in head.items()}
    step = Step(client.model, torch.empty(0), None, sent, {"prox": 2.0})
    count = sum(value.numel() for value in head.values())
    fedprox, nbafl, ditto = (METHODS[name].loss for name in ("fedprox", "nbafl_prox", "ditto"))
    for loss in (fedprox, nbafl, ditto):
        assert loss(step).item() == pytest.approx(0.01 * count, rel=1e-3)
    with torch.no_grad():
        before = fedprox(step)
        client.model.personal.output.bias += 0.1
        assert ditto(step) < before == fedprox(step)


@pytest.mark.slow
def test_private_last_layers_beat_fedavg_with_two_classes_per_client(place):
    """As Collins et al. (2021, table 1) report for FedRep, and Li et al. (2021) for Ditto."""
    accuracy = {}
    for method in ("fedavg", "fedrep", "ditto"):
        assert place.main("--dataset", "mnist10k", "--data_dir", ROOT / "data", "--method", method, "--rounds", 2,
                          "--num_users", 10, "--local_bs", 64, "--overwrite") == 0
        accuracy[method] = stages(place, 2)["deployed"]["accuracy"].mean()
    assert min(accuracy["fedrep"], accuracy["ditto"]) > accuracy["fedavg"] + 0.1, accuracy
