#!/usr/bin/env bash
# Run all that needs a GPU: tests, compute-sanitizer, benchmarks, and GPT-2 124M with the four
# optimizers on data/$DATASET, by default data/linux (results/README.md says how to prepare it). The
# output goes to $OUT, by default out-gpu.
#
#     bash scripts/gpu.sh                        all of it
#     bash scripts/gpu.sh tests optimizer        only these
#     PYTHON=python3 OUT=/tmp/figures bash scripts/gpu.sh
#     ITERS=40000 DATASET=openwebtext bash scripts/gpu.sh study study-logs
#
# A failed step does not stop the next one. The exit status is the number of failed steps.
cd "$(dirname "$0")/.." || exit
PYTHON=${PYTHON:-python}
OUT=${OUT:-out-gpu}
# The study's iterations of 65,536 tokens. Weight decay and growth balance after about 10,000,
# 1 / (learning rate * decay): 450 show how the runs start, 40,000 what the rules do. 1,650 are one
# pass over data/linux.
ITERS=${ITERS:-450}
DATASET=${DATASET:-linux}
mkdir -p "$OUT"
names=" $* "
failed=0

for name in "$@"; do
    if ! grep -q "^step $name " "$0"; then
        echo "error: there is no step $name; there are: $(grep -o '^step [a-z-]*' "$0" | cut -c6- | xargs)" >&2
        exit 2
    fi
done

if ! [[ $ITERS =~ ^[1-9][0-9]{2,}$ ]]; then
    echo "error: ITERS=$ITERS must be a whole number, at least 100" >&2
    exit 2
fi

step() { # step NAME COMMAND...: write the output to $OUT/NAME.txt and to the terminal
    [[ $names == "  " || $names == *" $1 "* ]] || return
    echo "== $1: ${*:2}"
    "${@:2}" 2>&1 | tee "$OUT/$1.txt"
    if [ "${PIPESTATUS[0]}" != 0 ]; then
        failed=$((failed + 1))
        echo "== $1 failed"
    fi
}

step machine nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm,clocks.max.mem --format=csv
step versions "$PYTHON" -c 'import sys, torch, triton; print(sys.version, torch.__version__, triton.__version__)'
step tests "$PYTHON" -m pytest -q tests/test_kernels_gpu.py tests/test_optim*.py
# torch's caching allocator leaves no gaps, which would hide an access beyond a tensor
step sanitizer env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --error-exitcode=1 \
    "$PYTHON" -m pytest -q tests/test_kernels_gpu.py -k 'updates_and_sums or beside_a_tensor or beyond_2_to or sums_kept'
step optimizer "$PYTHON" bench.py --what=optimizer --sizes=char,124M,350M,774M,1.5B --impl=triton
step optimizer-not-clipped "$PYTHON" bench.py --what=optimizer --sizes=124M --impl=triton --grad_norm=0.5
step optimizer-torch "$PYTHON" bench.py --what=optimizer --sizes=124M --impl=torch --repeats=5
step train "$PYTHON" bench.py --what=train --batches=32
# 50 checks of the growth, a ramp of a quarter
ramp="--wn_ramp_iters=$((ITERS / 4))"
[[ $ITERS -lt 10000 ]] && ramp+=" --wn_rate=0.1" # 0.01 takes 100 iterations to follow
step study "$PYTHON" compare.py config/train_gpt2_adamw.py "config/train_gpt2_cpr.py --reg_step_size=$((ITERS / 50))" \
    "config/train_gpt2_wn.py $ramp" "config/train_gpt2_wn.py --wn_from={1} $ramp" config/train_gpt2_h.py \
    --seeds=1 --dataset="$DATASET" --batch_size=16 --gradient_accumulation_steps=4 \
    --max_iters="$ITERS" --lr_decay_iters="$ITERS" --warmup_iters=$((ITERS / 10)) \
    --eval_interval=$((ITERS / 3)) --norm_log_interval=$((ITERS / 30)) --out="results/${DATASET}_124M"
step study-logs tar -czf "$OUT/${DATASET}_124M.tar.gz" --exclude='*.pt*' "results/${DATASET}_124M"
exit "$failed"
