"""Read the environment variables that change how the package runs. docs/env.md describes them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lares_fast._errors import InputError

# The names of the precisions in which a model computes its products.
PRECISIONS = ("fp32", "bf16")
BACKENDS = ("auto", "reference", "native", "triton", "cuda", "layers")
SIMD_LEVELS = ("auto", "generic", "avx2", "avx512", "amx")
CUDA_PRODUCTS = ("3xtf32", "ffma")
# With these values, our kernels, torch and MKL run the same instructions on every x86-64 CPU.
STRICT = {"LARES_FAST_SIMD": "generic", "ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "COMPATIBLE"}

# Variables that MKL, oneDNN and cuBLAS read. They choose instructions, the order of sums, or the precision of products.
_OF_LIBRARIES = (
    "MKL_CBWR",
    "MKL_ENABLE_INSTRUCTIONS",
    "MKL_DYNAMIC",
    *(
        f"{library}_{name}"
        for library in ("ONEDNN", "DNNL")
        for name in ("MAX_CPU_ISA", "CPU_ISA_HINTS", "DEFAULT_FPMATH_MODE")
    ),
    "NVIDIA_TF32_OVERRIDE",
    "CUBLAS_WORKSPACE_CONFIG",
)


def backend() -> str:
    """Return ``LARES_FAST_BACKEND``: the backend that every op must use, or ``auto``."""
    value = os.environ.get("LARES_FAST_BACKEND") or "auto"
    if value not in BACKENDS:
        raise InputError(f"LARES_FAST_BACKEND must be one of {', '.join(BACKENDS)}, but got {value!r}.")
    return value


def simd() -> str:
    """Return ``LARES_FAST_SIMD``: the instruction set of the native CPU kernels, or ``auto`` for the best one of this CPU."""
    value = os.environ.get("LARES_FAST_SIMD") or "auto"
    if value not in SIMD_LEVELS:
        raise InputError(f"LARES_FAST_SIMD must be one of {', '.join(SIMD_LEVELS)}, but got {value!r}.")
    return value


def strict() -> bool:
    """Return ``LARES_FAST_STRICT``: whether CPU results must not depend on the kind of x86-64 CPU."""
    value = os.environ.get("LARES_FAST_STRICT") or "0"
    if value not in ("0", "1"):
        raise InputError(f"LARES_FAST_STRICT must be 0 or 1, but got {value!r}.")
    return value == "1"


def set_strict() -> None:
    """With ``LARES_FAST_STRICT=1``, set the variables of :data:`STRICT` that are not set.

    This has an effect only before torch is imported. Raises :class:`InputError` for another value of ``LARES_FAST_STRICT``.
    """
    if strict():
        for name, value in STRICT.items():
            os.environ.setdefault(name, value)


def check_strict(cpu_capability: str) -> None:
    """Raise :class:`InputError` if a variable that ``LARES_FAST_STRICT=1`` needs is missing, or was set too late for torch.

    ``cpu_capability`` is the instruction set that torch uses.
    """
    wrong = [f"{name}={value}" for name, value in STRICT.items() if os.environ.get(name) != value]
    if not wrong and cpu_capability != "DEFAULT":
        wrong = ["ATEN_CPU_CAPABILITY=default"]
    if not os.environ.get("OMP_NUM_THREADS"):
        wrong.append("OMP_NUM_THREADS (one number for all machines)")
    if wrong:
        raise InputError(f"LARES_FAST_STRICT=1 needs {', '.join(wrong)} in the environment before Python starts.")


def cuda_products() -> str:
    """Return ``LARES_FAST_CUDA_PRODUCTS``: how the CUDA kernels multiply fp32, on tensor cores or one term after the other."""
    value = os.environ.get("LARES_FAST_CUDA_PRODUCTS") or "3xtf32"
    if value not in CUDA_PRODUCTS:
        raise InputError(f"LARES_FAST_CUDA_PRODUCTS must be one of {', '.join(CUDA_PRODUCTS)}, but got {value!r}.")
    return value


def of_libraries() -> dict[str, str]:
    """Return the variables of PyTorch's libraries that can change a bit of a result, or ``unset``."""
    return {name: os.environ.get(name) or "unset" for name in _OF_LIBRARIES}


def cache_folder() -> Path:
    """Return ``LARES_FAST_CACHE``: the folder that keeps the results of kernel self-tests and the tuned launch settings."""
    if value := os.environ.get("LARES_FAST_CACHE"):
        return Path(value)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lares_fast"


def set_passive_omp() -> None:
    """Let OpenMP threads sleep while they wait for each other, unless ``OMP_WAIT_POLICY`` is set.

    This has an effect only before torch is imported. Threads that do not sleep make small models ten times slower on a machine
    with other work.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


@contextmanager
def temporarily(name: str, value: str) -> Iterator[None]:
    """Set the variable ``name`` of another tool to ``value`` within the ``with`` block."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
