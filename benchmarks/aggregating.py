"""Seconds and memory of aggregating many MNIST heads, by rule.

    python benchmarks/aggregating.py                150 heads, each rule in a process of its own
    python benchmarks/aggregating.py --rules threat --heads 1000
"""
import resource
import subprocess
import sys
import time

import torch
from _path import Script, count, guarded

from models import Classifier
from server.base import Round, Setting
from server.rules import RULES
from utils import keep_freed_memory


def measure(rule: str, heads: int) -> str:
    """Seconds a call, first on honest heads, then with a fifth turned round; the process's peak memory."""
    keep_freed_memory()
    torch.manual_seed(1)
    network = Classifier((1, 28, 28), 10).eval()
    sent = {f"classifier.{name}": value for name, value in network.state_dict().items()}
    uploads = {k: {name: value + 0.01 * torch.randn_like(value) for name, value in sent.items()}
               for k in range(heads)}
    server = RULES[rule].server(Setting(clients=heads))
    seconds = []
    for r in range(1, 5):
        if r == 3:
            for k in range(heads // 5):
                for name, value in sent.items():
                    uploads[k][name].mul_(-2).add_(3 * value)
        started = time.perf_counter()
        server(Round(r, sent, uploads, dict.fromkeys(uploads, 100)))
        seconds.append(time.perf_counter() - started)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return (f"{rule:<18} {heads} heads: {seconds[1]:5.2f} s, with a fifth turned round and doubled "
            f"{seconds[3]:5.2f} s; peak {peak:.2f} GiB")


@guarded
def main(argv: list[str] | None = None) -> None:
    parser = Script(__file__, __doc__)
    parser.add_argument("--heads", type=count, default=150)
    parser.add_argument("--rules", nargs="+", choices=RULES, default=list(RULES))
    args = parser.parse_args(argv)
    if len(args.rules) == 1:
        print(measure(args.rules[0], args.heads))
        return
    for rule in args.rules:
        subprocess.run([sys.executable, __file__, "--rules", rule, "--heads", str(args.heads)], check=True)


if __name__ == "__main__":
    sys.exit(main())
