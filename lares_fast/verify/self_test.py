"""Canaries: before Triton's kernels of an op are first used on a GPU, one call of integers must come out as the reference's.

What compilers do to a kernel shows on the user's GPU alone. The verdict is kept per GPU, driver, PyTorch, Triton, assembler and
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

from lares_fast.verify import cache
from lares_fast.verify.tolerance import judge

if TYPE_CHECKING:
    from lares_fast.verify.cases import Case, Results

# Of the largest number of a result: a few roundings, far less than one wrong product of integers.
_TOLERANCE = {torch.float32: 2.0**-12, torch.float16: 2.0**-8, torch.bfloat16: 2.0**-6}

# (op, device, dtype, variant) -> what the canary found; those that are being tried; and the threads that try them.
_known: dict[tuple[Any, ...], str | None] = {}
_trying: set[tuple[Any, ...]] = set()
_own: set[int] = set()
# Guards the three, and tells those who wait that a canary has ended.
_changed = threading.Condition()


def refusal(op: str, device: torch.device, dtype: torch.dtype, **variant: Any) -> str | None:
    """Why the kernels of ``op`` must not run on ``device``, or ``None``; ``variant`` says which of them.

    The first to ask has them tried, and everybody else who asks meanwhile waits for the verdict.
    """
    key = (op, device, dtype, *sorted(variant.items()))
    if key in _known:
        return _known[key]
    if threading.get_ident() in _own:
        # A canary's own call: to wait for its verdict would be to wait for itself.
        return None
    with _changed:
        while key in _trying:
            if _capturing(device):
                raise _untried(op)
            _changed.wait()
        if key in _known:
            return _known[key]
        _trying.add(key)
    try:
        _known[key] = _verdict(op, device, dtype, variant)
        return _known[key]
    finally:
        with _changed:
            _trying.discard(key)
            _changed.notify_all()


def _untried(op: str) -> RuntimeError:
    return RuntimeError(
        f"The kernels of {op} were not tried on this GPU before the graph capture: call {op} once before, "
        "or run lares-fast warmup."
    )


def _verdict(op: str, device: torch.device, dtype: torch.dtype, variant: dict[str, Any]) -> str | None:
    about = {"op": op, "dtype": str(dtype), **variant, **identity(device)}
    stored = (cache.read("self_test", about) or {}).get("fault", 0)
    if stored is None or isinstance(stored, str):
        return stored
    if _capturing(device):
        raise _untried(op)
    try:
        # A thread of its own has no fake tensors, no autocast and no graph of the call that asks.
        with ThreadPoolExecutor(1) as apart:
            fault = apart.submit(_as_own, op, device, dtype, variant).result()
    except Exception as error:
        if not can_fall_back(error):
            raise
        return _sentence(error)
    # Where it cannot be kept, the next process tries again.
    with suppress(OSError):
        cache.write("self_test", about, {"fault": fault})
    return fault


def _as_own(op: str, device: torch.device, dtype: torch.dtype, variant: dict[str, Any]) -> str | None:
    _own.add(threading.get_ident())
    try:
        # The backward stays in this thread: that of the device may be held by a caller who waits for this verdict.
        with torch.autograd.set_multithreading_enabled(False):
            return run(op, device, dtype, **variant)
    finally:
        _own.discard(threading.get_ident())


def run(op: str, device: torch.device, dtype: torch.dtype, **variant: Any) -> str | None:
    """What is wrong with the kernels of ``op`` on ``device``: one call of integers, twice."""
    from lares_fast.verify import cases

    case = cases.case(op, integers=True, **variant)
    first, again = (case.results("triton", dtype, device) for _ in range(2))
    if (fault := _wrong(case, first, dtype)) is not None:
        return f"its self-test failed on this GPU, {op}: {fault}"
    for one, other in zip(first.parts(), again.parts(), strict=True):
        for name in one:
            if not torch.equal(one[name], other[name]):
                return f"its self-test gave two answers on this GPU, {op}: {name}"
    return None


def _wrong(case: Case, results: Results, dtype: torch.dtype) -> str | None:
    truth = case.truth(dtype)
    for name, want in truth.exact.items():
        if not torch.equal(results.exact[name], want):
            return f"{name} is not exact"
    if not case.exact:
        twin = case.twin(dtype)
        verdicts = judge("forward", results.forward, twin.forward, truth.forward)
        if case.differentiable:
            verdicts += judge("gradient", results.gradients, twin.gradients, truth.gradients)
        return next((verdict.fault for verdict in verdicts if verdict.fault), None)
    for name, want in {**truth.forward, **truth.gradients}.items():
        error = ({**results.forward, **results.gradients}[name].double() - want).abs().max().item()
        # A NaN is an error too.
        if not error <= _TOLERANCE[dtype] * max(1.0, want.abs().max().item()):
            return f"{name} by {error:.3g}"
    return None


def identity(device: torch.device) -> dict[str, str]:
    """All that can change what compiled kernels do."""
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
    package = importlib.import_module("lares_fast.kernels")
    files = sorted(Path(next(iter(package.__path__))).glob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def can_fall_back(error: Exception) -> bool:
    """Whether another backend may take the call: a kernel that does not compile or fit, not a GPU that is beyond use."""
    errors = importlib.import_module("triton.errors")
    return isinstance(error, (errors.TritonError, OSError)) or "C compiler" in str(error)


def _sentence(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"its kernels cannot be compiled or loaded here ({type(error).__name__}: {text[:300]})"
