"""Make data/NAME10k.npz from the 10,000-image test file of a data set; of MNIST it is the embedded data set.

    python benchmarks/make_10k.py mnist        reads data/mnist.npz, about 10 s; or fmnist, cifar

The first 9,000 images become its train half, the last 1,000 its test half, in the released order; that is
a convention only, since a run pools both and splits each client's share anew. The file's bytes depend on
nothing but the images: dates in the archive are fixed.
"""
import io
import sys
import zipfile

import numpy as np
from _path import Script, guarded

import datasets
from utils import ROOT, write_whole

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


@guarded
def main(argv: list[str] | None = None) -> None:
    parser = Script(__file__, __doc__)
    parser.add_argument("name", choices=("mnist", "fmnist", "cifar"), help="whose images to take")
    name = parser.parse_args(argv).name
    whole = datasets.load(name, ROOT / "data")
    images, labels = whole.images[whole.train_size:], whole.labels[whole.train_size:].astype(np.uint8)
    data = pack({"train_images": images[:TRAIN], "train_labels": labels[:TRAIN],
                 "test_images": images[TRAIN:], "test_labels": labels[TRAIN:]})
    write_whole(ROOT / "data" / f"{name}10k.npz", lambda file: file.write(data))
    print(f"data/{name}10k.npz: {len(images)} images, {len(data):,} bytes")


if __name__ == "__main__":
    sys.exit(main())
