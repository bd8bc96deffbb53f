#!/usr/bin/env bash
# The README's table of held-out accuracy: every method on three data sets, two classes a client, 10 clients.
#   benchmarks/accuracy.sh [SEED]
# Some two and a half hours on two CPU cores, most of it CIFAR-10. Interrupted, it goes on where it stopped.
set -euo pipefail
cd "$(dirname "$0")/.."
seed=${1:-1}
for method in rve_pfl local lg_fedavg fedavg; do
    .venv/bin/python RVE-PFL.py --resume --seed "$seed" --method $method --dataset mnist10k --rounds 5 --local_ep 2
    .venv/bin/python RVE-PFL.py --resume --seed "$seed" --method $method --dataset fmnist --rounds 4 --local_ep 2
    .venv/bin/python RVE-PFL.py --resume --seed "$seed" --method $method --dataset cifar --rounds 6 --local_ep 5
done
