#!/usr/bin/env bash
# The tables of docs/threat-model.md: rules x behaviours x share of malicious clients x partition.
#   benchmarks/threat_model.sh cpu   mnist10k, 3 rounds of 1 local epoch: about an hour on two cores
#   benchmarks/threat_model.sh gpu   MNIST and CIFAR-10, 20 rounds of 5
# Interrupted, it goes on where it stopped.
set -euo pipefail
cd "$(dirname "$0")/.."
side_by_side() {   # one process of one thread a core: small heads gain nothing from two
    .venv/bin/python benchmarks/threat_model.py "$@" --prepare
    for i in $(seq 0 $((jobs - 1))); do
        OMP_NUM_THREADS=1 .venv/bin/python benchmarks/threat_model.py "$@" --part "$i" "$jobs" > /dev/null &
    done
    wait
    .venv/bin/python benchmarks/threat_model.py "$@" --table
}
case ${1:?cpu or gpu} in
    cpu) jobs=$(nproc); side_by_side ;;
    gpu) jobs=1; for data in mnist cifar; do side_by_side --dataset $data --rounds 20 --local_ep 5; done ;;
    *) echo "threat_model.sh: SCALE $1: choose cpu or gpu" >&2; exit 2 ;;
esac
