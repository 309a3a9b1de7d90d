#!/bin/sh
# Measures one GPU in six stages: preflight, parity, layers, scan, training, forward. Needs torch, triton and numpy
# only.
#
#     statefeed/bench/gpu.sh                              all stages, each under four minutes
#     statefeed/bench/gpu.sh parity layers                only the named stages
#     DEVICE=cpu statefeed/bench/gpu.sh --smoke           tiny shapes, to check that the stages run
#
# PYTHON names the interpreter (.venv/bin/python, else python3), OUT the folder of the records.
set -eu
cd "$(dirname "$0")/../.."
if [ -z "${PYTHON:-}" ]; then
    PYTHON=python3
    if [ -x .venv/bin/python ]; then
        PYTHON=.venv/bin/python
    fi
fi
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
exec "$PYTHON" -m statefeed.bench.gpu --device="${DEVICE:-cuda}" ${OUT:+"--output=$OUT"} "$@"
