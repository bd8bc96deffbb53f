#!/usr/bin/env bash
# The tables of docs/accuracy.md: methods x data sets x partitions x seeds, 10 clients, and the released
# protocol (--resplit) for the two methods that the paper's claim compares.
#   benchmarks/accuracy.sh SCALE [PARTITION [SEED...]]
#     SCALE      paper: 100 rounds of 10 local epochs, for a GPU
#                cpu: 5 x 2 on MNIST and Fashion-MNIST, 6 x 5 on CIFAR-10; hours on two cores
#                mnist10k: 5 x 2 on the data set that ships with the project, some ten minutes
#     PARTITION  shards (default), dirichlet or iid
# Interrupted, it goes on where it stopped. Then: python report.py
set -euo pipefail
cd "$(dirname "$0")/.."
scale=${1:?cpu, paper or mnist10k} partition=${2:-shards} seeds=("${@:3}")
case $scale in
    paper) settings=("mnist 100 10" "fmnist 100 10" "cifar 100 10") ;;
    cpu) settings=("mnist 5 2" "fmnist 5 2" "cifar 6 5") ;;
    mnist10k) settings=("mnist10k 5 2") ;;
    *) echo "accuracy.sh: SCALE $scale: choose paper, cpu or mnist10k" >&2; exit 2 ;;
esac
case $partition in
    shards | dirichlet | iid) ;;   # two classes a client and alpha 0.1 are the program's defaults
    *) echo "accuracy.sh: PARTITION $partition: choose shards, dirichlet or iid" >&2; exit 2 ;;
esac
train() {   # WHAT FLAG...: one run, unless it is finished; the plain mean everywhere, so that methods are compared
    .venv/bin/python RVE-PFL.py --resume --run_name "$data-$partition-${rounds}x$epochs-$1-seed$seed" \
        "${common[@]}" "${@:2}"
}
for seed in "${seeds[@]:-1}"; do
    for setting in "${settings[@]}"; do
        read -r data rounds epochs <<< "$setting"
        common=(--dataset "$data" --partition "$partition" --seed "$seed" --rounds "$rounds" --local_ep "$epochs")
        train local --method local
        common+=(--aggregation mean)
        for method in rve_pfl lg_fedavg fedavg fedper; do
            train $method --method $method
        done
        train nbafl-L1 --method nbafl                                    # an upload is seen once,
        train "nbafl-L$rounds" --method nbafl --exposures "$rounds"      # or once a round
        for method in rve_pfl nbafl; do
            train $method-resplit --method $method --resplit
        done
    done
done
