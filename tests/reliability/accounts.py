"""Run a function in a process of its own, as another account where that is possible."""

from __future__ import annotations

import os
import signal
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass


def can_change_account() -> bool:
    return hasattr(os, "geteuid") and os.geteuid() == 0


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
