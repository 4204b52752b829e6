#!/usr/bin/env bash
# Measures on one GPU all that benchmarks/README.md reports, into benchmarks/results. Each line goes on its own.
#
#     bash benchmarks/on_gpu.sh DATA      # a folder with CIFAR-100 as train.npz and test.npz
set -euo pipefail
cd "$(dirname "$0")/.."
data=$(realpath "$1")
export PYTHONPATH=.:src
contestants=(alone kd fitnet diffkd checkpointed)
python -c "import diffusers" 2>/dev/null && contestants+=(plain) || echo "no diffusers: without the plain transcription" >&2
run() { echo "+ $*"; "$@" || echo "failed: $*" >&2; }

for compile in "" "--compile" "--compile reduce-overhead"; do
    # shellcheck disable=SC2086
    run python -m benchmarks.step --device cuda --case cifar --contestants "${contestants[@]}" --rounds 31 $compile \
        --name "step-gpu-cifar${compile//[ -]/_}"
    # shellcheck disable=SC2086
    run python -m benchmarks.step --device cuda --case imagenet224 --batch 128 --precision bf16 \
        --contestants "${contestants[@]}" --rounds 15 $compile --name "step-gpu-imagenet224-bf16${compile//[ -]/_}"
done
run python -m benchmarks.step --device cuda --case imagenet --contestants "${contestants[@]}" --rounds 15 --name step-gpu-imagenet
run python -m benchmarks.step --device cuda --case fpn segmentation --contestants "${contestants[@]:2}" --rounds 15 \
    --name step-gpu-dense
run python -m benchmarks.growth --device cuda --clock wall --contestants "${contestants[@]:3}"

epoch() {
    run python -m benchmarks.epoch --epochs 4 --case cifar --random-teacher cifar/resnet56 --name "epoch-gpu-$1" -- \
        --data diffkd.data.Arrays --data.train "$data/train.npz" --data.test "$data/test.npz" "${@:2}"
}
epoch eager
epoch compiled --compile true
epoch graphs --compile reduce-overhead
