"""Read CSV and parquet event logs with pyarrow, in pieces of bounded size."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lares_fast._errors import InputError, printable, require
from lares_fast.data._dictionaries import FEATURE, TextIds, block_of
from lares_fast.data._ids import IdColumn
from lares_fast.data._quotes import spans_lines
from lares_fast.data._ratings import RatingColumn
from lares_fast.data._separators import HEADER_BYTES, guessed_separator
from lares_fast.data._text import Block, Progress
from lares_fast.data._times import MAX_FLOAT_DIGITS, NUMBER, TOO_FINE, TimeColumn
from lares_fast.data.filters import Filters
from lares_fast.data.log import Ids

Names = Mapping[str, str | None]
# Users, user ids, items, item ids, times, and whether each rating is high enough.
Events = tuple[NDArray[np.int32], Ids, NDArray[np.int32], Ids, NDArray[Any] | None, NDArray[np.bool_] | None]

BATCH_ROWS = 1 << 18
# The largest size of a row.
CSV_BLOCK_BYTES = 4 << 20


def check_columns(path: Path, names: Names, present: list[str]) -> list[str]:
    """Return the names of the wanted columns. Raises :class:`InputError` for the first that does not occur exactly once."""
    for role, name in names.items():
        if name is not None and (count := present.count(name)) != 1:
            remedy, value = f"name the {role} column in columns", "NAME"
            if role == "time":
                remedy, value = f"{remedy}, or give None as its name to keep the file's order", "none"
            if role == "rating":
                remedy = f"{remedy}, or leave min_rating out"
            found = "no column" if not count else f"{count} columns"
            message = f"{path} has {found} {name!r} among {printable(', '.join(present))}; {remedy}."
            raise InputError(message, f"data.{role}={value}")
    return [name for name in names.values() if name is not None]


def read_csv(path: Path, names: Names, filters: Filters, progress: Progress | None, separator: str | None) -> Events:
    """Return the events of a CSV file with a header. The separator is guessed if it is ``None``; tabs mean no quotes."""
    arrow = require("pyarrow", "train", FEATURE)
    csv = require("pyarrow.csv", "train", FEATURE)
    likely, header = guessed_separator(path, [str(names["user"]), str(names["item"])])
    delimiter = separator or likely
    tabs = delimiter == "\t"
    parsing = csv.ParseOptions(
        delimiter=delimiter,
        quote_char=False if tabs else '"',
        # This costs time, so it is only set where it is needed.
        newlines_in_values=not tabs and spans_lines(path, delimiter, names["time"]),
    )
    # One thread: with more, the messages of arrow do not name the row.
    reading = csv.ReadOptions(use_threads=False, block_size=CSV_BLOCK_BYTES)
    with _one_sentence(path, arrow):
        try:
            begin = csv.ReadOptions(use_threads=False, block_size=min(HEADER_BYTES, CSV_BLOCK_BYTES))
            present = csv.open_csv(_opened(path, arrow), begin, parsing).schema.names
        except arrow.ArrowInvalid:
            if delimiter == likely:
                # Rows may have another width because the separator is another one. Then the columns are not found either.
                check_columns(path, names, header)
            # A row may be longer.
            present = csv.open_csv(_opened(path, arrow), reading, parsing).schema.names
    if len(present) == 1 and delimiter != likely:
        raise InputError(
            f"{path} has one column between the separators {delimiter!r}, but its header has separators {likely!r}: give that "
            "separator, or leave separator out.",
            "data.separator=auto",
        )
    wanted = check_columns(path, names, present)
    # All columns are read as text: arrow guesses a type from the first block, but here it depends on the whole file.
    converting = csv.ConvertOptions(include_columns=wanted, column_types=dict.fromkeys(wanted, arrow.string()))
    total = path.stat().st_size

    def batches() -> Iterator[Any]:
        with _one_sentence(path, arrow):
            file = _opened(path, arrow)
            reader = csv.open_csv(file, reading, parsing, converting)
        for batch in _each(reader, path, arrow):
            yield batch
            if progress:
                progress(min(file.tell(), total), total)

    return _collect(path, names, filters, batches(), _add_times_of_text, arrow)


def _opened(path: Path, arrow: Any) -> Any:
    """Open the file for its raw bytes. Given a name, arrow would unpack files with some endings.

    The file must not be closed here. Threads of arrow read ahead, and they would go on reading from the next file that gets
    the descriptor. The file closes when the last of them releases it.
    """
    # The name is given as bytes, because it may not be UTF-8.
    return arrow.OSFile(os.fsencode(path))


def read_parquet(path: Path, names: Names, filters: Filters, progress: Progress | None) -> Events:
    """Return the events of a parquet file."""
    arrow = require("pyarrow", "train", FEATURE)
    parquet = require("pyarrow.parquet", "train", FEATURE)
    with _one_sentence(path, arrow):
        # Buffering ahead would hold the whole file in memory.
        # Pages without a checksum, which most programs write, are read without this check.
        file = parquet.ParquetFile(_opened(path, arrow), pre_buffer=False, page_checksum_verification=True)
        present = file.schema_arrow.names
        rows = file.metadata.num_rows
    wanted = check_columns(path, names, present)
    total = path.stat().st_size

    def batches() -> Iterator[Any]:
        done = 0
        with _one_sentence(path, arrow):
            found = file.iter_batches(batch_size=BATCH_ROWS, columns=wanted)
        for batch in _each(found, path, arrow):
            yield batch
            done += len(batch)
            if progress:
                progress(min(total * done // max(rows, 1), total), total)
        # No checksum covers the footer, which also counts the rows of each part.
        if done != rows:
            raise InputError(f"{path} is damaged: it counts {rows} rows, but holds {done}.")

    return _collect(path, names, filters, batches(), _add_times, arrow)


@contextmanager
def _one_sentence(path: Path, arrow: Any) -> Iterator[None]:
    """Turn errors of arrow into one :class:`InputError`: they have many types, and may quote bytes of a damaged file."""
    try:
        yield
    except (arrow.ArrowException, OSError, UnicodeError, MemoryError) as error:
        reason = printable((str(error) or type(error).__name__).splitlines()[0]).rstrip(".")
        raise InputError(f"{path} cannot be read as a table: {reason}.") from None


def _each(batches: Iterable[Any], path: Path, arrow: Any) -> Iterator[Any]:
    """Yield ``batches``. Only their reading is inside of :func:`_one_sentence`, not the work of the caller."""
    iterator = iter(batches)
    while True:
        with _one_sentence(path, arrow):
            batch = next(iterator, None)
        if batch is None:
            return
        yield batch


def ratings_of(path: Path, names: Names, filters: Filters) -> RatingColumn | None:
    """Return the rating column to fill, or ``None`` if ratings are not compared."""
    return None if filters.min_rating is None else RatingColumn(path, str(names["rating"]), filters.min_rating)


def _collect(
    path: Path, names: Names, filters: Filters, batches: Iterable[Any], add_times: Callable[..., None], arrow: Any
) -> Events:
    columns: dict[str, IdColumn | TextIds] = {"user": IdColumn(), "item": IdColumn()}
    times = None if names["time"] is None else TimeColumn(path, names["time"])
    ratings = ratings_of(path, names, filters)
    row = 1
    for batch in batches:
        with _one_sentence(path, arrow):
            for role in columns:
                column = _whole(batch, names[role], row, path, arrow)
                if row == 1 and _is_text(column.type):
                    columns[role] = TextIds()
                _add_ids(columns[role], column, names[role], row, path, arrow)
            if times is not None:
                add_times(times, _whole(batch, names["time"], row, path, arrow), names["time"], row, path, arrow)
            if ratings is not None:
                _add_ratings(ratings, _whole(batch, names["rating"], row, path, arrow), row, arrow)
        row += len(batch)
    return finish(path, names, columns["user"], columns["item"], times, ratings)


def finish(
    path: Path,
    header: Names,
    users: IdColumn | TextIds,
    items: IdColumn | TextIds,
    times: TimeColumn | None,
    ratings: RatingColumn | None,
) -> Events:
    """Return the events of the columns. ``header`` holds the cells of the file's header for the user and the item column.

    Raises :class:`InputError` where the header occurs again as a row.
    """
    again = None
    if header["user"] is not None and header["item"] is not None:
        again = users.code(header["user"]), items.code(header["item"])
    ids = *users.finish(), *items.finish()
    if again and None not in again and len(rows := np.flatnonzero((ids[0] == again[0]) & (ids[2] == again[1]))):
        raise InputError(f"{path}, row {rows[0] + 1}: the header is repeated there; remove it.")
    return *ids, None if times is None else times.finish(), None if ratings is None else ratings.finish()


def _whole(batch: Any, name: str | None, row: int, path: Path, arrow: Any) -> Any:
    """Return the column without dictionary encoding. Raises :class:`InputError` for a missing value."""
    column = batch.column(name)
    if arrow.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if column.null_count:
        missing = row + column.is_null().to_numpy(zero_copy_only=False).argmax()
        raise _no_value(name, missing, path)
    return column


def _add_ids(ids: IdColumn | TextIds, column: Any, name: str | None, row: int, path: Path, arrow: Any) -> None:
    if isinstance(ids, TextIds):
        if (empty := ids.add(column.cast(arrow.large_string()))) is not None:
            raise _no_value(name, row + empty, path)
    elif not arrow.types.is_integer(column.type):
        raise InputError(f"{path}: column {name!r} holds {column.type}, but ids must be integers or strings.")
    elif arrow.types.is_uint64(column.type) and column.to_numpy().max(initial=0) >= 2**63:
        ids.add_strings(map(str, column.to_pylist()))
    else:
        ids.add_integers(_copied(column.cast(arrow.int64())))


def _no_value(name: str | None, row: int, path: Path) -> InputError:
    return InputError(f"{path}, row {row}: column {name!r} has no value.")


def _is_text(kind: Any) -> bool:
    return str(kind) in ("string", "large_string", "string_view")


def _block(column: Any, name: str | None, row: int, path: Path, arrow: Any) -> Block:
    """Return the strings of ``column``. Raises :class:`InputError` for an empty string."""
    block = block_of(column.cast(arrow.large_string()), row)
    empty = block.starts == block.ends
    if empty.any():
        raise _no_value(name, row + int(empty.argmax()), path)
    return block


def _add_ratings(ratings: RatingColumn, column: Any, row: int, arrow: Any) -> None:
    """Add typed ratings, or ratings that are written as text."""
    if _is_text(column.type):
        compute = require("pyarrow.compute", "train", FEATURE)
        column = compute.ascii_trim_whitespace(column)
        if (floats := _cast(column, arrow.float64(), arrow)) is None:
            bad = next(at for at, text in enumerate(column) if _cast(column[at : at + 1], arrow.float64(), arrow) is None)
            raise ratings.wrong(column[bad].as_py(), f"row {row + bad}")
        column = floats
    elif arrow.types.is_boolean(column.type) or arrow.types.is_temporal(column.type):
        raise ratings.wrong(str(column.type), f"row {row}")
    ratings.add(_copied(column.cast(arrow.float64())), row + np.arange(len(column)), "row")


def _add_times(times: TimeColumn, column: Any, name: str, row: int, path: Path, arrow: Any) -> None:
    """Add typed times: numbers as they are, and timestamps and dates in the unit of their column."""
    kinds = arrow.types
    if kinds.is_date32(column.type):
        column = column.cast(arrow.int32())
    whole_decimals = kinds.is_decimal(column.type) and column.type.scale == 0
    if kinds.is_integer(column.type) or whole_decimals or kinds.is_timestamp(column.type) or kinds.is_date64(column.type):
        times.add_integers(_copied(column.cast(arrow.int64())))
    elif kinds.is_floating(column.type):
        bits = np.finfo(column.type.to_pandas_dtype()).nmant + 1
        times.add_floats(_copied(column.cast(arrow.float64())), row + np.arange(len(column)), "row", bits)
    else:
        raise InputError(f"{path}: column {name!r} holds {column.type}, but times must be numbers, dates or timestamps.")


def _add_times_of_text(times: TimeColumn, column: Any, name: str, row: int, path: Path, arrow: Any) -> None:
    """Add times that are written as text: all of one batch in the first form that fits them all."""
    compute = require("pyarrow.compute", "train", FEATURE)
    if _has_no_x(column) and (integers := _cast(column, arrow.int64(), arrow)) is not None:
        # Most files end here.
        times.add_integers(_copied(integers))
        return
    column = compute.ascii_trim_whitespace(column)
    # This raises for an empty value, also where all values are empty.
    _block(column, name, row, path, arrow)
    if _has_no_x(column) and (integers := _cast(column, arrow.int64(), arrow)) is not None:
        times.add_integers(_copied(integers))
        return
    if (floats := _cast(column, arrow.float64(), arrow)) is not None:
        if (fine := np.flatnonzero(compute.binary_length(column).to_numpy() > MAX_FLOAT_DIGITS)).size:
            too_fine = compute.match_substring_regex(column.take(arrow.array(fine)), TOO_FINE)
            for at in fine[too_fine.to_numpy(zero_copy_only=False)][:1]:
                times.reject_too_fine(column[at].as_py(), f"row {row + at}")
        times.add_floats(_copied(floats), row + np.arange(len(column)), "row")
        return
    for kind, unit, zoned in _date_forms(arrow):
        if (dates := _cast(column, kind, arrow)) is not None:
            integers = dates.cast(arrow.int32()) if unit == "days" else dates
            times.add_dates(_copied(integers.cast(arrow.int64())), unit, zoned)
            return
    for at, value in enumerate(column.to_pylist()):
        if not NUMBER.fullmatch(value) and all(
            _cast(column[at : at + 1], kind, arrow) is None for kind, _, _ in _date_forms(arrow)
        ):
            raise InputError(
                f"{path}: column {name!r} holds string {printable(value, 40)!r} in row {row + at}, "
                "but times must be numbers, dates or timestamps."
            )
    times.reject_mixture()


def _has_no_x(column: Any) -> bool:
    """Return whether the buffer of a column of text holds no x. Arrow would read hexadecimal numbers as integers."""
    buffer = column.buffers()[2]
    text = buffer.to_pybytes() if buffer else b""
    return b"x" not in text and b"X" not in text


def _cast(column: Any, kind: Any, arrow: Any) -> Any:
    """Return the column as ``kind``, or ``None`` if a value has another form."""
    try:
        # A cast that fails is slow. The first and the last value mostly show whether it would.
        column[:1].cast(kind)
        column[-1:].cast(kind)
        return column.cast(kind)
    except arrow.ArrowInvalid:
        return None


def _date_forms(arrow: Any) -> tuple[tuple[Any, str, bool], ...]:
    """Return (type, unit, whether it has a time zone) of each form of dates, coarse units first."""
    return (
        (arrow.date32(), "days", False),
        (arrow.timestamp("s"), "seconds", False),
        (arrow.timestamp("ns"), "nanoseconds", False),
        (arrow.timestamp("s", "UTC"), "seconds", True),
        (arrow.timestamp("ns", "UTC"), "nanoseconds", True),
    )


def _copied(column: Any) -> NDArray[Any]:
    """Return a copy of the values. A view would keep the buffers of its whole batch in memory."""
    return np.array(column.to_numpy(zero_copy_only=False))
