"""Make data/mnist10k.npz, the embedded data set, from MNIST's 10,000-image test file.

    python benchmarks/make_mnist10k.py        reads data/mnist.npz, about 10 s

The first 9,000 images become its train half, the last 1,000 its test half, in the released order; that is
a convention only, since a run pools both and splits each client's share anew. The file's bytes depend on
nothing but the images: dates in the archive are fixed.
"""
import io
import zipfile

import _path  # noqa: F401 - lets this script import the project
import numpy as np

import datasets
from files import write_whole
from options import ROOT

TRAIN = 9_000


def pack(arrays: dict[str, np.ndarray]) -> bytes:
    """An ``.npz`` at the strongest compression, the same bytes every time."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for name, array in arrays.items():
            member = io.BytesIO()
            np.save(member, array)
            archive.writestr(zipfile.ZipInfo(f"{name}.npy", (1998, 11, 1, 0, 0, 0)), member.getvalue(),
                             zipfile.ZIP_DEFLATED)
    return packed.getvalue()


def main() -> None:
    mnist = datasets.load("mnist", ROOT / "data")
    images, labels = mnist.images[mnist.train_size:], mnist.labels[mnist.train_size:].astype(np.uint8)
    data = pack({"train_images": images[:TRAIN], "train_labels": labels[:TRAIN],
                 "test_images": images[TRAIN:], "test_labels": labels[TRAIN:]})
    write_whole(ROOT / "data" / "mnist10k.npz", lambda file: file.write(data))
    print(f"data/mnist10k.npz: {len(images)} images, {len(data):,} bytes")


if __name__ == "__main__":
    main()
