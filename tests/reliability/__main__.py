"""Run parts of the reliability tests: ``python -m tests.reliability [PART ...] [--quick]``.

Without ``--quick`` a part takes minutes to hours, and writes its counts into tests/reliability/results and docs/reliability.md.
"""

from __future__ import annotations

import argparse
import importlib
import subprocess
import sys
import time

from tests.reliability.counts import RESULTS, Counts
from tests.reliability.parts import PARTS
from tests.reliability.table import PAGE, page


def main() -> int:
    """Run the parts that the command line names, and return 1 if one of them failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.reliability", description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"one of {', '.join(PARTS)}; all of them by default")
    parser.add_argument("--quick", action="store_true", help="a short form of each part, which writes no results")
    arguments = parser.parse_args()
    if unknown := set(arguments.parts) - set(PARTS):
        parser.error(f"unknown part {', '.join(sorted(unknown))}; the parts are {', '.join(PARTS)}")
    parts = arguments.parts or list(PARTS)
    if len(parts) == 1:
        return int(not run(parts[0], quick=arguments.quick))
    # Each part has a process of its own, because some parts measure their process.
    same = [sys.executable, "-m", "tests.reliability", *(["--quick"] if arguments.quick else [])]
    if failed := [name for name in parts if subprocess.run([*same, name], check=False).returncode]:
        print(f"failed: {', '.join(failed)}")
    return int(bool(failed))


def run(name: str, *, quick: bool) -> bool:
    """Run one part, and return whether it passed. Its long form writes the results and the page."""
    counts, began = Counts(name, quick), time.monotonic()
    importlib.import_module(f"tests.reliability.{name}").measure(counts)
    for row in counts.rows.values():
        print(f"{name}: {row.what}: {row.tried:,} tried, {row.failed} failed, {row.lost} lost. {row.note}".rstrip())
    print(f"{name}: {'passed' if counts.passed else 'FAILED'} after {time.monotonic() - began:.0f} s", flush=True)
    if not quick:
        counts.save(RESULTS)
        PAGE.write_text(page())
    return counts.passed


if __name__ == "__main__":
    sys.exit(main())
