"""Self-tests: before Triton's kernels of an op first run on a GPU, one call on integers must match the reference.

Errors of a compiler show only on the user's GPU. The result is cached for this GPU, driver, PyTorch, Triton, assembler and
source of the kernels, in the folder that ``LARES_FAST_CACHE`` names.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.metadata
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lares_fast._errors import InputError
from lares_fast._transfer import capturing
from lares_fast.verify import cache
from lares_fast.verify.tolerance import judge

if TYPE_CHECKING:
    from lares_fast.verify.cases import Case, Results

_CACHE = "self_test"

# Largest error that passes, relative to the largest number of a result or to 1. It allows a few roundings, but not one wrong
# product of integers.
_TOLERANCE = {torch.float32: 2.0**-12, torch.float16: 2.0**-8, torch.bfloat16: 2.0**-6}

# The key of a self-test is (op, device, dtype, variant). _known holds the results, _trying holds the keys of the self-tests
# that run now, and _own holds the threads that run them.
_known: dict[tuple[Any, ...], str | None] = {}
_trying: set[tuple[Any, ...]] = set()
_own: set[int] = set()
# Guards _trying, and wakes waiting threads when a self-test ends.
_changed = threading.Condition()


def refusal(op: str, device: torch.device, dtype: torch.dtype, **variant: Any) -> str | None:
    """Return why the kernels of ``op`` must not run on ``device``, or ``None`` if their self-test passed.

    ``variant`` chooses among the kernels of the op. The first call runs the self-test. Calls from other threads wait for
    its result.
    """
    key = (op, device, dtype, *sorted(variant.items()))
    if key in _known:
        return _known[key]
    if threading.get_ident() in _own:
        # This call belongs to a self-test: waiting for the result would never end.
        return None
    with _changed:
        while key in _trying:
            if capturing(device):
                raise _untested(op)
            _changed.wait()
        if key in _known:
            return _known[key]
        _trying.add(key)
    try:
        _known[key] = _result(op, device, dtype, variant)
        return _known[key]
    finally:
        with _changed:
            _trying.discard(key)
            _changed.notify_all()


def _untested(op: str) -> RuntimeError:
    return RuntimeError(
        f"The kernels of {op} were not tested on this GPU before the graph capture: call {op} once before the capture, "
        "or run lares-fast warmup."
    )


def _result(op: str, device: torch.device, dtype: torch.dtype, variant: dict[str, Any]) -> str | None:
    """Return the cached result, or run the self-test and cache its result."""
    key = {"op": op, "dtype": str(dtype), **variant, **identity(device)}
    stored = (cache.read(_CACHE, key) or {}).get("fault", 0)
    if stored is None or (isinstance(stored, str) and stored.isprintable()):
        return stored
    if capturing(device):
        raise _untested(op)
    try:
        # A new thread does not inherit the caller's fake tensors, autocast or graph.
        with ThreadPoolExecutor(1) as pool:
            fault = pool.submit(_run_in_own_thread, op, device, dtype, variant).result()
    except Exception as error:
        if not can_fall_back(error):
            raise
        return _cannot_compile(error)
    # If the result cannot be stored, the next process runs the self-test again.
    with suppress(InputError):
        cache.write(_CACHE, key, {"fault": fault})
    return fault


def _run_in_own_thread(op: str, device: torch.device, dtype: torch.dtype, variant: dict[str, Any]) -> str | None:
    _own.add(threading.get_ident())
    try:
        # The backward must run in this thread: autograd's thread for the device may be blocked by a caller that waits for
        # this self-test.
        with torch.autograd.set_multithreading_enabled(False):
            return run(op, device, dtype, **variant)
    finally:
        _own.discard(threading.get_ident())


def run(op: str, device: torch.device, dtype: torch.dtype, **variant: Any) -> str | None:
    """Call the kernels of ``op`` twice on integers, and return what is wrong with the results, or ``None``."""
    from lares_fast.verify import cases

    case = cases.case(op, integers=True, **variant)
    first, again = (case.results("triton", dtype, device) for _ in range(2))
    if (fault := _difference(case, first, dtype)) is not None:
        return f"its self-test failed on this GPU, {op}: {fault}"
    for one, other in zip(first.parts(), again.parts(), strict=True):
        for name in one:
            if not torch.equal(one[name], other[name]):
                return f"its self-test failed on this GPU, {op}: two calls gave different results for {name}"
    return None


def _difference(case: Case, results: Results, dtype: torch.dtype) -> str | None:
    """Return how ``results`` differ from the reference, or ``None``."""
    truth = case.truth(dtype)
    for name, expected in truth.exact.items():
        if not torch.equal(results.exact[name], expected):
            return f"{name} is not exact"
    if not case.exact:
        twin = case.twin(dtype)
        verdicts = judge("forward", results.forward, twin.forward, truth.forward)
        if case.differentiable:
            verdicts += judge("gradient", results.gradients, twin.gradients, truth.gradients)
        return next((verdict.fault for verdict in verdicts if verdict.fault), None)
    for name, expected in {**truth.forward, **truth.gradients}.items():
        error = ({**results.forward, **results.gradients}[name].double() - expected).abs().max().item()
        # In this form of the comparison a NaN is an error too.
        if not error <= _TOLERANCE[dtype] * max(1.0, expected.abs().max().item()):
            return f"{name} has an error of {error:.3g}"
    return None


def identity(device: torch.device) -> dict[str, str]:
    """Return everything that can change the results of compiled kernels."""
    launch = importlib.import_module("lares_fast.kernels._launch")
    major, minor = torch.cuda.get_device_capability(device)
    return {
        "gpu": f"{torch.cuda.get_device_name(device)}, compute capability {major}.{minor}",
        "driver": _driver(),
        "torch": f"{torch.__version__}, CUDA {torch.version.cuda}",
        "triton": importlib.metadata.version("triton"),
        "ptxas": ".".join(map(str, launch._ptxas(10 * major + minor))),
        "kernels": _sources(),
    }


def _driver() -> str:
    try:
        return Path("/proc/driver/nvidia/version").read_text().splitlines()[0]
    except (OSError, IndexError):
        return f"CUDA {torch._C._cuda_getDriverVersion()}"  # type: ignore[attr-defined]


@functools.cache
def _sources() -> str:
    """Return a checksum of the sources of all kernels."""
    package = importlib.import_module("lares_fast.kernels")
    files = sorted(Path(next(iter(package.__path__))).glob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


def can_fall_back(error: Exception) -> bool:
    """Return whether another backend may run the call after ``error``.

    It may if a kernel does not compile or does not fit. It may not if the GPU became unusable.
    """
    errors = importlib.import_module("triton.errors")
    return isinstance(error, (errors.TritonError, OSError)) or "C compiler" in str(error)


def _cannot_compile(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"its kernels cannot be compiled or loaded here ({type(error).__name__}: {text[:300]})"
