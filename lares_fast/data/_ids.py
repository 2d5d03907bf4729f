"""Encode raw ids as integers 0..n-1, one block at a time."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lares_fast._errors import InputError
from lares_fast.data._text import Block


class IdColumn:
    """One column of raw ids. They are int64 while all of them are integers.

    From the first id on that is not an integer, all ids are strings, earlier integers included.
    """

    def __init__(self) -> None:
        # Raw integers, or int32 codes as soon as there is a table.
        self._blocks: list[NDArray[Any]] = []
        self._table: defaultdict[str, int] | None = None

    def add(self, block: Block) -> None:
        """Append the fields of ``block``."""
        if self._table is None and block.is_integer.all():
            self.add_integers(block.integers)
        else:
            self.add_strings(block.strings())

    def add_positive(self, block: Block, what: str, path: Path) -> None:
        """Append the fields of ``block``. If the first id of the column is an integer, all ids must be integers greater than 0.

        Raises :class:`InputError` with the line for an id that breaks this rule. ``what`` names the column in its message.
        """
        if not len(block):
            return
        if self._table is not None or (not self._blocks and not block.is_integer[0]):
            self.add_strings(block.strings())
            return
        bad = np.flatnonzero(~block.is_integer | (block.integers <= 0))
        if len(bad):
            first = block.take(bad[:1])
            reason = (
                "is not greater than 0; number the ids from 1"
                if first.is_integer[0]
                else "is not an integer of 64 bits, but the ids before it are; correct it, or write ids of mixed form as CSV"
            )
            raise InputError(f"{path}, line {first.lines[0]}: {what} {first.strings()[0][:40]!r} {reason}.")
        self.add_integers(block.integers)

    def add_integers(self, values: NDArray[np.int64]) -> None:
        """Append integers [n]."""
        if self._table is None:
            self._blocks.append(values)
        else:
            self.add_strings(map(str, values.tolist()))

    def add_strings(self, values: Iterable[str]) -> None:
        """Append strings."""
        if self._table is None:
            self._table = table = defaultdict[str, int]()
            # The code of a new id is the number of ids before it.
            table.default_factory = table.__len__
            integers, self._blocks = self._blocks, []
            for block in integers:
                self.add_strings(map(str, block.tolist()))
        self._blocks.append(np.fromiter(map(self._table.__getitem__, values), np.int32))

    def code(self, value: str) -> int | None:
        """Return the code of the string ``value`` in a column of strings, or ``None`` if it does not occur."""
        return None if self._table is None else self._table.get(value)

    def finish(self) -> tuple[NDArray[np.int32], NDArray[Any]]:
        """Return the codes [E] int32 and the ids [n] that they stand for, and empty the column.

        Integer ids are sorted. Strings are in order of first appearance.
        """
        blocks, self._blocks = self._blocks, []
        if self._table is None:
            # Block by block: for a whole column, the inverse of np.unique takes six times the memory of the column.
            known = list[NDArray[np.int64]]()
            for at, block in enumerate(blocks):
                own, inverse = np.unique(block, return_inverse=True)
                known.append(own)
                blocks[at] = inverse.astype(np.int32)
            ids = np.unique(np.concatenate([np.empty(0, np.int64), *known]))
            blocks = [np.searchsorted(ids, own).astype(np.int32)[codes] for own, codes in zip(known, blocks, strict=True)]
        else:
            ids = np.array(list(self._table), dtype=object)
        return np.concatenate([np.empty(0, np.int32), *blocks]), ids
