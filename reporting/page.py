"""The page of report.py: tables and pictures of runs as HTML that needs no other file.

What stands in files may be anybody's, so text is HTML only where it is ``Markup``; Markup escapes whatever
else is formatted into it, joined or added.
"""
import base64
import io
from pathlib import Path

import pandas as pd
from markupsafe import Markup
from PIL import Image

from reporting import leakage
from runs.pictures import matplotlib, plt

LARGEST = 8 * 2**20   # bytes of a picture: the page has to be loaded
DASH = Markup("&ndash;")
METRICS = {"accuracy": "accuracy", "accuracy_worst": "worst decile", "f1": "macro F1", "kl_nats": "KL, nats"}
STYLE = """
body{font:15px/1.45 system-ui,sans-serif;margin:1.2rem auto;max-width:76rem;padding:0 1rem;color:#1b1b1b}
h1{font-size:1.5rem}h2{font-size:1.15rem;margin-top:2rem}.wide{overflow-x:auto}
table{border-collapse:collapse;white-space:nowrap}th,td{padding:.25rem .6rem;text-align:right}
th:first-child,td:first-child,th:last-child,td:last-child{text-align:left}
thead th{border-bottom:2px solid #888;white-space:normal;vertical-align:bottom}
tbody tr:nth-child(even){background:#f4f6f8}code{font-size:.85em}td code{user-select:all}
img{max-width:100%;height:auto;vertical-align:top}.mark{color:#a00;font-weight:600}
.dense{font-size:.85em}details{margin:.4rem 0}
"""
ATTACKS = Markup("""
<p><b>What attackers find</b> is each adversary's strongest attack in the last round it attacked,
beside the accuracy and KL of what was deployed in that round; brackets are 95 % bootstrap intervals over
images. <b>An attack that fails is an attack that failed, not a proof of privacy, and PSNR alone ranks
nothing.</b> <i>Image attacks</i> observe something of single images, and the strongest has the highest SSIM.
Leakage is that SSIM minus the best control's, mostly the public image nearest the truth, which only a lucky
guesser would pick: over 0 an attack shows what no public image shows. Under 0 it may still tell which image
it was: the rank is the true image's place, by distance, among up to 500 of the client's, 1 is a hit, and a
ring marks a mean rank under every control's. <i>Class attacks</i> draw a class, and the strongest is
recognised most often by an independent evaluator. They stand beside grey and noise, what a blank picture gets
by chance, not beside class means and public images, which are real and trivially recognised: a high share
says that a model shows its classes, and nothing of the client's images.""")


def page(table: pd.DataFrame, runs: list, others: dict[str, str]) -> str:
    """The whole report as HTML: ``summarise``'s table, ``Finished`` runs, and why other folders are none."""
    parts = [Markup("<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport "
                    "content='width=device-width,initial-scale=1'><title>RVE-PFL runs</title>"
                    "<style>{}</style><h1>RVE-PFL runs</h1>"
                    "<p>{} finished; {} left out, at the end. Accuracy, F1 and KL are means over clients "
                    "on held-out images, in the last round; &plusmn; is the deviation over seeds. "
                    "<b>deployed</b> is what a method hands to its user, <b>trained</b> the same after a "
                    "client's local training. A method's KL bounds what its latents tell about an image; a "
                    "dash is no bound.").format(Markup(STYLE), len(runs), len(others))]
    if any(len(run.leaks) for run in runs):
        parts.append(ATTACKS)
    if len(table):
        for (dataset, partition), block in table.groupby(["dataset", "partition"], sort=False):
            parts.append(Markup("<h2>{}, {}</h2>").format(dataset, partition))
            parts.append(_table(block))
            here = [run for run in runs
                    if (run.options["dataset"], run.partition) == (dataset, partition)]
            parts.append(_figure(_curves(here), f"deployed accuracy over rounds, {dataset}, {partition}"))
            parts.append(_partition_picture(here))
            parts += _attacks([run for run in here if len(run.leaks)])
    if others:
        parts += [Markup("<h2>Not in the tables</h2>"), _grid(["folder", "why"], sorted(others.items()))]
    return Markup("\n").join(parts) + "\n"


def _table(block: pd.DataFrame) -> Markup:
    head = ["method", "stage", "seeds", *METRICS.values(), "seconds", "command"]
    rows = []
    for row in block.to_dict("records"):
        mark = "" if row["protocol"] == "held-out" else Markup(" <span class=mark>{}</span>").format(
            row["protocol"])
        method = Markup("{}{} <small>{} clients, {}&times;{}</small>").format(
            row["method"], mark, row["clients"], row["rounds"], row["local_ep"])
        figures = [_spread(row[metric], row[f"{metric}_std"], 1 if metric == "kl_nats" else 4)
                   for metric in METRICS]
        rows.append([method, row["stage"], row["seeds"].replace(" ", ", "), *figures,
                     f"{row['seconds']:.0f}", Markup("<code>{}</code>").format(row["command"])])
    return _grid(head, rows)


def _attacks(runs: list) -> list[Markup]:
    """What attackers find of attacked runs: the table, leakage over utility and rounds, their pictures."""
    if not runs:
        return []
    rows = pd.concat([leakage.beside_utility(run) for run in runs], ignore_index=True)
    last = pd.concat([leakage.latest(part) for _, part in rows.groupby("run", sort=False)])
    parts = [Markup("<h3>What attackers find</h3><div class=dense>"), _attack_table(last), Markup("</div>")]
    if last["budget"].nunique() > 1:
        parts.append(Markup("<p class=mark>These attacks had different budgets (last column): a difference "
                            "between rows may be theirs."))
    several = rows[rows.groupby("run")["round"].transform("nunique") > 1]
    for x, shown in (("accuracy", last), ("round", several)):
        parts += [Markup("<p>")] + [
            _figure(leakage.picture(shown, kind, x), f"leakage over {x}, {kind} attacks")
            for kind in leakage.KINDS if kind in set(shown.loc[shown["score"].notna(), "kind"])]
    return parts + [_attack_pictures(run) for run in runs]


def _attack_table(last: pd.DataFrame) -> Markup:
    head = ["method", "adversary", "round", "deployed accuracy", "KL, nats",
            "image attack: SSIM", "best control", "PSNR, dB", "lowest mean rank", "best control's rank",
            "class attack: evaluator right", "blank control", "budget"]
    rows, small = [], Markup("<small>{}</small> {}")
    for (name, adversary), part in last.groupby(["run", "adversary"], sort=False):
        one, by_kind = part.iloc[0], {row["kind"]: row for row in part.to_dict("records")}
        cells = [Markup("{} <small>{}</small>").format(one["method"], name), adversary, one["round"],
                 _spread(one["accuracy"], float("nan"), 4), _spread(one["kl_nats"], float("nan"), 1)]
        for kind in leakage.KINDS:
            row = by_kind.get(kind)
            cells += [DASH] * 2 if row is None or row["score"] != row["score"] else [
                small.format(row["attack"], f"{row['score']:.2f} [{row['low']:.2f}, {row['high']:.2f}]"),
                small.format(row["control"], f"{row['control_score']:.2f}")]
            if kind == "image":
                cells += [DASH] * 3 if row is None else [
                    _spread(row["psnr"], float("nan"), 1),
                    small.format(row["rank_attack"], f"{row['rank']:.0f}"), f"{row['control_rank']:.0f}"]
        rows.append([*cells, one["budget"]])
    return _grid(head, rows)


def _attack_pictures(run) -> Markup:
    """The pictures of the attacks in the table: with all of them the page would be too heavy."""
    images = [_image(picture, Path(name).stem) for name, picture in run.pictures.items()
              if name != "partition.png"]
    return Markup("<details><summary>these attacks on {} in pictures (its folder has the others')</summary>{}"
                  "</details>").format(run.name, Markup().join(images)) if images else Markup()


def _grid(head: list[str], rows: list) -> Markup:
    """A table; cells are text, or HTML where they are Markup."""
    def line(cell, cells):
        return Markup("<tr>{}</tr>").format(Markup().join(Markup(cell).format(one) for one in cells))
    return Markup("<div class=wide><table><thead>{}</thead><tbody>{}</tbody></table></div>").format(
        line("<th>{}</th>", head), Markup().join(line("<td>{}</td>", row) for row in rows))


def _spread(mean: float, std: float, digits: int) -> Markup:
    if mean != mean:
        return DASH
    return Markup(f"{mean:.{digits}f}" + ("" if std != std else f" &plusmn; {std:.{digits}f}"))


def _curves(runs: list) -> plt.Figure:
    settings = dict.fromkeys(run.setting for run in runs)
    legend_rows = -(-len(settings) // 3)   # below the axes, where many lines cover no curve
    figure, axes = plt.subplots(figsize=(7.5, 3.5 + 0.16 * legend_rows), layout="constrained")
    axes.set_prop_cycle(plt.cycler(linestyle=["-", "--", ":"]) * plt.rcParams["axes.prop_cycle"])
    for setting in settings:
        same = [run for run in runs if run.setting == setting]
        deployed = pd.concat([run.rounds[run.rounds["stage"] == "deployed"] for run in same])
        mean = deployed.groupby("round")["accuracy"].agg(["mean", "std"])
        o, mark = same[0].options, "" if same[0].protocol == "held-out" else f", {same[0].protocol}"
        line, = axes.plot(mean.index, mean["mean"], marker=".",
                          label=f"{o['method']} {o['rounds']}x{o['local_ep']}{mark}")
        axes.fill_between(mean.index, mean["mean"] - mean["std"], mean["mean"] + mean["std"], alpha=0.15,
                          color=line.get_color(), linewidth=0)
    axes.set(xlabel="round", ylabel="deployed accuracy")
    axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    figure.legend(fontsize=7, ncols=3, loc="outside lower center")
    return figure


def _figure(figure: plt.Figure, text: str) -> Markup:
    held = io.BytesIO()
    figure.savefig(held, format="png", dpi=110)
    plt.close(figure)
    return _image(held.getvalue(), text)


def _image(picture: bytes, text: str) -> Markup:
    return Markup("<img alt='{}' src='data:image/png;base64,{}'>").format(
        text, base64.b64encode(picture).decode())


def _partition_picture(runs: list) -> Markup:
    for run in runs:
        if "partition.png" in run.pictures:
            return Markup("<details><summary>who owns which classes (seed {})</summary>{}</details>").format(
                run.options["seed"], _image(run.pictures["partition.png"], "images by client and class"))
    return Markup()


def png(path: Path) -> bytes:
    """A picture that the page may hold.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no PNG, or too large.
    """
    if not path.is_file() or path.stat().st_size > LARGEST:
        raise ValueError(f"no plain file of at most {LARGEST:,} bytes")
    picture = path.read_bytes()
    try:
        with Image.open(io.BytesIO(picture), formats=["PNG"]) as image:
            image.verify()
    except Exception as error:   # damage can raise nearly anything, and so do far too many pixels
        raise ValueError("no PNG, or a damaged one") from error
    return picture
