"""The attack's command line: what it reads, writes, resumes and refuses."""
import dataclasses
import json
import re
import sys
import threading

import numpy as np
import pandas as pd
import pytest
import torch
from attacked import Attacked

from attack import adversaries, decoders, evaluation, mi_attack, observations, scoring, verdict
from attack import target as targets
from attack.attacks import ATTACKS

QUICK = ["--images", 2, "--restarts", 2, "--iterations", 3, "--train_epochs", 1, "--draws", 2]
opened, watching = [], threading.Event()


@pytest.fixture(scope="session", autouse=True)
def guard():
    """Notes each file opened while ``watching`` is set."""
    def note(event, arguments):
        if watching.is_set() and event == "open" and isinstance(arguments[0], str):
            opened.append(arguments[0])
    sys.addaudithook(note)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, make_place, tiny_arrays):
    runs = {method: ("--method", method, "--rounds", 2, "--save_rounds", 1)
            for method in ("rve_pfl", "fedavg", "lg_fedavg", "local", "fedper")}
    return Attacked(make_place(tmp_path_factory.mktemp("trained")), tiny_arrays, mi_attack, QUICK, runs)


def expected(method):
    """Return what fits, by hand."""
    classes = {"mi_face", "margin", "gmi"}
    steps = {"dlg", "cosine_tv", "analytic", "gauss_newton", "batch", "epoch"}
    behind = {"feature_alignment", "gradient_reidentification"}
    latent = {"latent_decoder", "latent_generator", "latent_search", "reidentification", "posterior_mean"}
    server = {"rve_pfl": classes | steps | behind, "lg_fedavg": classes | steps | behind,
              "fedavg": classes | steps}.get(method, set())
    stolen = classes | {"rve_pfl": {"margin_mu"} | latent, "local": {"margin_mu"} | latent,
                        "lg_fedavg": latent}.get(method, set())
    client = classes if method != "local" else set()
    return {*(("curious_server", name) for name in server), *(("stolen_model", name) for name in stolen),
            *(("curious_client", name) for name in client), ("prediction_api", "score_decoder")}


ALONE = ("mi_face", "gauss_newton", "feature_alignment", "latent_decoder", "reidentification", "posterior_mean",
         "gradient_reidentification", "score_decoder")   # without restarts


@pytest.mark.parametrize("method", [pytest.param("rve_pfl", marks=pytest.mark.slow), "fedavg",
                                    pytest.param("lg_fedavg", marks=pytest.mark.slow), "local", "fedper"])
def test_every_attack_that_fits_leaves_rows_controls_and_a_picture(trained, few_steps, method):
    assert trained.attack(method, "--overwrite") == 0
    table = trained.csv(method)
    assert list(table.columns) == verdict.ATTACK_COLUMNS
    assert set(zip(table["adversary"], table["attack"], strict=True)) == expected(method)
    folder = trained.results(method)
    for (who, how), part in table.groupby(["adversary", "attack"]):
        found = part[part["control"] == ""]
        row = ATTACKS[how]
        count = 4 if row.kind == "class" else 2 * (1 + row.unordered)   # the client's classes, or --images
        count = min(count, found.groupby("restart").size().max())
        assert len(found) == count * (1 if how in ALONE else 2)
        assert part["control"].value_counts().drop("").to_dict() == dict.fromkeys(
            ("grey", "noise") if row.kind == "class" else ("foreign",), count)   # public: of other classes
        assert (folder / f"attack_{who}_{how}_round2_client0.png").stat().st_size > 1000
    numbers = table[["mse", "psnr", "ssim", "nearest_rank", "class_rank"]].apply(pd.to_numeric)
    assert np.isfinite(numbers).all(axis=None) and (numbers["nearest_rank"] >= 1).all()
    assert table["evaluator_correct"].isin([0, 1]).all() and table["label_match"].isin([0, 1]).all()
    assert set(table["image"]) <= set(np.load(folder / "partition.npz")["train_0"])
    summary = trained.csv(method, "attack_summary.csv")
    assert ((summary["mse_low"] <= summary["mse"] + 1e-9) & (summary["mse"] <= summary["mse_high"] + 1e-9)).all()


@pytest.mark.parametrize("adversary, allowed", [
    ("curious_server", {"server.pt"}), ("stolen_model", {"client_0.pt"}),
    ("curious_client", {"client_1.pt"})])
def test_an_adversary_opens_its_own_files_only(trained, adversary, allowed):
    """What it knows; what a victim does in front of it is computed from the victim's file, by ``Victim``."""
    run = trained.target("rve_pfl")
    opened.clear()
    watching.set()
    try:
        adversaries.hold(run, adversary, 2, 0, own=1)
    finally:
        watching.clear()
    files = {name.rsplit("/", 1)[-1] for name in opened if "/models/" in name}
    assert files == {"shared.pt"} | allowed
    assert not any("partition" in name or "/data/" in name for name in opened)


@pytest.mark.slow
def test_no_attack_opens_a_file(trained, few_steps, monkeypatch):
    """Once it has what it holds and observes, an attack asks for nothing else."""
    def watched(solve):
        def call(*arguments):
            watching.set()
            try:
                return solve(*arguments)
            finally:
                watching.clear()
        return call
    for name, attack in ATTACKS.items():
        monkeypatch.setitem(ATTACKS, name, dataclasses.replace(attack, solve=watched(attack.solve)))
    opened.clear()
    assert trained.attack("rve_pfl", "--overwrite") == 0
    folder = str(trained.place.folder)
    assert not [name for name in opened if name.startswith(folder)]


def test_an_attack_is_the_same_whichever_came_before(trained, few_steps):
    """Alone and behind each other: the server's shadow encoder, its decoder, and `feature_alignment`'s own."""
    def rows(*attacks):
        flags = ("--adversary", "curious_server", "--attack", *attacks)
        assert trained.attack("rve_pfl", "--overwrite", *flags) == 0
        table = trained.csv("rve_pfl").set_index("attack")
        return table.assign(kl_nats=pd.to_numeric(table["kl_nats"]))   # empty for attacks on classes
    together = rows("mi_face", "analytic", "feature_alignment")
    for attack in ("feature_alignment", "analytic"):
        pd.testing.assert_frame_equal(rows(attack), together.loc[[attack]])


def test_it_goes_on_where_it_stopped_and_narrowing_is_free(trained, monkeypatch, capsys):
    flags = ("--adversary", "stolen_model", "--attack", "mi_face", "margin", "latent_decoder")
    assert trained.attack("rve_pfl", "--overwrite", *flags) == 0
    whole = trained.csv("rve_pfl")
    attack, calls = evaluation.Evaluation.attack, []

    def counted(self, unit):
        calls.append(unit.attack)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return attack(self, unit)
    monkeypatch.setattr(evaluation.Evaluation, "attack", counted)
    with pytest.raises(KeyboardInterrupt):
        trained.attack("rve_pfl", "--overwrite", *flags)
    assert trained.attack("rve_pfl", *flags, *flags[2:], "--clients", 0, 0) == 0   # given twice, attacked once
    assert calls == ["mi_face", "margin", "margin", "latent_decoder"]
    again = trained.csv("rve_pfl")
    pd.testing.assert_frame_equal(again[again["attack"] != "latent_decoder"],
                                  whole[whole["attack"] != "latent_decoder"])
    assert trained.attack("rve_pfl", "--rounds", 1, *flags) == 0
    assert set(trained.csv("rve_pfl")["round"]) == {1, 2}
    line = trained.refuses(capsys, "rve_pfl", *flags, "--iterations", 4)
    assert "--iterations" in line and "--overwrite" in line


@pytest.mark.parametrize("flags, named", [
    (["--clients", 2], "0 to 1"), (["--rounds", 7], "--save_rounds 7"), (["--attack", "epoche"], "--attack"),
    (["--images", 0], "--images"), (["--public", "nothing"], "nothing.npz"),
    (["--itrations", 4], "--iterations"), (["--public", "unowned"], "--public")])
def test_bad_input(trained, capsys, flags, named):
    assert named in trained.refuses(capsys, "rve_pfl", "--overwrite", *flags)


def test_what_does_not_fit_says_why(trained, capsys):
    assert "nothing travels" in trained.refuses(capsys, "local", "--adversary", "curious_server")
    assert "head stays" in trained.refuses(capsys, "fedper", "--adversary", "curious_server")
    assert "no latents" in trained.refuses(capsys, "fedavg", "--attack", "latent_decoder")


def test_attacks_of_a_client_and_round_attack_the_same_images(trained, few_steps):
    """All of the client's where that is cheap, and the first of these elsewhere; a number given is for all."""
    flags = ("--attack", "reidentification", "latent_decoder", "latent_search", "--public_images", 200)
    own = np.load(trained.results("lg_fedavg") / "partition.npz")["train_0"]
    argv = trained.argv("lg_fedavg", "--overwrite", *flags)
    del argv[argv.index("--images"):argv.index("--images") + 2]

    def images():
        table = trained.csv("lg_fedavg").query("restart == 0 and control == ''")
        return {how: part["image"].tolist() for how, part in table.groupby("attack")}
    assert mi_attack.main(argv) == 0
    every = images()
    assert sorted(every["reidentification"]) == sorted(own)
    assert every["latent_decoder"] == every["reidentification"]
    assert every["latent_search"] == every["latent_decoder"][:8]
    assert trained.attack("lg_fedavg", "--overwrite", *flags, "--images", 3) == 0
    assert list(images().values()) == [every["latent_search"][:3]] * 3


def test_chosen_images_are_attacked_in_every_attack_and_seed(trained, capsys):
    """Their controls are other images of their classes, and their candidates those of any attack."""
    partition = np.load(trained.results("lg_fedavg") / "partition.npz")
    labels = trained.labels
    chosen = [int(n) for c in np.unique(labels[partition["train_0"]])
              for n in partition["train_0"][labels[partition["train_0"]] == c][3:5]]

    def attack(*flags):
        argv = trained.argv("lg_fedavg", *flags)
        del argv[argv.index("--images"):argv.index("--images") + 2]
        return mi_attack.main(argv)
    flags = ("--attack", "reidentification", "analytic", "batch", "mi_face", "--image_numbers")
    for seed in (1, 2):
        assert attack("--overwrite", *flags, *chosen, "--seed", seed) == 0
        table = trained.csv("lg_fedavg").query("restart == 0 and control == '' and attack != 'mi_face'")
        images = {how: part["image"].tolist() for how, part in table.groupby("attack")}
        assert images["reidentification"] == images["analytic"] == images["batch"][:len(chosen)] == chosen
        assert not set(images["batch"][len(chosen):]) & set(chosen)   # the foreign batch
        assert np.allclose(table.query("attack == 'reidentification'")["guess"], 1 / len(partition["train_0"]),
                           rtol=1e-4)
    whole = trained.csv("lg_fedavg")

    def refuses(*numbers):
        capsys.readouterr()
        assert attack(*flags, *numbers) == 2
        line, = capsys.readouterr().err.strip().splitlines()
        assert "--image_numbers" in line
        return line
    assert "attacked before with" in refuses(*chosen[::-1], "--seed", 2)
    assert "more than once" in refuses(chosen[0], chosen[0])
    assert str(partition["train_1"][0]) in refuses(chosen[0], partition["train_1"][0])
    assert "client 1 trains on none" in refuses(*chosen, "--clients", 0, 1)
    assert "give one of them" in refuses(*chosen, "--images", 2)
    assert "too few images" in refuses(*partition["train_0"])   # for the foreign control of a batch
    pd.testing.assert_frame_equal(trained.csv("lg_fedavg"), whole)


def test_each_image_has_its_kl_and_the_summary_the_worst(trained, capsys):
    flags = ("--attack", "reidentification", "--images", 9)
    assert trained.attack("rve_pfl", "--overwrite", "--clients", 0, 1, *flags) == 0
    assert "of the 2% with the highest KL" in capsys.readouterr().out
    run = trained.target("rve_pfl")
    table = trained.csv("rve_pfl").query("control == ''")
    for client, part in table.groupby("client"):
        state = {**run.shared(2)["uploads"][client], **run.private(2, client).parameters}
        network = run.network()
        network.load_state_dict(state)
        mu, logvar = network.encoder(targets.as_floats(run.data.images[part["image"]]))
        kl = 0.5 * (mu**2 + logvar.exp() - 1 - logvar).sum(1)
        assert part["kl_nats"].astype(float).tolist() == pytest.approx(kl.tolist(), rel=1e-3)
    worst = table.loc[table["kl_nats"].astype(float).idxmax(), "identified"]   # 2 % of 18 is one image
    summary = trained.csv("rve_pfl", "attack_summary.csv").set_index("control")
    assert float(summary.loc["", "identified_worst"]) == float(worst)
    assert trained.attack("lg_fedavg", "--overwrite", *flags) == 0
    assert set(trained.csv("lg_fedavg")["kl_nats"]) == {""}


def test_damaged_and_foreign_files(trained, capsys, tmp_path):
    place = trained.place
    assert "no runs" in trained.refuses(capsys, "rve_pfl", "--results_dir", str(tmp_path))
    assert "there: " in trained.refuses(capsys, "none")
    shared = place.folder / "models" / "rve_pfl" / "round_2" / "shared.pt"
    whole = shared.read_bytes()
    other = place.folder / "models" / "fedavg" / "round_2" / "shared.pt"
    try:
        shared.write_bytes(other.read_bytes()[:500])
        assert "shared.pt" in trained.refuses(capsys, "rve_pfl", "--overwrite")
    finally:
        shared.write_bytes(whole)
    config = place.folder / "results" / "fedper" / "config.json"
    text = config.read_text()
    try:
        config.write_text("{")
        assert "config.json is damaged" in trained.refuses(capsys, "fedper")
        config.write_text(json.dumps({"options": {"method": "magic"}}))
        assert "not of this version" in trained.refuses(capsys, "fedper")
    finally:
        config.write_text(text)


def test_resplit_runs_are_not_attacked(trained, capsys):
    assert trained.place.main("--resplit", "--run_name", "resplit", "--rounds", 1) == 0
    capsys.readouterr()   # two clients: the server warns
    assert "--resplit" in trained.refuses(capsys, "resplit")


def test_what_z_can_tell_stands_beside_the_attacks(trained, capsys):
    quick = ("--adversary", "stolen_model", "--attack", "latent_decoder")
    path = trained.results("rve_pfl") / "attack_latents.csv"
    assert trained.attack("rve_pfl", *quick, "--overwrite", "--rounds", 1) == 0
    assert trained.attack("rve_pfl", *quick, "--rounds", 2) == 0
    table = trained.csv("rve_pfl", "attack_latents.csv")
    assert table[["round", "client"]].to_numpy().tolist() == [[1, 0], [2, 0]]
    assert (table["kl_nats"] > 0).all() and (table["sigma"] > 0).all() and (table["mse_bound"] > 0).all()
    found = trained.csv("rve_pfl", "attack_summary.csv")
    found = found[found["control"] == ""].set_index("round")["mse"]
    assert (found >= table.set_index("round")["mse_bound"]).all()   # no attack on z beats the bound
    said = capsys.readouterr().out
    assert "round 2 client 0: z tells at most" in said
    word = "(leaks|as a guess) [(]only 2 images[)][.] SSIM"
    assert re.search(f"^stolen_model latent_decoder round 2 client 0: {word}.* s[)]$", said, re.MULTILINE)
    path.write_text("round\n1\n")
    assert "attack_latents.csv is damaged" in trained.refuses(capsys, "rve_pfl", *quick, "--rounds", 2)
    assert trained.attack("rve_pfl", *quick, "--overwrite", "--rounds", 2) == 0
    assert len(trained.csv("rve_pfl", "attack_latents.csv")) == 1
    assert trained.attack("lg_fedavg", *quick, "--overwrite") == 0   # no noise: nothing to say
    assert not (path.parent.parent / "lg_fedavg" / path.name).exists()


def test_gradients_of_a_trained_run_give_its_images_away(trained):
    """Victim and server at the same weights; matched on the upload's instead, ranks are 3 to 39."""
    flags = ("--adversary", "curious_server", "--attack", "analytic", "--images", 6, "--iterations", 1000)
    assert trained.attack("fedavg", "--overwrite", "--rounds", 1, *flags) == 0
    found = trained.csv("fedavg").query("control == '' and restart == 0")
    assert len(found) == 6 and (found["label_match"] == 1).all()
    foreign = trained.csv("fedavg").query("control == 'foreign'")
    assert (found["nearest_rank"] == 1).all() and found["mse"].median() < foreign["mse"].median() / 100
    assert (found["mse"].to_numpy() < foreign["mse"].to_numpy() / 2).all()


def test_a_candidate_is_identified_by_its_latent(trained):
    flags = ("--adversary", "stolen_model", "--attack", "reidentification", "--images", 8)
    assert trained.place.main("--run_name", "quiet", "--rounds", 1, "--init_logvar", -9, "--overwrite") == 0
    for run in ("quiet", "lg_fedavg"):
        assert trained.attack(run, "--overwrite", *flags) == 0
        table = trained.csv(run)
        found = table[table["control"] == ""]
        assert (found["nearest_rank"] == 1).all() and (found["psnr"] == 100).all()
        assert (table.query("control == 'foreign'")["nearest_rank"] > 1).all()   # another image is not


@pytest.mark.parametrize("method, flags", [
    ("nbafl", ("--epsilon", 0.5)), ("client_dp", ("--noise_multiplier", 1, "--clip", 0.01))])
def test_who_steals_a_protected_client_has_what_it_trained(trained, method, flags):
    """Before the clip and the noise that its upload got."""
    place = trained.place
    assert place.main("--method", method, "--run_name", method, "--rounds", 1, *flags, "--overwrite") == 0
    run = trained.target(method)
    upload = run.shared(1)["uploads"][0]
    private = torch.load(run.file(1, "client_0.pt"), weights_only=True)
    stolen = adversaries.hold(run, "stolen_model", 1, 0).head.state_dict()
    server = adversaries.hold(run, "curious_server", 1, 0)
    for name, value in stolen.items():
        assert torch.equal(value, private["trained_shared"][f"classifier.{name}"])
        assert torch.equal(server.head.state_dict()[name], upload[f"classifier.{name}"])
    weight = "output.weight"
    assert not torch.allclose(stolen[weight], server.head.state_dict()[weight], atol=1e-3)
    clients = pd.read_csv(place.folder / "results" / method / "clients.csv")
    trained_loss = clients.query("client == 0 and stage == 'trained' and split == 'test'")["loss"].item()
    with np.load(run.results / "partition.npz") as parts:
        images = targets.as_floats(run.data.images[parts["test_0"]])
        labels = torch.from_numpy(run.data.labels[parts["test_0"]])
    victim = observations.Victim(run, 1, 0)
    loss = -victim.answers(images, 1, 10**9).log().gather(1, labels[:, None]).mean().item()
    assert loss == pytest.approx(trained_loss, rel=0.02)


QUICKEST = ("--adversary", "curious_server", "--attack", "analytic")


def test_what_is_refused_leaves_no_trace_and_keeps_what_was_there(trained, capsys):
    folder = trained.results("fedavg")
    for old in folder.glob("attack*"):
        old.unlink()
    misfit = ("--adversary", "curious_server", "--attack", "latent_decoder")
    assert "needs what" in trained.refuses(capsys, "fedavg", *misfit)
    assert not list(folder.glob("attack*"))
    assert trained.attack("fedavg", *QUICKEST, "--images", 1) == 0   # other options than those refused
    before = {path.name: path.read_bytes() for path in folder.glob("attack*")}
    trained.refuses(capsys, "fedavg", "--overwrite", *misfit)
    client = trained.place.folder / "models" / "fedavg" / "round_2" / "client_0.pt"
    whole = client.read_bytes()
    try:
        client.write_bytes(whole[:100])
        assert "client_0.pt" in trained.refuses(capsys, "fedavg", "--overwrite", *QUICKEST)
    finally:
        client.write_bytes(whole)
    assert {path.name: path.read_bytes() for path in folder.glob("attack*")} == before


def test_a_kill_around_the_first_row_leaves_nothing_that_counts(trained, capsys, monkeypatch):
    folder = trained.results("fedavg")
    for broken in ("write_whole", "MiAttack.write"):   # of attack.json, and of attack.csv
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(f"attack.{'mi_attack' if '.' in broken else 'command'}.{broken}",
                          lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            trained.attack("fedavg", "--overwrite", *QUICKEST)
        assert not (folder / "attack.csv").exists()
    assert (folder / "attack.json").exists()
    assert trained.attack("fedavg", *QUICKEST, "--images", 1) == 0
    assert json.loads((folder / "attack.json").read_text())["images"] == 1
    (folder / "attack.json").unlink()   # rows of who knows what options
    assert "--overwrite" in trained.refuses(capsys, "fedavg", *QUICKEST, "--images", 1)


@pytest.mark.parametrize("harm", [
    lambda text: "x", lambda text: text.replace("0", "a"), lambda text: text.replace(",2,0,", ",2.5,0,"),
    lambda text: text.split("\n")[0] + "\n"])
def test_damaged_rows_are_refused(trained, capsys, harm):
    path = trained.results("fedavg") / "attack.csv"
    assert trained.attack("fedavg", "--overwrite", *QUICKEST) == 0
    path.write_text(harm(path.read_text()))
    assert "damaged" in trained.refuses(capsys, "fedavg", *QUICKEST)


def test_what_configs_and_partitions_may_not_say(trained, capsys):
    folder = trained.results("fedavg")
    assert "not a path" in trained.refuses(capsys, "fedavg", "--public", "../data/public")
    config, partition = folder / "config.json", folder / "partition.npz"
    text, whole = config.read_text(), partition.read_bytes()
    arrays = dict(np.load(partition))
    try:
        config.write_text(text.replace('"tiny"', '"../data/tiny"'))
        assert "not a path" in trained.refuses(capsys, "fedavg")
        config.write_text("[" * 9999)
        assert "config.json is damaged" in trained.refuses(capsys, "fedavg")
        config.write_text(text)
        for wrong in (np.array([240]), np.array([-1]), np.array([0.5]), np.array([], int), np.array(3)):
            np.savez(partition, **{**arrays, "train_1": wrong})
            assert "does not number images" in trained.refuses(capsys, "fedavg")
    finally:
        config.write_text(text)
        partition.write_bytes(whole)


def test_a_lone_client_and_classes_that_nobody_held_out(trained, capsys):
    """One client has nobody to be curious about; class 3 is the lone client's, and trained on alone."""
    place = trained.place
    assert place.main("--method", "fedavg", "--num_users", 1, "--run_name", "lone", "--rounds", 1) == 0
    capsys.readouterr()   # the images that are nobody's
    assert "no other client" in trained.refuses(capsys, "lone", "--adversary", "curious_client",
                                                "--attack", "mi_face")
    partition = place.folder / "results" / "lone" / "partition.npz"
    arrays, labels = dict(np.load(partition)), np.load(place.folder / "data" / "tiny.npz")
    labels = np.concatenate([labels["train_labels"], labels["test_labels"]])
    np.savez(partition, **{**arrays, "test_0": arrays["test_0"][labels[arrays["test_0"]] < 2]})
    drawn = ("--adversary", "stolen_model", "--attack", "mi_face")
    held = set(labels[arrays["test_0"]]) & {0, 1}
    assert trained.attack("lone", *drawn) == 0 and set(trained.csv("lone")["label"]) == held
    others = arrays["train_0"][labels[arrays["train_0"]] >= 2]
    np.savez(partition, **{**dict(np.load(partition)), "train_0": others})
    if len(others):
        assert "nobody held out" in trained.refuses(capsys, "lone", "--overwrite", *drawn)


def test_training_takes_any_number_of_steps():
    """Ten once divided by zero."""
    weight = torch.zeros(1, requires_grad=True)
    for steps in range(1, 31):
        decoders.fit([weight], lambda part: (weight - 1).square().sum(), 128 * steps, 1)
        decoders.fit([weight], lambda part: (weight - 1).square().sum(), 5, steps)
    assert 0 < weight.item() <= 1.5


def test_one_image_or_all_alike_bound_nothing():
    for images in (torch.rand(1, 1, 8, 8), torch.full((9, 1, 8, 8), 0.3)):
        assert scoring.distortion_bound(images, 5.0) == 0
    assert scoring.distortion_bound(torch.rand(9, 1, 8, 8), float("nan")) == 0


def test_who_did_not_train_has_the_head_just_aggregated(trained):
    place = trained.place
    flags = ("--rounds", 2, "--frac", 0.5, "--save_rounds", 1, "--overwrite")
    assert place.main("--run_name", "half", *flags) == 0
    run = trained.target("half")
    idle, = {0, 1} - run.shared(1)["uploads"].keys()
    stolen = adversaries.hold(run, "stolen_model", 1, idle).head.state_dict()
    assert all(torch.equal(value, run.sent_next(1)[f"classifier.{name}"]) for name, value in stolen.items())
    assert not torch.equal(stolen["output.weight"], run.shared(1)["sent"]["classifier.output.weight"])
