"""Whole runs: their files, resuming after kill -9, and which clients train on which images."""
import os
import shutil
import signal
import time
from functools import partial
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from conftest import wait_for

import datasets
import sampling
from engine.clients import Clients
from engine.processes import Ranks
from engine.signals import Interrupted
from methods import KL_WEIGHT, METHODS
from options import args_parser
from runs import plots, setup
from server.privacy import ClientDP
from utils import rng

FLAGS = ("--rounds", 4, "--frac", 0.5, "--eval_every", 2, "--save_rounds", 2, "--num_users", 4)
COLUMNS = {
    "clients.csv": "round,client,stage,split,n,loss,accuracy,precision,recall,f1,kl_nats",
    "rounds.csv": "round,stage,split,loss,accuracy,accuracy_std,accuracy_worst,accuracy_images,accuracy_class_0,"
                  "accuracy_class_1,accuracy_class_2,accuracy_class_3,precision,recall,f1,kl_nats,bytes_up,bytes_down,"
                  "seconds",
    "server.csv": "round,client,n,norm_ratio,cosine,max_cosine,trust,weight,malicious"}


save_rendered = plots._save   # before tests replace it
QUICK = ("rve_pfl", "local", "nbafl", "client_dp_adaptive")


@pytest.mark.parametrize("method", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow)
                                              for name in METHODS if name not in QUICK)])
def test_each_method_from_the_command_line(place, capsys, method):
    noise = ["--noise_multiplier", 0.1] if METHODS[method].poisson else []   # adaptive: two clients allow no more
    assert place.main("--method", method, "--rounds", 2, *noise) == 0
    out = capsys.readouterr().out
    assert f"picture:     {place.results}/curves.png\n" in out and str(place.models) in out and "\ntime: " in out
    assert ("\nlast round:  0.0 MB up, 0.0 MB down\n" in out) == (not METHODS[method].shared)
    clients = pd.read_csv(place.results / "clients.csv")
    assert len(clients) == 2 * 2 * 3 and clients["accuracy"].between(0, 1).all()
    assert clients["kl_nats"].notna().all() == (KL_WEIGHT in METHODS[method].reads)
    shared, private = place.saved(2, "shared.pt"), place.saved(2, "client_0.pt")["parameters"]
    whole = METHODS[method].build((1, 8, 8), 4, {"init_logvar": 0.0, "l2_weight": 0.0}).state_dict()
    assert bool(shared["uploads"][0]) == bool(METHODS[method].shared)
    assert bool(private) == bool(METHODS[method].shared_and_private(whole)[1])
    assert bool(len(pd.read_csv(place.results / "server.csv"))) == bool(METHODS[method].shared)
    if method == "local":   # deployed as it was trained
        losses = clients.query("split == 'test'").pivot(index=["round", "client"], columns="stage", values="loss")
        assert losses["trained"].equals(losses["deployed"])


@pytest.fixture(scope="module")
def finished(tmp_path_factory, make_place):
    """A run of FLAGS, for tests that read its files, or copy them."""
    place = make_place(tmp_path_factory.mktemp("finished"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "_save", save_rendered)
        assert place.main(*FLAGS) == 0
    return place


@pytest.fixture
def copy(finished, place):
    """The same, for one test to harm."""
    return place.holding(finished)


def test_the_files_of_a_run(finished):
    assert {p.name for p in finished.results.iterdir()} == {
        "config.json", "clients.csv", "rounds.csv", "server.csv", "partition.npz", "partition.png",
        "curves.png", "trust.png", ".lock"}
    assert {p.name for p in finished.models.iterdir()} == {"round_2", "round_4", ".lock"}   # asked, latest
    assert {p.name for p in (finished.models / "round_4").iterdir()} == {
        "shared.pt", "server.pt", *(f"client_{k}.pt" for k in range(4))}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in finished.results.glob("*.png"))
    for name, columns in COLUMNS.items():
        assert (finished.results / name).read_text().splitlines()[0] == columns
    clients = pd.read_csv(finished.results / "clients.csv")
    assert set(clients["round"]) == {2, 4}
    for _, part in clients.groupby("round"):
        assert part.groupby(["stage", "split"])["client"].nunique().to_dict() == {
            ("trained", "train"): 2, ("trained", "test"): 2, ("deployed", "test"): 4}
    rounds = pd.read_csv(finished.results / "rounds.csv").set_index(["round", "stage", "split"])
    for name in ("loss", "accuracy", "kl_nats"):
        means = clients.groupby(["round", "stage", "split"])[name].mean()
        assert means.to_dict() == pytest.approx(rounds[name].to_dict(), rel=1e-6)
    right = (clients["n"] * clients["accuracy"]).groupby([clients[key] for key in rounds.index.names]).sum()
    images = clients.groupby(rounds.index.names)["n"].sum()
    assert (right / images).to_dict() == pytest.approx(rounds["accuracy_images"].to_dict(), rel=1e-6)
    server = pd.read_csv(finished.results / "server.csv")
    assert (server.groupby("round")["client"].count() == 2).all()
    weight = server.groupby("round")["weight"].sum(min_count=1)   # two of few classes may oppose each other:
    assert np.allclose(weight[weight.notna()], 1) and weight.notna().any()   # then none can be told
    assert finished.config["status"] == "finished" and finished.config["options"]["frac"] == 0.5
    count = finished.config["parameters"]
    assert (rounds[["bytes_up", "bytes_down"]] == 2 * 4 * count["shared"]).all(axis=None)   # two clients, float32
    assert count["shared"] == count["classifier"] < count["total"] == count["encoder"] + count["classifier"]
    parts = np.load(finished.results / "partition.npz")
    assert sorted(parts.files) == sorted(f"{half}_{k}" for half in ("train", "test") for k in range(4))
    pooled = np.concatenate([parts[name] for name in parts.files])
    assert len(np.unique(pooled)) == len(pooled) == 240
    tested = clients.query("stage == 'deployed'")
    assert all(n == len(parts[f"test_{k}"]) for k, n in zip(tested["client"], tested["n"], strict=True))


@pytest.mark.parametrize("flag, split", [("--resplit", "test-resplit"), ("--validate", "validation")])
def test_resplit_and_validate_mark_every_output(place, flag, split):
    assert place.main(flag, "--rounds", 1, "--method", "fedavg") == 0
    for name in ("clients.csv", "rounds.csv"):
        assert set(pd.read_csv(place.results / name)["split"]) == {"train", split}
    protocol = flag.removeprefix("--")
    assert place.config["protocol"] == place.saved(1, "shared.pt")["protocol"] == protocol
    names = np.load(place.results / "partition.npz").files
    assert set(names) == ({"owned_0", "owned_1"} if flag == "--resplit" else
                          {"train_0", "train_1", "validation_0", "validation_1"})


def lines(path):
    return path.read_bytes().count(b"\n") if path.exists() else 0


@pytest.mark.slow
def test_kill_9_at_any_moment_then_resume_gives_the_same_bytes(place):
    flags = ("--rounds", 15, "--num_users", 3, "--checkpoint_seconds", 0, "--frac", 0.7)
    assert place.main(*flags) == 0
    expected = place.clients_csv(), (place.results / "server.csv").read_bytes()
    rng, kills = np.random.default_rng(0), 0
    shutil.rmtree(place.results)
    shutil.rmtree(place.models)
    for target in (1, 20, 50):
        process = place.start(*flags, "--resume")
        wait_for(process, lambda n=target: lines(place.results / "clients.csv") > n)
        time.sleep(rng.uniform(0, 0.05))   # anywhere in a round, a save included
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
            kills += 1
        process.communicate()
    assert kills >= 2
    assert place.main(*flags, "--resume") == 0
    assert (place.clients_csv(), (place.results / "server.csv").read_bytes()) == expected
    assert {p.name for p in place.models.iterdir()} == {"round_15", ".lock"}


def test_what_a_kill_during_writes_leaves_behind_is_cleared(copy):
    expected = copy.clients_csv(), (copy.results / "server.csv").read_bytes()
    copy.unfinish(4)
    for folder in (".round_3", ".private"):
        (copy.models / folder).mkdir()
    (copy.models / ".round_3" / ".client_0.pt.1.tmp").write_bytes(b"half")
    (copy.models / ".private" / "0-1.pt").write_bytes(b"stale")
    for name in (".config.json.1.tmp", ".partition.png.12345.tmp"):   # 1 lives, but we hold the lock
        (copy.results / name).write_bytes(b"half")
    (copy.results / ".attack.csv.1.tmp").write_bytes(b"an attack's, which may go on")
    with open(copy.results / "clients.csv", "ab") as file:
        file.write(b"3,0,trained,te")   # a torn line
    assert copy.main(*FLAGS, "--resume") == 0
    assert (copy.clients_csv(), (copy.results / "server.csv").read_bytes()) == expected
    assert {p.name for p in copy.models.iterdir()} == {"round_2", "round_4", ".lock"}
    assert [p.name for p in copy.results.glob("*.tmp")] == [".attack.csv.1.tmp"]


@pytest.mark.slow
def test_results_and_checkpoints_in_one_folder(place):
    flags = ("--models_dir", place.folder / "results", "--rounds", 2, "--save_rounds", 1, "--method", "fedavg")
    assert place.main(*flags) == 0
    expected = place.clients_csv()
    place.folder.joinpath("models").symlink_to(place.folder / "results")
    place.unfinish(2)
    assert place.main(*flags, "--resume") == 0 and place.clients_csv() == expected
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


def test_resuming_a_finished_run_does_nothing_and_shows_its_table(copy, capsys):
    before = {p.name: p.stat().st_mtime_ns for p in copy.results.iterdir() if p.name != ".lock"}
    capsys.readouterr()
    assert copy.main(*FLAGS, "--resume") == 0
    assert {p.name: p.stat().st_mtime_ns for p in copy.results.iterdir() if p.name != ".lock"} == before
    said = capsys.readouterr().out
    assert "means over honest clients (trained: those that trained)" in said and "time:" not in said
    row = pd.read_csv(copy.results / "rounds.csv").iloc[-1]
    assert f" {row['accuracy_worst']:.4f}  {row['accuracy_images']:.4f} {row['f1']:.4f} " in said
    by_class = " ".join(f"{share:.3f}" for share in row["accuracy_class_0":"accuracy_class_3"])
    assert f"\ndeployed, by class: {by_class}\n" in said
    assert f"\nlast round:  {row['bytes_up'] / 1e6:.1f} MB up, {row['bytes_down'] / 1e6:.1f} MB down\n" in said
    assert said.endswith(f"report.py --results_dir {copy.folder / 'results'}\n")


WARM = ("--method", "rve_pfl_trunk", "--prior", "class", "--full_sharing_rounds", 2)
slow = partial(pytest.param, marks=pytest.mark.slow)


@pytest.mark.parametrize("stopped, flags", [
    (3, ("--method", "nbafl")), slow(3, ("--method", "client_dp_adaptive", "--noise_multiplier", 0.1)),
    slow(2, WARM), (3, WARM), slow(4, WARM)])
def test_an_interrupted_run_goes_on_to_the_same_bytes(place, monkeypatch, stopped, flags):
    """What a server remembers; and WARM in a full sharing round, in the first one after those, and later."""
    flags = (*flags, "--rounds", 4, "--num_users", 4, "--frac", 0.6)

    def ends():
        files = place.contents()   # rounds.csv has seconds, and server.pt says how long that is
        return place.config["server"], [files[name] for name in sorted(files) if name.endswith(
            ("clients.csv", "server.csv", "shared.pt", *(f"client_{k}.pt" for k in range(4))))]
    assert place.main(*flags) == 0
    expected, aggregate = ends(), Ranks.aggregate

    def interrupted(self, server, round):
        if round.number == stopped:
            raise Interrupted(signal.SIGINT)
        return aggregate(self, server, round)
    with monkeypatch.context() as patch:
        patch.setattr(Ranks, "aggregate", interrupted)
        assert place.main(*flags, "--overwrite") == 130
    assert {p.name for p in place.models.glob("round_*")} == {f"round_{stopped - 1}"}
    assert place.main(*flags, "--resume") == 0 and ends() == expected


def test_nobody_sampled_is_a_round_too(place):
    """Poisson sampling may take no client: the head moves by the noise alone."""
    assert place.main("--method", "client_dp", "--frac", 0.01, "--noise_multiplier", 1, "--rounds", 2) == 0
    clients = pd.read_csv(place.results / "clients.csv")
    assert len(clients) == 2 * 2 and set(clients["stage"]) == {"deployed"}
    shared = place.saved(2, "shared.pt")
    assert not shared["uploads"] and all(value.isfinite().all() for value in shared["sent"].values())


@pytest.fixture
def clients(driver, place):
    """A function from flags to Clients that train nothing."""
    def make(*flags):
        args = args_parser(place.argv(*flags))
        data = datasets.load("tiny", args.data_dir)
        owned, splits = setup.partition(args, data)
        trainer = setup.make_trainer(args, data, setup.torch.device("cpu"))
        run = SimpleNamespace(ranks=None)
        return Clients(args, trainer, setup.MaliciousClients(None, 0, args.num_users, 1), owned, splits, run, {})
    return make


def same(ours, expected):
    return all(np.array_equal(a, b) for pair, other in zip(ours, expected, strict=True)
               for a, b in zip(pair, other, strict=True))


def test_each_split_has_a_purpose_of_its_own(clients):
    """A validation split that drew what the test split draws would not be independent of it."""
    plain = clients("--num_users", 3)
    labels = plain.trainer.labels.numpy()
    assert same(plain.splits_in(2), sampling.split_all(plain.owned, labels, 0.1, 1, "split"))
    train = [images for images, _ in plain.splits]
    validated = clients("--num_users", 3, "--validate").splits_in(2)
    assert same(validated, sampling.split_all(train, labels, 0.1, 1, "validation"))
    small = clients("--partition", "dirichlet", "--alpha", 0.01, "--num_users", 6, "--local_bs", 32)
    assert min(map(len, small.owned)) == 36 and min(len(images) for images, _ in small.splits) == 32   # a batch
    resplit = clients("--resplit", "--seed", 4)
    first, second = resplit.splits_in(1), resplit.splits_in(2)
    assert not same(first, second) and same(first, resplit.splits_in(1))
    for (images, aside), owned in zip(second, resplit.owned, strict=True):
        assert np.array_equal(np.sort(np.concatenate([images, aside])), owned)


def test_the_share_of_test_images_is_held_out_of_each_class(clients):
    """Under --validate, a tenth of the other three quarters is evaluated."""
    for share, *flags in ((0.25, "--partition", "dirichlet", "--alpha", 1), (0.25, "--resplit"),
                          (0.075, "--validate")):
        made = clients("--num_users", 3, "--test_share", 0.25, *flags)
        labels = made.trainer.labels.numpy()
        test, owned = (np.stack([np.bincount(labels[images], minlength=4) for images in parts])
                       for parts in ([test for _, test in made.splits_in(2)], made.owned))
        assert (np.abs(test - share * owned) < 1).all()
        assert np.abs(test.sum(1) - share * owned.sum(1)).max() < 1


@pytest.mark.parametrize("method, noise", [("rve_pfl", ()), ("client_dp", ("--noise_multiplier", 1))])
def test_the_clients_of_a_round(clients, method, noise):
    """Poisson sampling, as client-level DP's epsilon assumes; else always the same number."""
    made = clients("--frac", 0.25, "--num_users", 40, "--local_bs", 4, "--partition", "iid", "--method", method,
                   *noise)
    for number in range(1, 20):
        assert made.select(number) == sampling.sample_clients(
            40, 0.25, rng(1, "sample", round=number), poisson=bool(noise))
    assert all(row.poisson == (row.server is not None and issubclass(row.server.imported(), ClientDP))
               for row in METHODS.values())


def test_the_last_round_is_evaluated_and_heads_on_borrowed_encoders_learn_slowly(clients):
    made = clients("--rounds", 5, "--eval_every", 2)
    assert [number for number in range(1, 6) if made.evaluates(number)] == [2, 4, 5]
    borrowed = clients("--encoders_from", "other").trainer
    optimizer, _ = borrowed.prepare({}, borrowed.training.part)
    assert [group["scale"] for group in optimizer.param_groups] == [0.1]
