"""Differential privacy on uploads and broadcast: NbAFL's noise, and client-level DP.

Clipping and noise are simulated at the server; ``receive`` is what a client would do before it uploads.
"""
import math
import statistics
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch

from devices import torch_rng
from server.base import Aggregated, Round, Server, State, Weighting, is_finite
from utils import InputError, participants, rng

SPACING = 0.05   # discretisation of privacy losses, as a share of their scale frac / z
MAX_NOISE_MULTIPLIER = 1e6


def norm(state: State) -> float:
    """Return the L2 norm of all parameters as one vector."""
    return math.sqrt(sum(value.double().square().sum().item() for value in state.values()))


def clipped(state: State, clip: float) -> State:
    """Return ``state * min(1, clip / ||state||)``; the vector is scaled as a whole."""
    factor = min(1.0, clip / max(norm(state), 1e-30))
    return {name: value * factor for name, value in state.items()}


def noisy(state: State, sigma: float, seed: int, purpose: str, client: int, round: int) -> State:
    """Return ``state + N(0, sigma^2 I)``, drawn from (seed, purpose, client, round)."""
    generator = torch_rng(seed, purpose, client, round)
    return {name: value + sigma * torch.randn(value.shape, generator=generator, dtype=value.dtype)
            for name, value in state.items()}


def difference(state: State, other: State) -> State:
    """Return ``state - other``."""
    return {name: value - other[name] for name, value in state.items()}


def nbafl_sigmas(options: Mapping[str, Any], clip: float, smallest: int) -> tuple[float, float]:
    """Return the standard deviations of NbAFL's uplink and downlink noise (Wei et al. 2020, arXiv 1911.00222).

    ``sigma_U = c L Ds / eps`` with ``c = sqrt(2 ln(1.25 / delta))`` and ``Ds = 2 C / m``; ``sigma_D = 2 c C
    sqrt(T^2 - L^2 N) / (m N eps)`` where ``T > L sqrt(N)``, else 0 (theorem 1). C is the clip, m the smallest
    local data set, L the exposures, T the rounds and N the clients.
    """
    epsilon, exposures, clients = options["epsilon"], options["exposures"], participants(options)
    c = math.sqrt(2 * math.log(1.25 / options["delta"]))
    uplink = c * exposures * (2 * clip / smallest) / epsilon
    excess = options["rounds"]**2 - exposures**2 * clients
    return uplink, 2 * c * clip * math.sqrt(max(excess, 0)) / (smallest * clients * epsilon)


class NbAFL(Server):
    """Noise before aggregation: each upload is clipped and noised, and so is the head that the server sends."""

    protects = True

    def __init__(self, options: Mapping[str, Any], smallest: int = 1):
        super().__init__(options, smallest)
        if options["clip"] is not None:
            self.memory["clip"] = options["clip"]

    @property
    def facts(self) -> dict[str, object]:
        """Return C and both sigmas once C is known, and the limits of the nominal epsilon."""
        options = self.options
        why = ("the classical Gaussian mechanism's formula holds for epsilon under 1 only, and 2C/m does not "
               "bound the change by several local epochs")
        if options["frac"] < 1:
            why += "; both sigmas are those of all clients training in every round"
        facts = {"epsilon_nominal": options["epsilon"], "delta": options["delta"],
                 "exposures": options["exposures"], "smallest": self.smallest,
                 "clip_from": "median norm of round 1's uploads" if options["clip"] is None else "--clip",
                 "why_nominal": why}
        if "clip" in self.memory:
            uplink, downlink = self._sigmas()
            facts |= {"clip": self.memory["clip"], "sigma_uplink": uplink, "sigma_downlink": downlink}
        return facts

    def __call__(self, round: Round) -> Aggregated:
        """Aggregate a round; without ``--clip``, C is the median norm of the first uploads."""
        norms = [norm(upload) for upload in round.uploads.values() if is_finite(upload)]
        if "clip" not in self.memory and norms:
            self.memory["clip"] = statistics.median(norms)
        return super().__call__(round)

    def receive(self, round: Round) -> dict[int, State]:
        """Clip the uploaded parameters themselves, then add the uplink noise."""
        if "clip" not in self.memory:   # no finite upload has come yet
            return round.uploads
        clip, (sigma, _), seed = self.memory["clip"], self._sigmas(), self.options["seed"]
        return {k: noisy(clipped(upload, clip), sigma, seed, "uplink", k, round.number)
                for k, upload in round.uploads.items()}

    def release(self, round: Round, total: State) -> State:
        """Return the mean with the downlink noise."""
        if not round.uploads:
            return total
        return noisy(total, self._sigmas()[1], self.options["seed"], "downlink", 0, round.number)

    def _sigmas(self) -> tuple[float, float]:
        return nbafl_sigmas(self.options, self.memory["clip"], self.smallest)


class ClientDP(Server):
    """Client-level DP with a trusted server (McMahan et al. 2018, arXiv 1710.06963; Geyer et al. 2017).

    Clients are drawn by Poisson sampling. Their updates are clipped to S and summed, with noise of standard
    deviation ``z S``, and divided by the expected number of clients. A client's size is private too.
    """

    protects = True

    def __init__(self, options: Mapping[str, Any], smallest: int = 1):
        super().__init__(options, smallest)
        self.expected = options["frac"] * participants(options)   # m
        self.z = options["noise_multiplier"] or calibrated(options)
        self.sum_multiplier = self.z   # noise of the sum, in units of the clipping norm
        self.memory["clip"] = options["clip"]

    @property
    def facts(self) -> dict[str, object]:
        """Return the guarantee and its noise."""
        return {"epsilon": epsilon_of(self.z, self.options), "delta": self.options["delta"],
                "noise_multiplier": self.z,
                "accountant": "dp-accounting, PLD, Poisson sampling, add or remove one client",
                "clip": self.memory["clip"],
                "sigma_of_the_mean": self.sum_multiplier * self.memory["clip"] / self.expected}

    def weigh(self, round: Round) -> Weighting:
        """Return uniform weights."""
        return Weighting(dict.fromkeys(round.uploads, 1.0), self.memory)

    def receive(self, round: Round) -> dict[int, State]:
        """Clip the updates."""
        return {k: {name: round.sent[name] + value for name, value in
                    clipped(difference(upload, round.sent), self.memory["clip"]).items()}
                for k, upload in round.uploads.items()}

    def combine(self, round: Round, weighting: Weighting) -> State:
        """Return ``head + (sum of clipped updates + N(0, (z S)^2)) / m``, also when nobody was sampled."""
        total = {name: sum((upload[name] - value for upload in round.uploads.values()), torch.zeros_like(value))
                 for name, value in round.sent.items()}
        sigma = self.sum_multiplier * self.memory["clip"]
        total = noisy(total, sigma, self.options["seed"], "client dp", 0, round.number)
        return {name: value + total[name] / self.expected for name, value in round.sent.items()}


class AdaptiveClientDP(ClientDP):
    """``ClientDP`` whose clipping norm follows the median update norm (Andrew et al. 2021, arXiv 1905.03871).

    Each client also uploads a bit b_k, which is 1 if its update was within C, and ``(sum_k (b_k - 1/2) + N(0,
    sigma_b^2)) / m`` moves C to ``C exp(-0.2 times that)``. Centred, one client changes the sum by 1/2, not by 1.
    The bits' noise ``sigma_b = m / 20`` is paid for by the sum's: ``z_D = (z^-2 - (2 sigma_b)^-2)^(-1/2)``
    (theorem 1), which needs ``m > 10 z``. An upload that is seen not to be finite adds 0 to both sums.
    """

    def __init__(self, options: Mapping[str, Any], smallest: int = 1):
        super().__init__(options, smallest)
        self.sigma_bits = self.expected / 20
        if self.z >= 2 * self.sigma_bits:
            raise InputError(
                f"--method client_dp_adaptive: a noise multiplier of {self.z:.3g} needs more than "
                f"{10 * self.z:.3g} clients per round, and there are {self.expected:g}; use more clients, "
                "a larger --epsilon, or --method client_dp")
        self.sum_multiplier = (self.z**-2 - (2 * self.sigma_bits)**-2) ** -0.5   # z_D

    def __call__(self, round: Round) -> Aggregated:
        """Aggregate as ``ClientDP``, then move C by the centred bits of the finite updates; of all, if secure."""
        norms = [norm(difference(upload, round.sent)) for upload in round.uploads.values()
                 if self.secure or is_finite(upload)]
        centred = sum((value <= self.memory["clip"]) - 0.5 for value in norms)
        aggregated = super().__call__(round)
        drawn = rng(self.options["seed"], "clipping bits", round=round.number).normal(0, self.sigma_bits)
        self.memory["clip"] *= math.exp(-0.2 * (centred + drawn) / self.expected)
        return aggregated


def epsilon_of(z: float, options: Mapping[str, Any]) -> float:
    """Return the epsilon of a run at noise multiplier ``z``, for its ``frac``, ``rounds`` and ``delta``."""
    return composed_epsilon(z, options["frac"], options["rounds"], options["delta"])


@cache
def composed_epsilon(z: float, rate: float, releases: int, delta: float) -> float:
    """Return the epsilon of ``releases`` sums with noise ``z``, each over a Poisson sample at ``rate``."""
    import dp_accounting as dp  # slow to import, and only these methods need it
    from dp_accounting.pld import PLDAccountant
    from dp_accounting.rdp import RdpAccountant

    if rate < 1:
        event = dp.SelfComposedDpEvent(dp.PoissonSampledDpEvent(rate, dp.GaussianDpEvent(z)), releases)
    else:   # Gaussian releases together are one, whose inverse variance is the sum (Dong et al. 2022, cor. 3.3)
        z, releases = z / math.sqrt(releases), 1
        event = dp.GaussianDpEvent(z)
    spacing = SPACING * rate / z
    if spacing > 100 or releases > 3e5 * z:   # losses overflow an exponential, or memory; Renyi DP bounds them
        accountant = RdpAccountant(orders=[1.05, 1.1, 1.2, 1.5, *range(2, 64)])
    else:
        accountant = PLDAccountant(value_discretization_interval=spacing)
    return float(accountant.compose(event).get_epsilon(delta))


def calibrated(options: Mapping[str, Any]) -> float:
    """Return the smallest noise multiplier that keeps a run within ``--epsilon``, to 0.1 %."""
    return noise_for(options["epsilon"], options["frac"], options["rounds"], options["delta"])


@cache
def noise_for(epsilon: float, rate: float, releases: int, delta: float) -> float:
    """Return the inverse of ``composed_epsilon`` in z, to 0.1 %.

    Raises:
        InputError: epsilon is too small for any noise multiplier up to MAX_NOISE_MULTIPLIER.
    """
    from scipy.optimize import brentq

    def excess(log_z: float) -> float:
        return math.log(max(composed_epsilon(math.exp(log_z), rate, releases, delta), 1e-3 * epsilon) / epsilon)
    low, step, tolerance = 0.0, 1.0, 5e-4
    while excess(low) <= 0:   # too much noise
        low -= step
    high = low + step
    while excess(high) > 0:
        low, high = high, high + step
        if high > math.log(MAX_NOISE_MULTIPLIER):
            raise InputError(f"--epsilon {epsilon:g}: too small to be kept to over {releases} noisy sums; give a "
                             "larger one, or --noise_multiplier")
    return math.exp(brentq(excess, low, high, xtol=tolerance, rtol=1e-12) + tolerance)
