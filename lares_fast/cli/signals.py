"""What SIGINT, SIGTERM and SIGHUP do while a command works."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

Handler = Callable[[int, FrameType | None], object]


def abort(_: int, __: FrameType | None) -> NoReturn:
    """Raise KeyboardInterrupt, so that files which are only partly written are removed."""
    raise KeyboardInterrupt


@contextmanager
def handling(handler: Handler) -> Iterator[None]:
    """Call ``handler`` for SIGINT, SIGTERM and SIGHUP until the block ends. Only the main thread of a program can do this.

    SIGHUP stays ignored if it is, as below ``nohup``.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = [signal.SIGINT, signal.SIGTERM]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
