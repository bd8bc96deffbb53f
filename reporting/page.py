"""Write the page of report.py as HTML: tables and curves, and the pictures in the runs' folders.

Text from files may have been written by anybody. So only ``Markup`` is taken as HTML, and it escapes every
other text that is formatted into it, joined or added.
"""
import base64
import io
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pandas as pd
from markupsafe import Markup

from attack.attacks import ADVERSARIES
from attack.verdict import LEAKS, WORDS
from reporting.summary import BASIC, RUN_METRICS, Finished, by_setting, unusual
from runs.plots import plt

DASH, PARTITION, HELD_OUT = Markup("&ndash;"), "partition.png", "held-out"
STYLE = """
body{font:15px/1.45 system-ui,sans-serif;margin:1.2rem auto;max-width:76rem;padding:0 1rem;overflow-wrap:anywhere}
.wide{overflow-x:auto}table{border-collapse:collapse}th,td{padding:.25rem .6rem;text-align:left;vertical-align:top}
td{white-space:nowrap}thead th{border-bottom:2px solid #888}tbody tr:nth-child(even){background:#f4f6f8}
.text td,code{white-space:normal}td code{display:block;width:24rem;user-select:all}img{max-width:100%}
.mark{color:#a00;font-weight:600}
"""
HOW_TO_READ = Markup("""<details><summary>how to read this</summary>
<p>A row is a setting: runs that differ only in the seed. Figures are means over clients on held-out images after
the last round; &plusmn; is the standard deviation over seeds. <b>deployed</b> is the model that a method gives to
its user; <b>trained</b> is a client's model after its local training.
<p>An attack <b>leaks</b> if it is better than its control, beyond chance; everything else is <b>as a guess</b>.
"few" marks verdicts on too few images for any leak. The control of an attack on images (in brackets) is the same
attack on another image of the class. <b>An attack that failed is no proof of privacy.</b></details>
""")


def page(table: pd.DataFrame, runs: list[Finished], others: dict[str, str]) -> str:
    """Return the report as HTML, from ``summarise``'s table, its runs, and why other folders are left out."""
    parts = [Markup("<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport "
                    "content='width=device-width,initial-scale=1'><title>RVE-PFL runs</title><style>{}</style>"
                    "<h1>RVE-PFL runs</h1><p>{} finished runs in {} settings").format(
                        Markup(STYLE), len(runs), table.index.nunique())]
    attacked = any(len(run.leaks) for run in runs)
    if len(table):
        parts += [_glance(table, by_setting(runs), attacked), HOW_TO_READ]
        for (dataset, partition), block in table.groupby(["dataset", "partition"], sort=False):
            here = [run for run in runs if (run.options["dataset"], run.partition) == (dataset, partition)]
            parts += [Markup("<h2>{}, {}</h2>").format(dataset, partition), _table(block),
                      _curves(here),
                      _partition_picture(here)]
            parts += [_attacks(here)] if any(len(run.leaks) for run in here) else []
    if others:
        parts += [Markup("<h2>Left out or incomplete</h2>"),
                  _grid(["folder", "why"], sorted(others.items()), "text")]
    return Markup("\n").join(parts) + "\n"


def _glance(table: pd.DataFrame, runs: dict[str, list[Finished]], attacked: bool) -> Markup:
    """Return a row for each setting: deployed accuracy and, if any run was attacked, what leaks."""
    adversaries = ADVERSARIES if attacked else ()
    head = ["method", "data set", "partition", "deployed accuracy",
            *(name.replace("_", " ").replace("api", "API") for name in adversaries)]
    deployed, rows = table[table["stage"] == "deployed"], []
    for _, block in deployed.groupby(["dataset", "partition"], sort=False):
        differing = _differing({str(setting): runs[str(setting)][0].options for setting in block.index})
        for setting, row in block.iterrows():
            method = Markup("<b>{}</b>{} <small>{}</small>").format(
                row["method"], _protocol(row), differing[str(setting)])
            rows.append([method, row["dataset"], row["partition"], _spread(row, "accuracy", 4),
                         *(_words(runs[str(setting)], name) for name in adversaries)])
    return _grid(head, rows, "text")


def _differing(settings: dict[str, dict]) -> dict[str, str]:
    """Return each setting's options that are neither the default nor the same in all of them."""
    elsewhere = (*BASIC, "seed", "resplit", "validate")   # shown in other columns, or as a mark
    texts = {setting: [name if value is True else f"{name} {value}" for name, value in unusual(options).items()
                       if name not in elsewhere] for setting, options in settings.items()}
    common = set.intersection(*map(set, texts.values()))
    return {setting: ", ".join(text for text in words if text not in common) for setting, words in texts.items()}


def _words(runs: list[Finished], adversary: str) -> Markup:
    """Return what leaks to an adversary over seeds, a line for each kind of attack."""
    rows = pd.concat([run.leaks[run.leaks["adversary"] == adversary] for run in runs])
    lines = []
    for kind, name in (("image", "images"), ("class", "classes")):
        part = rows[rows["kind"] == kind]
        if part.empty:
            continue
        word = min(part["word"], key=WORDS.index)
        having = part[part["word"] == word]
        remarks = [f"{len(having)} of {len(part)} seeds"] if len(having) < len(part) else []
        remarks += ["few"] if having["few"].all() else []
        lines.append(Markup("<small>{}:</small> <span class={}>{}</span>{}").format(
            name, "mark" if word == LEAKS else "plain", word,
            Markup(" <small>({})</small>").format(", ".join(remarks)) if remarks else ""))
    return Markup("<br>").join(lines) or Markup("not attacked")


def _protocol(row: pd.Series) -> Markup:
    """Return a mark for a protocol whose figures are not comparable with the usual one's."""
    return Markup() if row["protocol"] == HELD_OUT else Markup(" <b class=mark>{}</b>").format(row["protocol"])


def _table(block: pd.DataFrame) -> Markup:
    """Return all figures of settings of one data set and partition."""
    rows = []
    for _, row in block.iterrows():
        method = Markup("{}{} <small>{} clients, {}&times;{}</small>").format(
            row["method"], _protocol(row), row["clients"], row["rounds"], row["local_ep"])
        figures = [_spread(row, metric, 1 if metric == "kl_nats" else 4) for metric in RUN_METRICS]
        command = Markup("<details><summary>show</summary><code>{}</code></details>").format(row["command"])
        rows.append([method, row["stage"], row["seeds"].replace(" ", ", "), *figures,
                     f"{row['seconds']:.0f}", command])
    return _grid(["method", "stage", "seeds", *RUN_METRICS.values(), "seconds", "command"], rows)


def _attacks(runs: list[Finished]) -> Markup:
    """Return what attacks on some runs found: a row for each run, adversary and kind of attack, and pictures."""
    head = ["method", "adversary", "round", "kind", "verdict", "images", "strongest attack",
            "SSIM or evaluator right (control)", "identified (control)", "of the worst 2 %",
            "rank in class (control)"]
    rows, pictures = [], []
    for run in runs:
        for row in run.leaks.to_dict("records"):
            score = _beside(row, "score", "{:.2f}" if row["kind"] == "image" else "{:.0%}")
            rows.append([Markup("{} <small>{}</small>").format(run.options["method"], run.name), row["adversary"],
                         row["round"], row["kind"], row["word"] + ", few" * row["few"], row["n"],
                         row["rank_attack"] if score == DASH else row["attack"], score,
                         _beside(row, "identified", "{:.1%}"), _figure(row["identified_worst"], "{:.0%}"),
                         _beside(row, "rank", "{:.0f}")])
        images = [_picture(run, name) for name in run.pictures if name != PARTITION]
        if images:
            pictures.append(Markup("<details><summary>{} in pictures</summary>{}</details>").format(
                run.name, Markup().join(images)))
    return Markup("<h3>What attackers find</h3>{}{}").format(_grid(head, rows), Markup().join(pictures))


def _figure(value: float, form: str) -> Markup:
    """Return a figure, or a dash for one that is missing."""
    return DASH if value != value else Markup(form.format(value))


def _beside(row: dict[str, Any], name: str, form: str) -> Markup:
    """Return a figure with its control's in brackets, or a dash."""
    return _figure(row[name], f"{form} ({form.format(row[f'control_{name}'])})")


def _spread(row: pd.Series, name: str, digits: int) -> Markup:
    """Return a mean and, if there is one, a standard deviation; a dash if there is no mean."""
    std = row[f"{name}_std"]
    return _figure(row[name], f"{{:.{digits}f}}" + ("" if std != std else f" &plusmn; {std:.{digits}f}"))


def _grid(head: list[str], rows: list, style: str = "") -> Markup:
    """Return a table; cells are text, or HTML if they are Markup. With ``style`` "text" they wrap."""
    def line(cell: str, cells: list) -> Markup:
        return Markup("<tr>{}</tr>").format(Markup().join(Markup(cell).format(text) for text in cells))
    table = Markup("<div class=wide><table class='{}'><thead>{}</thead><tbody>{}</tbody></table></div>")
    return table.format(style, line("<th>{}</th>", head), Markup().join(line("<td>{}</td>", row) for row in rows))


def _picture(run: Finished, name: str) -> Markup:
    """Return a picture of a run's folder as HTML."""
    return Markup("<img loading=lazy alt='{}' src='{}'>").format(Path(name).stem, quote(f"{run.name}/{name}"))


def _curves(runs: list[Finished]) -> Markup:
    """Draw deployed accuracy over rounds, a line for each setting: means over seeds."""
    figure, axes = plt.subplots(figsize=(7.5, 4.5), layout="constrained")
    axes.set_prop_cycle(plt.cycler(linestyle=["-", "--", ":"]) * plt.rcParams["axes.prop_cycle"])
    for same in by_setting(runs).values():
        deployed = pd.concat([run.rounds[run.rounds["stage"] == "deployed"] for run in same])
        mean, options = deployed.groupby("round")["accuracy"].mean(), same[0].options
        axes.plot(mean.index, mean, marker=".",
                  label=f"{options['method']} {options['rounds']}x{options['local_ep']}, {same[0].protocol}")
    axes.set(xlabel="round", ylabel="deployed accuracy")
    figure.legend(fontsize=7, ncols=3, loc="outside lower center")
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    plt.close(figure)
    return Markup("<img alt='deployed accuracy over rounds' src='data:image/png;base64,{}'>").format(
        base64.b64encode(file.getvalue()).decode())


def _partition_picture(runs: list[Finished]) -> Markup:
    """Return the first run's picture of which client owns which classes."""
    run = next((run for run in runs if PARTITION in run.pictures), None)
    return Markup() if run is None else Markup(
        "<details><summary>who owns which classes (seed {})</summary>{}</details>").format(
            run.options["seed"], _picture(run, PARTITION))
