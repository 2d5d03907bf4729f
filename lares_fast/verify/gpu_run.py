"""Run the steps of ``lares-fast gpu-day``: several at a time, within a time limit, with a diagnosis of failures."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any

from lares_fast.verify.comparison import skipped
from lares_fast.verify.gpu_plan import DIAGNOSED, FIRST, Step
from lares_fast.verify.gpu_report import Report
from lares_fast.verify.process import run_check

# Options of Triton's compiler that change how products are compiled, and the major compute capability that each one concerns.
# If a failed step passes with an option, the option points to the cause.
_OPTIONS: dict[str, tuple[int | None, dict[str, str]]] = {
    "without WGMMA": (9, {"DISABLE_MMA_V3": "1"}),
    "without tcgen05": (10, {"DISABLE_MMA_V5": "1"}),
    "without fused multiply-add": (None, {"TRITON_DEFAULT_FP_FUSION": "0"}),
    "one launch at a time": (None, {"CUDA_LAUNCH_BLOCKING": "1"}),
}
# One fault in a kernel makes many steps fail, so only this many are diagnosed.
_MOST_DIAGNOSED = 6
# A step does not start with fewer seconds left.
_LEAST_SECONDS = 5


@dataclass(frozen=True)
class Limits:
    """The number of steps that run at a time, the seconds for each step, and the time on ``clock`` at which all must end."""

    seconds: float
    jobs: int = 1
    end: float = float("inf")
    clock: Callable[[], float] = time.monotonic

    def left(self) -> float:
        """Return the seconds that a step may take now, or 0 if there are too few to start one."""
        left = min(self.seconds, self.end - self.clock())
        return left if left >= _LEAST_SECONDS else 0.0


def run_steps(steps: Mapping[str, Step], report: Report, limits: Limits, *, rehearse: bool) -> None:
    """Run ``steps`` within ``limits`` and put each result into ``report``.

    The steps ``FIRST`` run first, and nothing else runs if one of them fails. The first few steps of the groups ``DIAGNOSED``
    that failed or hung run again with other options of Triton's compiler.
    """

    def result_of(step: Step, option: Mapping[str, str]) -> dict[str, Any] | None:
        """Return the result, or ``None`` if there is no time left."""
        if step.skip:
            return {**skipped(step.skip), "seconds": 0}
        if not (left := limits.left()):
            return None
        # A rehearsal must not compile, and a GPU must not interpret.
        environ = {"TRITON_INTERPRET": "1" if rehearse else "0", **step.environ, **option}
        return run_check(step.check, seconds=left, environ=environ, under=step.under, **step.arguments)

    def attempt(names: Iterable[str]) -> None:
        for name in names:
            if (result := result_of(steps[name], {})) is not None:
                report.put(name, result)

    def diagnose(name: str, option: str) -> None:
        if result := result_of(steps[name], _OPTIONS[option][1]):
            found = report.found[name]
            report.put(name, {**found, "with": {**found.get("with", {}), option: result["status"]}})

    for name in FIRST:
        if name in steps:
            attempt([name])
            if report.found[name]["status"] != "passed":
                return
    lanes: dict[str, list[str]] = {}
    for name, step in steps.items():
        if name not in FIRST:
            lanes.setdefault(step.lane or name, []).append(name)
    _in_parallel(limits.jobs, attempt, [(lane,) for lane in lanes.values()])
    wrong = [
        name for name in steps if name.partition(":")[0] in DIAGNOSED and report.found[name]["status"] in ("failed", "hung")
    ]
    options = options_for(report.found.get("machine", {}))
    _in_parallel(limits.jobs, diagnose, [(name, option) for name in wrong[:_MOST_DIAGNOSED] for option in options])


def _in_parallel(jobs: int, call: Callable[..., None], calls: Iterable[tuple[Any, ...]]) -> None:
    with ThreadPoolExecutor(jobs) as pool:
        try:
            for done in as_completed([pool.submit(call, *given) for given in calls]):
                done.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def options_for(machine: Mapping[str, Any]) -> list[str]:
    """Return the compiler options that can matter on the GPUs that ``machine``, the result of the step ``machine``, lists."""
    majors = {gpu["major"] for gpu in machine.get("gpus", ())}
    return [option for option, (major, _) in _OPTIONS.items() if major is None or major in majors]
