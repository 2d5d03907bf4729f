"""Measure the peak memory of a call, without the memory that the process already has. Linux only."""

from collections.abc import Callable
from pathlib import Path


def extra_mib(run: Callable[[], object]) -> float:
    """Return the largest growth of the resident size, in MiB, while ``run`` runs.

    Memory that the allocator holds from earlier calls is not counted, so measure in a new process.
    """
    # This sets the recorded peak to the current size.
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    run()
    return (_status("VmHWM") - before) / 1024


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))
