"""``lares-fast gpu-day``: all that a first GPU can tell about the kernels, step by step, in one report file."""

from __future__ import annotations

import json
import os
import re
import threading
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch

from lares_fast._errors import InputError
from lares_fast.cli.console import notice
from lares_fast.verify.comparison import skipped
from lares_fast.verify.gpu_plan import DIAGNOSED, FIRST, Step, chosen, is_well, plan
from lares_fast.verify.process import leaving_none_behind, run_step

# What --quick leaves out.
_LONG = ("large_", "graphs", "training", "verdicts")
# Triton's switches that change how products are compiled, and for which major compute capability: the one that heals a
# failure is its diagnosis.
_SWITCHES: dict[str, tuple[int | None, dict[str, str]]] = {
    "without WGMMA": (9, {"DISABLE_MMA_V3": "1"}),
    "without tcgen05": (10, {"DISABLE_MMA_V5": "1"}),
    "without fused multiply-add": (None, {"TRITON_DEFAULT_FP_FUSION": "0"}),
    "one launch at a time": (None, {"CUDA_LAUNCH_BLOCKING": "1"}),
}
# One fault in a kernel fails many steps.
_MOST_DIAGNOSED = 6
# Seconds without which a step is not begun.
_LEAST = 5


def add_arguments(parser: ArgumentParser) -> None:
    """The arguments of ``gpu-day``."""
    parser.add_argument("--quick", action="store_true", help="small shapes and few variants, a few minutes")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, with Triton's interpreter in the GPU's place")
    parser.add_argument("--out", metavar="DIR", type=Path, default=Path(), help="folder of the report (default: here)")
    parser.add_argument(
        "--only",
        metavar="NAME",
        nargs="+",
        help="these steps or groups; or failed REPORT: what failed there or was not reached",
    )
    parser.add_argument("--jobs", metavar="N", type=int, default=1, help="steps at the same time (default: 1)")
    parser.add_argument("--seconds", type=float, default=600, help="for each step (default: 600)")
    parser.add_argument("--total", metavar="SECONDS", type=float, help="for all together: what is not reached is told")


def command(arguments: Namespace) -> int:
    """Run ``gpu-day``; 0 if all that was asked for passed."""
    if not torch.cuda.is_available() and not arguments.rehearse:
        raise InputError("gpu-day needs a GPU, and torch sees none: give --rehearse to run it on the CPU.")
    if not arguments.out.is_dir():
        raise InputError(f"--out {arguments.out} is not a folder: make it first.")
    for name in ("jobs", "seconds", "total"):
        if (value := getattr(arguments, name)) is not None and not value > 0:
            raise InputError(f"--{name} must be greater than 0, but is {value:g}.")
    end = time.monotonic() + arguments.total if arguments.total else float("inf")
    steps = plan(rehearse=arguments.rehearse, quick=arguments.quick)
    if arguments.quick and not arguments.only:
        steps = {name: step for name, step in steps.items() if not name.startswith(_LONG)}
    names = chosen(arguments.only, steps)
    gpu = "rehearsal" if arguments.rehearse else re.sub(r"\W+", "-", torch.cuda.get_device_name())
    # A report is nothing without the machine that it is of.
    report = Report(arguments.out / f"gpu-day-{gpu}-{time.strftime('%Y-%m-%d')}.json", dict.fromkeys(["record", *names]))
    with leaving_none_behind():
        how = {"seconds": arguments.seconds, "jobs": arguments.jobs, "end": end}
        run({name: steps[name] for name in report.found}, report, rehearse=arguments.rehearse, **how)
    print(table(report.found))
    print(f"\n{report.place}: attach it to an issue.")
    return int(not all(map(is_well, report.found.values())))


class Report:
    """What is known of each step, in a file that is rewritten whole whenever that changes."""

    def __init__(self, place: Path, names: Iterable[str], found: Mapping[str, dict[str, Any]] | None = None) -> None:
        self.place, self._lock = place, threading.Lock()
        self.found: dict[str, dict[str, Any]] = {**(found or {}), **{name: {"status": "not reached"} for name in names}}
        self._write()

    def put(self, name: str, result: dict[str, Any]) -> None:
        """Keep the result of ``name``."""
        with self._lock:
            self.found[name] = result
            self._write()
        notice(f"{name}: {result['status']} ({result.get('seconds', 0)} s)")

    def _write(self) -> None:
        temporary = self.place.with_name(f"{self.place.name}.tmp")
        temporary.write_text(json.dumps(self.found, indent=1))
        os.replace(temporary, self.place)


def run(
    steps: Mapping[str, Step],
    report: Report,
    *,
    rehearse: bool,
    seconds: float,
    jobs: int = 1,
    end: float = float("inf"),
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Run ``steps``, ``jobs`` at a time, each for up to ``seconds`` and none beyond ``end`` (by ``clock``)."""

    def result_of(step: Step, switch: Mapping[str, str]) -> dict[str, Any] | None:
        """None if there was no time for it."""
        if step.skip:
            return {**skipped(step.skip), "seconds": 0}
        left = min(seconds, end - clock())
        if left < _LEAST:
            return None
        # A rehearsal must not compile, and a GPU must not interpret.
        environ = {"TRITON_INTERPRET": "1" if rehearse else "0", **step.environ, **switch}
        return run_step(step.call, seconds=left, environ=environ, under=step.under, **step.arguments)

    def attempt(names: Iterable[str]) -> None:
        for name in names:
            if (result := result_of(steps[name], {})) is not None:
                report.put(name, result)

    def diagnose(name: str, what: str) -> None:
        if result := result_of(steps[name], _SWITCHES[what][1]):
            found = report.found[name]
            report.put(name, {**found, "with": {**found.get("with", {}), what: result["status"]}})

    def in_turns(call: Callable[..., None], calls: Iterable[tuple[Any, ...]]) -> None:
        with ThreadPoolExecutor(jobs) as pool:
            try:
                for done in as_completed([pool.submit(call, *given) for given in calls]):
                    done.result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    for name in FIRST:
        if name in steps:
            attempt([name])
            if report.found[name]["status"] != "passed":
                return
    lanes: dict[str, list[str]] = {}
    for name, step in steps.items():
        if name not in FIRST:
            lanes.setdefault(step.lane or name, []).append(name)
    in_turns(attempt, [(lane,) for lane in lanes.values()])
    wrong = [
        name for name in steps if name.partition(":")[0] in DIAGNOSED and report.found[name]["status"] in ("failed", "hung")
    ]
    switches = _switches(report.found.get("record", {}))
    in_turns(diagnose, [(name, what) for name in wrong[:_MOST_DIAGNOSED] for what in switches])


def _switches(record: Mapping[str, Any]) -> list[str]:
    """Those that can matter on the GPU of ``record``."""
    majors = {gpu["major"] for gpu in record.get("gpus", ())}
    return [what for what, (major, _) in _SWITCHES.items() if major is None or major in majors]


def table(found: Mapping[str, Mapping[str, Any]]) -> str:
    """The results in Markdown."""
    lines = ["| step | result | seconds | what |", "|---|---|---|---|"]
    for name, result in found.items():
        healed = [what for what, status in result.get("with", {}).items() if status == "passed"]
        number = f"worst {result['worst']:.2f} of its bound, first call {result['first_call_s']} s" if "law" in result else ""
        last = result.get("log", "").strip().splitlines()[-1:]
        said = [*result.get("faults", []), result.get("why", ""), result.get("said", ""), *last, number]
        text = "; ".join(part[:1000] for part in said if part)
        if healed:
            text += f" (passes {', '.join(healed)})"
        lines.append(f"| {name} | {result['status']} | {result.get('seconds', '')} | {text.replace('|', '/')} |")
    return "\n".join(lines)
