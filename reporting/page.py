"""Write the page of report.py: tables and pictures of runs, as HTML that needs no other file.

Text from files may have been written by anybody. So only ``Markup`` is taken as HTML, and it escapes every
other text that is formatted into it, joined or added.
"""
from pathlib import Path

import pandas as pd
from markupsafe import Markup

from attack.adversaries import ADVERSARIES
from attack.verdict import LEAKS
from reporting import leakage
from reporting.images import figure_image, image
from reporting.summary import BASIC, RUN_METRICS, Finished, by_setting, unusual
from runs.plots import matplotlib, plt

DASH = Markup("&ndash;")
STYLE = """
body{font:15px/1.45 system-ui,sans-serif;margin:1.2rem auto;max-width:76rem;padding:0 1rem;color:#1b1b1b;
overflow-wrap:anywhere}
h1{font-size:1.5rem}h2{font-size:1.15rem;margin-top:2rem}.wide{overflow-x:auto;margin:.6rem 0}
table{border-collapse:collapse;overflow-wrap:normal}th,td{padding:.25rem .6rem;text-align:right}
td{white-space:nowrap;vertical-align:top}
th:first-child,td:first-child,th:last-child,td:last-child,.text th,.text td{text-align:left}
thead th{border-bottom:2px solid #888;vertical-align:bottom}.text td{white-space:normal}
tbody tr:nth-child(even){background:#f4f6f8}
code{font-size:.85em;white-space:normal;overflow-wrap:anywhere}td code{display:block;max-width:24rem}
td details code{width:24rem;user-select:all}
img{max-width:100%;height:auto;vertical-align:top}.mark{color:#a00;font-weight:600}
.line{white-space:nowrap}.faint{color:#666}
.text i{display:none}
@media(max-width:40rem){.text thead{display:none}.text tr{display:block;padding:.4rem 0}
.text td{display:block;padding:.1rem .4rem .1rem 10.5rem}
.text i{display:inline-block;width:10rem;margin-left:-10rem;color:#666;font-style:normal}}
.dense{font-size:.8em}.dense th,.dense td{padding:.25rem .35rem}
.dense td small{display:block}.dense td:last-child{white-space:normal;min-width:9rem}
details{margin:.4rem 0}td details{margin:0}summary{cursor:pointer}
"""
HOW_TO_READ = Markup("""<details><summary>how to read this</summary>
<p>A row is a setting: runs that differ only in the seed. Figures are means over clients on held-out images
after the last round; &plusmn; is the standard deviation over seeds. <b>deployed</b> is the model that a
method gives to its user; <b>trained</b> is the same model after a client's local training. The worst decile
is the mean of the tenth of the clients with the lowest accuracy. KL bounds, in nats, what a latent tells
about its image.</details>
""")
ATTACKS_MEAN = Markup("""<details><summary>how to read what attackers find</summary>
<p>An attack <b>leaks</b> if it is better than its control, beyond chance; everything else is <b>as a
guess</b>. The control of an attack on images is the same attack on another image of the class (figures in
brackets). An attack on classes is compared with the best of its controls. "few" marks verdicts on too few
images for any leak. Of all attacks of an adversary on a run, a guess is called a leak in at most 5 % of
cases.
<p>An image is identified if it comes first among up to 500 of the client's images. The rank is the true
image's place among those of its class. The worst 2 % are the images with the highest KL.
<b>An attack that failed is no proof of privacy.</b></details>
""")


def page(table: pd.DataFrame, runs: list[Finished], others: dict[str, str]) -> str:
    """Return the whole report as HTML.

    Args:
        table: of ``summarise``.
        runs: those in the table.
        others: by name, why other folders are left out, or what of a run is.
    """
    end = Markup("; <a href='#others'>left out or incomplete: {}</a>").format(len(others)) if others else ""
    settings = table.index.nunique()
    parts = [Markup("<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport "
                    "content='width=device-width,initial-scale=1'><title>RVE-PFL runs</title>"
                    "<style>{}</style><h1>RVE-PFL runs</h1><p>{} finished runs in {} settings{}").format(
                        Markup(STYLE), len(runs), settings, end)]
    attacked = any(len(run.leaks) for run in runs)
    if len(table):
        parts += [_glance(table, by_setting(runs), attacked), HOW_TO_READ]
        parts += [ATTACKS_MEAN] * attacked
        for (dataset, partition), block in table.groupby(["dataset", "partition"], sort=False):
            here = [run for run in runs
                    if (run.options["dataset"], run.partition) == (dataset, partition)]
            parts += [Markup("<h2>{}, {}</h2>").format(dataset, partition), _table(block),
                      figure_image(_curves(here), f"deployed accuracy over rounds, {dataset}, {partition}"),
                      _partition_picture(here), *_attacks([run for run in here if len(run.leaks)])]
    if others:
        parts += [Markup("<h2 id=others>Left out or incomplete</h2>"),
                  _grid(["folder", "why"], sorted(others.items()), "text")]
    return Markup("\n").join(parts) + "\n"


def _glance(table: pd.DataFrame, runs: dict[str, list[Finished]], attacked: bool) -> Markup:
    """Return a row for each setting: deployed accuracy and, if any run was attacked, what leaks."""
    who = ADVERSARIES if attacked else ()
    head = ["method", "data set", "partition", "deployed accuracy",
            *(name.replace("_", " ").replace("api", "API") for name in who)]
    deployed, rows = table[table["stage"] == "deployed"], []
    for _, block in deployed.groupby(["dataset", "partition"], sort=False):
        differing = _differing({str(setting): runs[str(setting)][0].options for setting in block.index})
        for setting, row in block.iterrows():
            method = Markup("<b>{}</b>{} <small>{}</small>").format(
                row["method"], _protocol(row), differing[str(setting)])
            words = [_words(leakage.words_over_seeds(runs[str(setting)], name)) for name in who]
            accuracy = _spread(row["accuracy"], row["accuracy_std"], 4)
            rows.append([method, row["dataset"], row["partition"], accuracy, *words])
    return _grid(head, rows, "text")


def _differing(settings: dict[str, dict]) -> dict[str, str]:
    """Return each setting's options that are neither the default nor the same in all of them."""
    elsewhere = (*BASIC, "seed", "resplit", "validate")   # shown in other columns, or as a mark
    options = {setting: [name if value is True else f"{name} {value}"
                         for name, value in unusual(one).items() if name not in elsewhere]
               for setting, one in settings.items()}
    common = set.intersection(*(set(one) for one in options.values()))
    return {setting: ", ".join(text for text in one if text not in common)
            for setting, one in options.items()}


def _words(found: dict[str, leakage.OverSeeds]) -> Markup:
    """Return what leaks to an adversary, a line for each kind of attack."""
    if not found:
        return Markup("<span class=faint>not attacked</span>")
    lines = []
    for kind, one in found.items():
        remarks = [f"{one.having} of {one.attacked} seeds"] if one.having not in (0, one.attacked) else []
        remarks += ["few"] if one.few else []
        remark = Markup(" <small>({})</small>").format(", ".join(remarks)) if remarks else ""
        lines.append(Markup("<span class=line><small>{}:</small> <span class={}>{}</span>{}</span>").format(
            {"image": "images", "class": "classes"}[kind], "mark" if one.word == LEAKS else "plain",
            one.word, remark))
    return Markup("<br>").join(lines)


def _protocol(row: pd.Series) -> Markup:
    """Return a mark for a protocol whose figures are not comparable with the usual one's."""
    if row["protocol"] == "held-out":
        return Markup()
    return Markup(" <span class=mark>{}</span>").format(row["protocol"])


def _table(block: pd.DataFrame) -> Markup:
    """Return all figures of settings of one data set and partition."""
    head = ["method", "stage", "seeds", *RUN_METRICS.values(), "seconds", "command"]
    rows = []
    for _, row in block.iterrows():
        method = Markup("{}{} <small>{} clients, {}&times;{}</small>").format(
            row["method"], _protocol(row), row["clients"], row["rounds"], row["local_ep"])
        figures = [_spread(row[metric], row[f"{metric}_std"], 1 if metric == "kl_nats" else 4)
                   for metric in RUN_METRICS]
        command = Markup("<details><summary>show</summary><code>{}</code></details>").format(row["command"])
        rows.append([method, row["stage"], row["seeds"].replace(" ", ", "), *figures,
                     f"{row['seconds']:.0f}", command])
    return _grid(head, rows)


def _attacks(runs: list[Finished]) -> list[Markup]:
    """Return what attacks on some runs found: a table and their pictures."""
    if not runs:
        return []
    return [Markup("<h3>What attackers find</h3><div class=dense>"), _attack_table(runs), Markup("</div>"),
            *(_attack_pictures(run) for run in runs)]


def _attack_table(runs: list[Finished]) -> Markup:
    """Return a row for each run, adversary and kind of attack."""
    head = ["method", "adversary", "round", "kind", "verdict", "images", "strongest attack",
            "SSIM or evaluator right (control)", "identified (control)", "of the worst 2 %",
            "rank in class (control)"]
    rows = []
    for run in runs:
        method = Markup("{} <small>{}</small>").format(run.options["method"], run.name)
        for row in run.leaks.to_dict("records"):
            form = "{:.2f}" if row["kind"] == "image" else "{:.0%}"
            rows.append([method, row["adversary"], row["round"], row["kind"], row["word"] + ", few" * row["few"],
                         row["n"], row["attack"] if row["attack"] == row["attack"] else row["rank_attack"],
                         _beside(row, "score", form), _beside(row, "identified", "{:.1%}"),
                         DASH if row["identified_worst"] != row["identified_worst"] else
                         f"{row['identified_worst']:.0%}", _beside(row, "rank", "{:.0f}")])
    return _grid(head, rows)


def _beside(row: dict, name: str, form: str) -> str | Markup:
    """Return a figure with its control's in brackets, or a dash."""
    value, control = row[name], row[f"control_{name}"]
    return DASH if value != value else f"{form.format(value)} ({form.format(control)})"


def _attack_pictures(run: Finished) -> Markup:
    """Return the pictures of the attacks in the table; all would make the page too large."""
    images = [image(picture, Path(name).stem) for name, picture in run.pictures.items()
              if name != "partition.png"]
    if not images:
        return Markup()
    return Markup("<details><summary>these attacks on {} in pictures (its folder has those of all attacks)"
                  "</summary>{}</details>").format(run.name, Markup().join(images))


def _grid(head: list[str], rows: list, style: str = "") -> Markup:
    """Return a table in a box that scrolls sideways; cells are text, or HTML if they are Markup.

    Args:
        style: ``text`` for cells that wrap; on a narrow screen each row becomes a block of its own.
    """
    def line(cell: str, cells: list) -> Markup:
        return Markup("<tr>{}</tr>").format(Markup().join(Markup(cell).format(one) for one in cells))
    if style == "text":
        rows = [[Markup("<i>{}</i>{}").format(name, one) for name, one in zip(head, row, strict=True)]
                for row in rows]
    body = Markup().join(line("<td>{}</td>", row) for row in rows)
    table = "<div class=wide><table class='{}'><thead>{}</thead><tbody>{}</tbody></table></div>"
    return Markup(table).format(style, line("<th>{}</th>", head), body)


def _spread(mean: float, std: float, digits: int) -> Markup:
    """Return a mean and, if there is one, a standard deviation; a dash if there is no mean."""
    if mean != mean:
        return DASH
    return Markup(f"{mean:.{digits}f}" + ("" if std != std else f" &plusmn; {std:.{digits}f}"))


def _curves(runs: list[Finished]) -> plt.Figure:
    """Draw deployed accuracy over rounds, a line for each setting: mean and deviation over seeds."""
    settings = dict.fromkeys(run.setting for run in runs)
    legend_rows = -(-len(settings) // 3)   # below the axes, so that it covers no curve
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


def _partition_picture(runs: list[Finished]) -> Markup:
    """Return the first run's picture of which client owns which classes."""
    for run in runs:
        if "partition.png" in run.pictures:
            return Markup("<details><summary>who owns which classes (seed {})</summary>{}</details>").format(
                run.options["seed"], image(run.pictures["partition.png"], "images by client and class"))
    return Markup()
