"""``lares-fast recommend``: raw ids in, ranked raw ids out, for one user, one history or a whole file."""

from __future__ import annotations

import csv
import io
import re
import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import IO, Any

from lares_fast._errors import InputError, require
from lares_fast.cli.console import Console, notice
from lares_fast.cli.inputs import Flags, open_log
from lares_fast.data import InteractionLog
from lares_fast.data.readers import FORMATS
from lares_fast.serve import Recommender, load_about
from lares_fast.train.config import DataConfig
from lares_fast.train.files import replacing
from lares_fast.train.identity import events_digest

_CHUNK = 4096
_COLUMNS = ("user", "rank", "item", "score")
_TABLES = ("csv", "inter", "parquet")
_ROLES = ("user", "item", "time")
_FLAGS = Flags(column="--columns ", format="--format ")

# (user, rank, item, score)
Line = tuple[Any, int, Any, float]


def add_arguments(parser: ArgumentParser) -> None:
    """The arguments of ``recommend``."""
    parser.add_argument("--run", metavar="DIR", type=Path, required=True, help="run folder of lares-fast train")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--user", metavar="ID", help="a raw user id of the log that the run was trained on")
    what.add_argument("--history", metavar="ITEM,ITEM,...", help="raw item ids, oldest first")
    what.add_argument("--item", metavar="ID", action="append", help="one raw item id, exactly; repeat it, oldest first")
    what.add_argument("--input", metavar="FILE", type=Path, help="a log in any format that training reads")
    parser.add_argument("--data", metavar="PATH", help="with --user: the log, if it is no longer where the run found it")
    parser.add_argument("--format", choices=("auto", *FORMATS), help="format of the log (default: the run's, or by its ending)")
    parser.add_argument("--columns", metavar="ROLE=NAME,...", help="columns of the log, such as user=who,item=what,time=none")
    parser.add_argument("--k", type=int, default=10, help="items for each user (default: 10)")
    parser.add_argument("--output", metavar="FILE", type=Path, help="a .csv or .parquet file (default: CSV on the screen)")
    parser.add_argument("--keep-seen", action="store_true", help="items of the history may be recommended again")
    parser.add_argument("--steps", metavar="T", type=int, help="number of reasoning steps (default: the run's)")
    parser.add_argument("--batch-size", type=int, default=256, help="histories at a time (default: 256)")


def command(arguments: Namespace) -> int:
    """Run ``recommend``."""
    recommender, about = load_about(arguments.run)
    if not 1 <= arguments.k <= len(recommender.item_ids):
        raise InputError(f"--k must be in 1..{len(recommender.item_ids)}, the number of items, but got {arguments.k}.")
    if arguments.steps is not None and arguments.steps < 1:
        raise InputError(f"--steps must be at least 1, but got {arguments.steps}.")
    if arguments.batch_size < 1:
        raise InputError(f"--batch-size must be at least 1, but got {arguments.batch_size}.")
    if arguments.output and arguments.output.suffix not in (".csv", ".parquet"):
        raise InputError(f"--output {arguments.output} must end in .csv or .parquet.")
    with Console(sys.stderr) as console:
        users, total, user_kind = _users(arguments, recommender, about, console)
        counts = {"users": 0, "unknown": 0, "empty": 0}
        began = time.monotonic()
        with _writer(arguments.output, user_kind, _kind(recommender.item_ids)) as write:
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


def _users(
    arguments: Namespace, recommender: Recommender, about: dict[str, str], console: Console
) -> tuple[Iterable[tuple[Any, list[Any]]], int, type]:
    """(raw user id, raw history) pairs, how many there are, and the type of the user ids."""
    if (history := _history(arguments, recommender)) is not None:
        return [("history", history)], 1, str
    # Only these need a configuration, and with it the [train] extra.
    from lares_fast.cli.evaluate import run_config

    data = run_config(arguments.run, []).data
    path = arguments.input or arguments.data
    log = open_log(
        _as_asked(data, None if path is None else Path(path), arguments),
        None if path is None else str(path),
        min_events=3 if arguments.input is None else 1,
        progress=partial(console.progress, "reading"),
        flags=_FLAGS,
    )
    kind = _kind(log.user_ids.tolist())
    if arguments.input is not None:
        return ((log.user_ids[u], log.item_ids[log.history(u)].tolist()) for u in range(log.n_users)), log.n_users, kind
    _require_events(log, recommender, about, arguments.run)
    try:
        index = int(log.lookup_users([arguments.user])[0])
    except InputError:
        index = -1
    if index < 0:
        raise InputError(f"--user {arguments.user} is not in {log.name}: give --history with the items instead.")
    return [(log.user_ids[index], log.item_ids[log.history(index)].tolist())], 1, kind


def _history(arguments: Namespace, recommender: Recommender) -> list[str] | None:
    """The items of --item or --history, of which every one must be known: a typing error is not to be left out."""
    if arguments.item is not None:
        flag, items = "--item", list(arguments.item)
    elif arguments.history is not None:
        flag, items = "--history", [word.strip() for word in arguments.history.split(",") if word.strip()]
        if not items:
            raise InputError("--history holds no item: give raw item ids with commas between them.")
    else:
        return None
    if not any(map(recommender.knows, items)):
        raise InputError(f"{flag} {', '.join(items)!r:.60} holds no item that the run in {arguments.run} knows.")
    if unknown := [item for item in items if not recommender.knows(item)]:
        hint = "; give an id with a comma in it with --item" if flag == "--history" and len(items) > 1 else ""
        raise InputError(f"{flag} {unknown[0]!r:.60} is no item that the run in {arguments.run} knows{hint}.")
    return items


def _as_asked(data: DataConfig, path: Path | None, arguments: Namespace) -> DataConfig:
    """How to read the log at ``path``: as the run's, under --format and --columns."""
    chosen = arguments.format
    if chosen is None:
        alike = path is None or data.path is None or path.suffix == Path(data.path).suffix
        chosen = data.format if alike else "auto"
    endings = set(Path(path or data.path or "").suffixes)
    if not (chosen in _TABLES or (chosen == "auto" and endings & {".csv", ".tsv", ".inter", ".parquet", ".pq"})):
        # Other formats have no columns.
        data = replace(data, user=None, item=None, time=None)
    asked = _columns(arguments.columns)
    columns = {role: asked.get(role, getattr(data, role)) for role in _ROLES}
    return replace(data, format=chosen, user=columns["user"], item=columns["item"], time=columns["time"])


def _columns(text: str | None) -> dict[str, str]:
    """The names under their roles; a name may have commas in it."""
    columns = {}
    for part in () if text is None else re.split(rf",(?=(?:{'|'.join(_ROLES)})=)", text):
        role, _, name = part.partition("=")
        if not name or role not in _ROLES:
            raise InputError(f"--columns {text!r:.60} must have the form user=NAME,item=NAME,time=NAME, or time=none.")
        columns[role] = name
    return columns


def _require_events(log: InteractionLog, recommender: Recommender, about: dict[str, str], run: Path) -> None:
    """Raise :class:`InputError` unless ``log`` holds the events that the model was trained on, in whatever order of rows."""
    if not about:
        notice(f"{run} is of an earlier version and does not say which log it was trained on: only its items are compared.")
        same = set(map(str, log.item_ids[1:].tolist())) == set(map(str, recommender.item_ids))
    else:
        same = events_digest(log) == about["events"]
    if not same:
        raise InputError(
            f"{log.name} has other events than the log of the run in {run}: give --data with the log it was trained on, or "
            "--input with this one."
        )


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


def _kind(ids: Sequence[Any]) -> type:
    """int if every id is an integer of 64 bits, else str."""
    return int if all(type(raw) is int and -(2**63) <= raw < 2**63 for raw in ids) else str


@contextmanager
def _writer(path: Path | None, user_kind: type, item_kind: type) -> Iterator[Callable[[list[Line]], None]]:
    """A function that appends lines to ``path`` or to the screen; a failed run leaves no file and no half of one."""
    if path is None:
        text = csv.writer(sys.stdout, lineterminator="\n")
        text.writerow(_COLUMNS)
        yield text.writerows
        sys.stdout.flush()
        return
    with replacing(path) as file:
        if path.suffix == ".parquet":
            with _parquet(file, user_kind, item_kind) as write:
                yield write
        else:
            with _csv(file) as write:
                yield write


@contextmanager
def _csv(file: IO[bytes]) -> Iterator[Callable[[list[Line]], None]]:
    text = io.TextIOWrapper(file, encoding="utf-8", newline="", write_through=True)
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_COLUMNS)
    try:
        yield writer.writerows
    finally:
        text.detach()


@contextmanager
def _parquet(file: IO[bytes], user_kind: type, item_kind: type) -> Iterator[Callable[[list[Line]], None]]:
    """One row group a chunk; the types are those of the ids of the log and of the run, whatever the lines hold."""
    arrow = require("pyarrow", "train", "writing parquet")
    parquet = require("pyarrow.parquet", "train", "writing parquet")
    kinds = {int: arrow.int64(), str: arrow.string()}
    types = (kinds[user_kind], arrow.int32(), kinds[item_kind], arrow.float32())
    schema = arrow.schema(list(zip(_COLUMNS, types, strict=True)))
    writer = parquet.ParquetWriter(file, schema)

    def write(lines: list[Line]) -> None:
        columns = list(zip(*lines, strict=True)) or [()] * len(_COLUMNS)
        convert: tuple[Callable[[Any], Any], ...] = (user_kind, int, item_kind, float)
        arrays = [
            arrow.array([to(value) for value in column], kind) for to, column, kind in zip(convert, columns, types, strict=True)
        ]
        writer.write_table(arrow.table(arrays, schema=schema))

    try:
        yield write
    finally:
        # In a run that was broken off, too: the writer would complain later of the file that is gone.
        writer.close()
