"""Measure the peak of one core: fp32 fused multiply-adds a second, at the SIMD level of the kernels."""

from __future__ import annotations

import ctypes
import functools
import subprocess
import tempfile
from pathlib import Path

from lares_fast import _native

_ROUNDS = 10_000_000


def level() -> str:
    """Return the SIMD level that is measured: ``LARES_FAST_SIMD``, or else the best level of this CPU."""
    return str(_native.build_info()["simd"])


def flags() -> list[str]:
    """Return the compiler's flags for this level."""
    return ["-mavx2", "-mfma"] if level() == "avx2" else ["-march=native"]


@functools.cache
def _library() -> ctypes.CDLL:
    source = Path(__file__).with_suffix(".cpp")
    with tempfile.TemporaryDirectory() as folder:
        built = Path(folder) / "fma_peak.so"
        subprocess.run(["c++", "-O2", *flags(), "-shared", "-fPIC", source, "-o", built], check=True)
        return ctypes.CDLL(str(built))


def flops() -> int:
    """Run the loop once (about 30 ms) and return the number of floating-point operations."""
    flops = _library().fma_flops
    flops.restype, flops.argtypes = ctypes.c_long, [ctypes.c_long]
    return flops(_ROUNDS)
