"""The picture of an attack: a column for each image, with truth, reconstruction and controls."""
from pathlib import Path

from torch import Tensor

from runs.plots import drawable, plt
from utils import write_whole

MOST = 10   # images in a picture


def grid(path: Path, rows: dict[str, Tensor], labels: Tensor, title: str) -> None:
    """Save the first images of each row as one picture.

    Args:
        rows: what a row shows, and its images, ``N x C x H x W`` in [0, 1].
        labels: of the columns, ``N``.
    """
    count = min(MOST, len(labels))
    figure, axes = plt.subplots(len(rows), count, figsize=(2.2 + 0.9 * count, 0.6 + 0.95 * len(rows)),
                                squeeze=False, layout="constrained")
    for line, (name, images) in zip(axes, rows.items(), strict=True):
        for i, place in enumerate(line):
            place.imshow(drawable(images[i].permute(1, 2, 0).numpy()), cmap="gray", vmin=0, vmax=1)
            place.set(xticks=[], yticks=[])
            if line is axes[0]:
                place.set_title(int(labels[i]), fontsize=8)
        line[0].set_ylabel(name.replace("_", " "), rotation=0, ha="right", va="center", fontsize=8)
    figure.suptitle(title, fontsize=9)
    write_whole(path, lambda file: figure.savefig(file, format="png", dpi=110))
    plt.close(figure)
