"""Run the command line in a process that is forked from a server which has imported everything. A start takes milliseconds."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from tests.reliability.counts import PACKAGE
from tests.reliability.kill_calls import Call, Plan

_SECONDS, _TICK = 300, 0.005
# Processes are started and asked for their end by one thread at a time: multiprocessing asks about all at every start.
_LOCK = threading.Lock()


@dataclass
class Ended:
    """How a process ended. A negative ``code`` is the number of the signal that ended it.

    ``published``
        File -> the SHA-256 of what was last renamed to it. A process that was killed from outside cannot tell this.
    ``unseen``
        The number of bytes that the process wrote by other ways than the numbered calls.
    """

    code: int
    out: str
    err: str
    calls: list[Call] = field(default_factory=list)
    published: dict[str, str] = field(default_factory=dict)
    unseen: int | None = None

    @property
    def steps(self) -> int:
        """The number of steps of training."""
        return sum(call.kind == "event" and call.name.startswith("step ") for call in self.calls)

    @property
    def sentence(self) -> bool:
        """Whether the error output is one line that tells of an error."""
        return len(self.err.splitlines()) == 1 and self.err.startswith("lares-fast: error: ")


class Child:
    """A process that runs ``lares-fast`` with the arguments ``argv``. Its file system calls below ``folder`` are numbered.

    ``scratch``
        A folder for its output.
    ``own``
        Whether it is a new interpreter instead of a fork. Such a process has no plan.
    """

    def __init__(self, argv: list[Any], scratch: Path, folder: Path, plan: Plan | None = None, *, own: bool = False) -> None:
        base = scratch / f"{time.monotonic_ns()}"
        self._files = tuple(f"{base}.{name}" for name in ("out", "err", "report"))
        words = [str(word) for word in argv]
        self._process: Any
        if own:
            with open(self._files[0], "w") as out, open(self._files[1], "w") as err:
                environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(PACKAGE)}
                self._process = subprocess.Popen(
                    [sys.executable, "-P", "-m", "lares_fast", *words],
                    stdout=out,
                    stderr=err,
                    stdin=subprocess.DEVNULL,
                    env=environment,
                )
        else:
            with _LOCK:
                began, ready = _context().Pipe(duplex=False)
                self._process = _context().Process(target=_main, args=(words, str(folder), plan or Plan(), self._files, ready))
                self._process.start()
                ready.close()
            # After this, every signal meets the command line.
            began.poll(_SECONDS)
            began.close()
        self.pid: int = self._process.pid

    def signal(self, number: int) -> None:
        """Send a signal."""
        if self.running:
            os.kill(self.pid, number)

    @property
    def running(self) -> bool:
        """Whether the process has not ended."""
        with _LOCK:
            return self._process.poll() is None if isinstance(self._process, subprocess.Popen) else self._process.is_alive()

    def wait(self) -> Ended:
        """Wait for the end of the process. It is killed when it takes too long; its code is then 999."""
        # Time in which this process and its child are both stopped does not count.
        left = _SECONDS / _TICK
        while self.running and (left := left - 1) > 0:
            time.sleep(_TICK)
        if hung := self.running:
            self._process.kill()
            while self.running:
                time.sleep(_TICK)
        code = self._process.returncode if isinstance(self._process, subprocess.Popen) else self._process.exitcode
        out, err = (Path(name).read_text(errors="replace") if os.path.exists(name) else "" for name in self._files[:2])
        report = json.loads(Path(self._files[2]).read_text()) if os.path.exists(self._files[2]) else {"calls": []}
        for name in self._files:
            Path(name).unlink(missing_ok=True)
        if report.get("unseen") is not None:
            report["unseen"] -= len(out.encode()) + len(err.encode())
        report["calls"] = [Call(*call) for call in report["calls"]]
        return Ended(999 if hung else code, out, err, **report)


@cache
def _context() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.reliability.kill_server"])
    # One thread, as a process with more threads cannot be forked safely. The server starts now and keeps this setting.
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    process = context.Process(target=int)
    process.start()
    process.join()
    if before is None:
        del os.environ["OMP_NUM_THREADS"]
    else:
        os.environ["OMP_NUM_THREADS"] = before
    return context


def _main(words: list[str], folder: str, plan: Plan, files: tuple[str, str, str], ready: Any) -> None:
    """Run the command line in this process, which was forked, and end the process."""
    from lares_fast.cli import main
    from tests.reliability.kill_calls import Calls
    from tests.reliability.kill_faults import FAULTS

    for number, name in enumerate(files[:2], start=1):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), number)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    calls = Calls(folder, plan, files[2])
    calls.install()
    if plan.fault:
        FAULTS[plan.fault]()
    ready.close()
    code = 1
    try:
        code = main(words)
    except BaseException:
        traceback.print_exc()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    sys.stdout.flush()
    sys.stderr.flush()
    calls.write_report()
    os._exit(code)
