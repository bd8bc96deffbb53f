"""RULES: how uploads become the next head, a row a rule.

A new rule is one row: a server of its own, or ``robust(f)`` of a function from updates to an update.
"""
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

from parsing import Option
from server import robust as robust_rules
from server.mean import Server, Setting
from server.robust import Robust, RobustRule
from server.threat_aware import ThreatAware

TOLERATE = Option("tolerate", "share of the uploads that the rule is told may be malicious", float,
                  unread=0.3, within=(0, 0.5), group="server")


@dataclass(frozen=True)
class Rule:
    """One row.

    Args:
        about: a few words for ``--help``.
        server: makes the server of a run.
        reads: the options that the rule reads, with their defaults.
        whole_head: it questions heads, so that all of a head has to travel.
    """

    about: str
    server: Callable[[Setting], Server]
    reads: Mapping[Option, object] = field(default_factory=dict)
    whole_head: bool = False


def robust(rule: RobustRule) -> Callable[[Setting], Server]:
    """The server of a rule ``(updates K x P, f) -> update P`` (robust.py)."""
    return partial(Robust, rule=rule)


RULES = {
    "threat": Rule("weights that follow the threat model", ThreatAware, whole_head=True),
    "mean": Rule("by data size", Server),
    "median": Rule("coordinate-wise", robust(robust_rules.median)),
    "trimmed_mean": Rule("coordinate-wise, without the largest and the smallest",
                         robust(robust_rules.trimmed_mean), {TOLERATE: 0.3}),
    "krum": Rule("the upload nearest to its neighbours", robust(robust_rules.krum), {TOLERATE: 0.3}),
    "geometric_median": Rule("least sum of distances", robust(robust_rules.geometric_median)),
    "centered_clipping": Rule("updates clipped around a centre", robust(robust_rules.centered_clipping)),
}
