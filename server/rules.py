"""RULES: how uploads become the next head, a row a rule.

A new rule is one row: a server of its own, or ``robust_server(f)`` of a function from updates to an update.
"""
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

from parsing import Option
from server import robust
from server.base import Server, Setting
from server.robust import ClippedNoisy, Robust, RobustRule
from server.threat_aware import ThreatAware

TOLERATE = Option("tolerate", "share of the uploads that the rule is told may be malicious", float,
                  unread=0.3, within=(0, 0.5), group="server")
CLIP_NOISE = Option("clip_noise", "the noise's norm as a share of the clipping norm", float, within=(0, 100),
                    group="server")


@dataclass(frozen=True)
class Rule:
    """One row.

    Args:
        about: a few words for ``--help``.
        server: makes the server of a run.
        reads: the options that the rule reads, with their defaults.
        columns: what it adds to ``server.csv`` (``Weighting.columns``).
    """

    about: str
    server: Callable[[Setting], Server]
    reads: Mapping[Option, object] = field(default_factory=dict)
    columns: tuple[str, ...] = ()


def robust_server(rule: RobustRule) -> Callable[[Setting], Server]:
    """The server of a rule ``(updates K x P, f) -> update P`` (robust.py)."""
    return partial(Robust, rule=rule)


RULES = {
    "threat_aware": Rule("weights that follow the threat model", ThreatAware,
                   columns=("norm_ratio", "cosine", "probe", "max_cosine", "trust")),
    "mean": Rule("by data size", Server),
    "median": Rule("coordinate-wise", robust_server(robust.median)),
    "trimmed_mean": Rule("coordinate-wise, without the largest and the smallest",
                         robust_server(robust.trimmed_mean), {TOLERATE: 0.3}),
    "krum": Rule("the upload nearest to its neighbours", robust_server(robust.krum), {TOLERATE: 0.3}),
    "geometric_median": Rule("least sum of distances", robust_server(robust.geometric_median)),
    "centered_clipping": Rule("updates clipped around a centre", robust_server(robust.centered_clipping)),
    "nnm_trimmed_mean": Rule("trimmed mean of means of nearest neighbours", robust_server(robust.nnm_trimmed_mean),
                             {TOLERATE: 0.3}),
    "multi_krum": Rule("the mean of uploads near their neighbours", robust_server(robust.multi_krum),
                       {TOLERATE: 0.3}),
    "caf": Rule("a mean filtered along the widest direction", robust_server(robust.caf), {TOLERATE: 0.3}),
    "norm_clipping": Rule("a mean of clipped updates, with noise", ClippedNoisy, {CLIP_NOISE: 0.05}),
}
