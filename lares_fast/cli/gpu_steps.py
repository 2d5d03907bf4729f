"""The steps of ``lares-fast gpu-day``, each run in a process of its own.

With ``rehearse`` the CPU stands in for the GPU and Triton's interpreter for its compiler, as far as that goes.
"""

from __future__ import annotations

import copy
import functools
import os
import pickle
import platform
import re
import shutil
import threading
import time
from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from lares_fast import __version__, _native, ops
from lares_fast.cli import gpu_limits
from lares_fast.cli.steps import (
    DTYPES,
    TABLES,
    device_of,
    equal,
    faults_by_the_law,
    gpu_backends,
    kernels_of,
    ops_with_triton,
    passed,
    skipped,
    verdict,
)
from lares_fast.ops import _canary, _trials, _triton

Result = dict[str, Any]
_PROPERTIES = (
    "name", "major", "minor", "multi_processor_count", "total_memory", "L2_cache_size", "shared_memory_per_block_optin",
)  # fmt: skip


def _variants(op: str, quick: bool, backend: str = "triton") -> list[dict[str, Any]]:
    if backend == "layers":
        return [{"width": 48}] if quick else [{"width": 48}, {"width": 256}]
    return [{}] if quick or op in TABLES else _trials.shipped(op)


def record(rehearse: bool, quick: bool) -> Result:
    """What the machine is."""
    facts: dict[str, Any] = {
        "lares_fast": __version__,
        "python": platform.python_version(),
        "torch": f"{torch.__version__}, CUDA {torch.version.cuda}",
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
    return passed(**facts, gpus=gpus, canary=_canary.identity(torch.device("cuda", 0)), capability=_native.capability())


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


def load(rehearse: bool, quick: bool) -> Result:
    """Every variant compiled and loaded, and how long that took."""
    if rehearse:
        return skipped("nothing is compiled in a rehearsal")
    seconds = {}
    for op in ops_with_triton():
        for name, dtype in DTYPES.items():
            began = time.monotonic()
            with _triton.anywhere():
                for variant in _variants(op, quick or rehearse):
                    _trials.trial(op, integers=True, **variant).results("triton", dtype, "cuda")
            seconds[f"{op} {name}"] = round(time.monotonic() - began, 2)
    torch.cuda.synchronize()
    return passed(seconds=seconds)


def canaries(rehearse: bool, quick: bool) -> Result:
    """Integers, exactly."""
    faults = []
    with kernels_of(rehearse):
        for op in ops_with_triton():
            for name, dtype in DTYPES.items():
                for variant in _variants(op, quick or rehearse):
                    fault = _canary.try_out(op, torch.device(device_of(rehearse)), dtype, **variant)
                    faults += [f"{op} {name} {variant}: {fault}"] if fault else []
    return verdict(faults)


def correctness(rehearse: bool, quick: bool) -> Result:
    """The tolerance law."""
    faults = []
    with kernels_of(rehearse):
        for op, backend in gpu_backends(rehearse):
            for name, dtype in DTYPES.items():
                if backend == "cuda" and name != "float32":
                    continue
                for variant in _variants(op, quick or rehearse, backend):
                    found = faults_by_the_law(op, backend, dtype, device_of(rehearse), **variant)
                    faults += [f"{op} {backend} {name} {variant}: {fault}" for fault in found]
    return verdict(faults)


def repeat(rehearse: bool, quick: bool) -> Result:
    """The same bits every time, while another stream loads the GPU."""
    times, faults = 2 if rehearse else 20 if quick else 200, []
    with kernels_of(rehearse):
        for op, backend in gpu_backends(rehearse):
            trial = _trials.trial(op, integers=False, **_variants(op, True, backend)[0])
            first = trial.results(backend, torch.float32, device_of(rehearse))
            for number in range(1, times):
                if not rehearse:
                    with torch.cuda.stream(torch.cuda.Stream()):
                        torch.randn(512 + 8 * number, 512, device="cuda").square_().sum()
                again = trial.results(backend, torch.float32, device_of(rehearse))
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
        trial = _trials.trial("linear_cross_entropy", integers=False)
        first = trial.results("triton", torch.float32, device_of(rehearse))
        found: list[_trials.Results] = []
        threads = [
            threading.Thread(target=lambda: found.append(trial.results("triton", torch.float32, device_of(rehearse))))
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
                    [] if equal(first, trial.results("triton", torch.float32, "cuda")) else ["a side stream got another answer"]
                )
            for number in range(1, torch.cuda.device_count()):
                if not equal(first, trial.results("triton", torch.float32, f"cuda:{number}")):
                    faults.append(f"cuda:{number} got another answer")
    return verdict(faults)


def graphs(rehearse: bool, quick: bool) -> Result:
    """CUDA graphs and torch.compile."""
    if rehearse:
        return skipped("there is no graph capture on the CPU")
    faults = []
    hidden, items = torch.randn(40, 64, device="cuda"), torch.randn(500, 64, device="cuda")
    target = torch.arange(40, device="cuda")
    call = functools.partial(ops.target_logprob, items=items, target=target, backend="triton")
    try:
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            call(hidden[:, :48].contiguous(), items=items[:, :48].contiguous())
        faults.append("a first launch within a capture was not refused")
    except RuntimeError as error:
        if "before the graph capture" not in str(error):
            faults.append(f"a first launch within a capture: {error}")
    call(hidden)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call(hidden)
    for _ in range(3):
        hidden.copy_(torch.randn_like(hidden))
        graph.replay()
        if not torch.equal(out, call(hidden)):
            faults.append("a replay differs from a call")
    for mode in ("default", "reduce-overhead"):
        compiled = torch.compile(lambda x: call(x) * 2, fullgraph=True, mode=mode)
        if not torch.allclose(compiled(hidden), call(hidden) * 2):
            faults.append(f"torch.compile in mode {mode} differs")
    return verdict(faults)


def training(rehearse: bool, quick: bool) -> Result:
    """Steps of a small model, reference against kernels from the same seed, also under autocast."""
    lares = import_module("lares_fast")
    steps, losses = 2 if rehearse else 30 if quick else 200, {}
    sequence = torch.randint(1, 60, (16, 12), generator=torch.Generator().manual_seed(0)).to(device_of(rehearse))
    lengths = torch.full((16,), 12, device=sequence.device)
    for backend in ("reference", "triton"):
        torch.manual_seed(0)
        model = lares.LARES(lares.LARESConfig(n_items=60, hidden_size=32, inner_size=32)).to(sequence.device)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        curve = []
        with kernels_of(rehearse):
            for _ in range(steps):
                states = model.encode(sequence, lengths)
                table = model.item_embedding.weight
                loss = ops.linear_cross_entropy(states, table, sequence[:, -1], skip_pad=True, backend=backend)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                curve.append(loss.item())
        losses[backend] = curve
    worst = max(abs(a - b) for a, b in zip(losses["reference"], losses["triton"], strict=True))
    return verdict([] if worst <= 1e-2 else [f"losses differ by up to {worst:.3g}"], steps=steps, worst=worst)


def speed(rehearse: bool, quick: bool) -> Result:
    """Kernels and reference in turns; after all that is right."""
    if rehearse:
        return skipped("the interpreter has no speed worth a line")
    found = {}
    for op, backend in gpu_backends(rehearse):
        for name in ("float32",) if backend == "cuda" else ("float32", "bfloat16"):
            trial = _trials.trial(op, integers=False, **_variants(op, True, backend)[0])
            times = {backend: [], "reference": []}  # type: ignore[var-annotated]
            for turn in range(3 + (5 if quick else 30)):
                for which in times:
                    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                    start.record()
                    with _triton.anywhere():
                        trial.results(which, DTYPES[name], "cuda")
                    end.record()
                    end.synchronize()
                    if turn >= 3:
                        times[which].append(start.elapsed_time(end))
            found[f"{op} {backend} {name}"] = {
                which: {"median ms": sorted(values)[len(values) // 2], "min": min(values), "max": max(values)}
                for which, values in times.items()
            }
    return passed(found=found, note="small trials: launches rather than arithmetic")


def verdicts(rehearse: bool, quick: bool) -> Result:
    """What dispatch will make of all this: the canaries' own verdicts, which are kept."""
    if rehearse:
        return skipped("a rehearsal decides nothing for a GPU")
    found = {}
    for op in ops_with_triton():
        for name, dtype in DTYPES.items():
            for variant in _trials.shipped(op):
                said = _canary.refusal(op, torch.device("cuda", 0), dtype, **variant)
                found[f"{op} {name} {variant}"] = said or "verified on this GPU"
    return passed(found=found)


STEPS: dict[str, Callable[..., Result]] = {
    "record": record,
    "alone": alone,
    "hello": hello,
    "load": load,
    "canaries": canaries,
    "correctness": correctness,
    "repeat": repeat,
    "sanitizer": gpu_limits.sanitizer,
    "boundaries": boundaries,
    **gpu_limits.LARGE,
    "streams": streams,
    "fork": gpu_limits.fork,
    "graphs": graphs,
    "replays": gpu_limits.replays,
    "training": training,
    "speed": speed,
    "verdicts": verdicts,
}
