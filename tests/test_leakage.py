"""leakage.py and what report.py shows of it: hand-written attacks against arithmetic by hand."""
import json
import math
import re
import shutil

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT, _load

from attack import verdict
from reporting import leakage, summary

# adversary, attack, round -> SSIM or evaluator right of the attack and its control, rank in the class, identified
EARLY = {("stolen_model", "latent_decoder", 1): (0.9, 0.3, 40, 2)}
LAST = {   # latent_search has the higher SSIM, but is no better on another image
    ("stolen_model", "latent_search", 2): (0.7, 0.7, 50, 0),
    ("stolen_model", "latent_decoder", 2): (0.6, 0.55, 20, 6),
    ("stolen_model", "mi_face", 2): (0.5, 0.25, 1, 0),
    ("stolen_model", "margin", 2): (0.75, 0.0, 1, 0),
    ("prediction_api", "score_decoder", 2): (0.2, 0.3, 50, 1)}
BLIND = dict.fromkeys(LAST, (0.2, 0.2, 50, 0))


@pytest.fixture(scope="module")
def report():
    return _load("report", ROOT / "report.py")


def lines(attacks, count=8):
    """attack.csv: ``count`` images or classes of each attack. The last two of the images are identified first."""
    rows = []
    for (adversary, attack, round), (own, other, rank, identified) in attacks.items():
        drawn = attack in ("mi_face", "margin")
        for control in ("", *(("grey", "noise") if drawn else ("foreign", "class_mean"))):
            score = {"": own, "foreign": other, "noise": other, "class_mean": 0.99}.get(control, 0.0)
            for i in range(count):
                rows.append({**dict.fromkeys(verdict.ATTACK_COLUMNS, 0.5), "adversary": adversary,
                             "attack": attack, "round": round, "client": 0, "label": i, "image": i, "restart": 0,
                             "control": control,
                             "observed": "", "ssim": score, "evaluator_correct": int(i < count * score),
                             "class_rank": 50 if control else rank, "class_size": 100, "guess": 0.002,
                             "identified": int(not control and i >= count - identified),
                             "kl_nats": np.nan if drawn else float(i)})
    return pd.DataFrame(rows, columns=verdict.ATTACK_COLUMNS)


def attacked(folder, attacks, public="unowned", count=8):
    """Leave in a folder what an attack leaves."""
    lines(attacks, count).to_csv(folder / "attack.csv", index=False)
    (folder / "attack.json").write_text(json.dumps(
        {"restarts": 3, "iterations": 20, "train_epochs": 2, "public": public}))
    shutil.copy(folder / "curves.png", folder / "attack_stolen_model_latent_decoder_round2_client0.png")
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory, make_place):
    """rve_pfl attacked with two seeds and with another beta; fedavg not attacked; local's attack damaged."""
    place = make_place(tmp_path_factory.mktemp("leakage"))
    for name, *flags in (("one",), ("two", "--seed", 2), ("beta", "--kl_weight", 0.01),
                         ("calm", "--method", "fedavg"), ("torn", "--method", "local")):
        assert place.main("--rounds", 2, "--run_name", name, *flags) == 0
    folder = place.folder / "results"
    attacked(folder / "one", {**EARLY, **LAST})
    attacked(folder / "two", BLIND)
    attacked(folder / "beta", LAST, public="<i>mine</i>")
    attacked(folder / "torn", LAST)
    text = (folder / "torn" / "attack.csv").read_text()
    (folder / "torn" / "attack.csv").write_text(text.replace("mi_face", "mi_<b>"))
    return folder


def test_the_summarys_columns():
    row = dict.fromkeys(verdict.ATTACK_COLUMNS, 0) | {"control": "", "observed": "", "adversary": "stolen_model",
                                                   "attack": "latent_decoder"}
    found = verdict.summarise([{**row, "identified": int(i == 3), "kl_nats": i} for i in range(4)])
    assert found["identified"].tolist() == [0.25] and found["identified_worst"].tolist() == [1]
    assert {*verdict.SUMMARY_KEY, "n", "ssim", "ssim_low", "ssim_high", "class_rank"} <= set(found.columns)


def test_the_strongest_attack_beside_its_control():
    found = leakage.condense(lines({**EARLY, **LAST})).set_index(["adversary", "round", "kind"])
    assert len(found) == 4
    image, drawn = found.loc[("stolen_model", 2, "image")], found.loc[("stolen_model", 2, "class")]
    assert (image["attack"], image["control"], image["rank_attack"]) == (
        "latent_decoder", "foreign", "latent_decoder")
    assert image[["score", "control_score", "leakage", "low", "high", "rank", "control_rank", "n"]].tolist() == \
        pytest.approx([0.6, 0.55, 0.05, 0.05, 0.05, 20, 50, 8])
    assert image[["identified", "control_identified", "identified_worst"]].tolist() == [0.75, 0, 1]
    assert (drawn["attack"], drawn["control"]) == ("margin", "grey")
    assert drawn[["score", "control_score", "leakage"]].tolist() == pytest.approx([0.75, 0, 0.75])
    assert drawn["low"] < 0.75 < drawn["high"] and np.isnan(drawn["identified"])
    assert found.loc[("stolen_model", 1, "image"), "leakage"] == pytest.approx(0.6)
    assert found.loc[("prediction_api", 2, "image"), "leakage"] == pytest.approx(-0.1)


def test_who_chooses_a_candidate_counts_by_rank_and_not_as_a_picture():
    chosen = {("stolen_model", "reidentification", 2): (1.0, 0.0, 3, 7)}
    image = leakage.condense(lines({**LAST, **chosen})).set_index(["adversary", "kind"]).loc[
        ("stolen_model", "image")]
    assert (image["attack"], image["score"]) == ("latent_decoder", 0.6)
    assert (image["rank_attack"], image["rank"], image["identified"]) == ("reidentification", 3, 7 / 8)
    alone = leakage.condense(lines(chosen))
    assert alone["score"].isna().all() and alone["leakage"].isna().all() and alone["rank"].tolist() == [3]
    assert leakage.worst(alone)["image_leakage"] is None


def test_the_worst_adversary_in_the_last_rounds():
    row = leakage.worst(leakage.condense(lines({**EARLY, **LAST})))
    assert row["image_attack"] == "stolen_model latent_decoder"
    assert row["class_attack"] == "stolen_model margin"
    assert (row["image_leakage"], row["image_ssim"], row["class_right"]) == pytest.approx((0.05, 0.6, 0.75))
    assert not any(leakage.worst(leakage.NONE).values())
    assert leakage.worst(leakage.condense(lines(EARLY)))["class_right"] is None


def test_words_are_those_of_the_worst_attack_in_a_round(runs):
    found = summary.read(runs / "one")
    assert not found.unread and not found.leaks["few"].any()
    assert found.leaks.set_index(["adversary", "round", "kind"])["word"].to_dict() == {
        ("stolen_model", 1, "image"): "leaks", ("stolen_model", 2, "image"): "leaks",
        ("stolen_model", 2, "class"): "leaks", ("prediction_api", 2, "image"): "as a guess"}


def test_an_adversary_with_more_attacks_is_not_more_often_called_a_leak():
    """Six images on one side, p = 1/64, leak in one attack and not where it is one of two."""
    one = {("stolen_model", "latent_decoder", 2): (0.6, 0.5, 50, 0)}
    words = [leakage.condense(lines(attacks, 6))["word"].tolist() for attacks in (
        one, {**one, ("stolen_model", "latent_search", 2): (0.2, 0.2, 50, 0)})]
    assert words == [["leaks"], ["as a guess"]]


def test_words_over_seeds(runs):
    one, two, calm = (summary.read(runs / name) for name in ("one", "two", "calm"))
    assert leakage.words_over_seeds([one, one], "stolen_model")["image"] == ("leaks", 2, 2, False)
    assert leakage.words_over_seeds([one, two, calm], "stolen_model") == {
        "image": ("leaks", 1, 2, False), "class": ("leaks", 1, 2, False)}
    assert leakage.words_over_seeds([one, two, calm], "curious_client") == {}


@pytest.mark.parametrize("harm, reason", [
    (lambda text: "", "no list of names"), (lambda text: text.split("\n")[0] + "\n", "numbers"),
    (lambda text: text.replace("class_rank", "rank"), "no column class_rank; attack the run again"),
    (lambda text: text.replace(",0.6,", ",high,"), "numbers"),
    (lambda text: text.replace(",0.6,", ",,"), "gaps"),
    (lambda text: text.replace("foreign", "music"), "foreign once"),
    (lambda text: text.replace("mi_face", "mi_mask"), "mi_mask"),
    (lambda text: text.replace("prediction_api", "neighbour"), "neighbour"),
    (lambda text: text + text.split("\n")[1] + "\n", "twice"),
    (lambda text: "".join(text.splitlines(keepends=True)[:15]), "once")])
def test_a_damaged_attack_says_why_and_the_run_stays(report, runs, tmp_path, harm, reason):
    folder = shutil.copytree(runs / "one", tmp_path / "one")
    path = folder / "attack.csv"
    path.write_text(harm(path.read_text()))
    found = summary.read(folder)
    assert not len(found.leaks) and reason in found.unread and found.unread.count("\n") == 0
    assert report.main(["--results_dir", str(tmp_path)]) == 0
    assert "attack.csv or attack.json cannot be read" in (tmp_path / "report.html").read_text()


def glance(folder):
    """The first table of a page: cells by row, their tags taken out and spaces made one."""
    text = (folder / "report.html").read_text()
    table = text[text.index("<tbody>"):text.index("</tbody>")]
    table = re.sub("<i>.*?</i>", "", table)   # the heads once more, which only narrow screens show
    return [[" ".join(re.sub(r"<[^>]*>", " ", cell).split()) for cell in row.split("<td>")[1:]]
            for row in table.split("<tr>")[1:]]


def test_the_page_opens_with_what_leaks_to_whom(report, runs, tmp_path):
    for name in ("one", "two", "calm"):
        shutil.copytree(runs / name, tmp_path / name)
    assert report.main(["--results_dir", str(tmp_path)]) == 0
    rows = {row[0].split()[0]: row for row in glance(tmp_path)}
    assert set(rows) == {"rve_pfl", "fedavg"}
    assert rows["fedavg"][4:] == ["not attacked"] * 4
    assert rows["rve_pfl"][4:] == [   # in the order of ADVERSARIES
        "not attacked", "images: leaks (1 of 2 seeds) classes: leaks (1 of 2 seeds)",
        "images: as a guess", "not attacked"]
    deployed = pd.read_csv(tmp_path / "summary.csv").query("stage == 'deployed' and method == 'rve_pfl'")
    assert rows["rve_pfl"][3].split()[0] == f"{deployed['accuracy'].item():.4f}"
    attacked(tmp_path / "two", BLIND, count=3)
    attacked(tmp_path / "one", BLIND, count=3)
    assert report.main(["--results_dir", str(tmp_path)]) == 0
    rows = {row[0].split()[0]: row for row in glance(tmp_path)}
    assert rows["rve_pfl"][6] == "images: as a guess (few)"


def test_an_attack_without_its_options_is_damaged(report, runs, tmp_path):
    folder = shutil.copytree(runs / "one", tmp_path / "one")
    for text in ("{", "[]", '{"public": "unowned"}'):
        (folder / "attack.json").write_text(text)
        assert "attack.json cannot be read" in summary.read(folder).unread
    (folder / "attack.json").unlink()
    unread = summary.read(folder).unread
    assert "attack.json" in unread


def test_summary_means_over_seeds(report, runs):
    assert report.main(["--results_dir", str(runs)]) == 0
    table = pd.read_csv(runs / "summary.csv")
    deployed = table[table["stage"] == "deployed"].set_index("command")
    both = deployed[deployed["seeds"] == "1 2"].iloc[0]
    assert both["seeds_attacked"] == 2
    assert both[["image_leakage", "image_ssim", "class_right"]].tolist() == pytest.approx([0.025, 0.4, 0.5])
    assert both["image_leakage_std"] == pytest.approx(0.025 * math.sqrt(2), rel=1e-4)   # of 0.05 and 0
    assert both["image_attack"] == "stolen_model latent_decoder; stolen_model latent_search"   # equal: the first
    assert both["class_attack"] == "stolen_model margin; stolen_model mi_face"   # equal: the first
    added = ["seeds_attacked", *leakage.WORST]
    assert table[table["stage"] == "trained"][added].isna().all(axis=None)
    assert deployed[deployed["method"].isin(["fedavg", "local"])][added].isna().all(axis=None)
    assert {"fedavg", "local"} <= set(deployed["method"])


def test_a_run_that_was_attacked_counts_before_its_double(report, runs):
    one, calm = summary.read(runs / "one"), summary.read(runs / "calm")
    double = summary.Finished("x", one.protocol, one.options, one.rounds)
    table = summary.summarise([one, double, calm])
    assert table["image_ssim"].dropna().tolist() == pytest.approx([0.6])


def test_utility_is_that_of_the_round_attacked(report, runs):
    run = summary.read(runs / "one")
    rows = leakage.beside_utility(run)
    deployed = run.rounds[run.rounds["stage"] == "deployed"].set_index("round")["accuracy"]
    assert rows["accuracy"].tolist() == deployed.loc[rows["round"]].tolist()
    assert set(rows["round"]) == {1, 2}


def test_pictures_have_the_points(report, runs):
    rows = pd.concat([leakage.beside_utility(summary.read(runs / name)) for name in ("one", "two", "beta")])
    axes = leakage.picture(rows, "image", "round").axes[0]
    drawn = [line.get_xydata().tolist() for line in axes.lines]
    assert any(line == [[1, pytest.approx(0.6)], [2, pytest.approx(0.05)]] for line in drawn)
    intervals = [segment.tolist() for bars in axes.collections for segment in bars.get_segments()]
    assert pytest.approx([1, 0.6]) in [low for low, _ in intervals]
    assert axes.get_ylabel() and axes.get_xlabel() == "round"
    assert {text.get_text() for text in axes.texts} == {"β=1e-05", "β=0.01"}
    last = leakage.latest(rows[rows["run"] == "one"])
    axes = leakage.picture(last, "class", "accuracy").axes[0]
    assert axes.lines[0].get_xydata()[0].tolist() == [last["accuracy"].iloc[0], 0.75] and not axes.texts
    low, high = last.loc[last["kind"] == "class", ["low", "high"]].iloc[0]
    assert axes.get_ylim()[0] < low < high < axes.get_ylim()[1]   # the interval is on the picture
    leakage.plt.close("all")


def test_the_page(report, runs, capsys):
    assert report.main(["--results_dir", str(runs)]) == 0
    assert "left out: torn: finished, but attack.csv" in capsys.readouterr().out
    text = (runs / "report.html").read_text()
    assert "latent_decoder</small> 0.60 (0.55)" in text and "margin</small> 75% (0%)" in text
    assert "latent_decoder</small> 75.0% (0.0%)</td><td>100%</td><td>20 (50)" in text
    assert "no proof of privacy" in text
    assert "different budgets" in text   # one trained on other public images
    assert "&lt;i&gt;mine" in text and "<i>mine" not in text
    assert "mi_&lt;b&gt;" in text and "mi_<b>" not in text
    assert text.count("leakage over accuracy") == 2 and text.count("leakage over round") == 2
    assert text.count("in pictures") == 2 and text.count("alt='attack_stolen_model_latent_decoder") == 2
    assert not re.search(r"https?://|<script|<link", text)
    assert all(source.startswith("data:image/png;base64,") for source in re.findall(r"src='([^']*)", text))
    for method in ("fedavg", "local"):   # not attacked, or its attack damaged: its accuracy is shown
        assert f"<td>{method} <small>2 clients" in text and f"<td>{method} <small>torn" not in text


def test_a_page_without_attacks_says_nothing_of_them(report, runs, tmp_path):
    shutil.copytree(runs / "calm", tmp_path / "calm")
    assert report.main(["--results_dir", str(tmp_path)]) == 0
    text = (tmp_path / "report.html").read_text()
    assert "fedavg" in text and "attack" not in text


def test_rows_say_which_options_differ_and_no_others(report, runs, tmp_path):
    for name in ("one", "beta", "calm"):
        shutil.copytree(runs / name, tmp_path / name)
    assert report.main(["--results_dir", str(tmp_path)]) == 0
    assert sorted(row[0] for row in glance(tmp_path)) == ["fedavg", "rve_pfl", "rve_pfl kl_weight 0.01"]
