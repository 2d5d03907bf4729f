"""Steps that need a process of their own: Triton interprets or compiles per process, and a GPU beyond use ends its process.

``python -P -m lares_fast.cli.steps NAME ARGUMENTS`` runs one and prints its result as a line of JSON.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from importlib import import_module
from tempfile import TemporaryFile
from typing import IO, Any

import torch

from lares_fast import _dispatch, _native
from lares_fast._law import Verdict, judge
from lares_fast.ops import _trials, _triton

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
ARCHITECTURES = (80, 86, 90, 100, 120)
# The ops that have CUDA kernels.
TABLES = ("topk", "target_rank")


# The processes that run now; and whether a signal has ended them.
_running: set[subprocess.Popen[str]] = set()
_stopped = threading.Event()


def run_step(
    name: str, *, seconds: float, environ: Mapping[str, str] | None = None, under: Sequence[str] = (), **arguments: Any
) -> dict[str, Any]:
    """Run a step in a process of its own, by the command ``under``: its result, or how it failed, and how long it took."""
    command = [*under, sys.executable, "-P", "-m", "lares_fast.cli.steps", name, json.dumps(arguments)]
    began = time.monotonic()
    # Files, because a pipe stays open as long as any child of the step holds it.
    with TemporaryFile("w+") as out, TemporaryFile("w+") as log:
        code = run_command(command, seconds=seconds, environ=environ, out=out, log=log)
        took = round(time.monotonic() - began, 1)
        out.seek(0)
        log.seek(0)
        said, complaint = out.read().splitlines(), log.read()[-2000:]
    if code is None:
        return {"status": "hung", "seconds": took, "log": f"{_public(complaint)}\nnothing came within {seconds:g} s".lstrip()}
    results = [line for line in said if line.startswith("{")]
    if code or not results:
        told = "\n".join(filter(None, [complaint.strip(), _sanitizer(said)]))
        return {"status": "failed", "seconds": took, "log": _public(told) or f"it ended with code {code} and said nothing"}
    return {"seconds": took, **json.loads(results[-1])}


def run_command(
    command: Sequence[str], *, seconds: float, out: IO[str], log: IO[str], environ: Mapping[str, str] | None = None
) -> int | None:
    """The exit code of ``command``, or None if it took longer.

    When it ends, so does every process that it has started: what is left would keep the GPU.
    """
    process = subprocess.Popen(
        command, env={**os.environ, **(environ or {})}, stdout=out, stderr=log, text=True, start_new_session=True
    )
    _running.add(process)
    try:
        code = None if _stopped.is_set() else process.wait(max(0.0, seconds))
    except subprocess.TimeoutExpired:
        code = None
    finally:
        _kill(process)
        process.wait()
        _running.discard(process)
    if _stopped.is_set():
        raise KeyboardInterrupt
    return code


def _kill(process: subprocess.Popen[str]) -> None:
    """Kill all of the group of the process."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


@contextmanager
def leaving_none_behind() -> Iterator[None]:
    """At the end of the ``with`` block, also by Ctrl-C or SIGTERM, nothing runs that :func:`run_command` started in any thread.

    For the main thread, which alone has signals.
    """

    def end() -> None:
        _stopped.set()
        for process in list(_running):
            _kill(process)

    def stop(*_: object) -> None:
        end()
        raise KeyboardInterrupt

    _stopped.clear()
    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        if _running:
            end()
        for number, handler in before.items():
            signal.signal(number, handler)


def _sanitizer(lines: Sequence[str]) -> str:
    """What compute-sanitizer says first and last."""
    kept = [line.strip("= \n") for line in lines if line.startswith("=========")]
    kept = [line for line in kept if line and not line.startswith("COMPUTE-SANITIZER")]
    return "; ".join([*kept[:2], *kept[2:][-1:]])


def _public(text: str) -> str:
    """A log for strangers' eyes: of paths, the names of the files alone."""
    return re.sub(r"/(?:[^\s/:\"']+/)+", ".../", text)


def passed(**facts: Any) -> dict[str, Any]:
    """The result of a step that found nothing wrong."""
    return {"status": "passed", **facts}


def skipped(why: str) -> dict[str, Any]:
    """The result of a step that does not apply here."""
    return {"status": "skipped", "why": why}


def verdict(faults: Sequence[str], **facts: Any) -> dict[str, Any]:
    """The result of a step that found ``faults``."""
    return {"status": "failed" if faults else "passed", **({"faults": list(faults)} if faults else {}), **facts}


def ops_with_triton() -> list[str]:
    """The ops that have Triton kernels."""
    return [op for op in _trials.ops() if any(backend.name == "triton" for backend in _dispatch._TABLE[op])]


def by_the_law(
    op: str, backend: str, dtype: torch.dtype, device: str = "cpu", **variant: Any
) -> tuple[list[Verdict], list[str]]:
    """The law's verdicts on a trial of ``op``, and the names of whole numbers that differ."""
    trial = _trials.trial(op, integers=False, **variant)
    return judged(trial, trial.results(backend, dtype, device), dtype)


def judged(trial: _trials.Trial, results: _trials.Results, dtype: torch.dtype) -> tuple[list[Verdict], list[str]]:
    """The law's verdicts on ``results`` of ``trial``, and the names of whole numbers that differ."""
    twin, truth = trial.twin(dtype), trial.truth(dtype)
    verdicts = judge("forward", results.forward, twin.forward, truth.forward) if truth.forward else []
    verdicts += judge("gradient", results.gradients, twin.gradients, truth.gradients) if truth.gradients else []
    return verdicts, [name for name, want in truth.exact.items() if not torch.equal(results.exact[name], want)]


def faults_of(verdicts: Sequence[Verdict], differ: Sequence[str]) -> list[str]:
    """What :func:`judged` finds wrong, in words."""
    return [fault for one in verdicts if (fault := one.fault)] + [f"{name}: not exact" for name in differ]


def device_of(rehearse: bool) -> str:
    """Where the tensors of a step of ``gpu-day`` are."""
    return "cpu" if rehearse else "cuda"


def kernels_of(rehearse: bool) -> Any:
    """A context in which the Triton backend runs, unasked: a canary would hide what is to be found."""
    return interpreted() if rehearse else _triton.anywhere()


def gpu_backends(rehearse: bool) -> list[tuple[str, str]]:
    """(op, backend) of all that is there for a GPU and can be run."""
    found = [(op, "triton") for op in ops_with_triton()] + [("recurrence", "layers")]
    return found if rehearse or not _native.capability().startswith("ok") else [*found, *((op, "cuda") for op in TABLES)]


def equal(one: _trials.Results, other: _trials.Results) -> bool:
    """Whether two results have the same bits."""
    pairs = zip(one.parts(), other.parts(), strict=True)
    return all(torch.equal(a[name], b[name]) for a, b in pairs for name in a)


def interpreted() -> Any:
    """A context in which Triton kernels run interpreted on CPU tensors."""
    context = ExitStack()
    context.enter_context(import_module("lares_fast.kernels._interpreted").honest())
    context.enter_context(_triton.anywhere())
    return context


def interpret(ops: list[str], dtypes: list[str]) -> dict[str, Any]:
    """Each op's Triton kernels by Triton's interpreter, held to the law."""
    found = {}
    with interpreted():
        for op in ops:
            for dtype in dtypes:
                found[f"{op} {dtype}"] = faults_of(*by_the_law(op, "triton", DTYPES[dtype]))
    return passed(found=found)


def compile_for(ops: list[str], dtypes: list[str], architectures: list[int], shipped: bool = False) -> dict[str, Any]:
    """Each op's Triton kernels compiled for GPUs that need not be here, as their launches would compile them."""
    offline = import_module("lares_fast.kernels._offline")
    found: dict[str, dict[int, int]] = {}
    for op in ops:
        for dtype in dtypes:
            for architecture in architectures:
                with _triton.anywhere(), offline.compiling(architecture) as compiled:
                    for variant in _trials.shipped(op) if shipped else [{}]:
                        _trials.trial(op, integers=False, **variant).results("triton", DTYPES[dtype])
                found.setdefault(f"{op} {dtype}", {})[architecture] = len(compiled)
    return passed(found=found)


def all_steps() -> dict[str, Callable[..., dict[str, Any]]]:
    """Every step by its name."""
    gpu = {**import_module("lares_fast.cli.gpu_steps").STEPS, **import_module("lares_fast.cli.gpu_limits").STEPS}
    return {"interpret": interpret, "compile_for": compile_for, **gpu}


if __name__ == "__main__":
    print(json.dumps(all_steps()[sys.argv[1]](**json.loads(sys.argv[2]))))
