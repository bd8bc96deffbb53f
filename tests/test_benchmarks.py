"""The attacks' benchmarks run, at a size that measures nothing."""
import importlib
import importlib.util
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT

from attack import classes


@pytest.fixture
def script(monkeypatch):
    """A script of benchmarks/ by its name."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module


def test_batching_prints_each_line(script, capsys):
    script("batching").main(["--iterations", "1", "--repeats", "1", "--draws", "2"])
    lines = capsys.readouterr().out.splitlines()[2:]
    assert [line[:30].strip() for line in lines] == [
        "mi_face", "mi_strong", "FedAvg, MI-Face set", "mi_face", "mi_strong", "RVE-PFL, MI-Face set",
        "FedAvg, gradient inversion"]
    assert all(float(figure) > 0 for line in lines for figure in line[30:].split())


def test_one_batch_does_the_work_of_the_loop(script):
    """What the ratios rest on: the same images, whichever way."""
    view, y = script("batching").holdings(False), torch.arange(3)
    whole = classes.mi_face(view.logits, y, (1, 28, 28), 5)
    alone = [classes.mi_face(view.logits, one, (1, 28, 28), 5) for one in y.split(1)]
    torch.testing.assert_close(whole, torch.cat(alone), atol=1e-4, rtol=1e-3)


def test_without_art_its_comparison_says_so_in_one_line(script, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "art", None)
    assert script("art_miface").main(["--run", "any"]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and "pip install --target" in lines[0]


def test_real_uploads_of_a_tiny_run(script, place, capsys):
    """One image, one step; and a run or a number that it cannot attack, in one line."""
    assert place.main("--method", "fedavg", "--rounds", 1) == 0
    folders = [word for name in ("results", "models", "data")
               for word in (f"--{name}_dir", str(place.folder / name))]
    few = ["--images", "1", "--epochs", "1", "--optimizers", "adam", "--iterations", "3", "--simulations", "1"]
    main = script("real_uploads").main
    assert main(["--run", "run", *folders, *few, "--csv", str(place.folder / "out.csv")]) == 0
    assert len((place.folder / "out.csv").read_text().splitlines()) == 3
    capsys.readouterr()
    for wrong in (["--run", "none"], ["--run", "run", "--images", "100000"], ["--run", "run", "--client", "9"],
                  ["--run", "run", "--epochs", "0"], ["--run", "run", "--rounds", "7"]):
        assert main([*folders, *wrong]) == 2
        assert len(capsys.readouterr().err.strip().splitlines()) == 1


@pytest.fixture
def tiny_run(place, tiny_arrays):
    """A method -> the flags that name a run of it, on the data set `tiny10k`; beside it `tiny`, for the public."""
    def train(method):
        other = {name: values if "labels" in name else 255 - values for name, values in tiny_arrays.items()}
        data = place.folder / "data"
        np.savez(data / "tiny10k.npz", **tiny_arrays)
        np.savez(data / "tiny.npz", **{name: np.concatenate([other[name]] * 3) for name in other})
        assert place.main("--method", method, "--dataset", "tiny10k", "--rounds", 2, "--save_rounds", 1) == 0
        return ["--run", "run", *(word for name in ("results", "models", "data")
                                  for word in (f"--{name}_dir", str(place.folder / name)))]
    return train


def test_the_ladder_has_all_its_rungs(script, place, tiny_run):
    flags = tiny_run("rve_pfl")
    assert script("ladder").main([*flags, "--public", "tiny", "--other", "tiny", "--images", "2", "--hops", "1",
                                  "--train_epochs", "1", "--seen", "40"]) == 0
    table = pd.read_csv(place.results / "ladder.csv")
    assert list(dict.fromkeys(table["rung"])) == [
        "own", "private", "aligned many", "aligned", "public", "replayed", "other", "class mean"]
    assert set(table["latent"].dropna()) == {"observed", "recovered"} and np.isfinite(table["ssim"]).all()


def test_more_public_images(script, place, tiny_run):
    flags = tiny_run("lg_fedavg")
    table = place.folder / "public.csv"
    assert script("public_images").main([*flags, "--public", "tiny", "--counts", "200", "300", "--images", "2",
                                         "--iterations", "2", "--steps", "4", "--csv", str(table)]) == 0
    found = pd.read_csv(table)
    assert set(found["public_images"]) == {200, 300} and {"latent_decoder", "class_mean"} <= set(found["attack"])
    assert not list(place.results.glob("attack*"))   # the run's own results are as they were


def test_the_published_settings_beside_ours(script, place, tiny_run, capsys):
    flags = tiny_run("fedavg")
    main = script("inverting_gradients").main
    assert main([*flags, "--public", "tiny", "--images", "2", "--iterations", "8"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[-4:]] == [
        "published", "cosine_tv", "analytic", "gauss_newton"]


@pytest.mark.parametrize("name, flag", [("ladder", "--run"), ("public_images", "--run"),
                                        ("which_classes", "--runs"), ("inverting_gradients", "--run")])
def test_a_run_that_is_not_there_is_one_line(script, name, flag, tmp_path, capsys):
    assert script(name).main([flag, "none", "--results_dir", str(tmp_path)]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith(f"{name}.py: error: ")


def test_the_grid_of_the_server_plays_resumes_and_varies(script, tmp_path, tiny_arrays, monkeypatch, capsys):
    script("_path")
    spec = importlib.util.spec_from_file_location("grid", ROOT / "benchmarks" / "server.py")   # not the package
    server = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(server)
    (tmp_path / "data").mkdir()
    arrays = {name: np.concatenate([part] * 2) for name, part in tiny_arrays.items()}
    np.savez(tmp_path / "data" / "tiny.npz", **arrays)
    monkeypatch.setattr(server, "ROOT", tmp_path)
    flags = ["--out", str(tmp_path / "out"), "--datasets", "tiny", "--seeds", "1", "--partitions", "iid",
             "--fracs", "0.3", "--rounds", "2", "--images", "12", "--local_bs", "8"]
    grid = [*flags, "--rules", "threat", "mean", "--behaviours", "adaptive", "backdoor_patch"]
    server.main(grid)
    cells = pd.read_csv(tmp_path / "out" / "cells.csv")
    assert len(cells) == 2 * (2 + 1 + 4) and cells["accuracy"].between(0, 1).all()
    assert cells["backdoor"].notna().tolist() == (cells["behaviour"] == "backdoor_patch").tolist()
    assert "points lost to the oracle" in capsys.readouterr().out
    before = (tmp_path / "out" / "cells.csv").read_bytes()
    server.main(grid)   # nothing is left to play
    assert (tmp_path / "out" / "cells.csv").read_bytes() == before
    kept = cells[cells["behaviour"] != "backdoor_patch"]
    kept.to_csv(tmp_path / "out" / "cells.csv", index=False)
    server.main([*grid, "--part", "0", "1"])   # the same figures, played again
    again = pd.read_csv(tmp_path / "out" / "cells.csv")
    order = list(server.Cell._fields)
    pd.testing.assert_frame_equal(again.sort_values(order, ignore_index=True).drop(columns="seconds"),
                                  cells.sort_values(order, ignore_index=True).drop(columns="seconds"))
    monkeypatch.setattr(server, "CONSTANTS", ("GAP", "COPY"))
    old = server.threat_aware.GAP, server.threat_aware.COPY
    server.main([*flags, "--scopes", "models", "--sensitivity"])
    varied = pd.read_csv(tmp_path / "out" / "sensitivity.csv")
    assert len(varied) == 2 * (1 + 4) and old == (server.threat_aware.GAP, server.threat_aware.COPY)
