"""Count what a part of the reliability tests has tried, what failed and what was lost, and keep the counts as a file."""

from __future__ import annotations

import json
import platform
import subprocess
import time
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).parent / "results"
# The folder of the package that is tested, for the path of other processes. It need not be the one of these sources.
PACKAGE = next(Path(place).parent for place in find_spec("lares_fast").submodule_search_locations)

# The most failures that are kept with their text.
_KEPT = 20


@dataclass
class Row:
    """One row of the table.

    ``failed`` counts results that the page docs/reliability.md does not promise. ``lost`` counts the failures among them
    that lost data or gave a wrong result without an error.
    """

    what: str
    tried: int = 0
    failed: int = 0
    lost: int = 0
    note: str = ""


@dataclass
class Counts:
    """The rows of the part ``name``. They are printed while the part runs."""

    name: str
    quick: bool = False
    rows: dict[str, Row] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    _began: float = field(default_factory=time.monotonic)
    _row_began: dict[str, float] = field(default_factory=dict)
    _told: float = 0.0

    def tried(self, what: str, number: int = 1, *, goal: int = 0) -> None:
        """Count ``number`` more tries of the kind ``what``; ``goal`` is the number of all tries, for the time that is left."""
        row = self._row(what)
        row.tried += number
        now = time.monotonic()
        began = self._row_began.setdefault(what, now)
        if now - self._told > 10:
            self._told = now
            of, left = "", ""
            # A row may get tries of several kinds, each with a goal of its own.
            if goal >= row.tried > 0:
                of, left = f" of {goal:,}", f", {(goal - row.tried) * (now - began) / row.tried / 60:.1f} minutes left"
            print(f"{self.name}: {what}: {row.tried:,}{of} tried, {row.failed} failed{left}", flush=True)

    def failed(self, what: str, text: str, *, lost: bool = False) -> None:
        """Count one failure, which ``text`` describes."""
        row = self._row(what)
        row.failed += 1
        row.lost += lost
        print(f"{self.name}: {what}: FAILED{' AND LOST' if lost else ''}: {text}", flush=True)
        if len(self.failures) < _KEPT:
            self.failures.append(f"{what}: {text}")

    def note(self, what: str, text: str) -> None:
        """Add a short note to the row ``what``, for example a measured size."""
        self._row(what).note = text

    @property
    def passed(self) -> bool:
        """Return whether something was tried and nothing failed."""
        return bool(self.rows) and not any(row.failed for row in self.rows.values())

    def result(self) -> dict[str, Any]:
        """Return everything that the page and a reader need to repeat the run."""
        return {
            "part": self.name,
            "command": f"python -m tests.reliability {self.name}{' --quick' if self.quick else ''}",
            "date": time.strftime("%Y-%m-%d"),
            "commit": _commit(),
            "seconds": round(time.monotonic() - self._began),
            "machine": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
            "torch": version("torch"),
            "numpy": version("numpy"),
            "rows": [asdict(row) for row in self.rows.values()],
            "failures": self.failures,
        }

    def save(self, folder: Path) -> None:
        """Write :meth:`result` to ``folder``."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{self.name}.json").write_text(json.dumps(self.result(), indent=1) + "\n")

    def _row(self, what: str) -> Row:
        return self.rows.setdefault(what, Row(what))


def _commit() -> str:
    done = subprocess.run(["git", "-C", ROOT, "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"
