"""The work of ``lares-fast recommend``: read histories, recommend in batches, and print or write the items."""

from __future__ import annotations

import csv
import io
import json
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import IO, Any

from lares_fast._device import choose
from lares_fast._errors import InputError, require
from lares_fast._files import replacing
from lares_fast.cli import settings, signals
from lares_fast.cli.console import Console, counted, device_text, notice
from lares_fast.cli.inputs import open_log, settings_for
from lares_fast.cli.streams import unknown_characters
from lares_fast.data import InteractionLog
from lares_fast.serve import Recommender, load_about
from lares_fast.train.config import RunConfig
from lares_fast.train.folder import foreign_model
from lares_fast.train.identity import events_digest

_CHUNK = 4096
_COLUMNS = ("user", "rank", "item", "score")

# (user, rank, item, score)
Line = tuple[Any, int, Any, float]


def recommend(arguments: Namespace, config: RunConfig, given: Mapping[str, str]) -> int:
    """Run ``recommend`` with the settings ``config``, of which the arguments have ``given`` some."""
    choice = choose(arguments.device)
    recommender, about = load_about(arguments.run, choice.device, arguments.precision)
    if (text := foreign_model(arguments.run)) is not None:
        notice(text)
    if not 1 <= arguments.k <= len(recommender.item_ids):
        raise InputError(f"--k must be in 1..{len(recommender.item_ids)}, the number of items, but got {arguments.k}.")
    with Console(sys.stderr) as console:
        if (text := device_text(choice)) is not None:
            console.say(text)
        users, total, user_kind = _users(arguments, config, given, recommender, about, console)
        counts = {"users": 0, "unknown": 0, "empty": 0}
        began = time.monotonic()
        with signals.handling(signals.abort), _writer(arguments.output, user_kind, _kind(recommender.item_ids)) as write:
            for chunk in _chunks(users):
                write(_recommend(recommender, chunk, arguments, config.evaluation.batch_size, counts))
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


def _users(
    arguments: Namespace,
    config: RunConfig,
    given: Mapping[str, str],
    recommender: Recommender,
    about: dict[str, str],
    console: Console,
) -> tuple[Iterable[tuple[Any, list[Any]]], int, type]:
    """Return pairs (raw user id, raw history), their number, and the type of the user ids."""
    if (history := _history(arguments, recommender)) is not None:
        return [("history", history)], 1, str
    path = config.data.path if arguments.input is None else str(arguments.input)
    data = config.data
    if path is not None:
        data = settings_for(Path(path), data, settings.of_run(arguments.run, []).data.path, given)
    log = open_log(
        data,
        path,
        histories=arguments.input is not None,
        progress=partial(console.progress, "reading"),
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
    """Return the items of --item or --history, or ``None`` without these arguments.

    Raises :class:`InputError` for an unknown item, because it may be a typing error, and for a text with two meanings.
    """
    if arguments.item is not None:
        flag, items = "--item", list(arguments.item)
    elif arguments.history is not None:
        flag, items = "--history", _listed(arguments.history, recommender)
    else:
        return None
    if not any(map(recommender.knows, items)):
        raise InputError(
            f"{flag} {', '.join(items)!r:.60} holds no item of the run in {arguments.run}: give raw ids of its training log."
        )
    if unknown := [item for item in items if not recommender.knows(item)]:
        hint = ", and give ids that contain a comma as a JSON list or with --item" if flag == "--history" else ""
        raise InputError(
            f"{flag} {unknown[0]!r:.60} is not an item of the run in {arguments.run}: give raw ids of its training log{hint}."
        )
    return items


def _listed(text: str, recommender: Recommender) -> list[str]:
    """Return the items of a JSON list, or of a text with commas between the items."""
    found: Any = None
    with suppress(ValueError, RecursionError):
        found = json.loads(text)
    if isinstance(found, list):
        if wrong := [item for item in found if isinstance(item, bool) or not isinstance(item, str | int)]:
            raise InputError(f"--history must be a list of item ids, but holds {str(wrong[0])!r:.60}.")
        return [str(item) for item in found]
    pieces = text.split(",")
    # An id with a comma would be read as several ids.
    most = max((item.count(",") for item in recommender.item_ids if isinstance(item, str)), default=0)
    for begin in range(len(pieces)):
        for end in range(begin + 2, min(begin + most + 1, len(pieces)) + 1):
            if recommender.knows(joined := ",".join(pieces[begin:end]).strip()):
                raise InputError(
                    f"--history {text!r:.60} may mean the item {joined!r:.60} or several items: give a JSON list such as "
                    '\'["a", "b, c"]\', or each item with --item.'
                )
    items = [piece.strip() for piece in pieces if piece.strip()]
    if not items:
        raise InputError("--history holds no item: give raw item ids separated by commas.")
    return items


def _require_events(log: InteractionLog, recommender: Recommender, about: dict[str, str], run: Path) -> None:
    """Raise :class:`InputError` unless ``log`` holds the events that the model was trained on, in any order of rows."""
    if "events" not in about:
        notice(f"the model in {run} does not name its log, so only the items were compared.")
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
    recommender: Recommender,
    chunk: list[tuple[Any, list[Any]]],
    arguments: Namespace,
    batch_size: int,
    counts: dict[str, int],
) -> list[Line]:
    """Return the lines of the users in ``chunk``, and add their numbers to ``counts``."""
    try:
        found = recommender.recommend(
            [history for _, history in chunk],
            arguments.k,
            exclude_seen=not arguments.keep_seen,
            num_steps=arguments.steps,
            batch_size=batch_size,
        )
    except InputError as error:
        setting = (error.setting or "").replace("batch_size", "evaluation.batch_size")
        raise InputError(str(error), setting or None) from None
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
