"""Data files: what is accepted, what is refused and how it is said, and torchvision's path."""
from urllib.error import URLError

import numpy as np
import pytest
import torchvision
from conftest import ROOT

import datasets
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
    {"train_labels": np.zeros((200, 1), np.uint8)},
    {"train_labels": np.zeros(200, np.float64)},
    {"train_labels": np.full(200, -1, np.int64)},
    {"train_labels": np.zeros(200, np.uint8), "test_labels": np.zeros(40, np.uint8)},
    {"train_labels": np.array([object()] * 200, dtype=object)},
], ids=["float", "flat", "sides", "channels", "short", "2-d", "float labels", "negative",
        "one class", "objects"])
def test_a_wrong_file_is_refused(tmp_path, tiny_arrays, changes):
    with pytest.raises(InputError, match=r"x\.npz"):
        datasets.load("x", save(tmp_path, tiny_arrays, **changes))


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
    with pytest.raises(InputError, match="damaged or not a data set"):
        datasets.load("x", tmp_path)
    with pytest.raises(InputError, match=r"y\.npz does not exist.*mnist10k"):
        datasets.load("y", tmp_path)


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
