"""The plots of a run: the classes of each client, the learning curves, and the trust of the server."""
from pathlib import Path
from typing import Any

# All modules import Matplotlib from here.
import matplotlib
import numpy as np
import pandas as pd

from utils import write_whole

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402


def plot_partition(path: Path, counts: np.ndarray, title: str) -> None:
    """Draw the number of images by client and class, ``K x num_classes``, as a heat map."""
    clients, classes = counts.shape
    figure, axes = _heat_map(counts.T, (3 + 0.45 * clients, 1.8 + 0.28 * min(classes, 40)), "images", title,
                             cmap="Blues", origin="lower")
    axes.set(xlabel="client", ylabel="class")
    if clients <= 20 and classes <= 20:
        for (client, c), count in np.ndenumerate(counts):
            if count:
                axes.text(client, c, count, ha="center", va="center", fontsize=7,
                          color="white" if count > counts.max() / 2 else "black")
    _save(figure, path)


def plot_curves(path: Path, rounds: pd.DataFrame, title: str) -> None:
    """Draw accuracy (mean, spread and lowest decile over clients), loss and KL over the rounds."""
    panels = ["accuracy", "loss"] + (["kl_nats"] if rounds["kl_nats"].notna().any() else [])
    figure, row = plt.subplots(1, len(panels), figsize=(4.4 * len(panels), 3.6), layout="constrained")
    for axes, panel in zip(row, panels, strict=True):
        for (stage, split), means in rounds.groupby(["stage", "split"], sort=False):
            colour = {"trained": "tab:blue", "deployed": "tab:red"}.get(stage)
            if colour is None:   # new clients
                continue
            axes.plot(means["round"], means[panel], color=colour, marker="o", markersize=3,
                      linestyle=":" if split == "train" else "-", label=f"{stage}, {split}")
            if panel == "accuracy" and stage == "deployed":
                mean, std = means["accuracy"], means["accuracy_std"]
                axes.fill_between(means["round"], mean - std, (mean + std).clip(upper=1), alpha=0.15,
                                  color=colour, linewidth=0, label="± std over clients")
                axes.plot(means["round"], means["accuracy_worst"], color=colour, linewidth=0.8,
                          linestyle="--", label="worst decile")
        axes.set(xlabel="round", ylabel="KL (nats per image)" if panel == "kl_nats" else panel)
        axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
    if (rounds["kl_nats"] > 0).any():
        row[-1].set_yscale("log")
    row[0].legend(fontsize=7)
    figure.suptitle(title, fontsize=10)
    _save(figure, path)


def plot_trust(path: Path, server: pd.DataFrame, title: str) -> None:
    """Draw the trust by client and round as a heat map, with malicious clients' numbers in red."""
    grid = server.pivot(index="client", columns="round", values="trust")
    bad = set(server.loc[server["malicious"] == 1, "client"])
    edges = (grid.columns.min() - 0.5, grid.columns.max() + 0.5, len(grid) - 0.5, -0.5)
    figure, axes = _heat_map(grid, (5.5 + 0.1 * grid.shape[1], 1.8 + 0.25 * min(len(grid), 40)), "trust", title,
                             cmap="viridis", vmin=0, vmax=1, extent=edges)
    axes.set(xlabel="round", ylabel="client" + (" (red: malicious)" if bad else ""))
    if len(grid) <= 40:
        axes.set_yticks(range(len(grid)), grid.index)
        for client, label in zip(grid.index, axes.get_yticklabels(), strict=True):
            label.set_color("red" if client in bad else "black")
    _save(figure, path)


def _heat_map(values: np.ndarray | pd.DataFrame, size: tuple[float, float], label: str, title: str,
              **options: Any) -> tuple[plt.Figure, plt.Axes]:
    figure, axes = plt.subplots(figsize=(min(14, size[0]), size[1]), layout="constrained")
    figure.colorbar(axes.imshow(values, aspect="auto", interpolation="nearest", **options), ax=axes, label=label)
    axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(20, integer=True))
    figure.suptitle(title, fontsize=9)
    return figure, axes


def plot_triggered(path: Path, images: np.ndarray, triggered: np.ndarray, title: str) -> None:
    """Draw images ``N x H x W x C`` uint8, and below each the same with a backdoor's trigger."""
    figure, grid = plt.subplots(2, len(images), figsize=(1.1 * len(images), 2.8), layout="constrained",
                                squeeze=False)
    for axes, image in zip(grid.flat, (*images, *triggered), strict=True):
        axes.imshow(drawable(image), cmap="gray", vmin=0, vmax=255)
        axes.set_axis_off()
    figure.suptitle(f"{title}\nabove: as they are; below: with the backdoor's trigger", fontsize=9)
    _save(figure, path)


def drawable(image: np.ndarray) -> np.ndarray:
    """Return an image ``H x W x C`` for Matplotlib: in colour if of three channels, else the first in grey."""
    return image if image.shape[2] == 3 else image[:, :, 0]


def _save(figure: plt.Figure, path: Path) -> None:
    write_whole(path, lambda file: figure.savefig(file, format="png", dpi=110))
    plt.close(figure)
