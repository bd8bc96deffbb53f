"""Data files: what is accepted, what is refused and how it is said, and torchvision's path."""
import os
from argparse import Namespace
from urllib.error import URLError

import numpy as np
import pytest
import torchvision
from conftest import ROOT

import datasets
from attack import membership, mi_attack
from options import args_parser
from utils import InputError


def save(folder, arrays, **changes):
    np.savez(folder / "x.npz", **{**arrays, **changes})
    return folder


def test_halves_are_pooled_train_first(tmp_path, tiny_arrays):
    data = datasets.load("x", save(tmp_path, tiny_arrays))
    assert data.images.shape == (240, 8, 8, 1) and data.train_size == 200 and data.num_classes == 4
    assert np.array_equal(data.images[200:], tiny_arrays["test_images"])
    assert data.image_shape == (1, 8, 8) and data.labels.dtype == np.int64


def test_grey_images_may_lack_the_channel_axis(tmp_path, tiny_arrays):
    flat = {half: tiny_arrays[half][..., 0] for half in ("train_images", "test_images")}
    assert datasets.load("x", save(tmp_path, tiny_arrays, **flat)).images.shape == (240, 8, 8, 1)


def test_the_embedded_data_are_mnists():
    data = datasets.load("mnist10k", ROOT / "data")
    assert data.images.shape == (10_000, 28, 28, 1)
    assert np.bincount(data.labels).tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert data.labels[:5].tolist() == [7, 2, 1, 0, 4]   # as every reader of t10k-labels knows
    assert (ROOT / "data" / "mnist10k.npz").stat().st_size < 2_000_000


@pytest.mark.skipif(not (ROOT / "data" / "mnist.npz").exists(), reason="needs data/mnist.npz")
def test_the_embedded_data_are_the_test_half_of_mnist():
    mnist, small = (datasets.load(name, ROOT / "data") for name in ("mnist", "mnist10k"))
    assert np.array_equal(mnist.images[60_000:], small.images)
    assert np.array_equal(mnist.labels[60_000:], small.labels)


@pytest.mark.parametrize("changes", [
    {"train_images": np.zeros((200, 8, 8, 1), np.float32)},
    {"train_images": np.zeros((200, 64), np.uint8)},
    {"train_images": np.zeros((200, 9, 8, 1), np.uint8)},
    {"train_images": np.zeros((200, 8, 8, 3), np.uint8)},
    {"train_labels": np.zeros(199, np.uint8)},
    {"train_labels": np.zeros((200, 4), np.uint8)},
    {"train_labels": np.full(200, 0.5)},
    {"train_labels": np.full(200, np.nan)},
    {"train_labels": np.full(200, 1e300)},
    {"train_labels": np.full(200, "cat")},
    {"train_labels": np.uint8(3)},
    {"test_labels": np.full(40, 2**64 - 1, np.uint64)},
    {"val_images": np.zeros((3, 8, 8, 1), np.uint8)},
    {"client": np.zeros(200, int)},
    {"client": np.full(240, -1)},
    {"train_client": np.zeros(200, int)},
    {"client": np.zeros(240, int), "train_client": np.zeros(200, int), "test_client": np.zeros(40, int)},
    {"train_labels": np.full(200, -1, np.int64)},
    {"train_labels": np.zeros(200, np.uint8), "test_labels": np.zeros(40, np.uint8)},
    {"train_labels": np.array([object()] * 200, dtype=object)},
], ids=["two types", "flat", "sides", "channels", "short", "one-hot", "float labels", "nan labels", "huge labels",
        "text labels", "one label", "unsigned -1", "half of val", "short clients", "nobody", "half of clients",
        "clients twice", "negative", "one class", "objects"])
def test_a_wrong_file_is_refused(tmp_path, tiny_arrays, changes):
    with pytest.raises(InputError, match=r"x\.npz: (?!damaged)") as caught:
        datasets.load("x", save(tmp_path, tiny_arrays, **changes))
    assert "\n" not in str(caught.value) and "mov" not in str(caught.value) and "delete" not in str(caught.value)


def pixels(arrays, change):
    return {half: change(arrays[half]) for half in ("train_images", "test_images")}


@pytest.mark.parametrize("change", [
    lambda x: x.astype(np.float32), lambda x: x.astype(np.int16), lambda x: x.astype(np.uint64),
    lambda x: x.astype(np.float64) / 255, lambda x: (x / 255).astype(np.float16),
    lambda x: np.repeat(np.moveaxis(x, 3, 1), 3, 1), lambda x: np.asfortranarray(x)],
    ids=["float", "int16", "uint64", "0 to 1", "float16", "channels first", "Fortran"])
def test_pixels_whose_meaning_is_clear_are_taken(tmp_path, tiny_arrays, change, request):
    data = datasets.load("x", save(tmp_path, tiny_arrays, **pixels(tiny_arrays, change)))
    whole = np.concatenate([tiny_arrays["train_images"], tiny_arrays["test_images"]])
    assert data.images.dtype == np.uint8 and data.images.flags.c_contiguous
    assert np.array_equal(data.images, np.broadcast_to(whole, data.images.shape))
    said = {"0 to 1": "multiplied by 255", "float16": "multiplied by 255", "channels first": "N x C x H x W"}
    case = request.node.callspec.id
    assert len(data.notes) == (case in said) and said.get(case, "") in "".join(data.notes)


def test_truth_values_are_black_and_white(tmp_path, tiny_arrays):
    data = datasets.load("x", save(tmp_path, tiny_arrays, **pixels(tiny_arrays, lambda x: x > 99)))
    assert np.unique(data.images).tolist() == [0, 255] and "bool" in data.notes[0]
    ones = pixels(tiny_arrays, lambda x: (x > 99).view(np.uint8))
    data = datasets.load("x", save(tmp_path, tiny_arrays, **ones))
    assert data.images.max() == 1 and "nearly black" in data.notes[0]


@pytest.mark.parametrize("change, said", [
    (lambda x: x.astype(np.uint16) * 257, "from 0 to"), (lambda x: x.astype(int) - 100, "from -100"),
    (lambda x: x + 0.5, "not whole"), (lambda x: x * np.nan, "from nan"), (lambda x: x / 100 - 1, "from -1"),
    (lambda x: x.astype(complex), "complex"), (lambda x: x.astype(str), "U"),
    (lambda x: x[:, :, :0], "at least 8 x 8"), (lambda x: x[..., :0], "at least 8 x 8"),
    (lambda x: x[:, None], "expected N x H x W x C")],
    ids=["16 bits", "below 0", "fractions", "nan", "standardised", "complex", "text", "no width", "no channels",
         "5-d"])
def test_pixels_whose_meaning_is_not_clear_are_refused(tmp_path, tiny_arrays, change, said):
    with pytest.raises(InputError, match=r"x\.npz: (?!damaged)") as caught:
        datasets.load("x", save(tmp_path, tiny_arrays, **pixels(tiny_arrays, change)))
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_channels_beyond_colour_are_said(tmp_path, tiny_arrays):
    four = pixels(tiny_arrays, lambda x: np.repeat(x, 4, 3))
    assert datasets.load("x", save(tmp_path, tiny_arrays, **four)).notes == (
        "images have 4 channels, and all are trained on",)


@pytest.mark.parametrize("empty", ["train", "test"])
@pytest.mark.parametrize("shape", [(0, 8, 8, 1), (0,)])
def test_an_empty_half_is_no_fault(tmp_path, tiny_arrays, empty, shape):
    nothing = {f"{empty}_images": np.zeros(shape), f"{empty}_labels": np.zeros(0)}
    data = datasets.load("x", save(tmp_path, tiny_arrays, **nothing))
    full = "test" if empty == "train" else "train"
    assert np.array_equal(data.images, tiny_arrays[f"{full}_images"]) and data.notes == ()
    assert data.train_size == (0 if empty == "train" else 200)


def test_two_empty_halves_are_one(tmp_path, tiny_arrays):
    with pytest.raises(InputError, match="holds no images"):
        datasets.load("x", save(tmp_path, tiny_arrays, **{key: values[:0] for key, values in tiny_arrays.items()}))


def test_medmnists_files_as_they_ship(tmp_path, tiny_arrays):
    """Labels N x 1, and a half for validation, which is pooled before the test half."""
    images, labels = tiny_arrays["train_images"], tiny_arrays["train_labels"][:, None]
    data = datasets.load("x", save(
        tmp_path, tiny_arrays, train_images=images[:150], train_labels=labels[:150], val_images=images[150:],
        val_labels=labels[150:], test_labels=tiny_arrays["test_labels"][:, None]))
    assert np.array_equal(data.images[:200], images) and np.array_equal(data.labels[:200], labels[:, 0])
    assert data.train_size == 200 and len(data.labels) == 240 and data.notes == ()


@pytest.mark.parametrize("change, names", [
    (lambda y: y + 1, [1, 2, 3, 4]), (lambda y: y.astype(np.uint16) * 1500 + 3000, [3000, 4500, 6000, 7500]),
    (lambda y: np.where(y == 2, 255, y).astype(np.uint8), [0, 1, 3, 255]), (lambda y: y * 2.0, [0, 2, 4, 6])],
    ids=["from 1", "ids", "-1 as uint8", "float gaps"])
def test_labels_with_gaps_are_numbered_anew_and_that_is_said(tmp_path, tiny_arrays, change, names):
    labels = {half: change(tiny_arrays[half]) for half in ("train_labels", "test_labels")}
    data = datasets.load("x", save(tmp_path, tiny_arrays, **labels))
    assert data.num_classes == 4 and data.names.tolist() == names
    assert np.array_equal(data.names[data.labels[:200]], labels["train_labels"])
    assert data.notes == (f"labels are {', '.join(map(str, names))}; classes are numbered 0 to 3 in that order",)


@pytest.mark.parametrize("given", [
    {"client": np.repeat([7, 3, -1], 80)}, {"client": np.repeat([7, 3, -1], 80)[:, None]},
    {"train_client": np.repeat([7, 3, -1], [80, 80, 40]), "test_client": np.full(40, -1)}])
def test_clients_of_the_file_are_numbered_in_order(tmp_path, tiny_arrays, given):
    data = datasets.load("x", save(tmp_path, tiny_arrays, **given))
    assert data.clients.tolist() == [1] * 80 + [0] * 80 + [-1] * 80


def test_clients_may_have_names(tmp_path, tiny_arrays):
    data = datasets.load("x", save(tmp_path, tiny_arrays, client=np.repeat(["f21", "f03"], 120)))
    assert data.clients.tolist() == [1] * 120 + [0] * 120
    assert datasets.load("x", save(tmp_path, tiny_arrays)).clients is None


def test_tiny_images_are_refused(tmp_path, tiny_arrays):
    small = {half: tiny_arrays[half][:, :4, :4] for half in ("train_images", "test_images")}
    with pytest.raises(InputError, match="at least 8 x 8"):
        datasets.load("x", save(tmp_path, tiny_arrays, **small))


@pytest.mark.parametrize("size", [0, 10, 1000, -10])
def test_a_truncated_file_is_refused(tmp_path, tiny_arrays, size):
    whole = (save(tmp_path, tiny_arrays) / "x.npz").read_bytes()
    (tmp_path / "x.npz").write_bytes(whole[:size])
    with pytest.raises(InputError, match=r"x\.npz: damaged"):
        datasets.load("x", tmp_path)


def test_a_damaged_member_is_refused(tmp_path, tiny_arrays):
    np.savez_compressed(tmp_path / "x.npz", **tiny_arrays)
    content = bytearray((tmp_path / "x.npz").read_bytes())
    content[200:300] = bytes(100)
    (tmp_path / "x.npz").write_bytes(content)
    with pytest.raises(InputError, match=r"x\.npz: damaged"):
        datasets.load("x", tmp_path)


def test_a_missing_array_or_file_is_refused(tmp_path, tiny_arrays):
    np.savez(tmp_path / "x.npz", train_images=tiny_arrays["train_images"])
    with pytest.raises(InputError, match=r"lacks train_labels, test_images, test_labels; it holds train_images"):
        datasets.load("x", tmp_path)
    np.savez(tmp_path / "plants.npz", **tiny_arrays)
    with pytest.raises(InputError, match=r"y\.npz does not exist \(There are: plants, x; .*mnist, .*mnist10k"):
        datasets.load("y", tmp_path)
    with pytest.raises(InputError, match=r"did you mean plants\?"):
        datasets.load("Plant", tmp_path)


@pytest.mark.parametrize("name, ours", [
    ("MNIST", "mnist"), ("cifar10", "cifar"), ("CIFAR-10", "cifar"), ("Cifar_10", "cifar"), ("FMNIST", "fmnist"),
    ("FashionMNIST", "fmnist"), ("fashion-mnist", "fmnist"), ("fashion_mnist.npz", "fmnist"), ("x.npz", "x"),
    ("Plants", "Plants"), ("mnist10k", "mnist10k"), ("cifar100", "cifar100"), ("unowned", "unowned")])
def test_names_as_others_write_them(tmp_path, name, ours):
    assert datasets.canonical(name, tmp_path) == ours


def test_a_file_of_that_very_name_comes_first(tmp_path, tiny_arrays):
    np.savez(tmp_path / "CIFAR10.npz", **tiny_arrays)
    assert datasets.canonical("CIFAR10", tmp_path) == "CIFAR10"
    assert datasets.canonical("cifar10", tmp_path) == "cifar"
    assert datasets.load("CIFAR10.npz", tmp_path).num_classes == 4


def test_a_run_is_named_as_the_data_set_is_here(tmp_path):
    args = args_parser(["--dataset", "CIFAR-10", "--data_dir", str(tmp_path)])
    assert (args.dataset, args.augment) == ("cifar", "flip+shift") and args.run_name.startswith("cifar-")


@pytest.mark.parametrize("program", [mi_attack.MiAttack, membership.Membership])
def test_public_images_go_by_those_names_too(tmp_path, program):
    args = Namespace(public="Fashion-MNIST", run="run", **dict.fromkeys(
        ("results_dir", "models_dir", "data_dir"), tmp_path))
    with pytest.raises(InputError, match="no runs"):
        program(args)
    assert args.public == "fmnist"


def test_only_what_is_downloaded_is_made_again(tmp_path, tiny_arrays):
    """And not what is whole but cannot be read."""
    for name, advice in (("mnist", True), ("plants", False)):
        path = tmp_path / f"{name}.npz"
        path.write_bytes(b"PK\x03\x04 and no more")
        with pytest.raises(InputError, match="damaged") as caught:
            datasets.load(name, tmp_path)
        assert ("downloads it again" in str(caught.value)) is advice and path.exists()


def test_an_intact_file_that_cannot_be_read_is_not_called_damaged(tmp_path, tiny_arrays, monkeypatch):
    np.savez(tmp_path / "mnist.npz", **tiny_arrays)

    def locked(self, *args):
        raise PermissionError(13, "Permission denied", str(self))
    monkeypatch.setattr(datasets.Path, "open", locked)
    with pytest.raises(InputError, match=r"mnist\.npz: cannot be read \(Permission denied\)$"):
        datasets.load("mnist", tmp_path)


def test_what_is_no_archive_says_what_it_is(tmp_path, tiny_arrays):
    (tmp_path / "lfs.npz").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
    (tmp_path / "folder.npz").mkdir()
    os.mkfifo(tmp_path / "pipe.npz")
    np.save(tmp_path / "array.npy", tiny_arrays["train_images"])
    (tmp_path / "array.npy").rename(tmp_path / "array.npz")
    for name, said in (("lfs", "git lfs pull"), ("folder", "not a file"), ("pipe", "not a file"),
                       ("array", "not an .npz")):
        with pytest.raises(InputError, match=said):
            datasets.load(name, tmp_path)


def test_sizes_are_believed_only_if_they_are_there(tmp_path, tiny_arrays, monkeypatch):
    """A header that declares more than the file has, and a small file that unpacks to more than the memory."""
    path = save(tmp_path, tiny_arrays) / "x.npz"
    path.write_bytes(path.read_bytes().replace(b"(200, 8, 8, 1), }  ", b"(2000000, 8, 8, 1)}"))
    with pytest.raises(InputError, match="damaged: train_images should have 128,000,000 bytes"):
        datasets.load("x", tmp_path)
    np.savez_compressed(path, **{**tiny_arrays, "train_images": np.zeros((200, 99, 99, 1), np.uint8)})
    monkeypatch.setattr(datasets, "available", lambda device: 3_000_000)
    assert path.stat().st_size < 10_000
    with pytest.raises(InputError, match="1.96 MB and need twice that.*3 MB of memory"):
        datasets.load("x", tmp_path)


def test_a_lack_of_memory_is_not_called_damage(tmp_path, tiny_arrays, monkeypatch):
    def exhausted(*args, **kwargs):
        raise MemoryError
    monkeypatch.setattr(np.lib.format, "read_array", exhausted)
    with pytest.raises(MemoryError):
        datasets.load("x", save(tmp_path, tiny_arrays))


@pytest.mark.parametrize("name, kind, grey", [("mnist", "MNIST", True), ("fmnist", "FashionMNIST", True),
                                              ("cifar", "CIFAR10", False)])
def test_torchvision_is_asked_once_and_cached(tmp_path, monkeypatch, name, kind, grey):
    asked = []

    class Fake:   # as torchvision has it: tensors and tensors for MNIST, arrays and lists for CIFAR-10
        def __init__(self, root, train, download):
            asked.append((str(root), train, download))
            size = 30 if train else 10
            self.data = np.full((size, 28, 28) if grey else (size, 32, 32, 3), 7 if train else 9, np.uint8)
            self.targets = [i % 10 for i in range(size)]
    monkeypatch.setattr(torchvision.datasets, kind, Fake)
    for _ in range(2):
        data = datasets.load(name, tmp_path)
    assert [train for _, train, _ in asked] == [True, False] and all(download for *_, download in asked)
    assert data.image_shape == ((1, 28, 28) if grey else (3, 32, 32))
    assert (data.images[:30] == 7).all() and (data.images[30:] == 9).all() and data.num_classes == 10


@pytest.mark.parametrize("error", [URLError("no route"), RuntimeError("Error downloading train.gz")])
def test_no_network_is_one_line_with_a_way_out(tmp_path, monkeypatch, error):
    def fail(*args, **kwargs):
        raise error
    monkeypatch.setattr(torchvision.datasets, "MNIST", fail)
    with pytest.raises(InputError, match=r"mnist\.npz does not exist.*mnist10k") as caught:
        datasets.load("mnist", tmp_path)
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())
