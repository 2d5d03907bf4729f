"""The rating column of an event log, of which only the comparison with a threshold is kept."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lares_fast._errors import InputError
from lares_fast.data._text import Block
from lares_fast.data._times import NUMBER


class RatingColumn:
    """The ratings of one column, each compared with ``least``."""

    def __init__(self, path: Path, name: str, least: float) -> None:
        self._path, self._name, self._least = path, name, least
        self._blocks = [np.empty(0, bool)]

    def add(self, values: NDArray[np.float64], places: NDArray[np.int64], place: str) -> None:
        """Append ratings [n], which are in the lines or rows ``places`` [n] of the file. ``place`` is "line" or "row"."""
        if (bad := ~np.isfinite(values)).any():
            at = int(bad.argmax())
            raise self.wrong(str(values[at]), f"{place} {places[at]}")
        self._blocks.append(values >= self._least)

    def add_text(self, block: Block) -> None:
        """Append the numbers in the fields of ``block``."""
        if block.is_integer.all():
            self.add(block.integers.astype(np.float64), block.lines, "line")
            return
        values = np.empty(len(block))
        for at, text in enumerate(block.strings()):
            if not NUMBER.fullmatch(text.strip(" ")):
                raise self.wrong(text, f"line {block.lines[at]}")
            values[at] = float(text)
        self.add(values, block.lines, "line")

    def wrong(self, text: str, place: str) -> InputError:
        """Return the error for the rating ``text``."""
        return InputError(
            f"{self._path}, {place}: {self._name} {text[:40]!r} is not a finite number, but min_rating compares ratings; name "
            "another rating column, or leave min_rating out.",
            "data.rating=NAME",
        )

    def finish(self) -> NDArray[np.bool_]:
        """Return whether each rating [E] is high enough."""
        return np.concatenate(self._blocks)
