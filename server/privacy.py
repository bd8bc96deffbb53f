"""Differential privacy on what travels: NbAFL's noise on uploads and broadcast, and client-level DP.

Noise and clipping are simulated where the server is, from generators of their own, so that a run resumes to
the same draws; ``receive`` is what a client would do before its upload leaves it.
"""
import math
import statistics
from dataclasses import replace
from functools import cache

import torch
from torch import Tensor

from server.base import Aggregated, Round, Server, Setting, State, Weighting, is_finite, required
from utils import InputError, rng, torch_rng

SPACING = 0.05   # of the privacy losses that are accounted for, as a share of their scale frac / z
MOST_Z = 1e6     # the largest noise multiplier


def norm(state: State) -> float:
    """L2 norm of all parameters as one vector."""
    return math.sqrt(sum(value.double().square().sum().item() for value in state.values()))


def clipped(state: State, clip: float) -> State:
    """``state * min(1, clip / ||state||)``: the whole vector is scaled, not its elements one by one."""
    factor = min(1.0, clip / max(norm(state), 1e-30))
    return {name: value * factor for name, value in state.items()}


def noisy(state: State, sigma: float, seed: int, purpose: str, client: int, round: int) -> State:
    """``state + N(0, sigma^2 I)``, drawn from (seed, purpose, client, round)."""
    generator = torch_rng(seed, purpose, client, round)
    return {name: value + sigma * torch.randn(value.shape, generator=generator, dtype=value.dtype)
            for name, value in state.items()}


def nbafl_sigmas(clip: float, smallest: int, epsilon: float, delta: float, exposures: int, rounds: int,
                 clients: int) -> tuple[float, float]:
    """Standard deviations of NbAFL's uplink and downlink noise (Wei et al. 2020, arXiv 1911.00222).

    ``sigma_U = c L Ds / eps`` with ``c = sqrt(2 ln(1.25 / delta))`` and ``Ds = 2 C / m``; ``sigma_D = 2 c C
    sqrt(T^2 - L^2 N) / (m N eps)`` where ``T > L sqrt(N)``, else 0 (theorem 1).

    Args:
        clip: C, the bound on the norm of what a client uploads.
        smallest: m, images of the smallest local data set.
        exposures: L, how often a client's upload is seen.
        rounds: T.
        clients: N.
    """
    c = math.sqrt(2 * math.log(1.25 / delta))
    uplink = c * exposures * (2 * clip / smallest) / epsilon
    excess = rounds**2 - exposures**2 * clients
    return uplink, 2 * c * clip * math.sqrt(max(excess, 0)) / (smallest * clients * epsilon)


class NbAFL(Server):
    """Noise before aggregation: each upload is clipped and noised, and so is what the server sends back."""

    protects = True

    def __init__(self, setting: Setting):
        super().__init__(setting)
        if setting.clip is not None:
            self.memory["clip"] = setting.clip

    @property
    def facts(self) -> dict[str, object]:
        """C and both sigmas once C is known, and what epsilon is worth."""
        s, found = self.setting, {}
        if "clip" in self.memory:
            uplink, downlink = self._sigmas()
            found = {"clip": self.memory["clip"], "sigma_uplink": uplink, "sigma_downlink": downlink}
        why = ("the classical Gaussian mechanism's formula holds for epsilon under 1 only, "
               "and 2C/m does not bound what several local epochs can change")
        if s.frac < 1:
            why += "; both sigmas are those of all clients training in every round"
        return {"epsilon_nominal": s.epsilon, "delta": s.delta, "exposures": s.exposures,
                "smallest": s.smallest, **found,
                "clip_from": "median norm of round 1's uploads" if s.clip is None else "--clip",
                "why_nominal": why}

    def __call__(self, round: Round) -> Aggregated:
        """As ``Server``; C is the median norm of the first uploads where it is not given."""
        norms = [norm(upload) for upload in round.uploads.values() if is_finite(upload)]
        if "clip" not in self.memory and norms:
            self.memory["clip"] = statistics.median(norms)
        return super().__call__(round)

    def receive(self, round: Round) -> dict[int, State]:
        """Clip the uploaded parameters themselves, then add the uplink noise."""
        if "clip" not in self.memory:   # nothing finite has come yet
            return round.uploads
        clip, (sigma, _), seed = self.memory["clip"], self._sigmas(), self.setting.seed
        return {k: noisy(clipped(upload, clip), sigma, seed, "uplink", k, round.number)
                for k, upload in round.uploads.items()}

    def combine(self, round: Round, judgement: Weighting) -> State:
        """The mean, with the downlink noise."""
        if not round.uploads:
            return round.sent
        head = super().combine(round, judgement)
        return noisy(head, self._sigmas()[1], self.setting.seed, "downlink", 0, round.number)

    def _sigmas(self) -> tuple[float, float]:
        s = self.setting
        return nbafl_sigmas(self.memory["clip"], s.smallest, required(s.epsilon), required(s.delta),
                            required(s.exposures), s.rounds, s.clients)


class ClientDP(Server):
    """Client-level DP with a trusted server (McMahan et al. 2018, arXiv 1710.06963; Geyer et al. 2017).

    Each round takes clients by Poisson sampling; their updates are clipped to S and summed, noise of standard
    deviation ``z S`` is added, and the sum is divided by the expected number of clients. Weights are
    uniform: a client's size is private too.
    """

    protects = True

    def __init__(self, setting: Setting):
        super().__init__(setting)
        self.expected = setting.frac * setting.clients   # m
        self.z = setting.noise_multiplier or calibrated(setting)
        self.memory["clip"] = required(setting.clip)

    @property
    def facts(self) -> dict[str, object]:
        """The guarantee and what it costs."""
        s = self.setting
        return {"epsilon": spent(self.z, s), "delta": s.delta, "noise_multiplier": self.z,
                "accountant": "dp-accounting, PLD, Poisson sampling, add or remove one client",
                "clip": self.memory["clip"],
                "sigma_of_the_mean": self.sum_multiplier() * self.memory["clip"] / self.expected}

    def judge(self, round: Round) -> Weighting:
        """Uniform weights."""
        return Weighting(dict.fromkeys(round.uploads, 1.0), self.memory)

    def receive(self, round: Round) -> dict[int, State]:
        """Clip the updates."""
        return {k: added(round.sent, clipped(difference(upload, round.sent), self.memory["clip"]))
                for k, upload in round.uploads.items()}

    def combine(self, round: Round, judgement: Weighting) -> State:
        """``head + (sum of clipped updates + N(0, (z S)^2)) / m``, noise also when nobody was sampled."""
        total = {name: torch.zeros_like(value) for name, value in round.sent.items()}
        for upload in round.uploads.values():
            total = added(total, difference(upload, round.sent))
        sigma = self.sum_multiplier() * self.memory["clip"]
        total = noisy(total, sigma, self.setting.seed, "client dp", 0, round.number)
        return {name: value + total[name] / self.expected for name, value in round.sent.items()}

    def sum_multiplier(self) -> float:
        """The sum's noise, in units of the clipping norm."""
        return self.z


class AdaptiveClientDP(ClientDP):
    """``ClientDP`` whose clipping norm follows the median update norm (Andrew et al. 2021, arXiv 1905.03871).

    Each client also says by a bit b_k whether its update was under C, and ``(sum_k (b_k - 1/2) + N(0,
    sigma_b^2)) / m`` moves C to ``C exp(-0.2 times that)``. The bits are centred before they are summed: one
    client then changes the sum by 1/2 and not by 1, and how many were sampled does not move C by itself.
    Their noise ``sigma_b = m / 20`` is paid for by the sum's: ``z_D = (z^-2 - (2 sigma_b)^-2)^(-1/2)``
    (theorem 1), which needs ``m > 10 z``. Who uploads nothing finite adds 0 to both sums, as if not sampled.
    """

    def __init__(self, setting: Setting):
        super().__init__(setting)
        self.sigma_bits = self.expected / 20
        if self.z >= 2 * self.sigma_bits:
            raise InputError(
                f"--method client_dp_adaptive: a noise multiplier of {self.z:.3g} leaves no noise for the "
                f"clipping bits of {self.expected:g} clients per round; it needs --num_users "
                f"{enough_clients(setting)} or more at --frac {setting.frac:g}, a larger --epsilon, or "
                "--method client_dp")

    def __call__(self, round: Round) -> Aggregated:
        """As ``ClientDP``, then move C by the centred bits of the finite updates."""
        norms = [norm(difference(upload, round.sent)) for upload in round.uploads.values() if is_finite(upload)]
        centred = sum((value <= self.memory["clip"]) - 0.5 for value in norms)
        aggregated = super().__call__(round)
        drawn = rng(self.setting.seed, "clipping bits", round=round.number).normal(0, self.sigma_bits)
        self.memory["clip"] *= math.exp(-0.2 * (centred + drawn) / self.expected)
        return aggregated

    def sum_multiplier(self) -> float:
        """``z_D``."""
        return (self.z**-2 - (2 * self.sigma_bits)**-2) ** -0.5


def usual_delta(clients: int) -> float:
    """Delta where it is not given: below one in the number of clients."""
    return min(0.1, clients**-1.1)


def enough_clients(setting: Setting) -> int:
    """The min_uploads clients that ``AdaptiveClientDP`` works with, at the same share per round.

    With more clients the usual delta is smaller, and the noise multiplier larger, so the search is from below.
    """
    follows = setting.delta == usual_delta(setting.clients)
    while True:
        z = setting.noise_multiplier or calibrated(setting)
        if 10 * z < setting.frac * setting.clients:
            return setting.clients
        clients = max(setting.clients, math.floor(10 * z / setting.frac)) + 1
        setting = replace(setting, clients=clients, delta=usual_delta(clients) if follows else setting.delta)


def difference(one: State, other: State) -> State:
    """``one - other``."""
    return {name: value - other[name] for name, value in one.items()}


def added(one: State, other: State) -> dict[str, Tensor]:
    """``one + other``."""
    return {name: value + other[name] for name, value in one.items()}


def spent(z: float, setting: Setting) -> float:
    """Epsilon of a run at noise multiplier ``z``, for ``setting.delta``."""
    return _epsilon(z, setting.frac, setting.rounds, required(setting.delta))


@cache
def _epsilon(z: float, frac: float, rounds: int, delta: float) -> float:
    import dp_accounting as dp  # seconds to import, and only these methods need it
    from dp_accounting.pld import PLDAccountant
    from dp_accounting.rdp import RdpAccountant

    if frac < 1:
        event = dp.SelfComposedDpEvent(dp.PoissonSampledDpEvent(frac, dp.GaussianDpEvent(z)), rounds)
    else:   # Gaussian releases together are one, whose inverse variance is the sum (Dong et al. 2022, cor. 3.3)
        z, rounds = z / math.sqrt(rounds), 1
        event = dp.GaussianDpEvent(z)
    spacing = SPACING * frac / z
    if spacing > 100 or rounds > 3e5 * z:   # losses overflow an exponential, or memory; Renyi DP bounds them
        accountant = RdpAccountant(orders=[1.05, 1.1, 1.2, 1.5, *range(2, 64)])
    else:
        accountant = PLDAccountant(value_discretization_interval=spacing)
    return float(accountant.compose(event).get_epsilon(delta))


def calibrated(setting: Setting) -> float:
    """The smallest noise multiplier that keeps a run at ``setting.epsilon``, to 0.1 %.

    Raises:
        InputError: epsilon is so small that no noise multiplier up to MOST_Z keeps to it.
    """
    return _noise(required(setting.epsilon), setting.frac, setting.rounds, required(setting.delta))


@cache
def _noise(epsilon: float, frac: float, rounds: int, delta: float) -> float:
    from scipy.optimize import brentq

    def excess(log_z: float) -> float:
        return math.log(max(_epsilon(math.exp(log_z), frac, rounds, delta), 1e-3 * epsilon) / epsilon)
    low, step, tolerance = 0.0, 1.0, 5e-4
    while excess(low) <= 0:   # too much noise
        low -= step
    high = low + step
    while excess(high) > 0:
        low, high = high, high + step
        if high > math.log(MOST_Z):
            raise InputError(f"--epsilon {epsilon:g}: too small to be kept to over {rounds} rounds; give a larger "
                             "one, or --noise_multiplier")
    return math.exp(brentq(excess, low, high, xtol=tolerance, rtol=1e-12) + tolerance)
