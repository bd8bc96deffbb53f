"""The page of report.py: tables and pictures of runs as HTML that needs no other file."""
import base64
import html
import io

import pandas as pd

import leakage
from plots import matplotlib, plt

FIGURES = {"accuracy": "accuracy", "accuracy_worst": "worst decile", "f1": "macro F1", "kl_nats": "KL, nats"}
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
ATTACKS = """<p><b>What attackers find</b> is each adversary's strongest attack in the last round it attacked,
beside the accuracy and KL of what was deployed in that round; brackets are 95 % bootstrap intervals over
images. <b>An attack that fails is an attack that failed, not a proof of privacy, and PSNR alone ranks
nothing.</b> <i>Image attacks</i> observe something of single images, and the strongest has the highest SSIM.
Leakage is that SSIM minus the best control's, mostly the public image nearest the truth, which only a lucky
guesser would pick: over 0 an attack shows what no public image shows. Under 0 it may still tell which image
it was: the rank is the true image's place, by distance, among up to 500 of the client's, 1 is a hit, and a
ring marks a mean rank under every control's. <i>Class attacks</i> draw a class, and the strongest is
recognised most often by an independent evaluator. They stand beside grey and noise, what a blank picture gets
by chance, not beside class means and public images, which are real and trivially recognised: a high share
says that a model shows its classes, and nothing of the client's images."""


def page(table: pd.DataFrame, runs: list, others: dict[str, str]) -> str:
    """The whole report as HTML: ``summarise``'s table, ``Finished`` runs, and why other folders are none."""
    parts = ["<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport "
             "content='width=device-width,initial-scale=1'><title>RVE-PFL runs</title>"
             f"<style>{STYLE}</style><h1>RVE-PFL runs</h1>"
             f"<p>{len(runs)} finished; {len(others)} left out, at the end. Accuracy, F1 and KL are means "
             "over clients on held-out images, in the last round; &plusmn; is the deviation over seeds. "
             "<b>deployed</b> is what a method hands to its user, <b>trained</b> the same after a client's "
             "local training. A method's KL bounds what its latents tell about an image; a dash is no bound."]
    if any(len(run.leaks) for run in runs):
        parts.append(ATTACKS)
    if len(table):
        for (dataset, partition), block in table.groupby(["dataset", "partition"], sort=False):
            parts.append(f"<h2>{html.escape(dataset)}, {html.escape(partition)}</h2>")
            parts.append(_table(block))
            here = [run for run in runs
                    if (run.options["dataset"], run.partition) == (dataset, partition)]
            parts.append(_image(_curves(here), f"deployed accuracy over rounds, {dataset}, {partition}"))
            parts.append(_partition_picture(here))
            parts += _attacks([run for run in here if len(run.leaks)])
    if others:
        rows = [[html.escape(name), html.escape(why)] for name, why in sorted(others.items())]
        parts.append("<h2>Not in the tables</h2>" + _grid(["folder", "why"], rows))
    return "\n".join(parts) + "\n"


def _table(block: pd.DataFrame) -> str:
    head = ["method", "stage", "seeds", *FIGURES.values(), "seconds", "command"]
    rows = []
    for row in block.to_dict("records"):
        mark = "" if row["protocol"] == "held-out" else f" <span class=mark>{row['protocol']}</span>"
        scale = f" <small>{row['clients']} clients, {row['rounds']}&times;{row['local_ep']}</small>"
        figures = [_spread(row[figure], row[f"{figure}_std"], 1 if figure == "kl_nats" else 4)
                   for figure in FIGURES]
        cells = [html.escape(row["method"]) + mark + scale, row["stage"], row["seeds"].replace(" ", ", "),
                 *figures, f"{row['seconds']:.0f}", f"<code>{html.escape(row['command'])}</code>"]
        rows.append(cells)
    return _grid(head, rows)


def _attacks(runs: list) -> list[str]:
    """What attackers find of attacked runs: the table, leakage over utility and rounds, their pictures."""
    if not runs:
        return []
    rows = pd.concat([leakage.beside_utility(run) for run in runs], ignore_index=True)
    last = pd.concat([leakage.latest(part) for _, part in rows.groupby("run", sort=False)])
    parts = ["<h3>What attackers find</h3><div class=dense>", _attack_table(last), "</div>"]
    if last["budget"].nunique() > 1:
        parts.append("<p class=mark>These attacks had different budgets (last column): a difference between "
                     "rows may be theirs.")
    several = rows[rows.groupby("run")["round"].transform("nunique") > 1]
    for x, shown in (("accuracy", last), ("round", several)):
        parts += ["<p>"] + [_image(leakage.picture(shown, kind, x), f"leakage over {x}, {kind} attacks")
                            for kind in leakage.KINDS if kind in set(shown["kind"])]
    return parts + [_attack_pictures(run) for run in runs]


def _attack_table(last: pd.DataFrame) -> str:
    head = ["method", "adversary", "round", "deployed accuracy", "KL, nats",
            "image attack: SSIM", "best control", "PSNR, dB", "mean rank", "best control's rank",
            "class attack: evaluator right", "blank control", "budget"]
    rows, dash = [], "&ndash;"
    for (name, adversary), part in last.groupby(["run", "adversary"], sort=False):
        one, by_kind = part.iloc[0], {row["kind"]: row for row in part.to_dict("records")}
        cells = [f"{html.escape(one['method'])} <small>{html.escape(name)}</small>", adversary,
                 str(one["round"]), _spread(one["accuracy"], float("nan"), 4),
                 _spread(one["kl_nats"], float("nan"), 1)]
        for kind in leakage.KINDS:
            row = by_kind.get(kind)
            cells += [dash] * 2 if row is None else [
                f"<small>{row['attack']}</small> {row['score']:.2f} [{row['low']:.2f}, {row['high']:.2f}]",
                f"<small>{row['control']}</small> {row['control_score']:.2f}"]
            if kind == "image":
                cells += [dash] * 3 if row is None else [
                    f"{row['psnr']:.1f}", f"{row['rank']:.0f}", f"{row['control_rank']:.0f}"]
        rows.append([*cells, html.escape(one["budget"])])
    return _grid(head, rows)


def _attack_pictures(run) -> str:
    """The pictures of the attacks in the table: with all of them the page would be too heavy."""
    names = [f"attack_{row['adversary']}_{row['attack']}_round{row['round']}_client*.png"
             for row in leakage.latest(run.leaks).to_dict("records")]
    images = [f"<img alt='{html.escape(path.stem, quote=True)}' src='{_data(path.read_bytes())}'>"
              for name in names for path in sorted(run.folder.glob(name))]
    return (f"<details><summary>these attacks on {html.escape(run.name)} in pictures (its folder has "
            f"the others')</summary>{''.join(images)}</details>") if images else ""


def _grid(head: list[str], rows: list[list[str]]) -> str:
    """A table of cells that are HTML already."""
    return ("<div class=wide><table><thead><tr>" + "".join(f"<th>{name}</th>" for name in head)
            + "</tr></thead><tbody>"
            + "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
            + "</tbody></table></div>")


def _spread(mean: float, std: float, digits: int) -> str:
    if mean != mean:
        return "&ndash;"
    return f"{mean:.{digits}f}" + ("" if std != std else f" &plusmn; {std:.{digits}f}")


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


def _image(figure: plt.Figure, text: str) -> str:
    held = io.BytesIO()
    figure.savefig(held, format="png", dpi=110)
    plt.close(figure)
    return f"<img alt='{html.escape(text, quote=True)}' src='{_data(held.getvalue())}'>"


def _partition_picture(runs: list) -> str:
    for run in runs:
        picture = run.folder / "partition.png"
        if picture.exists():
            return (f"<details><summary>who owns which classes (seed {int(run.options['seed'])})</summary>"
                    f"<img alt='images by client and class' src='{_data(picture.read_bytes())}'></details>")
    return ""


def _data(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()
