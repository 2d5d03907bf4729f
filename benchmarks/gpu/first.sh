#!/usr/bin/env bash
# The first run on a GPU with its results in $OUT; see README.md beside this file for the options, such as --only.
set -euo pipefail
cd "$(dirname "$0")/../.."
exec "${PYTHON:-python3}" benchmarks/gpu/first.py --out "${OUT:-gpu-results}" "$@"
