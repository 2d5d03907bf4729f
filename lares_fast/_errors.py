"""Errors that a user can act on. Every message is one sentence that names the argument, setting or file, and the remedy."""

from __future__ import annotations

import importlib
import shlex
from types import ModuleType

# Characters of a message.
_LONGEST = 1000


class LaresFastError(Exception):
    """Base class of every error that lares_fast raises on purpose."""


class InputError(LaresFastError, ValueError):
    """An argument, a setting or a file is not usable. The command line prints the message and exits with code 2.

    ``setting`` is the dotted setting that the remedy changes, such as ``data.format``, or ``data.format=pairs`` with its
    value. The command line adds it to the message as a flag.
    """

    def __init__(self, message: str, setting: str | None = None) -> None:
        # A path or a value in a message may be very long, and may have characters that break the line or control a terminal.
        if len(message) > _LONGEST:
            message = f"{message[:700]}...{message[-297:]}"
        super().__init__(printable(message, _LONGEST))
        self.setting = setting


class BackendError(LaresFastError, RuntimeError):
    """The backend that was requested or chosen cannot run this call."""


class NotBuiltError(BackendError):
    """The native module is not part of this installation."""


class MissingExtraError(LaresFastError, ImportError):
    """A feature needs an optional dependency that is not installed."""


def printable(text: str, most: int = 300) -> str:
    """Return ``text`` for a message: cut to ``most`` characters, without characters that control a terminal."""
    shown = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text[:most])
    return shown if len(text) <= most else shown + "..."


def with_path(option: str, path: object) -> str:
    """Return ``option`` with a path, in the form that a shell reads."""
    text = str(path)
    # A path that begins with a dash would be read as an option.
    return f"{option}{'=' if text.startswith('-') else ' '}{shlex.quote(text)}"


def require(module: str, extra: str, feature: str) -> ModuleType:
    """Import and return ``module``. Raises :class:`MissingExtraError` with the ``extra`` that installs it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtraError(
            f'{feature} needs the package {module.split(".")[0]!r}: run pip install "lares_fast[{extra}]" ({error}).'
        ) from error
