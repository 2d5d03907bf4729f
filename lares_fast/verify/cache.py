"""A cache of JSON files in the folder ``LARES_FAST_CACHE``: results of self-tests, and launch settings of GPUs.

A wrong entry could switch off a self-test. So an entry is used only if no other account can have written it: its file and its
folders belong to the current user or to root, and only their owner can write to them. Everything else is ignored, with one
warning that names the file or folder. No entry is ever run.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
import warnings
from pathlib import Path
from typing import IO, Any, NoReturn

from lares_fast import _settings
from lares_fast._errors import InputError
from lares_fast._files import atomic_write, open_regular

# An entry has a few kilobytes.
_MOST_BYTES = 1 << 20
_REMEDY = "remove it, or set LARES_FAST_CACHE to a folder that only you can write to"
# The files and folders that a warning has named.
_told: set[Path] = set()


def folder(kind: str) -> Path:
    """Return the folder of the files of one ``kind``."""
    return _settings.cache_folder() / kind


def read(kind: str, key: dict[str, Any]) -> dict[str, Any] | None:
    """Return the entry that was stored under ``key``, or ``None``.

    An entry is returned only if its file can be trusted, holds valid JSON without NaN, and repeats every field of ``key``.
    """
    path = _path(kind, key)
    try:
        for place in (path.parent.parent, path.parent):
            _require_own(place, os.stat(place))
        with open_regular(path, follow=False) as file:
            _require_own(path, os.fstat(file.fileno()))
            data = file.read(_MOST_BYTES + 1)
        if len(data) > _MOST_BYTES:
            raise _Untrusted(path, f"it is longer than {_MOST_BYTES:,} bytes")
        stored = json.loads(data, parse_constant=_refuse)
        same = isinstance(stored, dict) and _text({name: stored.get(name) for name in key}) == _text(key)
    except FileNotFoundError:
        return None
    except _Untrusted as error:
        _warn(*error.args)
        return None
    except InputError:
        _warn(path, "it is no file")
        return None
    except (OSError, ValueError, RecursionError) as error:
        # A link raises ELOOP. JSON that is nested too deeply raises RecursionError.
        if isinstance(error, OSError) and error.errno == errno.ELOOP:
            _warn(path, "it is a link")
        return None
    return stored if same else None


def write(kind: str, key: dict[str, Any], entry: dict[str, Any]) -> None:
    """Store ``entry`` under ``key``, atomically, so that only the current user can change it.

    Raises :class:`InputError` if the file cannot be written, or if other accounts can write to its folder.
    """
    path = _path(kind, key)
    try:
        for place in (path.parent.parent, path.parent):
            place.mkdir(mode=0o755, parents=True, exist_ok=True)
            _require_own(place, os.stat(place))
    except _Untrusted as error:
        raise InputError(f"{error.args[0]} is not used, because {error.args[1]}: {_REMEDY}.") from None
    except OSError as error:
        raise InputError(f"{path.parent} cannot be made ({error.strerror}): set LARES_FAST_CACHE to another folder.") from None

    def fill(file: IO[bytes]) -> None:
        if hasattr(os, "fchmod"):
            # The umask may let a group write.
            os.fchmod(file.fileno(), stat.S_IMODE(os.fstat(file.fileno()).st_mode) & ~0o022)
        file.write(json.dumps({**key, **entry}, indent=1).encode())

    atomic_write(path, fill)


class _Untrusted(Exception):
    """A file or folder, and why it cannot be trusted."""


def _require_own(path: Path, found: os.stat_result) -> None:
    """Raise :class:`_Untrusted` if another account than the current one and root can have written to ``path``."""
    if not hasattr(os, "geteuid"):
        # Windows has access lists in place of these modes.
        return
    if found.st_uid not in (os.geteuid(), 0):
        raise _Untrusted(path, f"it belongs to another account (user id {found.st_uid})")
    if found.st_mode & 0o022:
        raise _Untrusted(path, f"other accounts can write to it (mode {stat.S_IMODE(found.st_mode):o})")


def _warn(path: Path, why: str) -> None:
    if path not in _told:
        _told.add(path)
        warnings.warn(f"{path} is not used, because {why}: {_REMEDY}.", stacklevel=3)


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not valid JSON")


def _path(kind: str, key: dict[str, Any]) -> Path:
    return folder(kind) / f"{hashlib.sha256(_text(key).encode()).hexdigest()[:32]}.json"


def _text(key: dict[str, Any]) -> str:
    return json.dumps(key, sort_keys=True)
