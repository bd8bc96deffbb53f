"""NbAFL's and client-level DP's noise: worked by hand, measured, and accounted for."""
import math
from statistics import NormalDist

import pytest
import torch
from conftest import server_options

from server.base import Round
from server.privacy import (
    AdaptiveClientDP,
    ClientDP,
    NbAFL,
    calibrated,
    epsilon_of,
    nbafl_sigmas,
    norm,
)
from utils import InputError, rng

norm_cdf = NormalDist().cdf


def state(*values):
    a, *b = map(float, values)
    return {"a": torch.tensor([a]), "b": torch.tensor([b])}


def zeros(size=40_000):
    return {"w": torch.zeros(size)}


@pytest.mark.parametrize("exposures, rounds, uplink, downlink", [
    (1, 100, 4.14e-4, 4.14e-3),      # by hand: c = sqrt(2 ln 125) = 3.1075, Ds = 2 * 20 / 6000
    (100, 100, 4.14e-2, 0.0),        # T < L sqrt(N)
    (1, 3, 4.14e-4, 0.0),            # T = 3 < sqrt(10)
    (2, 20, 8.287e-4, 7.861e-4),    # 2 c C sqrt(20^2 - 2^2 x 10) / (m N eps)
])
def test_nbafls_sigmas_by_hand(exposures, rounds, uplink, downlink):
    found = nbafl_sigmas(
        server_options(num_users=10, epsilon=50, delta=0.01, exposures=exposures, rounds=rounds), 20, 6000)
    assert found == (pytest.approx(uplink, rel=2e-3), pytest.approx(downlink, rel=2e-3))


def test_nbafl_clips_then_adds_the_noise_it_names():
    server = NbAFL(server_options(num_users=4, rounds=50, epsilon=5.0, delta=0.01, clip=3.0, exposures=2), 10)
    uplink, downlink = server.facts["sigma_uplink"], server.facts["sigma_downlink"]
    uploads = {k: {"w": torch.full((40_000,), 1.0 + k)} for k in range(4)}
    head, seen, report, _ = server(Round(1, zeros(), uploads, dict.fromkeys(range(4), 10)))
    bound = 3.0 / math.sqrt(40_000)   # each element of a clipped upload
    for k in range(4):
        assert seen[k]["w"].std().item() == pytest.approx(uplink, rel=0.03)
        assert seen[k]["w"].mean().item() == pytest.approx(bound, abs=4 * uplink / 200)
    assert not torch.equal(seen[0]["w"], seen[1]["w"])
    assert head["w"].std().item() == pytest.approx(math.hypot(uplink / 2, downlink), rel=0.03)   # 4 uploads
    assert [row["weight"] for row in report] == [0.25] * 4
    again = NbAFL(server.options, 10)(Round(1, zeros(), uploads, dict.fromkeys(range(4), 10)))
    assert torch.equal(again[0]["w"], head["w"])
    assert not torch.equal(server(Round(2, zeros(), uploads, dict.fromkeys(range(4), 10)))[0]["w"], head["w"])


def test_nbafl_takes_the_median_of_the_first_rounds_norms():
    server = NbAFL(server_options(num_users=3, epsilon=1e9, delta=0.01, exposures=1), 10)
    assert "clip" not in server.facts
    server(Round(1, state(0, 0, 0), {0: state(3, 0, 4), 1: state(0, 0, 7), 2: state(0, 0, 1)}, {0: 1, 1: 1, 2: 1}))
    assert server.facts["clip"] == 5 and "median" in server.facts["clip_from"]
    _, seen, *_ = server(Round(2, state(0, 0, 0), {1: state(0, 0, 100)}, {1: 1}))
    assert norm(seen[1]) == pytest.approx(5, abs=1e-3)
    assert server.memory == {"clip": 5}


def test_client_dp_by_hand():
    """Sum of clipped updates over the expected number of clients, not over those that came."""
    server = ClientDP(server_options(num_users=10, new_clients=0.2, frac=0.5, clip=2.0, delta=0.01,
                                     noise_multiplier=1e-3))   # 4 of those that take part
    sent = state(1, 1, 1)
    head, seen, *_ = server(Round(1, sent, {0: state(4, 1, 5), 3: state(1, 2, 1)}, {0: 10, 3: 90}))
    assert torch.allclose(seen[0]["b"], torch.tensor([[1, 1 + 4 * 2 / 5]]))      # update 3, 0, 4 of norm 5
    assert torch.allclose(head["b"], torch.tensor([[1 + 1 / 4, 1 + 1.6 / 4]]), atol=5e-3)
    assert torch.allclose(head["a"], torch.tensor([1 + 1.2 / 4]), atol=5e-3)


@pytest.mark.parametrize("sampled", [[], [0, 1, 2]])
def test_client_dps_noise(sampled):
    server = ClientDP(server_options(num_users=10, frac=0.5, clip=0.7, delta=0.01, noise_multiplier=2.0))
    head, *_ = server(Round(1, zeros(), {k: zeros() for k in sampled}, dict.fromkeys(sampled, 1)))
    assert server.facts["sigma_of_the_mean"] == pytest.approx(2.0 * 0.7 / 5)
    assert head["w"].std().item() == pytest.approx(2.0 * 0.7 / 5, rel=0.02)
    other, *_ = server(Round(2, zeros(), {k: zeros() for k in sampled}, dict.fromkeys(sampled, 1)))
    both = torch.stack([head["w"], other["w"]])
    assert abs(torch.corrcoef(both)[0, 1]) < 4 / math.sqrt(both.shape[1])   # drawn anew in every round


def delta_of_gaussians(z, epsilon, rounds):
    """Exact (Balle and Wang 2018, theorem 8)."""
    mu = math.sqrt(rounds) / z
    return norm_cdf(mu / 2 - epsilon / mu) - math.exp(epsilon) * norm_cdf(-mu / 2 - epsilon / mu)


@pytest.mark.parametrize("clients, frac, rounds, epsilon", [
    (10, 1.0, 100, 8.0), (100, 0.1, 50, 8.0), (10, 1.0, 1, 0.1)])
@pytest.mark.parametrize("kind", [ClientDP, AdaptiveClientDP])
def test_the_noise_spends_epsilon_and_no_more(kind, clients, frac, rounds, epsilon):
    """Within 1 % of the target and never over it; the adaptive server splits the same budget."""
    setting = server_options(num_users=10**6 if kind is AdaptiveClientDP else clients, frac=frac, rounds=rounds,
                      epsilon=epsilon, delta=clients**-1.1, clip=1.0)
    server = kind(setting)
    assert 0.99 * epsilon <= server.facts["epsilon"] <= epsilon
    assert server.facts["epsilon"] == epsilon_of(server.z, setting) and "PLD" in server.facts["accountant"]
    assert epsilon_of(0.99 * server.z, setting) > epsilon   # and so no smaller noise would do


@pytest.mark.parametrize("z, rounds, delta", [(5.0, 1, 1e-5), (3.0, 100, 0.01), (100.0, 5, 1e-6)])
def test_epsilon_of_gaussians_is_exact(z, rounds, delta):
    epsilon = epsilon_of(z, server_options(rounds=rounds, delta=delta))
    assert delta_of_gaussians(z, epsilon, rounds) <= delta * 1.0001
    assert delta_of_gaussians(z, 0.995 * epsilon, rounds) > delta


def test_extreme_epsilons_are_met_or_refused():
    """Abadi et al. 2016, section 3.2, have 1.26 by moments; with next to no noise Renyi DP is used."""
    assert 0.9 < epsilon_of(4.0, server_options(frac=0.01, rounds=10_000, delta=1e-5)) < 1.26
    assert 1 < epsilon_of(1e-3, server_options(rounds=3000, delta=1e-5)) / (3000 / (2 * 1e-6)) < 1.1
    setting = server_options(num_users=100_000, frac=0.01, rounds=100, epsilon=0.012, delta=1e-6)
    assert epsilon_of(calibrated(setting), setting) == pytest.approx(0.012, rel=0.01)
    with pytest.raises(InputError, match="--epsilon 1e-12: too small"):
        calibrated(server_options(num_users=100, frac=0.5, rounds=100, epsilon=1e-12, delta=1e-12))


def test_the_adaptive_norm_follows_centred_bits_whatever_the_sample():
    """Three times the expected sample, half of it under C, says nothing; who is missing says nothing."""
    setting = server_options(seed=5, num_users=100, frac=0.1, clip=1.0, delta=1e-4, noise_multiplier=0.9)
    drawn = [rng(5, "clipping bits", round=r).normal(0, 0.5) for r in (1, 2, 3)]   # sigma_b = m / 20
    server = AdaptiveClientDP(setting)
    half = {k: {"w": torch.tensor([0.5 if k % 2 else 50.0])} for k in range(30)}
    server(Round(1, zeros(1), half, dict.fromkeys(half, 1)))
    assert server.memory["clip"] == pytest.approx(math.exp(-0.2 * drawn[0] / 10))
    server(Round(2, zeros(1), {}, {}))   # nobody sampled: the noise alone
    assert server.memory["clip"] == pytest.approx(math.exp(-0.2 * sum(drawn[:2]) / 10))
    broken = {0: {"w": torch.tensor([math.nan])}, 1: {"w": torch.tensor([math.inf])},
              2: {"w": torch.tensor([0.1])}}
    server(Round(3, zeros(1), broken, dict.fromkeys(range(5), 1)))   # 3 and 4 were sampled and uploaded nothing
    assert server.memory["clip"] == pytest.approx(math.exp(-0.2 * (sum(drawn) + 0.5) / 10))


def test_the_adaptive_split_spends_what_it_should():
    """Noise on the sum and on the bits together are worth one release at z (Andrew et al., theorem 1)."""
    server = AdaptiveClientDP(server_options(num_users=100, clip=0.5, delta=1e-4, noise_multiplier=1.0))
    assert server.sigma_bits == 5 and server.sum_multiplier**-2 + (2 * 5)**-2 == pytest.approx(1.0)
    head, *_ = server(Round(1, zeros(), {k: zeros() for k in range(2)}, {0: 1, 1: 1}))
    assert head["w"].std().item() == pytest.approx(server.sum_multiplier * 0.5 / 100, rel=0.02)
    for value, bit in ((0.01, 0.5), (100.0, -0.5), (math.nan, 0)):   # the most that one client changes
        with_it, without = (AdaptiveClientDP(server.options) for _ in range(2))
        with_it(Round(1, zeros(2), {7: {"w": torch.tensor([value, 0.0])}}, {7: 1}))
        without(Round(1, zeros(2), {}, {}))
        moved = -math.log(with_it.memory["clip"] / without.memory["clip"]) * 100 / 0.2
        assert moved == pytest.approx(bit, abs=1e-6)


def test_too_few_clients_for_the_adaptive_split():
    with pytest.raises(InputError, match="more than 30 clients per round, and there are 30"):
        AdaptiveClientDP(server_options(num_users=30, clip=1.0, delta=1e-4, noise_multiplier=3.0))
    AdaptiveClientDP(server_options(num_users=31, clip=1.0, delta=1e-4, noise_multiplier=3.0))
