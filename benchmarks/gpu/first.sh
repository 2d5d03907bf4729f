#!/usr/bin/env bash
# Run first.py with its results in $OUT. README.md in this folder describes the options, such as --only.
set -euo pipefail
cd "$(dirname "$0")/../.."
exec "${PYTHON:-python3}" benchmarks/gpu/first.py --out "${OUT:-gpu-results}" "$@"
