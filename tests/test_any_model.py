"""Attacks on models of other programs: labels, reconstructions, files and refusals, in Python and as a command."""
import re
import shutil
import sys

import models_of_others as nets
import numpy as np
import pandas as pd
import pytest
import torch
from attacked import refused
from conftest import ROOT
from torch import nn

from attack import any_model, gradients, mi_attack, scoring
from attack.any_model import AnyModel, gradient_of, invert_classes, invert_gradient, load_gradient, load_model
from utils import InputError

SHAPE = 1, 8, 8
NETS = {"lenet": nets.LeNet, "resnet": nets.ResNet20, "vit": nets.ViT, "mlp": lambda: nets.mlp(4)}
FILE = ROOT / "tests" / "models_of_others.py"


def model_of(name, **normalisation):
    torch.manual_seed(0)
    return AnyModel(NETS[name](), SHAPE, **normalisation)


def pictures(side):
    """Return two pictures of each of four classes of MNIST, and their labels."""
    data = np.load(ROOT / "data" / "mnist10k.npz")
    images, labels = (torch.from_numpy(data[f"test_{part}"]) for part in ("images", "labels"))
    chosen = torch.cat([(labels == c).nonzero()[:2, 0] for c in range(4)])
    pixels = images[chosen].reshape(8, 1, 28, 28).float() / 255
    return nn.functional.adaptive_avg_pool2d(pixels[..., 4:24, 4:24], side), labels[chosen].long()


@pytest.fixture(scope="module")
def mnist():
    return pictures(8)


def psnr(found, truth):
    return scoring.similarity(found, truth)["psnr"].item()


@pytest.mark.parametrize("name", NETS)
def test_the_label_is_read_off_one_gradient(name, mnist):
    """Without a bias, too, in both modes of batch norm, and where features have a negative sum, as the ViT's."""
    model, (images, _) = model_of(name), mnist
    for label in range(4):
        for bn in ("train", "eval"):
            seen = gradient_of(model, images[:1], torch.tensor([label]), bn)
            assert gradients.labels_of(seen, 1, output=model.output_layer).tolist() == [label]
            del seen[f"{model.output_layer}.bias"]
            assert gradients.labels_of(seen, 1, output=model.output_layer).tolist() == [label]
    with pytest.raises(InputError, match="no bias"):
        gradients.labels_of(seen, 2, output=model.output_layer)


@pytest.mark.parametrize("name", NETS)
def test_a_gradient_is_what_pytorch_computes(name, mnist):
    """In train and eval mode, on normalised images, under the model's own names; buffers do not change."""
    (images, labels), model = mnist, model_of(name, mean=[0.5], std=[0.25])
    before = {key: value.clone() for key, value in model.state_dict().items()}
    plain = NETS[name]()
    for bn in ("train", "eval"):
        plain.load_state_dict(model.net.state_dict())
        plain.train(bn == "train").zero_grad()
        nn.functional.cross_entropy(plain((images[:3] - 0.5) / 0.25), labels[:3]).backward()
        seen = gradient_of(model, images[:3], labels[:3], bn)
        for key, value in plain.named_parameters():
            torch.testing.assert_close(seen[f"net.{key}"], value.grad, rtol=1e-3, atol=1e-5)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("make, attack, decibels", [
    (nets.LeNet, "dlg", 35), (nets.ViT, "analytic", 60), (NETS["mlp"], "analytic", 80),
    (lambda: nn.Sequential(nn.AvgPool2d(1), *nets.mlp(4)), "analytic", 80)])
def test_an_image_is_recovered_nearly_exactly(make, attack, decibels, mnist):
    """As Zhu et al. (2019) do by a sigmoid LeNet, by a ViT's positions, and where a dense layer comes first."""
    torch.manual_seed(0)
    model, (image, label) = AnyModel(make(), SHAPE, [0.2], [0.5]), (part[2:3] for part in mnist)
    found, guess = invert_gradient(model, gradient_of(model, image, label), attack, restarts=1, iterations=80)
    assert psnr(found, image) > decibels and torch.equal(guess, label)


def test_cosine_tv_finds_more_than_the_class():
    """Nearer the image than the foreign control is, and than another image of the class."""
    torch.manual_seed(0)
    (images, labels), model = pictures(16), AnyModel(nets.LeNet(side=16), (1, 16, 16))
    seen = [gradient_of(model, images[i:i + 1], labels[i:i + 1]) for i in (4, 5)]
    found = [invert_gradient(model, one, restarts=1, iterations=60, tv=0.01)[0] for one in seen]
    own = [psnr(found[i], images[4 + i:5 + i]) for i in (0, 1)]
    foreign = [psnr(found[1 - i], images[4 + i:5 + i]) for i in (0, 1)]
    assert np.mean(own) > np.mean(foreign) + 1.5 and np.mean(own) > psnr(images[4:5], images[5:6]) + 1.5


@pytest.mark.slow
def test_cosine_tv_finds_more_than_the_class_in_a_trained_resnet():
    """By SSIM, from gradients with running statistics."""
    data = np.load(ROOT / "data" / "mnist10k.npz")
    pixels = torch.from_numpy(data["train_images"][:2660]).reshape(-1, 1, 28, 28).float() / 255
    images, labels = nn.functional.pad(nn.functional.avg_pool2d(pixels, 2), (1, 1, 1, 1)), torch.from_numpy(
        data["train_labels"][:2660]).long()
    torch.manual_seed(0)
    net = nets.ResNet20(1, 10, 8).train()
    optimizer = torch.optim.SGD(net.parameters(), 0.05, momentum=0.9)
    for x, y in zip(images[100:].split(64), labels[100:].split(64), strict=True):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()
    model, threes = AnyModel(net, (1, 16, 16)), (labels[:100] == 3).nonzero()[:2, 0]
    images, labels = images[threes], labels[threes]
    seen = [gradient_of(model, images[i:i + 1], labels[i:i + 1], "eval") for i in (0, 1)]
    found = torch.cat([invert_gradient(model, one, bn="eval", restarts=1, iterations=200, tv=0.02)[0]
                       for one in seen])
    own, foreign = (scoring.ssim(pictures, images).mean() for pictures in (found, found.flip(0)))
    assert own > foreign + 0.1


@pytest.mark.slow
def test_a_vit_is_attacked(mnist):
    """Attention is differentiated twice; the search comes nearer the image than it started."""
    images, labels = mnist
    model = model_of("vit")
    seen = gradient_of(model, images[:1], labels[:1])
    few, many = (invert_gradient(model, seen, "dlg", restarts=1, iterations=n)[0] for n in (1, 60))
    assert psnr(many, images[:1]) > psnr(few, images[:1]) + 1


def test_behind_convolutions_analytic_searches(mnist):
    """An image that gives LeNet's dense layer nearly the same input, which another of the class does not."""
    images, labels = mnist
    model = model_of("lenet")
    seen = gradient_of(model, images[2:3], labels[2:3])
    found, _ = invert_gradient(model, seen, "analytic", restarts=1, iterations=100)
    goal = model.before_dense(images[2:3])
    assert (model.before_dense(found) - goal).norm() < 0.5 * (model.before_dense(images[3:4]) - goal).norm()


@pytest.mark.parametrize("name, attack, count, reason", [
    ("resnet", "analytic", 1, "linear"), ("vit", "dlg", 2, "one image"), ("lenet", "analytic", 3, "one image")])
def test_an_attack_that_does_not_fit_says_why(name, attack, count, reason):
    model = model_of(name)
    big = model if name != "resnet" else AnyModel(model.net, (1, 16, 16))
    with pytest.raises(InputError, match=reason):
        invert_gradient(big, {}, attack, count=count)


def test_batch_norm_of_one_vector_has_no_statistics():
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.Linear(8, 4))
    model = AnyModel(net, SHAPE)
    for count, steps in ((1, 1), (3, 2)):   # the second step has the third image alone
        assert "--bn eval" in any_model.unfit("cosine_tv", model, count, steps)
        assert any_model.unfit("cosine_tv", model, count, steps, "eval") is None
    assert any_model.unfit("cosine_tv", model, 4, 2) is None


@pytest.mark.slow
def test_several_images_and_steps_are_inverted_together(mnist):
    """An update of two SGD steps of one image each; the search simulates both."""
    images, labels = mnist[0][[2, 4]], mnist[1][[2, 4]]
    model = model_of("lenet")
    seen = gradients.epoch_update(model, images, labels, 0.05, 1)
    found, guessed = invert_gradient(model, seen, count=2, steps=2, lr=0.05, restarts=1, iterations=80, tv=0.02)
    (first, second), (one, other) = (part.split(1) for part in (images, scoring.in_order_of(images, found)))
    assert guessed.tolist() == sorted(labels.tolist())
    assert psnr(one, first) > psnr(other, first) + 1 and psnr(other, second) > psnr(one, second) + 1


def test_a_class_is_inverted():
    """Of a model whose scores are the mean brightness of each pair of rows."""
    dense = nn.Linear(64, 4)
    dense.weight.data = torch.eye(4).repeat_interleave(16, 1)
    model, labels = AnyModel(nn.Sequential(nn.Flatten(), dense), SHAPE), torch.tensor([3, 0])
    for name in ("mi_face", "margin"):
        made = invert_classes(model, labels, name, restarts=1, iterations=60)
        assert made.shape == (2, *SHAPE) and (model(made).softmax(1)[[0, 1], labels] > 0.9).all()
    with pytest.raises(InputError, match="public"):
        invert_classes(model, labels, "gmi")


# Files.

@pytest.fixture
def folder(tmp_path, monkeypatch, mnist):
    """A user's folder: a model's file, weights, a gradient, an update, and true images."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    shutil.copy(FILE, "net.py")
    torch.manual_seed(0)
    net, (images, labels) = nets.LeNet(), mnist
    torch.save(net.state_dict(), "w.pt")
    nn.functional.cross_entropy(net(images[:1]), labels[:1]).backward()
    torch.save({name: value.grad for name, value in net.named_parameters()}, "g.pt")
    torch.optim.SGD(net.parameters(), 0.05).step()
    torch.save(net.state_dict(), "after.pt")
    np.savez("true.npz", images=(255 * images).round().byte().numpy(), labels=labels.numpy())
    return tmp_path


def test_files_of_other_programs_are_read(folder):
    """By name, as a list, as an .npz, wrapped, and with the prefix of DataParallel."""
    state = torch.load("w.pt", weights_only=True)
    prefixed = {f"module.{name}": value for name, value in state.items()}
    torch.save({"state_dict": prefixed, "epoch": 3}, "wrapped.pt")
    torch.save(list(state.values()), "list.pt")
    np.savez("flower.npz", *(value.numpy() for value in state.values()))
    for path in ("w.pt", "wrapped.pt", "list.pt", "flower.npz"):
        model = load_model("net.py:LeNet", path, SHAPE)
        assert all(torch.equal(value, state[name]) for name, value in model.net.state_dict().items())
    seen = load_gradient("g.pt", model)
    torch.save([value.to_sparse() for value in seen.values()], "list.pt")
    update = any_model.load_update("w.pt", "after.pt", model, 0.05)
    for name, value in seen.items():
        torch.testing.assert_close(load_gradient("list.pt", model)[name], value)
        torch.testing.assert_close(update[name], value, rtol=1e-3, atol=1e-5)


def test_batch_norms_buffers_are_read_and_no_part_of_an_update(folder):
    net = nets.ResNet20()
    state = net.state_dict()
    torch.save(state, "before.pt")
    later = {name: value + 1 for name, value in state.items()}
    torch.save({name: value for name, value in later.items() if "num_batches" not in name}, "later.pt")
    model = load_model("net.py:ResNet20", "later.pt", SHAPE)
    assert torch.equal(model.net.bn1.running_var, later["bn1.running_var"])
    update = any_model.load_update("before.pt", "later.pt", model, 0.5)
    assert update.keys() == {f"net.{name}" for name, _ in net.named_parameters()}
    torch.testing.assert_close(update["net.bn1.bias"], torch.full((4,), -2.0))


def test_a_models_file_may_import_a_namesake_of_ours(folder):
    """And ours is still there."""
    (folder / "utils.py").write_text("SIZE = 4\n")
    (folder / "own.py").write_text("import utils\nfrom models_of_others import mlp\n\ndef make():\n"
                                   "    return mlp(utils.SIZE)\n")
    shutil.copy(FILE, "models_of_others.py")
    torch.save(nets.mlp(4).state_dict(), "own.pt")
    assert load_model("own.py:make", "own.pt", SHAPE).num_classes == 4
    import utils
    assert utils.InputError is InputError


# The command.

def argv(*flags):
    return [str(word) for word in (
        "--model", "net.py:LeNet", "--results_dir", "results", "--iterations", 3, "--restarts", 1, *flags)]


def attack(*flags):
    return mi_attack.main(argv(*flags))


def rows_of(run):
    table = pd.read_csv(f"results/{run}/attack.csv", keep_default_na=False, na_values=[""])
    return table.assign(control=table["control"].fillna(""))


@pytest.mark.slow
def test_images_alone_are_attacked_with_controls_and_verdicts(folder, capsys):
    """Their gradients are simulated; the public images bring an evaluator, and a second call goes on."""
    labels = np.repeat(np.arange(4), 100)
    images = np.random.default_rng(0).integers(0, 60, (400, 8, 8))
    images += 60 * (np.arange(8) // 2 == labels[:, None])[:, None]
    np.savez("people.npz", train_images=images[::2].astype(np.uint8), train_labels=labels[::2],
             test_images=images[1::2].astype(np.uint8), test_labels=labels[1::2])
    flags = ("--weights", "w.pt", "--images", "true.npz", "--public", "people", "--data_dir", ".")
    flags = (*flags, "--iterations", 30, "--max_images", 6)
    assert attack(*flags, "--attack", "dlg") == 0
    table = rows_of("w")
    own, foreign = (table[table["control"] == control] for control in ("", "foreign"))
    assert len(own) == len(foreign) == 6 and set(own["adversary"]) == {"curious_server"}
    assert own["psnr"].mean() > foreign["psnr"].mean() + 8 and (own["label_match"] == 1).all()
    assert re.search(r"^leaks +curious_server dlg +6/6 \(\d\)", capsys.readouterr().out, re.MULTILINE)
    assert attack(*flags, "--attack", "mi_face") == 0
    later = rows_of("w")
    assert set(later["attack"]) == {"dlg", "mi_face"}
    classes = later.query("attack == 'mi_face'")
    assert set(classes["control"]) == {"", "grey", "noise", "class_mean", "public_image"}
    assert classes.query("control == 'public_image'")["evaluator_correct"].mean() == 1
    torch.save(torch.load("after.pt", weights_only=True), "w.pt")
    assert "--weights" in refused(capsys, mi_attack.main, argv(*flags, "--attack", "mi_face"))
    assert (folder / "results" / "w" / "attack_curious_server_dlg_round0_client0.png").exists()


def test_given_gradients_are_scored_against_their_images(folder):
    """The first images of the file; the controls are simulated, and show other images."""
    flags = ("--images", "true.npz", "--attack", "dlg", "--iterations", 50)
    assert attack("--weights", "w.pt", "--gradient", "g.pt", *flags) == 0
    table = rows_of("w")
    assert table["image"].tolist() == [0, 0] and table["control"].tolist() == ["", "foreign"]
    assert table["psnr"][0] > 30 > table["psnr"][1]
    assert attack("--update", "w.pt", "after.pt", "--lr", 0.05, "--run_name", "update", *flags) == 0
    assert rows_of("update")["psnr"][0] > 25
    images, labels = pictures(8)
    model = load_model("net.py:LeNet", "w.pt", SHAPE)
    second = gradient_of(model, images[1:2], labels[1:2])   # scored as the first
    torch.save(list(second.values()), "g.pt")
    assert attack("--weights", "w.pt", "--gradient", "g.pt", "--run_name", "wrong", *flags) == 0
    wrong = rows_of("wrong")
    torch.testing.assert_close(wrong["psnr"][0], wrong["psnr"][1], rtol=0.1, atol=0)


@pytest.mark.parametrize("bn", ["train", "eval"])
def test_the_command_takes_batch_norms_mode(folder, bn):
    """For gradients alone: a class is inverted with running statistics."""
    torch.save(nets.ResNet20().state_dict(), "r.pt")
    words = f"--model net.py:ResNet20 --weights r.pt --images true.npz --results_dir results --tv 0.5 --bn {bn}"
    command = mi_attack.command_of(words.split())
    evaluation = command(command.parser().parse(words.split())).evaluation
    knowledge = evaluation.of_model.knowledge
    assert knowledge.next_head.net.bn1.track_running_stats == (bn == "eval")
    assert knowledge.head.net.bn1.track_running_stats and evaluation.budget.tv == 0.5


def test_without_true_images_there_are_pictures_and_no_verdict(folder, capsys):
    assert attack("--weights", "w.pt", "--gradient", "g.pt", "--shape", 1, 8, 8, "--attack", "all") == 0
    said, table = capsys.readouterr().out, rows_of("w")
    assert "no verdict" in said and "gmi needs --public" in said and "leaks" not in said
    assert set(table["attack"]) == {"analytic", "cosine_tv", "dlg", "mi_face", "margin"}
    assert table["ssim"].isna().all() and (table["image"] == -1).all()
    assert table.query("attack == 'dlg'")["label"].tolist() == [0]
    assert len(list((folder / "results" / "w").glob("*.png"))) == 5


def test_a_batchs_update_is_attacked(folder):
    """Two images in two steps, beside a batch of the same classes."""
    assert attack("--weights", "w.pt", "--images", "true.npz", "--count", 2, "--local_steps", 2, "--attack",
                  "cosine_tv") == 0
    table = rows_of("w")
    own, foreign = (table[table["control"] == control] for control in ("", "foreign"))
    assert sorted(own["image"]) == sorted(foreign["image"]) and len(own) == 4 and own["label_match"].notna().all()


WEIGHTS = ["--shape", 1, 8, 8, "--weights"]


@pytest.mark.parametrize("flags, named", [
    ([*WEIGHTS, "no.pt"], "no.pt: there is no such file"), (["--gradient", "g.pt"], "--weights"),
    (["--weights", "w.pt"], "--shape"), ([*WEIGHTS, "whole.pt"], "save torch.save(model.state_dict()"),
    ([*WEIGHTS, "renamed.pt"], "missing: fc.bias; unexpected: fc.b; of another shape: fc.weight (4, 9)"),
    ([*WEIGHTS, "nan.pt"], "not finite"), ([*WEIGHTS, "w.pt", "--model_args", "[]"], "--model_args"),
    ([*WEIGHTS, "w.pt", "--model", "net.py:Net"], "has no attribute 'Net'"),
    ([*WEIGHTS, "w.pt", "--model", "bad.py:Net"], "ZeroDivisionError: division by zero in line 2"),
    ([*WEIGHTS, "w.pt", "--model", "net"], "FILE.py:NAME"), ([*WEIGHTS, "true.npz"], "holds 2 tensors"),
    (["--weights", "w.pt", "--shape", 3, 8, 8], "images of 3 x 8 x 8"),
    (["--weights", "w.pt", "--shape", 8, 8], "--shape"), ([*WEIGHTS, "w.pt", "--images", "g.pt"], "--images g.pt"),
    ([*WEIGHTS, "w.pt", "--update", "w.pt"], "--update"),
    (["--update", *["w.pt"] * 2, *WEIGHTS[:4]], "the same"),
    ([*WEIGHTS, "w.pt", "--gradient", "zero.pt"], "0 everywhere"),
    ([*WEIGHTS, "w.pt", "--gradient", "none.pt"], "NoneType in place of a tensor of real numbers for fc.bias"),
    ([*WEIGHTS, "w.pt", "--gradient", "complex.pt"], "torch.complex64 numbers"),
    ([*WEIGHTS, "w.pt", "--model", "bad_scores.py:Net"], "not finite"),
    ([*WEIGHTS, "w.pt", "--attack", "gmi"], "gmi needs --"),
    ([*WEIGHTS, "w.pt", "--images", "true.npz", "--gradient", *["g.pt"] * 9], "holds 8 images"),
    ([*WEIGHTS, "w.pt", "--count", 2, "--local_steps", 3], "--local_steps 3"),
    ([*WEIGHTS, "w.pt", "--run_name", "ours"], "is a run of RVE-PFL.py")])
def test_bad_input_is_one_line_and_leaves_nothing(folder, capsys, flags, named):
    state = torch.load("w.pt", weights_only=True)
    torch.save({**state, "fc.bias": torch.full((4,), torch.nan)}, "nan.pt")
    torch.save({**{name: value for name, value in state.items() if name != "fc.bias"},
                "fc.weight": torch.zeros(4, 9), "fc.b": torch.zeros(4)}, "renamed.pt")
    torch.save({name: 0 * value for name, value in state.items()}, "zero.pt")
    torch.save({**state, "fc.bias": None}, "none.pt")
    torch.save({name: value * 1j for name, value in state.items()}, "complex.pt")
    torch.save(nets.LeNet(), "whole.pt")
    (folder / "bad_scores.py").write_text(f"{FILE.read_text()}\nclass Net(LeNet):\n    def forward(self, x):\n"
                                          "        return super().forward(x) / 0\n")
    (folder / "bad.py").write_text("import math\n1 / 0\n")
    (folder / "results" / "ours").mkdir(parents=True)
    (folder / "results" / "ours" / "config.json").write_text("{}")
    assert named in refused(capsys, mi_attack.main, argv(*flags))
    assert [path.name for path in (folder / "results").rglob("*")] == ["ours", "config.json"]


def test_the_pages_python_runs(folder):
    """As it stands, but for the names and the size of the images."""
    text = (ROOT / "docs" / "any_model.md").read_text()
    block, = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert len([line for line in block.splitlines() if line]) <= 5
    named = {}
    for line, changed in (("net.py:Net", "net.py:LeNet"), ("28", "8"), ('")', '", iterations=3)')):
        block = block.replace(line, changed)
    exec(block, named)
    assert named["images"].shape == named["pictures"].shape == (1, *SHAPE) and named["labels"].tolist() == [0]
