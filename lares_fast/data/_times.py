"""The time column of an event log. The values of the whole file determine its kind, not only the first block."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lares_fast._errors import InputError
from lares_fast.data._text import Block

# From 2**53 on, a float64 does not distinguish an integer from its neighbours.
FLOAT_BITS = 53
# A number with at most this many digits does not need a test by the pattern TOO_FINE.
MAX_FLOAT_DIGITS = 17
# The pattern matches a number with more digits than a float64 can hold. RE2, which arrow uses, must be able to read it too.
TOO_FINE = r"^[+-]?[0.]*[1-9](\.?[0-9]){16,}\.?[1-9]"

NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
_TICKS_A_DAY = {"days": 1, "seconds": 86_400, "nanoseconds": 86_400 * 10**9}


class TimeColumn:
    """The times of one column. They are int64 while all are integers or dates, and float64 if a number has a fraction."""

    def __init__(self, path: Path, name: str) -> None:
        self._path, self._name = path, name
        self._blocks = list[NDArray[Any]]()
        # For each block: "number" or the unit of its dates, and whether they have a time zone.
        self._kinds = list[tuple[str, bool]]()

    def add_integers(self, values: NDArray[np.int64]) -> None:
        """Append numbers [n]."""
        self._add(values, "number", False)

    def add_dates(self, values: NDArray[np.int64], unit: str, zoned: bool) -> None:
        """Append dates [n], counted since 1970 in ``unit``, which is days, seconds or nanoseconds."""
        self._add(values, unit, zoned)

    def add_floats(self, values: NDArray[np.float64], places: NDArray[np.int64], place: str, bits: int = FLOAT_BITS) -> None:
        """Append numbers [n], which were read as floats with ``bits`` bits.

        ``places`` [n] are the numbers of their lines or rows in the file. ``place`` is the word for such a number.
        """
        if not (usable := np.abs(values) < 2.0**bits).all():
            at = int(usable.argmin())
            where = f"{self._path}, {place} {places[at]}: column {self._name!r}"
            if not np.isfinite(values[at]):
                raise InputError(f"{where} is not a finite number.")
            raise InputError(
                f"{where} has {values[at]:.17g}, but from 2**{bits} on a time loses its last digits as a float; "
                "write all times as integers."
            )
        self._add(values, "number", False)

    def add_text(self, block: Block) -> None:
        """Append the numbers in the fields of ``block``."""
        if block.is_integer.all():
            self.add_integers(block.integers)
            return
        values = np.empty(len(block))
        for at, text in enumerate(block.strings()):
            text = text.strip(" ")
            if not NUMBER.fullmatch(text):
                raise InputError(f"{self._path}, line {block.lines[at]}: {self._name} {text[:40]!r} is not a finite number.")
            if len(text) > MAX_FLOAT_DIGITS and re.match(TOO_FINE, text):
                self.reject_too_fine(text, f"line {block.lines[at]}")
            values[at] = float(text)
        self.add_floats(values, block.lines, "line")

    def reject_too_fine(self, text: str, place: str) -> None:
        """Raise :class:`InputError` for the number ``text``."""
        raise InputError(
            f"{self._path}, {place}: {self._name} {text[:40]!r} has more digits than a float keeps; "
            f"write times as integers, or with at most {MAX_FLOAT_DIGITS} digits."
        )

    def reject_mixture(self) -> None:
        """Raise :class:`InputError` for a column with values of several forms."""
        raise InputError(
            f"{self._path}: column {self._name!r} mixes numbers, dates and dates with a time zone; write all in one form."
        )

    def finish(self) -> NDArray[Any]:
        """Return the times [E] int64 or float64, dates in the finest unit that occurs, and empty the column."""
        blocks, self._blocks = self._blocks, []
        if len({(unit == "number", zoned) for unit, zoned in self._kinds}) > 1:
            self.reject_mixture()
        if any(block.dtype == np.float64 for block in blocks):
            blocks = [self._as_floats(block) for block in blocks]
        elif self._kinds and self._kinds[0][0] != "number":
            finest = max((unit for unit, _ in self._kinds), key=lambda unit: _TICKS_A_DAY[unit])
            blocks = [self._finer(block, unit, finest) for block, (unit, _) in zip(blocks, self._kinds, strict=True)]
        return np.concatenate(blocks) if blocks else np.empty(0, np.int64)

    def _add(self, values: NDArray[Any], unit: str, zoned: bool) -> None:
        if len(values):
            self._blocks.append(values)
            self._kinds.append((unit, zoned))

    def _as_floats(self, block: NDArray[Any]) -> NDArray[np.float64]:
        # abs() would leave -2**63 negative.
        if block.dtype != np.float64 and (large := (block >= 2**FLOAT_BITS) | (block <= -(2**FLOAT_BITS))).any():
            raise InputError(
                f"{self._path}: column {self._name!r} has {block[large.argmax()]} beside numbers with a fraction, and "
                f"from 2**{FLOAT_BITS} on a time loses its last digits as a float; write all times as integers."
            )
        return block.astype(np.float64, copy=False)

    def _finer(self, block: NDArray[np.int64], unit: str, finest: str) -> NDArray[np.int64]:
        factor = _TICKS_A_DAY[finest] // _TICKS_A_DAY[unit]
        most = (2**63 - 1) // factor
        if factor > 1 and ((block > most) | (block < -most)).any():
            raise InputError(
                f"{self._path}: column {self._name!r} has dates that do not fit 64 bits in {finest}, which other dates need; "
                "write all times without fractions of a second."
            )
        return block * factor
