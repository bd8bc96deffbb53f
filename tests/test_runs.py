"""Whole runs: their files, and resuming after kill -9."""
import json
import os
import shutil
import signal
import time

import numpy as np
import pandas as pd
import pytest

from methods import METHODS
from runs.checkpoints import load_checked

COLUMNS = {
    "clients.csv": "round,client,stage,split,n,loss,accuracy,precision,recall,f1,kl_nats",
    "rounds.csv": "round,stage,split,loss,accuracy,accuracy_std,accuracy_worst,precision,recall,f1,kl_nats,"
                  "seconds",
    "server.csv": "round,client,n,norm_ratio,cosine,max_cosine,trust,weight,malicious"}


@pytest.mark.parametrize("method", METHODS)
def test_each_method_from_the_command_line(place, capsys, method):
    noise = ["--noise_multiplier", 0.1] if METHODS[method].poisson else []   # adaptive: two clients allow no more
    assert place.main("--method", method, "--rounds", 2, *noise) == 0
    out = capsys.readouterr().out
    assert "deployed" in out and str(place.results) in out and str(place.models) in out
    clients = pd.read_csv(place.results / "clients.csv")
    assert len(clients) == 2 * 2 * 3 and clients["accuracy"].between(0, 1).all()
    assert clients["kl_nats"].notna().all() == METHODS[method].network.variational
    shared = load_checked(place.models / "round_2" / "shared.pt")
    private = load_checked(place.models / "round_2" / "client_0.pt")["parameters"]
    whole = METHODS[method].build((1, 8, 8), 4, {"init_logvar": 0.0}).state_dict()
    assert bool(shared["uploads"][0]) == bool(METHODS[method].shared)
    assert bool(private) == bool(METHODS[method].shared_and_private(whole)[1])
    assert bool(len(pd.read_csv(place.results / "server.csv"))) == bool(METHODS[method].shared)


def test_the_files_of_a_run(place):
    assert place.main("--rounds", 4, "--frac", 0.5, "--eval_every", 2, "--save_rounds", 1,
                      "--num_users", 4, "--checkpoint_seconds", 0) == 0
    assert {p.name for p in place.results.iterdir()} == {
        "config.json", "clients.csv", "rounds.csv", "server.csv", "partition.npz", "partition.png",
        "curves.png", "trust.png", ".lock"}
    assert {p.name for p in place.models.iterdir()} == {"round_1", "round_4", ".lock"}   # asked, latest
    assert {p.name for p in (place.models / "round_4").iterdir()} == {
        "shared.pt", "server.pt", *(f"client_{k}.pt" for k in range(4))}
    for name, columns in COLUMNS.items():
        assert (place.results / name).read_text().splitlines()[0] == columns
    clients = pd.read_csv(place.results / "clients.csv")
    assert set(clients["round"]) == {2, 4}
    for _, part in clients.groupby("round"):
        assert part.groupby(["stage", "split"])["client"].nunique().to_dict() == {
            ("trained", "train"): 2, ("trained", "test"): 2, ("deployed", "test"): 4}
    rounds = pd.read_csv(place.results / "rounds.csv")
    deployed = clients[(clients["round"] == 4) & (clients["stage"] == "deployed")]
    row = rounds[(rounds["round"] == 4) & (rounds["stage"] == "deployed")].iloc[0]
    assert row["accuracy"] == pytest.approx(deployed["accuracy"].mean(), abs=1e-6)
    assert row["kl_nats"] == pytest.approx(deployed["kl_nats"].mean(), rel=1e-6)
    server = pd.read_csv(place.results / "server.csv")
    assert (server.groupby("round")["client"].count() == 2).all()
    weight = server.groupby("round")["weight"].sum(min_count=1)   # two of few classes may oppose each other:
    assert np.allclose(weight[weight.notna()], 1) and weight.notna().any()   # then none can be told
    config = json.loads((place.results / "config.json").read_text())
    assert config["status"] == "finished" and config["options"]["frac"] == 0.5
    count = config["parameters"]
    assert count["shared"] == count["classifier"] < count["total"] == count["encoder"] + count["classifier"]
    parts = np.load(place.results / "partition.npz")
    assert sorted(parts.files) == sorted(f"{half}_{k}" for half in ("train", "test") for k in range(4))
    pooled = np.concatenate([parts[name] for name in parts.files])
    assert len(np.unique(pooled)) == len(pooled) == 240
    assert all(n == len(parts[f"test_{k}"]) for k, n in zip(deployed["client"], deployed["n"], strict=True))


def test_local_is_deployed_as_it_was_trained(place):
    assert place.main("--method", "local") == 0
    clients = pd.read_csv(place.results / "clients.csv").query("split == 'test'")
    clients = clients.set_index(["round", "client"])
    trained, deployed = (clients[clients["stage"] == s]["loss"] for s in ("trained", "deployed"))
    assert trained.equals(deployed)


def test_resplit_and_validate_mark_every_output(place):
    for flag, split in [("--resplit", "test-resplit"), ("--validate", "validation")]:
        assert place.main(flag, "--rounds", 2, "--overwrite") == 0
        for name in ("clients.csv", "rounds.csv"):
            assert set(pd.read_csv(place.results / name)["split"]) == {"train", split}
        protocol = flag.removeprefix("--")
        assert json.loads((place.results / "config.json").read_text())["protocol"] == protocol
        assert load_checked(place.models / "round_2" / "shared.pt")["protocol"] == protocol
        names = np.load(place.results / "partition.npz").files
        assert set(names) == ({"owned_0", "owned_1"} if flag == "--resplit" else
                              {"train_0", "train_1", "validation_0", "validation_1"})


def wait_for(process, condition, seconds=120):
    end = time.monotonic() + seconds
    while process.poll() is None and not condition():
        assert time.monotonic() < end, "the run made no progress"
        time.sleep(0.002)


def lines(path):
    return path.read_bytes().count(b"\n") if path.exists() else 0


@pytest.mark.slow
def test_kill_9_at_any_moment_then_resume_gives_the_same_bytes(place):
    flags = ("--rounds", 20, "--num_users", 3, "--checkpoint_seconds", 0, "--frac", 0.7)
    assert place.main(*flags) == 0
    expected = place.clients_csv(), (place.results / "server.csv").read_bytes()
    rng, kills = np.random.default_rng(0), 0
    shutil.rmtree(place.results)
    shutil.rmtree(place.models)
    for target in (1, 15, 40, 65):
        process = place.start(*flags, "--resume")
        wait_for(process, lambda n=target: lines(place.results / "clients.csv") > n)
        time.sleep(rng.uniform(0, 0.05))   # anywhere in a round, a save included
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
            kills += 1
        process.communicate()
    assert kills >= 3
    assert place.main(*flags, "--resume") == 0
    assert (place.clients_csv(), (place.results / "server.csv").read_bytes()) == expected
    assert {p.name for p in place.models.iterdir()} == {"round_20", ".lock"}


def test_what_a_kill_during_writes_leaves_behind_is_cleared(place):
    assert place.main("--save_rounds", 2) == 0
    expected = place.clients_csv()
    config = place.results / "config.json"
    config.write_text(config.read_text().replace('"finished"', '"unfinished"'))
    shutil.rmtree(place.models / "round_3")
    (place.models / ".round_3").mkdir()
    (place.models / ".round_3" / ".client_0.pt.1.tmp").write_bytes(b"half")
    (place.models / ".private").mkdir(exist_ok=True)
    (place.models / ".private" / "0-1.pt").write_bytes(b"stale")
    for name in (".config.json.1.tmp", ".partition.png.12345.tmp"):   # 1 lives, but we hold the lock
        (place.results / name).write_bytes(b"half")
    (place.results / ".attack.csv.1.tmp").write_bytes(b"an attack's, which may go on")
    with open(place.results / "clients.csv", "ab") as file:
        file.write(b"3,0,trained,te")   # a torn line
    assert place.main("--save_rounds", 2, "--resume") == 0
    assert place.clients_csv() == expected
    assert {p.name for p in place.models.iterdir()} == {"round_2", "round_3", ".lock"}
    assert [p.name for p in place.results.glob("*.tmp")] == [".attack.csv.1.tmp"]
    assert place.main("--save_rounds", 2, "--overwrite") == 0
    assert not list(place.results.glob("*.tmp"))


def unfinish(folder):
    """As if a run had been killed after its last checkpoint."""
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"finished"', '"unfinished"'))


def test_results_and_checkpoints_in_one_folder(place):
    flags = ("--models_dir", place.folder / "results", "--rounds", 2, "--save_rounds", 1)
    assert place.main(*flags) == 0
    expected = place.clients_csv()
    unfinish(place.results)
    shutil.rmtree(place.results / "round_2")
    assert place.main(*flags, "--resume") == 0 and place.clients_csv() == expected
    assert place.main(*flags, "--overwrite") == 0 and place.clients_csv() == expected
    assert {"round_1", "round_2", "config.json", ".lock"} < {p.name for p in place.results.iterdir()}


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_saves_and_says_how_to_go_on(place, number):
    flags = ("--rounds", 200, "--aggregation", "mean")   # two uploads are few for the default
    process = place.start(*flags)
    wait_for(process, lambda: lines(place.results / "clients.csv") > 14)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    last = [line for line in err.splitlines() if "accuracy" not in line and "%" not in line]
    assert process.returncode == 130
    assert len(last) == 1 and "--resume" in last[0]
    assert last[0].startswith("interrupted; to go on: python RVE-PFL.py")
    saved, = (int(p.name.removeprefix("round_")) for p in place.models.glob("round_*"))
    assert saved == pd.read_csv(place.results / "rounds.csv")["round"].max() >= 2   # long before 60 s


def test_resuming_a_finished_run_does_nothing_and_shows_its_table(place, capsys):
    assert place.main() == 0
    before = {p.name: p.stat().st_mtime_ns for p in place.results.iterdir() if p.name != ".lock"}
    capsys.readouterr()
    assert place.main("--resume") == 0
    assert {p.name: p.stat().st_mtime_ns for p in place.results.iterdir() if p.name != ".lock"} == before
    assert "deployed" in capsys.readouterr().out


@pytest.mark.parametrize("flags", [("--method", "nbafl"),
                                   ("--method", "client_dp_adaptive", "--noise_multiplier", 0.1)])
def test_what_the_server_remembers_is_resumed(place, flags):
    flags = (*flags, "--rounds", 4, "--num_users", 4, "--frac", 0.6, "--checkpoint_seconds", 0)
    assert place.main(*flags) == 0
    expected, config = place.clients_csv(), json.loads((place.results / "config.json").read_text())["server"]
    assert place.main(*flags, "--overwrite", "--save_rounds", 2) == 0
    shutil.rmtree(place.models / "round_4")   # so that it goes on from round 2
    old = json.loads((place.results / "config.json").read_text())
    (place.results / "config.json").write_text(json.dumps({**old, "status": "unfinished"}))
    assert place.main(*flags, "--resume") == 0
    assert place.clients_csv() == expected
    assert json.loads((place.results / "config.json").read_text())["server"] == config


def test_nobody_sampled_is_a_round_too(place):
    """Poisson sampling may take no client: the head moves by the noise alone."""
    assert place.main("--method", "client_dp", "--frac", 0.01, "--noise_multiplier", 1, "--rounds", 2) == 0
    clients = pd.read_csv(place.results / "clients.csv")
    assert len(clients) == 2 * 2 and set(clients["stage"]) == {"deployed"}
    shared = load_checked(place.models / "round_2" / "shared.pt")
    assert not shared["uploads"] and all(value.isfinite().all() for value in shared["sent"].values())


def test_the_table_says_whose_means_it_shows(place, capsys):
    assert place.main("--num_users", 4, "--rounds", 1, "--malicious_frac", 0.25) == 0
    assert "means over honest clients (trained: those that trained)" in capsys.readouterr().out
