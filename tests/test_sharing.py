"""Shared parameters by round: the encoder's trunk, everything in full sharing rounds; and what that gives away."""
import pytest
import torch

from attack import adversaries, attacks, observations, scoring
from attack.adversaries import Adversary, Budget, PublicImages
from utils import rng

TRUNK = "encoder.trunk."


def test_the_trunk_is_shared_and_the_posterior_stays(place):
    assert place.main("--method", "rve_pfl_trunk", "--prior", "class", "--rounds", 1) == 0
    uploads, kept = place.saved(1, "shared.pt")["uploads"], place.saved(1, "client_0.pt")["parameters"]
    assert all(name.startswith(("classifier.", TRUNK)) for name in uploads[0])
    assert any(name.startswith(TRUNK) for name in uploads[0])
    assert {name.rsplit(".", 1)[0] for name in kept} == {"encoder.mu", "encoder.logvar", "prior"}


def test_everything_is_shared_in_full_sharing_rounds_and_stays_after_them(place):
    flags = ("--method", "rve_pfl", "--full_sharing_rounds", 2, "--save_rounds", 1, 2, 3, "--num_users", 4,
             "--frac", 0.5)
    assert place.main(*flags) == 0
    for round in (1, 2):
        shared, client = place.saved(round, "shared.pt"), place.saved(round, "client_0.pt")
        assert any(name.startswith("encoder.mu") for name in shared["sent"]) and not client["parameters"]
        assert not place.saved(round, "server.pt")["private_start"]
    before, after = place.saved(2, "server.pt"), place.saved(3, "server.pt")
    sent, start = place.saved(3, "shared.pt")["sent"], after["private_start"]
    assert not sent.keys() & start.keys() and "encoder.mu.weight" in start
    assert {**sent, **start}.keys() == before["head"].keys()   # parted, and nothing lost or changed
    assert all(torch.equal(value, before["head"][name]) for name, value in {**sent, **start}.items())
    trained = place.saved(3, "shared.pt")["uploads"]
    for k in range(4):
        own = place.saved(3, f"client_{k}.pt")["parameters"]
        assert all(torch.equal(own[name], start[name]) for name in own) == (k not in trained)


@pytest.fixture(scope="module")
def shared(tmp_path_factory, make_place):
    """A run whose trunk travels after a warm round."""
    place = make_place(tmp_path_factory.mktemp("sharing"))
    assert place.main("--method", "rve_pfl_trunk", "--full_sharing_rounds", 1, "--rounds", 2, "--save_rounds", 1,
                      "--local_ep", 3) == 0
    return place


def test_what_the_server_knows_of_an_encoder(shared):
    target = shared.target()
    whole, part = (adversaries.hold(target, "curious_server", round, 0) for round in (1, 2))
    upload = target.shared(1)["uploads"][0]
    assert whole.encoder is not None and not whole.known
    assert torch.equal(whole.encoder.state_dict()["mu.weight"], upload["encoder.mu.weight"])
    assert part.encoder is None and all(name.startswith("trunk.") for name in part.known) and part.known
    client = adversaries.hold(target, "curious_client", 2, 0, own=1)   # its posterior, behind the trunk sent
    assert torch.equal(client.encoder.state_dict()["mu.weight"],
                       target.private(2, 1).parameters["encoder.mu.weight"])
    warm = shared.saved(2, "server.pt")["private_start"]
    start = target.start(2).state_dict()
    assert all(torch.equal(start[name], value) for name, value in warm.items())
    assert not torch.equal(target.start(1).state_dict()["encoder.mu.weight"], warm["encoder.mu.weight"])


def test_images_come_out_of_a_trunks_gradient(shared):
    """One image's gradient gives the image, as with FedAvg: the price of sharing the trunk."""
    target = shared.target()
    numbers = rng(0, "images").permutation(target.owned()[0][0])[:4]
    x, y = target.pixels(numbers), target.labels(numbers)
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
    assert place.main("--prior", "class", "--rounds", 2) == 0
    target = place.target()
    images, labels = torch.rand(6, 1, 8, 8), torch.tensor([0, 0, 0, 1, 1, 1])
    noise = observations.Victim(target, 2, 0).noise(images, labels)
    assert noise["bound_nats"] == pytest.approx(noise["kl_nats"] + torch.tensor(2.0).log().item())
    assert observations.Victim(target, 2, 0).noise(images, 1 - labels)["kl_nats"] != noise["kl_nats"]
