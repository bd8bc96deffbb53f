"""--tensorboard: event files hold a run's scalars and the attacks' pictures, and nothing else of it changes."""
import importlib.util
import io

import numpy as np
import pandas as pd
import pytest
from attacked import Attacked
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from attack import evaluation, mi_attack
from runs import board

FLAGS = ("--method", "fedavg", "--rounds", 2)
QUICK = ("--images", 2, "--restarts", 1, "--iterations", 2, "--train_epochs", 1, "--adversary", "curious_server")


def events(results):
    """Return the scalars (step -> value) and the images (step -> pixels) by tag; no step may be there twice."""
    reader = EventAccumulator(str(results / "tensorboard"), size_guidance={"scalars": 0, "images": 0}).Reload()
    tags = reader.Tags()
    scalars = {tag: [(event.step, event.value) for event in reader.Scalars(tag)] for tag in tags["scalars"]}
    images = {tag: [(event.step, np.asarray(Image.open(io.BytesIO(event.encoded_image_string))))
                    for event in reader.Images(tag)] for tag in tags["images"]}
    for steps in (*scalars.values(), *images.values()):
        assert len(dict(steps)) == len(steps)
    return tuple({tag: dict(steps) for tag, steps in found.items()} for found in (scalars, images))


def test_scalars_are_the_rounds_after_a_resume_and_change_nothing_else(place, capsys):
    assert place.main(*FLAGS, "--rounds", 1, "--tensorboard") == 0
    with board.SummaryWriter(str(place.results / "tensorboard"), filename_suffix=".rounds") as writer:
        writer.add_scalar("loss/deployed_test", 7, 2)   # of a round that was lost with a killed process
    assert place.main(*FLAGS, "--tensorboard", "--resume") == 0
    rounds, (scalars, images) = pd.read_csv(place.results / "rounds.csv"), events(place.results)
    expected = {}
    for row in rounds.to_dict("records"):
        number, stage, split = (row.pop(name) for name in ("round", "stage", "split"))
        for name, value in row.items():
            if not np.isnan(value):
                tag = f"{name.replace('_class_', '_class/')}/{stage}_{split}"
                expected.setdefault(tag, {})[number] = pytest.approx(value, rel=1e-6)
    assert scalars == expected and not images and "accuracy_class/3/deployed_test" in scalars
    with_board, options = place.clients_csv(), place.config["options"]
    (place.results / "tensorboard" / "events.mine").touch()
    assert place.main(*FLAGS, "--overwrite") == 0
    assert place.clients_csv() == with_board
    plain = place.config["options"]
    assert {name for name in plain if plain[name] != options[name]} == {"tensorboard", "resume", "overwrite"}
    assert [path.name for path in (place.results / "tensorboard").iterdir()] == ["events.mine"]


def save_red(path, rows, captions, labels, title):
    """Save a picture of 4 x 6 red pixels."""
    Image.new("RGB", (6, 4), (255, 0, 0)).save(path)


def test_pictures_of_all_attacks_stand_beside_the_scalars(place, tiny_arrays, monkeypatch):
    monkeypatch.setattr(evaluation, "save_picture", save_red)
    runs = {"run": (*FLAGS, "--save_rounds", 1, "--tensorboard")}
    attacked = Attacked(place, tiny_arrays, mi_attack, QUICK, runs)
    assert attacked.attack("run", "--attack", "analytic", "--rounds", 1) == 0
    scalars, images = events(place.results)
    assert scalars and not images   # not asked for
    assert attacked.attack("run", "--attack", "analytic", "--rounds", 1, 2, "--tensorboard") == 0
    assert attacked.attack("run", "--attack", "mi_face", "--tensorboard") == 0
    kept, images = events(place.results)
    assert kept == scalars
    assert {tag: [*steps] for tag, steps in images.items()} == {
        "attack/curious_server_analytic_client0": [1, 2], "attack/curious_server_mi_face_client0": [2]}
    pixels = images["attack/curious_server_analytic_client0"][1]
    assert pixels.shape == (4, 6, 3) and (pixels == [255, 0, 0]).all()
    assert attacked.attack("run", "--attack", "analytic", "--overwrite") == 0
    assert events(place.results) == (scalars, {})   # those of deleted attacks are gone


def test_without_the_package_it_is_refused_before_anything_is_written(place, tiny_arrays, capsys, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "tensorboard" else find(name))
    line = place.refuses(capsys, *FLAGS, "--tensorboard")
    assert "--tensorboard: the package tensorboard is not installed" in line
    assert "requirements-tensorboard.txt" in line and not place.results.exists()
    (place.folder / "results" / "run").mkdir(parents=True)
    assert "not installed" in Attacked(place, tiny_arrays, mi_attack).refuses(capsys, "run", "--tensorboard")
