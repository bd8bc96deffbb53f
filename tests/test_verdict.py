"""The word for an attack, from hand-written rows of attack.csv."""
import numpy as np
import pandas as pd
import pytest

from attack import mi_attack
from attack.attacks import ATTACKS
from attack.tables import ATTACK_COLUMNS, CONTROLS, METRICS, NEWER_METRICS, Unit, read_attack
from attack.verdict import FAILS, GUESS, LEAKS, judge

# By name: of an attack (""), and of each control, SSIM and rank of eight images, or who is recognised.
LEVEL = np.array([0.1, -0.1] * 4)   # of mean 0, so no interval around it is on one side


def rows(ssim=None, rank=None, right=None, attack="latent_decoder", count=8):
    """attack.csv with a value, or one for each image, of the attack and of some controls; else 0."""
    made = []
    for control in ("", *CONTROLS):
        table = pd.DataFrame({**Unit("stolen_model", attack, 2, 0)._asdict(), "label": range(count),
                              "image": range(40, 40 + count), "restart": 0, **dict.fromkeys(METRICS, 0.0),
                              "control": control, **dict.fromkeys(NEWER_METRICS, 0.0)})
        for metric, values in (("ssim", ssim), ("nearest_rank", rank), ("evaluator_correct", right)):
            table[metric] = np.broadcast_to((values or {}).get(control, 0.0), count)
        made.append(table[ATTACK_COLUMNS])
    return pd.concat(made, ignore_index=True)


RANKS = {"": 100, "grey": 200, "noise": 250, "class_mean": 100, "nearest_public": 1}   # level


@pytest.mark.parametrize("ssim, rank, word", [
    (0.6, 100, LEAKS), (0.4, 100, GUESS), (0.5, 100, GUESS),   # better, worse and level, and a level rank
    (0.5 + LEVEL, 90, LEAKS), (0.5 + LEVEL, 110, GUESS),       # a level SSIM
    (0.6, 110, LEAKS), (0.4, 90, LEAKS),                       # one is better and the other worse
    (0.6, 90, LEAKS), (0.4, 110, FAILS), (0.5 + LEVEL, 100 + 100 * LEVEL, GUESS)])
def test_single_images_are_judged_by_ssim_and_rank(ssim, rank, word):
    table = rows({"": ssim, "class_mean": 0.5, "grey": 0.1, "nearest_public": 0.9}, {**RANKS, "": rank})
    verdict = judge(table, ATTACKS["latent_decoder"])
    assert verdict.word == word and verdict.count == 8 and not verdict.few
    assert [one.control for one in verdict.comparisons] == ["class_mean", "class_mean"]


@pytest.mark.parametrize("rank, word", [(90, LEAKS), (100 + 100 * LEVEL, GUESS), (110, FAILS)])
def test_who_chooses_a_candidate_is_judged_by_its_rank_alone(rank, word):
    table = rows({"": 1.0, "class_mean": 0.5}, {**RANKS, "": rank}, attack="latent_likelihood")
    assert judge(table, ATTACKS["latent_likelihood"]).word == word


@pytest.mark.parametrize("right, word", [(1, LEAKS), ([1, 0] * 4, GUESS), (0, FAILS)])
def test_classes_are_judged_by_what_the_evaluator_recognises(right, word):
    """Beside blank pictures: class means are real images, and recognised whatever a model tells."""
    controls = {"noise": [1, 0, 0, 1] * 2, "grey": 0, "class_mean": 1, "nearest_public": 1}
    verdict = judge(rows(right={"": right, **controls}, attack="mi_face"), ATTACKS["mi_face"])
    assert verdict.word == word
    only, = verdict.comparisons
    assert (only.metric, only.control, only.control_score) == ("evaluator_correct", "noise", 0.5)


def test_differences_are_taken_image_by_image():
    """Images differ far more than the attack does from its control, and rows may stand in any order."""
    hard = np.linspace(0, 0.9, 8)
    table = rows({"": hard + 0.01, "class_mean": hard}, RANKS)
    assert judge(table, ATTACKS["latent_decoder"]).word == LEAKS
    shuffled = table.sample(frac=1, random_state=1)
    assert judge(shuffled, ATTACKS["latent_decoder"]) == judge(table, ATTACKS["latent_decoder"])
    ssim = judge(table, ATTACKS["latent_decoder"]).comparisons[0]
    assert (ssim.low, ssim.high) == pytest.approx((0.01, 0.01))


def test_only_first_choices_count():
    table = rows({"": 0.4, "class_mean": 0.5}, {**RANKS, "": 110})
    second = table[table["control"] == ""].assign(restart=1, ssim=1.0, nearest_rank=1.0)
    assert judge(pd.concat([table, second]), ATTACKS["latent_decoder"]).word == FAILS


def test_clients_are_pooled_and_few_images_are_marked():
    one = rows({"": 0.6, "class_mean": 0.5}, RANKS, count=3)
    assert judge(one, ATTACKS["latent_decoder"]).few
    both = judge(pd.concat([one, one.assign(client=1)]), ATTACKS["latent_decoder"])
    assert both.count == 6 and not both.few


@pytest.mark.parametrize("harm", [
    lambda table: table[table["control"] != "noise"], lambda table: table[table["control"] != ""],
    lambda table: table.drop(index=9), lambda table: pd.concat([table, table.head(1)]),
    lambda table: pd.concat([table, table]),
    lambda table: table.assign(ssim=table["ssim"].where(table.index != 3))])
def test_rows_with_gaps_are_refused(harm):
    with pytest.raises(ValueError):
        judge(harm(rows({"": 0.6}, RANKS)), ATTACKS["latent_decoder"])


def test_what_is_written_is_read(tmp_path):
    table = rows({"": 0.6, "class_mean": 0.5}, RANKS)
    table.to_csv(tmp_path / "attack.csv", index=False)
    assert judge(read_attack(tmp_path / "attack.csv"), ATTACKS["latent_decoder"]) == judge(
        table, ATTACKS["latent_decoder"])
    with pytest.raises(ValueError, match="no plain file"):
        read_attack(tmp_path)


def test_the_line_that_is_printed():
    table = rows({"": 0.75, "class_mean": 0.51, "nearest_public": 0.82},
                 {"": [1, 1, 1, 1, 2, 2, 2, 30], "class_mean": 114, "grey": 300, "noise": 300,
                  "nearest_public": 2}, {"": 1}).assign(guess=1 / 500)
    table.loc[:3, "identified"] = 1
    unit = Unit("stolen_model", "latent_decoder", 2, 0)
    assert mi_attack.in_words(table.to_dict("records"), unit) == (
        "leaks. SSIM 0.75 (class mean 0.51, nearest public 0.82), mean rank 5 (class mean 114, nearest "
        "public 2), median rank 2, identified 4 of 8 (a guess: 0.0), PSNR 0.0 dB, evaluator right 100%")
    table = rows(right={"": [1, 0], "noise": [0, 1]}, attack="mi_face", count=2)
    said = mi_attack.in_words(table.to_dict("records"), unit._replace(attack="mi_face"))
    assert said.startswith("as a guess (only 2 classes). evaluator right 50% (noise 50%), SSIM 0.00, mean")
