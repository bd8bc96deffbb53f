"""Draw docs/protocol.png, the README's picture of the protocol: python docs/protocol.py"""
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402 - after the backend is chosen
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.patches import FancyBboxPatch  # noqa: E402

GREY = "#666666"
Point = tuple[float, float]


@dataclass(frozen=True)
class Look:
    """How a box is drawn."""

    colour: str
    edge: str = "#444444"
    font: float = 9
    line: str = "-"


STAYS, TRAVELS, SERVER = Look("#d9ead3"), Look("#fce5cd"), Look("#cfe2f3")
CLIENT, SEER = Look("white", GREY, line="--"), Look("#f3f3f3", font=8)


def box(axes: Axes, corner: Point, size: Point, text: str, look: Look) -> None:
    """A box from its lower left corner, with its text in the middle."""
    axes.add_patch(FancyBboxPatch(corner, *size, boxstyle="round,pad=0,rounding_size=0.08",
                                  facecolor=look.colour, edgecolor=look.edge, linewidth=1.1,
                                  linestyle=look.line))
    axes.text(corner[0] + size[0] / 2, corner[1] + size[1] / 2, text, ha="center", va="center",
              fontsize=look.font)


def arrow(axes: Axes, start: Point, end: Point, style: str = "-|>") -> None:
    """A straight arrow."""
    axes.annotate("", end, start, arrowprops={"arrowstyle": style, "color": "#444444", "lw": 1.4})


def client(axes: Axes, y: float, k: int | str) -> None:
    """One client: what stays with it, and the head that travels."""
    box(axes, (0.1, y), (7.2, 1.5), "", CLIENT)
    axes.text(0.25, y + 1.32, f"client {k}", fontsize=9, weight="bold", va="center")
    box(axes, (0.3, y + 0.25), (1.1, 0.8), "images $x$,\nlabels $y$", STAYS)
    box(axes, (1.9, y + 0.25), (1.75, 0.8), f"encoder $q_{k}(z|x)$\n$\\mu(x),\\ \\log\\sigma^2(x)$", STAYS)
    box(axes, (4.15, y + 0.25), (1.2, 0.8), "$z=\\mu+\\sigma\\epsilon$\nimage-sized", STAYS)
    box(axes, (5.85, y + 0.25), (1.3, 0.8), "head\n$p(y|z)$", TRAVELS)
    for left, right in [(1.4, 1.9), (3.65, 4.15), (5.35, 5.85)]:
        arrow(axes, (left, y + 0.65), (right, y + 0.65))


def main() -> None:
    figure, axes = plt.subplots(figsize=(10.9, 4.5), layout="constrained")
    axes.set(xlim=(0, 12.5), ylim=(-0.15, 5.0))
    axes.axis("off")
    client(axes, 3.0, 1)
    client(axes, 1.0, "K")
    axes.text(3.7, 2.75, "...", fontsize=14, ha="center", va="center")
    box(axes, (9.2, 1.85), (3.15, 1.8),
        "$\\bf{server}$\nmean of the uploaded heads;\nweights by size (up to the median)\n"
        "× clipping × trust\n\nwhere most are distrusted:\na filtered mean", SERVER)
    for y, end in [(3.65, 3.1), (1.65, 2.4)]:
        arrow(axes, (7.15, y), (9.2, end), style="<|-|>")
    axes.text(8.27, 3.78, "head: sent and\nuploaded, each round", fontsize=8, ha="center", va="center")
    axes.text(8.27, 1.55, "encoders, $z$ and\nimages never move", fontsize=8, ha="center", va="center")
    box(axes, (0.1, 4.6), (1.2, 0.3), "stays", STAYS)
    box(axes, (1.4, 4.6), (1.2, 0.3), "travels", TRAVELS)
    sees = [("curious server", "every head sent and uploaded"),
            ("curious client", "its own model, the heads sent to it"),
            ("stolen model", "one client's encoder and head"), ("prediction API", "class scores alone")]
    axes.text(0.1, 0.62, "Who sees what", fontsize=9, weight="bold", va="center")
    for i, (who, what) in enumerate(sees):
        bold = who.replace(" ", r"\ ")
        box(axes, (0.1 + 3.1 * i, -0.1), (2.95, 0.55), f"$\\bf{{{bold}}}$\n{what}", SEER)
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=130)


if __name__ == "__main__":
    main()
