"""Shared parameters by round: the encoder's trunk, everything in full sharing rounds; and what that gives away."""
import json
import shutil
import signal

import pytest
import torch

from attack import adversaries, attacks, observations, scoring
from attack import target as targets
from attack.adversaries import Adversary, Budget, PublicImages
from engine.processes import Ranks
from engine.signals import Interrupted
from methods import METHODS
from models import RVE
from runs.checkpoints import load_checked
from utils import rng

TRUNK = "encoder.trunk."


def checkpoint_of(place, round, name):
    return load_checked(place.models / f"round_{round}" / name)


def test_the_trunk_is_shared_and_the_posterior_stays(place):
    assert place.main("--method", "rve_pfl_trunk", "--prior", "class", "--rounds", 1) == 0
    uploads = checkpoint_of(place, 1, "shared.pt")["uploads"]
    kept = checkpoint_of(place, 1, "client_0.pt")["parameters"]
    assert all(name.startswith(("classifier.", TRUNK)) for name in uploads[0])
    assert any(name.startswith(TRUNK) for name in uploads[0])
    assert {name.rsplit(".", 1)[0] for name in kept} == {"encoder.mu", "encoder.logvar", "prior"}
    head = checkpoint_of(place, 1, "server.pt")["head"]   # two clients of the same size
    mean = {name: (uploads[0][name] + uploads[1][name]) / 2 for name in head}
    assert all(torch.allclose(head[name], value, atol=1e-6) for name, value in mean.items())


@pytest.mark.parametrize("method", [m for m, row in METHODS.items() if any(
    option.name == "full_sharing_rounds" for option in row.reads)])
def test_everything_is_shared_in_full_sharing_rounds_and_stays_after_them(place, method):
    flags = ("--method", method, "--full_sharing_rounds", 2, "--save_rounds", 1, 2, 3, "--num_users", 4,
             "--frac", 0.5)
    assert place.main(*flags) == 0
    for round in (1, 2):
        shared, client = checkpoint_of(place, round, "shared.pt"), checkpoint_of(place, round, "client_0.pt")
        assert any(name.startswith("encoder.mu") for name in shared["sent"]) and not client["parameters"]
        assert not checkpoint_of(place, round, "server.pt")["private_start"]
    before, after = checkpoint_of(place, 2, "server.pt"), checkpoint_of(place, 3, "server.pt")
    sent, start = checkpoint_of(place, 3, "shared.pt")["sent"], after["private_start"]
    assert not sent.keys() & start.keys() and "encoder.mu.weight" in start
    assert {**sent, **start}.keys() == before["head"].keys()   # parted, and nothing lost or changed
    assert all(torch.equal(value, before["head"][name]) for name, value in {**sent, **start}.items())
    trained = checkpoint_of(place, 3, "shared.pt")["uploads"]
    for k in range(4):
        own = checkpoint_of(place, 3, f"client_{k}.pt")["parameters"]
        assert all(torch.equal(own[name], start[name]) for name in own) == (k not in trained)


@pytest.mark.parametrize("kept", [1, 2, 3])
def test_a_run_with_full_sharing_rounds_and_a_class_prior_is_resumed_to_the_byte(place, kept):
    flags = ("--method", "rve_pfl_trunk", "--prior", "class", "--full_sharing_rounds", 2, "--rounds", 4,
             "--num_users", 4, "--frac", 0.6)
    assert place.main(*flags) == 0
    expected = place.clients_csv()
    last = checkpoint_of(place, 4, "client_3.pt")["parameters"]
    assert place.main(*flags, "--overwrite", "--save_rounds", kept) == 0
    shutil.rmtree(place.models / "round_4")
    config = place.results / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "status": "unfinished"}))
    assert place.main(*flags, "--resume") == 0 and place.clients_csv() == expected
    assert all(torch.equal(last[name], value)
               for name, value in checkpoint_of(place, 4, "client_3.pt")["parameters"].items())


def test_an_interruption_in_the_first_round_after_the_full_sharing_ones(place, driver, monkeypatch):
    """The checkpoint is of the last full sharing round, in which nobody had an encoder of its own."""
    flags = ("--full_sharing_rounds", 1, "--rounds", 3, "--num_users", 4, "--frac", 0.5)
    assert place.main(*flags) == 0
    expected, aggregate = place.clients_csv(), Ranks.aggregate

    def interrupted(self, server, round):
        if round.number == 2:
            raise Interrupted(signal.SIGINT)
        return aggregate(self, server, round)
    monkeypatch.setattr(Ranks, "aggregate", interrupted)
    assert place.main(*flags, "--overwrite") == 130
    assert not checkpoint_of(place, 1, "client_0.pt")["parameters"]
    monkeypatch.undo()
    assert place.main(*flags, "--resume") == 0 and place.clients_csv() == expected


@pytest.fixture(scope="module")
def shared(tmp_path_factory, make_place):
    """A run whose trunk travels after a warm round."""
    place = make_place(tmp_path_factory.mktemp("sharing"))
    assert place.main("--method", "rve_pfl_trunk", "--full_sharing_rounds", 1, "--rounds", 2, "--save_rounds", 1,
                      "--local_ep", 3) == 0
    return place


def open_run(place):
    return targets.open_target("run", place.folder / "results", place.folder / "models", place.folder / "data")


def test_what_the_server_knows_of_an_encoder(shared):
    target = open_run(shared)
    whole, part = (adversaries.hold(target, "curious_server", round, 0) for round in (1, 2))
    upload = target.shared(1)["uploads"][0]
    assert whole.encoder is not None and not whole.known
    assert torch.equal(whole.encoder.state_dict()["mu.weight"], upload["encoder.mu.weight"])
    assert part.encoder is None and all(name.startswith("trunk.") for name in part.known) and part.known
    client = adversaries.hold(target, "curious_client", 2, 0, own=1)   # its posterior, behind the trunk sent
    assert torch.equal(client.encoder.state_dict()["mu.weight"],
                       target.private(2, 1).parameters["encoder.mu.weight"])
    warm = load_checked(target.file(2, "server.pt"))["private_start"]
    start = target.start(2).state_dict()
    assert all(torch.equal(start[name], value) for name, value in warm.items())
    assert not torch.equal(target.start(1).state_dict()["encoder.mu.weight"], warm["encoder.mu.weight"])


def test_images_come_out_of_a_trunks_gradient(shared):
    """What sharing the trunk costs: one image's gradient gives the image, as with FedAvg."""
    target = open_run(shared)
    numbers = rng(0, "images").permutation(target.owned()[0][0])[:4]
    x = torch.from_numpy(target.data.images[numbers]).permute(0, 3, 1, 2).float() / 255
    y = torch.from_numpy(target.data.labels[numbers]).long()
    view = adversaries.hold(target, "curious_server", 2, 0)
    public = PublicImages(torch.rand(20, 1, 8, 8), torch.arange(20) % 4)
    budget = Budget(2, 300, 1, 2, 1e-3, 10)
    adversary = Adversary(view, target.start(2), public, 1e-5, budget)
    attack = attacks.ATTACKS["trunk_analytic"]
    observed = attack.observe(observations.Victim(target, 2, 0), x, y, budget)
    found, labels = attack.solve(adversary, observed, 4)
    assert torch.equal(labels, y)
    assert scoring.similarity(found[0], x)["psnr"].mean() > 20 > scoring.similarity(
        public.images[:4], x)["psnr"].mean()


def test_the_bound_of_a_class_prior_has_the_labels_entropy(place):
    assert place.main("--prior", "class", "--rounds", 2, "--num_users", 2) == 0
    target = open_run(place)
    images = torch.rand(6, 1, 8, 8)
    labels = torch.tensor([0, 0, 0, 1, 1, 1])
    noise = observations.Victim(target, 2, 0).noise(images, labels)
    assert noise["bound_nats"] == pytest.approx(noise["kl_nats"] + torch.tensor(2.0).log().item())
    other = observations.Victim(target, 2, 0).noise(images, 1 - labels)
    assert other["kl_nats"] != noise["kl_nats"]
    model = METHODS["rve_pfl"].build((1, 8, 8), 4, target.options)
    assert isinstance(model, RVE) and model.predict(images)[1] is None
