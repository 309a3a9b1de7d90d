#!/usr/bin/env bash
# Measures one GPU: layers against cuDNN, scans, training; prints tables, writes records into results/gpu-*.jsonl. Meant to
# take less than ten minutes, half of it layers; that is an estimate until somebody has run it.
#
#     bench/gpu.sh                        on a GPU, best with nothing else running there
#     DEVICE=cpu bench/gpu.sh --smoke     the same path on tiny shapes: shows that it runs, not how fast
#
# Parity comes first: each benchmark holds whatever it is to time against float64 and times nothing where that fails.
# PYTHON names the interpreter (python), OUT the folder of the records (results; without a GPU a temporary one).
set -euo pipefail
cd "$(dirname "$0")/.."

device=${DEVICE:-cuda}
out=${OUT:-$([[ $device == cuda ]] && echo results || mktemp -d)}
dtypes=float32,tf32,bfloat16
if [[ $device == cpu ]]; then
    dtypes=float32,bfloat16
fi

bench() {
    local name=$1 records=$2
    shift 2
    "${PYTHON:-python}" -m statefeed bench "$name" --device="$device" --repeats=5 --output="$out/gpu-$records.jsonl" "$@"
}

mkdir -p "$out"
if [[ $device == cuda ]]; then
    "${PYTHON:-python}" -m pytest -q -m gpu tests
fi
# T from 64 to 4,096, B from 1 to 256, H from 128 to 2,048; dtypes are columns, so that TF32 is never a silent setting.
bench layers layers --dtypes=$dtypes --rules=dsf,gate,gate+1 \
    --shapes=64x256x512,256x128x512,256x64x2048,1024x1x128,1024x32x1024,4096x1x128,4096x8x512 "$@"
bench scan scan --steps=64,1024,16384,65536 --widths=128,2048 "$@"
bench training training --recipe=wikitext103-gru-3x512 --dtypes=$dtypes --rules=bptt,dsf,gate+1 "$@"
