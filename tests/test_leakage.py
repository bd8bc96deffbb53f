"""leakage.py and what report.py shows of it: hand-written attacks against arithmetic by hand."""
import json
import math
import re
import shutil

import pandas as pd
import pytest
from conftest import ROOT, _load

from attack import tables
from reporting import leakage, summary

# adversary, attack, round -> (SSIM, evaluator right) of the attack, grey, noise, class mean, nearest public
EARLY = {("stolen_model", "latent_decoder", 1): [(0.9, 1), (0.0, 0), (0.1, 0), (0.2, 1), (0.3, 1)]}
LAST = {   # latent_search is further over its controls, mi_face has the higher SSIM but observes no image
    ("stolen_model", "latent_search", 2): [(0.4, 1), (0.0, 0), (0.05, 0), (0.1, 1), (0.1, 1)],
    ("stolen_model", "latent_decoder", 2): [(0.6, 1), (0.0, 0), (0.1, 0), (0.55, 1), (0.5, 1)],
    ("stolen_model", "mi_face", 2): [(0.9, 0.5), (0.0, 0.1), (0.1, 0.25), (0.2, 1), (0.3, 1)],
    ("stolen_model", "mi_strong", 2): [(0.2, 0.75), (0.0, 0.125), (0.1, 0), (0.2, 1), (0.3, 1)],
    ("prediction_api", "score_decoder", 2): [(0.3, 1), (0.0, 0), (0.1, 0), (0.2, 1), (0.7, 1)],
}


@pytest.fixture(scope="module")
def report():
    return _load("report", ROOT / "report.py")


def lines(attacks):
    """The rows of an attack_summary.csv."""
    rows = []
    for (adversary, attack, round), scores in attacks.items():
        for control, (ssim, right) in zip(("", *leakage.CONTROLS), scores, strict=True):
            row = {"adversary": adversary, "attack": attack, "round": round, "observed": "",
                   "control": control, "n": 8}
            lucky = 9 if attack == "latent_decoder" else 5
            rank = {"": 7, "grey": 90, "nearest_public": lucky}.get(control, 50)
            figures = {"ssim": ssim, "evaluator_correct": right, "psnr": 20 - round, "nearest_rank": rank,
                       "identified": 0.0 if control else 0.75, "guess": 0.002}
            for name in (*tables.METRICS, *tables.NEWER_METRICS):
                value = figures.get(name, 0.5)
                row |= {name: value, f"{name}_low": value - 0.1, f"{name}_high": value + 0.1}
            rows.append(row)
    return rows


def attacked(folder, attacks, public="unowned"):
    """Leave in a folder what an attack leaves."""
    pd.DataFrame(lines(attacks)).to_csv(folder / "attack_summary.csv", index=False)
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
    attacked(folder / "two", {key: [(scores[0][0] - 0.2, 0.25), *scores[1:]] for key, scores in LAST.items()})
    attacked(folder / "beta", LAST, public="<i>mine</i>")
    attacked(folder / "torn", LAST)
    text = (folder / "torn" / "attack_summary.csv").read_text()
    (folder / "torn" / "attack_summary.csv").write_text(text.replace("mi_face", "mi_<b>"))
    return folder


def test_a_summary_without_observations_is_read(tmp_path):
    """The committed ones have no such column, and say the same."""
    attack = {"restarts": 3, "iterations": 20, "train_epochs": 2, "public": "unowned"}
    (tmp_path / "attack.json").write_text(json.dumps(attack))
    found, table = [], pd.DataFrame(lines(LAST))
    for one in (table, table.drop(columns="observed")):
        one.to_csv(tmp_path / "attack_summary.csv", index=False)
        found.append(leakage.read(tmp_path))
    pd.testing.assert_frame_equal(*found)
    table.drop(columns="ssim_low").to_csv(tmp_path / "attack_summary.csv", index=False)
    with pytest.raises(ValueError, match="columns"):
        leakage.read(tmp_path)


def test_columns_are_those_that_the_attack_writes():
    row = dict.fromkeys(tables.ATTACK_COLUMNS, 0) | {"control": "", "adversary": "stolen_model",
                                                   "attack": "mi_face"}
    assert list(tables.summarise([row]).columns) == leakage.SUMMARY_COLUMNS


def test_the_strongest_attack_beside_the_best_control():
    found = leakage.condense(pd.DataFrame(lines({**EARLY, **LAST}))).set_index(["adversary", "round", "kind"])
    assert len(found) == 4
    image, drawn = found.loc[("stolen_model", 2, "image")], found.loc[("stolen_model", 2, "class")]
    assert (image["attack"], image["control"]) == ("latent_decoder", "class_mean")
    assert image[["score", "low", "high", "leakage", "psnr", "rank", "control_rank", "n"]].tolist() == \
        pytest.approx([0.6, 0.5, 0.7, 0.05, 18, 7, 9, 8])
    assert image[["identified", "guess"]].tolist() == [0.75, 0.002]
    assert (drawn["attack"], drawn["control"]) == ("mi_strong", "grey")
    assert drawn[["score", "low", "high", "control_score", "leakage"]].tolist() == pytest.approx(
        [0.75, 0.65, 0.85, 0.125, 0.625])
    assert found.loc[("stolen_model", 1, "image"), "leakage"] == pytest.approx(0.6)
    assert found.loc[("prediction_api", 2, "image"), "leakage"] == pytest.approx(-0.4)


def test_who_chooses_a_candidate_counts_by_rank_and_not_as_a_picture():
    chosen = {("stolen_model", "latent_likelihood", 2): [(1.0, 1), (0.0, 0), (0.1, 0), (0.2, 1), (0.3, 1)]}
    table = pd.DataFrame(lines({**LAST, **chosen}))
    table.loc[(table["attack"] == "latent_likelihood") & (table["control"] == ""), "nearest_rank"] = 1
    image = leakage.condense(table).set_index(["adversary", "kind"]).loc[("stolen_model", "image")]
    assert (image["attack"], image["score"]) == ("latent_decoder", 0.6)
    assert (image["rank_attack"], image["rank"], image["control_rank"]) == ("latent_likelihood", 1, 5)
    alone = leakage.condense(pd.DataFrame(lines(chosen)))
    assert alone["score"].isna().all() and alone["leakage"].isna().all() and alone["rank"].tolist() == [7]
    assert leakage.worst(alone)["image_leakage"] is None


def test_the_worst_adversary_in_the_last_rounds():
    found = leakage.condense(pd.DataFrame(lines({**EARLY, **LAST})))
    row = leakage.worst(found)
    assert row["image_attack"] == "stolen_model latent_decoder"
    assert row["class_attack"] == "stolen_model mi_strong"
    assert (row["image_leakage"], row["image_ssim"], row["class_right"]) == pytest.approx((0.05, 0.6, 0.75))
    assert not any(leakage.worst(leakage.NONE).values())
    assert leakage.worst(leakage.condense(pd.DataFrame(lines(EARLY))))["class_right"] is None


def images(folder, attacks, rank=5):
    """Leave an ``attack.csv``: eight images, whose SSIM and share right are ``attacks``' as in the summary,
    and whose rank is ``rank`` of the attack and 5 of the controls."""
    rows = []
    for (adversary, attack, round), scores in attacks.items():
        for control, (ssim, right) in zip(("", *tables.CONTROLS), scores, strict=True):
            rows += [{**dict.fromkeys(tables.METRICS, 0.5), "adversary": adversary, "attack": attack,
                      "round": round, "client": 0, "label": i, "image": i, "restart": 0, "ssim": ssim,
                      "evaluator_correct": int(i < 8 * right), "nearest_rank": 5 if control else rank,
                      "control": control}
                     for i in range(8)]
    pd.DataFrame(rows, columns=tables.ATTACK_COLUMNS).to_csv(folder / "attack.csv", index=False)


BLURRED = {key: [(0.3, 1) if "latent_decoder" in key else scores[0], *scores[1:]]
           for key, scores in LAST.items()}
WORSE = {key: [(0.05, 0), *scores[1:]] for key, scores in LAST.items()}


@pytest.fixture
def worded(runs, tmp_path):
    """The folders ``one`` and ``two``, seeds of one setting, with an ``attack.csv``; and ``calm``."""
    for name, attacks in (("one", {**EARLY, **LAST}), ("two", BLURRED)):
        images(shutil.copytree(runs / name, tmp_path / name), attacks)
    shutil.copytree(runs / "calm", tmp_path / "calm")
    return tmp_path


def test_words_are_those_of_the_worst_attack_in_a_round(worded):
    """In round 2 of ``one``, latent_search and latent_decoder both leak; the service's decoder is better than
    a class mean too, and mi_strong is recognised more often than a blank picture."""
    found = summary.read(worded / "one")
    assert not found.unread and not found.leaks["few"].any()
    assert found.leaks.set_index(["adversary", "round", "kind"])["word"].to_dict() == {
        ("stolen_model", 1, "image"): "leaks", ("stolen_model", 2, "image"): "leaks",
        ("stolen_model", 2, "class"): "leaks", ("prediction_api", 2, "image"): "leaks"}
    images(worded / "one", {**EARLY, **WORSE})
    again = summary.read(worded / "one").leaks.set_index(["adversary", "round", "kind"])["word"]
    assert again["stolen_model", 1, "image"] == "leaks"   # the early attack is as it was
    assert again["stolen_model", 2, "image"] == "as a guess"   # SSIM is worse, the rank is level
    assert again["stolen_model", 2, "class"] == "as a guess"   # never recognised, but noise hardly ever
    images(worded / "one", WORSE, rank=9)
    with pytest.raises(ValueError, match="lacks rows of latent_decoder by stolen_model in round 1"):
        leakage.with_words(leakage.read(worded / "one"), worded / "one")
    images(worded / "one", {**EARLY, **WORSE}, rank=9)
    again = summary.read(worded / "one").leaks.set_index(["adversary", "round", "kind"])["word"]
    assert again["stolen_model", 2, "image"] == "fails"


def test_words_over_seeds(worded):
    """The decoder is under the class mean in ``two``, but latent_search leaks in both."""
    one, two = (summary.read(worded / name) for name in ("one", "two"))
    assert leakage.words_over_seeds([one, two], "stolen_model")["image"] == ("leaks", 2, 2, False)
    images(worded / "two", WORSE)
    both = [one, summary.read(worded / "two"), summary.read(worded / "calm")]
    assert leakage.words_over_seeds(both, "stolen_model") == {
        "image": ("leaks", 1, 2, False), "class": ("leaks", 1, 2, False)}
    assert leakage.words_over_seeds(both, "curious_client") == {}


@pytest.mark.parametrize("harm, reason", [
    (lambda text: "", "No columns"), (lambda text: text.split("\n")[0] + "\n", "numbers"),
    (lambda text: text.replace("psnr", "snr"), "psnr"),
    (lambda text: text.replace(",0.6,", ",high,"), "numbers"),
    (lambda text: text.replace(",0.6,", ",,"), "gaps"),
    (lambda text: text.replace("noise", "music"), "once"),
    (lambda text: text.replace("mi_face", "mi_mask"), "mi_mask"),
    (lambda text: text.replace("prediction_api", "curious_server"), "prediction_api in round 2"),
    (lambda text: "".join(text.splitlines(keepends=True)[:81]), "lacks rows of latent_decoder"),   # cut short
    (lambda text: re.sub("stolen_model,mi_face.*\\n", "", text), "lacks rows of mi_face"),
    (lambda text: re.sub(".*,7,0,.*\\n", "", text), "lacks rows of")])
def test_a_damaged_attack_csv_says_why_and_what_else_was_found_stays(report, worded, harm, reason):
    path = worded / "one" / "attack.csv"
    path.write_text(harm(path.read_text()))
    found = summary.read(worded / "one")
    assert len(found.leaks) == 4 and found.leaks["word"].isna().all()
    assert "attack.csv is damaged" in found.unread and reason in found.unread
    assert report.main(["--results_dir", str(worded)]) == 0   # the other seed's word is known
    assert "attack.csv is damaged" in (worded / "report.html").read_text()


def glance(folder):
    """The first table of a page: cells by row, their tags taken out and spaces made one."""
    text = (folder / "report.html").read_text()
    table = text[text.index("<tbody>"):text.index("</tbody>")]
    table = re.sub("<i>.*?</i>", "", table)   # the heads once more, which only narrow screens show
    return [[" ".join(re.sub(r"<[^>]*>", " ", cell).split()) for cell in row.split("<td>")[1:]]
            for row in table.split("<tr>")[1:]]


def test_the_page_opens_with_what_leaks_to_whom(report, worded):
    images(worded / "two", WORSE)
    assert report.main(["--results_dir", str(worded)]) == 0
    rows = {row[0].split()[0]: row for row in glance(worded)}
    assert set(rows) == {"rve_pfl", "fedavg"}
    assert rows["fedavg"][4:] == ["not attacked"] * 4
    assert rows["rve_pfl"][4:] == [   # in the order of ADVERSARIES
        "not attacked", "images: leaks (1 of 2 seeds) classes: leaks (1 of 2 seeds)",
        "images: leaks (1 of 2 seeds)", "not attacked"]
    deployed = pd.read_csv(worded / "summary.csv").query("stage == 'deployed' and method == 'rve_pfl'")
    assert rows["rve_pfl"][3].split()[0] == f"{deployed['accuracy'].item():.4f}"
    few = pd.read_csv(worded / "one" / "attack.csv", keep_default_na=False)
    few[few["image"] < 3].to_csv(worded / "one" / "attack.csv", index=False)
    whole = pd.read_csv(worded / "one" / "attack_summary.csv", keep_default_na=False)
    whole.assign(n=3).to_csv(worded / "one" / "attack_summary.csv", index=False)
    (worded / "two" / "attack.csv").unlink()
    assert report.main(["--results_dir", str(worded)]) == 0
    rows = {row[0].split()[0]: row for row in glance(worded)}
    assert rows["rve_pfl"][6] == "images: leaks (1 of 2 seeds, few)"
    (worded / "one" / "attack.csv").unlink()
    assert report.main(["--results_dir", str(worded)]) == 0
    rows = {row[0].split()[0]: row for row in glance(worded)}
    assert rows["rve_pfl"][6] == "images: unknown"


@pytest.mark.parametrize("harm, reason", [
    (lambda text: "", "No columns"), (lambda text: text.split("\n")[0] + "\n", "gaps"),
    (lambda text: text.replace("psnr", "snr"), "columns"),
    (lambda text: text[:200], "columns"),
    (lambda text: text.replace(",0.6,", ",,"), "gaps"),
    (lambda text: text.replace(",0.6,", ",high,"), "high"),
    (lambda text: text.replace("noise", "music"), "one of each control"),
    (lambda text: text + text.split("\n")[1] + "\n", "one of each control"),
    (lambda text: text.replace("prediction_api", "neighbour"), "neighbour")])
def test_a_damaged_attack_says_why_and_the_run_stays(report, runs, tmp_path, harm, reason):
    folder = shutil.copytree(runs / "one", tmp_path / "one")
    path = folder / "attack_summary.csv"
    path.write_text(harm(path.read_text()))
    found = summary.read(folder)
    assert not len(found.leaks) and reason in found.unread and found.unread.count("\n") == 0


def test_an_attack_without_its_options_is_damaged(report, runs, tmp_path):
    folder = shutil.copytree(runs / "one", tmp_path / "one")
    for text in ("{", "[]", '{"public": "unowned"}'):
        (folder / "attack.json").write_text(text)
        assert "damaged" in summary.read(folder).unread
    (folder / "attack.json").unlink()
    unread = summary.read(folder).unread
    assert "attack.json" in unread


def test_summary_means_over_seeds(report, runs):
    assert report.main(["--results_dir", str(runs)]) == 0
    table = pd.read_csv(runs / "summary.csv")
    deployed = table[table["stage"] == "deployed"].set_index("command")
    both = deployed[deployed["seeds"] == "1 2"].iloc[0]
    assert both["seeds_attacked"] == 2
    assert both[["image_leakage", "image_ssim", "class_right"]].tolist() == pytest.approx([-0.05, 0.5, 0.5])
    assert both["image_leakage_std"] == pytest.approx(0.1 * math.sqrt(2), rel=1e-4)   # of 0.05 and -0.15
    assert both["image_attack"] == "stolen_model latent_decoder"
    assert both["class_attack"] == "stolen_model mi_strong; stolen_model mi_face"   # equal: the first
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


def rings(axes):
    """How high stand those whose rank is under every control's."""
    return [y for line in axes.lines if line.get_markersize() == 11 for y in line.get_ydata()]


def test_pictures_have_the_points(report, runs):
    rows = pd.concat([leakage.beside_utility(summary.read(runs / name)) for name in ("one", "two", "beta")])
    axes = leakage.picture(rows, "image", "round").axes[0]
    drawn = [line.get_xydata().tolist() for line in axes.lines]
    assert any(line == [[1, pytest.approx(0.6)], [2, pytest.approx(0.05)]] for line in drawn)
    intervals = [segment.tolist() for bars in axes.collections for segment in bars.get_segments()]
    assert pytest.approx([1, 0.5]) in [low for low, _ in intervals]   # over the control too: 0.8 - 0.3
    assert axes.get_ylabel() and axes.get_xlabel() == "round"
    assert {text.get_text() for text in axes.texts} == {"β=1e-05", "β=0.01"}
    last = leakage.latest(rows[rows["run"] == "one"])
    axes = leakage.picture(last, "class", "accuracy").axes[0]
    assert axes.lines[0].get_xydata()[0].tolist() == [last["accuracy"].iloc[0], 0.75] and not axes.texts
    assert not rings(axes)
    assert rings(leakage.picture(last, "image", "accuracy").axes[0]) == pytest.approx([0.05])
    assert axes.get_ylim()[0] < 0.65 and axes.get_ylim()[1] > 0.85   # the interval is on the picture
    leakage.plt.close("all")


def test_the_page(report, runs, capsys):
    assert report.main(["--results_dir", str(runs)]) == 0
    assert "left out: torn: finished, but attack_summary.csv" in capsys.readouterr().out
    text = (runs / "report.html").read_text()
    assert "latent_decoder</small> 0.60 [0.50, 0.70]" in text and "class_mean</small> 0.55" in text
    assert "mi_strong</small> 0.75 [0.65, 0.85]" in text and "grey</small> 0.12" in text
    assert "not a proof of privacy" in text and "PSNR alone" in text
    assert "different budgets" in text   # one trained on other public images
    assert "&lt;i&gt;mine" in text and "<i>mine" not in text
    assert "mi_&lt;b&gt;" in text and "mi_<b>" not in text
    assert text.count("leakage over accuracy") == 2 and text.count("leakage over round") == 2
    assert text.count("in pictures") == 3 and text.count("alt='attack_stolen_model_latent_decoder") == 3
    assert not re.search(r"https?://|<script|<link", text)
    assert all(source.startswith("data:image/png;base64,") for source in re.findall(r"src='([^']*)", text))
    assert "<td>75% (0.2%)</td>" in text
    for method in ("fedavg", "local"):   # not attacked, or its attack damaged: its accuracy is shown
        assert f"<td>{method} <small>2 clients" in text and f"<td>{method} <small>torn" not in text


def test_a_page_without_attacks_says_nothing_of_them(report, runs, tmp_path):
    shutil.copytree(runs / "calm", tmp_path / "calm")
    assert report.main(["--results_dir", str(tmp_path)]) == 0
    text = (tmp_path / "report.html").read_text()
    assert "fedavg" in text and "attack" not in text


def test_rows_say_which_options_differ_and_no_others(report, worded, runs):
    shutil.copytree(runs / "beta", worded / "beta")
    assert report.main(["--results_dir", str(worded)]) == 0
    assert sorted(row[0] for row in glance(worded)) == ["fedavg", "rve_pfl", "rve_pfl kl_weight 0.01"]
