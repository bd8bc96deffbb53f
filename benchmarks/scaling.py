"""What a run costs as it grows: time and memory over clients and rounds, and the wait before the first step.

    python benchmarks/scaling.py

Writes docs/scaling.csv and docs/scaling.png. Clients: 10 MNIST images each, at half size so that 1,000
private encoders (14 MB each) fit on a disk; two rounds, the second timed. Rounds: `mnist10k`, 10 clients, one
local epoch each. Some 30 GB of disk are used, under --folder, and given back. Linux only.
"""
import csv
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from _path import Script, count, guarded
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

import datasets
from utils import ROOT

CLIENTS = (10, 30, 100, 300, 1000)
ROUNDS = 30
IMAGES = 10   # a client


def half_size(folder: Path, clients: int) -> str:
    """A data set of IMAGES MNIST images a client, each pixel the mean of 2 x 2; its name."""
    data = datasets.load("mnist10k", ROOT / "data")
    images = data.images[:IMAGES * clients].reshape(-1, 14, 2, 14, 2, 1).mean((2, 4)).astype(np.uint8)
    labels = data.labels[:IMAGES * clients]
    np.savez(folder / f"half{clients}.npz", train_images=images[1:], train_labels=labels[1:],
             test_images=images[:1], test_labels=labels[:1])
    return f"half{clients}"


def watch(folder: Path, *flags: str) -> list[dict]:
    """Run RVE-PFL.py and return, a round, its seconds and the memory seen by its end, in MB; the first row
    has the seconds before the first step too."""
    name = f"run{time.time_ns()}"
    command = [sys.executable, str(ROOT / "RVE-PFL.py"), *flags, "--run_name", name,
               "--results_dir", str(folder), "--models_dir", str(folder / "models")]
    start, ready, peaks, path = time.monotonic(), None, {}, folder / name / "rounds.csv"
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while process.poll() is None:
        if ready is None and (folder / name / "partition.png").exists():   # the last thing before round 1
            ready = time.monotonic() - start
        done = path.read_text().count("deployed") if path.exists() else 0
        peaks[done + 1] = max(peaks.get(done + 1, 0), resident(process.pid))
        time.sleep(0.05)
    if process.returncode:
        sys.exit(2)   # it has said why
    with open(path) as file:
        rounds = [row for row in csv.DictReader(file) if row["stage"] == "deployed"]
    return [{"round": r, "seconds": float(row["seconds"]), "megabytes": peaks.get(r, 0),
             "startup": ready if r == 1 else ""} for r, row in enumerate(rounds, 1)]


def resident(pid: int) -> float:
    """Anonymous memory of a process in MB: what it cannot give back."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024


def picture(rows: list[dict], path: Path) -> None:
    """Seconds a round and memory, over clients and over rounds."""
    figure = Figure(figsize=(9, 6), layout="constrained")
    FigureCanvasAgg(figure)
    for column, (kind, key) in enumerate((("clients", "clients"), ("rounds", "round"))):
        part = [row for row in rows if row["over"] == kind]
        for line, (name, unit) in enumerate((("seconds", "seconds a round"), ("megabytes", "memory, MB"))):
            axes = figure.add_subplot(2, 2, 2 * line + column + 1, xlabel=key, ylabel=unit)
            axes.plot([row[key] for row in part], [row[name] for row in part], ".-", color="tab:blue")
            axes.set_ylim(bottom=0)
            axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


@guarded
def main(argv: list[str] | None = None) -> None:
    parser = Script(__file__, __doc__)
    parser.add_argument("--folder", type=Path, help="where the runs' files go for the while (the system's "
                                                    "temporary folder if not given)")
    parser.add_argument("--clients", type=count, nargs="+", default=CLIENTS)
    args, rows = parser.parse_args(argv), []
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        for clients in args.clients:
            found = watch(folder, "--dataset", half_size(folder, clients), "--data_dir", name, "--partition",
                          "iid", "--num_users", str(clients), "--rounds", "2", "--local_ep", "1")
            rows.append({"over": "clients", "clients": clients, **found[-1], "startup": found[0]["startup"]})
            print(rows[-1], flush=True)
        found = watch(folder, "--dataset", "mnist10k", "--rounds", str(ROUNDS), "--local_ep", "1")
        rows += [{"over": "rounds", "clients": 10, **row} for row in found]
    with open(ROOT / "docs" / "scaling.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows([{key: f"{value:.4g}" if isinstance(value, float) else value
                           for key, value in row.items()} for row in rows])
    picture(rows, ROOT / "docs" / "scaling.png")
    for row in rows:
        print(row)


if __name__ == "__main__":
    sys.exit(main())
