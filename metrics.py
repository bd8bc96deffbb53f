"""Metrics of predictions: means over a client's images, and over clients."""
from typing import Any

import numpy as np
import torch
from torch import Tensor

from runs.csvs import METRICS


class Tally:
    """Running sums over an epoch, kept on the device so that a step waits for nothing."""

    def __init__(self):
        self.loss, self.kl, self.predicted, self.labels = [], [], [], []

    def add(self, loss: Tensor, kl: Tensor | None, scores: Tensor, labels: Tensor) -> None:
        """Add a batch: losses ``N``, KL ``N`` or None, class scores ``N x num_classes``, labels ``N``."""
        self.loss.append(loss.detach())
        self.predicted.append(scores.detach().argmax(1))
        self.labels.append(labels)
        if kl is not None:
            self.kl.append(kl.detach())

    def result(self, num_classes: int) -> dict[str, Any]:
        """Return means over images; ``images`` and ``right`` count all and the rightly predicted ones by class.

        As in scikit-learn, precision, recall and F1 are macro averages over the classes among labels or
        predictions, and 0/0 counts as 0. Without any image, means are NaN.
        """
        from torchmetrics.functional import classification  # seconds to import: after the first steps

        predicted, labels = torch.cat(self.predicted).cpu(), torch.cat(self.labels).cpu()
        macro = {name: metric(predicted, labels, num_classes, "macro").item() if len(labels) else float("nan")
                 for name, metric in (("precision", classification.multiclass_precision),
                                      ("recall", classification.multiclass_recall),
                                      ("f1", classification.multiclass_f1_score))}
        return {
            "n": len(labels),
            "images": torch.bincount(labels, minlength=num_classes).tolist(),
            "right": torch.bincount(labels[predicted == labels], minlength=num_classes).tolist(),
            "loss": torch.cat(self.loss).double().mean().item(),
            "accuracy": (predicted == labels).double().mean().item(),
            **macro,
            "kl_nats": torch.cat(self.kl).double().mean().item() if self.kl else float("nan"),
        }


def over_clients(rows: list[dict]) -> list[dict]:
    """Return means over clients, one row per stage and split, from one row per client, stage and split.

    ``accuracy_worst`` is the mean of the lowest tenth of the clients, at least one. ``accuracy_images`` is the
    share of all clients' images that are right, ``accuracy_class_<c>`` that of class c, NaN if it has no image.
    """
    groups: dict[tuple[str, str], list[dict]] = {}
    for row in rows:
        groups.setdefault((row["stage"], row["split"]), []).append(row)
    means = []
    for (stage, split), members in groups.items():
        column = {name: np.array([row[name] for row in members]) for name in METRICS}
        accuracy = np.sort(column["accuracy"])
        right, images = (np.sum([row[name] for row in members], axis=0) for name in ("right", "images"))
        by_class = np.where(images > 0, right / np.maximum(images, 1), np.nan)
        means.append({"stage": stage, "split": split, "accuracy_std": accuracy.std(),
                      "accuracy_worst": accuracy[:max(1, round(len(accuracy) / 10))].mean(),
                      "accuracy_images": right.sum() / images.sum(),
                      **{f"accuracy_class_{c}": share for c, share in enumerate(by_class)},
                      **{name: values.mean() for name, values in column.items()}})
    return means
