"""reporting/leakage.py and what report.py shows of it: hand-written attacks against arithmetic by hand."""
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


def attacked(folder, attacks, count=8):
    """Leave in a folder what an attack leaves."""
    lines(attacks, count).to_csv(folder / "attack.csv", index=False)
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
    for name, attacks in (("one", {**EARLY, **LAST}), ("two", BLIND), ("beta", LAST), ("torn", LAST)):
        attacked(folder / name, attacks)
    text = (folder / "torn" / "attack.csv").read_text()
    (folder / "torn" / "attack.csv").write_text(text.replace("mi_face", "mi_<b>"))
    return folder


def test_the_strongest_attack_of_the_last_round_beside_its_control():
    rows = leakage.condense(lines({**EARLY, **LAST}))
    found = rows.set_index(["adversary", "kind"])
    assert len(found) == 3 and set(found["round"]) == {2}
    assert found["word"].tolist() == ["leaks", "leaks", "as a guess"] and not found["few"].any()
    image, drawn = found.loc[("stolen_model", "image")], found.loc[("stolen_model", "class")]
    assert (image["attack"], image["rank_attack"]) == ("latent_decoder", "latent_decoder")
    assert image[["score", "control_score", "rank", "control_rank", "n"]].tolist() == pytest.approx(
        [0.6, 0.55, 20, 50, 8])
    assert image[["identified", "control_identified", "identified_worst"]].tolist() == [0.75, 0, 1]
    assert drawn[["attack", "score", "control_score"]].tolist() == ["margin", 0.75, 0]
    row = leakage.worst(rows)
    assert (row["image_leakage"], row["image_ssim"], row["class_right"]) == pytest.approx((0.05, 0.6, 0.75))
    assert (row["image_attack"], row["class_attack"]) == ("stolen_model latent_decoder", "stolen_model margin")
    assert not any(leakage.worst(leakage.NONE).values())


def test_an_attack_that_chooses_a_candidate_counts_by_rank_and_not_as_a_picture():
    chosen = {("stolen_model", "reidentification", 2): (1.0, 0.0, 3, 7)}
    image = leakage.condense(lines({**LAST, **chosen})).set_index(["adversary", "kind"]).loc[
        ("stolen_model", "image")]
    assert (image["attack"], image["score"]) == ("latent_decoder", 0.6)
    assert (image["rank_attack"], image["rank"], image["identified"]) == ("reidentification", 3, 7 / 8)
    alone = leakage.condense(lines(chosen))
    assert alone["score"].isna().all() and alone["rank"].tolist() == [3]
    assert leakage.worst(alone)["image_leakage"] is None


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
    (lambda text: "", "No columns"),
    (lambda text: text.replace("class_rank", "rank"), "no column class_rank"),
    (lambda text: text.replace(",0.6,", ",high,"), "numbers"), (lambda text: text.replace(",0.6,", ",,"), "gaps"),
    (lambda text: text.replace("foreign", "music"), "foreign once"),
    (lambda text: text.replace("mi_face", "mi_mask"), "mi_mask"),
    (lambda text: text.replace("prediction_api", "neighbour"), "neighbour")])
def test_a_damaged_attack_says_why_and_the_run_stays(report, runs, tmp_path, harm, reason):
    folder = shutil.copytree(runs / "one", tmp_path / "one")
    path = folder / "attack.csv"
    path.write_text(harm(path.read_text()))
    found = summary.read(folder)
    assert not len(found.leaks) and reason in found.unread and found.unread.count("\n") == 0
    assert report.main(["--results_dir", str(tmp_path)]) == 0
    assert "attack.csv cannot be read" in (tmp_path / "report.html").read_text()


def glance(folder):
    """The first table of a page: cells by row, their tags taken out and spaces made one."""
    text = (folder / "report.html").read_text()
    table = text[text.index("<tbody>"):text.index("</tbody>")]
    table = re.sub("<i>.*?</i>", "", table)   # the heads once more, which only narrow screens show
    return [[" ".join(re.sub(r"<[^>]*>", " ", cell).split()) for cell in row.split("<td>")[1:]]
            for row in table.split("<tr>")[1:]]


def test_the_page_opens_with_what_leaks_to_whom(report, runs, tmp_path):
    for name in ("one", "two", "beta", "calm"):
        shutil.copytree(runs / name, tmp_path / name)
    assert report.main(["--results_dir", str(tmp_path)]) == 0
    rows = {row[0]: row for row in glance(tmp_path)}
    assert sorted(rows) == ["fedavg", "rve_pfl", "rve_pfl kl_weight 0.01"]   # options that differ, and no others
    assert rows["fedavg"][4:] == ["not attacked"] * 4
    assert rows["rve_pfl"][4:] == [   # in the order of ADVERSARIES
        "not attacked", "images: leaks (1 of 2 seeds) classes: leaks (1 of 2 seeds)",
        "images: as a guess", "not attacked"]
    deployed = pd.read_csv(tmp_path / "summary.csv").query("stage == 'deployed' and seeds == '1 2'")
    assert rows["rve_pfl"][3].split()[0] == f"{deployed['accuracy'].item():.4f}"
    for name in ("one", "two"):
        attacked(tmp_path / name, BLIND, count=3)
    assert report.main(["--results_dir", str(tmp_path)]) == 0
    assert {row[0]: row for row in glance(tmp_path)}["rve_pfl"][6] == "images: as a guess (few)"


def test_the_page_and_the_summary(report, runs, capsys):
    assert report.main(["--results_dir", str(runs)]) == 0
    assert "left out: torn: finished, but attack.csv" in capsys.readouterr().out
    text = (runs / "report.html").read_text()
    assert ("<td>latent_decoder</td><td>0.60 (0.55)</td><td>75.0% (0.0%)</td><td>100%</td><td>20 (50)</td>" in text
            and "<td>margin</td><td>75% (0%)</td>" in text)
    assert "no proof of privacy" in text and "mi_&lt;b&gt;" in text and "mi_<b>" not in text
    assert text.count("in pictures") == 2 and text.count("alt='attack_stolen_model_latent_decoder") == 2
    assert not re.search(r"https?://|<script|<link", text)
    table = pd.read_csv(runs / "summary.csv")
    deployed = table[table["stage"] == "deployed"]
    both = deployed[deployed["seeds"] == "1 2"].iloc[0]
    assert both["seeds_attacked"] == 2
    assert both[["image_leakage", "image_ssim", "class_right"]].tolist() == pytest.approx([0.025, 0.4, 0.5])
    assert both["image_leakage_std"] == pytest.approx(0.025 * math.sqrt(2), rel=1e-4)   # of 0.05 and 0
    added = ["seeds_attacked", *leakage.WORST]
    assert table[table["stage"] == "trained"][added].isna().all(axis=None)
    assert deployed[deployed["method"].isin(["fedavg", "local"])][added].isna().all(axis=None)


def test_a_run_that_was_attacked_counts_before_its_double(report, runs):
    one, calm = summary.read(runs / "one"), summary.read(runs / "calm")
    double = summary.Finished("x", one.protocol, one.options, one.rounds)
    table = summary.summarise([one, double, calm])
    assert table["image_ssim"].dropna().tolist() == pytest.approx([0.6])
