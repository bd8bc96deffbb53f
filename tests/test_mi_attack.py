"""The attack's command line: what it reads, writes, resumes and refuses, also beside other processes."""
import contextlib
import dataclasses
import fcntl
import sys
import threading
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from attacked import Attacked, kept, refused, spy

from attack import adversaries, command, evaluation, mi_attack, observations, verdict
from attack import target as targets
from attack.attacks import ATTACKS
from engine.signals import Interrupted

QUICK = ["--images", 2, "--restarts", 2, "--iterations", 3, "--train_epochs", 1, "--draws", 2,
         "--observe", "z"]
SERVER = ("--adversary", "curious_server", "--attack", "analytic")
STOLEN = ("--adversary", "stolen_model", "--attack")
opened, watching = [], threading.Event()
draw_picture = evaluation.save_picture


@pytest.fixture(scope="session", autouse=True)
def guard():
    """Note each file that is opened while ``watching`` is set."""
    def note(event, arguments):
        if watching.is_set() and event == "open" and isinstance(arguments[0], str):
            opened.append(arguments[0])
    sys.addaudithook(note)


@contextlib.contextmanager
def noting():
    """Set ``watching`` meanwhile."""
    watching.set()
    try:
        yield
    finally:
        watching.clear()


@pytest.fixture(scope="module")
def trained(tmp_path_factory, make_place, tiny_arrays):
    runs = {method: ("--method", method, "--rounds", 2, "--save_rounds", 1)
            for method in ("rve_pfl", "fedavg", "lg_fedavg", "local", "fedper")}
    runs |= {"run": ("--rounds", 1), "resplit": ("--resplit", "--rounds", 1),
             "half": ("--rounds", 3, "--frac", 0.5, "--save_rounds", 1),
             "lone": ("--method", "fedavg", "--num_users", 1, "--rounds", 1),
             "nbafl": ("--method", "nbafl", "--rounds", 1, "--epsilon", 0.5),
             "client_dp": ("--method", "client_dp", "--rounds", 1, "--noise_multiplier", 1, "--clip", 0.01)}
    return Attacked(make_place(tmp_path_factory.mktemp("trained")), tiny_arrays, mi_attack, QUICK, runs)


def files(trained, run):
    """Return what attacks have left, by name."""
    return {path.name: path.read_bytes() for path in trained.results(run).glob("attack*")}


def all_images(trained, run, *flags):
    """Return a command line with no --images."""
    argv = trained.argv(run, *flags)
    del argv[argv.index("--images"):argv.index("--images") + 2]
    return argv


def images_by_attack(trained, run):
    table = trained.csv(run).query("restart == 0 and control == '' and image != ''")
    return {name: rows["image"].tolist() for name, rows in table.groupby("attack")}


def expected(method):
    """Return the attacks that fit, by hand."""
    classes = {"mi_face", "margin", "gmi"}
    steps = {"dlg", "cosine_tv", "analytic", "gauss_newton", "batch", "epoch"}
    behind = {"feature_alignment", "gradient_reidentification"}
    latent = {"latent_decoder", "latent_generator", "latent_search", "reidentification", "posterior_mean"}
    server = {"rve_pfl": classes | steps | behind, "lg_fedavg": classes | steps | behind,
              "fedavg": classes | steps, "fedper": {"analytic"}}.get(method, set())
    stolen = classes | {"rve_pfl": {"margin_mu"} | latent, "local": {"margin_mu"} | latent,
                        "lg_fedavg": latent}.get(method, set())
    client = classes if method != "local" else set()
    return {*(("curious_server", name) for name in server), *(("stolen_model", name) for name in stolen),
            *(("curious_client", name) for name in client), ("prediction_api", "score_decoder")}


ONCE = ("mi_face", "gauss_newton", "feature_alignment", "latent_decoder", "reidentification", "posterior_mean",
        "gradient_reidentification", "score_decoder")   # attacks without restarts


@pytest.mark.parametrize("method", ["local", "fedper", *(pytest.param(name, marks=pytest.mark.slow)
                                                         for name in ("rve_pfl", "fedavg", "lg_fedavg"))])
def test_every_attack_that_fits_leaves_rows_controls_and_a_picture(trained, few_steps, monkeypatch, method):
    """Once it has what it holds and observes, an attack opens no file of the run."""
    for name, attack in ATTACKS.items():
        monkeypatch.setitem(ATTACKS, name, dataclasses.replace(attack, solve=noting()(attack.solve)))
    opened.clear()
    assert trained.attack(method, "--overwrite", "--attack", "all") == 0
    assert not [name for name in opened if name.startswith(str(trained.place.folder))]
    table, folder = trained.csv(method), trained.results(method)
    assert list(table.columns) == verdict.ATTACK_COLUMNS
    assert set(zip(table["adversary"], table["attack"], strict=True)) == expected(method)
    for (adversary, name), rows in table.groupby(["adversary", "attack"]):
        own, attack = rows[rows["control"] == ""], ATTACKS[name]
        count = 4 if attack.kind == "class" else 2 * (1 + attack.unordered)   # the client's classes, or --images
        count = min(count, own.groupby("restart").size().max())
        assert len(own) == count * (1 if name in ONCE else 2)
        assert rows["control"].value_counts().drop("").to_dict() == dict.fromkeys(
            ("grey", "noise") if attack.kind == "class" else ("foreign",), count)   # public: of other classes
        picture = (folder / f"attack_{adversary}_{name}_round2_client0.png").read_text()
        assert "'grey" not in picture and "'noise" not in picture
        best = own.iloc[0]
        assert f"SSIM {best['ssim']:.2f}\\nrank {best['class_rank']} of {best['class_size']}" in picture
    numbers = table[["mse", "psnr", "ssim", "nearest_rank", "class_rank"]].apply(pd.to_numeric)
    assert np.isfinite(numbers).all(axis=None) and (numbers["nearest_rank"] >= 1).all()
    assert table["evaluator_correct"].isin([0, 1]).all() and table["label_match"].isin([0, 1]).all()
    assert set(table["image"]) <= set(np.load(folder / "partition.npz")["train_0"])


@pytest.mark.parametrize("channels", [1, 3])
def test_a_picture_is_drawn(tmp_path, channels):
    images = torch.rand(2, channels, 8, 8)
    draw_picture(tmp_path / "x.png", {"truth": images, "analytic": images},
                 {"analytic": ["SSIM 0.99\nrank 1 of 9", "SSIM 0.12\nrank 7 of 9"]}, torch.tensor([3, 1]), "run")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_latents_kl_and_bounds_stand_beside_the_attacks(trained, capsys):
    """The KL of each image, the worst 2 % in the summary, and the least error from z for each client and round."""
    flags = (*STOLEN, "latent_decoder", "reidentification", "--images", 9, "--clients", 0, 1)
    assert trained.attack("rve_pfl", "--overwrite", *flags) == 0
    assert trained.attack("rve_pfl", *flags, "--rounds", 1) == 0
    said, run, table = capsys.readouterr().out, trained.target("rve_pfl"), trained.csv("rve_pfl")
    table = table.query("control == '' and round == 2 and attack == 'reidentification'")
    for client, rows in table.groupby("client"):
        network = run.network()
        network.load_state_dict({**run.shared(2)["uploads"][client], **run.private(2, client).parameters})
        mu, logvar = network.encoder(targets.as_floats(run.data.images[rows["image"]]))
        kl = 0.5 * (mu**2 + logvar.exp() - 1 - logvar).sum(1)
        assert rows["kl_nats"].astype(float).tolist() == pytest.approx(kl.tolist(), rel=1e-3)
    worst = table.loc[table["kl_nats"].astype(float).idxmax(), "identified"]   # 2 % of 18 is one image
    summary = trained.csv("rve_pfl", "attack_summary.csv").query("control == '' and round == 2")
    summary = summary.set_index("attack")
    assert float(summary.loc["reidentification", "identified_worst"]) == float(worst)
    bounds = trained.csv("rve_pfl", "attack_latents.csv")
    assert bounds[["round", "client"]].to_numpy().tolist() == [[1, 0], [1, 1], [2, 0], [2, 1]]
    assert (bounds[["kl_nats", "sigma"]] > 0).all(axis=None)
    assert "round 2, client 0: z tells at most" in said


def test_the_table_has_a_line_for_each_attack(trained, capsys):
    """Its figures are those of attack.csv, also for attacks of an earlier call; a picture and a command follow."""
    flags = ("--images", 6, *STOLEN, "mi_face", "latent_decoder", "reidentification", "--observe", "z", "mu")
    assert trained.attack("run", "--overwrite", *flags[:6]) == 0
    for _ in range(2):
        capsys.readouterr()
        assert trained.attack("run", *flags) == 0
        _, title, _, *lines = capsys.readouterr().out.splitlines()
        assert title == "run, round 1, client 0"
        lines, rest = lines[:lines.index("")], lines[lines.index(""):]
        names = ("mi_face", "latent_decoder (z)", "latent_decoder (mu)", "reidentification (z)",
                 "reidentification (mu)")
        for line, name in zip(lines[:-2], names, strict=True):   # a legend of two lines follows
            attack, _, observed = name.partition(" ")
            rows = trained.csv("run").query(f"attack == '{attack}' and observed == '{observed.strip('()')}'")
            own, foreign = (rows[rows["control"] == control] for control in ("", "foreign"))
            assert f" stolen_model   {name:<25} " in line
            if attack != "mi_face":
                identified = f"{own['identified'].sum()}/6 ({foreign['identified'].sum()}) "
                rank = f" {own['class_rank'].mean():.0f} ({foreign['class_rank'].mean():.0f}) "
                assert identified in line and rank in line
        assert lines[0].startswith("too few") and lines[4].startswith("leaks")   # two classes; mu of six images
        picture, = (line.split()[1] for line in rest if line.startswith("picture:"))
        assert "latent_decoder" in picture and (trained.place.folder / "results" / "run" / picture).exists()
        assert "report.py --results_dir" in rest[-1]


def test_gradients_of_a_trained_run_give_its_images_away(trained):
    """Victim and server at the same weights; matched on the upload's instead, ranks are 3 to 39."""
    flags = (*SERVER, "--images", 6, "--iterations", 1000)
    assert trained.attack("fedavg", "--overwrite", "--rounds", 1, *flags) == 0
    own = trained.csv("fedavg").query("control == '' and restart == 0")
    foreign = trained.csv("fedavg").query("control == 'foreign'")
    assert len(own) == 6 and (own["label_match"] == 1).all() and (own["nearest_rank"] == 1).all()
    assert own["mse"].min() < foreign["mse"].median() / 1000   # some, exactly
    assert (own["mse"].to_numpy() < foreign["mse"].to_numpy() / 2).all()


def test_attacks_of_a_client_and_round_attack_the_same_images(trained, few_steps):
    """All of the client's where that is cheap, and the first of these elsewhere; a number given is for all."""
    flags = ("--attack", "reidentification", "latent_decoder", "latent_search", "--public_images", 200)
    own = np.load(trained.results("lg_fedavg") / "partition.npz")["train_0"]
    assert mi_attack.main(all_images(trained, "lg_fedavg", "--overwrite", *flags, "--slow_images", 5)) == 0
    every = images_by_attack(trained, "lg_fedavg")
    assert sorted(every["reidentification"]) == sorted(own)
    assert every["latent_decoder"] == every["reidentification"]
    assert every["latent_search"] == every["latent_decoder"][:5]
    table = trained.csv("lg_fedavg").query("attack == 'reidentification'")   # without noise: identified for sure
    assert (table.query("control == ''")[["nearest_rank", "psnr"]] == [1, 100]).all(axis=None)
    assert (table.query("control == 'foreign'")["nearest_rank"] > 1).all() and set(table["kl_nats"]) == {""}
    assert trained.attack("lg_fedavg", "--overwrite", *flags, "--images", 3) == 0
    assert list(images_by_attack(trained, "lg_fedavg").values()) == [every["latent_search"][:3]] * 3


def test_the_features_of_a_head_are_enough(trained):
    """FedPer keeps its last layer, and the label with it; the first dense layer's gradient has the image."""
    assert trained.attack("fedper", "--overwrite", "--adversary", "curious_server", "--attack", "analytic",
                          "--iterations", 100, "--images", 8) == 0
    table = trained.csv("fedper").query("restart == 0")
    own, foreign = (table[table["control"] == control] for control in ("", "foreign"))
    assert own["ssim"].mean() > foreign["ssim"].mean() + 0.1 and set(own["label_match"]) == {0}


def test_chosen_images_are_attacked_in_every_attack_and_seed(trained, few_steps, capsys):
    """Their controls are other images of their classes, and their candidates those of any attack."""
    partition, labels = np.load(trained.results("lg_fedavg") / "partition.npz"), trained.labels
    own = partition["train_0"]
    chosen = [int(n) for c in np.unique(labels[own]) for n in own[labels[own] == c][3:5]]
    flags = ("--attack", "reidentification", "analytic", "batch", "mi_face", "--image_numbers")
    for seed in (1, 2):
        argv = all_images(trained, "lg_fedavg", "--overwrite", *flags, *chosen, "--seed", seed)
        assert mi_attack.main(argv) == 0
        images = images_by_attack(trained, "lg_fedavg")
        assert images["reidentification"] == images["analytic"] == images["batch"][:len(chosen)] == chosen
        assert not set(images["batch"][len(chosen):]) & set(chosen)   # the foreign batch
        guess = trained.csv("lg_fedavg").query("attack == 'reidentification'")["guess"]
        assert np.allclose(guess, 1 / len(own), rtol=1e-4)
    whole = trained.csv("lg_fedavg")

    def refuses(*numbers):
        line = refused(capsys, mi_attack.main, all_images(trained, "lg_fedavg", *flags, *numbers))
        assert "--image_numbers" in line
        return line
    assert "attacked before with" in refuses(*chosen[::-1], "--seed", 2)
    assert "more than once" in refuses(chosen[0], chosen[0])
    assert str(partition["train_1"][0]) in refuses(chosen[0], partition["train_1"][0])
    assert "client 1 trains on none" in refuses(*chosen, "--clients", 0, 1)
    assert "give one of them" in refuses(*chosen, "--images", 2)
    assert "too few images" in refuses(*own)   # for the foreign control of a batch
    pd.testing.assert_frame_equal(trained.csv("lg_fedavg"), whole)


def test_an_adversary_opens_its_own_files_only(trained):
    """Its knowledge alone: observations are computed from the victim's file, by ``Victim``."""
    run = trained.target("rve_pfl")
    for adversary, allowed in (("curious_server", "server.pt"), ("stolen_model", "client_0.pt"),
                               ("curious_client", "client_1.pt")):
        opened.clear()
        with noting():
            adversaries.hold(run, adversary, 2, 0, own=1)
        assert {name.rsplit("/", 1)[-1] for name in opened if "/models/" in name} == {"shared.pt", allowed}
        assert not any("partition" in name or "/data/" in name for name in opened)


@pytest.mark.parametrize("run", ["nbafl", "client_dp"])
def test_the_stolen_model_of_a_protected_client_is_what_it_trained(trained, run):
    """Before the clip and the noise that its upload got."""
    target = trained.target(run)
    upload = target.shared(1)["uploads"][0]
    private = torch.load(target.file(1, "client_0.pt"), weights_only=True)
    stolen, server = (adversaries.hold(target, name, 1, 0).head.state_dict()
                      for name in ("stolen_model", "curious_server"))
    for name, value in stolen.items():
        assert torch.equal(value, private["trained_shared"][f"classifier.{name}"])
        assert torch.equal(server[name], upload[f"classifier.{name}"])
    assert not torch.allclose(stolen["output.weight"], server["output.weight"], atol=1e-3)
    answering = observations.Victim(target, 1, 0).stolen.head.state_dict()
    assert torch.equal(answering["output.weight"], stolen["output.weight"])


@pytest.mark.parametrize("run, flags, named", [
    ("rve_pfl", ["--clients", 2], "0 to 1"), ("rve_pfl", ["--rounds", 7], "--save_rounds 7"),
    ("rve_pfl", ["--public", "nothing"], "nothing.npz"), ("rve_pfl", ["--public", "../data/public"], "not a path"),
    ("rve_pfl", ["--attack", "epoche"], "--attack"), ("rve_pfl", ["--public", "unowned"], "--public"),
    ("rve_pfl", ["--results_dir", "/nowhere"], "no runs"), ("none", [], "there: "), ("resplit", [], "--resplit"),
    ("local", ["--adversary", "curious_server"], "shares no parameters"),
    ("fedper", ["--adversary", "curious_server", "--attack", "cosine_tv"], "head stays"),
    ("fedavg", ["--attack", "latent_decoder"], "no latents"), ("rve_pfl", ["--observe", "z1"], "zN"),
    ("half", [*STOLEN, "posterior_mean", "--observe", "rounds"], "round 2"),
    ("rve_pfl", [*STOLEN, "posterior_mean", "--observe", "rounds", "--rounds", 0], "round 1"),
    ("lone", ["--adversary", "curious_client", "--attack", "mi_face"], "no other client")])
def test_bad_input(trained, capsys, run, flags, named):
    assert named in trained.refuses(capsys, run, "--overwrite", *flags)


def test_what_is_refused_changes_nothing(trained, capsys):
    folder, models = trained.results("fedavg"), trained.place.folder / "models" / "fedavg" / "round_2"
    misfit = ("--adversary", "curious_server", "--attack", "latent_decoder")
    for old in folder.glob("attack*"):
        old.unlink()
    assert "needs what" in trained.refuses(capsys, "fedavg", *misfit)
    assert not list(folder.glob("attack*"))
    assert trained.attack("fedavg", *SERVER, "--images", 1) == 0   # other options than those refused
    before = files(trained, "fedavg")
    trained.refuses(capsys, "fedavg", "--overwrite", *misfit)
    for path in (models / "client_0.pt", models / "shared.pt"):
        with kept(path):
            path.write_bytes(path.read_bytes()[:100])
            assert path.name in trained.refuses(capsys, "fedavg", "--overwrite", *SERVER)
    config, partition = folder / "config.json", folder / "partition.npz"
    arrays, text = dict(np.load(partition)), config.read_text()
    with kept(config, partition):
        for wrong, named in ((text.replace('"tiny"', '"../data/tiny"'), "not a path"), ("[" * 9999, "is damaged"),
                             ('{"options": {"method": "magic"}}', "not of this version")):
            config.write_text(wrong)
            assert named in trained.refuses(capsys, "fedavg", "--overwrite")
        config.write_text(text)
        for wrong in (np.array([240]), np.array([-1]), np.array([0.5]), np.array([], int), np.array(3)):
            np.savez(partition, **{**arrays, "train_1": wrong})
            assert "does not number images" in trained.refuses(capsys, "fedavg", "--overwrite")
    assert files(trained, "fedavg") == before


def test_deprecations_of_libraries_are_not_printed_between_results(trained, monkeypatch):
    monkeypatch.setattr(mi_attack.MiAttack, "run", lambda self: warnings.warn("old", FutureWarning, stacklevel=1))
    with warnings.catch_warnings(record=True) as printed:
        assert trained.attack("fedavg", *SERVER) == 0
    assert not printed


def test_damaged_rows_are_refused(trained, capsys):
    path = trained.results("fedavg") / "attack.csv"
    assert trained.attack("fedavg", "--overwrite", *SERVER) == 0
    text = path.read_text()
    without_controls = "".join(line for line in text.splitlines(True) if "foreign" not in line)
    for wrong in ("x", text.replace("0", "a"), text.replace(",2,0,", ",2.5,0,"), text.split("\n")[0] + "\n",
                  without_controls):
        path.write_text(wrong)
        assert "damaged" in trained.refuses(capsys, "fedavg", *SERVER)
    path.write_text(text + text.split("\n", 1)[1].replace(SERVER[-1], "of_another_version"))
    assert trained.attack("fedavg", *SERVER) == 0
    path.write_text(text)
    path.with_suffix(".json").unlink()   # rows of unknown options
    assert "--overwrite" in trained.refuses(capsys, "fedavg", *SERVER)


def test_the_files_are_the_same_however_often_an_attack_was_interrupted(trained, few_steps, monkeypatch, capsys):
    """After each attack, and whichever was asked for first, though both share an adversary's shadow encoder."""
    flags = ("--adversary", "curious_server", "--attack", "mi_face", "margin", "--clients", 0)
    assert trained.attack("run", "--overwrite", *flags) == 0
    before, calls = files(trained, "run"), spy(monkeypatch, evaluation.Evaluation, "attack")
    assert len(before) == 4 + 2

    def interrupt():
        raise Interrupted(2)
    with monkeypatch.context() as patch:
        patch.setattr(command, "check", interrupt)
        assert trained.attack("run", "--overwrite", *flags) == 130
        assert capsys.readouterr().err.endswith("interrupted; the same command goes on where it stopped\n")
        while trained.attack("run", *flags, *flags[2:]) == 130:   # attacks and clients given twice
            pass
    assert len(calls) == len({unit for _, unit in calls}) == 2 and files(trained, "run") == before
    assert trained.attack("run", "--overwrite", *flags[:3], "margin") == 0
    assert trained.attack("run", *flags) == 0 and files(trained, "run") == before
    line = trained.refuses(capsys, "run", *flags, "--iterations", 4)
    assert "--iterations" in line and "--overwrite" in line


def test_an_overwrite_that_is_killed_leaves_nothing_that_counts(trained, monkeypatch):
    """Before its first row is there, other options may be given; nothing of the user's is deleted."""
    folder = trained.results("run")
    (folder / "attack_notes.txt").write_text("mine")
    assert trained.attack("run", "--overwrite", *STOLEN, "mi_face", "reidentification") == 0
    for broken in ("mi_attack.MiAttack.write", "command.write_whole"):   # of attack.csv, and of attack.json
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(f"attack.{broken}", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            trained.attack("run", "--overwrite", *STOLEN, "reidentification")
        assert not (folder / "attack.csv").exists()
    assert trained.attack("run", *STOLEN, "mi_face", "--seed", 2) == 0
    assert set(files(trained, "run")) == {
        "attack.csv", "attack.json", "attack_summary.csv", "attack_latents.csv", "attack_notes.txt",
        "attack_stolen_model_mi_face_round1_client0.png"}
    (folder / "attack_notes.txt").unlink()


@pytest.mark.parametrize("folder", ["results", "models"])
def test_one_process_at_a_time_trains_or_attacks_a_run(trained, capsys, folder):
    trained.results("run")
    with open(trained.place.folder / folder / "run" / ".lock", "rb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "attacked by another process" in trained.refuses(capsys, "run")


def test_a_run_cannot_be_trained_while_it_is_attacked(trained, monkeypatch, capsys):
    place, lines = trained.place, []
    monkeypatch.setattr(evaluation, "Evaluation", lambda *_: lines.extend(
        place.refuses(capsys, "--rounds", 1, flag) for flag in ("--overwrite", "--resume")) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        trained.attack("run")
    assert ["attacked by another process" in line for line in lines] == [True, True]
    assert place.main("--rounds", 1, "--resume") == 0   # the lock went with the attack


def test_a_folder_that_is_no_run_gets_no_lock(tmp_path):
    (tmp_path / "thesis").mkdir()
    assert mi_attack.main(["--run", "thesis", "--results_dir", str(tmp_path), "--models_dir", str(tmp_path)]) == 2
    assert not list((tmp_path / "thesis").iterdir())
