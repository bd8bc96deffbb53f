"""docs/extending.md: its code blocks add rows to the tables, and what they add trains and attacks."""
import re

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT

from attack import mi_attack
from attack.attacks import ATTACKS
from methods import METHODS
from options import make_parser
from parsing import Option
from server.base import Server, Weighting
from server.malicious import BEHAVIOURS
from server.rules import RULES, Rule

BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "extending.md").read_text(), re.S)


@pytest.fixture
def extended():
    """The page's rows in the tables, for one test."""
    before, names = [(table, dict(table)) for table in (METHODS, RULES, BEHAVIOURS, ATTACKS)], {}
    for (table, _), own in zip(before, ("fedprox", "clipped_mean", "turned", "nearest_latent"), strict=True):
        table.pop(own, None)   # in the copy of somebody who followed the page
    sizes = [len(table) for table, _ in before]
    for block in BLOCKS:
        exec(compile(block, "docs/extending.md", "exec"), names)
    assert [len(table) for table, _ in before] == [size + 1 for size in sizes]   # a row each
    yield names
    for table, old in before:
        table.clear()
        table.update(old)


def test_a_method_of_ones_own_trains_and_its_option_is_known(extended, place, capsys):
    assert "--mu MU" in make_parser().format_help()
    uploads = {}
    for mu in (0, 1000):
        assert place.main("--method", "fedprox", "--mu", mu, "--rounds", 1, "--overwrite") == 0
        shared = torch.load(place.models / "round_1" / "shared.pt", weights_only=True)
        uploads[mu] = sum((value - shared["sent"][name]).square().sum().item()
                          for name, value in shared["uploads"][0].items())
    assert 0 < uploads[1000] < 0.5 * uploads[0]   # held near what was sent
    capsys.readouterr()
    assert "--mu" in place.refuses(capsys, "--method", "fedavg", "--mu", 1, "--overwrite")
    assert "--mu" in place.refuses(capsys, "--method", "fedprox", "--mu", -1, "--overwrite")


def test_without_its_weight_fedprox_is_fedavg(extended, place):
    """The same draws and the same numbers, so nothing else sets the new row apart."""
    csvs = []
    for flags in (("--method", "fedprox", "--mu", 0), ("--method", "fedavg")):
        assert place.main(*flags, "--overwrite") == 0
        csvs.append(place.clients_csv())
    assert csvs[0] == csvs[1]


def test_a_rule_of_ones_own_aggregates(extended, place):
    updates = torch.tensor([[3.0, 4.0], [0.0, 1.0], [0.0, 2.0]])   # of norms 5, 1 and 2
    assert extended["clipped_mean"](updates, 0).tolist() == pytest.approx([1.2 / 3, 4.6 / 3])
    assert place.main("--aggregation", "clipped_mean") == 0
    assert pd.read_csv(place.results / "server.csv")["weight"].isna().all()


def test_a_behaviour_of_ones_own_forges(extended, place):
    flags = ("--rounds", 1, "--malicious_frac", 0.5, "--aggregation", "mean", "--overwrite")
    heads = {}
    for behaviour in ("passive", "turned"):
        assert place.main(*flags, "--malicious_behaviour", behaviour) == 0
        heads[behaviour] = torch.load(place.models / "round_1" / "shared.pt", weights_only=True)
    bad, = set(pd.read_csv(place.results / "server.csv").query("malicious == 1")["client"])
    for name, sent in heads["turned"]["sent"].items():
        honest, forged = (heads[behaviour]["uploads"][bad][name] for behaviour in ("passive", "turned"))
        torch.testing.assert_close(forged, 2 * sent - honest)


def test_an_attack_of_ones_own_is_scored(extended, place, tiny_arrays, capsys):
    np.savez(place.folder / "data" / "other.npz", **{
        name: np.flip(part, 2) if "images" in name else part for name, part in tiny_arrays.items()})
    assert place.main("--rounds", 1) == 0
    folders = [f"--{name}_dir={place.folder / where}" for name, where in (
        ("data", "data"), ("results", "results"), ("models", "models"))]
    assert mi_attack.main(["--run", "run", "--adversary", "stolen_model", "--attack", "nearest_latent",
                           "--images", "2", "--public", "other", *folders]) == 0
    table = pd.read_csv(place.results / "attack.csv", keep_default_na=False)
    own = table[table["control"] == ""]
    assert set(own["attack"]) == {"nearest_latent"} and len(own) == 2


def test_a_rule_with_an_option_and_a_column_of_its_own(place):
    class Shortest(Server):
        def judge(self, round):
            share = self.setting.options["keep"]
            return Weighting({k: share + k for k in round.uploads}, self.memory,
                             {k: {"length": float(k)} for k in round.uploads})
    keep = Option("keep", "share that is kept", float, within=(0, 1), group="server")
    RULES["shortest"] = Rule("the shortest", Shortest, {keep: 0.5}, columns=("length",))
    try:
        assert place.main("--aggregation", "shortest", "--keep", 0.25, "--rounds", 1) == 0
        table = pd.read_csv(place.results / "server.csv")
        assert table["length"].tolist() == [0, 1]
        assert table["weight"].tolist() == pytest.approx([0.25 / 1.5, 1.25 / 1.5])
    finally:
        del RULES["shortest"]
