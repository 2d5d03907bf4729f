"""``lares-fast gpu-day``: all that a first GPU can tell about the kernels, step by step, in one report file."""

from __future__ import annotations

import json
import re
import time
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

import torch

from lares_fast._errors import InputError
from lares_fast.cli.console import notice
from lares_fast.cli.gpu_limits import LARGE
from lares_fast.cli.gpu_steps import STEPS
from lares_fast.cli.steps import run_step

# Without these nothing else can be told.
_STOP = ("record", "alone")
# What --quick runs, and what must pass.
_QUICK = ("record", "alone", "hello", "load", "canaries", "correctness", "repeat")
_REQUIRED = (*_QUICK, "boundaries", *LARGE, "streams", "fork", "graphs", "replays")
# Triton's switches that change how products are compiled: the one that heals a failure is its diagnosis.
_SWITCHES = {
    "without WGMMA": {"DISABLE_MMA_V3": "1"},
    "without tcgen05": {"DISABLE_MMA_V5": "1"},
    "without fused multiply-add": {"TRITON_DEFAULT_FP_FUSION": "0"},
    "one launch at a time": {"CUDA_LAUNCH_BLOCKING": "1"},
}
_DIAGNOSED = ("canaries", "correctness", "repeat")


def add_arguments(parser: ArgumentParser) -> None:
    """The arguments of ``gpu-day``."""
    parser.add_argument("--quick", action="store_true", help="correctness on small shapes only, a few minutes")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, with Triton's interpreter in the GPU's place")
    parser.add_argument("--out", metavar="DIR", type=Path, default=Path(), help="folder of the report (default: here)")
    parser.add_argument("--step", action="append", choices=list(STEPS), help="this step alone; may be given again")
    parser.add_argument("--seconds", type=float, default=900, help="for each step (default: 900)")


def command(arguments: Namespace) -> int:
    """Run ``gpu-day``; 0 if all that is required passed."""
    if not torch.cuda.is_available() and not arguments.rehearse:
        raise InputError("gpu-day needs a GPU, and torch sees none: give --rehearse to run it on the CPU.")
    if not arguments.out.is_dir():
        raise InputError(f"--out {arguments.out} is not a folder: make it first.")
    names = arguments.step or [name for name in STEPS if not arguments.quick or name in _QUICK]
    found = run(names, rehearse=arguments.rehearse, quick=arguments.quick, seconds=arguments.seconds)
    gpu = "rehearsal" if arguments.rehearse else re.sub(r"\W+", "-", torch.cuda.get_device_name())
    place = arguments.out / f"gpu-day-{gpu}-{time.strftime('%Y-%m-%d')}.json"
    place.write_text(json.dumps(found, indent=1))
    print(table(found))
    print(f"\n{place}: attach it to an issue.")
    return int(not all(found[name]["status"] in ("passed", "skipped") for name in _REQUIRED if name in found))


def run(names: list[str], *, rehearse: bool, quick: bool, seconds: float) -> dict[str, dict[str, Any]]:
    """The results of the steps ``names``, in their order."""
    found: dict[str, dict[str, Any]] = {}
    # A rehearsal must not compile, and a GPU must not interpret.
    environ = {"TRITON_INTERPRET": "1" if rehearse else "0"}
    for name in names:
        notice(f"step {name}")
        how: dict[str, Any] = {"seconds": seconds, "rehearse": rehearse, "quick": quick}
        found[name] = run_step(name, environ=environ, **how)
        if found[name]["status"] in ("failed", "hung"):
            if name in _STOP:
                break
            if name in _DIAGNOSED:
                found[name]["with"] = {
                    what: run_step(name, environ={**environ, **switch}, **how)["status"] for what, switch in _SWITCHES.items()
                }
    return found


def table(found: dict[str, dict[str, Any]]) -> str:
    """The results in Markdown."""
    lines = ["| step | result | seconds | what |", "|---|---|---|---|"]
    for name, result in found.items():
        healed = [what for what, status in result.get("with", {}).items() if status == "passed"]
        said = [*result.get("faults", []), result.get("why", ""), result.get("log", "").strip().splitlines()[-1:] or ""]
        text = "; ".join(str(part if isinstance(part, str) else part[0]) for part in said if part)[:300]
        if healed:
            text += f" (passes {', '.join(healed)})"
        lines.append(f"| {name} | {result['status']} | {result['seconds']} | {text.replace('|', '/')} |")
    return "\n".join(lines)
