"""What gpu-bench has measured, in a folder: results.json and table.txt, which are rewritten after every row."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lares_fast._errors import InputError
from lares_fast.gpu_bench.candidates import Result
from lares_fast.gpu_bench.rows import ROWS, WITH_LOG
from lares_fast.gpu_bench.table import text_of
from lares_fast.train.files import write_text

FORMAT = "lares_fast gpu-bench 1"
BEGUN = "begun"
_FINISHED = ("passed", "skipped")


class Results:
    """The results in the folder ``out``, by row, and the machine that they belong to. A new folder has none."""

    def __init__(self, out: Path) -> None:
        """Read the results. Raises :class:`InputError` if their file is damaged or another program wrote it."""
        self.path = out / "results.json"
        self.machine: dict[str, str] = {}
        self.rows: dict[str, Result] = {}
        if self.path.exists():
            self.machine, self.rows = _read(self.path)

    def claim(self, machine: Mapping[str, str]) -> None:
        """Note the ``machine`` of this call. Raises :class:`InputError` if the results belong to another one.

        Times of two machines, or of two versions of the software, must not be in one table.
        """
        for name, value in machine.items():
            if self.machine and (earlier := self.machine.get(name, "unknown")) != value:
                raise InputError(
                    f"{self.path} was measured with another {name} ({earlier}, now {value}): "
                    "choose another --out, or move it away."
                )
        self.machine = dict(machine)
        self._write()

    def put(self, name: str, result: Result) -> None:
        """Store the result of a row and rewrite both files."""
        self.rows[name] = result
        order = [*ROWS, WITH_LOG]
        self.rows = dict(sorted(self.rows.items(), key=lambda row: order.index(row[0]) if row[0] in order else len(order)))
        self._write()

    def missing(self, names: Iterable[str], log: Path | None = None) -> list[str]:
        """Return the rows of ``names`` that are not measured, or failed, or were measured on another ``log``."""
        return [name for name in names if not self._is_finished(name, log)]

    def _is_finished(self, name: str, log: Path | None) -> bool:
        row = self.rows.get(name, {})
        if name == WITH_LOG and log is not None and row.get("facts", {}).get("log") != log.name:
            return False
        return row.get("status") in _FINISHED

    def text(self) -> str:
        """Return the table of all rows."""
        return text_of(self.machine, self.rows)

    def _write(self) -> None:
        content = {"format": FORMAT, "machine": self.machine, "rows": self.rows}
        write_text(self.path, json.dumps(content, indent=1) + "\n")
        write_text(self.path.with_name("table.txt"), self.text() + "\n")


def _read(path: Path) -> tuple[dict[str, str], dict[str, Result]]:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} is damaged ({error}): move it away, or choose another --out.") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise InputError(f"{path} was not written by this version of gpu-bench: move it away, or choose another --out.")
    machine: Any = content.get("machine")
    rows: Any = content.get("rows")
    if not _is_text(machine) or not isinstance(rows, dict) or not all(map(_is_row, rows.values())):
        raise InputError(f"{path} is damaged (its rows are not results): move it away, or choose another --out.")
    return machine, rows


def _is_text(values: Any) -> bool:
    return isinstance(values, dict) and all(isinstance(value, str) for value in values.values())


def _is_row(row: Any) -> bool:
    """Return whether ``row`` can be shown in the table."""
    if not isinstance(row, dict) or not isinstance(row.get("status"), str):
        return False
    turns = row.get("turns_ms", {})
    parts = [row.get(name, {}) for name in ("work", "rates")]
    return (
        all(isinstance(row.get(name, {}), dict) for name in ("turns_ms", "work", "rates", "facts", "left_out"))
        and isinstance(row.get("faults", []), list)
        and len({len(times) if isinstance(times, list) else -1 for times in turns.values()} | {0}) <= 2
        and all(_is_positive(value) for times in turns.values() for value in (times if isinstance(times, list) else [0]))
        and all(_is_positive(value) for part in parts for value in part.values())
    )


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value) and value >= 0
