#!/usr/bin/env bash
# What attackers find of RVE-PFL at five betas, and of its controls, at a first and a last round.
#   benchmarks/leakage.sh cpu   mnist10k, 5 rounds of 2, a narrow choice of attacks: some 90 minutes on two cores
#   benchmarks/leakage.sh gpu   MNIST and CIFAR-10, 50 rounds of 5, every attack at its default budget
# Interrupted, it goes on where it stopped. Then: python report.py
set -euo pipefail
cd "$(dirname "$0")/.."
# Public images: MNIST's other 60,000, or Fashion-MNIST's; CIFAR-10 has nothing but what no client owns.
narrow=(--attack analytic latent_decoder latent_likelihood --images 16 --train_epochs 8)
declare -A public=([mnist10k]=mnist [mnist]=fmnist [cifar]=unowned)
case ${1:?cpu or gpu} in
    cpu) sets=(mnist10k) rounds=5 epochs=2 saved=(1 5) attack=("${narrow[@]}") ;;
    gpu) sets=(mnist cifar) rounds=50 epochs=5 saved=(1 25 50) attack=(--clients 0 1 2) ;;
    *) echo "leakage.sh: SCALE $1: choose cpu or gpu" >&2; exit 2 ;;
esac
look() {   # NAME FLAG...: train a run, unless it is finished, and attack it, unless it was
    .venv/bin/python RVE-PFL.py --resume --run_name "leakage-$data-$1" --dataset "$data" --rounds $rounds \
        --local_ep $epochs --save_rounds "${saved[@]}" "${@:2}"
    .venv/bin/python attack/mi_attack.py --run "leakage-$data-$1" --rounds "${saved[@]}" \
        --public "${public[$data]}" "${attack[@]}"
}
for data in "${sets[@]}"; do
    for beta in 0 1e-6 1e-5 1e-4 1e-3; do
        look "beta$beta" --kl_weight $beta
    done
    for method in lg_fedavg fedavg; do
        look $method --method $method
    done
done
