"""docs/extending.md: its code blocks add rows to the tables, and these rows train and attack."""
import importlib
import re

import pandas as pd
import pytest
import torch
from attacked import Attacked
from conftest import ROOT

from attack.attacks import ATTACKS
from methods import METHODS
from parsing import Option
from server.base import Server, Weighting
from server.behaviours import BEHAVIOURS
from server.rules import RULES, Rule

BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "extending.md").read_text(), re.S)
TABLES = (METHODS, RULES, BEHAVIOURS, ATTACKS)


@pytest.fixture
def extended():
    """The page's rows in the tables, for one test; each must be new."""
    before, added = [dict(table) for table in TABLES], {}
    for block in BLOCKS:   # as if appended to the file in its first line
        file = vars(importlib.import_module(re.match(r"# (.*)\.py\n", block)[1].replace("/", ".")))
        names = set(file)
        exec(compile(block, "docs/extending.md", "exec"), file)
        added |= {name: (file, file[name]) for name in file.keys() - names}
    assert [len(table) for table in TABLES] == [len(table) + 1 for table in before]
    yield {name: value for name, (_, value) in added.items()}
    for name, (file, _) in added.items():
        del file[name]
    for table, old in zip(TABLES, before, strict=True):
        table.clear()
        table.update(old)


def test_a_new_method_trains_and_its_option_is_known(extended, place, capsys):
    csvs, loss = {}, {}
    for name, flags in {"fedavg": ("fedavg",), "none": ("confidence_penalty", "--penalty", 0),
                        "much": ("confidence_penalty", "--penalty", 10)}.items():
        assert place.main("--method", *flags, "--rounds", 1, "--overwrite") == 0
        csvs[name] = place.clients_csv()
        loss[name] = pd.read_csv(place.results / "clients.csv").query("stage == 'trained'")["loss"]
    assert csvs["none"] == csvs["fedavg"] != csvs["much"]   # nothing else sets the new row apart
    assert (loss["much"] > loss["none"]).all()   # less confident
    assert "--penalty" in place.refuses(capsys, "--method", "fedavg", "--penalty", 1)
    assert "--penalty" in place.refuses(capsys, "--method", "confidence_penalty", "--penalty", -1)


def test_a_new_rule_and_a_new_behaviour_run_together(extended, place):
    updates = torch.tensor([[3.0, 4.0], [0.0, 1.0], [0.5, 2.0]])
    assert extended["mean_around_median"](updates, 1).tolist() == pytest.approx([0.25, 1.5])
    assert place.main("--rounds", 1, "--malicious_frac", 0.5, "--malicious_behaviour", "free_rider",
                      "--aggregation", "mean_around_median") == 0
    table = pd.read_csv(place.results / "server.csv")
    assert table["weight"].isna().all()
    shared = place.saved(1, "shared.pt")
    bad, = table.query("malicious == 1")["client"]
    assert all(torch.equal(shared["uploads"][bad][name], value) for name, value in shared["sent"].items())


def test_a_new_attack_is_scored(extended, place, tiny_arrays):
    attacked = Attacked(place, tiny_arrays, runs={"run": ("--rounds", 1)})
    assert attacked.attack("run", "--adversary", "stolen_model", "--attack", "nearest_latent", "--images", 2) == 0
    own = attacked.csv("run").query("control == ''")
    assert set(own["attack"]) == {"nearest_latent"} and len(own) == 2 * 2   # from z and from mu


def test_a_rule_with_an_option_and_a_column_of_its_own(place):
    class Shortest(Server):
        def weigh(self, round):
            return Weighting({k: self.options["keep"] + k for k in round.uploads}, self.memory,
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
