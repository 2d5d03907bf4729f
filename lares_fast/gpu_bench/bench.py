"""Run rows in a process of their own, so that a row that hangs or crashes loses no other row."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lares_fast._files import open_log
from lares_fast.gpu_bench.candidates import Result
from lares_fast.gpu_bench.rows import LEAST_SECONDS, Row
from lares_fast.verify.process import running, without_folders

NOT_REACHED = "not reached"
# Characters of the end of a log that a result repeats.
_TAIL = 1500


def marker(row: str) -> str:
    """Return the line with which the log of ``row`` begins."""
    return f"== {row}\n"


@dataclass(frozen=True)
class Listener:
    """What is called while rows run.

    ``machine`` gets the description of the machine and may raise. ``begin`` gets a row's name, ``stage`` what it does now,
    and ``end`` its name and its result.
    """

    machine: Callable[[dict[str, str]], object]
    begin: Callable[[str], object]
    stage: Callable[[str], object]
    end: Callable[[str, Result], object]


@dataclass(frozen=True)
class Bench:
    """How rows run: the folder of their logs, the user's log, and the time on ``clock`` at which all must end."""

    logs: Path
    rehearse: bool = False
    log: Path | None = None
    end: float = float("inf")
    clock: Callable[[], float] = time.monotonic

    def run(self, rows: dict[str, Row], listener: Listener) -> None:
        """Run ``rows`` one after the other. If a process ends before its last row, another one runs the rows behind it."""
        left = list(rows)
        while left and self.end - self.clock() > LEAST_SECONDS:
            begun = self._run_process(left, rows, listener)
            if begun is None:
                return
            left = left[left.index(begun) + 1 :]

    def command(self, rows: Sequence[str]) -> list[str]:
        """Return the command of the process that runs ``rows``."""
        seconds = min(self.end - self.clock(), 1e9)
        request = {
            "rows": list(rows),
            "rehearse": self.rehearse,
            "log": str(self.log) if self.log else None,
            "seconds": seconds,
        }
        return [sys.executable, "-P", "-m", "lares_fast.gpu_bench", json.dumps(request)]

    def _run_process(self, left: Sequence[str], rows: dict[str, Row], listener: Listener) -> str | None:
        """Run ``left`` in one process. Return the last row that it began, or ``None`` if there was no time for a row."""
        begun, ended = None, True
        with open_log(self.logs) as log, running(self.command(left), out=subprocess.PIPE, log=log) as process:
            place = log.tell()
            for line in process.stdout or ():
                event: dict[str, Any] = json.loads(line)
                match event["event"]:
                    case "machine":
                        listener.machine(event["machine"])
                    case "begin":
                        begun, ended = event["row"], False
                        listener.begin(event["row"])
                    case "stage":
                        listener.stage(event["stage"])
                    case "end":
                        ended = True
                        listener.end(event["row"], event["result"])
            code = process.wait()
            text = self._log_since(place)
        if begun is None and code:
            listener.end(left[0], self._lost(code, text))
        if begun is not None and not ended:
            listener.end(begun, self._lost(code, text.rpartition(marker(begun))[2], rows[begun].limit))
        return begun

    def _log_since(self, place: int) -> str:
        with self.logs.open(errors="replace") as log:
            log.seek(place)
            return log.read()

    def _lost(self, code: int, text: str, limit: float = 0.0) -> Result:
        """Return the result of a row whose process ended with ``code`` and has logged ``text`` since the row began."""
        text = without_folders(text.strip())
        if limit and self.clock() > self.end - 1:
            return {"status": NOT_REACHED, "why": "the time was over before this row was finished"}
        if re.search(r"^Timeout \(", text, re.MULTILINE):
            return {"status": "hung", "faults": [f"it did not finish within {limit:.0f} s"], "log": text[-_TAIL:]}
        why = f"its process ended with exit code {code}: {text.splitlines()[-1] if text else 'its log is empty'}"
        return {"status": "failed", "faults": [why], "log": text[-_TAIL:]}
