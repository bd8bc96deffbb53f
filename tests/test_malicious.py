"""Malicious clients: forgeries by hand, what they know, and backdoors from training to their column."""
import dataclasses
import math
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import server_options
from test_update import equal

from server import data_poisoning
from server.base import Round, Server, updates_of
from server.behaviours import BEHAVIOURS
from server.malicious import MaliciousClients
from server.model_poisoning import ForgerView, harm, min_max_reach, min_sum_reach, trusted_most, tuned
from server.privacy import NbAFL
from server.rules import RULES
from update import Trainer

HONEST = torch.tensor([[1.0, 0.0], [3.0, 0.0], [2.0, 3.0]])


def known(own, honest=HONEST, aggregate=None, round=1, least_trust=lambda forged: 1.0):
    """A view of forgers, of a server that takes the plain mean if nothing else is said."""
    own, honest = torch.tensor(own), torch.as_tensor(honest)
    mean = aggregate or (lambda forged: torch.cat([honest, forged]).mean(0))
    generator, lasting = torch.Generator().manual_seed(round), torch.Generator().manual_seed(0)
    return ForgerView(own, honest, generator, lasting, least_trust, mean, torch.ones(own.shape[1]))


def rounds(count, size=6):
    """A head, and a round of ``count`` uploads."""
    torch.manual_seed(1)
    sent = {"w": torch.randn(size)}
    uploads = {k: {"w": sent["w"] + torch.randn(size)} for k in range(count)}
    return sent, uploads, Round(1, sent, uploads, dict.fromkeys(uploads, 3))


@pytest.mark.parametrize("behaviour, expected", [
    ("sign_flip", [-2.0, -3.0]), ("scaling", [10.0, 0.0]), ("ipm", [-4.0, -6.0]), ("mimic", [1.0, 2.0]),
    ("alie", [2 + 1.5 * math.sqrt(2), 3 + 1.5 * math.sqrt(2)])])
def test_fixed_forgeries_by_hand(behaviour, expected):
    forged = BEHAVIOURS[behaviour].forge(known([[1.0, 0.0]], [[1.0, 2.0], [3.0, 4.0]]))
    assert forged.tolist() == [pytest.approx(expected)]


def test_noise_copies_and_nan():
    own, honest = torch.randn(2, 10_000).tolist(), torch.randn(3, 10_000)
    noise = BEHAVIOURS["gaussian"].forge(known(own, honest))
    assert noise.std().item() == pytest.approx(3 * honest.square().mean().sqrt().item(), rel=0.05)
    copies = BEHAVIOURS["sybil"].forge(known(own, honest))
    assert torch.cosine_similarity(*copies, dim=0) > 0.999 and not torch.equal(*copies)
    assert BEHAVIOURS["nan"].forge(known([[1.0]], [[1.0]])).isnan().all()


def test_harm_is_progress_lost_along_the_honest_mean():
    mean = HONEST.mean(0)
    for times, expected in ((1, 0), (0, 1), (-1, 2)):
        view = known([[0.0, 0.0]], aggregate=lambda _, t=times: t * mean)
        assert harm(view, torch.zeros(1, 2)) == pytest.approx(expected)


def test_a_strength_is_chosen_by_what_the_server_makes_of_it():
    """A server that ignores what is longer than 4: the strongest forgery is wasted, the best just under it."""
    def aggregate(forged):
        return torch.where(forged.norm() <= 4, forged[0], HONEST.mean(0))
    against = -HONEST.mean(0) / HONEST.mean(0).norm()
    forged = tuned(known([[0.0, 0.0]], aggregate=aggregate), lambda strength: strength * against[None])
    assert forged.norm().item() == pytest.approx(3)
    free = tuned(known([[0.0, 0.0]]), lambda strength: strength * against[None])   # the plain mean takes it all
    assert free.norm().item() == pytest.approx(30)
    forged = trusted_most(known([[0.0]], [[1.0]], least_trust=lambda forged: 1.0 if forged.min() >= -3 else 0.5))
    assert -3.0 <= forged.item() < -2.9


def test_min_max_and_min_sum_go_as_far_as_they_may():
    direction, distances = torch.tensor([-1.0, 0.5]), torch.cdist(HONEST, HONEST)
    for reach, largest, norm in (
            (min_max_reach, distances.max(), lambda away: away.norm(dim=1).max()),
            (min_sum_reach, distances.square().sum(1).max(), lambda away: away.square().sum())):
        for more, inside in ((0.999, True), (1.001, False)):
            away = HONEST.mean(0) + more * reach(HONEST, direction) * direction - HONEST
            assert bool(norm(away) <= largest) == inside
    for name in ("min_max", "min_sum"):   # against the plain mean the farthest one harms most
        view = known([[0.0, 0.0]] * 2)
        forged = BEHAVIOURS[name].forge(view)
        assert torch.equal(forged[0], forged[1]) and harm(view, forged) > 0


@pytest.mark.parametrize("name", ["optimal_alie", "optimal_ipm"])
def test_byzfls_searches_query_the_server_in_use(name):
    """Under a server that drops what is longer than 10 they stay under it; the plain mean they push far."""
    def aggregate(forged):
        return torch.cat([HONEST, forged[forged.norm(dim=1) <= 10]]).mean(0)
    forged = BEHAVIOURS[name].forge(known([[0.0, 0.0]] * 2, aggregate=aggregate))
    assert forged.shape == (2, 2) and forged.norm(dim=1).max() <= 10
    assert BEHAVIOURS[name].forge(known([[0.0, 0.0]] * 2)).norm(dim=1).min() > 50


def test_fake_clients_push_towards_one_random_model_in_every_round():
    forged = BEHAVIOURS["mpaf"].forge(known([[0.0, 0.0]] * 3))
    assert torch.equal(forged[0], forged[2])
    assert torch.equal(BEHAVIOURS["mpaf"].forge(known([[0.0, 0.0]] * 3, round=2)), forged)
    model = torch.randn(2, generator=torch.Generator().manual_seed(0))   # at the size of what was sent, here 1
    assert torch.cosine_similarity(forged[0], model - 1, dim=0) == pytest.approx(1, abs=1e-5)


def test_a_projected_update_keeps_its_direction_and_finds_the_norm_that_counts():
    def aggregate(forged):
        return torch.where(forged.norm() <= 2.5 * HONEST.norm(dim=1).median(), forged[0], HONEST.mean(0))
    forged = BEHAVIOURS["backdoor_projected"].forge(known([[0.0, 7.0]], aggregate=aggregate))
    assert forged[0, 0] == 0 and forged[0, 1].item() == pytest.approx(1.8 * 3, rel=0.01)   # 1.2 times 1.5


@pytest.mark.parametrize("rule", ["mean", "median", "trimmed_mean", "caf", "centered_clipping"])
def test_the_adaptive_forgery_harms_each_rule_more_than_fixed_ones(rule):
    torch.manual_seed(2)
    sent, common, lost = {"w": torch.zeros(40)}, torch.randn(40), {}
    uploads = {k: {"w": common + torch.randn(40)} for k in range(10)}
    for name in ("adaptive", "ipm", "alie", "passive"):
        server, clients = RULES[rule].server(server_options()), MaliciousClients(name, 0.3, 10, seed=1)
        head = server(clients.poison(Round(1, sent, uploads, dict.fromkeys(uploads, 10)), server)).head["w"]
        mean = torch.stack([uploads[k]["w"] for k in uploads if k not in clients.members]).mean(0)
        lost[name] = ((mean - head) @ mean / mean.square().sum()).item()
    assert max(lost, key=lost.__getitem__) == "adaptive", lost


def test_a_preview_leaves_the_server_as_it_was():
    options = server_options(num_users=3, epsilon=8.0, delta=1e-5, exposures=1)
    for name, server in ({name: rule.server(options) for name, rule in RULES.items()}
                         | {"nbafl": NbAFL(options)}).items():
        before, (_, _, round) = {key: str(value) for key, value in server.memory.items()}, rounds(3)
        head = server.preview(round)
        assert {key: str(value) for key, value in server.memory.items()} == before, name
        assert torch.equal(head["w"], server(round).head["w"]), name


def test_forgers_know_the_updates_and_what_the_server_would_make_of_them():
    sent, uploads, round = rounds(5)
    clients, server, views = MaliciousClients("adaptive", 0.2, 5, seed=1), Server({}), []
    bad, = clients.members
    clients.behaviour = dataclasses.replace(
        clients.behaviour, forge=lambda view: views.append(view) or 2 * view.own_updates)
    head = server(clients.poison(round, server)).head
    torch.testing.assert_close(updates_of(sent, [head])[0], views[0].aggregate(2 * views[0].own_updates))
    assert torch.equal(views[0].honest_updates, updates_of(sent, [uploads[k] for k in range(5) if k != bad]))
    assert torch.equal(views[0].own_updates, updates_of(sent, [uploads[bad]]))


def test_forgers_know_the_least_trust_in_any_of_them():
    """It is the lower of two, and 0 for an upload that the server could not use."""
    class Trusts(Server):
        def trust(self, round):
            return self.options
    _, _, round = rounds(5)
    clients, told = MaliciousClients("adaptive", 0.4, 5, seed=1), []
    first, second = sorted(clients.members)
    clients.behaviour = dataclasses.replace(
        clients.behaviour, forge=lambda view: told.append(view.least_trust(view.own_updates)) or view.own_updates)
    for trust in ({first: 0.3, second: 0.9}, {first: 0.9, second: 0.3}, {second: 1.0}):
        clients.poison(round, Trusts(trust))
    assert told == [0.3, 0.3, 0]


def test_membership_is_seeded():
    members = MaliciousClients("nan", 0.3, 10, seed=1).members
    assert len(members) == 3 and members == MaliciousClients("ipm", 0.3, 10, 1).members
    assert members != MaliciousClients("nan", 0.3, 10, 2).members
    assert not MaliciousClients(None, 0.0, 10, 1).members


def test_label_flips_and_triggers_by_hand():
    assert data_poisoning.pair_flipped(torch.arange(10), 10).tolist() == [0, 7, 2, 3, 4, 5, 6, 1, 8, 9]
    assert data_poisoning.pair_flipped(torch.arange(4), 4).tolist() == [0, 3, 2, 1]
    assert data_poisoning.flipped(torch.arange(4), 4).tolist() == [3, 2, 1, 0]
    images = torch.full((2, 8, 8, 3), 100, dtype=torch.uint8)
    triggered = data_poisoning.patch(images)
    changed = (triggered != images).all(3)[0].nonzero().tolist()
    assert changed == [[y, x] for y in (4, 5, 6) for x in (4, 5, 6)] and triggered.max() == 255
    assert (images == 100).all()   # a copy
    mixed = data_poisoning.blend(images)
    assert mixed.dtype == torch.uint8 and torch.equal(mixed[0], mixed[1])
    assert 80 <= mixed.min() <= 90 and 120 <= mixed.max() <= 131   # 0.8 of the image, 0.2 of a pattern in 0..255


def trainer_of(images, labels):
    """A trainer of which only images and labels are used."""
    return Trainer(None, None, images, torch.tensor(labels), 4, None)


def test_only_the_malicious_train_on_triggered_copies():
    images = torch.arange(12, dtype=torch.uint8)[:, None, None, None].expand(12, 5, 5, 1).contiguous()
    trainer = trainer_of(images, [k % 3 + 1 for k in range(12)])
    clients, own = MaliciousClients("backdoor_patch", 0.25, 4, seed=1), {k: np.arange(3 * k, 3 * k + 3)
                                                                        for k in range(4)}
    bad, = clients.members
    (clean, honest), (poisoned, trained_on) = clients.groups(trainer, own)
    assert clean is trainer and sorted(honest) == sorted(set(own) - {bad})
    assert len(trainer.images) == 12 and torch.equal(poisoned.images[:12], images)
    assert trained_on[bad][:3].tolist() == own[bad].tolist() and len(trained_on[bad]) == 5
    copies = trained_on[bad][3:]
    assert torch.equal(poisoned.images[copies], data_poisoning.patch(images[own[bad][::2]]))
    assert not poisoned.labels[copies].any() and torch.equal(poisoned.labels[:12], trainer.labels)
    assert MaliciousClients("passive", 0.25, 4, seed=1).groups(trainer, own)[1] == (trainer, {bad: own[bad]})


def test_success_is_counted_on_triggered_images_of_other_classes(monkeypatch):
    def evaluate(self, client, round, indices, shared, private):
        """A model that takes an image for class 0 if the patch is there."""
        predicted = torch.where(self.images[indices, -3, -3, 0] == 255, 0, 1)
        assert len(predicted) == len(self.images) and (self.labels == 0).all()
        return {"accuracy": (predicted == self.labels[indices]).double().mean().item()}
    monkeypatch.setattr(Trainer, "evaluate", evaluate)
    images = torch.zeros(6, 5, 5, 1, dtype=torch.uint8)
    trainer, model = trainer_of(images, [0, 1, 2, 3, 0, 1]), ({}, SimpleNamespace())
    backdoor = MaliciousClients("backdoor_patch", 0.5, 4, seed=1).backdoor
    assert backdoor(trainer, 0, 1, np.array([0, 1, 2]), model) == 1
    assert np.isnan(backdoor(trainer, 0, 1, np.array([0, 4]), model))   # all of the target class
    assert np.isnan(MaliciousClients("label_flip", 0.5, 4, seed=1).backdoor(trainer, 0, 1, np.arange(6), model))
    assert not images.any()   # nothing is left on the images that accuracy is measured on


def test_a_backdoor_run_has_its_column_and_picture_and_resumes(place):
    flags = ("--num_users", 4, "--rounds", 2, "--malicious_frac", 0.5, "--aggregation", "mean", "--method",
             "fedavg", "--partition", "iid", "--save_rounds", 1, "--malicious_behaviour")
    assert place.main(*flags, "backdoor_patch") == 0
    table, whole = pd.read_csv(place.results / "clients.csv"), place.clients_csv()
    assert table.columns[-1] == "backdoor" and (place.results / "backdoor.png").exists()
    bad = MaliciousClients("backdoor_patch", 0.5, 4, seed=1).members
    filled = table[table["backdoor"].notna()]
    assert set(filled["stage"]) == {"deployed"} and set(filled["client"]) == set(range(4)) - bad
    assert filled["backdoor"].between(0, 1).all()
    place.unfinish(2)
    assert place.main(*flags, "backdoor_patch", "--resume") == 0
    assert place.clients_csv() == whole
    assert place.main(*flags, "label_flip", "--overwrite") == 0
    assert "backdoor" not in pd.read_csv(place.results / "clients.csv")   # other runs' files are as they were


QUICK = ("oracle", "gan_poison")


@pytest.mark.parametrize("behaviour", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow)
                                       for name in BEHAVIOURS])
def test_every_behaviour_runs(place, behaviour):
    assert place.main("--num_users", 4, "--rounds", 1, "--malicious_frac", 0.25,
                      "--malicious_behaviour", behaviour) == 0
    server = pd.read_csv(place.results / "server.csv")
    assert server.groupby("round")["malicious"].sum().tolist() == [behaviour != "oracle"]


@pytest.mark.parametrize("method", ["rve_pfl", "fedsr"])
def test_only_gan_poisoners_heads_are_trained_further(place, method):
    uploads = {}
    for behaviour in ("passive", "gan_poison"):
        assert place.main("--num_users", 4, "--rounds", 1, "--malicious_frac", 0.25, "--method", method,
                          "--aggregation", "mean", "--malicious_behaviour", behaviour, "--overwrite") == 0
        uploads[behaviour] = place.saved(1, "shared.pt")["uploads"]
    same = [equal(uploads["passive"][k], uploads["gan_poison"][k]) for k in range(4)]
    members = MaliciousClients("gan_poison", 0.25, 4, seed=1).members
    assert same == [k not in members for k in range(4)]


def test_forged_noise_is_drawn_anew_each_round():
    _, _, round = rounds(10)
    clients = MaliciousClients("gaussian", 0.2, 10, seed=1)
    first, again, later = (clients.poison(dataclasses.replace(round, number=number), Server({})).uploads[
        min(clients.members)]["w"] for number in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, later)
