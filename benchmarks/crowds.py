"""Memory of runs with many clients, by round: what their uploads take.

    python benchmarks/crowds.py [--clients 1000] [--tiny 10000] [--encoders N]

Runs on the CPU. Heads: clients of ten MNIST images who share a whole head of full size, 3.3 MB, weighed by the
threat-aware rule, two rounds. Tiny: clients of ten 8 x 8 images, a twentieth of whom train in each of six rounds.
There nothing, or a last layer, is private. Encoders, if asked for: RVE-PFL itself at full size, one round, whose
private parameters take 79 MB of disk a client. Prints, a round, the seconds and the most anonymous memory: what
the kernel cannot take back. Linux only.
"""
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from _path import Script, guarded, index
from scaling import resident

from utils import ROOT

IMAGES = 10   # a client


def drawn(folder: Path, side: int, clients: int) -> str:
    """A data set of IMAGES random images a client; its name."""
    rng, count = np.random.default_rng(1), IMAGES * clients
    np.savez(folder / "drawn.npz", train_labels=rng.integers(0, 10, count - 1), test_labels=np.array([9]),
             train_images=rng.integers(0, 256, (count - 1, side, side, 1), np.uint8),
             test_images=np.zeros((1, side, side, 1), np.uint8))
    return "drawn"


def by_round(folder: Path, driver: Path, *flags: str) -> list[tuple[float, float]]:
    """Run a driver; each round's seconds, the start with the first, and the most memory in it, in MB."""
    command = [sys.executable, str(driver), *flags, "--run_name", "run", "--overwrite", "--device", "cpu",
               "--data_dir", str(folder), "--results_dir", str(folder), "--models_dir", str(folder / "models")]
    path, found, began = folder / "run" / "server.csv", [0.0], time.monotonic()
    ends: list[float] = []
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while process.poll() is None:
        lines = path.read_text().splitlines() if path.exists() else []
        while len(lines) > 1 and int(lines[-1].split(",")[0]) > len(ends):   # a round's rows are written at once
            ends.append(time.monotonic())
            found.append(0.0)
        found[-1] = max(found[-1], resident(process.pid))
        time.sleep(0.1)
    if process.returncode:
        sys.exit(2)   # it has said why
    seconds = np.diff([began, *ends])
    return list(zip(seconds.tolist(), found, strict=False))


@guarded
def main(argv: list[str] | None = None) -> int:
    parser = Script(__file__, __doc__)
    parser.add_argument("--clients", type=index, default=1000, help="with heads of full size; 0: not run")
    parser.add_argument("--tiny", type=index, default=10_000, help="tiny clients; 0: not run")
    parser.add_argument("--encoders", type=index, default=0, help="clients of rve_pfl, with 79 MB of disk each")
    parser.add_argument("--folder", type=Path, help="where the runs' files go for the while (the system's "
                                                    "temporary folder if not given)")
    parser.add_argument("--driver", type=Path, default=ROOT / "RVE-PFL.py", help="or that of another version")
    args = parser.parse_args(argv)
    common = ("--partition", "iid", "--local_ep", "1", "--local_bs", "9")
    for name, clients, side, flags in (
            ("heads", args.clients, 28, ("--method", "fedavg", "--aggregation", "threat_aware", "--rounds", "2",
                                         "--eval_every", "2")),
            ("tiny", args.tiny, 8, ("--method", "fedper", "--frac", "0.05", "--rounds", "6",
                                    "--eval_every", "6")),
            ("encoders", args.encoders, 28, ("--method", "rve_pfl", "--aggregation", "threat_aware", "--rounds", "1"))):
        if clients:
            with tempfile.TemporaryDirectory(dir=args.folder) as folder:
                data = drawn(Path(folder), side, clients)
                rows = by_round(Path(folder), args.driver, "--dataset", data, "--num_users", str(clients), *common,
                                *flags)
            for number, (seconds, megabytes) in enumerate(rows, 1):
                print(f"{name}, {clients} clients, round {number}: {seconds:.1f} s, {megabytes:.0f} MB",
                      flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
