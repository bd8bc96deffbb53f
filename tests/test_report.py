"""report.py: means over seeds, commands, what attackers find, and folders that are no finished runs."""
import dataclasses
import html
import json
import os
import re
import shutil

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT, _load
from test_checkpoint import stored

from attack import verdict
from methods import METHODS
from reporting import leakage, page, pictures, summary

# adversary, attack, round -> SSIM or evaluator right of the attack and its control, rank in the class, identified
EARLY = {("stolen_model", "latent_decoder", 1): (0.9, 0.3, 40, 2)}
LAST = {   # latent_search has the higher SSIM, but is no better on another image
    ("stolen_model", "latent_search", 2): (0.7, 0.7, 50, 0),
    ("stolen_model", "latent_decoder", 2): (0.6, 0.55, 20, 6),
    ("stolen_model", "mi_face", 2): (0.5, 0.25, 1, 0),
    ("stolen_model", "margin", 2): (0.75, 0.0, 1, 0),
    ("prediction_api", "score_decoder", 2): (0.2, 0.3, 50, 1)}
BLIND = dict.fromkeys(LAST, (0.2, 0.2, 50, 0))
SCRIPT = "<script>alert(1)</script>"


def lines(attacks, count=8):
    """Return attack.csv: ``count`` images or classes of each attack; the last images are identified."""
    rows = []
    for (adversary, attack, round), (own, other, rank, identified) in attacks.items():
        drawn = attack in ("mi_face", "margin")
        for control in ("", *(("grey", "noise") if drawn else ("foreign", "class_mean"))):
            score = {"": own, "foreign": other, "noise": other, "class_mean": 0.99}.get(control, 0.0)
            for i in range(count):
                rows.append({**dict.fromkeys(verdict.ATTACK_COLUMNS, 0.5), "adversary": adversary,
                             "attack": attack, "round": round, "client": 0, "label": i, "image": i, "restart": 0,
                             "control": control, "observed": "", "ssim": score,
                             "evaluator_correct": int(i < count * score),
                             "class_rank": 50 if control else rank, "class_size": 100, "guess": 0.002,
                             "identified": int(not control and i >= count - identified),
                             "kl_nats": np.nan if drawn else float(i)})
    return pd.DataFrame(rows, columns=verdict.ATTACK_COLUMNS)


def attacked(folder, attacks, count=8):
    """Leave in a folder what an attack leaves."""
    lines(attacks, count).to_csv(folder / "attack.csv", index=False)
    shutil.copy(folder / "curves.png", folder / "attack_stolen_model_latent_decoder_round2_client0.png")


@pytest.fixture(scope="module")
def report():
    return _load("report", ROOT / "report.py")


@pytest.fixture(scope="module")
def runs(tmp_path_factory, make_place):
    """Two seeds of rve_pfl, another beta, fedavg with unusual options, a run under --resplit; and no runs."""
    place = make_place(tmp_path_factory.mktemp("report"))
    unusual = ("--method", "fedavg", "--lr_decay", 0, "--partition", "dirichlet", "--alpha", 0.3, "--unequal")
    for name, *flags in (("one",), ("two", "--seed", 2), ("beta", "--kl_weight", 0.01), ("calm", *unusual),
                         ("resplit", "--resplit")):
        assert place.main("--rounds", 2, "--run_name", name, *flags) == 0
    folder = place.folder / "results"
    for name, attacks in (("one", {**EARLY, **LAST}), ("two", BLIND), ("beta", LAST)):
        attacked(folder / name, attacks)
    for name in ("half <b>", "strange", "newer"):
        (folder / name).mkdir()
    (folder / "strange" / "notes.txt").write_text("mine")
    config = json.loads((folder / "one" / "config.json").read_text())
    (folder / "newer" / "config.json").write_text(json.dumps(
        {**config, "options": {**config["options"], "method": "quantum"}}))
    (folder / "half <b>" / "config.json").write_text(json.dumps({**config, "status": "unfinished"}))
    (folder / "half <b>" / "rounds.csv").write_text("".join(
        (folder / "one" / "rounds.csv").read_text().splitlines(keepends=True)[:4]))
    return folder


def tables(folder):
    """Return the tables of a page, row by row: heading -> cell, without tags."""
    text = (folder / "report.html").read_text()
    parts = [[[html.unescape(" ".join(re.sub(r"<[^>]*>", " ", cell).split()))
               for cell in re.findall(r"<t[hd]>(.*?)</t[hd]>", row)]
              for row in table.split("<tr")[1:]] for table in text.split("<table>")[1:]]
    return [[dict(zip(head, row, strict=True)) for row in rows] for head, *rows in parts]


def test_the_committed_rows_are_no_run(report, tmp_path, monkeypatch, capsys):
    for name in ("reference", "other"):
        (tmp_path / "results" / name).mkdir(parents=True)
    monkeypatch.setattr(report, "ROOT", tmp_path)
    assert report.main(["--results_dir", str(tmp_path / "results")]) == 0
    assert "left out: other" in (printed := capsys.readouterr().out) and "reference" not in printed


def test_the_table_and_the_page(report, runs, capsys):
    assert report.main(["--results_dir", str(runs)]) == 0
    printed, table = capsys.readouterr().out, pd.read_csv(runs / "summary.csv")
    assert len(table) == 4 * 2 and "5 runs" in printed and printed.count("left out") == 3
    for name, reason in (("strange", "no config.json"), ("half <b>", "unfinished: 1 of 2"), ("newer", "quantum")):
        assert re.search(rf"left out: {name}: .*{reason}", printed), name
    for stage in ("deployed", "trained"):
        row = table[(table["seeds"] == "1 2") & (table["stage"] == stage)].iloc[0]
        last = pd.DataFrame([pd.read_csv(runs / name / "rounds.csv").query(
            f"stage == '{stage}' and round == 2 and split == 'test'").iloc[0] for name in ("one", "two")])
        for figure in ("accuracy", "f1", "accuracy_worst", "accuracy_images", "kl_nats"):
            assert row[figure] == pytest.approx(last[figure].mean(), rel=1e-4)
            assert row[f"{figure}_std"] == pytest.approx(last[figure].std(), rel=1e-4)
    assert set(table["protocol"]) == {"held-out", "resplit"}
    text = (runs / "report.html").read_text()
    assert "half &lt;b&gt;" in text and "half <b>" not in text and not re.search(r"https?://|<link|src=h", text)
    sources = re.findall(r"src='([^']*)", text)
    assert sum("attack_stolen_model_latent_decoder" in source for source in sources) == 2
    assert all((runs / source).exists() for source in sources) and any("partition.png" in name for name in sources)
    settings, attacks, left_out = tables(runs)
    rows = {row["method"]: row for row in settings}
    assert sorted(rows) == ["fedavg", "rve_pfl", "rve_pfl kl_weight 0.01", "rve_pfl resplit"]
    assert rows["fedavg"]["stolen_model"] == rows["fedavg"]["prediction_api"] == "not attacked"
    assert rows["rve_pfl"]["stolen_model"] == "images: leaks (1 of 2 seeds) classes: leaks (1 of 2 seeds)"
    assert rows["rve_pfl"]["prediction_api"] == "images: as a guess" and "curious_server" not in rows["rve_pfl"]
    deployed = table.query("stage == 'deployed' and seeds == '1 2'")
    assert rows["rve_pfl"]["deployed accuracy"].split()[0] == f"{deployed['accuracy'].item():.4f}"
    image, drawn = (next(row for row in attacks if (row["run"], row["adversary"], row["kind"]) == (
        "one", "stolen_model", kind)) for kind in ("image", "class"))
    assert list(image.values()) == ["one", "stolen_model", "2", "image", "leaks", "8", "latent_decoder",
                                    "0.60 (0.55)", "75.0% (0.0%)", "100%", "20 (50)"]
    assert list(drawn.values())[4:9] == ["leaks", "8", "margin", "75% (0%)", "–"]
    assert [row["folder"] for row in left_out] == ["half <b>", "newer", "strange"]


def titles(svg):
    """Return the tooltips of a picture's marks."""
    return re.findall(r"<title>(.*?)</title>", svg)


def test_the_pictures_show_every_run_in_its_methods_colour(runs):
    read = [summary.read(runs / name) for name in ("one", "two", "beta", "calm")]
    settings = summary.by_setting(read[:3])
    svg = pictures.accuracy(summary.labels(settings), settings)
    accuracy = {run.name: f"{run.name}: {run.last('deployed', 'accuracy'):.4f}" for run in read}
    assert sorted(titles(svg)) == sorted([*list(accuracy.values())[:3], "rve_pfl", "rve_pfl kl_weight 0.01"])
    assert svg.count("data-method=rve_pfl") == 5 and svg.count("<rect") == 3
    lines = pictures.convergence(read)
    assert titles(lines) == list(accuracy.values()) and lines.count("L") == 4   # two rounds each
    assert f"<g class=m{pictures.number('fedavg')} data-method=fedavg><title>calm" in lines
    marks = pictures.leakage(read, "stolen_model")
    assert titles(marks) == [
        "one: leaks; latent_decoder identifies 75.0%, its control 0.0%",
        "two: as a guess; latent_search identifies 0.0%, its control 0.0%",
        "beta: leaks; latent_decoder identifies 75.0%, its control 0.0%"]
    assert re.findall(r"class='(\w+)' x=([0-9.]+)", marks) == [
        ("leaks", "268.5"), ("guess", "36.0"), ("leaks", "268.5")]   # 0.75 between 40 and 350
    assert pictures.leakage(read, "curious_server") == ""
    styles = [line.split("{")[1] for line in pictures.STYLE.splitlines()]
    assert len(set(styles)) == len(set(map(pictures.number, METHODS))) == len(METHODS)
    seeds = [dataclasses.replace(read[0], rounds=[{**row, "accuracy": value} for row in read[0].rounds])
             for value in (0.8, 0.9, 1.0)]   # an interval of 0.9 +- 0.248, at most 1; 0.6 is at 8, and 1 at 300
    interval = re.search(r"interval d='M([0-9.]+),26H([0-9.]+)'", pictures.accuracy(["x"], [seeds]))
    assert [float(pixel) for pixel in interval.groups()] == pytest.approx([45.7, 300], abs=0.1)


def test_fine_tuned_accuracy_has_a_column_where_there_is_any(runs):
    run = summary.read(runs / "calm")
    more = [{**row, "stage": "finetuned_2", "accuracy": 0.1234}
            for row in run.rounds if row["stage"] == "deployed"]
    both = dataclasses.replace(run, rounds=[*run.rounds, *more], options={**run.options, "finetune_ep": [2]})
    assert "finetuned" not in page._table(["x"], [[run]])
    table = page._table(["x"], [[both]])
    assert "finetuned 2 accuracy" in table and "0.1234" in table
    assert [row["stage"] for row in summary.summarise([both])] == ["deployed", "trained", "finetuned_2"]


def test_intervals_need_three_seeds():
    half = summary.half_interval([0.8, 0.9, 1.0])
    assert half == pytest.approx(4.3027 * 0.1 / 3**0.5, rel=1e-4)   # Student's t, two degrees of freedom
    assert page._spread([0.8, 0.9, 1.0], 2) == f"0.90 &plusmn; {half:.2f}"
    assert page._spread([0.8, 0.9], 2) == "0.85 (0.80, 0.90)" and page._spread([0.8], 2) == "0.80"
    assert page._spread([], 2) == page.DASH


def test_verdicts_on_few_images_say_so(report, runs, tmp_path):
    for name in ("one", "two"):
        attacked(shutil.copytree(runs / name, tmp_path / name), BLIND, count=3)
    assert report.main(["--results_dir", str(tmp_path)]) == 0
    assert tables(tmp_path)[0][0]["prediction_api"] == "images: as a guess (few)"


def test_a_seed_counts_once_and_a_run_that_was_attacked_first(report, runs):
    one = summary.read(runs / "one")
    double = summary.Finished("x", one.protocol, one.options, one.rounds)
    for pair in ([one, double], [double, one]):
        rows = summary.summarise(pair)   # its two stages
        assert [row["seeds"] for row in rows] == ["1", "1"] and all(np.isnan(row["accuracy_std"]) for row in rows)
        assert summary.by_setting(pair) == [[one]]
    worse = dataclasses.replace(one, options={**one.options, "lr": 0.5},
                                rounds=[{**row, "accuracy": 0.01} for row in one.rounds])
    assert summary.by_setting([worse, one]) == [[one], [worse]]
    steps = dataclasses.replace(one, options={**one.options, "local_ep": None, "local_steps": 3})
    assert summary.by_setting([one, steps]) == [[steps], [one]]   # epochs and steps have no common order


def test_bookkeeping_is_in_no_setting_and_in_no_command(runs):
    one = summary.read(runs / "one")
    other = dataclasses.replace(one, options={**one.options, "rendezvous_seconds": 7.0})
    assert (one.setting, summary.command(one.options)) == (other.setting, summary.command(other.options))


@pytest.mark.parametrize("words", [
    "--prior class", "--prior class --kl_weight 1e-5 --head_lr 0.1 --no-private_init", "--prior normal",
    "--prior categorical --full_sharing_rounds 2", "--prior normal --private_init --method local",
    "--method fedavg --lr_decay 0.0 --partition dirichlet --alpha 0.3 --unequal", "--resplit --num_users 2"])
def test_a_command_makes_the_same_run_and_states_no_default(words):
    """Not even one that the prior decides."""
    options = stored(*words.split())
    again = summary.command(options).replace("1e-05", "1e-5").removeprefix("python RVE-PFL.py ").split()
    assert stored(*again) == options
    assert {*again} - {"--seed", "1"} <= {*words.split()}


def test_an_empty_folder_and_none(report, tmp_path, capsys):
    assert report.main(["--results_dir", str(tmp_path)]) == 0
    assert (tmp_path / "report.html").exists()
    assert report.main(["--results_dir", str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_run_in_a_folder_whose_name_is_no_text(report, runs, tmp_path):
    folder = shutil.copytree(runs / "one", tmp_path / os.fsdecode(b"latin-\xe9"))
    (folder / "partition.png").touch()
    assert report.main(["--results_dir", str(tmp_path)]) == 0
    assert "latin-%E9/partition.png" in (tmp_path / "report.html").read_text()


CASES = {   # a run's file -> what becomes of its text, and what is then said of the run
    "damaged": ("config.json", lambda text: "{", "config.json is damaged"),
    "number": ("config.json", lambda text: text.replace('"num_users": 2', f'"num_users": "{SCRIPT}"'),
               "--num_users"),
    "seed": ("config.json", lambda text: text.replace('"seed": 1', '"seed": 1e999'), "--seed inf"),
    "deep": ("config.json", lambda text: "[" * 100_000, "nested too deeply"),
    "deep option": ("config.json", lambda text: text.replace('"seed": 1', '"x": ' + "[" * 900 + "]" * 900
                                                             + ', "seed": 1'), ""),
    "emptied": ("rounds.csv", lambda text: "round\n1\n", "rounds.csv is damaged"),
    "round": ("rounds.csv", lambda text: text.replace("\n1,", "\n1e400,"), "rounds.csv is damaged"),
    "word": ("rounds.csv", lambda text: text.replace("\n2,", "\ntwo,"), "rounds.csv is damaged"),
    "accuracy": ("rounds.csv", lambda text: text.replace(",0.", ",7e300."), "rounds.csv is damaged"),
    "split": ("rounds.csv", lambda text: text.replace("deployed,test", "deployed,train"), "rounds.csv is damaged"),
    "short": ("rounds.csv", lambda text: text[:text.rindex(",")], "rounds.csv is damaged"),
    "null": ("rounds.csv", lambda text: text + "\x00", "rounds.csv is damaged"),
    "bytes": ("rounds.csv", lambda text: text.replace("deployed", "d\udcff"), "rounds.csv is damaged"),
    "nothing": ("attack.csv", lambda text: "", "No columns"),
    "zero": ("attack.csv", lambda text: "\x00", "attack.csv cannot be read"),
    "column": ("attack.csv", lambda text: text.replace("class_rank", "rank"), "no column class_rank"),
    "numbers": ("attack.csv", lambda text: text.replace(",0.6,", ",high,"), "numbers"),
    "gaps": ("attack.csv", lambda text: text.replace(",0.6,", ",,"), "gaps"),
    "twice": ("attack.csv", lambda text: text + text.split("\n", 1)[1], "there twice"),
    "control": ("attack.csv", lambda text: text.replace("foreign", "music"), "foreign once"),
    "attack": ("attack.csv", lambda text: text.replace("mi_face", SCRIPT), "is unknown"),
    "adversary": ("attack.csv", lambda text: text.replace("prediction_api", "neighbour"), "neighbour")}


def test_no_run_stops_the_page_or_gets_into_it(report, runs, tmp_path, capsys, monkeypatch):
    for name, (file, harm, _) in CASES.items():
        path = shutil.copytree(runs / "one", tmp_path / name) / file
        path.write_text(harm(path.read_text()), errors="surrogateescape")
    shutil.copytree(runs / "two", tmp_path / "good")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "config.json").mkdir()
    os.mkdir(os.fsencode(tmp_path) + b"/latin-\xe9")
    assert report.main(["--results_dir", str(tmp_path)]) == 0
    printed, text = capsys.readouterr().out, (tmp_path / "report.html").read_text()
    for name, (_, _, reason) in CASES.items():
        assert not reason or any(line.startswith(f"left out: {name}: ") and reason in line
                                 for line in printed.splitlines()), name
    assert text.count("<script") == 1 and SCRIPT not in text and "folder: config.json cannot be read" in printed
    assert "2" in set(pd.read_csv(tmp_path / "summary.csv")["seeds"].astype(str).str.split().explode())

    def broken(folder, read=summary.read):
        if folder.name == "good":
            raise RuntimeError("of a kind nobody thought of")
        return read(folder)
    monkeypatch.setattr(report, "read", broken)
    assert report.main(["--results_dir", str(tmp_path)]) == 0
    assert "left out: good: cannot be read (RuntimeError: of a kind nobody" in capsys.readouterr().out


def test_cells_are_escaped_unless_they_are_html():
    grid = page._grid(["<a>"], [("", ["<b>", page.Markup("<i>x</i>")]), ("fedavg", [3, "'\""])])
    assert "<th>&lt;a&gt;</th>" in grid and "<td>&lt;b&gt;</td><td><i>x</i></td>" in grid
    assert "data-method=fedavg><td>3</td><td>&#39;&#34;</td>" in grid
    assert "<title>&lt;a&gt;</title>" in pictures.group("fedavg", "<a>")


def test_an_attack_that_chooses_images_has_a_rank_and_no_picture():
    chooser = {("stolen_model", "reidentification", 2): (0.9, 0.1, 3, 7)}
    image = next(row for row in leakage.condense(lines({**LAST, **chooser}))
                 if (row["adversary"], row["kind"]) == ("stolen_model", "image"))
    assert (image["attack"], image["score"]) == ("latent_decoder", 0.6)   # one that chooses shows no picture
    assert (image["rank_attack"], image["rank"], image["identified"]) == ("reidentification", 3, 7 / 8)
    alone, = leakage.condense(lines(chooser))
    assert np.isnan(alone["score"]) and alone["rank"] == 3


def test_an_adversary_with_more_attacks_is_not_more_often_called_a_leak():
    """Six images on one side, p = 1/64, leak in one attack and not where it is one of two."""
    one = {("stolen_model", "latent_decoder", 2): (0.6, 0.5, 50, 0)}
    words = [[row["word"] for row in leakage.condense(lines(attacks, 6))] for attacks in (
        one, {**one, ("stolen_model", "latent_search", 2): (0.2, 0.2, 50, 0)})]
    assert words == [["leaks"], ["as a guess"]]
