"""CSV and parquet event logs, read by pyarrow in bounded pieces."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lares_fast._errors import InputError, require
from lares_fast.data._ids import IdColumn
from lares_fast.data._text import Block, Progress
from lares_fast.data.log import Ids

Names = Mapping[str, str | None]
Events = tuple[NDArray[np.int32], Ids, NDArray[np.int32], Ids, NDArray[Any] | None]

BATCH_ROWS = 1 << 18
FEATURE = "reading CSV and parquet logs"


def check_columns(path: Path, names: Names, present: list[str]) -> list[str]:
    """The names of the wanted columns; raises :class:`InputError` for the first that is not there exactly once."""
    wanted = [name for name in names.values() if name is not None]
    for role, name in names.items():
        if name is not None and (count := present.count(name)) != 1:
            remedy = f"name the {role} column in columns" + (
                ", or give columns={'time': None} to keep the file's order" if role == "time" else ""
            )
            raise InputError(
                f"{path} has {'no column' if not count else f'{count} columns'} {name!r} among {', '.join(present)}; {remedy}."
            )
    return wanted


def read_csv(path: Path, names: Names, progress: Progress | None) -> Events:
    """Events of a CSV file with a header; ``.tsv`` files are separated by tabs."""
    arrow = require("pyarrow", "train", FEATURE)
    csv = require("pyarrow.csv", "train", FEATURE)
    # One thread, because only then do arrow's messages name the row.
    reading = csv.ReadOptions(use_threads=False)
    parsing = csv.ParseOptions(delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
    with _one_sentence(path, arrow), csv.open_csv(path, reading, parsing) as reader:
        present = reader.schema.names
    converting = csv.ConvertOptions(
        include_columns=check_columns(path, names, present),
        column_types={names["user"]: arrow.string(), names["item"]: arrow.string()},
    )
    total = path.stat().st_size

    def batches() -> Iterator[Any]:
        with path.open("rb") as file:
            for batch in csv.open_csv(file, reading, parsing, converting):
                yield batch
                if progress:
                    progress(min(file.tell(), total), total)

    return _collect(path, names, batches(), arrow)


def read_parquet(path: Path, names: Names, progress: Progress | None) -> Events:
    """Events of a parquet file."""
    arrow = require("pyarrow", "train", FEATURE)
    parquet = require("pyarrow.parquet", "train", FEATURE)
    with _one_sentence(path, arrow):
        # Buffering ahead would hold the whole file.
        file = parquet.ParquetFile(path, pre_buffer=False)
    wanted = check_columns(path, names, file.schema_arrow.names)
    total, rows = path.stat().st_size, file.metadata.num_rows

    def batches() -> Iterator[Any]:
        done = 0
        for batch in file.iter_batches(batch_size=BATCH_ROWS, columns=wanted):
            yield batch
            done += len(batch)
            if progress:
                progress(total * done // rows, total)

    return _collect(path, names, batches(), arrow)


@contextmanager
def _one_sentence(path: Path, arrow: Any) -> Iterator[None]:
    try:
        yield
    except (arrow.ArrowException, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read as a table: {str(error).splitlines()[0].rstrip('.')}.") from None


def _collect(path: Path, names: Names, batches: Iterator[Any], arrow: Any) -> Events:
    users, items, times = IdColumn(), IdColumn(), list[NDArray[Any]]()
    row = 1
    with _one_sentence(path, arrow):
        for batch in batches:
            for name, ids in ((names["user"], users), (names["item"], items)):
                _add_ids(ids, _whole(batch.column(name), name, row, path, arrow), name, row, path, arrow)
            if (name := names["time"]) is not None:
                times.append(_times(_whole(batch.column(name), name, row, path, arrow), name, row, path, arrow))
            row += len(batch)
    return (*users.finish(), *items.finish(), np.concatenate(times) if times else None)


def _whole(column: Any, name: str | None, row: int, path: Path, arrow: Any) -> Any:
    """The column without dictionary encoding; a missing value is an :class:`InputError`."""
    if arrow.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if column.null_count:
        missing = row + column.is_null().to_numpy(zero_copy_only=False).argmax()
        raise InputError(f"{path}, row {missing}: column {name!r} has no value.")
    return column


def _add_ids(ids: IdColumn, column: Any, name: str | None, row: int, path: Path, arrow: Any) -> None:
    if arrow.types.is_integer(column.type):
        ids.add_integers(_copied(column.cast(arrow.int64())))
        return
    if not (arrow.types.is_string(column.type) or arrow.types.is_large_string(column.type)):
        raise InputError(f"{path}: column {name!r} holds {column.type}, but ids must be integers or strings.")
    column = column.cast(arrow.large_string())
    _, offsets, data = column.buffers()
    bounds = np.frombuffer(offsets, np.int64)[column.offset : column.offset + len(column) + 1]
    block = Block(data.to_pybytes() if data else b"", bounds[:-1], bounds[1:], row + np.arange(len(column)))
    empty = block.starts == block.ends
    if empty.any():
        raise InputError(f"{path}, row {row + empty.argmax()}: column {name!r} has no value.")
    ids.add(block)


def _times(column: Any, name: str | None, row: int, path: Path, arrow: Any) -> NDArray[Any]:
    """[n] int64, or float64 for a column of floats; timestamps and dates count in their own unit."""
    kinds = arrow.types
    if kinds.is_date32(column.type):
        column = column.cast(arrow.int32())
    if kinds.is_integer(column.type) or kinds.is_timestamp(column.type) or kinds.is_date64(column.type):
        return _copied(column.cast(arrow.int64()))
    if not kinds.is_floating(column.type):
        raise InputError(f"{path}: column {name!r} holds {column.type}, but times must be numbers, dates or timestamps.")
    values = _copied(column.cast(arrow.float64()))
    if not np.isfinite(values).all():
        raise InputError(f"{path}, row {row + (~np.isfinite(values)).argmax()}: column {name!r} is not a finite number.")
    return values


def _copied(column: Any) -> NDArray[Any]:
    """The values in memory of their own: a view would keep the buffers of its whole batch alive."""
    return np.array(column.to_numpy())
