"""Data sets: ``DATA_DIR/NAME.npz``, whatever NAME is, into one pooled array of images.

The file holds ``train_images`` and ``test_images`` (uint8, N x H x W x C) and ``train_labels`` and
``test_labels`` (N integers from 0). MNIST, Fashion-MNIST and CIFAR-10 are fetched by torchvision on
first use and cached in that form: one decode, then a fast start.
"""
import contextlib
import io
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from utils import InputError, write_whole

TORCHVISION = {"mnist": "MNIST", "fmnist": "FashionMNIST", "cifar": "CIFAR10"}
MIN_SIDE = 8   # pixels; the encoder's two valid convolutions and the head's two poolings need some room
WAY_OUT = "or use --dataset mnist10k, which needs no download"


@dataclass(frozen=True)
class Dataset:
    """Both halves pooled, the train half first: ``images`` N x H x W x C uint8, ``labels`` N int64."""

    images: np.ndarray
    labels: np.ndarray
    num_classes: int
    train_size: int

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """``(C, H, W)``."""
        height, width, channels = self.images.shape[1:]
        return channels, height, width


def load(name: str, data_dir: Path) -> Dataset:
    """Read ``data_dir/name.npz``, fetching it first if it is one of torchvision's.

    Raises:
        InputError: the file is missing, cannot be fetched, is damaged or has other contents.
    """
    path = data_dir / f"{name}.npz"
    if not path.exists():
        if name not in TORCHVISION:
            raise InputError(f"--dataset {name}: {path} does not exist; put it there {WAY_OUT}")
        fetch(name, data_dir)
    try:
        with np.load(path, allow_pickle=False) as file:
            parts = {key: file[f"{key}"] for key in
                     ("train_images", "test_images", "train_labels", "test_labels")}
    except Exception as error:   # NumPy parses headers as Python, so damage can raise nearly anything
        raise InputError(f"{path}: damaged or not a data set ({_first_line(error)}); "
                         f"delete it to have it made again, {WAY_OUT}") from error
    return _pool(parts, path)


def _pool(parts: dict[str, np.ndarray], path: Path) -> Dataset:
    for half in ("train", "test"):
        images, labels = parts[f"{half}_images"], parts[f"{half}_labels"]
        if images.dtype != np.uint8 or images.ndim not in (3, 4):
            raise InputError(f"{path}: {half}_images is {images.dtype} of shape {images.shape}, "
                             "expected uint8 of shape N x H x W x C")
        if labels.shape != images.shape[:1] or labels.dtype.kind not in "iu" or (labels < 0).any():
            raise InputError(f"{path}: {half}_labels is {labels.dtype} of shape {labels.shape}, expected "
                             f"{len(images)} integers from 0, one an image")
        parts[f"{half}_images"] = images.reshape(*images.shape[:3], -1)   # N x H x W -> N x H x W x 1
    sides = {parts[f"{half}_images"].shape[1:] for half in ("train", "test")}
    if len(sides) > 1 or min(min(sides)[:2]) < MIN_SIDE or min(min(sides)) < 1:
        raise InputError(f"{path}: images of shape {' and '.join(map(str, sorted(sides)))}; expected one "
                         f"shape, at least {MIN_SIDE} x {MIN_SIDE}")
    labels = np.concatenate([parts["train_labels"], parts["test_labels"]]).astype(np.int64)
    if not len(labels) or not 1 <= labels.max() < 10_000:
        raise InputError(f"{path}: labels must name between 2 and 10,000 classes, counted from 0")
    images = np.concatenate([parts["train_images"], parts["test_images"]])
    return Dataset(images, labels, int(labels.max()) + 1, len(parts["train_labels"]))


def fetch(name: str, data_dir: Path) -> None:
    """Download with torchvision, which checks the published md5 sums, and cache as ``name.npz``."""
    import torchvision  # slow to import, needed once

    print(f"{data_dir / name}.npz does not exist yet: downloading {TORCHVISION[name]} with torchvision")
    make = getattr(torchvision.datasets, TORCHVISION[name])
    halves: dict[str, Any] = {}   # arrays
    try:
        # Its archives are not needed once decoded; and it prints each mirror that failed.
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            for half in ("train", "test"):
                data = make(folder, train=half == "train", download=True)
                halves[f"{half}_images"] = np.asarray(data.data, np.uint8)
                halves[f"{half}_labels"] = np.asarray(data.targets, np.uint8)
    except (OSError, RuntimeError) as error:   # no network: URLError, an OSError, or RuntimeError
        raise InputError(f"--dataset {name}: {data_dir / name}.npz does not exist and the download failed "
                         f"({_first_line(error)}); put the file there, {WAY_OUT}") from error
    for half in ("train", "test"):
        images = halves[f"{half}_images"]
        halves[f"{half}_images"] = images.reshape(*images.shape[:3], -1)
    write_whole(data_dir / f"{name}.npz", lambda file: np.savez(file, **halves))


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200].rstrip(":")
