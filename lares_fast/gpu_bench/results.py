"""What gpu-bench has measured, in a folder: results.json and table.txt, which are rewritten after every row."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from lares_fast._errors import InputError
from lares_fast._files import read_small, write_text
from lares_fast.gpu_bench.candidates import Result
from lares_fast.gpu_bench.rows import ROWS, WITH_LOG
from lares_fast.gpu_bench.table import text_of

FORMAT = "lares_fast gpu-bench 1"
BEGUN = "begun"
_FINISHED = ("passed", "skipped")
_MOST_BYTES = 16 << 20


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
        content = {"format": FORMAT, "sha256": _digest(self.machine, self.rows), "machine": self.machine, "rows": self.rows}
        write_text(self.path, json.dumps(content, indent=1) + "\n")
        write_text(self.path.with_name("table.txt"), self.text() + "\n")


def _read(path: Path) -> tuple[dict[str, str], dict[str, Result]]:
    remedy = "move it away, or choose another --out"
    try:
        content = json.loads(read_small(path, _MOST_BYTES))
    except InputError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} is damaged ({str(error)[:100]}): {remedy}.") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise InputError(f"{path} was not written by this version of gpu-bench: {remedy}.")
    machine, rows = content.get("machine", {}), content.get("rows", {})
    if content.get("sha256") != _digest(machine, rows):
        raise InputError(f"{path} is damaged (its checksum is wrong): {remedy}.")
    return machine, rows


def _digest(machine: dict[str, str], rows: dict[str, Result]) -> str:
    return hashlib.sha256(json.dumps([machine, rows], sort_keys=True).encode()).hexdigest()
