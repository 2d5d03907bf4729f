"""Encode string ids as integers 0..n-1 by Arrow's dictionaries, one piece of a column at a time."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from lares_fast._errors import require
from lares_fast.data._text import Block

FEATURE = "reading CSV and parquet logs"
# Pieces of a column are encoded together when they have this many bytes: one dictionary is quicker than one for each piece.
TEXT_BYTES = 8 << 20
# Dictionaries wait for the common one until they have this many ids, or as many as the common one.
MOST_WAITING = 1 << 16


class TextIds:
    """One column of raw ids that are written as text. They become int64 if all of them are integers, else strings."""

    def __init__(self) -> None:
        self._arrow = require("pyarrow", "train", FEATURE)
        self._compute = require("pyarrow.compute", "train", FEATURE)
        self._known = self._arrow.array([], self._arrow.large_string())
        self._codes = list[NDArray[np.int32]]()
        self._texts, self._bytes = list[Any](), 0
        self._pieces, self._waiting = list[Any](), 0

    def add(self, column: Any) -> int | None:
        """Append a column of large_string without missing values. Return the first position of an empty id, if there is one."""
        offsets = offsets_of(column)
        if (empty := offsets[1:] == offsets[:-1]).any():
            return int(empty.argmax())
        self._texts.append(column)
        self._bytes += column.nbytes
        if self._bytes > TEXT_BYTES:
            self._encode()
            if self._waiting > max(MOST_WAITING, len(self._known)):
                self._unify()
        return None

    def code(self, value: str) -> int | None:
        """Return the code of the string ``value``, or ``None`` if it does not occur."""
        self._encode()
        self._unify()
        found = int(self._compute.index(self._known, value).as_py())
        return None if found < 0 else found

    def finish(self) -> tuple[NDArray[np.int32], NDArray[Any]]:
        """Return the codes [E] int32 and the ids [n] that they stand for, and empty the column.

        Integer ids are sorted. Strings are in order of first appearance.
        """
        self._encode()
        self._unify()
        codes, self._codes = self._codes, []
        block = block_of(self._known)
        # Where the first id is text, the others need no look.
        if not (block.take(slice(1)).is_integer.all() and block.is_integer.all()):
            ids = self._known.to_numpy(zero_copy_only=False)
        else:
            order = np.argsort(block.integers)
            ids, rank = block.integers[order], np.empty(len(order), np.int32)
            rank[order] = np.arange(len(order), dtype=np.int32)
            for at, own in enumerate(codes):
                codes[at] = rank[own]
        return np.concatenate([np.empty(0, np.int32), *codes]), ids

    def _encode(self) -> None:
        """Encode the texts, which are then no longer in memory. Each piece has the dictionary of all of them."""
        encoded = self._arrow.chunked_array(self._texts, self._arrow.large_string()).dictionary_encode()
        self._texts, self._bytes = [], 0
        self._pieces += encoded.chunks
        self._waiting += len(encoded.chunk(0).dictionary) if encoded.num_chunks else 0

    def _unify(self) -> None:
        """Give all pieces one dictionary. Its ids are in order of first appearance, so the codes of earlier pieces hold."""
        arrow, earlier = self._arrow, list[Any]()
        if len(self._known):
            # This piece has no row.
            earlier = [arrow.DictionaryArray.from_arrays(arrow.array([], arrow.int32()), self._known)]
        if pieces := [*earlier, *self._pieces]:
            pieces = arrow.chunked_array(pieces).unify_dictionaries().chunks
            self._known = pieces[0].dictionary
            self._codes += [piece.indices.to_numpy() for piece in pieces[len(earlier) :]]
        self._pieces, self._waiting = [], 0


def offsets_of(column: Any) -> NDArray[np.int64]:
    """Return where each string of a column of large_string begins in its buffer, and at last where the column ends."""
    return np.frombuffer(column.buffers()[1], np.int64)[column.offset : column.offset + len(column) + 1]


def block_of(column: Any, first: int = 0) -> Block:
    """Return the strings of a column of large_string as fields, which are in the lines ``first`` and so on."""
    bounds, data = offsets_of(column), column.buffers()[2]
    return Block(data.to_pybytes() if data else b"", bounds[:-1], bounds[1:], first + np.arange(len(column)))
