"""Check the places of outputs before anything is written, so that no command replaces a file of its user."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from lares_fast._errors import InputError
from lares_fast._files import LOCK
from lares_fast.train import config_file
from lares_fast.train.files import FILES, holds_run


def require_apart(option: str, written: Iterable[Path], kept: Mapping[str, Iterable[str | Path | None]]) -> None:
    """Raise :class:`InputError` if one of the files ``written``, which ``option`` chooses, is one of the files ``kept``.

    ``kept`` holds the files that each other option names. A link, or another spelling of a path, is the same file.
    """
    others = [(name, path) for name, paths in kept.items() for path in paths if path is not None]
    for path in written:
        for name, other in others:
            if _is_same(path, other):
                raise InputError(f"{option} would replace {other}, which belongs to {name}: give one of the two another place.")


def files_in(folder: Path, names: Iterable[str] = FILES) -> list[Path]:
    """Return the paths of the files that a command keeps in ``folder``, and of its lock."""
    return [folder / name for name in (*names, LOCK)]


def require_own_files(option: str, folder: Path, names: Iterable[str], *, begun: bool) -> None:
    """Raise :class:`InputError` if ``folder`` has a file of the ``names``, unless this program has ``begun`` to write there."""
    if not begun and (found := next((name for name in names if os.path.lexists(folder / name)), None)):
        raise InputError(
            f"{option} {folder} holds a file {found} that this program did not write: choose another {option}, or move it away."
        )


def is_of_run(folder: Path) -> bool:
    """Return whether training has written into ``folder``. A run that was killed early has no state yet."""
    return holds_run(folder) or config_file.is_written(folder / "config.yaml")


def _is_same(path: str | Path, other: str | Path) -> bool:
    try:
        return os.path.samefile(path, other)
    except OSError:
        # At least one of them does not exist.
        return os.path.realpath(path) == os.path.realpath(other)
