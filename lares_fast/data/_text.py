"""Fields of text files, found and turned into numbers a block at a time, without a loop over lines."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lares_fast._errors import InputError

Progress = Callable[[int, int], None]

BLOCK_BYTES = 4 << 20
MAX_DIGITS = 18  # every integer of so many digits fits int64


@dataclass(frozen=True, eq=False)
class Block:
    """Some whole lines: field f is ``data[starts[f]:ends[f]]`` and stands in line ``lines[f]`` (from 1) of the file."""

    data: bytes
    starts: NDArray[np.int64]
    ends: NDArray[np.int64]
    lines: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.starts)

    def take(self, chosen: Any) -> Block:
        """Only the fields ``chosen``."""
        return Block(self.data, self.starts[chosen], self.ends[chosen], self.lines[chosen])

    def strings(self) -> list[str]:
        """The fields as text."""
        bounds = zip(self.starts.tolist(), self.ends.tolist(), strict=True)
        if self.data.isascii():
            text = self.data.decode()
            return [text[a:b] for a, b in bounds]
        return [self.data[a:b].decode() for a, b in bounds]

    @property
    def integers(self) -> NDArray[np.int64]:
        """[F] int64, to be used where :attr:`is_integer` holds."""
        return self._parsed[0]

    @property
    def is_integer(self) -> NDArray[np.bool_]:
        """[F] bool: the field is an integer that printing the number gives back (so no ``007`` and no ``+7``)."""
        return self._parsed[1]

    @cached_property
    def _parsed(self) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        buffer = np.frombuffer(self.data, np.uint8)
        digits = buffer - np.uint8(ord("0"))
        last = len(digits) - 1
        negative = buffer[np.minimum(self.starts, last)] == ord("-")
        first = self.starts + negative
        width = self.ends - first
        values = np.zeros(len(self), np.int64)
        good = (width >= 1) & (width <= MAX_DIGITS)
        for column in range(min(int(width.max(initial=0)), MAX_DIGITS)):
            digit = digits[np.minimum(first + column, last)]
            inside = column < width
            good &= ~inside | (digit <= 9)
            values = np.where(inside, values * 10 + digit, values)
            if column == 0:
                good &= (digit != 0) | ((width == 1) & ~negative)
        return np.where(negative, -values, values), good


def words(path: Path, progress: Progress | None = None) -> Iterator[Block]:
    """Blocks of the fields between white space; blank lines have no field."""
    for data, line in _pieces(path, progress):
        buffer = np.frombuffer(data, np.uint8)
        solid = np.concatenate(([False], buffer > ord(" "), [False]))
        edges = np.flatnonzero(solid[1:] != solid[:-1])
        starts, ends = edges[::2], edges[1::2]
        newlines = np.flatnonzero(buffer == ord("\n"))
        yield Block(data, starts, ends, line + np.searchsorted(newlines, starts))


def cells(path: Path, progress: Progress | None = None) -> Iterator[Block]:
    """Blocks of the fields between tabs; blank lines have no field, but a field may be empty."""
    for data, line in _pieces(path, progress):
        buffer = np.frombuffer(data, np.uint8)
        ends = np.flatnonzero((buffer == ord("\t")) | (buffer == ord("\n")))
        starts = np.concatenate(([0], ends[:-1] + 1))
        closes = buffer[ends] == ord("\n")
        lines = line + np.cumsum(closes) - closes
        ends = ends - (closes & (ends > starts) & (buffer[ends - 1] == ord("\r")))
        opens = np.concatenate(([True], closes[:-1]))
        filled = ~(opens & closes & (starts == ends))
        yield Block(data, starts[filled], ends[filled], lines[filled])


def check_file(path: Path) -> int:
    """Size in bytes; raises :class:`InputError` if the file cannot be opened or is empty."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}.") from None
    if not size:
        raise InputError(f"{path} is empty.")
    return size


def decode(path: Path, data: bytes, line: int = 1) -> str:
    """UTF-8 text of ``data``, which begins at ``line``; anything else is an :class:`InputError` naming the line."""
    nul = data.find(b"\0")
    try:
        if nul < 0:
            return data.decode()
    except UnicodeDecodeError as error:
        nul = error.start
    line += data.count(b"\n", 0, nul)
    raise InputError(f"{path}, line {line}: not UTF-8 text; give another format, or unpack the file if it is compressed.")


def _pieces(path: Path, progress: Progress | None) -> Iterator[tuple[bytes, int]]:
    """Pieces of whole lines, each ending in a newline, with the number of the first line."""
    total = check_file(path)
    line, done = 1, 0
    with path.open("rb") as file:
        while data := file.read(BLOCK_BYTES):
            data += file.readline()
            done += len(data)
            if line == 1:
                data = data.removeprefix(b"\xef\xbb\xbf")
            if b"\0" in data or not data.isascii():
                decode(path, data, line)
            if not data.endswith(b"\n"):
                data += b"\n"
            yield data, line
            line += data.count(b"\n")
            if progress:
                progress(done, total)
