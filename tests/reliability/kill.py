"""Kill and interrupt runs, fill disks, take away rights, and compare the end with an uninterrupted run."""

from __future__ import annotations

from tests.reliability import kill_moments
from tests.reliability.counts import Counts
from tests.reliability.kill_runs import place


def measure(counts: Counts) -> None:
    """Count what was tried and what failed."""
    with place() as somewhere:
        kill_moments.measure(counts, somewhere)
