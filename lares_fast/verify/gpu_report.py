"""The report of ``lares-fast gpu-day``: the result of each step, in a file that is rewritten after every step."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from lares_fast._errors import InputError
from lares_fast._files import read_small, write_text

# A report has at most some hundred kilobytes.
_MOST_BYTES = 16 << 20


class Report:
    """The results of all steps by name.

    ``found`` holds the results of earlier steps. Each of ``names`` begins as ``not reached``. ``tell`` is called with one
    line after every step. Threads may share a report.
    """

    def __init__(
        self,
        path: Path,
        names: Iterable[str],
        found: Mapping[str, dict[str, Any]] | None = None,
        tell: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.path, self._tell, self._lock = path, tell, threading.Lock()
        self.found: dict[str, dict[str, Any]] = {**(found or {}), **{name: {"status": "not reached"} for name in names}}
        self._write()

    def put(self, name: str, result: dict[str, Any]) -> None:
        """Store the result of the step ``name`` and rewrite the file."""
        with self._lock:
            self.found[name] = result
            self._write()
        self._tell(f"{name}: {result['status']} ({result.get('seconds', 0)} s)")

    def _write(self) -> None:
        write_text(self.path, json.dumps(self.found, indent=1))


def read(path: Path) -> dict[str, dict[str, Any]]:
    """Read a report. Raises :class:`InputError` if the file is not a report."""
    try:
        found = json.loads(read_small(path, _MOST_BYTES))
    except InputError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} is not a report of gpu-day ({error}): give the JSON file that gpu-day wrote.") from error
    if not isinstance(found, dict) or not all(isinstance(one, dict) and "status" in one for one in found.values()):
        raise InputError(f"{path} is not a report of gpu-day: give the JSON file that gpu-day wrote.")
    return found


def is_well(result: Mapping[str, Any]) -> bool:
    """Return whether a step passed or was skipped."""
    return result["status"] in ("passed", "skipped")


def table(found: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the results as a Markdown table."""
    lines = ["| step | result | seconds | details |", "|---|---|---|---|"]
    for name, result in found.items():
        passing = [option for option, status in result.get("with", {}).items() if status == "passed"]
        accuracy = ""
        if "tensors" in result:
            accuracy = f"largest error {result['worst']:.2f} of its bound, first call {result['first_call_s']} s"
        last = result.get("log", "").strip().splitlines()[-1:]
        details = [*result.get("faults", []), result.get("why", ""), result.get("summary", ""), *last, accuracy]
        text = "; ".join(part[:1000] for part in details if part)
        if passing:
            text += f" (passes {', '.join(passing)})"
        lines.append(f"| {name} | {result['status']} | {result.get('seconds', '')} | {text.replace('|', '/')} |")
    return "\n".join(lines)
