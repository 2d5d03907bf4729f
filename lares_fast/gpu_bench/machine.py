"""The device of the rows, its clock, and the description of the machine that results belong to."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import platform
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from lares_fast import __version__

Call = Callable[[], Any]

TURNS, FILL_MS, MOST_CALLS, WARM_UP = 7, 20.0, 200, 3
# Largest sizes of a rehearsal, which only shows that a row runs.
_FEW_ROWS, _FEW_ITEMS = 8, 3000


class Machine:
    """The device that rows run on, and its clock.

    In a rehearsal it is the CPU: sizes are small, the backend is ``reference``, and times have no meaning. ``stage`` is
    called with the name of a candidate before it is checked.
    """

    def __init__(self, *, rehearse: bool, stage: Callable[[str], None] = lambda name: None) -> None:
        self.rehearse, self.stage = rehearse, stage
        self.device = torch.device("cpu" if rehearse else "cuda")

    def batch(self, B: int) -> int:
        """Return the number of rows ``B``, or few rows in a rehearsal."""
        return min(B, _FEW_ROWS) if self.rehearse else B

    def catalog(self, N: int) -> int:
        """Return the number of items ``N``, or few items in a rehearsal."""
        return min(N, _FEW_ITEMS) if self.rehearse else N

    def backend(self, name: str) -> str:
        """Return the backend ``name``, or ``reference`` in a rehearsal."""
        return "reference" if self.rehearse else name

    def synchronize(self) -> None:
        """Wait for the device."""
        if not self.rehearse:
            torch.cuda.synchronize()

    def once(self, call: Call, count: int) -> float:
        """Return the milliseconds of one call, averaged over ``count`` calls in a row."""
        if self.rehearse:
            began = time.perf_counter()
            for _ in range(count):
                call()
            return 1e3 * (time.perf_counter() - began) / count
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(count):
            call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / count

    def turns(self, calls: Mapping[str, Call]) -> dict[str, list[float]]:
        """Return the milliseconds of all turns of each of ``calls``, which take turns. A turn fills at least 20 ms."""
        counts = {name: self._calls_of_a_turn(call) for name, call in calls.items()}
        found: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(1 if self.rehearse else TURNS):
            for name, call in calls.items():
                found[name].append(self.once(call, counts[name]))
        return found

    def _calls_of_a_turn(self, call: Call) -> int:
        if self.rehearse:
            return 1
        # torch.compile records a CUDA graph at its second call.
        self.once(call, WARM_UP)
        return max(1, min(MOST_CALLS, int(FILL_MS / max(self.once(call, 1), 1e-3))))


def describe(*, rehearse: bool) -> dict[str, str]:
    """Return what results depend on: the GPU, the driver, and the versions of the software."""
    properties = None if rehearse else torch.cuda.get_device_properties(0)
    return {
        "card": f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
        if properties
        else "none: a rehearsal on the CPU",
        "driver": "none" if rehearse else _driver(),
        "torch": f"{torch.__version__}, CUDA {torch.version.cuda}",
        "triton": _version("triton"),
        "python": platform.python_version(),
        "lares_fast": f"{__version__}, sources {_sources()}",
    }


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        printed = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return printed.partition("\n")[0].strip()


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def _sources() -> str:
    """Return a digest of the package's code, because a checkout changes without its version."""
    kernels = importlib.util.find_spec("lares_fast.kernels")
    folders = [Path(__file__).parents[1], *map(Path, (kernels and kernels.submodule_search_locations) or ())]
    digest = hashlib.sha256()
    for folder in folders:
        for path in sorted(path for path in folder.rglob("*") if path.suffix in (".py", ".so")):
            digest.update(str(path.relative_to(folder)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:10]
