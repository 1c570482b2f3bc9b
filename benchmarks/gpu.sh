#!/bin/sh
# The day a GPU is there: correctness first, then speed. Eight minutes at most, and nothing is downloaded.
#
#     benchmarks/gpu.sh [OUT]        (default: out/gpu; run it again to go on where it stopped)
#
# Needs torch, Triton and Transformers of that machine; PYTHON names an interpreter. What it found is in
# OUT/gpu.json, and as a table on the screen.
cd "$(dirname "$0")/.." || exit 1
PYTHONPATH="$PWD/src:$PWD" exec "${PYTHON:-python3}" -m benchmarks.gpu.run --out "${1:-out/gpu}"
