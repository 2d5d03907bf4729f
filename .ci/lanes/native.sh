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

# One process, so that both files can use one compilation.
lane_cuda() {
    export CCACHE_BASEDIR="$TMPDIR"
    python -m pytest -q --durations=5 -m "emulator or packaging" tests/emulator/test_static.py tests/packaging/test_cuda.py
}

lane_packaging() {
    export CCACHE_BASEDIR="$TMPDIR"
    python -m pytest -q --durations=5 -m packaging tests/packaging --ignore=tests/packaging/test_cuda.py
}
