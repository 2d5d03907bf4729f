"""The steps of ``lares-fast gpu-day``, each run in a process of its own.

With ``rehearse`` the CPU stands in for the GPU and Triton's interpreter for its compiler, as far as that goes.
"""

from __future__ import annotations

import copy
import functools
import importlib.metadata
import os
import pickle
import platform
import re
import shutil
import subprocess
import threading
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
    compare_results,
    device_of,
    equal,
    faults_of,
    gpu_backends,
    kernels_of,
    ops_with_triton,
    passed,
    skipped,
    verdict,
)

Result = dict[str, Any]
_PROPERTIES = (
    "name", "major", "minor", "multi_processor_count", "total_memory", "L2_cache_size", "shared_memory_per_block_optin",
)  # fmt: skip


def record(rehearse: bool, quick: bool) -> Result:
    """What the machine is."""
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
        # Never their values: paths may be among them.
        "environment": sorted(name for name in os.environ if re.match("TRITON|TORCH|CUDA|PYTORCH|LARES_FAST|NVIDIA", name)),
    }
    if rehearse:
        return passed(**facts, gpu="none: a rehearsal on the CPU")
    if not torch.cuda.is_available():
        return verdict(
            ["torch sees no GPU: " + ("it was built without CUDA" if torch.version.cuda is None else "check the driver")]
        )
    gpus = []
    for number in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(number)
        gpus.append({name: getattr(about, name, None) for name in _PROPERTIES})
    return passed(**facts, gpus=gpus, self_test=self_test.identity(torch.device("cuda", 0)), capability=_native.capability())


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,clocks.max.mem,power.limit", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return "nvidia-smi does not answer"
    return "; ".join(said.split("\n")).strip("; ")


def alone(rehearse: bool, quick: bool) -> Result:
    """PyTorch's own product against fp64."""
    faults = []
    for name in ("float32", "bfloat16"):
        a, b = (torch.randn(256, 256).to(DTYPES[name]) for _ in range(2))
        found = (a.to(device_of(rehearse)) @ b.to(device_of(rehearse))).cpu().double()
        error = (found - a.double() @ b.double()).abs().max().item()
        if not error <= (1e-2 if name == "float32" else 0.5):
            faults.append(f"torch's product in {name} is off by {error:.3g}")
    return verdict(faults)


def hello(rehearse: bool, quick: bool) -> Result:
    """The first kernel of each kind."""
    facts, faults = {"cuda module": _native.capability()}, []
    with kernels_of(rehearse):
        one = torch.ones(1, 8, device=device_of(rehearse))
        target = torch.zeros(1, dtype=torch.int64, device=one.device)
        found = ops.target_logprob(one, torch.cat((one, one)), target, backend="triton")
    if abs(found.item() + 0.6931472) > 1e-5:
        faults.append(f"the first Triton kernel gave {found.item()} for -log 2")
    return verdict(faults, **facts)


def correctness(rehearse: bool, quick: bool, op: str, backend: str, dtype: str, variant: dict[str, Any]) -> Result:
    """One variant of an op's kernels: the tolerance rule, the same bits twice, and integers exactly."""
    if backend == "cuda" and not (said := _native.capability()).startswith("ok"):
        return skipped(said)
    kind, device = DTYPES[dtype], device_of(rehearse)
    with kernels_of(rehearse):
        case = cases.case(op, integers=False, **variant)
        began = time.monotonic()
        results = case.results(backend, kind, device)
        # Compiling is most of it.
        first_call = round(time.monotonic() - began, 2)
        verdicts, differ = compare_results(case, results, kind)
        faults = faults_of(verdicts, differ)
        if not equal(results, case.results(backend, kind, device)):
            faults.append("two calls gave two answers")
        if backend == "triton" and (fault := self_test.try_out(op, torch.device(device), kind, **variant)):
            faults.append(fault)
    numbers = {one.name: {"error": one.error, "twin": one.twin_error, "bound": one.bound} for one in verdicts}
    worst = max((one.error / one.bound for one in verdicts if one.bound), default=0.0)
    return verdict(faults, first_call_s=first_call, worst=round(worst, 3), law=numbers)


def repeat(rehearse: bool, quick: bool) -> Result:
    """The same bits every time, while another stream loads the GPU."""
    times, faults = 2 if rehearse else 20 if quick else 200, []
    with kernels_of(rehearse):
        for op, backend in gpu_backends(rehearse):
            # PyTorch's layers take the sizes that the kernels do not.
            case = cases.case(op, integers=False, **({"width": 48} if backend == "layers" else {}))
            first = case.results(backend, torch.float32, device_of(rehearse))
            for number in range(1, times):
                if not rehearse:
                    with torch.cuda.stream(torch.cuda.Stream()):
                        torch.randn(512 + 8 * number, 512, device="cuda").square_().sum()
                again = case.results(backend, torch.float32, device_of(rehearse))
                if not equal(first, again):
                    faults.append(f"{op} {backend}: call {number} gave other bits")
                    break
    return verdict(faults, times=times)


def boundaries(rehearse: bool, quick: bool) -> Result:
    """Nothing, much, and tensors that are no neat blocks."""
    device, faults = device_of(rehearse), []

    def logprob(hidden: Tensor, items: Tensor, target: Tensor) -> Tensor:
        return ops.target_logprob(hidden, items, target, backend="triton")

    with kernels_of(rehearse):
        items = torch.randn(33, 64, device=device)
        if logprob(items[:0], items, torch.zeros(0, dtype=torch.int64, device=device)).shape != (0,):
            faults.append("no rows gave something")
        rows = 5 if rehearse else 70_000
        hidden, target = torch.randn(rows, 64, device=device), torch.arange(rows, device=device) % 33
        expected = ops.target_logprob(hidden, items, target, backend="reference")
        sliced = torch.cat((hidden.new_zeros(1), hidden.flatten()))[1:].view(rows, 64)
        for name, given in {"rows": hidden, "strides": hidden.T.contiguous().T, "an offset of 4 bytes": sliced}.items():
            error = (logprob(given, items, target) - expected).abs().max().item()
            if not error <= 1e-4:
                faults.append(f"{rows} {name}: off by {error:.3g}")
        broken = hidden[:3].clone()
        broken[0, 0], broken[1, 0] = torch.nan, torch.inf
        if not logprob(broken, items, target[:3])[0].isnan():
            faults.append("a NaN went unseen")
    return verdict(faults)


def streams(rehearse: bool, quick: bool) -> Result:
    """Side streams, other GPUs, threads, copies."""
    faults = []
    model = import_module("lares_fast").LARES(
        import_module("lares_fast").LARESConfig(n_items=50, hidden_size=32, inner_size=32)
    )
    pickle.loads(pickle.dumps(copy.deepcopy(model)))
    with kernels_of(rehearse):
        case = cases.case("linear_cross_entropy", integers=False)
        first = case.results("triton", torch.float32, device_of(rehearse))
        found: list[cases.Results] = []
        threads = [
            threading.Thread(target=lambda: found.append(case.results("triton", torch.float32, device_of(rehearse))))
            for _ in range(1 if rehearse else 4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if len(found) != len(threads) or not all(equal(first, one) for one in found):
            faults.append("threads got other answers")
        if not rehearse:
            with torch.cuda.stream(torch.cuda.Stream()):
                faults += (
                    [] if equal(first, case.results("triton", torch.float32, "cuda")) else ["a side stream got another answer"]
                )
            for number in range(1, torch.cuda.device_count()):
                if not equal(first, case.results("triton", torch.float32, f"cuda:{number}")):
                    faults.append(f"cuda:{number} got another answer")
    return verdict(faults)


def graphs(rehearse: bool, quick: bool) -> Result:
    """A first launch within a capture is refused, and torch.compile takes the op whole."""
    if rehearse:
        return skipped("there is no graph capture on the CPU")
    faults = []
    hidden, items = torch.randn(40, 64, device="cuda"), torch.randn(500, 64, device="cuda")
    target = torch.arange(40, device="cuda")
    call = functools.partial(ops.target_logprob, items=items, target=target, backend="triton")
    try:
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            call(hidden)
        faults.append("a first launch within a capture was not refused")
    except RuntimeError as error:
        if "before the graph capture" not in str(error):
            faults.append(f"a first launch within a capture: {error}")
    for mode in ("default", "reduce-overhead"):
        compiled = torch.compile(lambda x: call(x) * 2, fullgraph=True, mode=mode)
        if not torch.allclose(compiled(hidden), call(hidden) * 2):
            faults.append(f"torch.compile in mode {mode} differs")
    return verdict(faults)


def training(rehearse: bool, quick: bool, autocast: bool) -> Result:
    """Steps of a small model whose every op has Triton kernels: the reference against the kernels, from one seed."""
    steps = 2 if rehearse else 30 if quick else 200
    reference = _losses("reference", steps, rehearse, autocast)
    _dispatch.calls.clear()
    kernels = _losses("triton", steps, rehearse, autocast)
    used = ("recurrence", "linear_cross_entropy")
    faults = [f"{op} never ran on triton" for op in used if not _dispatch.calls[op, "triton"]]
    worst = max(abs(a - b) / abs(a) for a, b in zip(reference, kernels, strict=True))
    # Under autocast the two round at other places.
    bound = 0.05 if autocast else 0.01
    facts = {"steps": steps, "first loss": reference[0], "last loss": reference[-1], "worst": worst}
    # A NaN is no small difference.
    faults += [] if worst <= bound else [f"losses differ by up to {worst:.2g} of them"]
    return verdict(faults, **facts)


def _losses(backend: str, steps: int, rehearse: bool, autocast: bool) -> list[float]:
    lares = import_module("lares_fast")
    device = device_of(rehearse)
    B = 4 if rehearse else 16
    items = torch.randint(1, 60, (B, 12), generator=torch.Generator().manual_seed(0)).to(device)
    # On the CPU: the host plans by them.
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


def verdicts(rehearse: bool, quick: bool) -> Result:
    """What dispatch will make of all this: the canaries' own verdicts, which are kept."""
    if rehearse:
        return skipped("a rehearsal decides nothing for a GPU")
    found = {}
    for op in ops_with_triton():
        for name, dtype in DTYPES.items():
            for variant in cases.shipped(op):
                said = self_test.refusal(op, torch.device("cuda", 0), dtype, **variant)
                found[f"{op} {name} {variant}"] = said or "verified on this GPU"
    return passed(found=found)


STEPS: dict[str, Callable[..., Result]] = {
    "record": record,
    "alone": alone,
    "hello": hello,
    "correctness": correctness,
    "repeat": repeat,
    "boundaries": boundaries,
    "streams": streams,
    "graphs": graphs,
    "training": training,
    "verdicts": verdicts,
}
