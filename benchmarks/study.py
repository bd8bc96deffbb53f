"""The study: every training run behind a published figure, as one queue that goes on where it stopped.

    python benchmarks/study.py                       all that is missing, in order, two at a time
    python benchmarks/study.py --only shards small   these parts alone
    python benchmarks/study.py --list                what is there and what is missing; runs nothing

A run that has finished leaves config.json, rounds.csv and the last round of clients.csv under --out, without
checkpoints and without paths of this machine. A run whose files are there, made with the same options, is not made
again. Interrupted or killed, the queue goes on from the last checkpoint of each run. `python report.py --docs`
puts --out into the pages.
"""
import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from _path import ROOT, Script, count, guarded

from methods import METHODS
from options import args_parser
from reporting.summary import BOOKKEEPING_OPTIONS
from runs import configs
from utils import InputError, write_whole

FULL: Final = {"mnist": (5, 2), "fmnist": (5, 2), "cifar": (6, 5)}   # rounds, local epochs
SMALL: Final = {"mnist10k": (5, 2), "fmnist10k": (5, 2), "cifar10k": (8, 5)}
SMALL_BATCH: Final = {"local_bs": 64}
RELEASED: Final = {"local_bs": 32, "augment": "none", "lr": 1e-3}   # until a network knows its images by heart
LABELS: Final[dict[str, dict]] = {   # the plain mean everywhere, so that methods are compared and not servers
    "rve_pfl": {"method": "rve_pfl", "aggregation": "mean"},
    "local": {"method": "local"},
    "lg_fedavg": {"method": "lg_fedavg"},
    "fedper": {"method": "fedper"},
    "fedavg": {"method": "fedavg"},
    "nbafl-L1": {"method": "nbafl"},
    "nbafl-LT": {"method": "nbafl", "exposures": None},   # None: as often as there are rounds
    "trunk": {"method": "rve_pfl_trunk", "head_lr": 1},
    "trunk-slow": {"method": "rve_pfl_trunk"},   # its head learns as slowly as rve_pfl's
    "trunk-class": {"method": "rve_pfl_trunk", "head_lr": 1, "prior": "class", "kl_weight": 1e-2},
    "class": {"method": "rve_pfl", "aggregation": "mean", "head_lr": 1, "prior": "class", "kl_weight": 0.1},
    "rve_pfl-resplit": {"method": "rve_pfl", "aggregation": "mean", "resplit": True, **RELEASED},
    "nbafl-resplit": {"method": "nbafl", "resplit": True, **RELEASED},
    "rve_pfl-held_out": {"method": "rve_pfl", "aggregation": "mean", **RELEASED},
    "nbafl-held_out": {"method": "nbafl", **RELEASED},
    "nbafl_prox": {"method": "nbafl_prox"},
    "client_dp-8": {"method": "client_dp", "epsilon": 8},
}
COMPARED: Final = ("rve_pfl", "nbafl-L1", "nbafl_prox", "fedavg", "local", "lg_fedavg", "fedper", "nbafl-LT")
ATTACKED: Final = ("attack.csv", "attack.json", "attack_latents.csv")
FOLDERS: Final = {"data_dir": "data", "results_dir": "results", "models_dir": "saved_models"}


@dataclass(frozen=True)
class Cell:
    """One run.

    Args:
        label: of LABELS: its method and that method's options.
        scale: rounds and local epochs.
        more: other options.
    """

    dataset: str
    partition: str
    label: str
    seed: int
    scale: tuple[int, int]
    more: dict = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Of its folder."""
        clients = f"-{self.more['num_users']}clients" if "num_users" in self.more else ""
        rounds, epochs = self.scale
        return f"{self.dataset}-{self.partition}{clients}-{rounds}x{epochs}-{self.label}-seed{self.seed}"

    @property
    def options(self) -> dict:
        """What its command says. A data set NAME10k is trained with the defaults of NAME."""
        own, (rounds, epochs) = LABELS[self.label], self.scale
        row = METHODS[own["method"]]
        tuned = {option.name: row.default(option, self.dataset.removesuffix("10k"), self.partition)
                 for option in row.by_dataset.get(self.dataset.removesuffix("10k"), {})}
        chosen = {key: rounds if value is None else value for key, value in own.items()}
        return {"dataset": self.dataset, "partition": self.partition, "seed": self.seed, "rounds": rounds,
                "local_ep": epochs, **tuned, **chosen, **self.more}

    @property
    def argv(self) -> list[str]:
        return [word for name, value in self.options.items()
                for word in ([f"--{name}"] if value is True else [f"--{name}", str(value)])]

    @property
    def work(self) -> float:
        """Roughly how long it takes, beside the others."""
        images = 10_000 if self.dataset.endswith("10k") else 60_000
        network = 3 if METHODS[LABELS[self.label]["method"]].network.has_encoder else 1
        return images * self.scale[0] * self.scale[1] * network * (1.5 if "cifar" in self.dataset else 1)


def cells_of(part: str) -> Iterator[Cell]:
    """The runs of one of PARTS, those that matter most first."""
    match part:
        case "shards":
            for seed in (1, 2, 3):
                for dataset, scale in FULL.items():
                    for label in COMPARED:
                        yield Cell(dataset, "shards", label, seed, scale)
        case "long":
            for datasets, seed, more in ((SMALL, 11, SMALL_BATCH), (FULL, 1, {})):
                for dataset in datasets:
                    for label in ("rve_pfl", "nbafl-L1", "nbafl_prox", "fedavg", "local"):
                        yield Cell(dataset, "shards", label, seed, (100, 1), more)
        case "mixed":
            for seed in (1, 2):
                for partition in ("dirichlet", "iid"):
                    for dataset, scale in FULL.items():
                        for label in COMPARED:
                            yield Cell(dataset, partition, label, seed, scale)
        case "resplit":
            for dataset, scale in (("cifar10k", (6, 5)), ("cifar", (6, 5)), ("fmnist", (6, 5))):
                for label in ("rve_pfl-resplit", "nbafl-resplit", "rve_pfl-held_out", "nbafl-held_out"):
                    yield Cell(dataset, "shards", label, 1, scale)
        case "dp":
            for clients in (150, 1000):
                for label in ("client_dp-8", "fedavg"):
                    yield Cell("mnist10k", "iid", label, 1, (50, 1), {"num_users": clients, "local_bs": 10})
        case "small":
            for seed in (11, 12, 13):
                for dataset, scale in SMALL.items():
                    for partition in ("iid", "dirichlet", "shards"):
                        for label in (*COMPARED[:-1], "trunk", "trunk-slow", "class", "trunk-class"):
                            yield Cell(dataset, partition, label, seed, scale, SMALL_BATCH)
        case "twenty":
            for seed in (11, 12, 13):
                for partition in ("iid", "dirichlet", "shards"):
                    for label in ("local", "trunk", "trunk-slow", "fedper"):
                        yield Cell("cifar10k", partition, label, seed, SMALL["cifar10k"],
                                   {"num_users": 20, **SMALL_BATCH})


PARTS: Final = {
    "shards": "two classes a client, seven methods, three seeds",
    "small": "10,000 images of each data set, three partitions, three seeds",
    "twenty": "20 clients of 500 CIFAR-10 images, three partitions, three seeds",
    "long": "100 rounds of one local epoch, 10,000 images first",
    "mixed": "Dirichlet and IID, two seeds",
    "resplit": "the released protocol beside held-out images",
    "dp": "client-level DP with many clients",
}


class Queue:
    """Makes runs that are missing, several at a time.

    Args:
        args: the command's: folders, ``workers``.
    """

    def __init__(self, cells: list[Cell], args: argparse.Namespace):
        self.args = args
        self.missing = [cell for cell in cells if not self.there(cell)]
        self.left, self.done, self.began = sum(cell.work for cell in self.missing), 0.0, time.monotonic()
        self.lock, self.running, self.stopped, self.failed = threading.Lock(), set[subprocess.Popen](), False, 0

    def there(self, cell: Cell) -> bool:
        """Whether a finished run with the same options, also those at their defaults, was published."""
        path = self.args.out / cell.name / "config.json"
        if not path.exists():
            return False
        config, asked = configs.read(path), vars(args_parser(cell.argv))
        found = config["options"]
        names = asked.keys() & found.keys() - (BOOKKEEPING_OPTIONS - {"seed"})
        return config["status"] == "finished" and all(found[name] == asked[name] for name in names)

    def make(self, cell: Cell) -> None:
        """Train one run in a process of its own, and publish it."""
        folders = [word for name in FOLDERS for word in (f"--{name}", str(getattr(self.args, name)))]
        argv = [sys.executable, str(ROOT / "RVE-PFL.py"), *cell.argv, "--run_name", cell.name, "--resume",
                *folders]
        with self.lock:
            if self.stopped or self.there(cell):   # another queue may have made it meanwhile
                return
            process = subprocess.Popen(argv, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL,
                                       stderr=subprocess.PIPE, text=True, start_new_session=True)
            self.running.add(process)
        said = (process.communicate()[1].strip().splitlines() or ["no reason given"])[-1]
        with self.lock:
            self.running.discard(process)
            if self.stopped:
                return
            place = self.args.results_dir / cell.name
            if process.returncode:
                self.fails(cell, f"{said}; if that run is not wanted, move {place} away")
                return
            try:
                publish(place, self.args.out / cell.name)
            except (OSError, ValueError) as error:
                self.fails(cell, f"cannot be published from {place} ({error})")
                return
            shutil.rmtree(self.args.models_dir / cell.name, ignore_errors=True)
            self.done += cell.work
            spent = time.monotonic() - self.began
            hours = spent / self.done * (self.left - self.done) / 3600
            print(f"finished {cell.name}; the rest takes about {hours:.1f} hours", flush=True)

    def fails(self, cell: Cell, why: str) -> None:
        """Say so, and go on with the others."""
        self.failed += 1
        print(f"FAILED   {cell.name}: {why}", flush=True)

    def run(self) -> int:
        """All that is missing; the exit status."""
        try:
            with ThreadPoolExecutor(self.args.workers) as pool:
                try:
                    list(pool.map(self.make, self.missing))
                except BaseException:
                    self.stop()
                    raise
        except KeyboardInterrupt:
            print("study.py: stopped; the same command goes on", file=sys.stderr)
            return 130
        return 1 if self.failed else 0

    def stop(self) -> None:
        """Have the runs write a checkpoint and end; start no other."""
        with self.lock:
            self.stopped = True
            for process in self.running:
                process.terminate()


def publish(run: Path, place: Path) -> None:
    """Copy a run's small files: all rounds' means, every client's last round, and what its attacks came to.

    config.json comes last, so that a folder that has one is complete.
    """
    place.mkdir(parents=True, exist_ok=True)
    attacked = [(name, bytes) for name in ATTACKED if (run / name).exists()]
    for name, condense in (("rounds.csv", bytes), ("clients.csv", last_round), *attacked,
                           ("config.json", without_paths)):
        content = condense((run / name).read_bytes())
        write_whole(place / name, lambda file, content=content: file.write(content))   # noqa: B023 - called at once


def last_round(clients: bytes) -> bytes:
    """The head of clients.csv and the rows of its last round, the first column."""
    head, *rows = clients.splitlines(keepends=True)
    if not rows:
        raise ValueError("clients.csv has no rows")
    last = rows[-1].split(b",")[0]
    return head + b"".join(row for row in rows if row.split(b",")[0] == last)


def without_paths(config: bytes) -> bytes:
    """config.json with its folders by their usual names."""
    content = json.loads(config)
    content["options"] |= {name: usual for name, usual in FOLDERS.items() if name in content["options"]}
    return (json.dumps(content, indent=2) + "\n").encode()


@guarded
def main(argv: list[str] | None = None) -> int:
    parser = Script(__file__, __doc__)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART",
                        help="parts, in this order: "
                        + "; ".join(f"{name}: {what}" for name, what in PARTS.items()))
    parser.add_argument("--match", default="", help="only runs whose name has this in it")
    parser.add_argument("--list", action="store_true", help="list runs, and make none")
    parser.add_argument("--workers", type=count, default=2, help="runs at a time, of one thread each")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "reference")
    for name, folder in FOLDERS.items():
        parser.add_argument(f"--{name}", type=Path, default=ROOT / folder)
    args = parser.parse_args(argv)
    cells = [cell for part in dict.fromkeys(args.only) for cell in cells_of(part) if args.match in cell.name]
    if not cells:
        parser.error(f"--match {args.match}: no run of these parts has that in its name; see --list")
    try:
        queue = Queue(cells, args)
        if args.list:
            for cell in cells:
                print("missing" if cell in queue.missing else "there  ", cell.name)
            print(f"{len(cells) - len(queue.missing)} of {len(cells)} runs are there", flush=True)
            return 0
        args.out.mkdir(parents=True, exist_ok=True)
        return queue.run()
    except BrokenPipeError:   # `study.py --list | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (InputError, OSError) as error:
        print(f"study.py: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    for ending in (signal.SIGTERM, signal.SIGHUP):   # as Ctrl-C, also where the terminal goes away
        signal.signal(ending, signal.default_int_handler)
    sys.exit(main())
