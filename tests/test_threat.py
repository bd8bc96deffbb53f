"""The server's threat model: rules and behaviours end to end, and what the weights see."""
import pandas as pd
import pytest

from options import BEHAVIOURS, RULES


@pytest.mark.parametrize("behaviour", BEHAVIOURS)
def test_every_behaviour_runs_under_the_threat_aware_weights(place, behaviour):
    assert place.main("--num_users", 4, "--rounds", 2, "--malicious_frac", 0.25,
                      "--malicious_behaviour", behaviour) == 0
    server = pd.read_csv(place.results / "server.csv")
    assert server.groupby("round")["malicious"].sum().tolist() == ([0, 0] if behaviour == "absent" else [1, 1])


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_runs(place, rule):
    assert place.main("--num_users", 4, "--rounds", 2, "--aggregation", rule, "--malicious_frac", 0.25,
                      "--malicious_behaviour", "nan") == 0
    deployed = pd.read_csv(place.results / "rounds.csv").query("stage == 'deployed'")
    assert deployed["accuracy"].between(0, 1).all() and deployed["loss"].notna().all()
