"""Run commands in processes that may take only a little more memory than the imports have taken.

``python -m tests.reliability.limited`` imports the package once, and forks a process for each line of its input.
"""

from __future__ import annotations

import json
import os
import re
import resource
import subprocess
import sys
import traceback
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from tests.reliability.counts import PACKAGE, ROOT

# With one thread, torch has no threads that a fork would lose.
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONPATH": str(PACKAGE)}


class Done(NamedTuple):
    """The end of a command: its exit code (negative for a signal), its errors, and how much its address space grew in bytes."""

    code: int
    err: str
    grown: int


class Limited:
    """A process with the imports done. Use it as a context manager."""

    def __enter__(self) -> Limited:
        command = [sys.executable, "-m", "tests.reliability.limited"]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT, cwd=ROOT
        )
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()

    def run(self, *arguments: object, extra: int | None = None, blind: bool = False, api: bool = False) -> Done:
        """Run the command line ``arguments`` with at most ``extra`` more bytes of address space.

        ``blind`` turns the estimate off, so that allocations fail. With ``api`` the arguments are a log, a folder and settings
        for :class:`Trainer` and :class:`Recommender`.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        task = {"arguments": list(map(str, arguments)), "extra": extra, "blind": blind, "api": api}
        print(json.dumps(task), file=self._process.stdin, flush=True)
        return Done(*json.loads(self._process.stdout.readline()))


def _size(name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+)", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


def _use_api(config: Any, log_file: str, out: str) -> int:
    """Train and recommend by the Python API, and return the exit code that the command line would give."""
    from lares_fast import load
    from lares_fast._errors import LaresFastError
    from lares_fast.data import leave_one_out, read_log
    from lares_fast.train import Trainer

    try:
        log = read_log(log_file)
        Trainer(config, log, leave_one_out(log), out).run(("spt",))
        load(out).recommend([log.history(user).tolist() for user in range(log.n_users)])
    except LaresFastError as error:
        print(f"lares-fast: error: {error}", file=sys.stderr)
        return 2
    return 0


def _child(task: dict[str, Any], err: int, report: int) -> None:
    """Run a task, and end this process."""
    from lares_fast import _device
    from lares_fast.cli import main, settings
    from lares_fast.train import memory

    os.dup2(err, 2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    work = partial(main, task["arguments"])
    if task["api"]:
        log_file, out, *assignments = task["arguments"]
        work = partial(_use_api, settings.build("instruments", assignments), log_file, out)
    before, code = _size("VmSize"), 1
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if task["extra"] is not None:
        resource.setrlimit(resource.RLIMIT_AS, (before + task["extra"],) * 2)
    if task["blind"]:
        memory.free_bytes = _device.free_bytes = lambda device: sys.maxsize
    try:
        code = work()
    except BaseException:
        traceback.print_exc()
    sys.stderr.flush()
    resource.setrlimit(resource.RLIMIT_AS, (resource.getrlimit(resource.RLIMIT_AS)[1],) * 2)
    os.write(report, str(max(0, _size("VmPeak") - before)).encode())
    os._exit(code)


def _serve() -> None:
    import torch._dynamo

    import lares_fast.cli.evaluation
    import lares_fast.cli.recommending
    import lares_fast.cli.training  # noqa: F401 - imported for the processes that are forked
    from lares_fast import _native

    # With too little memory a run refuses to import PyTorch's compiler. It is here, so that tries come further.
    assert torch._dynamo
    _native.available()
    for line in sys.stdin:
        with open(os.memfd_create("err"), "rb") as err:
            reader, writer = os.pipe()
            if not (child := os.fork()):
                _child(json.loads(line), err.fileno(), writer)
            os.close(writer)
            _, status = os.waitpid(child, 0)
            grown = int(os.read(reader, 100) or 0)
            os.close(reader)
            err.seek(0)
            print(json.dumps([os.waitstatus_to_exitcode(status), err.read().decode(errors="replace"), grown]), flush=True)


if __name__ == "__main__":
    _serve()
