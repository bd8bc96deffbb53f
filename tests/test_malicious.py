"""What malicious clients do: newer forgeries by hand, and backdoors from training to the column of it."""
import dataclasses
import shutil
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from server import forging, triggers
from server.base import Round, Server, Setting, moved, updates_of
from server.forging import ForgerView, harm, min_max_reach, min_sum_reach, tuned
from server.malicious import BEHAVIOURS, MaliciousClients, pair_flipped
from server.privacy import NbAFL
from server.rules import RULES
from update import Trainer

HONEST = torch.tensor([[1.0, 0.0], [3.0, 0.0], [2.0, 3.0]])


def known(own, honest=HONEST, aggregate=None, round=1):
    """What forgers know, of a server that takes the plain mean if nothing else is said."""
    own = torch.tensor(own)
    mean = aggregate or (lambda forged: torch.cat([honest, forged]).mean(0))
    drawn, lasting = torch.Generator().manual_seed(round), torch.Generator().manual_seed(0)
    return ForgerView(own, honest, drawn, lasting, lambda forged: 1.0, mean, torch.tensor([1.0, 1.0]))


def test_harm_is_progress_lost_along_the_honest_mean():
    mean = HONEST.mean(0)
    for times, expected in ((1, 0), (0, 1), (-1, 2)):
        assert harm(known([[0.0, 0.0]], aggregate=lambda _, t=times: t * mean),
                    torch.zeros(1, 2)) == pytest.approx(expected)


def test_a_strength_is_chosen_by_what_the_server_makes_of_it():
    """A server that ignores what is longer than 4: the strongest forgery is wasted, the best just under it."""
    def aggregate(forged):
        return torch.where(forged.norm() <= 4, forged[0], HONEST.mean(0))
    against = -HONEST.mean(0) / HONEST.mean(0).norm()
    forged = tuned(known([[0.0, 0.0]], aggregate=aggregate), lambda strength: strength * against[None])
    assert forged.norm().item() == pytest.approx(3)
    free = tuned(known([[0.0, 0.0]]), lambda strength: strength * against[None])   # the plain mean takes it all
    assert free.norm().item() == pytest.approx(30)


def test_min_max_and_min_sum_go_as_far_as_they_may():
    towards = torch.tensor([-1.0, 0.5])
    reach = min_max_reach(HONEST, towards)
    farthest = torch.cdist(HONEST, HONEST).max()
    for more, inside in ((0.999, True), (1.001, False)):
        away = (HONEST.mean(0) + more * reach * towards - HONEST).norm(dim=1)
        assert bool(away.max() <= farthest) == inside
    reach, most = min_sum_reach(HONEST, towards), torch.cdist(HONEST, HONEST).square().sum(1).max()
    for more, inside in ((0.999, True), (1.001, False)):
        away = (HONEST.mean(0) + more * reach * towards - HONEST).square().sum()
        assert bool(away <= most) == inside
    for name in ("min_max", "min_sum"):   # against the plain mean the farthest one harms most
        forged = BEHAVIOURS[name].forge(known([[0.0, 0.0]] * 2))
        assert torch.equal(forged[0], forged[1]) and harm(known([[0.0, 0.0]] * 2), forged) > 0


@pytest.mark.parametrize("name", ["optimal_alie", "optimal_ipm"])
def test_byzfls_searches_ask_the_server_in_use(name):
    """Under a server that drops what is longer than 10 they stay under it; the plain mean they push far."""
    def aggregate(forged):
        short = forged[forged.norm(dim=1) <= 10]
        return torch.cat([HONEST, short]).mean(0)
    asked = BEHAVIOURS[name].forge(known([[0.0, 0.0]] * 2, aggregate=aggregate))
    assert asked.shape == (2, 2) and asked.norm(dim=1).max() <= 10
    assert BEHAVIOURS[name].forge(known([[0.0, 0.0]] * 2)).norm(dim=1).min() > 50


def test_fake_clients_push_towards_one_random_model():
    forged = BEHAVIOURS["mpaf"].forge(known([[0.0, 0.0]] * 3))
    assert torch.equal(forged[0], forged[2])
    assert torch.equal(BEHAVIOURS["mpaf"].forge(known([[0.0, 0.0]] * 3, round=2)), forged)   # in every round
    base = torch.randn(2, generator=torch.Generator().manual_seed(0))   # at the size of what was sent, here 1
    assert torch.nn.functional.cosine_similarity(forged[0], base - 1, dim=0) == pytest.approx(1, abs=1e-5)


def test_a_projected_update_keeps_its_direction_and_finds_the_length_that_counts():
    def aggregate(forged):
        return torch.where(forged.norm() <= 2.5 * HONEST.norm(dim=1).median(), forged[0], HONEST.mean(0))
    forged = BEHAVIOURS["backdoor_projected"].forge(known([[0.0, 7.0]], aggregate=aggregate))
    assert forged[0, 0] == 0 and forged[0, 1].item() == pytest.approx(1.8 * 3, rel=0.01)   # 1.2 times 1.5


def test_the_adaptive_one_harms_each_rule_more_than_its_fixed_cousins():
    torch.manual_seed(2)
    sent, common = {"w": torch.zeros(40)}, torch.randn(40)
    uploads = {k: {"w": common + torch.randn(40)} for k in range(10)}
    sizes = dict.fromkeys(uploads, 10)
    for rule in ("mean", "median", "trimmed_mean", "caf", "centered_clipping"):
        lost = {}
        for name in ("adaptive", "ipm", "alie", "passive"):
            server, made = RULES[rule].server(Setting(clients=10)), MaliciousClients(name, 0.3, 10, seed=1)
            head = server(made.poison(Round(1, sent, uploads, sizes), server)).head["w"]
            mean = torch.stack([uploads[k]["w"] for k in uploads if k not in made.members]).mean(0)
            lost[name] = ((mean - head) @ mean / mean.square().sum()).item()
        assert max(lost, key=lost.__getitem__) == "adaptive", (rule, lost)


def test_asking_a_server_leaves_it_as_it_was():
    setting = Setting(clients=3, options={"clip_noise": 0.1}, epsilon=8.0, delta=1e-5, exposures=1)
    servers = {name: rule.server(setting) for name, rule in RULES.items()} | {"nbafl": NbAFL(setting)}
    for name, server in servers.items():
        before, sent = {key: str(value) for key, value in server.memory.items()}, {"w": torch.zeros(5)}
        uploads = {k: {"w": torch.full((5,), float(k + 1))} for k in range(3)}
        round = Round(1, sent, uploads, dict.fromkeys(uploads, 1))
        asked = server.preview(round)
        assert {key: str(value) for key, value in server.memory.items()} == before, name
        assert torch.equal(asked["w"], server(round).head["w"]), name


def test_a_pair_of_labels_is_exchanged():
    assert pair_flipped(torch.arange(10), 10).tolist() == [0, 7, 2, 3, 4, 5, 6, 1, 8, 9]
    assert pair_flipped(torch.arange(4), 4).tolist() == [0, 3, 2, 1]


def test_triggers_by_hand():
    images = torch.full((2, 8, 8, 3), 100, dtype=torch.uint8)
    shown = triggers.patch(images)
    changed = (shown != images).all(3)[0].nonzero().tolist()
    assert changed == [[y, x] for y in (4, 5, 6) for x in (4, 5, 6)] and shown.max() == 255
    assert (images == 100).all()   # a copy
    mixed = triggers.blend(images)
    assert mixed.dtype == torch.uint8 and torch.equal(mixed[0], mixed[1])
    assert 80 <= mixed.min() <= 90 and 120 <= mixed.max() <= 131   # 0.8 of the image, 0.2 of a pattern in 0..255


@dataclasses.dataclass
class Data(Trainer):
    """Of a trainer its images and labels alone."""


def test_only_the_malicious_train_on_triggered_copies():
    images = torch.arange(12, dtype=torch.uint8)[:, None, None, None].expand(12, 5, 5, 1).contiguous()
    trainer = Data(None, None, images, torch.arange(12) % 3 + 1, 4, None)
    made = MaliciousClients("backdoor_patch", 0.25, 4, seed=1)
    bad, = made.members
    own = {k: np.arange(3 * k, 3 * k + 3) for k in range(4)}
    (clean, honest), (liar, trained_on) = made.groups(trainer, own)
    assert clean is trainer and sorted(honest) == sorted(set(own) - {bad})
    assert len(trainer.images) == 12 and torch.equal(liar.images[:12], images)
    chosen = own[bad][::2]
    assert trained_on[bad][:3].tolist() == own[bad].tolist() and len(trained_on[bad]) == 5
    copies = trained_on[bad][3:]
    assert torch.equal(liar.images[copies], triggers.patch(images[chosen])) and not liar.labels[copies].any()
    assert torch.equal(liar.labels[:12], trainer.labels)
    assert MaliciousClients("passive", 0.25, 4, seed=1).groups(trainer, own)[1] == (trainer, {bad: own[bad]})


def test_success_is_counted_on_triggered_images_of_other_classes():
    class Asked(Data):
        def evaluate(self, client, round, indices, shared, private):
            """A model that takes an image for class 0 if the patch is there."""
            said = torch.where(self.images[indices, -3, -3, 0] == 255, 0, 1)
            assert len(said) == len(self.images) and (self.labels == 0).all()
            return {"accuracy": (said == self.labels[indices]).double().mean().item()}
    images = torch.zeros(6, 5, 5, 1, dtype=torch.uint8)
    trainer = Asked(None, None, images, torch.tensor([0, 1, 2, 3, 0, 1]), 4, None)
    model = ({}, SimpleNamespace())
    ask = MaliciousClients("backdoor_patch", 0.5, 4, seed=1).backdoor
    assert ask(trainer, 0, 1, np.array([0, 1, 2]), model) == 1
    assert np.isnan(ask(trainer, 0, 1, np.array([0, 4]), model))   # all of the target class
    assert np.isnan(MaliciousClients("label_flip", 0.5, 4, seed=1).backdoor(trainer, 0, 1, np.arange(6), model))
    assert not images.any()   # nothing is left on the images that accuracy is measured on


def test_a_backdoor_run_has_its_column_and_picture_and_resumes(place):
    flags = ("--num_users", 4, "--rounds", 2, "--malicious_frac", 0.5, "--aggregation", "mean", "--method",
             "fedavg", "--partition", "iid", "--local_ep", 8, "--save_rounds", 1)
    assert place.main(*flags, "--malicious_behaviour", "backdoor_patch") == 0
    table, whole = pd.read_csv(place.results / "clients.csv"), place.clients_csv()
    assert table.columns[-1] == "backdoor" and (place.results / "backdoor.png").stat().st_size > 1000
    bad = MaliciousClients("backdoor_patch", 0.5, 4, seed=1).members
    filled = table[table["backdoor"].notna()]
    assert set(filled["stage"]) == {"deployed"} and set(filled["client"]) == set(range(4)) - bad
    assert filled["backdoor"].between(0, 1).all()
    config = place.results / "config.json"
    config.write_text(config.read_text().replace('"finished"', '"unfinished"'))
    shutil.rmtree(place.models / "round_2")
    assert place.main(*flags, "--malicious_behaviour", "backdoor_patch", "--resume") == 0
    assert place.clients_csv() == whole
    assert place.main(*flags, "--malicious_behaviour", "label_flip", "--overwrite") == 0
    assert "backdoor" not in pd.read_csv(place.results / "clients.csv")   # other runs' files are as they were


def test_a_server_of_the_methods_own_can_be_asked_before_it_knows_its_clip(place):
    """NbAFL finds its clipping norm in the first round, which is also the first that forgers ask about."""
    for method in ("nbafl", "client_dp"):
        assert place.main("--method", method, "--num_users", 4, "--rounds", 1, "--malicious_frac", 0.25,
                          "--malicious_behaviour", "optimal_ipm", "--overwrite") == 0


def test_forgers_know_what_the_server_would_make_of_it():
    """The aggregate that they are told is the one that then comes out."""
    torch.manual_seed(1)
    sent = {"w": torch.randn(6)}
    uploads = {k: {"w": sent["w"] + torch.randn(6)} for k in range(5)}
    made, server, told = MaliciousClients("adaptive", 0.2, 5, seed=1), Server(Setting()), []

    def note(known):
        told.append(known.aggregate(2 * known.own))
        return 2 * known.own
    made.behaviour = dataclasses.replace(made.behaviour, forge=note)
    head = server(made.poison(Round(1, sent, uploads, dict.fromkeys(uploads, 3)), server)).head
    torch.testing.assert_close(updates_of(sent, [head])[0], told[0])
    bad, = made.members
    honest = [k for k in range(5) if k != bad]
    made.behaviour = dataclasses.replace(made.behaviour, forge=lambda known: told.append(known) or known.own)
    made.poison(Round(1, sent, uploads, dict.fromkeys(uploads, 3)), server)
    assert torch.equal(told[1].honest, updates_of(sent, [uploads[k] for k in honest]))
    assert torch.equal(told[1].own, updates_of(sent, [uploads[bad]]))
    assert torch.equal(moved(sent, torch.zeros(6))["w"], sent["w"]) and forging.SHARES[0] == 1.0


def test_only_the_malicious_claim_more_images():
    made = MaliciousClients("false_size", 0.4, 5, seed=1)
    uploads = {k: {"w": torch.zeros(1)} for k in range(5)}
    arrived = made.poison(Round(1, {"w": torch.zeros(1)}, uploads, dict.fromkeys(uploads, 3)), Server(Setting()))
    assert arrived.sizes == {k: 30 if k in made.members else 3 for k in range(5)}


def test_forgers_know_the_least_trust_in_any_of_them():
    """Of two the lower; none in one that the server could not use."""
    class Trusts(Server):
        def trust(self, round):
            return {k: found[k] for k in round.uploads}
    sent, told = {"w": torch.zeros(3)}, []
    uploads = {k: {"w": torch.full((3,), float(k))} for k in range(5)}
    made = MaliciousClients("adaptive", 0.4, 5, seed=1)
    one, other = sorted(made.members)
    made.behaviour = dataclasses.replace(
        made.behaviour, forge=lambda known: told.append(known.least_trust(known.own)) or known.own)
    for found in ({one: 0.3, other: 0.9}, {one: 0.9, other: 0.3}):
        found = {k: found.get(k, 0.1) for k in uploads}
        made.poison(Round(1, sent, uploads, dict.fromkeys(uploads, 1)), Trusts(Setting()))
    assert told == [0.3, 0.3]

    class Uses(Server):
        def trust(self, round):
            return {other: 1.0}
    made.poison(Round(1, sent, uploads, dict.fromkeys(uploads, 1)), Uses(Setting()))
    assert told[2] == 0
