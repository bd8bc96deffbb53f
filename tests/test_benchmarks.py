"""The attacks' benchmarks run, at a size that measures nothing."""
import csv
import importlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT

from attack import classes
from engine.graphs import GraphedTrainer
from engine.signals import Interrupted


@pytest.fixture
def script(monkeypatch):
    """A script of benchmarks/ by its name."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module


def test_batching_prints_each_line(script, capsys):
    script("batching").main(["--iterations", "1", "--repeats", "1", "--draws", "2"])
    lines = capsys.readouterr().out.splitlines()[2:]
    assert [line[:30].strip() for line in lines] == [
        "mi_face", "margin", "FedAvg, MI-Face set", "mi_face", "margin", "RVE-PFL, MI-Face set",
        "FedAvg, gradient inversion"]
    assert all(float(figure) > 0 for line in lines for figure in line[30:].split())


def test_one_batch_does_the_work_of_the_loop(script):
    """What the ratios rest on: the same images, whichever way."""
    view, y = script("batching").knowledge(False), torch.arange(3)
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
                  ["--run", "run", "--rounds", "7"]):
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


def test_the_ladder_has_all_its_rungs(script, place, tiny_run, few_steps):
    flags = tiny_run("rve_pfl")
    assert script("ladder").main([*flags, "--public", "tiny", "--other", "tiny", "--images", "2", "--hops", "1",
                                  "--train_epochs", "1", "--seen", "40"]) == 0
    table = pd.read_csv(place.results / "ladder.csv")
    assert list(dict.fromkeys(table["rung"])) == [
        "own", "private", "aligned many", "aligned", "public", "replayed", "other", "class mean"]
    assert set(table["latent"].dropna()) == {"observed", "recovered"} and np.isfinite(table["median_rank"]).all()


def test_the_published_settings_beside_ours(script, place, tiny_run, few_steps, capsys):
    flags = tiny_run("fedavg")
    main = script("inverting_gradients").main
    assert main([*flags, "--public", "tiny", "--images", "2", "--iterations", "8"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[-4:]] == [
        "published", "cosine_tv", "analytic", "gauss_newton"]


def test_the_frontier_trains_attacks_and_draws(script, place, tiny_run, few_steps, monkeypatch, capsys):
    """Each run once; what is there is not trained again, and validation leaves no attack behind."""
    folders, table = tiny_run("fedavg")[2:], place.folder / "frontier.csv"
    frontier = script("frontier")
    flags = [*folders, "--datasets", "tiny10k", "--partitions", "shards", "--seeds", "1", "--rounds", "3",
             "--local_ep", "1", "--local_bs", "16", "--images", "2", "--train_epochs", "1",
             "--settings", "published", "trunk, class prior", "local", "fedavg"]
    assert frontier.main([*flags, "--table"]) == 2 and "no finished run" in capsys.readouterr().err
    assert frontier.main([*flags, "--csv", str(table)]) == 0
    found = pd.read_csv(table).set_index("setting")
    assert list(found.index) == ["fedavg", "local", "published", "trunk, class prior"]
    assert found["deployed"].between(0, 1).all() and found.loc["published", "kl_nats"] > 0
    assert np.isfinite(found.loc[["published", "trunk, class prior", "local"], "thief_rank"]).all()
    told = ["candidates_rank", "attacked_nats", "bound_nats"]
    assert np.isfinite(found.loc["published", told].astype(float)).all()
    assert np.isnan(found.loc["fedavg", "thief_rank"])
    assert (place.folder / "frontier_tiny10k.png").stat().st_size > 5000
    assert not list((place.folder / "models").glob("frontier*"))   # checkpoints are large
    monkeypatch.setattr(frontier, "attack", None)
    assert frontier.main([*flags, "--validate", "--settings", "published"]) == 0
    assert frontier.main([*flags, "--csv", str(table), "--settings", "published"]) == 0   # nothing is left to do
    assert pd.read_csv(table).set_index("setting").equals(found)   # rows of other runs stay
    summary = place.folder / "results" / "frontier-tiny10k-shards-published-s1" / "attack_summary.csv"
    kept = summary.read_bytes()
    summary.unlink()   # as while an attack goes on
    assert "thief_rank" not in frontier.outcome(
        {"dataset": "tiny10k", "partition": "shards", "setting": "published", "seed": 1},
        frontier.argparse.Namespace(results_dir=summary.parents[1], validate=False))
    summary.write_bytes(kept)
    table.write_text("seed\n1\n")
    capsys.readouterr()
    for path, word in ((table, "no table of this command"), (place.folder, "directory")):
        assert frontier.main([*flags, "--csv", str(path)]) == 2
        assert word in capsys.readouterr().err.splitlines()[-1] and table.read_text() == "seed\n1\n"
    with pytest.raises(SystemExit):
        frontier.main([*flags, "--validate", "--csv", str(table)])
    assert frontier.main([*flags, "--out", str(place.folder / "out")]) == 0
    kept = place.folder / "out" / "frontier-tiny10k-shards-published-s1"
    assert sorted(path.name for path in kept.iterdir()) == [
        "attack.csv", "attack.json", "attack_latents.csv", "clients.csv", "config.json", "rounds.csv"]
    assert str(place.folder) not in (kept / "config.json").read_text()
    assert set(pd.read_csv(kept / "clients.csv")["round"]) == {3} and len(list(kept.parent.iterdir())) == 4


def test_the_frontier_keeps_what_it_did_not_attack(script, place, tiny_run, monkeypatch, capsys):
    """What ends an attack ends the script, and leaves the checkpoints; where nothing fits, they go."""
    def ctrl_c(args):
        raise Interrupted(2)
    folders, frontier, table = tiny_run("fedavg")[2:], script("frontier"), place.folder / "frontier.csv"
    flags = [*folders, "--datasets", "tiny10k", "--partitions", "shards", "--seeds", "1", "2", "--rounds", "2",
             "--local_ep", "1", "--local_bs", "16", "--images", "2", "--settings", "published"]
    first, second = (place.folder / "models" / f"frontier-tiny10k-shards-published-s{seed}" for seed in (1, 2))
    for more, stops, status in ((["--public", "none"], frontier.mi_attack.attack_all, 2), ([], ctrl_c, 130)):
        monkeypatch.setattr(frontier.mi_attack, "attack_all", stops)
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            frontier.main([*flags, *more])
        assert stop.value.code == status and len(capsys.readouterr().err.strip().splitlines()) == 1
        assert list(first.glob("round_*")) and not second.exists()
    monkeypatch.setattr(frontier, "unfit", lambda *which: "nothing fits")
    assert frontier.main(flags) == 0 and not first.exists() and not second.exists()
    config = place.folder / "results" / first.name / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "status": "unfinished", "was": "finished"}))
    assert frontier.main([*flags, "--table", "--csv", str(table)]) == 0
    assert pd.read_csv(table)["seed"].tolist() == [2]
    config.write_text("[]")
    capsys.readouterr()
    assert frontier.main([*flags, "--table"]) == 2
    assert capsys.readouterr().err.startswith("frontier.py: error: ")


@pytest.mark.parametrize("name, flag", [("ladder", "--run"),
                                        ("which_classes", "--runs"), ("inverting_gradients", "--run")])
def test_a_run_that_is_not_there_is_one_line(script, name, flag, tmp_path, capsys):
    assert script(name).main([flag, "none", "--results_dir", str(tmp_path)]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith(f"{name}.py: error: ")


@pytest.mark.parametrize("method, names", [
    ("fedavg", ["art_miface", "inverting_gradients", "real_uploads", "which_classes"]),
    ("lg_fedavg", ["conditioning", "ladder"])])
def test_a_run_without_checkpoints_is_one_line(script, place, tiny_run, monkeypatch, capsys, method, names):
    """Such as benchmarks/study.py leaves."""
    flags = tiny_run(method)
    shutil.rmtree(place.models)
    monkeypatch.setattr(script("art_miface"), "art_miface", lambda: None)   # need not be installed
    for name in names:
        capsys.readouterr()
        assert script(name).main(["--runs" if name == "which_classes" else "--run", *flags[1:]]) == 2
        said = capsys.readouterr()
        line, = said.err.splitlines()
        assert line.startswith(f"{name}.py: error: --run run: ") and "no checkpoint" in line and not said.out


def test_a_sweep_goes_on_after_a_setting_that_diverges(script, place, monkeypatch, capsys):
    def main(*settings):
        monkeypatch.setattr(sys, "argv", ["sweep.py", "1", *place.argv("--rounds", 2), "--", *settings])
        return script("sweep").main()
    assert main("--optimizer sgd --lr 1000", "--lr 1e-3") == 0
    lines = [line.split(":")[0] for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    assert lines == ["  client 0, round 1", "  round 1", "  round 2"]
    assert main("--dataset none") == 2 and capsys.readouterr().err.startswith("sweep.py: error: --dataset none")


# Stands in for the interpreter of gpu.sh: notes its arguments, and writes what a run of RVE-PFL.py would.
STUB = r"""#!/usr/bin/env bash
[ "$1" != -c ] || { echo "a warning
${WHY:-}" >&2; exit "${NO_GPU:-0}"; }
echo "$*" >> "$NOTES"
[[ -z ${SLEEPS:-} || "$*" != *"$SLEEPS"* ]] || sleep 20
[[ -z ${FAILS:-} || "$*" != *"$FAILS"* ]] || { echo "it went wrong" >&2; exit 3; }
[ "$1" = RVE-PFL.py ] || exit 0
while [ $# -gt 0 ]; do
    case $1 in --run_name) name=$2 ;; --results_dir) results=$2 ;; esac
    shift
done
mkdir -p "$results/$name"
printf 'round,loss\n1,0.5\n2,0.25\n' > "$results/$name/rounds.csv"
"""


class Gpu:
    """benchmarks/gpu.sh in a folder of its own."""

    def __init__(self, folder):
        self.folder, self.notes, self.out = folder, folder / "notes.txt", folder / "out"
        self.environment = {**os.environ, "PYTHON": str(folder / "python"), "NOTES": str(self.notes),
                            "OUT": str(self.out), "DATA_DIR": str(folder), "RESULTS_DIR": str(folder / "results"),
                            "MODELS_DIR": str(folder / "models")}
        (folder / "python").write_text(STUB)
        (folder / "python").chmod(0o755)
        for name in ("mnist", "fmnist"):
            (folder / f"{name}.npz").touch()

    def run(self, *words, **environment):
        """Exit status, lines of output, and the one line of error."""
        done = subprocess.run([str(ROOT / "benchmarks" / "gpu.sh"), *words], capture_output=True, text=True,
                              env={**self.environment, **environment}, timeout=120)
        return done.returncode, done.stdout.splitlines(), done.stderr

    def calls(self):
        return [line.split() for line in self.notes.read_text().splitlines()]

    def runs(self):
        return [words[words.index("--run_name") + 1] for words in self.calls() if "--run_name" in words]


@pytest.fixture
def gpu(tmp_path):
    return Gpu(tmp_path)


def test_gpu_study_runs_what_matters_first_and_gathers_it(gpu):
    status, lines, _ = gpu.run("study")
    methods = ("rve_pfl", "nbafl", "nbafl_prox", "fedavg", "local", "lg_fedavg", "fedper")
    assert status == 0 and gpu.runs() == [f"gpu-paper-{data}-{method}" for method in methods
                                          for data in ("mnist", "fmnist")]
    assert [line.split()[0] for line in lines] == ["ok"] * 14 + ["LATE"] * 7 and "cifar.npz" in lines[-1]
    for words in gpu.calls():
        flags = dict(zip(words, words[1:], strict=False))
        assert "--resume" in words and ("--aggregation" in words) == ("local" not in words)
        assert (flags["--rounds"], flags["--local_ep"], flags["--num_users"], flags["--device"]) == (
            "100", "10", "10", "cuda")
    with open(gpu.out / "rounds.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 28 and rows[-1]["loss"] == "0.25" and {row["run"] for row in rows} == set(gpu.runs())


def test_gpu_study_ends_in_time_and_goes_on(gpu):
    began = time.monotonic()
    status, lines, _ = gpu.run("study", MINUTES="0.04", SLEEPS="mnist-nbafl")
    assert status == 0 and time.monotonic() - began < 10   # a run that is cut off is no failure here
    assert "LATE    mnist-nbafl: not done in" in "\n".join(lines)
    assert "LATE    fmnist-fedper: no time left" in lines
    assert "gpu-paper-mnist-rve_pfl" in (gpu.out / "rounds.csv").read_text()
    status, lines, _ = gpu.run("study")
    assert sum(line.startswith("ok") for line in lines) == 14


def test_gpu_check_says_how_each_step_ended(gpu):
    status, lines, _ = gpu.run()
    assert status == 0 and [line.split(",")[0].split()[:2] for line in lines] == [
        ["ok", "tests"], ["ok", "mnist-100x10x10"], ["ok", "speed"]]
    tests, run, speed = gpu.calls()
    assert "tests/test_cuda.py" in tests and "benchmarks/speed.py" in speed
    assert "--dataset mnist --num_users 100 --rounds 10 --local_ep 10" in " ".join(run)
    status, lines, _ = gpu.run(FAILS="speed.py")
    assert status == 1 and lines[-1] == "FAILED  speed (status 3): it went wrong"
    status, lines, _ = gpu.run("check", MINUTES="0.04", SLEEPS="RVE-PFL")
    assert status == 1 and lines[-1].startswith("LATE    speed")
    (gpu.folder / "mnist.npz").unlink()
    status, lines, _ = gpu.run()
    assert status == 1 and f"LATE    mnist-100x10x10: no {gpu.folder}/mnist.npz" in lines


@pytest.mark.parametrize("words, environment, says", [
    (["both"], {}, "MODE both"), ([], {"SCALE": "large"}, "SCALE large"), ([], {"MINUTES": "ten"}, "MINUTES ten"),
    ([], {"NO_GPU": "1", "WHY": "no module torch"}, "python: no module torch; SCALE=toy")])
def test_gpu_mistakes_are_one_line(gpu, words, environment, says):
    status, lines, error = gpu.run(*words, **environment)
    assert status == 2 and not lines and len(error.splitlines()) == 1 and says in error


def test_gpu_scripts_run_at_a_toy_size(gpu, tiny_arrays):
    """The programs themselves, on the CPU."""
    np.savez(gpu.folder / "mnist.npz", **tiny_arrays)
    toy = {"SCALE": "toy", "PYTHON": sys.executable, "SETS": "mnist", "METHODS": "rve_pfl"}
    for words, count in ((["study"], 1), ([], 3)):
        status, lines, error = gpu.run(*words, **toy)
        assert status == 0 and len(lines) == count and all(line.startswith("ok") for line in lines), (
            lines, error, (gpu.out / "log.txt").read_text()[-2000:])
    table = pd.read_csv(gpu.out / "rounds.csv")
    assert set(table["run"]) == {"gpu-toy-mnist-rve_pfl", "gpu-toy-mnist-4x2x1"}
    assert table["round"].max() == 2 and table["accuracy"].between(0, 1).all()


def test_crowds_prints_each_round(script, capsys):
    assert script("crowds").main(["--clients", "0", "--tiny", "40", "--encoders", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == [
        *(f"tiny, 40 clients, round {r}" for r in range(1, 7)), "encoders, 2 clients, round 1"]
    assert all(float(line.split()[-2]) > 100 for line in lines[:1])


@pytest.fixture
def server(script):
    """benchmarks/server.py, which has the name of a package."""
    script("_path")
    spec = importlib.util.spec_from_file_location("grid", ROOT / "benchmarks" / "server.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_folder_of_the_grid_is_of_one_scale(server, tmp_path, monkeypatch, capsys):
    """That of its first call; the defaults' for a folder of a version that did not note it."""
    played = []
    monkeypatch.setattr(server, "run", lambda scale: played.append(scale.rounds))
    monkeypatch.setattr(server, "sensitivity", lambda scale: played.append("varied"))
    new, old = (["--out", str(tmp_path / name)] for name in ("new", "old"))
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "cells.csv").write_text("\n")
    monkeypatch.setattr(server, "read", lambda path: [])
    for flags in ([*new, "--rounds", "6"], [*new, "--rounds", "6", "--seeds", "5"], [*new, "--table"], old):
        assert server.main(flags) == 0
    assert played == [6, 6, 3]
    (tmp_path / "old" / "scale.json").unlink()
    for flags, said in ((new, "--rounds 3"), ([*new, "--rounds", "6", "--after", "3"], "--after 3"),
                        ([*new, "--rounds", "6", "--images", "9", "--sensitivity"], "--images 9"),
                        ([*old, "--local_bs", "8"], "--local_bs 8"), ([*old, "--local_ep", "2"], "--local_ep 2")):
        capsys.readouterr()
        assert server.main(flags) == 2
        line, = capsys.readouterr().err.splitlines()
        assert line.startswith(f"server.py: error: {said}: ")
    (tmp_path / "new" / "scale.json").write_text("[")
    assert server.main(new) == 2 and "is damaged" in capsys.readouterr().err
    assert played == [6, 6, 3]


def test_the_grid_of_the_server_plays_resumes_and_varies(server, tmp_path, tiny_arrays, monkeypatch, capsys):
    (tmp_path / "data").mkdir()
    arrays = {name: np.concatenate([part] * 2) for name, part in tiny_arrays.items()}
    np.savez(tmp_path / "data" / "tiny.npz", **arrays)
    monkeypatch.setattr(server, "ROOT", tmp_path)
    flags = ["--out", str(tmp_path / "out"), "--datasets", "tiny", "--seeds", "1", "--partitions", "iid",
             "--fracs", "0.3", "--rounds", "2", "--images", "12", "--local_bs", "8"]
    grid = [*flags, "--rules", "threat_aware", "mean", "--behaviours", "adaptive", "backdoor_patch"]
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
    numbers, train = [], server.World.train
    monkeypatch.setattr(server.World, "train", lambda world, number, *rest: numbers.append(number)
                        or train(world, number, *rest))
    server.main([*flags, "--out", str(tmp_path / "other"), "--scopes", "models", "--rules", "mean", "--fracs",
                 "--behaviours", "--after", "50"])
    assert numbers == [51, 52]   # a client's draws follow from the number of the round
    monkeypatch.setattr(server, "CONSTANTS", ("LONG", "COPY"))
    old = server.threat_aware.LONG, server.threat_aware.COPY
    server.main([*flags, "--scopes", "models", "--sensitivity"])
    varied = pd.read_csv(tmp_path / "out" / "sensitivity.csv")
    assert len(varied) == 2 * (1 + 4) and old == (server.threat_aware.LONG, server.threat_aware.COPY)


def test_conditioning_by_an_explicit_jacobian(script, tiny_run, capsys):
    """Its singular values are those of torch.autograd's Jacobian, and the gradient determines no less."""
    from attack import newton
    module, flags = script("conditioning"), tiny_run("lg_fedavg")
    torch.manual_seed(0)
    before = torch.nn.Sequential(torch.nn.Conv2d(1, 3, 3, padding=1), torch.nn.ReLU(), torch.nn.MaxPool2d(2),
                                 torch.nn.Flatten())
    x = torch.randn(1, 1, 4, 4)
    problem = newton.Problem(before, "0.weight", before(x).detach(), torch.randn(1, 12), torch.randn(1, 27))
    residuals = problem.residuals(torch.tensor([0]), True)
    jacobian = torch.autograd.functional.jacobian(residuals, x).flatten(2).squeeze()
    found = module.singular_values(problem, x, True)
    assert torch.allclose(found.float(), torch.linalg.svdvals(jacobian)[:16], atol=1e-3)
    assert module.main([*flags, "--images", "1"]) == 0
    alone, both = (line.split() for line in capsys.readouterr().out.splitlines()[-2:])
    assert int(alone[-2]) <= int(both[-2]) <= int(both[-3]) == 64
    assert module.main([*flags[:1], "none", *flags[2:]]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_tricks_times_a_step_without_each(script, monkeypatch, capsys):
    """A spawned process each, so that what one turns off stays off for it alone."""
    tricks = script("tricks")
    work = tricks.Workload(script("speed").models.CNN, (1, 8, 8), 4, "adam", 1, 2, 2)
    monkeypatch.setattr(tricks, "WORKLOADS", {"tiny": work})
    kept = {name: tricks.TRICKS[name] for name in ("all of them", "channels first")}
    monkeypatch.setattr(tricks, "TRICKS", kept)
    tricks.main(["--repeats", "1"])
    lines = capsys.readouterr().out.splitlines()[2:]
    assert [line.split("  ")[1] for line in lines[1:]] == ["all of them", "channels first"]


def test_speed_trains_as_the_program_does_on_a_gpu(script, monkeypatch):
    """With graphs, and small clients in stacks: here one of two clients, whose step is half of the stack's."""
    speed, cpu = script("speed"), torch.device("cpu")
    assert speed.trainer_on(torch.device("cuda")) is GraphedTrainer and speed.trainer_on(cpu) is speed.Trainer
    monkeypatch.setattr(speed, "stack_size", lambda device, batch: 64)
    work, drawn = speed.Workload(speed.models.CNN, (1, 8, 8), 4, "adam", 2, 3, 2), np.random.default_rng(1)
    images, labels = drawn.integers(0, 256, (24, 8, 8, 1), np.uint8), drawn.integers(0, 10, 24)
    ours = speed.Ours(work, images, labels, cpu, "fp32")
    assert ours.stack == 2 and len(ours.endless) == 1
    steps, count = [], iter(range(10**6))
    monkeypatch.setattr(speed, "timed", lambda run, on: (run(), 12.0)[1])
    ours.endless = [(steps.append(next(count)) for _ in iter(int, 1))]
    assert ours.step(3) == 12 / 3 / 2 and len(steps) == 3
    fresh = speed.Ours(work, images, labels, cpu, "fp32")
    assert next(fresh.endless[0]).loss.shape[0] == 2   # a step of both


@pytest.mark.parametrize("network", ["RVE", "CNN"])
def test_speed_counts_and_times_a_workload(script, network):
    """Its floor, and our step and round, which small models make with a client a thread."""
    speed, threads = script("speed"), torch.get_num_threads()
    work = speed.Workload(getattr(speed.models, network), (1, 8, 8), 4, "adam", 2, 3, 2)
    drawn, device = np.random.default_rng(1), torch.device("cpu")
    torch.set_num_threads(2)
    try:
        ours = speed.Ours(work, drawn.integers(0, 256, (24, 8, 8, 1), np.uint8), drawn.integers(0, 10, 24), device,
                          "fp32")
        assert len(ours.endless) == 2
        operations, moved = speed.counted(work, ours)
        parameters = sum(p.numel() for p in ours.trainer.model.parameters())
        # A product with each weight at least, forwards; gradient, weight and Adam's two moments at least.
        assert operations > 2 * 4 * parameters and moved > 4 * 8 * parameters
        assert ours.step(2) > 0 and ours.round(2) > 0 and ours.rounds == 2
    finally:
        torch.set_num_threads(threads)
