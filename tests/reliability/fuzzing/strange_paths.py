"""Paths that are no files, and files that change while they are read."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

from lares_fast import serve
from lares_fast.cli import settings
from lares_fast.data import FORMATS, read_log
from tests.reliability.fuzzing import log_parsers
from tests.reliability.fuzzing.settings_files import Input

KINDS = {"paths"}
PLACE = Path("place")
USERS = 30_000


def example(_: str, random: Random) -> Input:
    """Return a path and a reader, or a file and the change that is made while it is read."""
    if random.random() < 0.1:
        change = (random.choice(list(CHANGES)), random.choice(("log.txt", "log.inter", "log.csv")), random.randrange(1, 3))
        return Input("a file that changes", change, check_change)
    choice = random.choice(list(STRANGE)), random.choice(list(READERS))
    if choice[1] == "settings" and choice[0] in ("None", "a number", "bytes"):
        # The command line gives texts only.
        choice = choice[0], "load"
    return Input("path", choice, check_path)


def _fresh() -> None:
    if PLACE.is_dir() and not PLACE.is_symlink():
        shutil.rmtree(PLACE)
    elif PLACE.exists() or PLACE.is_symlink():
        PLACE.unlink()


def _socket() -> Path:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(PLACE))
    return PLACE


def _linked(target: str) -> Path:
    PLACE.symlink_to(target)
    return PLACE


def _fifo() -> Path:
    os.mkfifo(PLACE)
    return PLACE


def _folder() -> Path:
    PLACE.mkdir()
    return PLACE


def _run_with_fifo(name: str) -> Path:
    PLACE.mkdir()
    os.mkfifo(PLACE / name)
    return PLACE


STRANGE: dict[str, Callable[[], Any]] = {
    "missing": lambda: PLACE,
    "a folder": _folder,
    "a FIFO": _fifo,
    "a link to a FIFO": lambda: os.mkfifo(PLACE.with_name("fifo")) if not Path("fifo").exists() else _linked("fifo"),
    "a socket": _socket,
    "a device without end": lambda: "/dev/zero",
    "an empty device": lambda: "/dev/null",
    "a terminal": lambda: "/dev/tty",
    "a file of /proc": lambda: "/proc/self/status",
    "memory": lambda: "/proc/self/mem",
    "a dangling link": lambda: _linked("nowhere"),
    "a link to itself": lambda: _linked("place"),
    "a NUL": lambda: "a\0b",
    "a long name": lambda: "x" * 5000,
    "no name": lambda: "",
    "a surrogate": lambda: "\udcff",
    "control characters": lambda: "a\n\x1b[31m.csv",
    "a file as a folder": lambda: "/proc/self/status/x",
    "a model that is a FIFO": lambda: _run_with_fifo("model.safetensors"),
    "ids that are a FIFO": lambda: _run_with_fifo("item_ids.json"),
    "None": lambda: None,
    "a number": lambda: 3,
    "bytes": lambda: b"log.csv",
}
READERS: dict[str, Callable[[Any], Any]] = {
    "read_log": read_log,
    **{f"read_log as {name}": (lambda path, name=name: read_log(path, format=name)) for name in FORMATS},
    "settings": settings.build,
    "load": serve.load,
}


def check_path(choice: tuple[str, str]) -> str | None:
    """Read the path. Nothing may be found there."""
    _fresh()
    path, reader = STRANGE[choice[0]](), READERS[choice[1]]
    reader(path)
    return "something was read"


CHANGES: dict[str, Callable[[Path], Any]] = {
    "cut": lambda path: os.truncate(path, 1000),
    "emptied": lambda path: os.truncate(path, 0),
    "removed": lambda path: path.unlink(missing_ok=True),
    "grown": lambda path: path.open("ab").write(b"x"),
    "replaced": lambda path: path.write_bytes(b"\0" * 5_000_000),
}


def check_change(change: tuple[str, str, int]) -> str | None:
    """Read a file that changes at the first or second report of the progress."""
    what, name, moment = change
    path, reports = Path(name), [0]
    if name == "log.txt":
        path.write_text(
            "".join(f"{user} {' '.join(str(user * at % 997 + 1) for at in range(1, 9))}\n" for user in range(1, USERS))
        )
    else:
        separator = "\t" if name == "log.inter" else ","
        header = "user_id:token\titem_id:token\ttimestamp:float\n" if name == "log.inter" else "user_id,item_id,timestamp\n"
        rows = (f"{n % 997}{separator}{n * 7 % 1009}{separator}{n}\n" for n in range(10 * USERS))
        path.write_text(header + "".join(rows))

    def progress(*_: int) -> None:
        reports[0] += 1
        if reports[0] == moment:
            CHANGES[what](path)

    return log_parsers.breach(read_log(path, progress=progress), 3)
