"""The standard streams of a command: those that were closed, and characters that the encoding of the output lacks."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_STREAMS = (("stdin", "r"), ("stdout", "w"), ("stderr", "w"))


def open_missing() -> None:
    """Open the null device in the place of each standard stream that the caller has closed.

    Otherwise the next file that is opened would get the number of the stream, and ``print(file=sys.stderr)`` would print to
    the output.
    """
    for number, (name, mode) in enumerate(_STREAMS):
        try:
            os.fstat(number)
        except OSError:
            # A new file gets the lowest free number, which is this one.
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR), mode, encoding="utf-8"))


@contextmanager
def unknown_characters(errors: str) -> Iterator[None]:
    """Let the output treat characters that its encoding lacks as ``errors`` says, which is ``strict`` or another handler."""
    stream = sys.stdout
    before = getattr(stream, "errors", None)
    if before not in ("strict", "surrogateescape", "backslashreplace"):
        # The user has chosen another handler, or the stream has none.
        yield
        return
    stream.reconfigure(errors=errors)  # type: ignore[union-attr]
    try:
        yield
    finally:
        stream.reconfigure(errors=before)  # type: ignore[union-attr]
