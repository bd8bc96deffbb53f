"""experiments/: the queue, the CSVs, and what pages take from them."""
import dataclasses
import importlib
import json
import re
import shlex
import shutil
import subprocess
import sys
import threading
import time
import types

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT

import methods
import report
from attack import membership, mi_attack, verdict
from options import args_parser

sys.path.insert(0, str(ROOT / "experiments"))
import common
import frontier
import leakage
import new_clients
import real_updates
import robustness
import speed
import verify

NAMES = ("headline", "partitions", "frontier", "leakage", "member_inference", "real_updates",
         "robustness", "new_clients", "speed")
EXPERIMENTS = {name: importlib.import_module(name).EXPERIMENT for name in NAMES}
PAGES = [*(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "ARTIFACT-APPENDIX.md")),
         *sorted(ROOT.glob("docs/*.md"))]
PARSERS = {"attack/mi_attack.py": mi_attack.make_parser,
           "attack/membership.py": lambda _: membership.make_parser(),
           "report.py": lambda _: report.make_parser()}


def parse(command):
    """Parse a command line of this project; SystemExit if it does not parse."""
    words = shlex.split(command, comments=True)
    script, argv = words[1], words[2:]
    if script == "RVE-PFL.py":
        return args_parser(argv)
    if script in PARSERS:
        return PARSERS[script](argv).parse(argv)
    name = script.removeprefix("experiments/").removesuffix(".py")
    if name not in EXPERIMENTS:
        return None
    return common.arguments(EXPERIMENTS[name], argv)


@pytest.mark.parametrize("name", NAMES)
def test_every_run_is_a_valid_command_with_a_name_of_its_own(name):
    tasks = EXPERIMENTS[name].tasks([11, 12])
    assert len({task.run for task in tasks}) == len({task.command for task in tasks}) == len(tasks) > 3
    for task in tasks[:: max(1, len(tasks) // 60)]:
        args = [parse(command) for command in task.commands]
        assert getattr(args[-1], "run", None) or args[-1].run_name == task.run
        assert "RVE-PFL.py" not in task.commands[0] or args[0].seed == task.seed


def test_committed_rows_say_how_they_were_made():
    for path in sorted(common.REFERENCE.glob("*.csv")):
        rows = common.read(path)
        assert list(rows)[-5:] == common.PROVENANCE and rows[common.PROVENANCE].notna().all(axis=None), path.name
        assert set(rows["precision"]) <= {"bfloat16", "float32"}
        assert rows["commit"].str.fullmatch(r"[0-9a-f]{12}( with edits)?").all()
        for command in rows["command"].str.split(" && ").explode().unique():
            parse(command)
    assert sum(path.stat().st_size for path in common.REFERENCE.glob("*.csv")) < 600_000


def test_tables_and_pictures_are_what_the_csvs_give():
    assert common.outdated() == []


def test_a_changed_csv_makes_its_page_stale(tmp_path, monkeypatch):
    pages, reference = tmp_path / "docs", tmp_path / "reference"
    for folder in (pages, reference):
        folder.mkdir()
    page, path = pages / "new_clients.md", reference / "new_clients.csv"
    page.write_bytes((ROOT / "docs" / page.name).read_bytes())
    path.write_bytes((common.REFERENCE / path.name).read_bytes())
    monkeypatch.setattr(common, "PAGES", pages)
    monkeypatch.setattr(common, "REFERENCE", reference)
    assert common.outdated() == []
    text, line = page.read_text(), ["docs/new_clients.md: run python experiments/new_clients.py --draw"]
    page.write_text(text.replace("| 0.9", "| 0.8", 1))
    assert common.outdated() == line
    common.draw(new_clients.EXPERIMENT, reference)
    assert page.read_text() == text and common.outdated() == [] and (pages / "new_clients.png").exists()
    rows = pd.read_csv(path)
    rows.assign(deployed=rows["deployed"] - 0.1).to_csv(path, index=False)   # nothing that the table shows
    assert common.outdated() == line
    page.write_text(text.replace("<!-- end -->", ""))
    with pytest.raises(common.InputError, match="new_clients.md: needs a line"):
        common.outdated()


def rows_of(values, **more):
    """Rows of a CSV: seed -> value."""
    return [{"method": "a", "value": value, **dict.fromkeys(common.PROVENANCE, "x"), "seed": seed,
             "precision": "bfloat16", **more} for seed, value in values.items()]


def made(**changes):
    """An experiment on rows of ``rows_of``."""
    return common.Experiment(**{
        "name": "made", "question": "?", "tasks": lambda seeds: [], "measure": lambda folder: [], "draw": None,
        "settings": ["method"], "tabulate": lambda rows: rows, "keys": {"method": "method"}, "spread": "value",
        "values": {"value": ("value", "{:.2f}"), "other": ("other", "{:.1f}")}, **changes})


def test_a_table_has_means_and_intervals_of_three_seeds_in_one_precision():
    three, two = {11: 0.1, 12: 0.2, 13: 0.6}, {11: 9.0, 12: 9.0}
    rows = pd.DataFrame(rows_of(three) + rows_of(two, method="b") + rows_of({1: 7.0}) + rows_of(
        three, method="c", precision="float32") + rows_of({13: 5.0}, method="b", precision="float32"))
    lines = common.table(made(), common.whole(made(), rows))
    half = 4.303 * np.std([0.1, 0.2, 0.6], ddof=1) / 3**0.5
    assert lines == ["| method | value | ± (95 %) |", "| --- | --- | --- |", f"| a | 0.30 | {half:.2f} |"]
    gaps = pd.DataFrame(rows_of(three, other=1.0) + rows_of(three, method="d", other=np.nan))
    assert len(common.table(made(), common.whole(made(), gaps))) == 3   # a row with a gap is not there
    assert "still to be filled" in common.results(made(), pd.DataFrame(rows_of(two)))[0]


@pytest.fixture
def tried(tmp_path, monkeypatch, tiny_arrays):
    """A queue of two short runs on a tiny data set, in a copy of nothing but its folders."""
    (tmp_path / "data").mkdir()
    np.savez(tmp_path / "data" / "tiny.npz", **tiny_arrays)
    places = {f"{name}_dir": tmp_path / folder for name, folder in (
        ("data", "data"), ("results", "results"), ("models", "saved_models"))}
    options = {"dataset": "tiny", "method": "fedavg", "num_users": 3, "local_bs": 16, "local_ep": 1, **places}

    def task(seed, rounds=2):
        run = f"tried-seed{seed}"
        return common.Task(run, {"method": "fedavg"}, seed, (
            common.training(run, {**options, "rounds": rounds, "seed": seed}),))
    real = subprocess.Popen
    monkeypatch.setattr(common, "ROOT", tmp_path)
    monkeypatch.setattr(subprocess, "Popen", lambda words, cwd=None, **more: real(words, cwd=ROOT, **more))
    experiment = made(name="tried", measure=common.curve, tasks=lambda seeds: [task(seed) for seed in seeds])
    return experiment, task, tmp_path


@pytest.mark.slow
def test_the_queue_runs_what_is_missing(tried, capsys, monkeypatch):
    experiment, task, folder = tried
    bad = common.Task("bad", {}, 3, ("python RVE-PFL.py --rounds 0 --run_name bad",))
    monkeypatch.setattr(common, "commit", lambda *paths: "0123456789ab")
    queue = common.Queue(experiment, folder)
    assert queue.run([bad, task(1), task(2)], 2) == 1
    said = capsys.readouterr().out
    assert "failed  bad: RVE-PFL.py: error: --rounds 0" in said and said.count("done") == 2
    rows = common.read(folder / "tried.csv")
    assert rows["seed"].value_counts().to_dict() == {1: 2, 2: 2} and rows["round"].tolist().count(2) == 2
    assert set(rows["commit"]) == {"0123456789ab"} and set(rows["command"]) == {task(1).command, task(2).command}
    assert rows["deployed"].between(0, 1).all() and (rows["deployed_worst"] <= rows["deployed"]).all()
    assert not list(folder.glob("results/tried*")) and not list(folder.glob("saved_models/tried*"))
    assert queue.missing([task(1), task(1, rounds=3), task(2)]) == [task(1, rounds=3)]
    before = (folder / "tried.csv").stat().st_mtime_ns
    assert common.Queue(experiment, folder).run([task(1)], 1) == 0
    assert (folder / "tried.csv").stat().st_mtime_ns == before


@pytest.mark.slow
def test_tasks_that_share_a_run_take_turns(tried, monkeypatch):
    """It is trained once, and stays until the last of them."""
    experiment, task, folder = tried
    monkeypatch.setattr(common, "commit", lambda *paths: "0123456789ab")
    command = task(1).command
    pair = [common.Task(run, {"method": run}, 1, (command, command.replace("tried-seed1", run))) for run in "ab"]
    experiment = dataclasses.replace(experiment, tasks=lambda seeds: pair)
    shared = folder / "results" / "tried-seed1"
    assert common.Queue(experiment, folder).run(pair[:1], 1) == 0
    assert shared.exists() and len([*shared.parent.iterdir()]) == 1
    for left in (shared, folder / "saved_models" / shared.name):
        shutil.rmtree(left)
    (folder / "tried.csv").unlink()
    assert common.Queue(experiment, folder).run(pair, 2) == 0
    assert set(common.read(folder / "tried.csv")["command"]) == {task.command for task in pair}
    assert not [*shared.parent.iterdir()] and not [*(folder / "saved_models").iterdir()]


def test_a_run_that_another_commit_began_is_not_resumed(tried, capsys, monkeypatch):
    experiment, task, folder = tried
    config = folder / "results" / task(1).run / "config.json"
    config.parent.mkdir(parents=True)
    config.write_text(json.dumps({"commit": "0123456789ab with edits"}))
    monkeypatch.setattr(common.Queue, "call", lambda *_: pytest.fail("ran"))
    queue = common.Queue(experiment, folder)
    queue.make(task(1))
    assert queue.failed == 1 and config.exists()
    assert "commit 0123456789ab began it; check that out, or delete results/tried-seed1" in capsys.readouterr().out
    monkeypatch.setattr(common, "commit", lambda *paths: "0123456789ab")
    monkeypatch.setattr(common.Queue, "call", lambda *_: False)
    queue.make(task(1))
    assert queue.failed == 1
    config.write_text("{")
    queue.make(task(1))
    assert queue.failed == 2 and "config.json: cannot be read" in capsys.readouterr().out
    config.write_text(json.dumps({"commit": "ffffffffffff"}))   # of a run that the task trains before its own
    queue.make(common.Task("other", {}, 1, (task(1).command, task(1).command.replace("tried-seed1", "other"))))
    assert queue.failed == 3 and "delete results/tried-seed1" in capsys.readouterr().out


@pytest.mark.slow
def test_an_interrupted_run_goes_on(tried):
    """Its rounds before the interruption are not trained again: their seconds stay."""
    experiment, task, folder = tried
    long = task(1, rounds=40)
    queue = common.Queue(experiment, folder)
    thread = threading.Thread(target=queue.make, args=[long])
    thread.start()
    csv = folder / "results" / long.run / "rounds.csv"
    while not (csv.exists() and csv.read_text().count("deployed") > 3):
        time.sleep(0.05)
    queue.stop()
    thread.join()
    assert json.loads((csv.parent / "config.json").read_text())["status"] == "unfinished"
    assert queue.missing([long]) and not queue.failed and not queue.running
    before = common.curve(csv.parent)
    common.Queue(experiment, folder).make(long)
    rows = common.read(folder / "tried.csv")
    assert len(rows) == 40 and rows["seconds"].tolist()[:3] == pytest.approx(
        [row["seconds"] for row in before[:3]], rel=1e-3)


def test_rows_of_one_command_are_replaced(tmp_path):
    """And a behaviour named nan keeps its name."""
    path = tmp_path / "made.csv"
    common.add(path, rows_of({11: 1.0}, command="one", method="nan"))
    common.add(path, rows_of({12: 2.0}, command="two", method="nan"))
    common.add(path, rows_of({11: 3.0}, command="one", method="nan", new=5))
    rows = common.read(path)
    assert rows["value"].tolist() == [2, 3] and list(rows)[-5:] == common.PROVENANCE
    assert rows["method"].tolist() == ["nan"] * 2


def test_the_command_line(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(common, "commit", lambda *paths: "0123456789ab with edits")
    (tmp_path / "made.csv").write_text("a,b\n1,2\n")
    experiment = made(tasks=lambda seeds: [common.Task("one", {}, 1, ("python a",))],
                      inspect=lambda run: pytest.fail("measured"))
    for argv, words in ((["--workers", "0"], "--workers"), (["--seeds", "x"], "--seeds"), (["--lsit"], "--lsit"),
                        (["--seeds", "-1"], "--seeds -1"), (["--run", ""], "--run"),
                        (["--list", "--draw"], "--list and --draw contradict"),
                        (["--match", "two"], "no run has such a name"), ([], "uncommitted edits; commit them"),
                        (["--list", "--out", str(tmp_path)], "has no column seed")):
        with pytest.raises(SystemExit) as stop:
            raise SystemExit(common.main(experiment, argv))
        line, = capsys.readouterr().err.strip().splitlines()
        assert stop.value.code == 2 and words in line
    common.add(tmp_path / "new" / "made.csv", rows_of({1: 1.0}, command="python a"))
    for folder, word in ((tmp_path / "new", "done"), (tmp_path / "none", "missing")):
        assert common.main(experiment, ["--list", "--out", str(folder)]) == 0
        assert capsys.readouterr().out.split() == [word, "python", "a"]
    assert common.main(experiment, ["--out", str(tmp_path / "new")]) == 0


def test_rows_of_a_measurement_say_that_it_had_one_thread(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "ROOT", tmp_path)
    task = common.Task("made", {"method": "a"}, 1, ())
    experiment = made(tasks=lambda seeds: [task], measure=lambda folder: [{"value": torch.get_num_threads()}])
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert common.main(experiment, ["--out", str(tmp_path)]) == 0
    finally:
        torch.set_num_threads(threads)
    row = common.read(tmp_path / "made.csv").iloc[0]
    assert row["value"] == 1 and row["processor"].startswith("CPU, 1 threads")


def test_what_an_experiment_cannot_draw_is_refused(tmp_path, capsys):
    assert common.main(leakage.EXPERIMENT, ["--run", "nope"]) == 2
    assert "--run nope: is no gallery" in capsys.readouterr().err
    pd.DataFrame([dict.fromkeys(common.PROVENANCE, 11)]).to_csv(tmp_path / "new_clients.csv", index=False)
    assert common.main(new_clients.EXPERIMENT, ["--draw", "--out", str(tmp_path)]) == 2
    assert "new_clients.csv: has no column partition" in capsys.readouterr().err


def test_a_reader_that_has_seen_enough_ends_nothing():
    """``| head``: the list of this experiment is longer than what a pipe holds."""
    line = f"set -o pipefail; {sys.executable} experiments/partitions.py --list | head -1"
    made = subprocess.run(["bash", "-c", line], cwd=ROOT, capture_output=True, text=True)
    assert (made.returncode, made.stderr, made.stdout.count("\n")) == (0, "", 1)


def test_leakage_rows_by_hand():
    """Images of two clients: the mean of all, and of the one with the highest KL; the control beside each."""
    columns = ["client", "image", "control", "kl_nats", "class_size", "identified", "class_rank", "ssim"]
    rows = pd.DataFrame([(0, 1, "", 3.0, 10, 0, 4, 0.7), (1, 1, "", 9.0, 10, 1, 1, 0.7),
                         (0, 1, "foreign", 3.0, 10, 0, 5, 0.1), (1, 1, "foreign", 9.0, 10, 0, 5, 0.1)],
                        columns=columns)
    every, worst = leakage.attack_rows({"attack": "x"}, rows)
    assert (every["n"], every["identified"], every["rank"], every["control_rank"]) == (2, 0.5, 2.5, 5)
    assert (worst["images"], worst["n"], worst["identified"]) == ("worst 2 %", 1, 1)
    assert worst["control_identified"] == 0
    assert every["ssim"] == pytest.approx(0.7) and every["control_ssim"] == pytest.approx(0.1)
    assert len(list(leakage.attack_rows({}, rows.assign(kl_nats=np.nan)))) == 1


def leakage_rows(found, **more):
    """Rows of three seeds: (method, adversary, attack, round, observed) -> share identified."""
    return pd.DataFrame([{
        **dict(zip(("method", "adversary", "attack", "round", "observed"), key, strict=True)), "images": "all",
        "identified": share, "control_identified": 0.01, "rank": 3.0, "class_size": 250.0, "ssim": 0.5,
        **dict.fromkeys(common.PROVENANCE, "x"), "seed": seed, **more}
        for key, share in found.items() for seed in (11, 12, 13)])


def test_the_strongest_attack_stands_for_its_adversary():
    """By the mean over seeds, in the same round and of the same observation; the worst images do not count."""
    found = {("rve_pfl", "stolen_model", "latent_decoder", 5, "z"): 0.7,
             ("rve_pfl", "stolen_model", "reidentification", 5, "z"): 0.6,
             ("rve_pfl", "stolen_model", "reidentification", 1, "z"): 0.9,
             ("fedavg", "curious_server", "analytic", 5, np.nan): 1.0}
    worst = leakage_rows({next(iter(found)): 1.0}, images="worst 2 %")
    rows = pd.concat([leakage_rows(found), worst], ignore_index=True)
    rows.loc[rows["attack"] == "reidentification", "identified"] += (rows["seed"] == 12) * 0.2
    assert common.table(leakage.EXPERIMENT, rows)[2:] == [
        "| fedavg | server, last round | analytic | 1.000 | 0.000 | 0.010 | 3 | 250 |",
        "| rve_pfl | stolen model, one z | latent_decoder | 0.700 | 0.000 | 0.010 | 3 | 250 |"]
    panel, _ = leakage.draw(rows).axes
    assert {(text.get_position(), text.get_text()) for text in panel.texts} == {
        ((1, 0), "1.000\n(0.010)"), ((2, 1), "0.700\n(0.010)")}


def test_the_server_attacks_each_method_that_shares_something():
    """And with all of the other adversaries that fit, in rounds that are kept."""
    for task in leakage.tasks([11])[1:]:
        trained, *attacked = (parse(command) for command in task.commands)
        row, by = methods.METHODS[trained.method], {args.adversary[0]: args for args in attacked}
        assert ("curious_server" in by, "stolen_model" in by) == (bool(row.shared), row.network.has_encoder)
        assert "prediction_api" in by and len(by) == len(attacked)
        assert all({*args.rounds} <= {0, trained.rounds} for args in attacked)
        assert all(args.clients == [0, 1, 2] for args in attacked)


def test_every_round_is_kept_for_the_attacker_who_observes_every_round():
    for task in frontier.tasks([11]):
        trained, attacked = (parse(command) for command in task.commands)
        assert trained.save_rounds == [*range(1, trained.rounds + 1)] and "rounds" in attacked.observe


def frontier_rows(accuracy, **more):
    """Rows of runs of three seeds: (partition, prior) -> accuracy, each seed's a little lower; z tells 4 %."""
    shares = {"control_identified_z": 0.01, **{f"identified_{seen}": 0.04 for seen in ("z", "z8", "rounds", "mu")}}
    return pd.DataFrame([{"dataset": "fmnist10k", "partition": partition, "setting": setting,
                          "deployed": value - seed / 1000, **shares, **dict.fromkeys(common.PROVENANCE, "x"),
                          "seed": seed, **more}
                         for (partition, setting), value in accuracy.items() for seed in (11, 12, 13)])


def test_points_lost_are_those_to_the_default_on_the_same_images():
    rows = frontier_rows({("shards", "normal"): 0.95, ("shards", "categorical"): 0.94, ("iid", "normal"): 0.8})
    rows = pd.concat([rows, rows.assign(deployed=1.0)[:1], rows[:1]])   # runs made again
    lost = dict(iter(frontier.runs_of(rows).groupby("setting")["lost"]))
    assert lost["categorical"].tolist() == pytest.approx([1.0] * 3) and not lost["normal"].any()
    assert common.table(frontier.EXPERIMENT, rows)[2:] == [
        "| fmnist10k | shards | categorical | 0.928 | 1.0 | 0.0 | 0.040 | 0.010 | 0.040 | 0.040 | 0.040 |"]


def test_the_frontier_has_an_arrow_for_each_partition_and_observation():
    rows = frontier_rows({(partition, setting): 0.9 for partition in ("shards", "iid")
                          for setting in ("normal", "class")})
    rows.loc[rows["setting"] == "normal", "identified_mu"] = 1.0
    first, *others = frontier.draw(rows).axes
    arrows = [[*text.xyann, *text.xy] for text in first.texts]
    assert len(arrows) == 8 and not any(panel.texts for panel in others)
    assert arrows[2] == pytest.approx([1.0, 0.888, 0.04, 0.888])   # of the mean of z


@pytest.mark.slow
def test_the_gallery_shows_the_first_images_of_each_class(place, tiny_arrays, monkeypatch):
    """The same in each row, and of several attacks that with the highest mean SSIM."""
    np.savez(place.folder / "data" / "public.npz", **{
        name: values if "labels" in name else 255 - values for name, values in tiny_arrays.items()})
    names = ("fedavg", "rve_pfl", "rve_pfl, categorical prior")
    shown = {words: row for words, row in leakage.GALLERY.items() if row[0] in names and row[2] in ("", "z", "mu")}
    for name, value in (("ROOT", place.folder), ("PAGES", place.folder), ("PER_CLASS", 2), ("ROUNDS", 1),
                        ("GALLERY", shown), ("BUDGET", {**leakage.BUDGET, "public": "public", "iterations": 4})):
        monkeypatch.setattr(leakage, name, value)
    for name in names:
        assert place.main("--partition", "iid", "--rounds", 1, *common.flags(leakage.METHODS[name]).split(),
                          "--run_name", leakage.run_of(name, 1)[0], "--models_dir",
                          place.folder / "saved_models") == 0
    drawn = []
    monkeypatch.setattr(leakage.evaluation, "save_picture", lambda *given: drawn.append(given))
    rows = pd.DataFrame(leakage.draw_gallery("leakage-gallery-seed1"))
    (path, pictures, captions, labels, _), = drawn
    assert path == place.folder / "gallery.png" and labels.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert [*pictures] == ["truth", *shown, "class mean"] and {len(images) for images in pictures.values()} == {8}
    best = rows.groupby(["method", "adversary", "observed"], sort=False)["ssim"].max()
    means = [np.mean([float(text.split()[1]) for text in captions[words]]) for words in shown]
    assert means == pytest.approx(best.tolist(), abs=0.006) and len(rows) == 2 + 2 * 4
    (place.folder / "leakage.csv").write_text(rows.to_csv(index=False))
    assert leakage.measure(place.folder) == rows.to_dict("records")


def test_losses_to_the_oracle_by_hand():
    world = {"scope": "models", "partition": "iid", "seed": 11, "backdoor": 0.25}
    rows = pd.DataFrame([{**world, "behaviour": behaviour, "rule": rule, "deployed": deployed} for
                         behaviour, rule, deployed in (("oracle", "mean", 0.9), ("mimic", "mean", 0.7),
                                                       ("sybil", "mean", 0.8), ("mimic", "krum", 0.95))])
    assert robustness.losses(rows)["lost"].tolist() == pytest.approx([20, 10, -5])
    clean = pd.DataFrame([{**world, "behaviour": "nobody", "rule": "mean", "deployed": 0.92}])
    table = robustness.tabulate(pd.concat([rows, clean])).set_index("rule")
    assert table.loc["mean", ["deployed", "lost_mean", "lost", "backdoor"]].tolist() == pytest.approx(
        [0.92, 15, 20, 0.25])


def test_controls_of_real_updates_are_other_images_of_the_class():
    labels = np.array([0, 1, 1, 0, 1, 1])
    assert real_updates.matched(labels, np.array([0, 1, 2]), np.array([3, 4, 5])).tolist() == [3, 4, 5]
    assert real_updates.matched(labels, np.array([1]), np.array([0, 3, 4, 5])).tolist() == [4]


def test_reconstructions_are_identified_by_a_margin():
    pool = torch.rand(6, 1, 8, 8, generator=torch.manual_seed(0))
    true, control = torch.arange(6).numpy() < 2, np.arange(6) == 5
    row = real_updates.scores(torch.cat([pool[:1], pool[4:]]), pool, true, control)
    assert row["identified"] == row["control_identified"] == pytest.approx(1 / 3) and row["psnr"] > 60
    between = real_updates.scores(0.51 * pool[:1] + 0.49 * pool[2:3], pool, true, control)
    assert between["identified"] == between["control_identified"] == 0
    assert 5 < between["control_psnr"] < between["psnr"] < 20


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fedavg", "rve_pfl_trunk", "rve_pfl"])
def test_updates_of_a_tiny_run_are_read(place, monkeypatch, capsys, method):
    """One image is found in one client's step, and in the step of two clients."""
    assert place.main("--method", method, "--partition", "iid", "--num_users", 4, "--rounds", 1, "--run_name",
                      method) == 0
    (place.folder / "saved_models").symlink_to(place.folder / "models")
    for module in (common, real_updates):
        monkeypatch.setattr(module, "ROOT", place.folder)
    for name, value in (("SUMS", {method: (1, 2)}), ("FOUND", 1), ("SEPARATION_SECONDS", 1)):
        monkeypatch.setattr(real_updates, name, value)
    status = common.main(real_updates.EXPERIMENT, ["--run", method])
    if method == "rve_pfl":
        assert status == 2 and "is no run of fedavg or rve_pfl_trunk" in capsys.readouterr().err
        return
    assert status == 0
    rows = real_updates.EXPERIMENT.measure(place.folder / "results" / method)
    rows = pd.DataFrame([row for row in rows if row["kind"] == "images"]).set_index(["case", "clients"])
    assert len(rows) == len(real_updates.CASES) * 2 and rows["control_identified"].max() < 1
    assert (rows.loc["1 image, one step", "identified"] == 1).all()


def test_speed_times_both_loops(monkeypatch, tmp_path):
    monkeypatch.setitem(speed.WORKLOADS, "tiny", ("fedavg", (1, 8, 8), 4))
    monkeypatch.setattr(speed, "REPEATS", 1)
    monkeypatch.setattr(speed, "SECONDS", 0)
    row, = speed.time_step("speed-tiny-seed1")
    assert [*row] == ["plain", "tuned", "ours", "floor"] and min(row.values()) > 0
    with pytest.raises(common.InputError, match="names no workload"):
        speed.time_step("nothing")
    pd.DataFrame([row]).to_csv(tmp_path / "speed.csv", index=False)
    assert speed.measure(tmp_path)[0] == pytest.approx(row)


def test_the_floor_is_of_the_faster_product_and_of_the_copy(monkeypatch):
    known = {"plain": 9.0, "tuned": 8.0, "ours": 7.0, "product": 3.0, "product_onednn": 2.0, "copy": 1.0}
    monkeypatch.setitem(speed.WORKLOADS, "tiny", ("fedavg", (1, 8, 8), 64))
    monkeypatch.setattr(speed, "seconds_of", lambda device, **calls: {name: known[name] for name in calls})
    monkeypatch.setattr(speed, "work_of", lambda *_: (speed.PRODUCTS * 2 * 2048**3, 2 * 2**28))
    row, = speed.time_step("speed-tiny-seed1")
    assert row == pytest.approx({"plain": 9e3 / 4, "tuned": 2e3, "ours": 7e3 / 4, "floor": 3e3})   # 4 steps a call


def test_verify_compares_each_figure_with_its_tolerance():
    keys = {"method": "m", "measured": "round 1"}
    reference = pd.DataFrame([{**keys, "deployed": 0.9, "kl_nats": 100.0}, {**keys, "measured": "x", "ssim": 0.5}])
    table = verify.compare(reference, reference)
    assert table["met"].all() and len(table) == 3 and table["allowed"].tolist() == pytest.approx([0.02, 10, 0.03])
    for name, row, near, far in (("deployed", 0, 0.919, 0.921), ("kl_nats", 0, 91, 89), ("ssim", 1, 0.48, np.nan),
                                 ("identified", 1, np.nan, 0.3)):
        for value, met in ((near, True), (far, False)):
            ours = reference.astype({"ssim": float}).reindex(columns=[*reference, "identified"])
            ours.loc[row, name] = value
            assert verify.compare(ours, reference)["met"].all() == met, (name, value)


@pytest.mark.parametrize("lost, stale, last", [
    (0.0, [], "verified: the pages, and all figures of two runs and two attacks"), (0.5, [], "differences: 4"),
    (0.0, ["docs/x.md: draw"], "differences: 1")])
def test_verify_redoes_what_is_committed(monkeypatch, capsys, tmp_path, lost, stale, last):
    committed = common.read(common.REFERENCE / "verify.csv")
    assert {*committed["command"]} == {task.command for task in verify.tasks()}
    assert not {*verify.TOLERANCES} & {*committed.columns[committed.isna().all()]}

    def again(experiment, argv):
        committed.assign(deployed=committed["deployed"] - lost).to_csv(f"{argv[1]}/verify.csv", index=False)
        return 0
    monkeypatch.setattr(verify.common, "main", again)
    monkeypatch.setattr(verify, "outdated", lambda: stale)
    monkeypatch.setattr(verify, "ROOT", tmp_path)
    (tmp_path / "saved_models" / "verify-nbafl").mkdir(parents=True)   # left by a check that was interrupted
    assert verify.main([]) == (last[0] == "d") and not any((tmp_path / "saved_models").iterdir())
    assert capsys.readouterr().out.splitlines()[-1] == last


def test_make_attack_takes_the_shipped_model_if_there_is_no_run(tmp_path):
    """The run is that of `make run`, which verify.py repeats."""
    (tmp_path / "Makefile").write_text((ROOT / "Makefile").read_text())
    (tmp_path / "requirements.txt").touch()

    def lines(target):
        text = subprocess.run(["make", "-n", target], cwd=tmp_path, capture_output=True, text=True).stdout
        return re.findall(r"python ((?:RVE-PFL|attack/\w+)\.py.*)", text.replace("\\\n", ""))
    training, = lines("run")
    args, verified = (parse(f"python {line}") for line in (training, verify.tasks()[0].commands[0][7:]))
    differ = {name for name, value in vars(args).items() if value != vars(verified)[name]}
    assert differ <= {"run_name", "overwrite"}
    unpacking, attack = lines("attack")
    assert unpacking == "attack/shipped.py" and parse(f"python {attack}").run == "shipped"
    folder = tmp_path / "results" / args.run_name
    folder.mkdir(parents=True)
    (folder / "config.json").touch()
    attack, = lines("attack")
    assert parse(f"python {attack}").run == folder.name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_and_links_of_a_page_work(page):
    text = page.read_text()
    for block in re.findall(r"^```\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        for line in block.replace("\\\n", "").splitlines():
            if re.match(r"(\S*/)?python (RVE-PFL|report|attack/\w+|experiments/[a-z_0-9]+)\.py", line):
                script = shlex.split(line, comments=True)[1]
                assert (ROOT / script).exists(), line
                parse(line)
    for link in re.findall(r"\]\(([^)#:\s]*)(?:#[^)]*)?\)", text):
        assert not link or (page.parent / link).exists(), link


def test_every_page_of_an_experiment_has_its_parts():
    for name in NAMES:
        text = (ROOT / "docs" / f"{name}.md").read_text()
        assert re.search(r"^# .*\n\n\*\*[^*]+\*\*\n\n<!-- results -->\n", text), name
        table = re.search("<!-- results -->(.*)<!-- end -->", text, re.DOTALL)[1]
        assert len(re.findall(r"^\|", table, re.MULTILINE)) <= 2 + 8
        assert f"python experiments/{name}.py" in text and len(re.findall(r"^\d\. ", text, re.MULTILINE)) == 3
    assert sum(path.stat().st_size for path in ROOT.glob("docs/*.md")) < 70_000


@pytest.fixture
def finished(tmp_path):
    """A run's folder by hand: two rounds, one attack with a restart, and one malicious client of two."""
    stages = [(r, stage, split, 0.1 * r + bonus) for r in (1, 2) for stage, split, bonus in (
        ("trained", "test", 0.2), ("deployed", "test", 0.0), ("trained", "train", 0.5))]
    pd.DataFrame([{"round": r, "stage": stage, "split": split, "accuracy": value, "accuracy_worst": value / 2,
                   "accuracy_images": 0.9 - 0.2 * r, "kl_nats": 10 * r, "seconds": 2}
                  for r, stage, split, value in stages]).to_csv(tmp_path / "rounds.csv", index=False)
    pd.DataFrame([{"round": r, "client": 0, "backdoor": r / 4} for r in (1, 2)]).to_csv(tmp_path / "clients.csv")
    pd.DataFrame([{"round": r, "client": k, "weight": (0.9, 0.1)[k], "trust": (0.8, 0.1)[k], "malicious": k}
                  for r in (1, 2) for k in (0, 1)]).to_csv(tmp_path / "server.csv")
    rows = [{**dict.fromkeys(verdict.ATTACK_COLUMNS, 0), "adversary": "stolen_model", "attack": "reidentification",
             "observed": "z", "kl_nats": 1.0, "control": control, "restart": restart, "identified": identified}
            for control, restart, identified in (("", 0, 1), ("", 1, 0), ("foreign", 0, 0))]
    pd.DataFrame(rows).to_csv(tmp_path / "attack.csv", index=False)
    return tmp_path


def test_measures_of_a_finished_run_by_hand(finished):
    first, last = common.curve(finished)
    assert (last["round"], last["kl_nats"]) == (2, 20) and first["deployed"] == pytest.approx(0.1)
    assert (last["deployed"], last["deployed_worst"], last["trained"]) == pytest.approx((0.2, 0.1, 0.4))
    assert (first["deployed_images"], last["trained_images"]) == pytest.approx((0.7, 0.5))
    row, = [row for row in leakage.measure(finished) if row["images"] == "all"]
    assert (row["n"], row["identified"], row["control_identified"]) == (1, 1, 0)
    row, = frontier.measure(finished)
    assert (row["identified_z"], row["control_identified_z"], row["deployed"]) == pytest.approx((1, 0, 0.2))
    assert row["identified_z_worst"] == 1
    row, = robustness.measure(finished)
    assert (row["deployed"], row["backdoor"], row["weight"], row["trust"]) == pytest.approx((0.2, 0.5, 0.2, 0.8))
    assert [row["measured"] for row in verify.measure(finished)] == ["round 1", "round 2", "reidentification"]
    assert speed.measure(finished) == [{"per_second": 0.5}]   # one client in two seconds


def test_tables_take_the_right_columns():
    rows = pd.DataFrame([{"dataset": dataset, "method": method, "seed": 11, "command": f"{method} {dataset}",
                          "round": r, "deployed": 0.1 * r, "finetuned_10": tuned if r == 2 else np.nan}
                         for dataset, method, tuned in (
                              ("mnist", "nbafl", 0.7), ("cifar", "nbafl", 0.8), ("mnist", "rve_pfl", np.nan),
                              ("mnist", "nbafl_prox", np.nan))
                         for r in (1, 2)])
    wide = EXPERIMENTS["headline"].tabulate(rows).set_index("dataset")
    assert list(wide.index) == ["mnist", "cifar"]
    assert wide.loc["mnist", ["rve_pfl", "nbafl", "nbafl, fine-tuned"]].tolist() == pytest.approx([0.2, 0.2, 0.7])
    assert wide.loc["cifar", "nbafl, fine-tuned"] == 0.8 and np.isnan(wide.loc["cifar", "rve_pfl"])
    found = (("stolen_model", "loss", 0.6), ("stolen_model", "loss", 0.8), ("prediction_api", "loss", 0.1),
             ("curious_server", "fedmia", 0.7))
    members = pd.DataFrame([{"setting": "a", "seed": 11, "adversary": adversary, "attack": attack, "auc": auc}
                            for adversary, attack, auc in found])
    table = EXPERIMENTS["member_inference"].tabulate(members)
    assert table[["loss", "fedmia"]].iloc[0].tolist() == pytest.approx([0.7, 0.7])
    new = new_clients.EXPERIMENT.tabulate(pd.DataFrame([{"new_10": 0.5, "alone_10": 0.3}]))
    assert new["gain"].tolist() == pytest.approx([20])
    fast = speed.tabulate(pd.DataFrame([{"plain": 30.0, "tuned": 20.0, "ours": 10.0, "floor": 5.0}]))
    assert fast[["ratio", "tuned_ratio", "reached"]].iloc[0].tolist() == [3, 2, 50]


def test_classes_are_told_from_updates(monkeypatch):
    """One client of two classes, whose scores are highest; then one whose scores are lowest."""
    for scores, expected in (([3.0, 2.0, -1.0], (1, 1)), ([-3.0, -2.0, 1.0], (0, 0))):
        monkeypatch.setattr(real_updates.uploads, "class_scores",
                            lambda sent, upload, scores=scores: torch.tensor(scores))
        target = types.SimpleNamespace(shared=lambda round: {"sent": {}, "uploads": {0: {}}},
                                       data=types.SimpleNamespace(labels=np.array([0, 1])),
                                       owned=lambda: ([np.array([0, 1])],))
        row, = real_updates.class_rows(target, 1)
        assert (row["auc"], row["exact"]) == expected
