"""Peak memory of a call beyond what the process already holds (Linux)."""

from collections.abc import Callable
from pathlib import Path


def extra_mib(run: Callable[[], object]) -> float:
    """MiB by which the resident size rose, at its highest, while ``run`` ran.

    Memory that the allocator had kept from earlier calls does not count, so measure in a fresh process.
    """
    # Resets the high-water mark to the present size.
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    run()
    return (_status("VmHWM") - before) / 1024


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))
