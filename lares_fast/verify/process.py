"""Run a check in a process of its own.

A process cannot change between Triton's interpreter and its compiler, and some errors make the GPU
unusable for the process in which they occur.
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
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from tempfile import TemporaryFile
from typing import IO, Any

# What compute-sanitizer says in some virtual machines.
_REFUSAL = "Device not supported"
# The processes that run now, and whether a signal ended them.
_running: set[subprocess.Popen[str]] = set()
_stopped = threading.Event()


def run_check(
    name: str, *, seconds: float, environ: Mapping[str, str] | None = None, under: Sequence[str] = (), **arguments: Any
) -> dict[str, Any]:
    """Run the check ``name`` of ``python -m lares_fast.verify`` in a new process, and return its result.

    ``under`` is a command of compute-sanitizer that runs the process; if it refuses the GPU, the check is skipped. The result
    has a ``status`` (``passed``, ``skipped``, ``failed`` or ``hung``) and the ``seconds`` that the process took. If the process
    failed or took longer than ``seconds``, the result holds the end of its log.
    """
    command = [*under, sys.executable, "-P", "-m", "lares_fast.verify", name, json.dumps(arguments)]
    began = time.monotonic()
    # Files, because a pipe stays open as long as any child of the process holds it.
    with TemporaryFile("w+") as out, TemporaryFile("w+") as log:
        code = run_command(command, seconds=seconds, environ=environ, out=out, log=log)
        took = round(time.monotonic() - began, 1)
        out.seek(0)
        log.seek(0)
        printed, complaint = out.read().splitlines(), log.read()[-2000:]
    if code is None:
        text = f"{without_folders(complaint)}\nit did not finish within {seconds:g} s"
        return {"status": "hung", "seconds": took, "log": text.lstrip()}
    if under and code and any(_REFUSAL in line for line in [*printed, *complaint.splitlines()]):
        return {"status": "skipped", "seconds": took, "why": "compute-sanitizer does not support the GPU of this machine"}
    results = [line for line in printed if line.startswith("{")]
    if code or not results:
        text = without_folders("\n".join(filter(None, [complaint.strip(), sanitizer_summary(printed)])))
        return {"status": "failed", "seconds": took, "log": text or f"it ended with exit code {code} and printed nothing"}
    return {"seconds": took, **json.loads(results[-1])}


def run_command(
    command: Sequence[str], *, seconds: float, out: IO[str], log: IO[str], environ: Mapping[str, str] | None = None
) -> int | None:
    """Run ``command`` and return its exit code, or ``None`` if it did not end within ``seconds``.

    All processes that it started end with it, because a process that is left over would keep the GPU.
    """
    with running(command, out=out, log=log, environ=environ) as process:
        try:
            code = None if _stopped.is_set() else process.wait(max(0.0, seconds))
        except subprocess.TimeoutExpired:
            code = None
    if _stopped.is_set():
        raise KeyboardInterrupt
    return code


@contextmanager
def running(
    command: Sequence[str], *, out: IO[str] | int, log: IO[Any], environ: Mapping[str, str] | None = None
) -> Iterator[subprocess.Popen[str]]:
    """Start ``command``, and end it with all processes that it started when the block ends.

    ``out`` may be ``subprocess.PIPE``.
    """
    process = subprocess.Popen(
        command, env={**os.environ, **(environ or {})}, stdout=out, stderr=log, text=True, start_new_session=True
    )
    _running.add(process)
    try:
        yield process
    finally:
        _kill_group(process)
        process.wait()
        _running.discard(process)


def _kill_group(process: subprocess.Popen[str]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


@contextmanager
def leaving_no_processes() -> Iterator[None]:
    """At the end of the ``with`` block, end every process that :func:`run_command` started in any thread.

    Ctrl-C and SIGTERM end the block. Only the main thread can use this, because only it receives signals.
    """

    def end() -> None:
        _stopped.set()
        for process in list(_running):
            _kill_group(process)

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


def sanitizer_summary(lines: Sequence[str]) -> str:
    """Return the first lines and the last line of a report of compute-sanitizer."""
    kept = [line.strip("= \n") for line in lines if line.startswith("=========")]
    kept = [line for line in kept if line and not line.startswith("COMPUTE-SANITIZER")]
    return "; ".join([*kept[:2], *kept[2:][-1:]])


def without_folders(text: str) -> str:
    """Return ``text`` with every path cut to the name of its file, so that a report can be published."""
    return re.sub(r"/(?:[^\s/:\"']+/)+", ".../", text)
