"""Attacks on outputs: umasks, links and other things at their names, a second account in the folder, and two writers."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import torch

from lares_fast import _files
from lares_fast._errors import InputError
from lares_fast._weights import save_weights, weights_of
from lares_fast.cli import plots
from lares_fast.cli.recommending import _writer
from lares_fast.config import LARESConfig
from lares_fast.gpu_bench.results import Results
from lares_fast.model import LARES
from lares_fast.train import config_file
from lares_fast.train.checkpoint import save_state
from lares_fast.train.config import RunConfig
from lares_fast.verify.gpu_report import Report
from tests.reliability.accounts import as_account, can_change_account
from tests.reliability.counts import Counts

MODES, NAMES = "outputs: the umask", "outputs: a link, pipe, folder or device at the name"
GUESSED, SHARED, TWO = (
    "outputs: a link at the temporary name",
    "outputs: a folder of two accounts",
    "outputs: two writers of one file",
)
UMASKS = (0o077, 0o022, 0o002, 0o027, 0)
VICTIM, ATTACKER = 4242, 65534

Write = Callable[[Path, bytes], object]


def _bytes(path: Path, data: bytes) -> None:
    _files.atomic_write(path, lambda file: file.write(data))


def _lines(path: Path) -> None:
    with _writer(path, str, int) as write:
        write([("user", 1, 7, 0.5)])


def _results(path: Path) -> None:
    results = Results(path.parent)
    results.path = path
    results.claim({"gpu": "none"})


def writers() -> dict[str, Callable[[Path], object]]:
    """Return every way in which the package writes a file."""
    config = LARESConfig(n_items=9, hidden_size=8, inner_size=8, n_heads=1, n_pre_layers=1, n_core_layers=1)
    weights = weights_of(LARES(config))
    return {
        "state.pt": lambda path: save_state(path, {"x": torch.zeros(3)}),
        "model.safetensors": lambda path: save_weights(path, weights, config),
        "metrics.csv": lambda path: _files.write_text(path, "a,b\n"),
        "config.yaml": lambda path: config_file.save(path, RunConfig()),
        "events.jsonl": lambda path: _files.append_line(path, json.dumps({"event": "begin"})),
        "answers.csv": _lines,
        "answers.parquet": _lines,
        "gpu-day.json": lambda path: Report(path, ["machine"]),
        "results.json": _results,
        "logs.txt": lambda path: _files.open_log(path).close(),
    }


def measure(counts: Counts, folder: Path) -> None:
    """Attack all writers, and the writer that they share."""
    ways: dict[str, Callable[[Path], object]] = writers()
    if not counts.quick:
        ways["results.svg"] = lambda path: _files.write_text(path, plots.sheet([], {}, "no run"))
    umasks(counts, folder, ways)
    # It reads the file first.
    del ways["results.json"]
    for name, write in ways.items():
        things_at_the_name(counts, folder, name, write, appends=name in ("events.jsonl", "logs.txt"))
    guessed(counts, folder, _bytes, 10 if counts.quick else 1000)
    two_writers(counts, folder, _bytes, 5 if counts.quick else 2000)
    if can_change_account():
        shared(counts, folder, _bytes, 20 if counts.quick else 2000)
    else:
        counts.note(SHARED, "not tried: only root can take the place of two accounts")


def umasks(counts: Counts, folder: Path, ways: dict[str, Callable[[Path], object]]) -> None:
    """Write each file under each umask."""
    for umask in UMASKS:
        place = folder / f"umask {umask:o}"
        place.mkdir()
        before = os.umask(umask)
        try:
            for name, write in ways.items():
                write(place / name)
        finally:
            os.umask(before)
        for name in ways:
            counts.tried(MODES)
            mode = stat.S_IMODE((place / name).stat().st_mode)
            if mode != 0o666 & ~umask:
                counts.failed(MODES, f"{name} has mode {mode:o} under umask {umask:o}")


def _things(place: Path) -> dict[str, Callable[[Path], object]]:
    return {
        "link": lambda path: path.symlink_to(place / "victim"),
        "link to nothing": lambda path: path.symlink_to(place / "made"),
        "link to a folder": lambda path: path.symlink_to(place / "folder"),
        "link to a device": lambda path: path.symlink_to(os.devnull),
        "pipe": os.mkfifo,
        "folder": Path.mkdir,
    }


def things_at_the_name(
    counts: Counts, folder: Path, name: str, write: Callable[[Path], object], *, appends: bool = False
) -> None:
    """Put other things at the name of an output. A file replaces a link; everything else is refused and stays."""
    for thing in _things(folder):
        place = folder / f"{name} and a {thing}"
        place.mkdir()
        (place / "victim").write_bytes(b"mine")
        (place / "folder").mkdir()
        path = place / name
        _things(place)[thing](path)
        before = path.lstat()
        counts.tried(NAMES)
        try:
            write(path)
            refused = False
        except (InputError, OSError):
            refused = True
        changed = (place / "victim").read_bytes() != b"mine" or (place / "made").exists() or any((place / "folder").iterdir())
        left = sorted({entry.name for entry in place.iterdir()} - {"victim", "folder", name})
        if changed or left:
            counts.failed(NAMES, f"{name}, {thing}: a link was followed or a file was left ({left})", lost=changed)
        elif thing in ("link", "link to nothing") and not appends:
            if refused or path.is_symlink() or not path.is_file():
                counts.failed(NAMES, f"{name}, {thing}: the link was not replaced")
        elif not refused or path.lstat().st_ino != before.st_ino:
            counts.failed(NAMES, f"{name}, {thing}: it was not refused", lost=True)


def guessed(counts: Counts, folder: Path, write: Write, tries: int) -> None:
    """Let the attacker know the random part of a temporary name, and put a link there."""
    place = folder / "guessed"
    place.mkdir()
    (place / "victim").write_bytes(b"mine")
    before = _files.secrets.token_hex
    try:
        for number in range(tries):
            _files.secrets.token_hex = lambda size, number=number: f"{number:0{2 * size}x}"
            (place / f".out.{number:016x}").symlink_to(place / "victim")
            (place / ".out.part").unlink(missing_ok=True)
            (place / ".out.part").symlink_to(place / "victim")
            counts.tried(GUESSED)
            with suppress(InputError):
                write(place / "out", b"other")
            if (place / "victim").read_bytes() != b"mine":
                counts.failed(GUESSED, "the link was followed", lost=True)
                (place / "victim").write_bytes(b"mine")
    finally:
        _files.secrets.token_hex = before


def _write_many(path: Path, write: Write, letter: bytes, tries: int) -> None:
    for number in range(tries):
        write(path, letter * (50_000 + number))


def two_writers(counts: Counts, folder: Path, write: Write, tries: int) -> None:
    """Let two processes write one file again and again, while this process reads it."""
    place = folder / "two writers"
    place.mkdir()
    path = place / "out"
    write(path, b"a")
    children = [as_account(None, partial(_write_many, path, write, letter, tries)) for letter in (b"a", b"b")]
    seen = 0
    while any(child.is_running() for child in children) or not seen:
        data = path.read_bytes()
        seen += 1
        if not data or data.strip(data[:1]):
            counts.failed(TWO, f"a reader saw a file of {len(data)} bytes that is mixed or empty", lost=True)
    counts.tried(TWO, 2 * tries)
    for child in children:
        if child.failed():
            counts.failed(TWO, "a writer failed")
    if left := [entry.name for entry in place.iterdir() if entry.name != "out"]:
        counts.failed(TWO, f"files were left: {left}")
    counts.note(TWO, "the file was read all the time")


def _plant(place: Path, target: Path, tries: int) -> None:
    for number in range(tries):
        path = place / f"out{number % 4}"
        try:
            path.symlink_to(target)
        except FileExistsError:
            # If the file belongs to the other account, the sticky bit protects it.
            try:
                path.unlink()
            except (PermissionError, FileNotFoundError):
                continue


def _write_some(counts_of: Path, place: Path, write: Write, tries: int) -> None:
    wrong = refused = 0
    for number in range(tries):
        path = place / f"out{number % 4}"
        data = b"x" * (1000 + number)
        try:
            write(path, data)
            wrong += path.is_symlink() or path.read_bytes() != data
            # The name is free for the next link.
            path.unlink()
        except InputError:
            # The sticky bit protects the link of the other account, too.
            refused += 1
    counts_of.write_text(json.dumps([wrong, refused]))


def shared(counts: Counts, folder: Path, write: Write, tries: int) -> None:
    """Let one account write into a folder like /tmp, where another account puts links to a file of the first."""
    place = folder / "shared"
    place.mkdir()
    place.chmod(0o1777)
    own = folder / "own"
    own.mkdir()
    (own / "secret").write_bytes(b"mine")
    for path in (own, own / "secret"):
        os.chown(path, VICTIM, VICTIM)
    attacker = as_account(ATTACKER, partial(_plant, place, own / "secret", 50 * tries))
    victim = as_account(VICTIM, partial(_write_some, own / "found", place, write, tries))
    if victim.failed():
        counts.failed(SHARED, "the writer ended with another error than a refusal")
        wrong, refused = 0, 0
    else:
        wrong, refused = json.loads((own / "found").read_text())
    attacker.stop()
    counts.tried(SHARED, tries)
    if wrong:
        counts.failed(SHARED, f"{wrong} files were links, or had another content", lost=True)
    if (own / "secret").read_bytes() != b"mine":
        counts.failed(SHARED, "the file of the account was overwritten through a link", lost=True)
    counts.note(SHARED, f"{refused} writes were refused with a sentence, because a file of the other account had the name")


def planted() -> dict[str, Callable[[Counts, Path], object]]:
    """Return the attacks on writers that are wrong on purpose."""

    def follows(path: Path, data: bytes = b"other") -> None:
        path.write_bytes(data)

    def predictable(path: Path, data: bytes = b"other") -> None:
        temporary = path.with_name(f".{path.name}.part")
        temporary.write_bytes(data)
        os.replace(temporary, path)

    def private(path: Path) -> None:
        path.touch()
        path.chmod(0o644)

    return {
        "a writer that follows links": lambda counts, folder: things_at_the_name(counts, folder, "out", _unless_pipe(follows)),
        "a temporary name that can be guessed": lambda counts, folder: guessed(counts, folder, predictable, 2),
        "a writer that ignores the umask": lambda counts, folder: umasks(counts, folder, {"out": private}),
        "a writer that is not atomic": lambda counts, folder: two_writers(counts, folder, follows, 20),
    }


def _unless_pipe(write: Callable[[Path], object]) -> Callable[[Path], object]:
    def guarded(path: Path) -> None:
        # Writing to a pipe would wait.
        if path.is_fifo():
            raise OSError("a pipe")
        write(path)

    return guarded
