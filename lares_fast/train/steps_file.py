"""The values of every training step, in one CSV file for each phase: ``steps-spt.csv`` and ``steps-rpt.csv``.

The state of the run holds the size and the SHA-256 of each file. A run that is resumed cuts its files to these sizes, because
it makes the later steps again. So interruptions leave no trace in a file.
"""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

from lares_fast._files import append_line, content, write_text
from lares_fast._weights import sha256
from lares_fast.train.config import PHASES
from lares_fast.train.files import steps_file

# Rows stay in memory until the run is saved, or until there are so many.
_MOST_ROWS = 200

# Phase -> [size of its file in bytes, SHA-256 of this part].
Sizes = dict[str, list[Any]]


class StepsFiles:
    """The files of steps in ``folder``, which holds no step yet, or those of ``sizes`` in the state that was loaded."""

    def __init__(self, folder: Path, sizes: Sizes) -> None:
        self._folder, self._begun = folder, set(sizes)
        self._rows: dict[str, list[dict[str, Any]]] = {}

    def add(self, phase: str, row: dict[str, Any]) -> None:
        """Take the values of one step of ``phase``. All rows of a phase have the same names."""
        rows = self._rows.setdefault(phase, [])
        rows.append(row)
        if len(rows) >= _MOST_ROWS:
            self.flush()

    def flush(self) -> None:
        """Write all rows."""
        for phase, rows in self._rows.items():
            if not rows:
                continue
            path, text = self._folder / steps_file(phase), io.StringIO()
            writer = csv.DictWriter(text, rows[0], lineterminator="\n")
            if phase not in self._begun:
                # There may be a file of a run that was killed before its first save.
                writer.writeheader()
                writer.writerows(rows)
                write_text(path, text.getvalue())
                self._begun.add(phase)
            else:
                writer.writerows(rows)
                append_line(path, text.getvalue().removesuffix("\n"), sync=True)
            rows.clear()

    def sizes(self) -> Sizes:
        """Return the present sizes and digests, which the state holds."""
        found = {phase: content(self._folder / steps_file(phase)) for phase in PHASES if phase in self._begun}
        return {phase: [len(data), sha256(data)] for phase, data in found.items()}

    def mend(self, sizes: Sizes) -> list[str]:
        """Cut the files to ``sizes``, and return a sentence on each file that is not as it was."""
        texts = []
        for phase, (size, digest) in sizes.items():
            path = self._folder / steps_file(phase)
            data = content(path)
            if sha256(data[:size]) != digest:
                texts.append(f"{path} is damaged or lacks lines that it had; it stays as it is, and new lines follow.")
            elif len(data) > size:
                write_text(path, data[:size].decode())
        return texts
