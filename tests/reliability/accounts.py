"""Run a function in a process of its own, as another account where that is possible."""

from __future__ import annotations

import os
import signal
import stat
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path


def can_change_account() -> bool:
    return hasattr(os, "geteuid") and os.geteuid() == 0


@contextmanager
def folder_for_all() -> Iterator[Path]:
    """Give an empty folder that every account may enter, and delete it at the end."""
    usual = Path(tempfile.gettempdir()).resolve()
    # The folder for temporary files may lie in a folder of one account.
    open_to_all = all(part.stat().st_mode & stat.S_IXOTH for part in (usual, *usual.parents))
    with tempfile.TemporaryDirectory(dir=usual if open_to_all else "/tmp") as scratch:
        folder = Path(scratch)
        folder.chmod(0o755)
        yield folder


@dataclass
class Child:
    """A process that runs one function."""

    pid: int
    status: int | None = None

    def is_running(self) -> bool:
        if self.status is None:
            done, status = os.waitpid(self.pid, os.WNOHANG)
            if done:
                self.status = os.waitstatus_to_exitcode(status)
        return self.status is None

    def failed(self, seconds: float = 600) -> bool:
        """Wait for the end, at most ``seconds``. Return whether the function raised or took longer."""
        end = time.monotonic() + seconds
        while self.is_running() and time.monotonic() < end:
            time.sleep(0.002)
        if self.is_running():
            self.stop()
        return self.status != 0

    def stop(self) -> None:
        if self.is_running():
            os.kill(self.pid, signal.SIGKILL)
            _, status = os.waitpid(self.pid, 0)
            self.status = os.waitstatus_to_exitcode(status)


def as_account(user: int | None, function: Callable[[], object]) -> Child:
    """Run ``function`` in a fork of this process, with the user and group id ``user`` if it is given."""
    pid = os.fork()
    if pid:
        return Child(pid)
    code = 1
    try:
        if user is not None:
            os.setgroups([])
            os.setgid(user)
            os.setuid(user)
        function()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)
