"""Draw docs/protocol.png, the README's picture: python docs/protocol.py"""
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402 - after the backend is chosen
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.patches import FancyBboxPatch  # noqa: E402

PRIVATE, SHARED, SERVER, FRAME = "#d9ead3", "#fce5cd", "#cfe2f3", "white"
SEEN = ("images,\nlabels", "encoder", "$z$", "uploaded\nhead $h_k$", "mean\nhead $h_t$", "class\nscores")
ADVERSARIES = {   # one mark for each of SEEN
    "curious server": "   xx ", "curious client": "    x ", "stolen model": " xoxxx", "prediction API": "     x"}


def box(axes: Axes, corner: tuple[float, float], size: tuple[float, float], text: str, colour: str) -> None:
    """Draw a box from its lower left corner, with centred text; a frame is dashed."""
    axes.add_patch(FancyBboxPatch(corner, *size, boxstyle="round,pad=0,rounding_size=0.08", facecolor=colour,
                                  edgecolor="#444444", linestyle="--" if colour == FRAME else "-"))
    axes.text(corner[0] + size[0] / 2, corner[1] + size[1] / 2, text, ha="center", va="center", fontsize=9)


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], style: str = "-|>") -> None:
    """Draw a straight arrow."""
    axes.annotate("", end, start, arrowprops={"arrowstyle": style, "color": "#444444", "lw": 1.4})


def protocol(axes: Axes) -> None:
    """Draw a client, the server, and what passes between them."""
    for shift in (0.2, 0.1, 0):
        box(axes, (0.1 + shift, 2.6 + shift), (7.2, 1.6), "", FRAME)
    axes.text(0.25, 4.0, "client $k = 1 \\ldots K$", fontsize=9, weight="bold", va="center")
    parts = {"images $x$,\nlabels $y$": PRIVATE, "encoder $q_k(z|x)$\n$\\mu(x),\\ \\log\\sigma^2(x)$": PRIVATE,
             "$z=\\mu+\\sigma\\epsilon$": PRIVATE, "head\n$p(y|z)$": SHARED}
    for i, (text, colour) in enumerate(parts.items()):
        box(axes, (0.3 + 1.75 * i, 2.8), (1.5, 0.9), text, colour)
        if i:
            arrow(axes, (0.05 + 1.75 * i, 3.25), (0.3 + 1.75 * i, 3.25))
    box(axes, (9.6, 2.8), (2.6, 0.9), "$\\bf{server}$\n$h_{t+1}=\\sum_k w_k h_k$", SERVER)
    arrow(axes, (7.05, 3.4), (9.6, 3.4))
    arrow(axes, (9.6, 3.05), (7.05, 3.05))
    axes.text(8.55, 3.5, "trained head $h_k$", fontsize=9, ha="center")
    axes.text(8.55, 2.78, "new head $h_{t+1}$", fontsize=9, ha="center")
    box(axes, (9.6, 4.1), (1.2, 0.3), "private", PRIVATE)
    box(axes, (11.0, 4.1), (1.2, 0.3), "shared", SHARED)


def views(axes: Axes) -> None:
    """Draw the table of what each adversary sees of a client."""
    axes.text(0.3, 1.95, "adversary sees\nof client $k$", fontsize=9, weight="bold", va="center")
    for i, name in enumerate(SEEN):
        axes.text(3.6 + 1.6 * i, 1.95, name, fontsize=9, ha="center", va="center")
    for row, (adversary, sees) in enumerate(ADVERSARIES.items()):
        y = 1.4 - 0.4 * row
        axes.plot([0.3, 12.2], [y + 0.2, y + 0.2], color="#cccccc", lw=0.8)
        axes.text(0.3, y, adversary, fontsize=9, va="center")
        for i, mark in enumerate(sees):
            text = {"x": "yes", "o": "if observed", " ": "–"}[mark]
            axes.text(3.6 + 1.6 * i, y, text, fontsize=9, ha="center", va="center",
                      weight="bold" if mark == "x" else "normal", color="#b00000" if mark != " " else "#999999")


def main() -> None:
    figure, axes = plt.subplots(figsize=(10.9, 4.3), layout="constrained")
    axes.set(xlim=(0, 12.5), ylim=(-0.1, 4.7))
    axes.axis("off")
    protocol(axes)
    views(axes)
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=130)


if __name__ == "__main__":
    main()
