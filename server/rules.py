"""RULES: how uploads become the next head, one row per rule."""
from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from parsing import Option
from utils import Late

if TYPE_CHECKING:
    from server import base, robust, threat_aware
    from server.base import Server
else:
    base, robust, threat_aware = Late("server.base"), Late("server.robust"), Late("server.threat_aware")

TOLERATE = Option("tolerate", "share of the uploads that the rule assumes may be malicious", float,
                  unread=0.3, within=(0, 0.5), group="server")
CLIP_NOISE = Option("clip_noise", "norm of the noise as a share of the clipping norm", float, within=(0, 100),
                    group="server")


@dataclass(frozen=True)
class Rule:
    """One row."""

    about: str   # a few words for ``--help``
    # makes the server of a run from its options and the size of the smallest local data set
    server: Callable[..., Server]
    # the options that the rule reads, with their defaults
    reads: Mapping[Option, object] = field(default_factory=dict)
    columns: tuple[str, ...] = ()   # its columns of ``server.csv`` (``Weighting.columns``)


def robust_server(rule: robust.RobustRule) -> Callable[..., Server]:
    """Return the server of a robust rule ``(updates K x P, f) -> update P``."""
    return partial(robust.Robust, rule=rule)


RULES = {
    "threat_aware": Rule("weights that follow the threat model", threat_aware.ThreatAware,
                         columns=("norm_ratio", "cosine", "max_cosine", "trust")),
    "mean": Rule("by data size", base.Server),
    # Yin et al. 2018, arXiv 1803.01498.
    "median": Rule("coordinate-wise", robust_server(robust.median)),
    "trimmed_mean": Rule("coordinate-wise, without the largest and the smallest",
                         robust_server(robust.trimmed_mean), {TOLERATE: 0.3}),
    # Blanchard et al. 2017; byzfl's takes n - f - 1 neighbours, they take n - f - 2.
    "krum": Rule("the upload nearest to its neighbours", robust_server(robust.krum), {TOLERATE: 0.3}),
    # Weiszfeld's iteration (Pillutla et al. 2022, arXiv 1912.13445).
    "geometric_median": Rule("least sum of distances", robust_server(robust.geometric_median)),
    "centered_clipping": Rule("updates clipped around a centre", robust_server(robust.centered_clipping)),
    "nnm_trimmed_mean": Rule("trimmed mean of means of nearest neighbours", robust_server(robust.nnm_trimmed_mean),
                             {TOLERATE: 0.3}),
    "multi_krum": Rule("mean of the uploads nearest to their neighbours", robust_server(robust.multi_krum),
                       {TOLERATE: 0.3}),
    "caf": Rule("a mean filtered along the widest direction", robust_server(robust.caf), {TOLERATE: 0.3}),
    "norm_clipping": Rule("a mean of clipped updates, with noise",
                          partial(robust.NormClipping, rule=robust.clipped_mean), {CLIP_NOISE: 0.05}),
}
