"""Data sets: ``DATA_DIR/NAME.npz``, pooled into one array of images; data/README.md describes the file.

MNIST, Fashion-MNIST and CIFAR-10 are downloaded by torchvision on first use and cached in that form. NAME10k is
the 10,000-image test half of one of them; mnist10k is included.
"""
import contextlib
import difflib
import io
import re
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engine.memory import main_memory, size_of
from utils import InputError, shown, write_whole

TORCHVISION = {"mnist": "MNIST", "fmnist": "FashionMNIST", "cifar": "CIFAR10"}
OTHER_DATA = {   # suggested for the attacks' --public
    "mnist10k": "mnist", "fmnist10k": "fmnist", "cifar10k": "cifar", "mnist": "fmnist", "fmnist": "mnist"}
MIN_PUBLIC = 200   # images that attackers need to train on; with fewer, training on them is no use
ALIASES = {"fashionmnist": "fmnist", "cifar10": "cifar"}   # in lower case, without - and _
HALVES = ("train", "val", "test")   # in the order in which they are pooled; val is optional
NEEDED = ("train_images", "train_labels", "test_images", "test_labels")
MIN_SIDE = 8   # pixels, for the encoder's two valid convolutions and the head's two poolings
MAX_CLASSES = 10_000
WAYS_OUT = {"dataset": ", or use --dataset mnist10k, which needs no download"}   # by option
LFS = b"version https://git-lfs"


@dataclass(frozen=True)
class Dataset:
    """All halves pooled, in the order train, val, test."""

    images: np.ndarray   # ``N x H x W x C``, uint8
    labels: np.ndarray   # ``N``, int64, from 0 to ``num_classes - 1``
    num_classes: int
    train_size: int   # images before the test half
    names: np.ndarray   # the file's label of each class, ``num_classes``
    clients: np.ndarray | None = None   # of each image, from the file's ``client`` array, ``N``, -1 for none
    notes: tuple[str, ...] = ()   # changes and peculiarities, one line each

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Return ``(C, H, W)``."""
        height, width, channels = self.images.shape[1:]
        return channels, height, width


def canonical(name: str, data_dir: Path) -> str:
    """Return this program's name of a data set, such as `fmnist` for `FashionMNIST`, unless such a file exists."""
    name = name.removesuffix(".npz")
    plain = re.sub("[-_]", "", name.lower())
    plain = ALIASES.get(plain, plain)
    return plain if plain in TORCHVISION and name not in _names_in(data_dir) else name


def load(name: str, data_dir: Path, option: str = "dataset") -> Dataset:
    """Read ``data_dir/name.npz``; if it is missing, download it or, for NAME10k, make it from NAME.

    Args:
        option: that names it, for errors.

    Raises:
        InputError: the file is missing, cannot be downloaded or read, is damaged or has unexpected contents.
    """
    name = canonical(name, data_dir)
    path = data_dir / f"{name}.npz"
    if not path.exists():
        if fault := unknown(name, data_dir, option):
            raise InputError(fault)
        if name in TORCHVISION:
            fetch(name, data_dir, option)
        else:
            make_10k(load(name.removesuffix("10k"), data_dir, option), path)
    try:
        return _pooled(_read(path))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error
    except ValueError as error:
        again = "; move it away, and the next run downloads it again" if name in TORCHVISION else ""
        raise InputError(f"{path}: {error}{again}") from error


def read_labelled(path: Path, option: str) -> tuple[np.ndarray, np.ndarray]:
    """Read ``images`` and ``labels`` of an .npz: uint8 ``N x H x W x C``, and int64 ``N`` as they stand."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            if missing := {"images", "labels"} - set(archive.files):
                raise ValueError(f"lacks {', '.join(sorted(missing))}; it holds {shown(', '.join(archive.files))}")
            images, labels = archive["images"], archive["labels"]
        pixels = np.ascontiguousarray(_as_bytes(_channels_last(images, "images"), []))
        return pixels, _labels(labels, len(pixels), "labels")
    except Exception as error:   # NumPy parses headers as Python, so damage can raise nearly anything
        raise InputError(f"{option} {path}: cannot be read ({_first_line(error)})") from error


def _names_in(folder: Path) -> list[str]:
    return sorted(path.stem for path in folder.glob("*.npz"))


def unknown(name: str, data_dir: Path, option: str = "dataset") -> str | None:
    """Return why there is no data set of this (canonical) name, in one line; None if there is, or can be one."""
    if not data_dir.is_dir():
        return f"--data_dir {data_dir}: no such folder"
    if name.removesuffix("10k") in TORCHVISION or (data_dir / f"{name}.npz").exists():
        return None
    there, made = _names_in(data_dir), ", ".join(TORCHVISION)
    near = difflib.get_close_matches(name.lower(), dict.fromkeys([*there, *TORCHVISION]), 1)
    meant = f"did you mean {near[0]}? " if near else ""
    return (f"--{option} {name}: {data_dir / name}.npz does not exist ({meant}There are: "
            f"{shown(', '.join(there) or 'none')}; downloaded on first use: {made}); put it there"
            f"{WAYS_OUT.get(option, '')}")


def _read(path: Path) -> dict[str, np.ndarray]:
    """Read the arrays that a run needs, by key; ValueError if the file is damaged, lacks some or is too large."""
    if not path.is_file():   # reading a pipe would block
        raise ValueError("is not a file")
    with path.open("rb") as file:
        if file.read(len(LFS)) == LFS:
            raise ValueError("is a pointer of Git LFS, not the data; fetch them with `git lfs pull`")
    if not zipfile.is_zipfile(path):
        raise ValueError("damaged or not an .npz file")
    wanted = [f"{half}_{part}" for half in HALVES for part in ("images", "labels", "client")] + ["client"]
    try:
        with np.load(path, allow_pickle=False) as archive:
            keys, size = archive.files, sum(info.file_size for info in archive.zip.infolist())
            there = main_memory()
            if set(keys) >= set(NEEDED) and 2 * size <= there:   # once as read, once pooled
                return {key: archive[key] for key in wanted if key in keys}
    except MemoryError:
        raise
    except Exception as error:   # NumPy parses headers as Python, so damage can raise nearly anything
        raise ValueError(f"damaged or not an .npz file ({_first_line(error)})") from error
    if missing := [key for key in NEEDED if key not in keys]:
        raise ValueError(f"lacks {', '.join(missing)}; it holds {shown(', '.join(keys) or 'nothing')}, and "
                         f"{', '.join(NEEDED)} are needed")
    raise ValueError(f"its arrays have {size_of(size)} and need twice that to be pooled; there are "
                     f"{size_of(there)} of memory: use fewer or smaller images")


def _pooled(arrays: dict[str, np.ndarray]) -> Dataset:
    """Pool the arrays of a file; ValueError names the one that is not as expected."""
    notes: list[str] = []
    halves = [half for half in HALVES if f"{half}_images" in arrays or f"{half}_labels" in arrays]
    if "val" in halves and not {"val_images", "val_labels"} <= arrays.keys():
        raise ValueError("val_images and val_labels go together; it holds one of them")
    halves = [half for half in halves if any(arrays[f"{half}_{part}"].size for part in ("images", "labels"))]
    if not halves:
        raise ValueError("holds no images")
    given = arrays[f"{halves[0]}_images"].shape
    images = {half: _channels_last(arrays.pop(f"{half}_images"), f"{half}_images") for half in halves}
    sizes = {half: len(part) for half, part in images.items()}
    labels = np.concatenate([_labels(arrays[f"{half}_labels"], size, f"{half}_labels")
                             for half, size in sizes.items()])
    if len({(str(part.dtype), part.shape[1:]) for part in images.values()}) > 1:
        raise ValueError("images of one type and shape are needed; " + ", ".join(
            f"{half}_images is {part.dtype} of shape {part.shape}" for half, part in images.items()))
    if given[1] != images[halves[0]].shape[1]:
        notes.append("images are read as N x C x H x W")
    pixels = np.ascontiguousarray(_as_bytes(np.concatenate([images.pop(half) for half in halves]), notes))
    if pixels.shape[3] not in (1, 3):
        notes.append(f"images have {pixels.shape[3]} channels, and all are trained on")
    classes, numbers = np.unique(labels, return_inverse=True)
    if not 2 <= len(classes) <= MAX_CLASSES:
        raise ValueError(f"labels must name between 2 and {MAX_CLASSES:,} classes, not {len(classes):,}")
    if classes[-1] != len(classes) - 1:
        notes.append(f"labels are {shown(', '.join(map(str, classes)))}; classes are numbered 0 to "
                     f"{len(classes) - 1} in that order")
    return Dataset(pixels, numbers.astype(np.int64), len(classes), len(numbers) - sizes.get("test", 0), classes,
                   _clients(arrays, sizes), tuple(notes))


def _channels_last(images: np.ndarray, key: str) -> np.ndarray:
    """Turn images in any order that is clear into ``N x H x W x C``."""
    if images.ndim == 3:
        images = images[..., None]
    if images.ndim == 4 and 1 <= images.shape[1] < MIN_SIDE <= images.shape[3]:
        images = np.moveaxis(images, 1, -1)
    if images.ndim != 4:
        raise ValueError(f"{key} is of shape {images.shape}; expected N x H x W x C or N x H x W")
    if min(images.shape[1:3]) < MIN_SIDE or not images.shape[3]:
        raise ValueError(f"{key} is of shape {images.shape}; expected N x H x W x C, at least {MIN_SIDE} x "
                         f"{MIN_SIDE} pixels")
    return images


def _as_bytes(images: np.ndarray, notes: list[str]) -> np.ndarray:
    """Turn pixels of any type that is clear into uint8: whole numbers to 255, or floats in [0, 1] times 255."""
    if images.dtype.kind not in "buif":
        raise ValueError(f"images are {images.dtype}; expected uint8")
    low, high = float(images.min()), float(images.max())
    if not (low >= 0 and high <= 255):   # NaN is in no range
        raise ValueError(f"pixels are {images.dtype} from {low:g} to {high:g}; expected uint8, or floats from 0 "
                         "to 1")
    if images.dtype.kind == "b" or (images.dtype.kind == "f" and high <= 1):
        notes.append(f"pixels are {images.dtype} from {low:g} to {high:g}; multiplied by 255 and rounded")
        scaled = np.multiply(images, 255, dtype=np.float32)
        return np.rint(scaled, out=scaled).astype(np.uint8)
    if images.dtype.kind == "f" and not (images == np.rint(images)).all():
        raise ValueError(f"pixels are {images.dtype} from {low:g} to {high:g}, and not whole; expected uint8, or "
                         "floats from 0 to 1")
    if high <= 1:
        notes.append(f"no pixel is over {high:g} of 255, so images are nearly black; save 0 and 1 as bool")
    return images.astype(np.uint8, copy=False)


def _labels(values: np.ndarray, count: int, key: str) -> np.ndarray:
    labels = _whole(values, count, key)
    if labels.min() < 0:
        raise ValueError(f"{key} holds {labels.min()} (as int64); labels are whole numbers from 0: leave out "
                         "images that have none")
    return labels


def _whole(values: np.ndarray, count: int, key: str) -> np.ndarray:
    """Cast whole numbers of any type, ``N`` or ``N x 1``, to int64 ``N``."""
    flat = values[:, 0] if values.ndim == 2 and values.shape[1] == 1 else values
    if flat.shape != (count,):
        raise ValueError(f"{key} is of shape {values.shape}; expected one whole number per image, {count} of them")
    if not (flat.dtype.kind in "bui" or (flat.dtype.kind == "f" and (np.abs(flat.astype(float)) < 2**53).all()
                                         and (flat == np.rint(flat)).all())):
        raise ValueError(f"{key} is {flat.dtype}, and not all are whole numbers; expected one per image, from 0")
    return flat.astype(np.int64)


def _clients(arrays: dict[str, np.ndarray], sizes: dict[str, int]) -> np.ndarray | None:
    """Number the clients of the file 0 to K - 1 in sorted order, ``N``, -1 for none; None without the array."""
    given = [f"{half}_client" for half in sizes if f"{half}_client" in arrays]
    if not given and "client" not in arrays:
        return None
    if "client" in arrays and given:
        raise ValueError(f"client and {given[0]} say the same; leave one out")
    if given and len(given) < len(sizes):
        raise ValueError(f"{', '.join(given)} alone; expected one for each of {', '.join(sizes)}")
    keys = {"client": sum(sizes.values())} if not given else {f"{half}_client": sizes[half] for half in sizes}
    if all(arrays[key].dtype.kind in "SU" and arrays[key].shape == (count,) for key, count in keys.items()):
        return np.unique(np.concatenate([arrays[key] for key in keys]), return_inverse=True)[1]
    numbers = np.concatenate([_whole(arrays[key], count, key) for key, count in keys.items()])
    clients = np.unique(numbers[numbers >= 0])
    if not len(clients):
        raise ValueError(f"{', '.join(keys)}: no image has a client; expected whole numbers from 0, -1 for none")
    return np.where(numbers >= 0, np.searchsorted(clients, numbers), -1)


def fetch(name: str, data_dir: Path, option: str = "dataset") -> None:
    """Download with torchvision, which checks md5 sums, and cache as ``name.npz``."""
    import torchvision  # slow to import, needed once

    print(f"{data_dir / name}.npz does not exist yet: downloading {TORCHVISION[name]} with torchvision")
    make = getattr(torchvision.datasets, TORCHVISION[name])
    halves: dict[str, Any] = {}   # arrays
    try:
        # torchvision prints each mirror that failed.
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            for half in ("train", "test"):
                data = make(folder, train=half == "train", download=True)
                halves[f"{half}_images"] = np.asarray(data.data, np.uint8)
                halves[f"{half}_labels"] = np.asarray(data.targets, np.uint8)
    except (OSError, RuntimeError) as error:   # no network: URLError, an OSError, or RuntimeError
        raise InputError(f"--{option} {name}: {data_dir / name}.npz does not exist and the download failed "
                         f"({_first_line(error)}); put the file there{WAYS_OUT.get(option, '')}") from error
    write_whole(data_dir / f"{name}.npz", lambda file: np.savez(file, **halves))


def make_10k(data: Dataset, path: Path) -> None:
    """Write the test half of a data set as a file of its own, whose last tenth is for testing."""
    images, labels = data.images[data.train_size:], data.labels[data.train_size:].astype(np.uint8)
    cut = len(images) * 9 // 10
    write_whole(path, lambda file: np.savez_compressed(
        file, train_images=images[:cut], train_labels=labels[:cut], test_images=images[cut:],
        test_labels=labels[cut:]))


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200].rstrip(":")
