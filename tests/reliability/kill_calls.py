"""Number the file system calls and the events of a process, and kill it, signal it or refuse the call at one of them."""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import os
import random
import re
import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from lares_fast.train.events import Events
from lares_fast.train.run import Run

_TEMPORARY = re.compile(r"\.(.+)\.[0-9a-f]{16}")

# Kinds of calls that need room on the disk, and all kinds that change something on it.
NEED_ROOM = ("make folder", "create", "write", "sync", "rename")
CHANGE = (*NEED_ROOM, "remove")


class Call(NamedTuple):
    """``name`` is the file's final name, or the name of the event. ``temporary`` tells whether it has another name still."""

    kind: str
    name: str
    temporary: bool = False


@dataclass(frozen=True)
class Plan:
    """What happens at call number ``at``.

    ``when``
        ``before`` the call, ``after`` it, or in the ``middle`` of it, when half of the bytes of a write are written.
    ``action``
        ``kill``; ``power``: kill, and lose the bytes that were not synced; ``signal``: send ``signals``; ``fail``: the call
        raises the error ``code``; ``move``, ``remove``, ``replace``: the folder named run is renamed to moved, or removed, or
        renamed and followed by an empty folder.
    ``kinds``
        With ``fail``: all later calls of these kinds fail as well.
    ``fault``
        The name of a fault that is planted in the process: see kill_faults.py.
    """

    at: int = -1
    when: str = "before"
    action: str = "kill"
    signals: tuple[int, ...] = ()
    code: int = 0
    kinds: tuple[str, ...] = ()
    fault: str = ""


class Calls:
    """The calls of this process that change something below ``folder``, and the events of its run."""

    def __init__(self, folder: str, plan: Plan, report: str) -> None:
        self._folder, self._plan, self._report = os.path.realpath(folder), plan, report
        self._at, self._half = plan.at, False
        self.calls: list[Call] = []
        # File -> the SHA-256 of what was last renamed to it.
        self._published: dict[str, str] = {}
        # File -> the size that it surely has after a power cut.
        self._synced: dict[str, int] = {}
        self._bytes, self._counted = 0, _written()

    def install(self) -> None:
        """Replace the functions through which lares_fast changes files."""
        self._open, self._fdopen, self._fsync, self._replace, self._unlink = os.open, os.fdopen, os.fsync, os.replace, os.unlink
        self._mkdir, self._link, self._path_open, self._flock = os.mkdir, os.link, Path.open, fcntl.flock
        os.open, os.fdopen, os.fsync, os.replace, os.unlink = self.open, self.fdopen, self.fsync, self.replace, self.unlink
        os.mkdir, os.link, fcntl.flock = self.mkdir, self.link, self.flock
        show, enter, calls = Events.show, Run.enter, self
        Path.open = lambda path, mode="r", *rest, **named: calls.path_open(path, mode, *rest, **named)

        def shown(events: Events, event: str, **values: Any) -> None:
            calls.reach("event", f"{event} {values.get('what', values.get('phase', ''))}".strip())
            show(events, event, **values)

        def entered(run: Run, phase: str) -> None:
            calls.reach("event", f"enter {phase}")
            enter(run, phase)

        Events.show, Run.enter = shown, entered

    def reach(self, kind: str, path: str, do: Callable[[], Any] = lambda: None, half: Callable[[], Any] | None = None) -> Any:
        """Do one call, and act as the plan says."""
        number, plan = len(self.calls), self._plan
        name = path if kind == "event" else os.path.basename(path)
        match = _TEMPORARY.fullmatch(name)
        self.calls.append(Call(kind, match[1] if match else name, bool(match)))
        if plan.action == "fail" and 0 <= self._at < number and kind in plan.kinds:
            raise OSError(plan.code, os.strerror(plan.code), path)
        if number != self._at:
            return do()
        if plan.when == "middle" and half is not None and not self._half:
            result, self._half = half(), True
            if plan.action == "fail" and result:
                # As on a real disk, a part is written first, and the call for the rest fails.
                self._at += 1
                return result
        if plan.when == "after":
            result = do()
        self._act(path)
        return result if plan.when == "after" else do()

    def _act(self, path: str) -> None:
        plan = self._plan
        if plan.action == "fail":
            raise OSError(plan.code, os.strerror(plan.code), path)
        if plan.action == "signal":
            for number in plan.signals:
                os.kill(os.getpid(), number)
            return
        if plan.action in ("move", "remove", "replace"):
            run = os.path.join(self._folder, "run")
            if plan.action == "remove":
                shutil.rmtree(run)
            else:
                self._replace(run, os.path.join(self._folder, "moved"))
            if plan.action == "replace":
                self._mkdir(run)
            return
        if plan.action == "power":
            draw = random.Random(self._at)
            for file, size in self._synced.items():
                if os.path.exists(file):
                    os.truncate(file, draw.choice([size, draw.randint(size, max(size, os.path.getsize(file)))]))
        self.write_report()
        os.kill(os.getpid(), signal.SIGKILL)

    def write_report(self) -> None:
        """Write the calls so far, and what they have published."""
        now = _written()
        unseen = None if now is None or self._counted is None else now - self._counted - self._bytes
        content = {"calls": self.calls, "published": self._published, "unseen": unseen}
        partly = f"{self._report}.partly"
        with self._fdopen(self._open(partly, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
            json.dump(content, file)
        # The process may be killed from outside even now.
        self._replace(partly, self._report)

    # The functions that replace those of the same name.

    def _inside(self, path: Any) -> str | None:
        """Return the whole path if it is in the folder or is the folder itself."""
        text = os.path.abspath(os.fsdecode(path))
        text = os.path.join(os.path.realpath(os.path.dirname(text)), os.path.basename(text))
        return text if f"{text}/".startswith(f"{self._folder}/") else None

    def open(self, path: Any, flags: int, mode: int = 0o777, **named: Any) -> int:
        found = self._inside(path) if flags & (os.O_CREAT | os.O_WRONLY | os.O_RDWR) else None
        if found is None:
            return self._open(path, flags, mode, **named)
        return self.reach("create", found, lambda: self._open(path, flags, mode, **named))

    def fdopen(self, descriptor: int, mode: str = "r", *rest: Any, **named: Any) -> Any:
        path = self._inside(os.readlink(f"/proc/self/fd/{descriptor}"))
        if path is None or not set("wa+") & set(mode):
            return self._fdopen(descriptor, mode, *rest, **named)
        raw = _Raw(descriptor, mode, self, path)
        return io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)

    def path_open(self, path: Path, mode: str, *rest: Any, **named: Any) -> Any:
        found = self._inside(path) if set("wxa+") & set(mode) else None
        if found is None:
            return self._path_open(path, mode, *rest, **named)
        raw = self.reach("create", found, lambda: _Raw(str(path), mode, self, found))
        return io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)

    def fsync(self, descriptor: int) -> None:
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        if self._inside(path) is None:
            return self._fsync(descriptor)
        kind = "sync folder" if os.path.isdir(path) else "sync"
        self.reach(kind, path, lambda: self._fsync(descriptor))
        self._synced.pop(path, None)
        return None

    def replace(self, source: Any, target: Any) -> None:
        path, found = self._inside(source), self._inside(target)
        if path is None or found is None:
            return self._replace(source, target)

        def do() -> None:
            self._replace(source, target)
            if path in self._synced:
                self._synced[found] = self._synced.pop(path)
            self._published[found] = hashlib.sha256(Path(found).read_bytes()).hexdigest()

        return self.reach("rename", found, do)

    def unlink(self, path: Any, **named: Any) -> None:
        found = self._inside(path)
        if found is None:
            return self._unlink(path, **named)

        def do() -> None:
            self._unlink(path, **named)
            self._synced.pop(found, None)

        return self.reach("remove", found, do)

    def link(self, source: Any, target: Any, **named: Any) -> None:
        found = self._inside(target)
        if found is None:
            return self._link(source, target, **named)
        return self.reach("link", found, lambda: self._link(source, target, **named))

    def mkdir(self, path: Any, mode: int = 0o777, **named: Any) -> None:
        found = self._inside(path)
        if found is None or os.path.isdir(path):
            return self._mkdir(path, mode, **named)
        return self.reach("make folder", found, lambda: self._mkdir(path, mode, **named))

    def flock(self, descriptor: int, operation: int) -> None:
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        if self._inside(path) is None:
            return self._flock(descriptor, operation)
        return self.reach("lock", path, lambda: self._flock(descriptor, operation))

    def wrote(self, path: str, size_before: int, number: int) -> None:
        """Note a write of ``number`` bytes."""
        self._synced.setdefault(path, size_before)
        self._bytes += number


class _Raw(io.FileIO):
    """A file without a buffer, each of whose writes is one call."""

    def __init__(self, file: Any, mode: str, calls: Calls, path: str) -> None:
        super().__init__(file, mode)
        self._calls, self._path = calls, path

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")

        def some(number: int) -> int:
            before = os.fstat(self.fileno()).st_size
            done = super(_Raw, self).write(view[:number])
            self._calls.wrote(self._path, before, done)
            return done

        return self._calls.reach("write", self._path, lambda: some(len(view)), lambda: some(len(view) // 2))


def _written() -> int | None:
    """Return how many bytes this process has written by system calls, or ``None`` if the system does not tell."""
    try:
        with open("/proc/self/io") as file:
            return int(re.search(r"wchar: (\d+)", file.read())[1])
    except (OSError, TypeError):
        return None
