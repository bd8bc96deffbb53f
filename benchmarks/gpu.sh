#!/usr/bin/env bash
# What this program has to show on a GPU. Neither command has ever run on one; both end in time, whatever happens.
#   benchmarks/gpu.sh          under 10 minutes on an H100: the tests on CUDA, among them equality with the CPU to
#                              rounding; MNIST, 100 clients x 10 rounds x 10 local epochs, in under 4 minutes;
#                              benchmarks/speed.py. A line a step, and a status of 1 if one failed
#   benchmarks/gpu.sh study    under 30 minutes: the study behind the README's table at the paper's scale, 10 clients,
#                              100 rounds x 10 local epochs, the runs that matter most first. Called again, it goes
#                              on where it stopped
# On a machine lent for 10 minutes: MINUTES=9, and a run that is cut off starts anew, since its files are lost.
# From the environment:
#   OUT        folder for rounds.csv, server.csv and log.txt, of all runs (results/gpu)
#   MINUTES    after which it stops (9.5; study: 29)
#   DATA_DIR   where mnist.npz, fmnist.npz and cifar.npz are (data); what needs one that is not there waits
#   RESULTS_DIR, MODELS_DIR   where the runs are (results, saved_models), which the next call goes on with
#   PYTHON     the interpreter (.venv/bin/python; where there is none, python3 or python)
#   SCALE=toy  a CPU and a few steps, to see whether these scripts work; SETS, METHODS: of the study, fewer
set -uo pipefail
cd "$(dirname "$0")/.."
mode=${1:-check} scale=${SCALE:-paper}
case $mode-$scale in
    check-paper | check-toy) default=9.5 ;;
    study-paper | study-toy) default=29 ;;
    *) echo "gpu.sh: MODE $mode, SCALE $scale: choose check or study, paper or toy" >&2; exit 2 ;;
esac
out=${OUT:-results/gpu} data=${DATA_DIR:-data} results=${RESULTS_DIR:-results} models=${MODELS_DIR:-saved_models}
python=$(command -v "${PYTHON:-.venv/bin/python}" python3 python | head -n 1)
seconds=$(awk -v m="${MINUTES:-$default}" 'BEGIN { if (m !~ /^[0-9.]+$/ || m <= 0) exit 1; printf "%d", 60 * m }') ||
    { echo "gpu.sh: MINUTES $MINUTES: must be a number over 0" >&2; exit 2; }
mkdir -p "$out" || exit 2
device=cuda clients=100 rounds=10 epochs=10 study_clients=10 study_rounds=100 study_epochs=10 batch=256
limit=240 tests="" speed=(--device cuda --repeats 3)
if [ "$scale" = toy ]; then
    device=cpu clients=4 rounds=2 epochs=1 study_clients=2 study_rounds=2 study_epochs=1 batch=16
    tests="test_cuda and rounding" speed=(--help)   # its workloads have one size
elif ! why=$("$python" -c 'import sys, torch; torch.cuda.is_available() or sys.exit("PyTorch finds no GPU")' 2>&1)
then
    echo "gpu.sh: $python: ${why##*$'\n'}; SCALE=toy tries the scripts on a CPU" >&2
    exit 2
fi
left() { echo $((seconds - SECONDS)); }
failed=0 late=()
step() {   # NAME SECONDS COMMAND...: at most so long, and no longer than is left; one line says how it ended
    local most=$2 began=$SECONDS status
    [ "$most" -le "$(left)" ] || most=$(left)
    if [ "$most" -le 0 ]; then
        late+=("$1: no time left")
        return
    fi
    echo "== $1: ${*:3}" >> "$out/log.txt"
    timeout --kill-after=20 "$most" "${@:3}" >> "$out/log.txt" 2>&1   # told to end, RVE-PFL.py writes a checkpoint
    status=$?
    case $status in
        0) echo "ok      $1, $((SECONDS - began)) s" ;;
        124 | 137) late+=("$1: not done in $((SECONDS - began)) s") ;;
        *) echo "FAILED  $1 (status $status): $(tail -n 1 "$out/log.txt")"; failed=1 ;;
    esac
}
train() {   # NAME SECONDS SET FLAG...: one run, unless it is finished or its images are not there
    if [ ! -e "$data/$3.npz" ]; then
        late+=("$1: no $data/$3.npz")
        return
    fi
    step "$1" "$2" "$python" RVE-PFL.py --resume --run_name "gpu-$scale-$1" --device $device --local_bs $batch \
        --data_dir "$data" --results_dir "$results" --models_dir "$models" \
        --dataset "$3" "${@:4}"
    gather   # after each, since what comes next may be cut off
}
gather() {   # every run's rows, after the run's name
    local kind file
    for kind in rounds server; do
        for file in "$results"/gpu-"$scale"-*/$kind.csv; do
            [ ! -e "$file" ] || awk -v run="$(basename "$(dirname "$file")")" \
                '{ print (FNR == 1 ? "run" : run) "," $0 }' "$file"
        done | awk 'NR == 1 { head = $0; print } $0 != head' > "$out/$kind.csv"
    done
}
check() {
    # tests/test_cuda.py tests the CPU always, and CUDA where it is.
    step tests 150 "$python" -m pytest -q tests/test_cuda.py tests/test_graphed.py tests/test_stacked.py -k "$tests"
    train "mnist-${clients}x${rounds}x$epochs" $limit mnist --num_users $clients --rounds $rounds \
        --local_ep $epochs --checkpoint_seconds 600   # each of 100 encoders has 79 MB
    step speed "$(left)" "$python" benchmarks/speed.py "${speed[@]}"
    [ ${#late[@]} = 0 ] || failed=1
}
study() {
    local set method common
    for method in ${METHODS:-rve_pfl nbafl nbafl_prox fedavg local lg_fedavg fedper}; do   # the claim on all sets first
        for set in ${SETS:-mnist fmnist cifar}; do
            common=(--method "$method" --partition shards --num_users $study_clients
                    --rounds $study_rounds --local_ep $study_epochs)
            [ "$method" = local ] || common+=(--aggregation mean)   # so that methods are compared, and not servers
            train "$set-$method" "$seconds" "$set" "${common[@]}"
        done
    done
}
$mode
[ ${#late[@]} = 0 ] || printf 'LATE    %s\n' "${late[@]}"
exit $failed
