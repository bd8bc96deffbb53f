"""All runs under results/ as one page and one table.

    python report.py                    writes results/report.html and results/summary.csv

A row of the table is a setting: runs that differ in nothing but the seed, their means and standard deviations
over seeds, and the command that makes them. Runs that are unfinished, damaged or not this program's are
listed with the reason. The page needs no other file.
"""
import base64
import contextlib
import html
import io
import json
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import pandas as pd

from files import write_whole
from options import ROOT, Parser, args_parser, make_parser
from runs import ASIDE, COLUMNS
from utils import InputError

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402 - after the backend is chosen

# Options that say where and how, not what: they part no settings and stand in no command.
ASIDE_OPTIONS = {"run_name", "seed", "data_dir", "results_dir", "models_dir", "save_rounds", "resume",
                 "overwrite", "checkpoint_seconds", "device", "stack", "eval_every"}
BASIC = ("dataset", "method", "partition")   # on which the defaults of others depend
FIGURES = {"accuracy": "accuracy", "accuracy_worst": "worst decile", "f1": "macro F1", "kl_nats": "KL, nats"}
STAGES = ("deployed", "trained")
STYLE = """
body{font:15px/1.45 system-ui,sans-serif;margin:1.2rem auto;max-width:76rem;padding:0 1rem;color:#1b1b1b}
h1{font-size:1.5rem}h2{font-size:1.15rem;margin-top:2rem}.wide{overflow-x:auto}
table{border-collapse:collapse;white-space:nowrap}th,td{padding:.25rem .6rem;text-align:right}
th:first-child,td:first-child,th:last-child,td:last-child{text-align:left}
thead th{border-bottom:2px solid #888}
tbody tr:nth-child(even){background:#f4f6f8}code{font-size:.85em}td code{user-select:all}
img{max-width:100%;height:auto}.mark{color:#a00;font-weight:600}details{margin:.4rem 0}
"""


@dataclass(frozen=True)
class Finished:
    """One finished run: its options, its protocol, its folder, and ``rounds.csv``."""

    name: str
    folder: Path
    protocol: str
    options: dict
    rounds: pd.DataFrame

    @property
    def setting(self) -> str:
        """The same for runs that differ in the seed alone."""
        kept = {key: value for key, value in self.options.items() if key not in ASIDE_OPTIONS}
        return json.dumps([self.protocol, kept], sort_keys=True)


def read(folder: Path) -> Finished | str:
    """A finished run, or why the folder is none."""
    path = folder / "config.json"
    if not path.exists():
        return "not a run of this program: no config.json"
    try:
        config = json.loads(path.read_text())
        options, status, protocol = config["options"], config["status"], config["protocol"]
        if protocol not in ASIDE or {"num_users", "local_ep", "seed"} - set(options):
            raise ValueError("of another version, or not this program's")
        asked = int(options["rounds"])
        with contextlib.redirect_stderr(io.StringIO()) as said:
            command(options)
    except SystemExit:   # argparse's way out
        return f"its options are not this version's ({said.getvalue().strip()})"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"config.json is damaged ({_line(error)})"
    try:
        rounds = pd.read_csv(folder / "rounds.csv")
        if list(rounds.columns) != COLUMNS["rounds.csv"]:
            raise ValueError("its columns are not those of a run")
        reached = int(rounds["round"].max()) if len(rounds) else 0
        final = rounds[(rounds["round"] == asked) & (rounds["stage"] == "deployed")]
        numbers = rounds[["accuracy", "accuracy_worst", "f1", "seconds"]].apply(pd.to_numeric)
    except (OSError, ValueError, TypeError) as error:
        return f"rounds.csv is damaged ({_line(error)})"
    if status != "finished":
        return f"unfinished: {reached} of {asked} rounds; go on with --resume"
    if len(final) != 1 or numbers.isna().any(axis=None):
        return f"rounds.csv is damaged (round {asked} is missing or has gaps)"
    return Finished(folder.name, folder, protocol, options, rounds)


def command(options: dict) -> str:
    """What makes a run, with no more flags than needed."""
    parser, words = make_parser(), []
    basic = [word for name in BASIC for word in (f"--{name}", options[name])]
    usual = {**vars(args_parser(basic)), **{name: parser.get_default(name) for name in BASIC}}
    for name in [action.dest for action in parser._actions]:
        value = options.get(name)
        unusual = value is not None and value is not False and value != usual.get(name)
        if name == "seed" or (unusual and name not in ASIDE_OPTIONS):
            words += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return shlex.join(["python", "RVE-PFL.py", *words])


def summarise(runs: list[Finished]) -> pd.DataFrame:
    """One row a setting and stage: means over seeds, and the standard deviation where there are several."""
    rows = []
    for setting in dict.fromkeys(run.setting for run in runs):
        by_seed = {run.options["seed"]: run for run in runs if run.setting == setting}   # one of each counts
        same = [by_seed[seed] for seed in sorted(by_seed)]
        options = same[0].options
        for stage in STAGES:
            last = pd.concat([_last(run, stage) for run in same])
            if last.empty:   # nobody was sampled in the last round
                continue
            row = {"dataset": options["dataset"], "partition": _partition(options),
                   "method": options["method"], "protocol": same[0].protocol, "clients": options["num_users"],
                   "rounds": options["rounds"], "local_ep": options["local_ep"], "stage": stage,
                   "seeds": " ".join(str(run.options["seed"]) for run in same)}
            for figure in FIGURES:
                row[figure], row[f"{figure}_std"] = last[figure].mean(), last[figure].std()
            seconds = sum(run.rounds.drop_duplicates("round")["seconds"].sum() for run in same)
            rows.append({**row, "seconds": seconds / len(same), "command": command(options)})
    table = pd.DataFrame(rows)
    return table.sort_values(["dataset", "partition", "protocol", "rounds", "local_ep", "stage", "accuracy"],
                             ascending=[True] * 6 + [False]) if rows else table


def _last(run: Finished, stage: str) -> pd.DataFrame:
    rounds = run.rounds
    return rounds[(rounds["round"] == run.options["rounds"]) & (rounds["stage"] == stage)
                  & (rounds["split"] == ASIDE[run.protocol])]


def _partition(options: dict) -> str:
    extra = {"shards": options.get("classes_per_client"), "dirichlet": options.get("alpha")}
    unequal = ", unequal" if options.get("unequal") else ""
    value = extra.get(options["partition"])
    return f"{options['partition']}{'' if value is None else f' {value:g}'}{unequal}"


def page(table: pd.DataFrame, runs: list[Finished], others: dict[str, str]) -> str:
    """The whole report as HTML."""
    parts = ["<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport "
             "content='width=device-width,initial-scale=1'><title>RVE-PFL runs</title>"
             f"<style>{STYLE}</style><h1>RVE-PFL runs</h1>"
             f"<p>{len(runs)} finished, {len(others)} not. Accuracy, F1 and KL are means over clients on "
             "held-out images, in the last round; &plusmn; is the standard deviation over seeds. "
             "<b>deployed</b> is what a method hands to its user, <b>trained</b> the same after a client's "
             "local training. A method's KL bounds what its latents tell about an image; a dash is no bound."]
    if len(table):
        for (dataset, partition), block in table.groupby(["dataset", "partition"], sort=False):
            parts.append(f"<h2>{html.escape(dataset)}, {html.escape(partition)}</h2>")
            parts.append(_table(block))
            here = [run for run in runs
                    if (run.options["dataset"], _partition(run.options)) == (dataset, partition)]
            parts.append(_image(_curves(here), f"deployed accuracy over rounds, {dataset}, {partition}"))
            parts.append(_partition_picture(here))
    if others:
        rows = "".join(f"<tr><td>{html.escape(name)}</td><td>{html.escape(why)}</td></tr>"
                       for name, why in sorted(others.items()))
        parts.append(f"<h2>Not in the tables</h2><div class=wide><table><tbody>{rows}</tbody></table></div>")
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
        rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    return ("<div class=wide><table><thead><tr>" + "".join(f"<th>{name}</th>" for name in head)
            + "</tr></thead><tbody>" + "".join(rows) + "</tbody></table></div>")


def _spread(mean: float, std: float, digits: int) -> str:
    if mean != mean:
        return "&ndash;"
    return f"{mean:.{digits}f}" + ("" if std != std else f" &plusmn; {std:.{digits}f}")


def _curves(runs: list[Finished]) -> plt.Figure:
    figure, axes = plt.subplots(figsize=(7.5, 4), layout="constrained")
    for setting in dict.fromkeys(run.setting for run in runs):
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
    axes.legend(fontsize=7)
    return figure


def _image(figure: plt.Figure, text: str) -> str:
    held = io.BytesIO()
    figure.savefig(held, format="png", dpi=110)
    plt.close(figure)
    return f"<img alt='{html.escape(text, quote=True)}' src='{_data(held.getvalue())}'>"


def _partition_picture(runs: list[Finished]) -> str:
    for run in runs:
        picture = run.folder / "partition.png"
        if picture.exists():
            return (f"<details><summary>who owns which classes (seed {int(run.options['seed'])})</summary>"
                    f"<img alt='images by client and class' src='{_data(picture.read_bytes())}'></details>")
    return ""


def _data(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()


def _line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:120]


def main(argv: list[str] | None = None) -> int:
    """Write the report; the exit status."""
    parser = Parser(prog="report.py", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--results_dir", type=Path, default=ROOT / "results", help="where the runs are")
    folder = parser.parse(argv).results_dir
    try:
        if not folder.is_dir():
            raise InputError(f"--results_dir {folder}: no such folder")
        found = {path.name: read(path) for path in sorted(folder.iterdir()) if path.is_dir()}
        runs = [run for run in found.values() if isinstance(run, Finished)]
        table = summarise(runs)
        text = page(table, runs, {name: why for name, why in found.items() if isinstance(why, str)})
        write_whole(folder / "report.html", lambda file: file.write(text.encode()))
        write_whole(folder / "summary.csv", lambda file: table.to_csv(file, index=False, float_format="%.6g"))
    except InputError as error:
        print(f"report.py: error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"report.py: error: {error.filename or folder}: {error.strerror or error}", file=sys.stderr)
        return 2
    print(f"{len(runs)} runs in {folder / 'report.html'} and {folder / 'summary.csv'}"
          + "".join(f"\nleft out: {name}: {why}" for name, why in found.items() if isinstance(why, str)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
