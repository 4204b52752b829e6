#!/usr/bin/env bash
# What wants a GPU, in order of worth, in at most nine minutes; called again with the same folder, it goes on.
#
#     bash benchmarks/on_gpu.sh DATA --out FOLDER      # DATA: a folder with CIFAR-100 as train.npz and test.npz
set -euo pipefail
here=$(cd "$(dirname "$0")/.." && pwd)
export PYTHONPATH="$here:$here/src${PYTHONPATH:+:$PYTHONPATH}"
exec python -m benchmarks.on_gpu "$@"
