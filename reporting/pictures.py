"""Draw the pictures of report.py's page as SVG, in the colours of its style sheet.

A method has the same colour and mark everywhere. Every mark has a title, which a browser shows as its tooltip.
"""
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, floor, isnan

from markupsafe import Markup

from methods import METHODS
from reporting.summary import Finished, figures, half_interval, mean

WIDTH, HEIGHT, LEFT, RIGHT, BOTTOM, ROW = 360, 260, 40, 350, 226, 30   # in pixels of a narrow screen
STEPS = [digit * 10.0**power for power in range(-4, 9) for digit in (1, 2, 5)]   # between ticks
# Okabe and Ito's, which the colour-blind can tell apart.
COLOURS = ("#0072b2", "#56b4e9", "#009e73", "#d55e00", "#e69f00", "#cc79a7")
DASHES = ("none", "5 3", "2 2")
STYLE = Markup("\n".join(
    f".m{i}{{--colour:{COLOURS[i % len(COLOURS)]};--dash:{DASHES[i // len(COLOURS) % 3]}}}"
    for i in range(len(METHODS))))


@dataclass(frozen=True)
class Scale:
    """Ticks, and the pixels from the first to the last of them."""

    ticks: list[float]
    start: int
    end: int

    def __call__(self, value: float) -> float:
        """Return a value's pixel."""
        low, high = self.ticks[0], self.ticks[-1]
        return round(self.start + (value - low) / (high - low) * (self.end - self.start), 1)


def scale(values: Sequence[float], start: int, end: int, least_step: float = 0.0) -> Scale:
    """Return a scale of round ticks around values."""
    low, high = min(values), max(values)
    step = next(step for step in STEPS if step >= least_step and (high - low) / step <= 4)
    first, last = floor(low / step), ceil(high / step)
    return Scale([round(i * step, 4) for i in range(first, max(last, first + 1) + 1)], start, end)


def mark(x: float, y: float, method: str, kind: str = "") -> Markup:
    """Draw the mark of a method: a circle, a square or a bar, so that methods of one colour differ."""
    width, radius = ((8, 4), (8, 0), (4, 0))[number(method) // len(COLOURS) % 3]
    return Markup("<rect class='{}' x={:.1f} y={:.1f} width={} height=8 rx={} />").format(
        kind, x - width / 2, y - 4, width, radius)


def number(method: str) -> int:
    """Return the number of a method's colour and mark."""
    return list(METHODS).index(method)


def group(method: str, title: str, *parts: Markup) -> Markup:
    """Group parts that have a method's colour and a tooltip."""
    return Markup("<g class=m{} data-method={}><title>{}</title>{}</g>").format(
        number(method), method, title, Markup().join(parts))


def accuracy(names: list[str], settings: list[list[Finished]]) -> Markup:
    """Draw deployed accuracy, a row for each setting: seeds, their mean, and its 95 % interval."""
    values = [figures(runs, "accuracy") for runs in settings]
    spans = [(max(mean(seeds) - half, 0), min(mean(seeds) + half, 1)) if (half := half_interval(seeds)) == half
             else (mean(seeds), mean(seeds)) for seeds in values]
    bottom = ROW * len(settings) + 12
    x = scale([value for row in (*values, *spans) for value in row], 8, RIGHT - 50)
    parts = [_grid(x, None, bottom, "deployed accuracy")]
    for i, (name, runs, seeds, (low, high)) in enumerate(zip(names, settings, values, spans, strict=True)):
        y, method = ROW * i + 26, runs[0].options["method"]
        parts += [group(method, name, Markup(
            "<path class=interval d='M{},{}H{}'/><path class=mean d='M{},{}v12'/><text x=8 y={}>{}</text>"
            "<text class=right x={} y={}>{:.4f}</text>").format(
                x(low), y, x(high), x(mean(seeds)), y - 6, y - 10, name if len(name) < 60 else f"{name[:57]}...",
                RIGHT + 6, y + 4, mean(seeds)))]
        parts += [group(method, f"{run.name}: {value:.4f}", mark(x(value), y, method))
                  for run, value in zip(runs, seeds, strict=True)]
    return _svg(bottom + 34, "deployed accuracy of each setting", parts)


def convergence(runs: list[Finished]) -> Markup:
    """Draw deployed accuracy over rounds, a line for each run."""
    curves = [[(row["round"], row["accuracy"]) for row in run.rounds if row["stage"] == "deployed"]
              for run in runs]
    x = scale([0, *(run.options["rounds"] for run in runs)], LEFT, RIGHT, least_step=1)
    y = scale([accuracy for curve in curves for _, accuracy in curve], BOTTOM, 8)
    parts = [_grid(x, y, BOTTOM, "round")]
    for run, curve in zip(runs, curves, strict=True):
        line = Markup("L").join(f"{x(round)},{y(accuracy)}" for round, accuracy in curve)
        parts.append(group(run.options["method"], f"{run.name}: {curve[-1][1]:.4f}",
                           Markup("<path class=curve d='M{}h0'/>").format(line)))   # h0: of one point, a dot
    return _svg(HEIGHT, "deployed accuracy over rounds", parts)


def leakage(runs: list[Finished], adversary: str) -> Markup:
    """Draw accuracy against the share of images that an adversary re-identifies: a mark for each run."""
    x, y = scale([0, 1], LEFT, RIGHT), scale(figures(runs, "accuracy"), BOTTOM, 8)
    marks = []
    for run in runs:
        for row in run.leaks:
            of_last = row["adversary"] == adversary and row["round"] == run.options["rounds"]
            if not of_last or isnan(row["identified"]) or isnan(row["control_identified"]):
                continue   # another round's accuracy would stand beside it
            method, height = run.options["method"], y(run.last("deployed", "accuracy"))
            title = (f"{run.name}: {row['word']}; {row['rank_attack']} identifies {row['identified']:.1%}, "
                     f"its control {row['control_identified']:.1%}")
            marks.append(group(method, title, Markup("<path class=control d='M{},{}H{}'/>").format(
                x(row["control_identified"]), height, x(row["identified"])),
                mark(x(row["identified"]), height, method, "leaks" if row["leaks"] else "guess")))
    return _svg(HEIGHT, f"accuracy and re-identification by {adversary}", [
        _grid(x, y, BOTTOM, "share of images re-identified"), *marks]) if marks else Markup()


def _grid(x: Scale, y: Scale | None, bottom: float, label: str) -> Markup:
    """Draw lines and numbers at the ticks, and the label of the horizontal axis."""
    parts = [Markup("<path class=grid d='M{},8V{}'/><text class=middle x={} y={}>{:g}</text>").format(
        x(tick), bottom, x(tick), bottom + 14, tick) for tick in x.ticks]
    parts += [Markup("<path class=grid d='M{},{}H{}'/><text class=right x={} y={}>{:g}</text>").format(
        LEFT, y(tick), RIGHT, LEFT - 5, y(tick) + 4, tick) for tick in y.ticks] if y else []
    return Markup("{}<text class=middle x={} y={}>{}</text>").format(
        Markup().join(parts), (x.start + x.end) / 2, bottom + 29, label)


def _svg(height: float, label: str, parts: list[Markup]) -> Markup:
    return Markup("<svg viewBox='0 0 {} {}' role=img aria-label='{}'>{}</svg>").format(
        WIDTH, height, label, Markup("\n").join(parts))
