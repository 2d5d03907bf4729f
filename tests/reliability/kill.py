"""Kill and interrupt runs, fill disks, take away rights, and compare the end with an uninterrupted run."""

from __future__ import annotations

from tests.reliability import kill_disk, kill_folder, kill_moments, kill_planted, kill_recommend, kill_signals
from tests.reliability.counts import Counts
from tests.reliability.kill_runs import place


def measure(counts: Counts) -> None:
    """Count what was tried and what failed."""
    with place() as somewhere:
        for kind in (kill_moments, kill_signals, kill_disk, kill_folder, kill_recommend, kill_planted):
            kind.measure(counts, somewhere)
