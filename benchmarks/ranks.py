"""What a second process gains with small clients: 50 of 50 CIFAR-sized images each, batch 10, SGD.

    python benchmarks/ranks.py

One process of one thread, one of two, and two of one, by turns; a figure is the median over the rounds of all
turns but their first, evaluation and files included. Images are random: only their shape matters here.
"""
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
from _path import Script, guarded

from utils import ROOT

CLIENTS, IMAGES, ROUNDS, TURNS = 50, 56, 12, 3   # 56 images are 50 to train on and 6 to test on
FLAGS = ["--dataset", "drawn", "--partition", "iid", "--method", "fedavg", "--num_users", str(CLIENTS),
         "--local_bs", "10", "--optimizer", "sgd", "--lr", "0.1", "--local_ep", "1", "--rounds", str(ROUNDS),
         "--device", "cpu", "--overwrite"]


def seconds(folder: Path, processes: int, threads: int) -> list[float]:
    """Seconds of each round but the first."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    subprocess.run([sys.executable, *(torchrun if processes > 1 else []), str(ROOT / "RVE-PFL.py"), *FLAGS,
                    "--data_dir", str(folder), "--results_dir", str(folder), "--models_dir",
                    str(folder / "models"), "--run_name", "run"],
                   check=True, stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": str(threads)})
    rounds = pd.read_csv(folder / "run" / "rounds.csv").drop_duplicates("round")
    return rounds["seconds"].tolist()[1:]


@guarded
def main(argv: list[str] | None = None) -> None:
    Script(__file__, __doc__).parse_args(argv)
    drawn, took, count = np.random.default_rng(1), {(1, 1): [], (1, 2): [], (2, 1): []}, CLIENTS * IMAGES
    with tempfile.TemporaryDirectory() as name:
        np.savez(Path(name) / "drawn.npz", train_labels=drawn.integers(0, 10, count - 1),
                 train_images=drawn.integers(0, 256, (count - 1, 32, 32, 3), np.uint8),
                 test_labels=np.array([9]), test_images=np.zeros((1, 32, 32, 3), np.uint8))
        for _ in range(TURNS):
            for (processes, threads), rounds in took.items():
                rounds += seconds(Path(name), processes, threads)
    first = statistics.median(took[1, 1])
    for (processes, threads), rounds in took.items():
        median = statistics.median(rounds)
        print(f"{processes} x {threads} threads: {median:.2f} s a round, {first / median:.2f}x")


if __name__ == "__main__":
    sys.exit(main())
