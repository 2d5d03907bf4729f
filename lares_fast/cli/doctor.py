"""``lares-fast doctor``: show what is installed, what was built, and which backends run and why, or predict memory."""

from __future__ import annotations

import json
import os
import platform
from argparse import ArgumentParser, Namespace
from importlib.util import find_spec
from typing import Any

import numpy
import torch

from lares_fast import LARESConfig, __version__, _native, _settings, explain, reference
from lares_fast._device import choose
from lares_fast._random import Draw
from lares_fast.cli import plan
from lares_fast.cli.console import counted
from lares_fast.verify import tuning

# Extra -> the modules that it installs.
_EXTRAS = {
    "train": ("rich", "pyarrow", "matplotlib"),
    "triton": ("triton",),
    "tb": ("tensorboard",),
    "bench": ("pytest_benchmark", "faiss", "matplotlib"),
}


def add_arguments(parser: ArgumentParser) -> None:
    """Add the arguments of ``doctor``."""
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    plan.add_arguments(parser)


def command(arguments: Namespace) -> int:
    """Run ``doctor``."""
    if arguments.plan is None:
        plan.require_unused(arguments)
    report = diagnose() if arguments.plan is None else plan.plan(arguments)
    text = _text if arguments.plan is None else plan.text
    print(json.dumps(report, indent=2) if arguments.json else text(report))
    return 0


def diagnose() -> dict[str, Any]:
    """Return the report as plain values."""
    return {
        "versions": {
            "lares_fast": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": numpy.__version__,
            "platform": platform.platform(),
        },
        "cpu": {
            "capability": torch.backends.cpu.get_cpu_capability(),
            "threads": torch.get_num_threads(),
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        },
        "gpu": _gpu(),
        "device": _chosen_device(),
        "build": _native.build_info(),
        "capability": _native.capability(),
        "tuned": _tuned_calls(),
        "extras": {extra: {name: find_spec(name) is not None for name in names} for extra, names in _EXTRAS.items()},
        "backend": _settings.backend(),
        "ops": _ops(),
    }


def _gpu() -> str:
    if not torch.cuda.is_available():
        return "no GPU is visible to torch" + ("" if torch.version.cuda else " (this torch was built without CUDA)")
    name, (major, minor) = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
    return f"{name}, compute capability {major}.{minor}, torch built for CUDA {torch.version.cuda}"


def _chosen_device() -> str:
    """Return the device that ``auto`` takes, and why."""
    choice = choose("auto")
    return f"auto takes {choice.device}, because {choice.reason}"


def _can_allocate() -> bool:
    """Return whether a GPU gives this process memory. Otherwise the line about the device says why not."""
    try:
        return torch.cuda.is_available() and torch.empty(1, device="cuda").is_cuda
    except (RuntimeError, AssertionError):
        return False


def _tuned_calls() -> list[str]:
    """Return the calls that use launch settings from ``lares-fast tune``."""
    if not _can_allocate():
        return []
    return sorted(tuning.of_device(torch.device("cuda", torch.cuda.current_device())))


def _ops() -> dict[str, str]:
    """Return the text of ``explain`` for a small example of each op, on the CPU and on the GPU if there is one."""
    devices = ["cpu", *(["cuda"] if _can_allocate() else [])]
    weights = [weight.detach() for weight in reference.Recurrence(LARESConfig.preview()).parameters()]
    texts: dict[str, str] = {}
    for device in devices:
        query, items = torch.zeros(4, 64, device=device), torch.zeros(100, 64, device=device)
        target, offsets = (torch.tensor(x, device=device) for x in ([0, 0, 0, 0], [0, 4]))
        heads = query.view(4, 2, 32)
        calls: dict[str, tuple[Any, ...]] = {
            "recurrence": (query, offsets, [weight.to(device) for weight in weights]),
            "attention": (heads, heads, heads, offsets, 4),
            "embedding": (1 + target, offsets, items, query, query[0], query[0]),
            "initial_state": (Draw((0, 0), target[:1]), offsets, 4, 64),
            "linear_cross_entropy": (query, items, target),
            "topk": (query, items, 10),
            "target_rank": (query, items, target),
        }
        texts |= {f"{op}, fp32 on {device}": explain(op, *arguments) for op, arguments in calls.items()}
    return texts


def _text(report: dict[str, Any]) -> str:
    lines = [f"{name:<12} {value}" for name, value in report["versions"].items()]
    cpu, build = report["cpu"], report["build"]
    lines.append(f"{'cpu':<12} {cpu['capability']}, {counted(cpu['cores'], 'core')}, {counted(cpu['threads'], 'torch thread')}")
    lines.append(f"{'gpu':<12} {report['gpu']}")
    lines.append(f"{'device':<12} {report['device']}")
    lines.append(f"{'native':<12} {'built' if build['native'] else build['reason']}")
    archs = ", ".join(build.get("cuda_archs", ()))
    cuda = (
        f"{build['cuda_reason']} for {archs}; {report['capability']}"
        if build["cuda_built"]
        else f"not built: {build['cuda_reason']}"
    )
    lines.append(f"{'CUDA code':<12} {cuda}")
    known = ("native", "reason", "cuda_built", "cuda_reason", "cuda_archs")
    lines += [f"  {name:<10} {value}" for name, value in build.items() if value != "" and name not in known]
    lines.append(f"{'tuned':<12} {'; '.join(report['tuned']) or 'nothing; run lares-fast tune on a GPU'}")
    for extra, modules in report["extras"].items():
        missing = [name for name, there in modules.items() if not there]
        state = f'missing {", ".join(missing)}: pip install "lares_fast[{extra}]"' if missing else "installed"
        lines.append(f"{f'[{extra}]':<12} {state}")
    lines.append(f"{'backend':<12} {report['backend']}")
    for name, text in report["ops"].items():
        lines += ["", name, *(f"  {line}" for line in text.splitlines())]
    return "\n".join(lines)
