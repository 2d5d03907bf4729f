# Lanes that compile C++ and CUDA sources.
# shellcheck shell=bash

# A test that is skipped means that a tool is missing, which is an error here.
lane_native() {
    python -m pytest -q -rs --durations=0 -m native_cpp tests/cpp | tee "$TMPDIR/native.txt"
    if grep -q '^SKIPPED' "$TMPDIR/native.txt"; then return 1; fi
}

lane_emulator() {
    python -m pytest -q --durations=5 -m emulator tests/emulator/test_emulator.py
}

# The packaging test stores the objects of its wheel in the folder that LARES_FAST_CUDA_BUILD names. The static tests read them
# there, so that nvcc compiles the sources once.
lane_cuda() {
    export CCACHE_BASEDIR="$TMPDIR" LARES_FAST_CUDA_BUILD="$TMPDIR/cuda"
    python -m pytest -q --durations=5 -m packaging tests/packaging/test_cuda.py
    python -m pytest -q --durations=5 -m emulator tests/emulator/test_static.py
}

lane_packaging() {
    export CCACHE_BASEDIR="$TMPDIR"
    python -m pytest -q --durations=5 -m packaging tests/packaging --ignore=tests/packaging/test_cuda.py
}
