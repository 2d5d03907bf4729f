"""Attacks on LARES_FAST_CACHE: entries of other accounts, links, pipes, hostile contents and hostile launch settings."""

from __future__ import annotations

import copy
import json
import os
import random
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from lares_fast import _settings
from lares_fast._errors import InputError
from lares_fast.verify import cache, self_test, tuning
from tests.reliability.accounts import as_account, can_change_account
from tests.reliability.counts import Counts

OWNERS, CONTENTS = "cache: owner, mode and kind of entries and folders", "cache: damaged and hostile contents"
LAUNCH, ACCOUNT = "cache: hostile launch settings", "cache: entries that a second account wrote"
KEY = {"op": "attention", "dtype": "torch.float32", "gpu": "none"}
ENTRY = {"fault": "it is wrong"}
ATTACKER = 65534

Read = Callable[[str, dict[str, Any]], Any]


def measure(counts: Counts, folder: Path) -> None:
    """Attack the cache."""
    kinds(counts, folder, cache.read)
    contents(counts, folder, cache.read, 100 if counts.quick else 10_000)
    launch_settings(counts, tuning._choice, 300 if counts.quick else 100_000)
    if can_change_account():
        accounts(counts, folder, cache.read)
    else:
        counts.note(ACCOUNT, "not tried: only root can take the place of another account")


class _cache_in:
    """A context in which the cache is a new folder with one right entry; it gives the file of the entry."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._patch = folder, mock.patch.object(_settings, "cache_folder", lambda: folder)

    def __enter__(self) -> Path:
        self._patch.start()
        cache._told.clear()
        # Files of an earlier try.
        cache.write("self_test", KEY, ENTRY)
        return cache._path("self_test", KEY)

    def __exit__(self, *_: object) -> None:
        self._patch.stop()


def _read(read: Read) -> tuple[Any, list[str]]:
    """Return what is read, and the warnings."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = read("self_test", KEY)
    return found, [str(warning.message) for warning in said]


def _replaced(file: Path, make: Callable[[Path], object]) -> None:
    file.rename(file.with_suffix(".kept"))
    make(file)


def kinds(counts: Counts, folder: Path, read: Read) -> None:
    """Change the kind and the mode of the file and of its folders. Each change must lead to None and one warning."""
    changes: dict[str, Callable[[Path], object]] = {
        f"{name} has mode {mode:o}": partial(lambda file, up, mode: [file, *file.parents][up].chmod(mode), up=up, mode=mode)
        for up, name in enumerate(("the file", "its folder", "the cache"))
        for mode in ((0o666, 0o664, 0o622, 0o602) if up == 0 else (0o777, 0o775, 0o1777, 0o2775))
    }
    changes |= {
        "a link": lambda file: _replaced(file, lambda path: path.symlink_to(path.with_suffix(".kept"))),
        "a pipe": lambda file: _replaced(file, os.mkfifo),
        "a folder": lambda file: _replaced(file, Path.mkdir),
        "a link to an endless device": lambda file: _replaced(file, lambda path: path.symlink_to("/dev/zero")),
        "very long": lambda file: os.truncate(file, 1 << 40),
    }
    if can_change_account():
        changes |= {
            f"{name} of another account": partial(lambda file, up: os.chown([file, *file.parents][up], ATTACKER, -1), up=up)
            for up, name in enumerate(("the file", "its folder", "the cache"))
        }
    for number, (name, change) in enumerate(changes.items()):
        with _cache_in(folder / f"cache {number}") as file:
            change(file)
            counts.tried(OWNERS)
            found, said = _read(read)
            again, more = _read(read)
            if found is not None or again is not None:
                counts.failed(OWNERS, f"an entry was used: {name}", lost=True)
            elif len(said) != 1 or str(folder) not in said[0] or more:
                counts.failed(OWNERS, f"{name}: there were {len(said)} warnings, and then {len(more)}")


_NUMBERS = (0, 1, -1, 2**31, 2**63, 10**400, 0.0, 16.0, 4.0, float("nan"), float("inf"))
_LISTS: tuple[Any, ...] = ([], [1, 1], [[1, 1]], [4, 2], [True, True], [4.0, 1], [4, 9], [2**40, 1], [-4, 1])
_TEXTS = ("", "16", "x" * 5000, "\x1b[2J", "attention_forward")
_VALUES: tuple[Any, ...] = (None, True, False, {}, {"rows": 16}, *_NUMBERS, *_LISTS, *_TEXTS)


def _hostile(value: Any, rng: random.Random, depth: int = 0) -> Any:
    """Return ``value`` with one part replaced by something of another type or size."""
    if isinstance(value, dict) and value and rng.random() < 0.8:
        name = rng.choice(list(value))
        changed = dict(value)
        kind = rng.randrange(4)
        if kind == 0:
            del changed[name]
        elif kind == 1:
            changed[rng.choice(["", " ", "\n", "x" * 99, "attention_forward", "\x1b[31m"])] = rng.choice(_VALUES)
        else:
            changed[name] = _hostile(value[name], rng, depth + 1)
        return changed
    return rng.choice(_VALUES)


def contents(counts: Counts, folder: Path, read: Read, tries: int) -> None:
    """Write hostile contents into a trusted file. Only the exact identity of the entry may be returned, without any error."""
    rng = random.Random(1)
    right = json.dumps({**KEY, **ENTRY}, indent=1).encode()
    with _cache_in(folder / "contents") as file:
        for number in range(tries):
            data = _damaged(right, rng) if number % 2 else json.dumps(_hostile({**KEY, **ENTRY}, rng)).encode()
            if number % 50 == 0:
                data = rng.choice((b"[" * 200_000, b'{"a":' * 50_000, b"9" * 50_000, b"\xff\xfe" + data, b"\0" * 900_000))
            file.write_bytes(data)
            counts.tried(CONTENTS, goal=tries)
            try:
                found, _ = _read(read)
            except Exception as error:
                counts.failed(CONTENTS, f"{type(error).__name__} for {data[:60]!r}")
                continue
            if found is not None and not (isinstance(found, dict) and all(found.get(name) == KEY[name] for name in KEY)):
                counts.failed(CONTENTS, f"an entry of another thing was returned: {data[:80]!r}", lost=True)


def _damaged(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    place = rng.randrange(len(changed))
    kind = rng.randrange(3)
    if kind == 0:
        changed[place] ^= 1 << rng.randrange(8)
    elif kind == 1:
        del changed[place:]
    else:
        changed[place:place] = rng.choice((b"NaN", b"-Infinity", b"}", b"\0", b'"', b"1e999", b"\\ud800"))
    return bytes(changed)


def launch_settings(counts: Counts, choose: Callable[..., Any], tries: int) -> None:
    """Give hostile settings to the check before a launch. Only allowed integers may pass, and no error may come."""
    rng = random.Random(2)
    tensor, sizes = torch.empty(0), {"width": 32, "longest": 50}
    right = {"rows": 16, "kernels": {"attention_forward": [4, 2], "attention_backward_query": [1, 1]}}
    passed = 0
    with mock.patch.object(tuning, "capability", lambda device: 80):
        allowed = set(tuning.launches(tensor.dtype, 80))
        for _ in range(tries):
            stored = copy.deepcopy(right)
            for _ in range(rng.randint(0, 2)):
                stored = _hostile(stored, rng) if isinstance(stored, dict) else stored
            counts.tried(LAUNCH, goal=tries)
            try:
                found = choose("attention", tensor, sizes, stored)
            except Exception as error:
                counts.failed(LAUNCH, f"{type(error).__name__} for {repr(stored)[:80]}")
                continue
            if found is None:
                continue
            passed += 1
            numbers = [number for how in found.kernels.values() for number in how]
            whole = all(type(number) is int for number in numbers) and (found.rows is None or type(found.rows) is int)
            if (
                not whole
                or not set(found.kernels.values()) <= allowed
                or found.rows not in (None, *tuning.rows("attention", sizes))
            ):
                counts.failed(LAUNCH, f"{repr(stored)[:80]} reached the launch", lost=True)
    counts.note(LAUNCH, f"{passed:,} of them were right and were used")


def _plant(folder: Path) -> None:
    with mock.patch.object(_settings, "cache_folder", lambda: folder):
        cache.write("self_test", KEY, {"fault": None})


def accounts(counts: Counts, folder: Path, read: Read) -> None:
    """Let a second account fill the cache before this one uses it, and while it uses it."""
    for number, (owner, mode) in enumerate((owner, mode) for owner in (ATTACKER, 0) for mode in (0o755, 0o777, 0o1777)):
        place = folder / f"account {number}"
        place.mkdir()
        place.chmod(mode)
        os.chown(place, owner, -1)
        counts.tried(ACCOUNT)
        planted = not as_account(ATTACKER, partial(_force, place)).failed()
        if planted != (owner == ATTACKER or mode != 0o755):
            counts.failed(ACCOUNT, f"the account could {'' if planted else 'not '}write into a folder of mode {mode:o}")
        with mock.patch.object(_settings, "cache_folder", lambda place=place: place):
            cache._told.clear()
            found, _ = _read(read)
            refused = False
            try:
                cache.write("self_test", KEY, ENTRY)
            except InputError:
                refused = True
            mine = cache.read("self_test", KEY)
        if found is not None:
            counts.failed(ACCOUNT, f"an entry of the account was used (mode {mode:o})", lost=True)
        elif planted and not refused:
            counts.failed(ACCOUNT, f"an entry was written into a folder of the account (mode {mode:o})")
        elif not refused and mine is None:
            counts.failed(ACCOUNT, "an own entry was not read")


def _force(place: Path) -> None:
    """Write an entry as an attacker would, without the checks."""
    kind = place / "self_test"
    try:
        kind.mkdir()
    except PermissionError:
        os._exit(1)
    with mock.patch.object(_settings, "cache_folder", lambda: place):
        cache._path("self_test", KEY).write_text(json.dumps({**KEY, "fault": None}))


def planted() -> dict[str, Callable[[Counts, Path], object]]:
    """Return the attacks on a cache that is wrong on purpose."""

    def trusting(kind: str, key: dict[str, Any]) -> Any:
        path = cache._path(kind, key)
        # A pipe would wait, and a device would not end.
        if not path.is_file() or path.stat().st_size > 1 << 20:
            return None
        return json.loads(path.read_text())

    def loose(op: str, tensor: Any, sizes: Any, stored: Any) -> Any:
        launch = self_test.importlib.import_module("lares_fast.kernels._launch")
        try:
            return launch.Choice(stored["rows"], {name: tuple(how) for name, how in stored["kernels"].items()})
        except (AttributeError, KeyError, TypeError):
            return None

    return {
        "a cache that trusts every file": lambda counts, folder: kinds(counts, folder, trusting),
        "a cache that trusts every content": lambda counts, folder: contents(counts, folder, trusting, 50),
        "launch settings without a check": lambda counts, folder: launch_settings(counts, loose, 50),
    }
