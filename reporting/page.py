"""Write the page of report.py as HTML: pictures on top, tables below.

Text from files may have been written by anybody. So only ``Markup`` is taken as HTML, and it escapes every
other text that is formatted into it, joined or added.
"""
import os
from pathlib import Path
from typing import Any
from urllib.parse import quote

from markupsafe import Markup

from reporting import pictures
from reporting.summary import RUN_METRICS, Finished, by_setting, command, figures, half_interval, labels, mean

DASH, FOLDER = Markup("&ndash;"), Path(__file__).parent
PAGE = Markup("""<!doctype html><html lang=en><meta charset=utf-8>
<meta name=viewport content='width=device-width,initial-scale=1'><title>RVE-PFL runs</title><style>
{}{}</style><h1>RVE-PFL runs</h1><p>{} finished runs in {} settings. Runs of a setting differ only in the seed.
<div class=bar>{}<input type=search placeholder=filter aria-label=filter hidden></div>
{}{}<script>
{}</script>
""")
HOW_TO_READ = Markup("""<details><summary>How to read this</summary>
<p>Accuracy is the mean over clients on held-out images after the last round. <b>Deployed</b> is the model that a
method gives to its user; <b>trained</b> is a client's model after its local training. With three or more seeds,
intervals are 95 % intervals of the mean over seeds (Student's t).
<p>An attack <b>leaks</b> if it is better than its control, beyond chance; everything else is <b>as a guess</b>.
"few" marks verdicts on too few images for any leak. The control of an attack on images (in brackets) is the same
attack on another image of the class. <b>An attack that failed is no proof of privacy.</b></details>
""")


def page(runs: list[Finished], others: dict[str, str]) -> str:
    """Return the report as HTML, from the finished runs, and why other folders are left out."""
    settings, parts, names = by_setting(runs), list[Markup](), list[str]()
    for place in dict.fromkeys(_place(same[0]) for same in settings):
        block = [same for same in settings if _place(same[0]) == place]
        names += (here := labels(block))
        parts += [Markup("<h2>{}, {}</h2>").format(*place), _cards(
            here, block, [run for run in runs if _place(run) == place])]
    if settings:
        parts += [Markup("<h2>Settings</h2>"), _table(names, settings)]
    if any(run.leaks for run in runs):
        parts += [Markup("<h2>Attacks</h2>"), _attacks(runs)]
    if others:
        parts += [Markup("<h2>Left out or incomplete</h2>"),
                  _grid(["folder", "why"], [("", cells) for cells in sorted(others.items())])]
    chips = [Markup("<button class=m{} data-method={}><svg viewBox='0 0 10 10'>{}</svg>{}</button>").format(
        pictures.number(method), method, pictures.mark(5, 5, method), method)
        for method in sorted({run.options["method"] for run in runs}, key=pictures.number)]
    style, script = (Markup((FOLDER / name).read_text()) for name in ("page.css", "page.js"))
    return PAGE.format(pictures.STYLE, style, len(runs), len(settings), Markup().join(chips), HOW_TO_READ,
                       Markup("\n").join(parts), script)


def _place(run: Finished) -> tuple[str, str]:
    return run.options["dataset"], run.partition


def _cards(names: list[str], settings: list[list[Finished]], runs: list[Finished]) -> Markup:
    """Return the pictures of one data set and partition."""
    cards = [("Accuracy", "mark: seed; line: mean; bar: 95 % interval", pictures.accuracy(names, settings)),
             ("Convergence", "a line for each run", pictures.convergence(runs))]
    cards += [(f"Accuracy against re-identification by {adversary}", "filled: leaks; line: to its control",
               pictures.leakage(runs, adversary))
              for adversary in sorted({row["adversary"] for run in runs for row in run.leaks})]
    cards += [("Classes of each client", f"in {run.name}", _picture(run, "partition.png"))
              for run in runs if run.has_partition_picture][:1]
    figures = [Markup("<figure><figcaption><b>{}</b> {}</figcaption>{}</figure>").format(*card)
               for card in cards if card[2]]
    return Markup("<div class=cards>{}</div>{}").format(Markup("\n").join(figures), _gallery(runs))


def _gallery(runs: list[Finished]) -> Markup:
    """Return the pictures of each run's strongest attacks: images before classes, what leaks first."""
    shown = sorted(((run, row) for run in runs for row in run.leaks),
                   key=lambda pair: (pair[1]["kind"] == "class", not pair[1]["leaks"]))
    figures = [Markup("<figure class=m{} data-method={}>{}<figcaption><b>{}</b><br>{}, {}: {}; {} {}<details>"
                      "<summary>command</summary><code>{}</code></details></figcaption></figure>").format(
        pictures.number(run.options["method"]), run.options["method"], _picture(run, name), run.name,
        row["adversary"], row["attack"], row["word"], "SSIM" if row["kind"] == "image" else "evaluator right",
        _score(row), command(run.options)) for run, row in shown for name in row["pictures"]]
    return Markup("<h3>Reconstructions by the strongest attacks</h3><div class='cards gallery'>{}</div>").format(
        Markup("\n").join(figures)) if figures else Markup()


def _picture(run: Finished, name: str) -> Markup:
    """Return a picture of a run's folder as HTML, with a link to it."""
    return Markup("<a href='{0}'><img loading=lazy alt='{1}' src='{0}'></a>").format(
        quote(os.fsencode(f"{run.name}/{name}")), Path(name).stem)


def _table(names: list[str], settings: list[list[Finished]]) -> Markup:
    """Return a row for each setting."""
    runs = [run for same in settings for run in same]
    adversaries = sorted({row["adversary"] for run in runs for row in run.leaks})
    finetuned = {epochs for run in runs for epochs in run.options["finetune_ep"]}
    stages = ["trained", *(f"finetuned_{epochs}" for epochs in sorted(finetuned))]
    rows = []
    for name, same in zip(names, settings, strict=True):
        options = same[0].options
        deployed = [_spread(figures(same, metric), 1 if metric == "kl_nats" else 4) for metric in RUN_METRICS]
        rows.append((options["method"], [
            name, *_place(same[0]), deployed[0],
            *(_spread(figures(same, "accuracy", stage), 4) for stage in stages),
            *deployed[1:], *(_words(same, adversary) for adversary in adversaries),
            ", ".join(str(run.options["seed"]) for run in same), options["num_users"],
            Markup("{}&times;{}").format(
                options["rounds"], options["local_ep"] or f"{options['local_steps']} steps"),
            f"{mean([run.seconds() for run in same]):.0f}",
            Markup("<details><summary>show</summary><code>{}</code></details>").format(command(options))]))
    accuracies = [f"{stage.replace('_', ' ')} accuracy" for stage in ("deployed", *stages)]
    return _grid(["method", "data set", "partition", *accuracies, *list(RUN_METRICS.values())[1:], *adversaries,
                  "seeds", "clients", "rounds", "seconds", "command"], rows)


def _words(runs: list[Finished], adversary: str) -> Markup:
    """Return what leaks to an adversary over seeds, a line for each kind of attack."""
    lines = []
    for kind, name in (("image", "images"), ("class", "classes")):
        rows = [row for run in runs for row in run.leaks if (row["adversary"], row["kind"]) == (adversary, kind)]
        worst = [row for row in rows if row["leaks"]] or rows   # for the victim
        if rows:
            remarks = [f"{len(worst)} of {len(rows)} seeds"] * (len(worst) < len(rows))
            remarks += ["few"] * all(row["few"] for row in worst)
            lines.append(Markup("{}: {}{}").format(
                name, Markup("<b class=mark>{}</b>" if worst[0]["leaks"] else "{}").format(worst[0]["word"]),
                f" ({', '.join(remarks)})" if remarks else ""))
    return Markup("<br>").join(lines) or Markup("not attacked")


def _attacks(runs: list[Finished]) -> Markup:
    """Return a row for each attacked run, adversary and kind of attack."""
    rows = [(run.options["method"], [
        run.name, row["adversary"], row["round"], row["kind"], row["word"] + ", few" * row["few"], row["n"],
        row["attack"] or row["rank_attack"], _score(row), _beside(row, "identified", "{:.1%}"),
        _figure(row["identified_worst"], "{:.0%}"), _beside(row, "rank", "{:.0f}")])
        for run in runs for row in run.leaks]
    return _grid(["run", "adversary", "round", "kind", "verdict", "images", "strongest attack",
                  "SSIM or evaluator right (control)", "identified (control)", "of the worst 2 %",
                  "rank in class (control)"], rows)


def _score(row: dict[str, Any]) -> Markup:
    """Return the strongest attack's SSIM, or how often the evaluator is right, beside its control's."""
    return _beside(row, "score", "{:.2f}" if row["kind"] == "image" else "{:.0%}")


def _beside(row: dict[str, Any], name: str, form: str) -> Markup:
    """Return a figure with its control's in brackets, or a dash."""
    return _figure(row[name], f"{form} ({form.format(row[f'control_{name}'])})")


def _figure(value: float, form: str) -> Markup:
    """Return a figure, or a dash for one that is missing."""
    return DASH if value != value else Markup(form.format(value))


def _spread(values: list[float], places: int) -> Markup:
    """Return a mean, and its 95 % interval or, of two, the values; a dash if there are none."""
    half = half_interval(values)
    if half == half:
        return _figure(mean(values), f"{{:.{places}f}} &plusmn; {half:.{places}f}")
    both = f" ({', '.join(f'{value:.{places}f}' for value in values)})" if len(values) > 1 else ""
    return _figure(mean(values), f"{{:.{places}f}}{both}")


def _grid(head: list[str], rows: list[tuple[str, Any]]) -> Markup:
    """Return a table; a row is a method, or nothing, and its cells: text, or HTML if they are Markup."""
    def cells(tag: str, texts: Any) -> Markup:
        return Markup().join(Markup(f"<{tag}>{{}}</{tag}>").format(text) for text in texts)
    lines = [Markup("<tr class=m{} data-method={}>{}</tr>").format(
        pictures.number(method), method, cells("td", texts)) if method else
        Markup("<tr>{}</tr>").format(cells("td", texts)) for method, texts in rows]
    return Markup("<div class=wide><table><thead><tr>{}</tr></thead><tbody>{}</tbody></table></div>").format(
        cells("th", head), Markup("\n").join(lines))
