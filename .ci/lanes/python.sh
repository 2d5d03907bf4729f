# Lanes that test the Python code, the benchmarks and the documentation.
# shellcheck shell=bash

lane_architecture() {
    python -m pytest -q tests/test_architecture.py tests/test_ci.py
}

lane_style() {
    ruff check .
    ruff format --check .
    mypy
}

lane_tests() {
    python -m pytest -q --durations=10
}

# Results are checked. The times are not judged, because another lane runs at the same time.
lane_benchmarks() {
    python -m pytest -q benchmarks --benchmark-only --benchmark-disable-gc -m "not large" -k "not train_step"
}

lane_reliability() {
    python -m tests.reliability --quick
}

lane_docs() {
    local example
    mkdocs build --strict --site-dir "$TMPDIR/site"
    for example in "$PWD"/examples/*.py; do
        (cd "$TMPDIR" && python "$example")
    done
}
