"""The word for an attack, from hand-written rows of attack.csv."""
import itertools

import numpy as np
import pandas as pd
import pytest

from attack import mi_attack
from attack.attacks import ATTACKS
from attack.verdict import (
    ATTACK_COLUMNS,
    FOREIGN,
    GUESS,
    LEAKS,
    METRICS,
    Unit,
    judge,
    read_attack,
    sign_flip,
    worst_identified,
)

LEVEL = np.array([0.1, -0.1] * 4)   # of mean 0
RANKS = {"": 50, FOREIGN: 50}


def rows(ssim=None, rank=None, right=None, attack="latent_decoder", count=8, controls=(FOREIGN,)):
    """attack.csv with a value, or one for each image, by control ("" for the attack itself); else 0."""
    made = []
    for control in ("", *controls):
        table = pd.DataFrame({**Unit("stolen_model", attack, 2, 0)._asdict(), "label": range(count),
                              "image": range(40, 40 + count), "restart": 0, "control": control,
                              **dict.fromkeys(METRICS, 0.0), "guess": 0.002, "class_size": 100,
                              "kl_nats": np.nan})
        for metric, values in (("ssim", ssim), ("class_rank", rank), ("evaluator_correct", right)):
            table[metric] = np.broadcast_to((values or {}).get(control, 0.0), count)
        made.append(table[ATTACK_COLUMNS])
    return pd.concat(made, ignore_index=True)


@pytest.mark.parametrize("ssim, rank, word", [
    (0.6, 50, LEAKS), (0.4, 50, GUESS), (0.5, 50, GUESS),   # better, worse and level, and a level rank
    (0.5 + LEVEL, 40, LEAKS), (0.5 + LEVEL, 60, GUESS),     # a level SSIM
    (0.6, 60, LEAKS), (0.4, 40, LEAKS), (0.4, 60, GUESS)])
def test_single_images_are_judged_by_ssim_and_rank_in_the_class(ssim, rank, word):
    verdict = judge(rows({"": ssim, FOREIGN: 0.5}, {**RANKS, "": rank}), ATTACKS["latent_decoder"])
    assert verdict.word == word and verdict.count == 8 and not verdict.few
    assert [(one.metric, one.control) for one in verdict.comparisons] == [
        ("ssim", FOREIGN), ("class_rank", FOREIGN)]


@pytest.mark.parametrize("rank, foreign, word", [
    (40, 50, LEAKS), (50 + 100 * LEVEL, 50, GUESS), (60, 50, GUESS),
    (60, 90, GUESS)])   # better than its control, and worse than a guess in a class of 100
def test_who_chooses_a_candidate_is_judged_by_its_rank_alone(rank, foreign, word):
    table = rows({"": 1.0}, {"": rank, FOREIGN: foreign}, attack="reidentification")
    assert judge(table, ATTACKS["reidentification"]).word == word


@pytest.mark.parametrize("right, word", [(1, LEAKS), ([1, 0] * 4, GUESS), (0, GUESS)])
def test_classes_are_judged_beside_the_best_of_their_controls(right, word):
    controls = {"grey": 0, "noise": [1, 0, 0, 0] * 2}
    table = rows(right={"": right, **controls}, attack="mi_face", controls=controls)
    verdict = judge(table, ATTACKS["mi_face"])
    assert verdict.word == word
    only, = verdict.comparisons
    assert (only.metric, only.control, only.control_score) == ("evaluator_correct", "noise", 0.25)
    table = rows(right={"": right, **controls, "class_mean": 1}, attack="mi_face",
                 controls=[*controls, "class_mean"])
    assert judge(table, ATTACKS["mi_face"]).word == GUESS


def test_the_level_is_shared_by_the_metrics_and_divided_by_the_caller():
    """Six images on one side have p = 1/64, which is less than 0.05 / 2 and more than 0.025 / 2."""
    table, attack = rows({"": 0.6, FOREIGN: 0.5}, RANKS, count=6), ATTACKS["latent_decoder"]
    verdict = judge(table, attack)
    assert verdict.word == LEAKS and verdict.comparisons[0].p == 1 / 64 and not verdict.few
    assert judge(table, attack, 0.025).word == GUESS and judge(table, attack, 0.025).few


@pytest.mark.parametrize("count", [3, 9])
def test_the_probability_is_the_share_of_signs_with_as_great_a_mean(count):
    values = np.random.default_rng(count).normal(0.3, 1, count)
    sums = [np.dot(signs, values) for signs in itertools.product([1, -1], repeat=count)]
    expected = np.mean([one >= values.sum() - 1e-12 for one in sums])
    assert sign_flip(values) == pytest.approx(expected)
    assert sign_flip(np.concatenate([values, np.zeros(9)])) == pytest.approx(expected)   # 0 has no sign
    assert sign_flip(np.zeros(4)) == 1


def test_the_probability_with_many_images_is_estimated():
    """Beside the normal approximation of a mean of 400."""
    values = np.random.default_rng(2).normal(0, 1, 400)
    values += 1.645 * np.sqrt((values**2).mean() / 400) - values.mean()
    assert sign_flip(values) == pytest.approx(0.05, abs=0.01)


def test_differences_are_taken_image_by_image():
    """Images differ far more than the attack does from its control, and rows may stand in any order."""
    hard = np.linspace(0, 0.9, 8)
    table = rows({"": hard + 0.01, FOREIGN: hard}, RANKS)
    assert judge(table, ATTACKS["latent_decoder"]).word == LEAKS
    shuffled = table.sample(frac=1, random_state=1)
    assert judge(shuffled, ATTACKS["latent_decoder"]) == judge(table, ATTACKS["latent_decoder"])


def test_only_first_choices_count():
    table = rows({"": 0.4, FOREIGN: 0.5}, {**RANKS, "": 60})
    second = table[table["control"] == ""].assign(restart=1, ssim=1.0, class_rank=1.0)
    assert judge(pd.concat([table, second]), ATTACKS["latent_decoder"]).word == GUESS


def test_clients_are_pooled_and_few_images_are_marked():
    one = rows({"": 0.6, FOREIGN: 0.5}, RANKS, count=3)
    assert judge(one, ATTACKS["latent_decoder"]).few
    both = judge(pd.concat([one, one.assign(client=1)]), ATTACKS["latent_decoder"])
    assert both.count == 6 and not both.few and both.word == LEAKS


@pytest.mark.parametrize("harm", [
    lambda table: table[table["control"] != FOREIGN], lambda table: table[table["control"] != ""],
    lambda table: table.drop(index=9), lambda table: pd.concat([table, table.head(1)]),
    lambda table: pd.concat([table, table]),
    lambda table: table.assign(ssim=table["ssim"].where(table.index != 3))])
def test_rows_with_gaps_are_refused(harm):
    with pytest.raises(ValueError):
        judge(harm(rows({"": 0.6}, RANKS)), ATTACKS["latent_decoder"])


def test_what_is_written_is_read(tmp_path):
    table = rows({"": 0.6, FOREIGN: 0.5}, RANKS)
    table.to_csv(tmp_path / "attack.csv", index=False)
    assert judge(read_attack(tmp_path / "attack.csv"), ATTACKS["latent_decoder"]) == judge(
        table, ATTACKS["latent_decoder"])
    table.drop(columns="class_rank").to_csv(tmp_path / "attack.csv", index=False)
    with pytest.raises(ValueError, match="no column class_rank"):
        read_attack(tmp_path / "attack.csv")
    with pytest.raises(ValueError, match="no plain file"):
        read_attack(tmp_path)


def test_the_worst_images_are_those_with_the_highest_kl():
    """Two of 100, and one of 10."""
    table = pd.DataFrame({"kl_nats": np.arange(100.0), "identified": 0})
    table.loc[99, "identified"] = 1
    assert worst_identified(table) == 0.5 and worst_identified(table.tail(10)) == 1
    assert worst_identified(table.head(10)) == 0 and np.isnan(worst_identified(table.assign(kl_nats=np.nan)))


def test_the_line_that_is_printed():
    table = rows({"": 0.75, FOREIGN: 0.51}, {"": [1, 1, 1, 1, 2, 2, 2, 30], FOREIGN: 44}, {"": 1})
    table.loc[:3, "identified"] = 1
    table["kl_nats"] = [*range(8), *range(8)]
    unit = Unit("stolen_model", "latent_decoder", 2, 0)
    assert mi_attack.MiAttack.describe(unit, table.to_dict("records")) == (
        "leaks. SSIM 0.75 (foreign 0.51, p = 0.0039), rank in its class 5 (foreign 44, p = 0.0039), rank 0, "
        "PSNR 0.0 dB, evaluator right 100%, identified 4 of 8 (a guess: 0.0), of the 2% with the highest KL 0%")
    table = rows(right={"": [1, 0], "noise": [0, 1]}, attack="mi_face", count=2, controls=("noise",))
    said = mi_attack.MiAttack.describe(unit._replace(attack="mi_face"), table.to_dict("records"))
    assert said.startswith("as a guess (only 2 classes). SSIM 0.00, rank in its class 0, rank 0, PSNR")
    assert "evaluator right 50% (noise 50%, p = 0.75)" in said and "identified" not in said
