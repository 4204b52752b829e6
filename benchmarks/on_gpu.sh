#!/usr/bin/env bash
# Measures on one GPU all that benchmarks/README.md reports, into benchmarks/results. Each line goes on its own.
#
#     bash benchmarks/on_gpu.sh DATA      # a folder with CIFAR-100 as train.npz and test.npz
set -euo pipefail
cd "$(dirname "$0")/.."
data=$(realpath "$1")
export PYTHONPATH=.:src
run() { echo "+ $*"; "$@" || echo "failed: $*" >&2; }

for compile in "" "--compile" "--compile reduce-overhead"; do
    # shellcheck disable=SC2086
    run python -m benchmarks.step --device cuda --case cifar --rounds 31 $compile --name "step-gpu-cifar${compile//[ -]/_}"
    # shellcheck disable=SC2086
    run python -m benchmarks.step --device cuda --case imagenet224 --batch 128 --precision bf16 --rounds 15 $compile \
        --name "step-gpu-imagenet224-bf16${compile//[ -]/_}"
done
run python -m benchmarks.step --device cuda --case imagenet fpn segmentation --rounds 15 --name step-gpu-others
run python -m benchmarks.growth --device cuda --clock wall

epoch() {
    run python -m benchmarks.epoch --epochs 4 --case cifar --random-teacher cifar/resnet56 --name "epoch-gpu-$1" -- \
        --data diffkd.data.Arrays --data.train "$data/train.npz" --data.test "$data/test.npz" "${@:2}"
}
epoch eager
epoch compiled --compile true
epoch graphs --compile reduce-overhead
