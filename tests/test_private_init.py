"""Encoders that start from a client's secret, ``--private_init``: in training, and what adversaries know."""
import json

import pytest
import torch

from attack import adversaries
from engine.clients import Clients
from methods import METHODS, PRIVATE_INIT
from options import args_parser, readers
from runs.checkpoints import ClientStore, load_checked
from update import ClientState

FLAGS = ("--private_init", "--prior", "class", "--num_users", 5, "--new_clients", 0.2, "--frac", 0.5,
         "--aggregation", "mean")
SHAPE, CLASSES, OPTIONS = (1, 8, 8), 4, {"seed": 1, "init_logvar": -2.5, "prior": "class", "private_init": True}


@pytest.fixture(scope="module")
def still(tmp_path_factory, make_place):
    """A run of one round in which parameters hardly move; two of five clients train in it."""
    place = make_place(tmp_path_factory.mktemp("still"))
    assert place.main(*FLAGS, "--rounds", 1, "--lr", 1e-12, "--new_ep", 1) == 0
    return place


def weights(state):
    """The weights of an encoder, whose biases all start equal, by name without ``encoder.``."""
    return {name.removeprefix("encoder."): value for name, value in state.items()
            if name.endswith("weight") and not name.startswith("classifier.")}


def alike(one, other):
    return {name for name, value in one.items() if torch.allclose(value, other[name], atol=1e-6)}


def test_each_client_begins_with_an_encoder_of_its_own_and_the_rest_is_common(still):
    common, states = still.target().seeded, [
        still.saved(1, f"client_{k}.pt")["parameters"] for k in range(5)]   # 4 takes part in no round
    trained = still.saved(1, "shared.pt")["clients"]
    assert len(trained) == 2
    for k, state in enumerate(states):
        own = weights(state)
        assert len(own) == 5
        for other in (common, *states[:k]):
            assert not alike(own, weights(other))
        equal = alike(state, common)
        assert {"prior.mu", "prior.logvar"} <= equal and not weights(dict.fromkeys(equal))
        assert alike(state, still.target().private(0, k).parameters) == state.keys()
    sent = still.saved(1, "shared.pt")["sent"]
    assert sent and all(torch.equal(value, common[name]) for name, value in sent.items())


def test_a_start_is_drawn_like_the_methods_own_and_nobody_elses_draw_moves():
    row = METHODS["rve_pfl"]
    torch.manual_seed(0)
    common, before = row.build(SHAPE, CLASSES, OPTIONS).state_dict(), torch.get_rng_state()
    first, second = (row.own_start(SHAPE, CLASSES, OPTIONS, client) for client in (3, 2))
    assert torch.equal(torch.get_rng_state(), before)
    again = row.own_start(SHAPE, CLASSES, OPTIONS, 3)
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    for other in (second, row.own_start(SHAPE, CLASSES, {**OPTIONS, "seed": 2}, 3)):
        assert not alike(weights(first), weights(other))
    for name, value in first.items():
        if name.endswith("bias"):
            assert (value == (-2.5 if "logvar" in name else 0)).all()
        else:
            assert value.std().item() == pytest.approx(common[name].std().item(), rel=0.2)


@pytest.mark.parametrize("method", readers(PRIVATE_INIT, METHODS))
def test_what_a_client_shares_is_never_its_own(method):
    row = METHODS[method]
    parameters = row.build(SHAPE, CLASSES, OPTIONS).state_dict()
    own = row.own_start(SHAPE, CLASSES, OPTIONS, 0)
    layers = {name.split(".")[1] for name in own}
    assert layers == {"rve_pfl_trunk": {"mu", "logvar"}, "lg_fedavg": {"trunk", "mu"}}.get(
        method, {"trunk", "mu", "logvar"})
    assert own.keys() <= row.shared_and_private(parameters)[1].keys() and all(
        name.startswith("encoder.") for name in own)
    assert not row.own_start(SHAPE, CLASSES, {**OPTIONS, "private_init": False}, 0)
    coded = row.own_start(SHAPE, CLASSES, {**OPTIONS, "prior": "categorical"}, 0)
    assert "encoder.means" not in coded and ("encoder.code.weight" in coded or method == "lg_fedavg")
    if method != "local":   # with nothing private in the first round, nothing is a client's own
        assert not row.own_start(SHAPE, CLASSES, {**OPTIONS, "full_sharing_rounds": 1}, 0)


def test_without_the_option_all_begin_alike(place):
    assert place.main("--rounds", 1, "--num_users", 3, "--frac", 0.4, "--aggregation", "mean") == 0
    assert json.loads((place.results / "config.json").read_text())["options"]["private_init"] is False
    target, trained = place.target(), place.saved(1, "shared.pt")["clients"]
    idle = [place.saved(1, f"client_{k}.pt")["parameters"] for k in {0, 1, 2} - set(trained)]
    start = target.start(0).state_dict()
    assert len(idle) == 2
    for state in (*idle, target.private(0, 0).parameters, start):
        assert all(torch.equal(value, target.seeded[name]) for name, value in state.items())


def test_an_interrupted_run_goes_on_to_the_byte(place):
    """Some clients train for the first time after it."""
    flags = (*FLAGS, "--rounds", 3, "--save_rounds", 1, "--new_ep", 1)
    assert place.main(*flags) == 0
    first, last = (set(place.saved(round, "shared.pt")["clients"]) for round in (1, 3))
    late = f"client_{min(last - first)}.pt"
    expected = place.clients_csv(), place.saved(3, late)["parameters"]
    place.unfinish(3)
    assert place.main(*flags, "--resume") == 0 and place.clients_csv() == expected[0]
    saved = place.saved(3, late)["parameters"]
    assert all(torch.equal(value, saved[name]) for name, value in expected[1].items())


def test_a_new_client_begins_with_its_own_encoder_behind_the_head_and_alone(still, monkeypatch):
    begun = {}
    monkeypatch.setattr(Clients, "_further", lambda self, trainer, number, client, stage, images, shared, state: (
        begun.update({stage: (client, state)}), [])[1])
    assert still.main(*FLAGS, "--rounds", 1, "--lr", 1e-12, "--new_ep", 1, "--overwrite") == 0
    own = still.target().own_start(4)
    for stage in ("new_10", "alone_all"):
        client, state = begun[stage]
        assert client == 4 and alike(own, state.parameters) == own.keys() != set()
        assert state.parameters.keys() > own.keys()   # with its priors


def test_starts_are_drawn_when_asked_for_and_not_kept(tmp_path):
    """A store of many clients holds no encoder of those that never trained."""
    asked = []

    def own_start(client):
        asked.append(client)
        return {"encoder.x": torch.full((3,), float(client))}
    store = ClientStore(tmp_path / "spill", ClientState({"encoder.x": torch.zeros(3), "prior.x": torch.ones(3)}),
                        own_start=own_start)
    assert store.get(7).parameters["encoder.x"][0] == 7 and store.get(7).parameters["prior.x"][0] == 1
    store.put(8, ClientState({"encoder.x": -torch.ones(3), "prior.x": torch.ones(3)}, 5))
    assert store.get(8).parameters["encoder.x"][0] == -1
    store.commit()
    store.export((7, 8), tmp_path)
    files = [load_checked(tmp_path / f"client_{k}.pt")["parameters"] for k in (7, 8)]
    assert [state["encoder.x"][0] for state in files] == [7, -1]
    assert asked == [7, 7, 7] and store.kept.keys() == {8}


def test_an_adversary_guesses_a_start_and_is_not_given_it(still):
    guesses = []
    for seed in (1, 5):
        target = still.target(seed=seed)
        target.require(0)
        server = weights(adversaries.hold(target, "curious_server", 0, 2).encoder.state_dict())
        start = target.start(0).state_dict()
        for known in (server, weights(start)):
            assert len(known) == 5
            for k in range(5):
                assert not alike(known, weights(target.private(0, k).parameters))
        guesses.append(server)
        stolen = adversaries.hold(target, "stolen_model", 0, 2).encoder.state_dict()
        client = adversaries.hold(target, "curious_client", 0, 2, own=3).encoder.state_dict()
        assert torch.equal(stolen["mu.weight"], target.private(0, 2).parameters["encoder.mu.weight"])
        assert torch.equal(client["mu.weight"], target.private(0, 3).parameters["encoder.mu.weight"])
        assert all(torch.equal(start[name], value) for name, value in target.seeded.items()
                   if not name.startswith("encoder."))
    assert not alike(*guesses)


def test_the_option_can_be_turned_off():
    assert args_parser(["--private_init"]).private_init is True
    for words in (["--no-private_init"], ["--full_sharing_rounds", "2", "--no-private_init"], [],
                  ["--encoders_from", "run", "--no-private_init"], ["--method", "fedavg"]):
        assert args_parser(words).private_init is False
