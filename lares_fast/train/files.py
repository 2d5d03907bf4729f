"""How files are written: whole or not at all, by one process at a time."""

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
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EBADF)


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A new file that takes the place of ``path`` when the block ends well, and is removed when it does not.

    Until then it has a random name in the same folder, which no other process shares. It is on the disk before it is
    moved, its mode obeys the umask, and a link at ``path`` is replaced and not followed.
    Raises :class:`InputError` if the disk is full or refuses; what stood at ``path`` before is then untouched.
    """
    temporary = path.with_name(f".{path.name[:40]}.{secrets.token_hex(8)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # The system itself applies the umask to this mode.
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
        _keep_name(path.parent)
    except (OSError, RuntimeError) as error:
        if (cause := _cause(error)) is None:
            raise
        raise InputError(_refusal(path, cause)) from error


def atomic_write(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Have ``write(file)`` fill a file that takes the place of ``path``: :func:`replacing` in one call."""
    with replacing(path) as file:
        write(file)


def write_text(path: Path, text: str) -> None:
    """Atomically write ``text`` as UTF-8."""
    atomic_write(path, lambda file: file.write(text.encode()))


def append_line(path: Path, line: str) -> None:
    """Append ``line``; where a process was killed within the last one, the new one still begins a line of its own."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab+") as file:
            if end := file.tell():
                file.seek(end - 1)
                if file.read(1) != b"\n":
                    line = f"\n{line}"
            file.write(f"{line}\n".encode())
    except OSError as error:
        raise InputError(_refusal(path, error)) from error


def remove_leftovers(folder: Path, names: tuple[str, ...]) -> None:
    """Remove the temporary files of processes that were killed while they wrote a file of ``names``.

    Only for who holds the lock of ``folder``: another writer's file would be removed as well.
    """
    # Eight letters: the temporary names of an earlier version.
    leftover = re.compile(r"\.(?P<name>.+)\.([0-9a-f]{16}|[a-z0-9_]{8})")
    for path in folder.iterdir():
        if (match := leftover.fullmatch(path.name)) and match["name"] in names:
            path.unlink(missing_ok=True)


@contextmanager
def locked(folder: Path, tell: Callable[[str], Any] = lambda _: None) -> Iterator[None]:
    """Hold the lock of ``folder``, which is made if it is missing; the lock ends with the block or with the process.

    Raises :class:`InputError` if somebody holds it already, in this process too, or if nothing can be written there.
    Where the file system has no locks, ``tell`` gets a sentence that says so, and the block runs without one.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = _take(folder, tell)
    except OSError as error:
        raise InputError(_refusal(folder / LOCK, error)) from error
    try:
        yield
    finally:
        if descriptor is not None:
            # First the file, then the lock: who waits for the lock sees that its file is gone, and takes a new one.
            (folder / LOCK).unlink(missing_ok=True)
            os.close(descriptor)


def _take(folder: Path, tell: Callable[[str], Any]) -> int | None:
    path = folder / LOCK
    while fcntl is not None:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is(descriptor, path):
                return descriptor
            os.close(descriptor)
        except BlockingIOError:
            os.close(descriptor)
            raise InputError(
                f"{folder} is in use: another run writes into it; wait for its end, stop it, or choose another folder."
            ) from None
        except OSError as error:
            os.close(descriptor)
            path.unlink(missing_ok=True)
            if error.errno not in _NO_LOCKS:
                raise
            break
    tell(f"the file system of {folder} has no locks: make sure that no other run writes into it.")
    return None


def _is(descriptor: int, path: Path) -> bool:
    """Whether ``path`` still names the open file: its last holder may have removed it."""
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(descriptor), os.lstat(path))
    return False


def _keep_name(folder: Path) -> None:
    """Have the new name in ``folder`` survive a loss of power, too."""
    # Not every system can open or sync a folder.
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _cause(error: BaseException | None) -> OSError | None:
    """The error of the system: torch and arrow report a failed write in words of their own while they handle it."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error


def _refusal(path: Path, error: OSError) -> str:
    remedy = "free the disk and try again" if error.errno in _FULL else "choose a place that can be written to"
    intact = "; the previous file is intact" if os.path.isfile(path) else ""
    return f"{path} could not be written ({error.strerror or error}): {remedy}{intact}."
