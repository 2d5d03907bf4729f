"""Steps that need a process of their own: Triton interprets or compiles per process, and a GPU beyond use ends its process.

``python -P -m lares_fast.verify NAME ARGUMENTS`` runs one and prints its result as a line of JSON.
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

# The processes that run now; and whether a signal has ended them.
_running: set[subprocess.Popen[str]] = set()
_stopped = threading.Event()


def run_step(
    name: str, *, seconds: float, environ: Mapping[str, str] | None = None, under: Sequence[str] = (), **arguments: Any
) -> dict[str, Any]:
    """Run a step in a process of its own, by the command ``under``: its result, or how it failed, and how long it took."""
    command = [*under, sys.executable, "-P", "-m", "lares_fast.verify", name, json.dumps(arguments)]
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
