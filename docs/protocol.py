"""Draw docs/protocol.png, the README's picture of the protocol: python docs/protocol.py"""
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402 - after the backend is chosen
from matplotlib.patches import FancyBboxPatch  # noqa: E402

STAYS, TRAVELS, SERVER, GREY = "#d9ead3", "#fce5cd", "#cfe2f3", "#666666"


def box(axes, x, y, width, height, text, colour, edge="#444444", size=9, style="-"):
    axes.add_patch(FancyBboxPatch((x, y), width, height, boxstyle="round,pad=0,rounding_size=0.08",
                                  facecolor=colour, edgecolor=edge, linewidth=1.1, linestyle=style))
    axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=size)


def arrow(axes, start, end, text="", colour="#444444", shift=(0, 0), style="-|>"):
    axes.annotate("", end, start, arrowprops={"arrowstyle": style, "color": colour, "lw": 1.4})
    if text:
        axes.text((start[0] + end[0]) / 2 + shift[0], (start[1] + end[1]) / 2 + shift[1], text, fontsize=8,
                  ha="center", va="center", color=colour)


def client(axes, y, k):
    box(axes, 0.1, y, 7.2, 1.5, "", "white", GREY, style="--")
    axes.text(0.25, y + 1.32, f"client {k}", fontsize=9, weight="bold", va="center")
    box(axes, 0.3, y + 0.25, 1.1, 0.8, "images $x$,\nlabels $y$", STAYS)
    box(axes, 1.9, y + 0.25, 1.75, 0.8, f"encoder $q_{k}(z|x)$\n$\\mu(x),\\ \\log\\sigma^2(x)$", STAYS)
    box(axes, 4.15, y + 0.25, 1.2, 0.8, "$z=\\mu+\\sigma\\epsilon$\nimage-sized", STAYS)
    box(axes, 5.85, y + 0.25, 1.3, 0.8, "head\n$p(y|z)$", TRAVELS)
    for left, right in [(1.4, 1.9), (3.65, 4.15), (5.35, 5.85)]:
        arrow(axes, (left, y + 0.65), (right, y + 0.65))


def main() -> None:
    figure, axes = plt.subplots(figsize=(10.4, 4.5), layout="constrained")
    axes.set(xlim=(0, 11.9), ylim=(-0.15, 5.0))
    axes.axis("off")
    client(axes, 3.0, 1)
    client(axes, 1.0, "K")
    axes.text(3.7, 2.75, "...", fontsize=14, ha="center", va="center")
    box(axes, 9.3, 2.05, 2.4, 1.4, "server\nmean of the uploaded\nheads, weighed by size\nand by trust",
        SERVER)
    for y, end in [(3.65, 3.0), (1.65, 2.5)]:
        arrow(axes, (7.15, y), (9.3, end), style="<|-|>")
    axes.text(8.3, 3.72, "head: sent and\nuploaded, each round", fontsize=8, ha="center", va="center")
    axes.text(8.3, 1.72, "encoders, $z$ and\nimages never move", fontsize=8, ha="center", va="center")
    box(axes, 0.1, 4.6, 1.2, 0.3, "stays", STAYS, size=8)
    box(axes, 1.4, 4.6, 1.2, 0.3, "travels", TRAVELS, size=8)
    sees = [("curious server", "every head sent and uploaded"),
            ("curious client", "its own model, the heads sent to it"),
            ("stolen model", "one client's encoder and head"), ("prediction API", "class scores alone")]
    axes.text(0.1, 0.62, "Who sees what", fontsize=9, weight="bold", va="center")
    for i, (who, what) in enumerate(sees):
        bold = who.replace(" ", r"\ ")
        box(axes, 0.1 + 2.95 * i, -0.1, 2.8, 0.55, f"$\\bf{{{bold}}}$\n{what}", "#f3f3f3", size=8)
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=130)


if __name__ == "__main__":
    main()
