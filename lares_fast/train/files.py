"""Atomic writes, which leave a whole file or none, and the lock of a run folder."""

from __future__ import annotations

import errno
import os
import re
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from lares_fast._errors import InputError

try:
    import fcntl
except ImportError:
    # Windows has no such module.
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EBADF)


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """Open a new file that replaces ``path`` when the block ends, and is removed if the block raises.

    Until then the file has a random name in the same folder. It is synced to the disk before it is moved, its mode obeys
    the umask, and a link at ``path`` is replaced, not followed.
    Raises :class:`InputError` if the file cannot be written, for example on a full disk. The previous file is then intact.
    """
    temporary = path.with_name(f".{path.name[:40]}.{secrets.token_hex(8)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # The system applies the umask to this mode.
        descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
        try:
            with os.fdopen(descriptor, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        _sync_folder(path.parent)
    except (OSError, RuntimeError) as error:
        if (cause := _cause(error)) is None:
            raise
        raise InputError(_not_written(path, cause)) from error


def atomic_write(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Replace ``path`` with a file that ``write(file)`` fills. Raises the errors of :func:`replacing`."""
    with replacing(path) as file:
        write(file)


def write_text(path: Path, text: str) -> None:
    """Write ``text`` to ``path`` as UTF-8, atomically. Raises the errors of :func:`replacing`."""
    atomic_write(path, lambda file: file.write(text.encode()))


def append_line(path: Path, line: str) -> None:
    """Append ``line`` to the file ``path``.

    It begins a new line even if a process was killed while it wrote the last line. Raises :class:`InputError` if the file
    cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab+") as file:
            if end := file.tell():
                file.seek(end - 1)
                if file.read(1) != b"\n":
                    line = f"\n{line}"
            file.write(f"{line}\n".encode())
    except OSError as error:
        raise InputError(_not_written(path, error)) from error


def remove_leftovers(folder: Path, names: tuple[str, ...]) -> None:
    """Remove the temporary files of processes that were killed while they wrote one of the files ``names``.

    The caller must hold the lock of ``folder``, because the file of another writer would be removed as well.
    """
    # An earlier version used temporary names of eight characters.
    leftover = re.compile(r"\.(?P<name>.+)\.([0-9a-f]{16}|[a-z0-9_]{8})")
    for path in folder.iterdir():
        if (match := leftover.fullmatch(path.name)) and match["name"] in names:
            path.unlink(missing_ok=True)


@contextmanager
def locked(folder: Path, tell: Callable[[str], Any] = lambda _: None) -> Iterator[None]:
    """Hold the lock of ``folder`` until the block or the process ends; a missing folder is made.

    Raises :class:`InputError` if the lock is already held, by this process or another, or if the folder cannot be written.
    If the file system has no locks, ``tell`` is called with a sentence that says so, and the block runs without a lock.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = _acquire(folder, tell)
    except OSError as error:
        raise InputError(_not_written(folder / LOCK, error)) from error
    try:
        yield
    finally:
        if descriptor is not None:
            # The file is removed before the lock is released. A process that opened the file and now gets the lock finds that
            # the file is gone, and makes a new one.
            (folder / LOCK).unlink(missing_ok=True)
            os.close(descriptor)


def _acquire(folder: Path, tell: Callable[[str], Any]) -> int | None:
    path = folder / LOCK
    while fcntl is not None:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_open_at(descriptor, path):
                return descriptor
            os.close(descriptor)
        except BlockingIOError:
            os.close(descriptor)
            raise InputError(
                f"{folder} is in use: another run writes into it; wait until it ends, stop it, or choose another folder."
            ) from None
        except OSError as error:
            os.close(descriptor)
            path.unlink(missing_ok=True)
            if error.errno not in _NO_LOCKS:
                raise
            break
    tell(f"the file system of {folder} has no locks: make sure that no other run writes into it.")
    return None


def _is_open_at(descriptor: int, path: Path) -> bool:
    """Return whether ``path`` still names the open file; its last holder may have removed it."""
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(descriptor), os.lstat(path))
    return False


def _sync_folder(folder: Path) -> None:
    """Write the names of the files in ``folder`` to the disk, where the system can sync a folder."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _cause(error: BaseException | None) -> OSError | None:
    """Return the system's error that caused ``error``, if any. torch and arrow raise other errors in its place."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error


def _not_written(path: Path, error: OSError) -> str:
    """Return the message for a file that cannot be written."""
    remedy = "free the disk and try again" if error.errno in _FULL else "choose a place that can be written to"
    intact = "; the previous file is intact" if os.path.isfile(path) else ""
    return f"{path} could not be written ({error.strerror or error}): {remedy}{intact}."
