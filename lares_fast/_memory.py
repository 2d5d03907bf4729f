"""How much memory is free for this process, and errors about missing memory as one sentence."""

from __future__ import annotations

import errno
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from lares_fast._errors import InputError

if TYPE_CHECKING:
    # The command line uses this module before it imports torch, which takes seconds.
    import torch

try:
    import resource
except ImportError:
    # Windows has no such module.
    resource = None  # type: ignore[assignment]

_PROC, _CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")

_SIZE = re.compile(r"allocate ([\d.]+) ?(bytes|[KMGTP]i?B)|(?:malloc|realloc)\w* of size (\d+)()", re.IGNORECASE)
_MISSING = re.compile(
    r"out of memory|not enough memory|can't allocate memory|cannot allocate memory|unable to allocate|bad_alloc"
    r"|failed to map segment|storage size calculation overflowed|multiplication overflow"
    # Python raises SystemError with this text if it has no memory for the error.
    r"|error return without exception set",
    re.IGNORECASE,
)
_UNITS = {"b": 0, "k": 1, "m": 2, "g": 3, "t": 4, "p": 5}


def free_bytes(device: torch.device) -> int:
    """Return the bytes that this process can still take on ``device``, or ``sys.maxsize`` if there is no known limit.

    On the CPU this is the least of the memory that the system has available, of what the control groups of the process leave,
    and of what its limits on address space and data leave.
    """
    if device.type == "cuda":
        import torch

        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    return _free_of_the_host() if device.type == "cpu" else sys.maxsize


def _free_of_the_host() -> int:
    return max(0, min([_available(), *_left_by_groups(), *_left_by_limits()]))


def require_room(size: int, what: str) -> None:
    """Raise :class:`InputError` if less than ``size`` bytes of memory are free for ``what``.

    Call it before code that may end the process when memory is short, such as the import of a large library.
    """
    if (free := _free_of_the_host()) < size:
        raise InputError(f"{what} needs about {as_size(size)} of memory, and {as_size(free)} are free: end other programs.")


def resident_bytes() -> int:
    """Return the bytes of memory that this process has now, or 0 where the system does not say it."""
    return _field("self/status", "VmRSS")


def as_size(size: float) -> str:
    """Return a number of bytes as text, in GiB, or in MiB if it is small."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**27 else f"{size / 2**20:.1f} MiB"


def missing_memory(error: BaseException) -> str | None:
    """Return a clause with the size that could not be allocated, or ``None`` if ``error`` has another cause.

    The text is empty if the size is not known.
    """
    text = str(error)
    no_memory = isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
    if not no_memory and not _MISSING.search(text):
        return None
    if not (found := _SIZE.search(text)):
        return ""
    number, unit = found[1] or found[3], found[2] or "bytes"
    return f"{as_size(float(number) * 1024 ** _UNITS[unit[0].lower()])} could not be allocated"


@contextmanager
def allocating(what: str, remedy: str, setting: str | None = None) -> Iterator[None]:
    """Turn an error about missing memory within the ``with`` block into an :class:`InputError`.

    The message names ``what`` the memory was for, and the ``remedy``. ``setting`` is as in :class:`InputError`.
    """
    try:
        yield
        return
    except InputError:
        raise
    except (MemoryError, RuntimeError, OSError, ImportError, SystemError) as error:
        if (missing := missing_memory(error)) is None:
            raise
        where = "the memory of the GPU" if _of_a_gpu(error) else "the free memory"
        sentence = f"{where} is not enough for {what}: {remedy}{missing and f'; {missing}'}."
    # Raised outside of the handler, so that the traceback of the error keeps no memory.
    raise InputError(sentence, setting)


@contextmanager
def enough_memory(batch_size: int, name: str = "batch_size", setting: str | None = None) -> Iterator[None]:
    """Turn an error about missing memory within the ``with`` block into an :class:`InputError`.

    The message names ``batch_size`` by ``name``, and a value to try, half of it. ``setting`` is the dotted setting of the
    batch size, which the command line shows as a flag.
    """
    half = batch_size // 2
    remedy = f"try {name} {half}" if half else "end other processes, or choose a smaller model or another device"
    with allocating(f"{name} {batch_size}", remedy, f"{setting}={half}" if setting and half else None):
        yield


def _of_a_gpu(error: BaseException) -> bool:
    return type(error).__name__ == "OutOfMemoryError" or "CUDA" in str(error)


def _available() -> int:
    return _field("meminfo", "MemAvailable") or sys.maxsize


def _field(file: str, name: str) -> int:
    """Return the bytes that a line of a file in /proc states, or 0 if there is no such line."""
    with suppress(OSError, ValueError):
        for line in (_PROC / file).read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
    return 0


def _left_by_groups() -> Iterator[int]:
    """Yield what each control group of this process leaves. A group's limit holds for all groups inside it, too."""
    with suppress(OSError):
        for line in (_PROC / "self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and "memory" not in controllers.split(","):
                continue
            root = _CGROUPS / "memory" if controllers else _CGROUPS
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if controllers else ("memory.max", "memory.current")
            folder = root / path.strip("/")
            # In a container the root may already be the group, and the path may not exist below it.
            for group in (folder, *folder.parents):
                if group.is_relative_to(root):
                    yield _left_in(group, *names)


def _left_in(group: Path, limit: str, usage: str) -> int:
    with suppress(OSError, ValueError):
        most, used = ((group / name).read_text().strip() for name in (limit, usage))
        if most != "max":
            # The system gives up pages of files when memory is short.
            pages = re.findall(r"^(?:total_)?inactive_file (\d+)$", (group / "memory.stat").read_text(), re.MULTILINE)
            # The last line counts the groups inside this one, too.
            return int(most) - int(used) + int(pages[-1] if pages else 0)
    return sys.maxsize


def _left_by_limits() -> Iterator[int]:
    if resource is None:
        return
    for limit, held in ((resource.RLIMIT_AS, "VmSize"), (resource.RLIMIT_DATA, "VmData")):
        most = resource.getrlimit(limit)[0]
        if most != resource.RLIM_INFINITY:
            yield most - _field("self/status", held)
