"""The peak that a kernel's share refers to: fp32 fused multiply-adds of one core, measured in the same process."""

from __future__ import annotations

import ctypes
import functools
import subprocess
import tempfile
import time
from pathlib import Path

_ROUNDS = 10_000_000


@functools.cache
def _library() -> ctypes.CDLL:
    source = Path(__file__).with_suffix(".cpp")
    with tempfile.TemporaryDirectory() as folder:
        built = Path(folder) / "fma_peak.so"
        subprocess.run(["c++", "-O2", "-march=native", "-shared", "-fPIC", source, "-o", built], check=True)
        return ctypes.CDLL(str(built))


def flops() -> int:
    """Run the loop once (about 30 ms); returns the floating-point operations done, for :func:`harness.interleave`."""
    flops = _library().fma_flops
    flops.restype, flops.argtypes = ctypes.c_long, [ctypes.c_long]
    return flops(_ROUNDS)


def measure(repeats: int = 5) -> float:
    """FLOP/s of one core: the best of ``repeats``, in CPU time."""
    best = 0.0
    for _ in range(repeats):
        began = time.process_time()
        done = flops()
        best = max(best, done / (time.process_time() - began))
    return best
