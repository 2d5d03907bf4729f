"""No rows, subnormal numbers, -0.0, infinities and NaN give the results of docs/numerics.md on every backend."""

import pytest

from lares_fast import _native
from tests.support.special_numbers import CHECKS

CALLS = [(name, backend) for name, (_, backends) in CHECKS.items() for backend in backends]


@pytest.mark.parametrize(("name", "backend"), [call for call in CALLS if call[1] != "triton"])
def test_the_result_is_the_documented_one(name, backend):
    if backend == "native" and not _native.available()[0]:
        pytest.skip(_native.available()[1])
    for seed in range(6 if backend == "native" else 1):
        CHECKS[name][0](seed, backend)


@pytest.mark.interpreted
@pytest.mark.parametrize("name", [name for name, backend in CALLS if backend == "triton"])
def test_the_kernels_give_the_documented_result(name, monkeypatch):
    from tests.support import triton_interpreter

    with triton_interpreter.interpreted(monkeypatch):
        for seed in range(2):
            CHECKS[name][0](seed, "triton")
