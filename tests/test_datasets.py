"""Data files: contents that are accepted or refused, messages, and the download."""
import os
from urllib.error import URLError

import numpy as np
import pytest
import torchvision
from conftest import ROOT

import datasets
from options import args_parser
from utils import InputError


@pytest.fixture
def load(tmp_path, tiny_arrays):
    """Load a file of the tiny arrays with changes."""
    def load(**changes):
        np.savez(tmp_path / "x.npz", **{**tiny_arrays, **changes})
        return datasets.load("x", tmp_path)
    return load


def test_mnist10k_is_the_test_half_of_mnist():
    data = datasets.load("mnist10k", ROOT / "data")
    assert data.images.shape == (10_000, 28, 28, 1)
    assert np.bincount(data.labels).tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert data.labels[:5].tolist() == [7, 2, 1, 0, 4]   # as every reader of t10k-labels knows


@pytest.mark.parametrize("changes", [
    {"train_images": np.zeros((200, 8, 8, 1), np.float32)}, {"train_images": np.zeros((200, 64), np.uint8)},
    {"train_images": np.zeros((200, 9, 8, 1), np.uint8)}, {"train_images": np.zeros((200, 8, 8, 3), np.uint8)},
    {"train_labels": np.zeros(199, np.uint8)}, {"train_labels": np.zeros((200, 4), np.uint8)},
    {"train_labels": np.full(200, 0.5)}, {"train_labels": np.full(200, np.nan)},
    {"train_labels": np.full(200, "cat")}, {"test_labels": np.full(40, 2**64 - 1, np.uint64)},
    {"val_images": np.zeros((3, 8, 8, 1), np.uint8)}, {"client": np.zeros(200, int)}, {"client": np.full(240, -1)},
    {"train_client": np.zeros(200, int)}, {"train_labels": np.full(200, -1, np.int64)},
    {"client": np.zeros(240, int), "train_client": np.zeros(200, int), "test_client": np.zeros(40, int)},
    {"train_labels": np.zeros(200, np.uint8), "test_labels": np.zeros(40, np.uint8)},
])
def test_a_file_with_unexpected_contents_is_refused(load, changes):
    with pytest.raises(InputError, match=r"x\.npz: (?!damaged)") as caught:
        load(**changes)
    assert "\n" not in str(caught.value) and "mov" not in str(caught.value) and "delete" not in str(caught.value)


def pixels(arrays, change):
    return {half: change(arrays[half]) for half in ("train_images", "test_images")}


@pytest.mark.parametrize("change, note", [
    (lambda x: x[..., 0], None), (lambda x: x.astype(np.float32), None), (lambda x: x.astype(np.uint64), None),
    (lambda x: x.astype(np.float64) / 255, "multiplied by 255"), (lambda x: np.asfortranarray(x), None),
    (lambda x: np.repeat(np.moveaxis(x, 3, 1), 3, 1), "N x C x H x W"),
    (lambda x: np.repeat(x, 4, 3), "images have 4 channels")])
def test_pixels_whose_meaning_is_clear_are_accepted(load, tiny_arrays, change, note):
    data = load(**pixels(tiny_arrays, change))
    whole = np.concatenate([tiny_arrays["train_images"], tiny_arrays["test_images"]])
    assert data.images.dtype == np.uint8 and data.images.flags.c_contiguous
    assert np.array_equal(data.images, np.broadcast_to(whole, data.images.shape))
    assert len(data.notes) == (note is not None) and (note or "") in "".join(data.notes)


@pytest.mark.parametrize("change, reason", [
    (lambda x: x.astype(np.uint16) * 257, "from 0 to"), (lambda x: x.astype(int) - 100, "from -100"),
    (lambda x: x + 0.5, "not whole"), (lambda x: x * np.nan, "from nan"), (lambda x: x.astype(complex), "complex"),
    (lambda x: x[:, :4, :4], "at least 8 x 8"), (lambda x: x[:, None], "expected N x H x W x C")])
def test_pixels_whose_meaning_is_not_clear_are_refused(load, tiny_arrays, change, reason):
    with pytest.raises(InputError, match=reason):
        load(**pixels(tiny_arrays, change))


@pytest.mark.parametrize("empty", ["train", "test"])
@pytest.mark.parametrize("shape", [(0, 8, 8, 1), (0,)])
def test_one_half_may_be_empty(load, tiny_arrays, empty, shape):
    data = load(**{f"{empty}_images": np.zeros(shape), f"{empty}_labels": np.zeros(0)})
    full = "test" if empty == "train" else "train"
    assert np.array_equal(data.images, tiny_arrays[f"{full}_images"]) and data.notes == ()
    assert data.train_size == (0 if empty == "train" else 200)
    with pytest.raises(InputError, match="holds no images"):
        load(**{key: values[:0] for key, values in tiny_arrays.items()})


def test_medmnists_files_as_they_ship(load, tiny_arrays):
    """Labels N x 1, and a half for validation, which is pooled before the test half."""
    images, labels = tiny_arrays["train_images"], tiny_arrays["train_labels"][:, None]
    data = load(train_images=images[:150], train_labels=labels[:150], val_images=images[150:],
                val_labels=labels[150:], test_labels=tiny_arrays["test_labels"][:, None])
    assert np.array_equal(data.images[:200], images) and np.array_equal(data.labels[:200], labels[:, 0])
    assert data.train_size == 200 and len(data.labels) == 240 and data.notes == ()


@pytest.mark.parametrize("change, names", [
    (lambda y: y + 1, [1, 2, 3, 4]), (lambda y: np.where(y == 2, 255, y).astype(np.uint8), [0, 1, 3, 255]),
    (lambda y: y * 2.0, [0, 2, 4, 6])], ids=["from 1", "-1 as uint8", "float gaps"])
def test_labels_with_gaps_are_renumbered_with_a_note(load, tiny_arrays, change, names):
    labels = {half: change(tiny_arrays[half]) for half in ("train_labels", "test_labels")}
    data = load(**labels)
    assert data.num_classes == 4 and data.names.tolist() == names
    assert np.array_equal(data.names[data.labels[:200]], labels["train_labels"])
    assert data.notes == (f"labels are {', '.join(map(str, names))}; classes are numbered 0 to 3 in that order",)


@pytest.mark.parametrize("given, expected", [
    ({"client": np.repeat([7, 3, -1], 80)}, [1, 0, -1]),
    ({"client": np.repeat(["f3", "f1", "f2"], 80)}, [2, 0, 1]),
    ({"train_client": np.repeat([7, 3, -1], [80, 80, 40]), "test_client": np.full(40, -1)}, [1, 0, -1])])
def test_clients_of_the_file_are_numbered_in_order(load, given, expected):
    assert load(**given).clients.tolist() == np.repeat(expected, 80).tolist()


def test_a_file_that_cannot_be_read_says_why(tmp_path, tiny_arrays, load, monkeypatch):
    load()
    whole = (tmp_path / "x.npz").read_bytes()
    contents = {"torn": whole[:1000], "empty": b"", "end": whole[:-10],
                "lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n",
                "header": whole.replace(b"(200, 8, 8, 1), }  ", b"(2000000, 8, 8, 1)}")}
    for name, content in contents.items():
        (tmp_path / f"{name}.npz").write_bytes(content)
    np.savez(tmp_path / "lacks.npz", train_images=tiny_arrays["train_images"])
    np.savez(tmp_path / "objects.npz", **{**tiny_arrays, "train_labels": np.array([object()] * 200, dtype=object)})
    (tmp_path / "folder.npz").mkdir()
    os.mkfifo(tmp_path / "pipe.npz")
    for name, reason in (
            *((name, "damaged or not an .npz file") for name in ("torn", "empty", "end", "header", "objects")),
            ("lfs", "git lfs pull"), ("folder", "not a file"), ("pipe", "not a file"),
            ("lacks", "lacks train_labels, test_images, test_labels; it holds train_images"),
            ("Pipes", r"Pipes\.npz does not exist \(did you mean pipe\? There are: .*mnist, .*mnist10k")):
        with pytest.raises(InputError, match=reason) as caught:
            datasets.load(name, tmp_path)
        assert "downloads it again" not in str(caught.value)
    (tmp_path / "mnist.npz").write_bytes(b"PK\x03\x04 and no more")   # only a download can be made again
    with pytest.raises(InputError, match="damaged.*downloads it again"):
        datasets.load("mnist", tmp_path)
    monkeypatch.setattr(datasets, "main_memory", lambda: 20_000)
    with pytest.raises(InputError, match="need twice that.*20 kB of memory"):
        datasets.load("x", tmp_path)


@pytest.mark.parametrize("name, ours", [
    ("MNIST", "mnist"), ("CIFAR-10", "cifar"), ("FashionMNIST", "fmnist"), ("fashion_mnist.npz", "fmnist"),
    ("x.npz", "x"), ("Plants", "Plants"), ("mnist10k", "mnist10k"), ("cifar100", "cifar100")])
def test_names_as_others_write_them(tmp_path, tiny_arrays, name, ours):
    assert datasets.canonical(name, tmp_path) == ours
    np.savez(tmp_path / "CIFAR10.npz", **tiny_arrays)   # a file of that very name comes first
    assert datasets.load("CIFAR10.npz", tmp_path).num_classes == 4
    args = args_parser(["--dataset", "CIFAR-10", "--data_dir", str(tmp_path)])
    assert (args.dataset, args.augment) == ("cifar", "flip+shift") and args.run_name.startswith("cifar-")


@pytest.mark.parametrize("name, kind, grey", [("mnist", "MNIST", True), ("cifar", "CIFAR10", False)])
def test_a_download_is_cached(tmp_path, monkeypatch, name, kind, grey):
    requests = []

    class Fake:   # as torchvision has it
        def __init__(self, root, train, download):
            requests.append((train, download))
            size = 30 if train else 10
            self.data = np.full((size, 28, 28) if grey else (size, 32, 32, 3), 7 if train else 9, np.uint8)
            self.targets = [i % 10 for i in range(size)]
    monkeypatch.setattr(torchvision.datasets, kind, Fake)
    for _ in range(2):
        data = datasets.load(name, tmp_path)
    assert requests == [(True, True), (False, True)]
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


def test_ten_thousand_images_are_the_test_half_of_the_data_set(tmp_path):
    arrays = {"train_images": np.zeros((20, 8, 8), np.uint8), "train_labels": np.arange(20) % 2,
              "test_images": np.arange(10, dtype=np.uint8)[:, None, None] * np.ones((1, 8, 8), np.uint8),
              "test_labels": np.arange(10) % 2}
    np.savez(tmp_path / "fmnist.npz", **arrays)
    for _ in range(2):   # made, then read
        data = datasets.load("fmnist10k", tmp_path)
        assert data.images[:, 0, 0, 0].tolist() == list(range(10)) and data.train_size == 9
        assert data.labels.tolist() == arrays["test_labels"].tolist()


def test_a_folder_that_is_not_there_is_no_place_for_a_download(tmp_path):
    assert datasets.unknown("mnist", tmp_path) is None
    assert "--public none: " in (line := datasets.unknown("none", tmp_path, "public")) and "--dataset" not in line
    assert datasets.unknown("mnist", tmp_path / "none") == f"--data_dir {tmp_path / 'none'}: no such folder"
