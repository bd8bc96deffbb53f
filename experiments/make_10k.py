"""Make data/NAME10k.npz from the 10,000-image test file of a data set; of MNIST it is the embedded data set.

    python experiments/make_10k.py mnist        reads data/mnist.npz, about 10 s; or fmnist, cifar

The first 9,000 images become its train half, the last 1,000 its test half, in the released order. The file's bytes
depend on nothing but the images: dates in the archive are fixed.
"""
import io
import sys
import zipfile

import numpy as np
from common import ROOT

import datasets
from parsing import Parser
from utils import InputError, error_line, write_whole

TRAIN = 9_000


def pack(arrays: dict[str, np.ndarray]) -> bytes:
    """Return an ``.npz`` at the strongest compression, the same bytes every time."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for name, array in arrays.items():
            member = io.BytesIO()
            np.save(member, array)
            archive.writestr(zipfile.ZipInfo(f"{name}.npy", (1998, 11, 1, 0, 0, 0)), member.getvalue(),
                             zipfile.ZIP_DEFLATED)
    return packed.getvalue()


def main(argv: list[str] | None = None) -> int:
    """Write the file and return the exit status."""
    parser = Parser("make_10k.py", "Make data/NAME10k.npz from the 10,000-image test file of a data set.")
    parser.add_argument("name", choices=("mnist", "fmnist", "cifar"), help="whose images to take")
    name = parser.parse(argv).name
    try:
        whole = datasets.load(name, ROOT / "data")
        images, labels = whole.images[whole.train_size:], whole.labels[whole.train_size:].astype(np.uint8)
        data = pack({"train_images": images[:TRAIN], "train_labels": labels[:TRAIN],
                     "test_images": images[TRAIN:], "test_labels": labels[TRAIN:]})
        write_whole(ROOT / "data" / f"{name}10k.npz", lambda file: file.write(data))
    except (InputError, OSError) as error:
        print(error_line("make_10k.py", error), file=sys.stderr)
        return 2
    print(f"data/{name}10k.npz: {len(images)} images, {len(data):,} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
