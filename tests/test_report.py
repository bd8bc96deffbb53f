"""report.py: means over seeds, commands that make the runs again, and folders that are no finished runs."""
import dataclasses
import json
import re
import shlex

import pandas as pd
import pytest
from conftest import ROOT, _load

from options import args_parser


@pytest.fixture(scope="module")
def report():
    return _load("report", ROOT / "report.py")


@pytest.fixture(scope="module")
def runs(tmp_path_factory, make_place):
    """Two seeds of rve_pfl, fedavg with unusual options, a run under --resplit, and four that are none."""
    place = make_place(tmp_path_factory.mktemp("report"))
    unusual = ("--method", "fedavg", "--lr_decay", 0, "--partition", "dirichlet", "--alpha", 0.3, "--unequal")
    for i, flags in enumerate((("--seed", 1), ("--seed", 2), ("--resplit",), unusual)):
        assert place.main("--rounds", 2, "--run_name", f"run{i}", *flags) == 0
    folder = place.folder / "results"
    done = next(folder.iterdir())
    for name in ("damaged", "half <b>", "strange", "emptied", "newer"):
        (folder / name).mkdir()
    (folder / "damaged" / "config.json").write_text("{")
    (folder / "strange" / "notes.txt").write_text("mine")
    config = json.loads((done / "config.json").read_text())
    (folder / "emptied" / "config.json").write_text(json.dumps(config))
    (folder / "emptied" / "rounds.csv").write_text("round\n1\n")
    (folder / "newer" / "config.json").write_text(json.dumps(
        {**config, "options": {**config["options"], "method": "quantum"}}))
    (folder / "half <b>" / "config.json").write_text(json.dumps({**config, "status": "unfinished"}))
    (folder / "half <b>" / "rounds.csv").write_text("".join(
        (done / "rounds.csv").read_text().splitlines(keepends=True)[:4]))
    return folder


def test_means_over_seeds(report, runs, capsys):
    assert report.main(["--results_dir", str(runs)]) == 0
    said = capsys.readouterr().out
    table = pd.read_csv(runs / "summary.csv")
    assert len(table) == 3 * 2 and "4 runs" in said and said.count("left out") == 5
    row = table[(table["seeds"] == "1 2") & (table["stage"] == "deployed")].iloc[0]
    last = [pd.read_csv(run / "rounds.csv").query("stage == 'deployed' and round == 2").iloc[0]
            for run in runs.iterdir() if (run / "rounds.csv").exists()
            and json.loads((run / "config.json").read_text()).get("protocol") == "held-out"
            and json.loads((run / "config.json").read_text())["options"]["method"] == "rve_pfl"
            and (run / "curves.png").exists()]
    assert len(last) == 2
    for figure in ("accuracy", "f1", "accuracy_worst", "kl_nats"):
        values = pd.Series([r[figure] for r in last])
        assert row[figure] == pytest.approx(values.mean(), rel=1e-4)
        assert row[f"{figure}_std"] == pytest.approx(values.std(), rel=1e-4)
    assert set(table["protocol"]) == {"held-out", "resplit"}


def test_a_seed_counts_once(report, runs):
    found = report.read(runs / "run0")
    table = report.summarise([found, found])
    assert table["seeds"].tolist() == ["1", "1"] and table["accuracy_std"].isna().all()   # its two stages


def test_commands_make_the_same_runs(report, runs):
    for run in runs.iterdir():
        found = report.read(run) if run.is_dir() else ""
        if isinstance(found, str):
            continue
        words = shlex.split(report.command(found.options))
        assert words[:2] == ["python", "RVE-PFL.py"]
        again = json.loads(json.dumps(vars(args_parser(words[2:])), default=str))
        ours = {"run_name", "data_dir", "results_dir", "models_dir", "device"}
        assert {k: v for k, v in again.items() if k not in ours} == \
            {k: v for k, v in found.options.items() if k not in ours}


def test_how_long_processes_wait_for_one_another_parts_no_settings(report, runs):
    found = report.read(runs / "run0")
    other = dataclasses.replace(found, options={**found.options, "rendezvous_seconds": 7.0})
    older = dataclasses.replace(found, options={k: v for k, v in found.options.items() if "rendez" not in k})
    assert found.setting == other.setting == older.setting
    assert report.command(found.options) == report.command(other.options) == report.command(older.options)


@pytest.mark.parametrize("name, reason", [
    ("damaged", "config.json is damaged"), ("strange", "no config.json"), ("half <b>", "unfinished: 1 of 2"),
    ("emptied", "rounds.csv is damaged"), ("newer", "quantum")])
def test_what_is_no_finished_run_is_listed_with_the_reason(report, runs, name, reason):
    assert reason in report.read(runs / name)


def test_the_page_stands_alone_and_escapes_names(report, runs):
    assert report.main(["--results_dir", str(runs)]) == 0
    text = (runs / "report.html").read_text()
    assert "half &lt;b&gt;" in text and "half <b>" not in text
    assert not re.search(r"https?://|<script|<link", text)
    assert all(source.startswith("data:image/png;base64,") for source in re.findall(r"src='([^']*)", text))
    assert "resplit" in text and text.count("<h2>") == 3   # two partitions, and what was left out


def test_an_empty_folder_and_none(report, tmp_path, capsys):
    assert report.main(["--results_dir", str(tmp_path)]) == 0
    assert (tmp_path / "report.html").exists()
    assert report.main(["--results_dir", str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    with pytest.raises(SystemExit, match="2"):
        report.main(["--result_dir", str(tmp_path)])
    assert capsys.readouterr().err.endswith("unknown argument --result_dir (did you mean --results_dir?)\n")
