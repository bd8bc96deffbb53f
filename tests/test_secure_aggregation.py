"""Secure aggregation: the run is that of the mean, and the server has nothing but the weighted sum."""
from argparse import Namespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from attacked import Attacked
from conftest import server_options
from test_update import equal, flat

from attack import adversaries, gradients, members, membership, mi_attack, observations
from attack.attacks import CLIENT_LR
from runs.checkpoints import load_checked
from server.base import Round, Server
from server.malicious import MaliciousClients
from server.privacy import AdaptiveClientDP
from utils import rng

SECURE = "--secure_aggregation"
# Clients 1 and 2 train in the first round, 0 and 1 in the second.
SOME = ("--num_users", 3, "--rounds", 2, "--save_rounds", 1, "--frac", 0.67, "--seed", 3)
ALL = ("--num_users", 3, "--rounds", 1)
RUNS = {   # each is trained with secure aggregation and without it
    "fedavg": (*SOME, "--method", "fedavg"),
    "rve_pfl": (*SOME, "--full_sharing_rounds", 1),
    "lg_fedavg": (*ALL, "--method", "lg_fedavg"),
    "nbafl": ("--num_users", 3, "--rounds", 2, "--method", "nbafl", "--clip", 12, "--epsilon", 2000),
    "client_dp": (*ALL, "--method", "client_dp", "--clip", 0.01, "--noise_multiplier", 1),
    "client_dp_adaptive": (*ALL, "--method", "client_dp_adaptive", "--noise_multiplier", 0.1),
}
NAN = (*ALL, "--method", "fedavg", SECURE, "--malicious_frac", 0.34, "--malicious_behaviour", "nan")


@pytest.fixture(scope="module")
def trained(tmp_path_factory, make_place, tiny_arrays):
    flags = ("--images", 2, "--restarts", 1, "--iterations", 15, "--train_epochs", 1)
    runs = {name: (*flags, *more) for run, flags in RUNS.items()
            for name, more in ((f"{run}-sum", (SECURE,)), (run, ("--aggregation", "mean")))}
    place = make_place(tmp_path_factory.mktemp("secure"))
    return Attacked(place, tiny_arrays, mi_attack, flags, {**runs, "nan": NAN})


def checkpoint(trained, run, round):
    """Return the files of a round by name, and read the clients' too."""
    trained.results(run)
    folder = trained.place.folder / "models" / run / f"round_{round}"
    return {path.stem: load_checked(path) for path in folder.glob("*.pt")}


def tensors(content):
    """Return every tensor in nested dictionaries."""
    if isinstance(content, dict):
        return [value for inner in content.values() for value in tensors(inner)]
    return [content] if isinstance(content, torch.Tensor) else []


@pytest.mark.parametrize("run", RUNS)
def test_the_run_is_that_of_the_mean_and_no_upload_is_stored(trained, run):
    for name in ("clients.csv", "server.csv"):
        assert (trained.results(run) / name).read_bytes() == (trained.results(f"{run}-sum") / name).read_bytes()
    for round in trained.target(run).rounds():
        plain, secure = (checkpoint(trained, name, round) for name in (run, f"{run}-sum"))
        uploads = plain["shared"]["uploads"]
        assert equal(plain["server"]["head"], secure["server"]["head"])
        assert plain["server"]["memory"] == secure["server"]["memory"]
        assert equal(plain["shared"]["sent"], secure["shared"]["sent"]) and plain["shared"]["sum"] == {}
        assert secure["shared"]["clients"] == plain["shared"]["clients"] == list(uploads)
        assert secure["shared"]["uploads"] == {} and len(uploads) > 1
        for stored in tensors(secure["shared"]) + tensors(secure["server"]):
            assert not any(torch.equal(stored, value) for value in tensors(uploads))
        for k in range(3):
            kept = trained.target(f"{run}-sum").private(round, k)   # of the round's layout, or it is refused
            assert equal(plain[f"client_{k}"]["parameters"], kept.parameters)


def test_the_sum_is_stored_as_it_arrives(trained):
    """Weighted by size, with client-level DP's noise, and without the noise that NbAFL's server adds."""
    sizes = [len(part) for part in trained.target("nbafl").owned()[0]]
    for run, round in (("lg_fedavg", 1), ("nbafl", 2)):
        uploads = trained.target(run).shared(round)["uploads"]
        total = trained.target(f"{run}-sum").shared(round)["sum"]
        mean = {name: sum(n / sum(sizes) * uploads[k][name] for k, n in enumerate(sizes)) for name in total}
        torch.testing.assert_close(total, mean, atol=1e-6, rtol=1e-5)
    assert not equal(trained.target("nbafl-sum").sent_next(2), total)
    noisy = trained.target("client_dp-sum")
    shared, sent = noisy.shared(1), noisy.sent_next(1)
    assert equal(shared["sum"], sent)
    assert (flat(sent) - flat(shared["sent"])).std().item() == pytest.approx(0.01 / 3, rel=0.05)


@pytest.mark.parametrize("flags, named", [
    (("--aggregation", "krum"), "--aggregation krum"), (("--aggregation", "threat_aware"), "single uploads"),
    (("--method", "local"), "shares nothing"), (("--method", "nbafl"), "give --clip"),
    (("--method", "nbafl_prox"), "give --clip"), (("--num_users", 1), "is one per round"),
    (("--num_users", 2, "--frac", 0.5), "is one per round")])
def test_what_needs_single_uploads_is_refused(place, capsys, flags, named):
    assert named in place.refuses(capsys, SECURE, *flags)
    assert not place.results.exists() and not place.models.exists()


def test_the_stolen_model_of_a_client_is_what_it_trained(trained):
    """Or, if it did not train in the round, the head just aggregated."""
    for round in (1, 2):
        uploads = trained.target("fedavg").shared(round)["uploads"]
        assert len(uploads) == 2
        for k in range(3):
            victim = trained.victim("fedavg-sum", round, k)
            assert equal(victim.own, uploads.get(k, victim.sent_next))
    server = adversaries.hold(trained.target("fedavg-sum"), "curious_server", 1, 2)
    assert equal(server.head.state_dict(prefix="classifier."), trained.target("fedavg-sum").shared(1)["sum"])


def test_a_resumed_run_has_the_same_bytes(trained):
    """The option need not be given again."""
    run, place = "rve_pfl-sum", trained.place
    before, clients = checkpoint(trained, run, 2), (trained.results(run) / "clients.csv").read_bytes()
    place.unfinish(2, run=run)
    assert place.main("--run_name", run, *RUNS["rve_pfl"], "--resume") == 0
    after = checkpoint(trained, run, 2)
    assert before.keys() == after.keys()
    for name, content in before.items():
        for one, other in zip(tensors(content), tensors(after[name]), strict=True):
            assert torch.equal(one, other)
    assert (trained.results(run) / "clients.csv").read_bytes() == clients


def test_the_server_cannot_leave_a_nan_upload_out(trained):
    """It keeps the head that it sent, and uses nobody's upload."""
    target = trained.target("nan")
    shared = target.shared(1)
    assert shared["clients"] == [0, 1, 2] and all(value.isnan().all() for value in shared["sum"].values())
    assert equal(target.sent_next(1), shared["sent"])
    assert (trained.csv("nan", "server.csv")["weight"] == 0).all()
    assert "no sum" in membership.obstacle(target, membership.Unit("curious_server", "sum_loss", 1, 0), [1])
    held = adversaries.hold(target, "curious_server", 1, 0).head.state_dict()   # attacked instead of a NaN
    assert equal({f"classifier.{name}": value for name, value in held.items()}, shared["sent"])


def test_adaptive_clips_follow_the_sum_of_all_bits():
    """Plain, the server leaves out the bit of an upload that is not finite."""
    sent, clips = {"w": torch.zeros(4)}, []
    for secure in (False, True):
        server = AdaptiveClientDP(server_options(num_users=3, clip=1.0, delta=0.01, noise_multiplier=0.1,
                                                 secure_aggregation=secure))
        head = server(Round(1, sent, {0: {"w": torch.ones(4) / 4}, 1: {"w": torch.full((4,), torch.nan)}},
                            {0: 1, 1: 1})).head
        assert equal(head, sent) == secure
        clips.append(server.memory["clip"])
    assert clips[1] / clips[0] == pytest.approx(np.exp(0.2 * 0.5 / 3))


def test_adaptive_attackers_may_query_the_server():
    clients, server = MaliciousClients("adaptive", 0.34, 3, seed=1), Server({SECURE[2:]: True})
    uploads = {k: {"w": torch.randn(5)} for k in range(3)}
    round = Round(1, {"w": torch.zeros(5)}, uploads, dict.fromkeys(range(3), 10))
    bad, = clients.members
    assert not torch.equal(clients.poison(round, server).uploads[bad]["w"], uploads[bad]["w"])


def others_of(target, victim, count):
    """Return the images that the other clients train on, client -> numbers."""
    draw, train = rng(target.options["seed"], "others of a sum", victim.client, victim.round), target.owned()[0]
    chosen = draw.permutation([k for k in range(3) if k != victim.client])[:target.clients_observed - 1]
    return {k: draw.permutation(train[k])[:count] for k in chosen.tolist()}


@pytest.mark.parametrize("run, clients", [("fedavg-sum", 2), ("lg_fedavg-sum", 3)])
def test_the_server_observes_the_mean_over_the_clients_of_a_round(trained, run, clients):
    """Of gradients at the head sent next, each client's behind its own encoder."""
    victim, (x, y) = trained.victim(run), trained.images(run, 2)
    target, expected = victim.target, {}
    others = others_of(target, victim, 2)
    assert len(others) == clients - 1
    for k in (0, *others):
        images, labels = (x, y) if k == 0 else (target.pixels(others[k]), target.labels(others[k]))
        network = target.network()
        network.load_state_dict({**target.sent_next(victim.round), **target.private(victim.round, k).parameters})
        F.cross_entropy(network(images, labels).logits, labels).backward()
        for name, value in network.named_parameters():
            expected[name] = expected.get(name, 0) + value.grad / clients
    seen = victim.update(x, y, CLIENT_LR)
    torch.testing.assert_close(seen, {name: expected[name] for name in target.uploaded}, atol=1e-5, rtol=1e-3)
    assert equal(seen, victim.update(x, y, CLIENT_LR))   # the others' images stay


def test_the_methods_noise_is_on_the_sum(trained):
    """NbAFL's on each upload; client-level DP's on the sum, which nobody sees without it."""
    (x, y), lr = trained.images("nbafl-sum", 1), CLIENT_LR
    victim = trained.victim("nbafl-sum")
    facts = victim.target.server(2).facts
    moved = flat(victim.sent_next).norm().item()
    noise = flat(victim.update(x, y, lr)) - flat(victim.update(x, y, lr))
    expected = (2 / 3) ** 0.5 * facts["sigma_uplink"] / lr / min(1.0, facts["clip"] / moved)
    assert noise.std().item() == pytest.approx(expected, rel=0.05)
    seen = trained.victim("client_dp-sum").update(x, y, lr)
    assert flat(seen).std().item() == pytest.approx(0.01 / 3 / lr, rel=0.05)


def test_less_is_reconstructed_from_a_sum(trained):
    ssim = {}
    for run in ("fedavg", "fedavg-sum"):
        assert trained.attack(run, "--overwrite", "--attack", "analytic", "--iterations", 40) == 0
        ssim[run] = trained.csv(run).query("control == ''")["ssim"].mean()
    assert ssim["fedavg"] > ssim["fedavg-sum"] + 0.2


@pytest.mark.parametrize("attack", ["batch", "epoch"])
def test_batches_choose_among_the_images_of_all_clients_and_so_do_controls(trained, monkeypatch, attack):
    """The attack simulates what each client does, and finds the victim's images among others, in any order."""
    given, update, victim = [], observations.Victim.update, trained.victim("fedavg-sum")
    (numbers,) = others_of(victim.target, victim, 2).values()
    others = victim.target.pixels(numbers), victim.target.labels(numbers)

    def found(adversary, change, observed, labels):
        assert labels.shape == (1, 4)   # two images of two clients
        x, y = given[-1]
        made = change(*(torch.cat(pair) for pair in zip((x, y), others, strict=True)))
        for name, value in observed[0].items():
            torch.testing.assert_close(made[name] / (2 if attack == "epoch" else 1), value, atol=1e-5, rtol=1e-3)
        return torch.stack([torch.rand_like(x[0]), x[1], torch.rand_like(x[0]), x[0]])[None], labels[0]
    monkeypatch.setattr(observations.Victim, "update", lambda self, x, y, *more, **named: given.append(
        (x, y)) or update(self, x, y, *more, **named))
    monkeypatch.setattr(gradients, "matched", found)
    assert trained.attack("fedavg-sum", "--overwrite", "--attack", attack) == 0
    table = trained.csv("fedavg-sum").set_index("control")
    assert (table.loc["", "mse"] < 1e-9).all() and (table.loc["", "nearest_rank"] == 1).all()
    assert (table.loc["foreign", "mse"] > 1e-4).all() and (table.loc["foreign", "mse"] < 0.2).all()
    assert (table.loc["", "label_match"] == 1).all()


def test_membership_by_the_fall_of_the_loss_by_hand(trained, monkeypatch):
    """In the rounds in which the client took part; losses are given by hand."""
    target = trained.target("fedavg-sum")
    losses = {(1, "sent"): 3.0, (1, "sum"): 1.0, (2, "sum"): 0.5}   # the first round's sum is sent in the second
    heads = {key: target.shared(key[0])[key[1]] for key in losses}

    def confidence(answer, images, labels):
        head = answer.args[0].state_dict(prefix="classifier.")
        p = np.exp(-losses[next(key for key in losses if equal(head, heads[key]))])
        return torch.full((len(images),), float(np.log(p / (1 - p)))).double()
    monkeypatch.setattr(members, "confidence", confidence)
    fall = {1: 2.0, 2: 0.5}
    for k in range(3):
        asked, took_part = members.asked(target, k), [r for r in (1, 2) if k in target.shared(r)["clients"]]
        by_sum, by_upload = (membership.Unit("curious_server", name, 2, k) for name in ("sum_loss", "fedmia"))
        assert "hides single uploads" in membership.obstacle(target, by_upload, [1, 2])
        assert SECURE in membership.obstacle(trained.target("fedavg"), by_sum, [1, 2])
        for r in (1, 2):
            reason = membership.obstacle(target, by_sum, [r])
            assert reason is None if r in took_part else f"client {k}" in reason
        adversary = members.MembershipAdversary(target, Namespace(draws=1, seed=1), [1, 2], 2, k)
        score = members.sum_loss("curious_server", adversary, asked.images, asked.labels)
        assert score.numpy() == pytest.approx(np.mean([fall[r] for r in took_part]))
