"""Time candidates in turns. Every round runs every candidate once, and a ratio compares two runs of the same round.

The clock is the CPU time of this process on one pinned core. Other programs on the machine make wall time longer, and they slow
all candidates of a round about equally. The caller checks the results before it times anything.
"""

from __future__ import annotations

import contextlib
import csv
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks import fma_peak


@dataclass(frozen=True)
class Row:
    """The times of one candidate, and its ratio to the baseline, which is the first candidate of the comparison."""

    group: str
    candidate: str
    baseline: str
    shape: str
    rounds: int
    cpu_s_min: float
    cpu_s_median: float
    cpu_s_max: float
    ratio_min: float
    ratio_median: float
    ratio_max: float
    check: str


@dataclass(frozen=True)
class Fact:
    """One measured number that is not a ratio of times."""

    group: str
    shape: str
    name: str
    value: float


def interleave(
    group: str,
    shape: str,
    candidates: Mapping[str, Callable[[], object]],
    check: str,
    rounds: int = 7,
    clock: Callable[[], float] = time.process_time,
    warm_up: int = 1,
) -> list[Row]:
    """Time ``candidates``, of which the first is the baseline. A ratio is baseline time / candidate time: above 1 is faster.

    ``check`` says which results the caller has checked. To compare numbers of threads, give the clock of wall time
    (``time.perf_counter``); then each candidate sets its number of threads itself.
    """
    with one_core() if clock is time.process_time else contextlib.nullcontext():
        for _ in range(warm_up):
            for run in candidates.values():
                run()
        seconds: dict[str, list[float]] = {name: [] for name in candidates}
        for _ in range(rounds):
            for name, run in candidates.items():
                began = clock()
                run()
                seconds[name].append(clock() - began)
    return rows(group, shape, seconds, check)


def rows(group: str, shape: str, seconds: Mapping[str, Sequence[float]], check: str) -> list[Row]:
    """Return a row for each candidate from its ``seconds`` in every round. The first candidate is the baseline."""
    baseline = next(iter(seconds))
    result = []
    for name, times in seconds.items():
        ratios = [a / b for a, b in zip(seconds[baseline], times, strict=True)]
        result.append(Row(
            group, name, baseline, shape, len(times), min(times), statistics.median(times), max(times),
            min(ratios), statistics.median(ratios), max(ratios), check,
        ))  # fmt: skip
    return result


def share_of_peak(group: str, shape: str, run: Callable[[], object], flops: float, rounds: int = 25) -> list[Fact]:
    """Return the percentage of one core's measured peak that ``run`` reaches when it does ``flops`` operations.

    Every round measures both. The facts are the median, the minimum and the maximum over the rounds, and the fastest run as a
    share of the highest peak. On a busy machine the last fact is the most reliable.
    """
    done = fma_peak.flops()
    shape = f"{shape}, {fma_peak.level()}"
    peak, times = interleave(group, shape, {"peak": fma_peak.flops, "run": run}, "", rounds)
    scale = 100 * flops / done
    fastest = peak.cpu_s_min / times.cpu_s_min
    values = {"median": times.ratio_median, "min": times.ratio_min, "max": times.ratio_max, "fastest": fastest}
    return [Fact(group, shape, f"% of FMA peak, {name}", scale * value) for name, value in values.items()]


class one_core:
    """A context that runs on one thread of PyTorch and one core of the machine."""

    def __enter__(self) -> None:
        self._threads = torch.get_num_threads()
        torch.set_num_threads(1)
        self._cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
        if self._cores:
            os.sched_setaffinity(0, {max(self._cores)})

    def __exit__(self, *_: object) -> None:
        torch.set_num_threads(self._threads)
        if self._cores:
            os.sched_setaffinity(0, self._cores)


def append(path: Path, rows: Sequence[Row | Fact]) -> None:
    """Append ``rows``, all of one class, to a CSV file. Each row names its machine, commit and command."""
    context = {
        "machine": _cpu(),
        "torch": torch.__version__,
        "commit": _git("rev-parse", "--short", "HEAD"),
        "dirty": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "date": time.strftime("%Y-%m-%d"),
        "command": shlex.join(["pytest", *sys.argv[1:]]),
    }
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0].__dataclass_fields__, *context], lineterminator="\n")
        if new:
            writer.writeheader()
        for row in rows:
            values = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in vars(row).items()}
            writer.writerow({**values, **context})


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    names = (
        [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        if info.exists()
        else []
    )
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores"


def _git(*arguments: str) -> str:
    try:
        return subprocess.run(
            ["git", *arguments], capture_output=True, text=True, cwd=Path(__file__).parent, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
