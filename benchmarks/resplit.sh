#!/usr/bin/env bash
# Where the released code's 100 % comes from: one training, tested on held-out images and by the released protocol
# (--resplit), until a network without augmentation knows its images by heart. CIFAR-10's 10,000-image test file,
# two classes a client, 10 clients, seed 1, 6 rounds of 5 local epochs, small batches: some forty minutes on one core.
#   benchmarks/resplit.sh
# Interrupted, it goes on where it stopped. Then: python report.py
set -euo pipefail
cd "$(dirname "$0")/.."
[ -e data/cifar10k.npz ] || .venv/bin/python benchmarks/make_10k.py cifar
for method in rve_pfl nbafl; do
    common=(--dataset cifar10k --method $method --rounds 6 --local_ep 5 --local_bs 32 --aggregation mean)
    .venv/bin/python RVE-PFL.py --resume --run_name "resplit-$method-no" "${common[@]}"
    .venv/bin/python RVE-PFL.py --resume --run_name "resplit-$method-yes" "${common[@]}" --resplit
done
