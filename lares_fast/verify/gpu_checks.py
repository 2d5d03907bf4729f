"""Checks of one GPU: the machine, correctness, determinism, boundaries and training. Each runs in a process of its own.

With ``rehearse`` a check runs on the CPU, with Triton's interpreter in place of its compiler. A check that needs a GPU is
skipped then. ``quick`` reduces the work of a check. A check returns its result as plain values, which hold its ``status``.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import time
from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from lares_fast import __version__, _dispatch, _native, ops
from lares_fast.verify import cases, self_test
from lares_fast.verify.comparison import (
    DTYPES,
    Result,
    compare_results,
    device_of,
    faults_of,
    gpu_backends,
    kernels_of,
    ops_with_triton,
    passed,
    same_bits,
    skipped,
    verdict,
)

_PROPERTIES = (
    "name", "major", "minor", "multi_processor_count", "total_memory", "L2_cache_size", "shared_memory_per_block_optin",
)  # fmt: skip


def machine(rehearse: bool, quick: bool) -> Result:
    """Record the GPUs, the driver and the versions of all software."""
    facts: dict[str, Any] = {
        "lares_fast": __version__,
        "python": platform.python_version(),
        "torch": f"{torch.__version__}, CUDA {torch.version.cuda}",
        "triton": _version("triton"),
        "numpy": _version("numpy"),
        "driver": _driver(),
        "date": time.strftime("%Y-%m-%d"),
        "build": {key: value for key, value in _native.build_info().items() if key != "file"},
        "compiler": next((name for name in ("gcc", "cc", "clang") if shutil.which(name)), "none"),
        # The report has the names only, because the values may hold private paths.
        "environment": sorted(name for name in os.environ if re.match("TRITON|TORCH|CUDA|PYTORCH|LARES_FAST|NVIDIA", name)),
    }
    if rehearse:
        return passed(**facts, gpu="none: a rehearsal on the CPU")
    if not torch.cuda.is_available():
        why = "it was built without CUDA" if torch.version.cuda is None else "check the driver"
        return verdict([f"no GPU is visible to torch: {why}"])
    gpus = []
    for number in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(number)
        gpus.append({name: getattr(properties, name, None) for name in _PROPERTIES})
    identity = self_test.identity(torch.device("cuda", 0))
    return passed(**facts, gpus=gpus, self_test_identity=identity, capability=_native.capability())


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,clocks.max.mem,power.limit", "--format=csv,noheader"]
    try:
        printed = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return "nvidia-smi does not answer"
    return "; ".join(printed.split("\n")).strip("; ")


def matmul(rehearse: bool, quick: bool) -> Result:
    """Compare PyTorch's own matrix product with fp64."""
    faults = []
    for name in ("float32", "bfloat16"):
        a, b = (torch.randn(256, 256).to(DTYPES[name]) for _ in range(2))
        product = (a.to(device_of(rehearse)) @ b.to(device_of(rehearse))).cpu().double()
        error = (product - a.double() @ b.double()).abs().max().item()
        if not error <= (1e-2 if name == "float32" else 0.5):
            faults.append(f"torch's matrix product in {name} has an error of {error:.3g}")
    return verdict(faults)


def first_kernel(rehearse: bool, quick: bool) -> Result:
    """Run one small Triton kernel, and load the CUDA module."""
    facts, faults = {"cuda module": _native.capability()}, []
    with kernels_of(rehearse):
        one = torch.ones(1, 8, device=device_of(rehearse))
        target = torch.zeros(1, dtype=torch.int64, device=one.device)
        found = ops.target_logprob(one, torch.cat((one, one)), target, backend="triton")
    if abs(found.item() + 0.6931472) > 1e-5:
        faults.append(f"the first Triton kernel returned {found.item()} instead of -log 2")
    return verdict(faults, **facts)


def correctness(rehearse: bool, quick: bool, op: str, backend: str, dtype: str, variant: dict[str, Any]) -> Result:
    """Check one variant of an op's kernels: the tolerances, the same bits in two calls, and exact results on integers."""
    if backend == "cuda" and not (capability := _native.capability()).startswith("ok"):
        return skipped(capability)
    kind, device = DTYPES[dtype], device_of(rehearse)
    with kernels_of(rehearse):
        case = cases.case(op, integers=False, **variant)
        began = time.monotonic()
        results = case.results(backend, kind, device)
        # Most of this time is compilation.
        first_call = round(time.monotonic() - began, 2)
        verdicts, differ = compare_results(case, results, kind)
        faults = faults_of(verdicts, differ)
        if not same_bits(results, case.results(backend, kind, device)):
            faults.append("two calls gave different bits")
        if backend == "triton" and (fault := self_test.run(op, torch.device(device), kind, **variant)):
            faults.append(fault)
    tensors = {one.name: {"error": one.error, "reference_error": one.twin_error, "bound": one.bound} for one in verdicts}
    worst = max((one.error / one.bound for one in verdicts if one.bound), default=0.0)
    return verdict(faults, first_call_s=first_call, worst=round(worst, 3), tensors=tensors)


def determinism(rehearse: bool, quick: bool) -> Result:
    """Call every op many times, and compare the bits, while another stream keeps the GPU busy."""
    times, faults = 2 if rehearse else 20 if quick else 200, []
    with kernels_of(rehearse):
        for op, backend in gpu_backends(rehearse):
            # The backend "layers" takes the sizes that the kernels do not.
            case = cases.case(op, integers=False, **({"width": 48} if backend == "layers" else {}))
            first = case.results(backend, torch.float32, device_of(rehearse))
            for number in range(1, times):
                if not rehearse:
                    with torch.cuda.stream(torch.cuda.Stream()):
                        torch.randn(512 + 8 * number, 512, device="cuda").square_().sum()
                again = case.results(backend, torch.float32, device_of(rehearse))
                if not same_bits(first, again):
                    faults.append(f"{op} {backend}: call {number} gave other bits than the first")
                    break
    return verdict(faults, times=times)


def boundaries(rehearse: bool, quick: bool) -> Result:
    """Check zero rows, many rows, strided and unaligned tensors, and NaN and infinity in the input."""
    device, faults = device_of(rehearse), []

    def logprob(hidden: Tensor, items: Tensor, target: Tensor) -> Tensor:
        return ops.target_logprob(hidden, items, target, backend="triton")

    with kernels_of(rehearse):
        items = torch.randn(33, 64, device=device)
        if logprob(items[:0], items, torch.zeros(0, dtype=torch.int64, device=device)).shape != (0,):
            faults.append("a call with 0 rows did not return 0 rows")
        rows = 5 if rehearse else 70_000
        hidden, target = torch.randn(rows, 64, device=device), torch.arange(rows, device=device) % 33
        expected = ops.target_logprob(hidden, items, target, backend="reference")
        unaligned = torch.cat((hidden.new_zeros(1), hidden.flatten()))[1:].view(rows, 64)
        inputs = {"contiguous": hidden, "strided": hidden.T.contiguous().T, "at an offset of 4 bytes": unaligned}
        for name, given in inputs.items():
            error = (logprob(given, items, target) - expected).abs().max().item()
            if not error <= 1e-4:
                faults.append(f"{rows} rows, {name}: the error is {error:.3g}")
        broken = hidden[:3].clone()
        broken[0, 0], broken[1, 0] = torch.nan, torch.inf
        found, wanted = (ops.target_logprob(broken, items, target[:3], backend=backend) for backend in ("triton", "reference"))
        if not torch.equal(found[:2].isnan(), wanted[:2].isnan()) or not found[0].isnan():
            faults.append("a NaN or an infinity in the input did not give the NaN of the reference in the output")
    return verdict(faults)


def training(rehearse: bool, quick: bool, autocast: bool) -> Result:
    """Train a small model twice from one seed, on the reference and on Triton kernels, and compare the losses."""
    steps = 2 if rehearse else 30 if quick else 200
    reference = _losses("reference", steps, rehearse, autocast)
    _dispatch.calls.clear()
    kernels = _losses("triton", steps, rehearse, autocast)
    used = ("recurrence", "linear_cross_entropy")
    faults = [f"{op} never ran on triton" for op in used if not _dispatch.calls[op, "triton"]]
    worst = max(abs(a - b) / abs(a) for a, b in zip(reference, kernels, strict=True))
    # Under autocast the two round at different places.
    bound = 0.05 if autocast else 0.01
    facts = {"steps": steps, "first loss": reference[0], "last loss": reference[-1], "worst": worst}
    # In this form of the comparison a NaN is a fault too.
    faults += [] if worst <= bound else [f"the losses differ by up to {worst:.2g} of their size"]
    return verdict(faults, **facts)


def _losses(backend: str, steps: int, rehearse: bool, autocast: bool) -> list[float]:
    lares = import_module("lares_fast")
    device = device_of(rehearse)
    B = 4 if rehearse else 16
    items = torch.randint(1, 60, (B, 12), generator=torch.Generator().manual_seed(0)).to(device)
    # The lengths stay on the CPU, where the launch is planned from them.
    lengths = torch.full((B,), 11)
    torch.manual_seed(0)
    config = lares.LARESConfig(n_items=60, hidden_size=64, inner_size=64, n_pre_layers=1, n_core_layers=1)
    model = lares.LARES(config).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    losses = []
    with kernels_of(rehearse), _dispatch.backend(backend):
        for _ in range(steps):
            optimizer.zero_grad()
            with torch.autocast(device, torch.bfloat16, enabled=autocast):
                states = model.encode(items[:, :11], lengths, num_steps=2)
                loss = ops.linear_cross_entropy(states, model.item_embedding.weight, items[:, 11], skip_pad=True)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return losses


def self_tests(rehearse: bool, quick: bool) -> Result:
    """Run the self-test of every shipped kernel. The results are cached, and decide which backends later calls use."""
    if rehearse:
        return skipped("a rehearsal must not decide which backends a GPU uses")
    found = {}
    for op in ops_with_triton():
        for name, dtype in DTYPES.items():
            for variant in cases.shipped(op):
                fault = self_test.refusal(op, torch.device("cuda", 0), dtype, **variant)
                found[f"{op} {name} {variant}"] = fault or "passed on this GPU"
    return passed(found=found)


CHECKS: dict[str, Callable[..., Result]] = {
    "machine": machine,
    "matmul": matmul,
    "first_kernel": first_kernel,
    "correctness": correctness,
    "determinism": determinism,
    "boundaries": boundaries,
    "training": training,
    "self_tests": self_tests,
}
