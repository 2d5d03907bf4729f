"""``lares-fast recommend``: raw ids in, ranked raw ids out, for one user, one history or a whole file."""

from __future__ import annotations

import csv
import io
import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from lares_fast._errors import InputError, require
from lares_fast.cli.console import Console, notice
from lares_fast.serve import Recommender, load

_CHUNK = 4096
_COLUMNS = ("user", "rank", "item", "score")

# (user, rank, item, score)
Line = tuple[Any, int, Any, float]


def add_arguments(parser: ArgumentParser) -> None:
    """The arguments of ``recommend``."""
    parser.add_argument("--run", metavar="DIR", type=Path, required=True, help="run folder of lares-fast train")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--user", metavar="ID", help="a raw user id of the log that the run was trained on")
    what.add_argument("--history", metavar="ITEM,ITEM,...", help="raw item ids, oldest first")
    what.add_argument("--input", metavar="FILE", type=Path, help="a log in any format that training reads")
    parser.add_argument("--data", metavar="PATH", help="with --user: the log, if it is no longer where the run found it")
    parser.add_argument("--k", type=int, default=10, help="items for each user (default: 10)")
    parser.add_argument("--output", metavar="FILE", type=Path, help="a .csv or .parquet file (default: CSV on the screen)")
    parser.add_argument("--keep-seen", action="store_true", help="items of the history may be recommended again")
    parser.add_argument("--steps", metavar="T", type=int, help="number of reasoning steps (default: the run's)")
    parser.add_argument("--batch-size", type=int, default=256, help="histories at a time (default: 256)")


def command(arguments: Namespace) -> int:
    """Run ``recommend``."""
    recommender = load(arguments.run)
    if not 1 <= arguments.k <= len(recommender.item_ids):
        raise InputError(f"--k must be in 1..{len(recommender.item_ids)}, the number of items, but got {arguments.k}.")
    if arguments.steps is not None and arguments.steps < 1:
        raise InputError(f"--steps must be at least 1, but got {arguments.steps}.")
    if arguments.output and arguments.output.suffix not in (".csv", ".parquet"):
        raise InputError(f"--output {arguments.output} must end in .csv or .parquet.")
    with Console(sys.stderr) as console:
        users, total = _users(arguments, recommender, console)
        counts = {"users": 0, "unknown": 0, "empty": 0}
        began = time.monotonic()
        with _writer(arguments.output) as write:
            for chunk in _chunks(users):
                write(_answer(recommender, chunk, arguments, counts))
                console.progress("recommending", counts["users"], total)
    if counts["unknown"]:
        notice(f"{counts['unknown']:,} events with items that the run does not know were left out.")
    if counts["empty"]:
        notice(f"{counts['empty']:,} users have no known item and get no recommendation.")
    if arguments.output:
        seconds = max(time.monotonic() - began, 1e-9)
        print(f"{arguments.output}: {counts['users'] - counts['empty']:,} users, {counts['users'] / seconds:,.0f} users/s")
    return 0


def _users(arguments: Namespace, recommender: Recommender, console: Console) -> tuple[Iterable[tuple[Any, list[Any]]], int]:
    """(raw user id, raw history) pairs, and how many."""
    if arguments.history is not None:
        history = [word.strip() for word in arguments.history.split(",") if word.strip()]
        if not any(map(recommender.knows, history)):
            raise InputError(f"--history {arguments.history} holds no item that the run in {arguments.run} knows.")
        return [("history", history)], 1
    # Only these need a configuration, and with it the [train] extra.
    from lares_fast.cli.evaluate import open_run_log, run_config
    from lares_fast.cli.inputs import open_log

    config = run_config(arguments.run, [])
    if arguments.user is not None:
        log = open_run_log(config, arguments.data, recommender, arguments.run, console)
        try:
            index = int(log.lookup_users([arguments.user])[0])
        except InputError:
            index = -1
        if index < 0:
            raise InputError(f"--user {arguments.user} is not in {log.name}: give --history with the items instead.")
        return [(arguments.user, log.item_ids[log.history(index)].tolist())], 1
    log = open_log(
        config.data,
        str(arguments.input),
        min_events=1,
        progress=partial(console.progress, "reading"),
    )
    return ((log.user_ids[u], log.item_ids[log.history(u)].tolist()) for u in range(log.n_users)), log.n_users


def _chunks(users: Iterable[tuple[Any, list[Any]]]) -> Iterator[list[tuple[Any, list[Any]]]]:
    chunk: list[tuple[Any, list[Any]]] = []
    for user in users:
        chunk.append(user)
        if len(chunk) == _CHUNK:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def _answer(
    recommender: Recommender, chunk: list[tuple[Any, list[Any]]], arguments: Namespace, counts: dict[str, int]
) -> list[Line]:
    found = recommender.recommend(
        [history for _, history in chunk],
        arguments.k,
        exclude_seen=not arguments.keep_seen,
        num_steps=arguments.steps,
        batch_size=arguments.batch_size,
    )
    counts["users"] += len(chunk)
    counts["unknown"] += found.unknown
    counts["empty"] += len(found.empty)
    lines = []
    for (user, _), items, scores in zip(chunk, found.ids, found.scores.tolist(), strict=True):
        lines += [(user, rank, item, score) for rank, (item, score) in enumerate(zip(items, scores, strict=False), start=1)]
    return lines


@contextmanager
def _writer(path: Path | None) -> Iterator[Callable[[list[Line]], None]]:
    """A function that appends lines to ``path`` or to the screen; a failed run leaves no file and no half of one."""
    if path is None:
        text = csv.writer(sys.stdout, lineterminator="\n")
        text.writerow(_COLUMNS)
        yield text.writerows
        sys.stdout.flush()
        return
    temporary = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file, (_parquet if path.suffix == ".parquet" else _csv)(file) as write:
            yield write
        temporary.replace(path)
    except OSError as error:
        raise InputError(f"{path} could not be written: {error.strerror or error}.") from None
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def _csv(file: BinaryIO) -> Iterator[Callable[[list[Line]], None]]:
    text = io.TextIOWrapper(file, encoding="utf-8", newline="", write_through=True)
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_COLUMNS)
    yield writer.writerows
    text.detach()


@contextmanager
def _parquet(file: BinaryIO) -> Iterator[Callable[[list[Line]], None]]:
    """One row group a chunk; ids keep the type of the first chunk's."""
    arrow = require("pyarrow", "train", "writing parquet")
    parquet = require("pyarrow.parquet", "train", "writing parquet")
    writer = None
    schema = None

    def write(lines: list[Line]) -> None:
        nonlocal writer, schema
        columns = list(zip(*lines, strict=True)) or [()] * len(_COLUMNS)
        if schema is None:
            kinds = [arrow.int64() if all(type(v) is int for v in map(_plain, columns[i])) else arrow.string() for i in (0, 2)]
            schema = arrow.schema(zip(_COLUMNS, (kinds[0], arrow.int32(), kinds[1], arrow.float32()), strict=True))
            writer = parquet.ParquetWriter(file, schema)
        assert writer is not None
        plain = [[_plain(value) for value in column] for column in columns]
        writer.write_table(arrow.table([arrow.array(c, f.type) for c, f in zip(plain, schema, strict=True)], schema=schema))

    yield write
    if writer is not None:
        writer.close()


def _plain(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else value
