"""Find the fields of text files and turn them into numbers, one block at a time, without a loop over lines."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lares_fast._errors import InputError

Progress = Callable[[int, int], None]

# The arrays of larger blocks are new pages of memory each time, which takes longer than the work on them.
BLOCK_BYTES = 1 << 18
MAX_LINE_BYTES = 64 << 20
# No integer with more digits fits int64, and every integer with 19 digits fits uint64.
MAX_DIGITS = 19

_LONE_RETURN = re.compile(rb"\r(?!\n)")
_WHITE = np.isin(np.arange(256), list(b" \t\n\v\f\r"))
# The first bytes of files that are neither plain text nor parquet.
_PACKED = {
    b"\x1f\x8b": "is compressed by gzip; unpack it first",
    b"PK\x03\x04": "is a zip archive; unpack it first, or export a spreadsheet as CSV",
    b"BZh91AY&SY": "is compressed by bzip2; unpack it first",
    b"\xfd7zXZ\0": "is compressed by xz; unpack it first",
    b"\x28\xb5\x2f\xfd": "is compressed by zstd; unpack it first",
    b"\x04\x22\x4d\x18": "is compressed by lz4; unpack it first",
    b"\xff\xfe": "is UTF-16 text; save it as UTF-8",
    b"\xfe\xff": "is UTF-16 text; save it as UTF-8",
}


@dataclass(frozen=True, eq=False)
class Block:
    """Some whole lines. Field f is ``data[starts[f]:ends[f]]`` and is in line ``lines[f]`` of the file, counted from 1."""

    data: bytes
    starts: NDArray[np.int64]
    ends: NDArray[np.int64]
    lines: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.starts)

    def take(self, chosen: Any) -> Block:
        """Return a block with only the fields ``chosen``."""
        return Block(self.data, self.starts[chosen], self.ends[chosen], self.lines[chosen])

    def strings(self) -> list[str]:
        """Return the fields as text."""
        bounds = zip(self.starts.tolist(), self.ends.tolist(), strict=True)
        if self.data.isascii():
            text = self.data.decode()
            return [text[a:b] for a, b in bounds]
        return [self.data[a:b].decode() for a, b in bounds]

    @property
    def integers(self) -> NDArray[np.int64]:
        """The integers [F] int64. They are valid only where :attr:`is_integer` is true."""
        return self._parsed[0]

    @property
    def is_integer(self) -> NDArray[np.bool_]:
        """Whether each field is an integer in its usual form, [F] bool. It is false for ``007`` and ``+7``."""
        return self._parsed[1]

    @cached_property
    def _parsed(self) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        buffer = np.frombuffer(self.data, np.uint8)
        digits = buffer - np.uint8(ord("0"))
        last = len(digits) - 1
        negative = buffer[np.minimum(self.starts, last)] == ord("-")
        first = self.starts + negative
        width = self.ends - first
        values = np.zeros(len(self), np.uint64)
        good = (width >= 1) & (width <= MAX_DIGITS)
        for column in range(min(int(width.max(initial=0)), MAX_DIGITS)):
            digit = digits[np.minimum(first + column, last)]
            inside = column < width
            good &= ~inside | (digit <= 9)
            values = np.where(inside, values * np.uint64(10) + digit, values)
            if column == 0:
                good &= (digit != 0) | ((width == 1) & ~negative)
        good &= values <= np.uint64(2**63 - 1) + negative.astype(np.uint64)
        # 2**63 wraps to -2**63, and negation leaves that unchanged.
        signed = values.view(np.int64)
        return np.where(negative, -signed, signed), good


def words(path: Path, progress: Progress | None = None) -> Iterator[Block]:
    """Yield blocks of the fields between white space. Blank lines have no field."""
    for data, line in _text_pieces(path, progress):
        if lone := _LONE_RETURN.search(data):
            at = line + data.count(b"\n", 0, lone.start())
            raise InputError(f"{path}, line {at}: a carriage return is inside the line; end each line with a newline.")
        buffer = np.frombuffer(data, np.uint8)
        solid = np.concatenate(([False], ~_WHITE[buffer], [False]))
        edges = np.flatnonzero(solid[1:] != solid[:-1])
        starts, ends = edges[::2], edges[1::2]
        newlines = np.flatnonzero(buffer == ord("\n"))
        yield Block(data, starts, ends, line + np.searchsorted(newlines, starts))


def cells(path: Path, progress: Progress | None = None, separator: bytes | None = None) -> Iterator[Block]:
    """Yield blocks of the fields between tabs, and between ``separator`` if given. A field may be empty.

    Blank lines have no field.
    """
    for data, line in _text_pieces(path, progress):
        if separator is not None:
            data = data.replace(separator, b"\t")
        buffer = np.frombuffer(data, np.uint8)
        ends = np.flatnonzero((buffer == ord("\t")) | (buffer == ord("\n")))
        starts = np.concatenate(([0], ends[:-1] + 1))
        closes = buffer[ends] == ord("\n")
        lines = line + np.cumsum(closes) - closes
        ends = ends - (closes & (ends > starts) & (buffer[ends - 1] == ord("\r")))
        opens = np.concatenate(([True], closes[:-1]))
        filled = ~(opens & closes & (starts == ends))
        yield Block(data, starts[filled], ends[filled], lines[filled])


def pieces(path: Path, progress: Progress | None = None) -> Iterator[tuple[bytes, int]]:
    """Yield pieces of whole lines, each with a newline at its end, and the number of their first line.

    A byte order mark is left out.
    """
    line, total = 1, check_file(path)
    with readable(path):
        file = path.open("rb")
    with file:
        while True:
            with readable(path):
                data = file.read(BLOCK_BYTES)
                if data and not data.endswith(b"\n"):
                    data += file.readline(MAX_LINE_BYTES)
            if not data:
                return
            if line == 1:
                data = data.removeprefix(b"\xef\xbb\xbf")
            if not data.endswith(b"\n"):
                if len(data) > MAX_LINE_BYTES:
                    last = line + data.count(b"\n")
                    most = MAX_LINE_BYTES >> 20
                    raise InputError(f"{path}, line {last}: the line is longer than {most} MiB; check the format.")
                data += b"\n"
            yield data, line
            # This is several times as fast as bytes.count.
            line += int(np.count_nonzero(np.frombuffer(data, np.uint8) == ord("\n")))
            if progress:
                progress(min(file.tell(), total), total)


def check_file(path: Path) -> int:
    """Return the size in bytes. Raises :class:`InputError` unless ``path`` is a file that is not empty and may hold a log."""
    with readable(path):
        mode = path.stat().st_mode
        # Opening a pipe would wait for a writer.
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            raise InputError(f"{path} is a pipe or a device; a log is read more than once, so give a file.")
        with path.open("rb") as file:
            begin = file.read(16)
            size = file.seek(0, os.SEEK_END)
    if not size:
        raise InputError(f"{path} is empty.")
    for magic, what in _PACKED.items():
        if begin.startswith(magic):
            raise InputError(f"{path} {what}.")
    return size


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turn errors of the operating system about ``path`` into :class:`InputError`."""
    try:
        yield
    except InputError:
        raise
    except (OSError, ValueError) as error:
        # A path with a NUL raises ValueError.
        raise InputError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}.") from None


def decode(path: Path, data: bytes, line: int = 1) -> str:
    """Return ``data``, which begins at ``line``, as text. Raises :class:`InputError` with the line unless it is UTF-8."""
    nul = data.find(b"\0")
    try:
        if nul < 0:
            return data.decode()
    except UnicodeDecodeError as error:
        nul = error.start
    line += data.count(b"\n", 0, nul)
    remedy = "give another format, or unpack the file if it is compressed"
    raise InputError(f"{path}, line {line}: this is not UTF-8 text; {remedy}.")


def _text_pieces(path: Path, progress: Progress | None) -> Iterator[tuple[bytes, int]]:
    """Yield the pieces of :func:`pieces`, after a check that they are text."""
    for data, line in pieces(path, progress):
        if b"\0" in data or not data.isascii():
            decode(path, data, line)
        yield data, line
