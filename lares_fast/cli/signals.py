"""What SIGINT and SIGTERM do while a command works."""

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
    """Call ``handler`` for SIGINT and SIGTERM until the block ends. Only the main thread of a program can do this."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
