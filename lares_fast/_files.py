"""Atomic writes, which leave a whole file or none, reading without waiting for a pipe, and the lock of a run folder."""

from __future__ import annotations

import errno
import os
import re
import secrets
import stat
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

# Folder whose lock this process holds -> the open lock file, or _OF_PARENT.
_HELD: dict[str, int] = {}
# The process that has forked this one holds the lock.
_OF_PARENT = -1


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """Open a new file that replaces ``path`` when the block ends, and is removed if the block raises.

    Until then the file has a random name in the same folder. It is synced to the disk before it is moved, its mode obeys
    the umask, and a link at ``path`` is replaced, not followed.
    Raises :class:`InputError` if the file cannot be written, for example on a full disk. The previous file is then intact. Also
    raises it at once for the name of a folder, a pipe or a device, which is never replaced, and the errors of
    :func:`require_in_place`.
    """
    temporary = _temporary(path)
    _require_replaceable(path)
    require_in_place(path.parent)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # The system applies the umask to this mode.
        descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
        try:
            with os.fdopen(descriptor, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            # If the folder is replaced after this, the temporary file is not in the new one, and cannot be moved there.
            require_in_place(path.parent)
            os.replace(temporary, path)
        except BaseException:
            _remove(temporary)
            raise
        _sync_folder(path.parent)
    except (OSError, RuntimeError) as error:
        if (cause := _cause(error)) is None:
            raise
        if isinstance(cause, KeyboardInterrupt):
            raise KeyboardInterrupt from error
        raise InputError(_not_written(path, cause)) from error


def atomic_write(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Replace ``path`` with a file that ``write(file)`` fills. Raises the errors of :func:`replacing`."""
    with replacing(path) as file:
        write(file)


def keep_as(path: Path, older: Path) -> None:
    """Give the file ``path``, if there is one, the name ``older`` too. A file of this name is replaced.

    Raises :class:`InputError` if that fails, and the errors of :func:`require_in_place`.
    """
    if not os.path.isfile(path):
        return
    link = _temporary(older)
    try:
        try:
            os.link(path, link)
        except OSError:
            # The file system has no hard links. Until a new file is moved to ``path``, only ``older`` is there.
            link = path
        require_in_place(path.parent)
        os.replace(link, older)
    except OSError as error:
        raise InputError(_not_written(older, error)) from error
    finally:
        # It is still there if that failed, or if both names already were one file.
        if link != path and os.path.lexists(link):
            _remove(link)


def write_text(path: Path, text: str) -> None:
    """Write ``text`` to ``path`` as UTF-8, atomically. Raises the errors of :func:`replacing`."""
    atomic_write(path, lambda file: file.write(text.encode()))


def open_regular(path: Path, *, follow: bool = True) -> IO[bytes]:
    """Open the file ``path`` for reading. With ``follow=False``, a link raises OSError.

    Raises :class:`InputError` for a folder, a pipe or a device, without waiting for it, and OSError if there is no file or it
    cannot be opened.
    """
    # Without O_NONBLOCK, opening a pipe would wait for a writer.
    flags = os.O_RDONLY | sum(getattr(os, name, 0) for name in ("O_NONBLOCK", "O_CLOEXEC", "O_BINARY"))
    descriptor = os.open(path, flags if follow else flags | getattr(os, "O_NOFOLLOW", 0))
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise InputError(f"{path} is not a file, but a folder, a pipe or a device: give the name of a file.")

    return os.fdopen(descriptor, "rb")


def read_small(path: Path, most: int) -> bytes:
    """Return the content of ``path``. Raises the errors of :func:`open_regular`, and InputError beyond ``most`` bytes."""
    with open_regular(path) as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise InputError(f"{path} is longer than {most:,} bytes, the most that is read of such a file: check its name.")
    return data


def content(path: Path) -> bytes:
    """Return the bytes of a file, and no bytes if it cannot be read."""
    if not os.path.isfile(path):
        return b""
    try:
        return path.read_bytes()
    except OSError:
        return b""


def open_log(path: Path, make: int = os.O_CREAT) -> IO[bytes]:
    """Open the file ``path`` for reading and appending. A link raises OSError.

    ``make`` is a flag of :func:`os.open` for a missing file, which is made by default.
    Raises :class:`InputError` for a folder, a pipe or a device.
    """
    flags = os.O_RDWR | os.O_APPEND | make
    flags |= sum(getattr(os, name, 0) for name in ("O_NONBLOCK", "O_CLOEXEC", "O_BINARY", "O_NOFOLLOW"))
    descriptor = os.open(path, flags, 0o666)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise InputError(f"{path} is not a file, but a folder, a pipe or a device: move it away.")
    return os.fdopen(descriptor, "ab+")


def append_line(path: Path, line: str, *, sync: bool = False) -> None:
    """Append ``line`` to the file ``path``, which is made if it is missing.

    It begins a new line even if a process was killed while it wrote the last line. With ``sync`` it is on the disk when the
    function returns. Raises :class:`InputError` if the file
    cannot be written, and the errors of :func:`require_in_place`.
    """
    require_in_place(path.parent)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        new = not os.path.lexists(path)
        with open_log(path, os.O_CREAT | os.O_EXCL if new else 0) as file:
            try:
                require_in_place(path.parent)
            except InputError:
                if new:
                    _remove(path)
                raise
            if end := file.tell():
                file.seek(end - 1)
                if file.read(1) != b"\n":
                    line = f"\n{line}"
            file.write(f"{line}\n".encode())
            if sync:
                file.flush()
                os.fsync(file.fileno())
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

    A process that is forked meanwhile does not hold it, and must not write into the folder.

    Raises :class:`InputError` if the lock is already held, by this process or another, or if the folder cannot be written.
    If the file system has no locks, ``tell`` is called with a sentence that says so, and the block runs without a lock.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = _acquire(folder, tell)
    except OSError as error:
        raise InputError(_not_written(folder / LOCK, error)) from error

    if descriptor is None:
        yield
        return
    # The block may change the working directory.
    place = folder.absolute()
    _HELD[os.path.abspath(place)] = descriptor
    try:
        yield
    finally:
        if _HELD.pop(os.path.abspath(place)) != _OF_PARENT:
            # The file is removed before the lock is released. A process that opened the file and now gets the lock finds that
            # the file is gone, and makes a new one.
            if _is_open_at(descriptor, place / LOCK):
                _remove(place / LOCK)
            os.close(descriptor)


def _leave_locks_to_parent() -> None:
    """In a process that was forked, close the lock files. Otherwise the locks would last until this process ends."""
    for place, descriptor in _HELD.items():
        if descriptor != _OF_PARENT:
            os.close(descriptor)
        _HELD[place] = _OF_PARENT


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_locks_to_parent)


def require_in_place(folder: Path) -> None:
    """Raise :class:`InputError` if this process has locked ``folder``, and the folder has been moved or removed since then.

    At its old place there may be a folder of another run now. Also raises it in a process that was forked since then.
    """
    descriptor = _HELD.get(os.path.abspath(folder))
    if descriptor == _OF_PARENT:
        raise InputError(f"a forked process must not write into {folder}: only the process that began the run may do that.")
    if descriptor is not None and not _is_open_at(descriptor, folder / LOCK):
        raise InputError(
            f"{folder} was moved or removed while a run wrote into it, so the run has stopped: resume from the place where "
            "the folder is now, or begin again."
        )


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
            _remove(path)
            if error.errno not in _NO_LOCKS:
                raise
            break
    tell(f"the file system of {folder} has no locks: make sure that no other run writes into it.")
    return None


def _is_open_at(descriptor: int, path: Path) -> bool:
    """Return whether ``path`` still names the open file; its last holder may have removed it."""
    with suppress(FileNotFoundError, NotADirectoryError):
        return os.path.samestat(os.fstat(descriptor), os.lstat(path))
    return False


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name[:40]}.{secrets.token_hex(8)}")


def _require_replaceable(path: Path) -> None:
    """Raise :class:`InputError` if ``path`` names, directly or by a link, something other than a file."""
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):
        return
    if not stat.S_ISREG(mode):
        raise InputError(f"{path} could not be written, because it is a folder, a pipe or a device: give the name of a file.")


def _remove(path: Path) -> None:
    """Remove a file that is of no use any more. If that fails, an error that has come before it is more important."""
    with suppress(OSError):
        path.unlink()


def _sync_folder(folder: Path) -> None:
    """Write the names of the files in ``folder`` to the disk, where the system can sync a folder."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno == errno.EIO:
            raise InputError(
                f"{folder} could not be synced ({error.strerror}), so its newest file may be lost: check the disk."
            ) from error


def _cause(error: BaseException | None) -> OSError | KeyboardInterrupt | None:
    """Return the error of the system or the interruption behind ``error``, if any. torch and arrow raise others instead."""
    while error is not None and not isinstance(error, OSError | KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error


def _not_written(path: Path, error: OSError) -> str:
    """Return the message for a file that cannot be written."""
    remedy = "free the disk and try again" if error.errno in _FULL else "choose a place that can be written to"
    intact = "; the previous file is intact" if os.path.isfile(path) else ""
    return f"{path} could not be written ({error.strerror or error}): {remedy}{intact}."
