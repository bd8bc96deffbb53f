"""report.py: means over seeds, commands that make the runs again, and folders that are no finished runs."""
import dataclasses
import json
import os
import re
import shlex
import shutil

import pandas as pd
import pytest
from conftest import ROOT, _load

from options import args_parser
from reporting import images, page, summary


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
    found = summary.read(runs / "run0")
    table = summary.summarise([found, found])
    assert table["seeds"].tolist() == ["1", "1"] and table["accuracy_std"].isna().all()   # its two stages


def test_commands_make_the_same_runs(report, runs):
    for run in runs.iterdir():
        found = summary.read(run) if run.is_dir() else ""
        if isinstance(found, str):
            continue
        words = shlex.split(summary.command(found.options))
        assert words[:2] == ["python", "RVE-PFL.py"]
        again = json.loads(json.dumps(vars(args_parser(words[2:])), default=str))
        ours = {"run_name", "data_dir", "results_dir", "models_dir", "device"}
        assert {k: v for k, v in again.items() if k not in ours} == \
            {k: v for k, v in found.options.items() if k not in ours}


def test_options_of_bookkeeping_part_no_settings(report, runs):
    found = summary.read(runs / "run0")
    other = dataclasses.replace(found, options={**found.options, "rendezvous_seconds": 7.0})
    assert found.setting == other.setting
    assert summary.command(found.options) == summary.command(other.options)


@pytest.mark.parametrize("name, reason", [
    ("damaged", "config.json is damaged"), ("strange", "no config.json"), ("half <b>", "unfinished: 1 of 2"),
    ("emptied", "rounds.csv is damaged"), ("newer", "quantum")])
def test_what_is_no_finished_run_is_listed_with_the_reason(report, runs, name, reason):
    assert reason in summary.read(runs / name)


def test_the_page_stands_alone_and_escapes_names(report, runs):
    assert report.main(["--results_dir", str(runs)]) == 0
    text = (runs / "report.html").read_text()
    assert "half &lt;b&gt;" in text and "half <b>" not in text
    assert not re.search(r"https?://|<script|<link", text)
    assert all(source.startswith("data:image/png;base64,") for source in re.findall(r"src='([^']*)", text))
    assert "resplit" in text and text.count("<h2") == 3   # two partitions, and what was left out


def test_an_empty_folder_and_none(report, tmp_path, capsys):
    left = [tmp_path / f".{name}.{10**30}.tmp" for name in ("report.html", "summary.csv")]   # by a killed process
    for path in left:
        path.touch()
    assert report.main(["--results_dir", str(tmp_path)]) == 0 and not any(path.exists() for path in left)
    assert (tmp_path / "report.html").exists()
    assert report.main(["--results_dir", str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    with pytest.raises(SystemExit, match="2"):
        report.main(["--result_dir", str(tmp_path)])
    assert capsys.readouterr().err.endswith("unknown argument --result_dir (did you mean --results_dir?)\n")


SCRIPT = "<script>alert(1)</script>"
CASES = {   # a run's file -> what becomes of its text, and what is then said of the run
    "number": ("config.json", lambda text: text.replace('"num_users": 2', f'"num_users": "{SCRIPT}"'),
               "--num_users"),
    "epochs": ("config.json", lambda text: text.replace('"local_ep": 1', f'"local_ep": ["{SCRIPT}"]'),
               "--local_ep"),
    "seed": ("config.json", lambda text: text.replace('"seed": 1', '"seed": 1e999'), "--seed inf"),
    "deep": ("config.json", lambda text: "[" * 100_000, "nested too deeply"),
    "deep option": ("config.json", lambda text: text.replace('"seed": 1', '"x": ' + "[" * 900 + "]" * 900
                                                             + ', "seed": 1'), ""),
    "round": ("rounds.csv", lambda text: text.replace("\n1,", "\n1e400,"), "rounds.csv is damaged"),
    "word": ("rounds.csv", lambda text: text.replace("\n2,", "\ntwo,"), "rounds.csv is damaged"),
    "accuracy": ("rounds.csv", lambda text: text.replace(",0.", ",7e300."), "rounds.csv is damaged"),
    "bytes": ("rounds.csv", lambda text: text.replace("deployed", "d\udcff"), "rounds.csv is damaged"),
    "picture": ("partition.png", lambda text: "no picture", "partition.png is left out"),
    "attacked": ("attack.csv", lambda text: "\x00", "attack.csv cannot be read")}


def test_no_run_stops_the_page_or_gets_into_it(report, runs, tmp_path, capsys, monkeypatch):
    for name, (file, harm, _) in CASES.items():
        shutil.copytree(runs / "run0", tmp_path / name)
        path = tmp_path / name / file
        text = path.read_text() if file.endswith(("rounds.csv", ".json")) else ""
        path.write_text(harm(text), errors="surrogateescape")
    shutil.copytree(runs / "run1", tmp_path / "good")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "config.json").mkdir()
    os.mkdir(os.fsencode(tmp_path) + b"/latin-\xe9")
    assert report.main(["--results_dir", str(tmp_path)]) == 0
    said, text = capsys.readouterr().out, (tmp_path / "report.html").read_text()
    for name, (_, _, reason) in CASES.items():
        assert not reason or any(line.startswith(f"left out: {name}: ") and reason in line
                                 for line in said.splitlines()), name
    assert "<script" not in text and "folder: config.json is damaged" in said
    assert "2" in set(pd.read_csv(tmp_path / "summary.csv")["seeds"].astype(str).str.split().explode())

    def broken(rounds, *rest, whole=summary.summarise):
        if any(run.name == "good" for run in rounds):
            raise RuntimeError("of a kind nobody thought of")
        return whole(rounds, *rest)
    monkeypatch.setattr(report, "summarise", broken)
    assert report.main(["--results_dir", str(tmp_path)]) == 0
    assert "left out: good: cannot be shown (RuntimeError: of a kind nobody" in capsys.readouterr().out


def test_cells_are_escaped_unless_they_are_html():
    grid = page._grid(["<a>"], [["<b>", page.Markup("<i>x</i>")], [3, "'\""]])
    assert "<th>&lt;a&gt;</th>" in grid and "<td>&lt;b&gt;</td><td><i>x</i></td>" in grid
    assert "<td>3</td><td>&#39;&#34;</td>" in grid
    assert "alt='&#39;&gt;'" in images.image(b"", "'>")


def test_pictures_that_the_page_does_not_take(runs, tmp_path, monkeypatch):
    whole = (runs / "run0" / "partition.png").read_bytes()
    path = tmp_path / "a.png"
    path.write_bytes(whole)
    assert images.png(path) == whole
    for harmed in (b"", b"GIF89a", whole[:200], whole[:-30] + b"x" * 30):
        path.write_bytes(harmed)
        with pytest.raises(ValueError, match="no PNG"):
            images.png(path)
    with pytest.raises(ValueError, match="no plain file"):
        images.png(tmp_path)
    path.write_bytes(whole)
    monkeypatch.setattr(images, "LARGEST", 100)
    with pytest.raises(ValueError, match="100 bytes"):
        images.png(path)
