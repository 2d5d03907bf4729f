"""``lares-fast recommend``: recommend items by their raw ids, for one user, one history or all users of a file."""

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

from lares_fast._device import choose
from lares_fast._errors import InputError, require
from lares_fast._files import replacing
from lares_fast.cli import settings, signals
from lares_fast.cli.console import Console, add_device_arguments, counted, device_text, notice, with_flag
from lares_fast.cli.inputs import ROLES, input_settings, open_log, require_steps
from lares_fast.cli.outputs import files_in, require_apart
from lares_fast.cli.streams import unknown_characters
from lares_fast.data import InteractionLog
from lares_fast.data.readers import FORMATS
from lares_fast.serve import Recommender, load_about
from lares_fast.train.config import DataConfig
from lares_fast.train.folder import foreign_model
from lares_fast.train.identity import events_digest

_CHUNK = 4096
_COLUMNS = ("user", "rank", "item", "score")

# The settings for reading any file, and those that only the log of the run needs.
_READING = tuple(f"data.{name}" for name in ("format", "separator", *ROLES, "min_rating", "duplicates"))
_OF_A_LOG = ("data.path", "data.min_events", "data.min_item_events")

# (user, rank, item, score)
Line = tuple[Any, int, Any, float]


def add_arguments(parser: ArgumentParser) -> None:
    """Add the arguments of ``recommend``."""
    parser.add_argument("--run", metavar="DIR", type=Path, required=True, help="run folder that lares-fast train wrote")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--user", metavar="ID", help="recommend to this user (raw id) of the run's log")
    what.add_argument("--history", metavar="ITEM,ITEM,...", help="recommend for this history of raw item ids, oldest first")
    what.add_argument(
        "--item", metavar="ID", action="append", help="one item of the history, for ids with commas; repeat it, oldest first"
    )
    what.add_argument("--input", metavar="FILE", type=Path, help="recommend to all users of this log, in any training format")
    parser.add_argument("--data", metavar="PATH", help="with --user: the log of the run, if it has moved")
    parser.add_argument(
        "--format",
        choices=("auto", *FORMATS),
        help="format of the log (default: the format of the run's log, or auto if the file has another ending)",
    )
    parser.add_argument("--columns", metavar="ROLE=NAME,...", help="columns of the log, such as user=who,item=what,time=none")
    settings.add_set_argument(parser)
    parser.add_argument("--k", type=int, default=10, help="number of items for each user (default: 10)")
    parser.add_argument("--output", metavar="FILE", type=Path, help="write a .csv or .parquet file (default: print CSV)")
    parser.add_argument("--keep-seen", action="store_true", help="also recommend items that are in the history")
    parser.add_argument("--steps", metavar="T", type=int, help="number of reasoning steps (default: the setting of the run)")
    parser.add_argument("--batch-size", metavar="N", type=int, default=256, help="histories in a batch (default: 256)")
    add_device_arguments(parser)


def command(arguments: Namespace) -> int:
    """Run ``recommend``."""
    _require_used(arguments)
    choice = choose(arguments.device)
    recommender, about = load_about(arguments.run, choice.device, arguments.precision)
    if (text := foreign_model(arguments.run)) is not None:
        notice(text)
    if not 1 <= arguments.k <= len(recommender.item_ids):
        raise InputError(f"--k must be in 1..{len(recommender.item_ids)}, the number of items, but got {arguments.k}.")
    require_steps(arguments.steps)
    if arguments.batch_size < 1:
        raise InputError(f"--batch-size must be at least 1, but got {arguments.batch_size}.")
    if arguments.output and arguments.output.suffix not in (".csv", ".parquet"):
        raise InputError(f"--output {arguments.output} must end in .csv or .parquet.")
    if arguments.output:
        given = {"--run": files_in(arguments.run), "--input": [arguments.input], "--data": [arguments.data]}
        require_apart("--output", [arguments.output], given)
    with Console(sys.stderr) as console:
        if (text := device_text(choice)) is not None:
            console.say(text)
        users, total, user_kind = _users(arguments, recommender, about, console)
        counts = {"users": 0, "unknown": 0, "empty": 0}
        began = time.monotonic()
        with signals.handling(signals.abort), _writer(arguments.output, user_kind, _kind(recommender.item_ids)) as write:
            for chunk in _chunks(users):
                write(_recommend(recommender, chunk, arguments, counts))
                console.progress("recommending", counts["users"], total)
    if counts["unknown"]:
        notice(f"left out {counted(counts['unknown'], 'event')} with items that are not in the training log.")
    if counts["empty"]:
        notice(f"recommended nothing to {counted(counts['empty'], 'user')} without known items.")
    if arguments.output:
        seconds = max(time.monotonic() - began, 1e-9)
        answered = counted(counts["users"] - counts["empty"], "user")
        print(f"{arguments.output}: {answered}, {counts['users'] / seconds:,.0f} users/s")
    return 0


def _require_used(arguments: Namespace) -> None:
    """Raise :class:`InputError` for an option about a log, or for a setting, that the other options do not use."""
    source = next(name for name in ("user", "input", "history", "item") if getattr(arguments, name) is not None)
    used = {"user": (*_READING, *_OF_A_LOG), "input": _READING}.get(source, ())
    for key in _keys(arguments):
        if key in settings.known_keys() and key not in used:
            raise InputError(f"--set {key} has no effect on recommend with --{source}: leave it out.")
        if key == "data.path" and arguments.data is not None:
            raise InputError("--set data.path has no effect with --data: leave one of them out.")
    for option in {"user": (), "input": ("data",)}.get(source, ("data", "format", "columns")):
        if getattr(arguments, option) is not None:
            raise InputError(f"--{option} has no effect with --{source}: leave one of them out.")


def _keys(arguments: Namespace) -> list[str]:
    return [text.partition("=")[0].strip() for text in arguments.assignments]


def _users(
    arguments: Namespace, recommender: Recommender, about: dict[str, str], console: Console
) -> tuple[Iterable[tuple[Any, list[Any]]], int, type]:
    """Return pairs (raw user id, raw history), their number, and the type of the user ids."""
    if (history := _history(arguments, recommender)) is not None:
        return [("history", history)], 1, str
    # Imported here, because only --user and --input need a configuration, and with it the [train] extra.
    from lares_fast.cli.evaluate import run_config

    data = run_config(arguments.run, arguments.assignments).data
    path = arguments.input or arguments.data
    if path is None and arguments.output:
        require_apart("--output", [arguments.output], {"--run": [data.path]})
    try:
        log = open_log(
            _reading_settings(data, None if path is None else Path(path), arguments),
            None if path is None else str(path),
            histories=arguments.input is not None,
            progress=partial(console.progress, "reading"),
        )
    except InputError as error:
        raise _with_own_flag(error) from None
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


def _with_own_flag(error: InputError) -> InputError:
    """Return ``error`` with the flag of this command that changes its setting."""
    setting = (error.setting or "").removeprefix("data.")
    name = setting.partition("=")[0]
    if name == "batch_size":
        return InputError(with_flag(str(error), setting, "--batch-size {value}"))
    if name == "format":
        return InputError(with_flag(str(error), setting, "--format {value}"))
    if name in ROLES:
        return InputError(with_flag(str(error), setting, "--columns {name}={value}"))
    return error


def _history(arguments: Namespace, recommender: Recommender) -> list[str] | None:
    """Return the items of --item or --history, or ``None`` without these arguments.

    Raises :class:`InputError` for an unknown item, because it may be a typing error.
    """
    if arguments.item is not None:
        flag, items = "--item", list(arguments.item)
    elif arguments.history is not None:
        flag, items = "--history", [word.strip() for word in arguments.history.split(",") if word.strip()]
        if not items:
            raise InputError("--history holds no item: give raw item ids separated by commas.")
    else:
        return None
    if not any(map(recommender.knows, items)):
        raise InputError(
            f"{flag} {', '.join(items)!r:.60} holds no item of the run in {arguments.run}: give raw ids of its training log."
        )
    if unknown := [item for item in items if not recommender.knows(item)]:
        hint = ", and give an id that contains a comma with --item" if flag == "--history" and len(items) > 1 else ""
        raise InputError(
            f"{flag} {unknown[0]!r:.60} is not an item of the run in {arguments.run}: give raw ids of its training log{hint}."
        )
    return items


def _reading_settings(data: DataConfig, path: Path | None, arguments: Namespace) -> DataConfig:
    """Return the settings to read the log ``path`` with: the run's settings, changed by --set, --format and --columns."""
    own: dict[str, Any] = _columns(arguments.columns)
    if arguments.format is not None:
        own["format"] = arguments.format
    data = replace(data, **own)
    given = {*own, *(key.removeprefix("data.") for key in _keys(arguments))}
    return data if path is None else input_settings(data, path, given)


def _columns(text: str | None) -> dict[str, str]:
    """Return the names of the columns by role. A name may contain commas."""
    columns = {}
    for part in () if text is None else re.split(rf",(?=(?:{'|'.join(ROLES)})=)", text):
        role, _, name = part.partition("=")
        if not name or role not in ROLES:
            raise InputError(
                f"--columns {text!r:.60} must have the form user=NAME,item=NAME,time=NAME,rating=NAME, or time=none."
            )
        columns[role] = name
    return columns


def _require_events(log: InteractionLog, recommender: Recommender, about: dict[str, str], run: Path) -> None:
    """Raise :class:`InputError` unless ``log`` holds the events that the model was trained on, in any order of rows."""
    if not about:
        notice(f"{run} is of an earlier version and does not name its log, so only the items were compared.")
        same = set(map(str, log.item_ids[1:].tolist())) == set(map(str, recommender.item_ids))
    else:
        same = events_digest(log) == about["events"]
    if not same:
        raise InputError(
            f"{log.name} has other events than the log of the run in {run}: give --data with the log it was trained on, or "
            "give this log with --input."
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


def _recommend(
    recommender: Recommender, chunk: list[tuple[Any, list[Any]]], arguments: Namespace, counts: dict[str, int]
) -> list[Line]:
    """Return the lines of the users in ``chunk``, and add their numbers to ``counts``."""
    try:
        found = recommender.recommend(
            [history for _, history in chunk],
            arguments.k,
            exclude_seen=not arguments.keep_seen,
            num_steps=arguments.steps,
            batch_size=arguments.batch_size,
        )
    except InputError as error:
        raise _with_own_flag(error) from None
    counts["users"] += len(chunk)
    counts["unknown"] += found.unknown
    counts["empty"] += len(found.empty)
    lines = []
    for (user, _), items, scores in zip(chunk, found.ids, found.scores.tolist(), strict=True):
        lines += [(user, rank, item, score) for rank, (item, score) in enumerate(zip(items, scores, strict=False), start=1)]
    return lines


def _kind(ids: Sequence[Any]) -> type:
    """Return int if every id is an integer of 64 bits, else str."""
    return int if all(type(raw) is int and -(2**63) <= raw < 2**63 for raw in ids) else str


@contextmanager
def _writer(path: Path | None, user_kind: type, item_kind: type) -> Iterator[Callable[[list[Line]], None]]:
    """Return a function that writes lines to ``path`` or to the screen. If the run fails, ``path`` stays as it was."""
    if path is None:
        with unknown_characters("strict"):
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
    """Write one row group for each chunk. The columns have the types of the user ids and item ids, even without any line."""
    arrow = require("pyarrow", "train", "writing parquet")
    parquet = require("pyarrow.parquet", "train", "writing parquet")
    kinds = {int: arrow.int64(), str: arrow.string()}
    types = (kinds[user_kind], arrow.int32(), kinds[item_kind], arrow.float32())
    schema = arrow.schema(list(zip(_COLUMNS, types, strict=True)))
    writer = parquet.ParquetWriter(file, schema, write_page_checksum=True)

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
        # The writer is closed after an interruption too. Otherwise it would fail later, because its file is gone.
        writer.close()
