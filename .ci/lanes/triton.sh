# Lanes that test the Triton kernels and the GPU commands on a machine without a GPU.
# shellcheck shell=bash disable=SC2154

# The Triton that the newest CUDA build of torch installs.
older_triton=3.8.0
# The Triton of the oldest CUDA builds of torch that are in use on Hopper.
hopper_triton=3.6.0

# use_triton VERSION: install this Triton into a folder that is first on the path.
use_triton() {
    pip install -q --no-deps --target "$TMPDIR/triton-$1" "triton==$1"
    export PYTHONPATH="$TMPDIR/triton-$1"
    test "$(python -P -c 'import triton; print(triton.__version__)')" = "$1"
}

lane_rehearsal() {
    python benchmarks/gpu/first.py --rehearse --jobs 1 --out "$TMPDIR/first"
}

lane_gpu_commands() {
    python -m pytest -q -m compiled --durations=5 tests/cli
    python -m pytest -q -m gpu -rs tests/test_gpu.py
    python -m lares_fast gpu-bench --rehearse --out "$TMPDIR/bench"
}

lane_triton_stub() {
    python -m pytest -q -m "compiled and not hopper_triton" --durations=5 tests/triton/test_stub.py
}

lane_triton_interpreted() {
    python -m pytest -q -m interpreted --durations=5
}

lane_triton_newest() {
    python -m pytest -q -m "compiled and (newest_triton or not older_triton)" --durations=5 tests/triton/test_gate.py
}

lane_triton_older() {
    use_triton "$older_triton"
    python -m pytest -q -m "compiled and older_triton" --durations=5 tests/triton/test_gate.py
}

lane_triton_hopper() {
    use_triton "$hopper_triton"
    # NumPy 2.5 raises an error where older versions warn.
    python -m pytest -q -m interpreted -W "error:Conversion of an array:DeprecationWarning" tests/triton/test_interpreter.py
    python -m pytest -q -m "compiled and hopper_triton" --durations=5 tests/triton/test_gate.py tests/triton/test_stub.py
}
