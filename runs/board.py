"""Event files for TensorBoard, in results/<run>/tensorboard/: scalars of the rounds, and pictures of the attacks.

Each program writes its own files anew from the run's CSV or pictures, so that no step is there twice.
"""
import re
from pathlib import Path

import numpy as np
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from runs import folders


def open_writer(results: Path, kind: str) -> SummaryWriter:
    """Return a writer of event files, in place of the earlier ones of that ``kind``: rounds or attack."""
    for path in folders.event_files(results, kind):
        path.unlink()
    return SummaryWriter(str(results / folders.EVENTS), filename_suffix=f".{kind}")


def add_rounds(writer: SummaryWriter, rows: list[dict]) -> None:
    """Write the numbers in rows of ``rounds.csv``, as scalars COLUMN/STAGE_SPLIT."""
    for row in rows:
        for name, value in row.items():
            if name not in ("round", "stage", "split") and value == value:
                column = name.replace("_class_", "_class/")   # one heading for all classes
                writer.add_scalar(f"{column}/{row['stage']}_{row['split']}", value, row["round"])
    writer.flush()


def write_pictures(results: Path) -> None:
    """Write the pictures of all attacks on a run, as images attack/ADVERSARY_ATTACK_CLIENT by round."""
    with open_writer(results, "attack") as writer:
        for path in folders.files(results, folders.PICTURE, partial=False):
            if match := re.fullmatch(r"attack_(\w+)_round(\d+)_(client\d+)\.png", path.name):
                with Image.open(path) as image:
                    pixels = np.asarray(image.convert("RGB"))
                writer.add_image(f"attack/{match[1]}_{match[3]}", pixels, int(match[2]), dataformats="HWC")
