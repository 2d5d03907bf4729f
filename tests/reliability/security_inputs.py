"""Attacks on inputs of the command line: settings that grow when they are read, and pipes and devices in place of files."""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import resource
import shutil
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from lares_fast._errors import InputError
from lares_fast.cli import main, settings
from lares_fast.train import config_file
from tests.reliability.counts import Counts
from tests.support import train_run

BOMBS, PATHS = "settings that grow when they are read", "pipes, devices, folders and sockets as input and output paths"
# A refusal must come within this CPU time and memory.
SECONDS, MEBIBYTES = 20, 200

Build = Callable[[Path], object]


class _TooLong(BaseException):
    pass


@contextlib.contextmanager
def _limited(seconds: float) -> Iterator[None]:
    """Raise :class:`_TooLong` in the block after ``seconds`` of CPU time, or after the sixfold time on the clock."""

    def stop(*_: object) -> None:
        raise _TooLong

    timers = {signal.SIGPROF: (signal.ITIMER_PROF, seconds), signal.SIGALRM: (signal.ITIMER_REAL, 6 * seconds)}
    before = {number: signal.signal(number, stop) for number in timers}
    for timer, limit in timers.values():
        signal.setitimer(timer, limit)
    try:
        yield
    finally:
        for timer, _ in timers.values():
            signal.setitimer(timer, 0)
        for number, handler in before.items():
            signal.signal(number, handler)


def measure(counts: Counts, folder: Path) -> None:
    """Attack the settings, then the paths."""
    bombs(counts, folder, settings.build, 15 if counts.quick else 400)
    paths(counts, folder, main)


def _levels(levels: int, width: int, kind: str) -> list[str]:
    """Return lines of nested aliases: lists, mappings or merged mappings."""
    first = {"list": "[x]", "mapping": "{x: x}", "merge": "{x: 1}"}[kind]
    lines = [f"a0: &a0 {first}"]
    for level in range(1, levels):
        names = ", ".join([f"*a{level - 1}"] * width)
        inner = {
            "list": f"[{names}]",
            "merge": f"{{<<: [{names}]}}",
            "mapping": "{" + ", ".join(f"k{place}: *a{level - 1}" for place in range(width)) + "}",
        }[kind]
        lines.append(f"a{level}: &a{level} {inner}")
    return lines


def _bomb(rng: random.Random) -> str:
    """Return a text of settings that would take much memory or time in a loader without a guard."""
    kind = rng.randrange(8)
    size = rng.choice((10, 100, 1000, 20_000, 99_000))
    if kind == 0:
        lines = _levels(rng.randint(2, 12), rng.randint(2, 12), rng.choice(("list", "mapping", "merge")))
        return "\n".join([*lines, rng.choice(("spt: *a1", "spt:\n  <<: *a1", "seed: *a1", ""))])
    if kind == 1:
        lines = _levels(rng.randint(2, 9), rng.randint(2, 9), rng.choice(("list", "mapping", "merge")))
        return f"{rng.choice(('seed', 'device', 'precision'))}: '{{{', '.join(lines)}}}'"
    if kind == 2:
        return rng.choice(("a: ", "spt: ", "")) + rng.choice("[{") * size
    if kind == 3:
        quote = rng.choice(("", "'", '"'))
        return f"seed: {quote}{rng.choice(('- ', '? ', '[', '{a: ', '!!a ', '&a ', '1_', '1:', '9', '-')) * (size // 4)}{quote}"
    if kind == 4:
        return f"seed: {rng.choice(('0x', '0b', '0', ''))}{'1' * size}"
    if kind == 5:
        return rng.choice(("#", " ", "x", "\n", "---\n", "a: 1\n", "#a\n", "\t", "# 0123456789abcde", "\\", "%")) * (size // 4)
    if kind == 6:
        return "device: " + "x" * rng.choice((1000, 90_000, 5_000_000))
    return "spt: {lr: " + rng.choice(("1", "9" * size, "1e" + "9" * 50, ".nan", "[1, [2, [3]]]", "{a: {b: {c: 1}}}")) + "}"


def bombs(counts: Counts, folder: Path, build: Build, tries: int, seconds: float = SECONDS) -> None:
    """Read hostile settings. Each is read or refused with one sentence, in little time and memory."""
    rng = random.Random(3)
    path, slowest = folder / "config.yaml", 0.0
    path.write_text("seed: 1\n")
    build(path)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(tries):
        text = _bomb(rng)
        path.write_text(text)
        counts.tried(BOMBS, goal=tries)
        began = time.process_time()
        try:
            with _limited(seconds):
                build(path)
        except InputError as error:
            if len(str(error)) > 1000:
                counts.failed(BOMBS, f"the message has {len(str(error))} characters for {text[:40]!r}")
        except _TooLong:
            counts.failed(BOMBS, f"it took more than {seconds} s of CPU time: {text[:60]!r}", lost=True)
        except Exception as error:
            counts.failed(BOMBS, f"{type(error).__name__} for {text[:60]!r}")
        slowest = max(slowest, time.process_time() - began)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    if grown > MEBIBYTES:
        counts.failed(BOMBS, f"the memory grew by {grown:.0f} MiB", lost=True)
    counts.note(BOMBS, f"the slowest took {slowest:.1f} s of CPU time; the memory grew by {grown:.0f} MiB")


def _place(kind: str, path: Path) -> None:
    """Put something that is no file at ``path``."""
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as server:
            # The name of a socket is short.
            here = os.getcwd()
            os.chdir(path.parent)
            try:
                server.bind(path.name)
            finally:
                os.chdir(here)
    else:
        path.symlink_to(kind)


def paths(counts: Counts, folder: Path, run: Callable[[list[str]], int], seconds: float = SECONDS) -> None:
    """Put pipes, devices, folders and sockets at each path of each command. Each is refused at once with one sentence."""
    kinds = ("pipe",) if counts.quick else ("pipe", "/dev/zero", "/dev/random", "/dev/full", "folder", "socket")
    trained = folder / "trained"
    train_run.train(trained, ("spt",), spt_epochs=1)
    config = train_run.config(spt_epochs=1)
    config_file.save(trained / "config.yaml", config)
    odd, copy, free = folder / "odd.csv", folder / "copy", folder / "new"
    calls: dict[str, list[str]] = {
        "train --config": ["train", "--config", str(odd), "--out", str(free)],
        "train --data": ["train", "--data", str(odd), "--out", str(free)],
        "train --out": ["train", "--phase", "spt", "--set", "spt.epochs=1", "--out", str(odd)],
        "recommend --input": ["recommend", "--run", str(trained), "--input", str(odd)],
        "recommend --data": ["recommend", "--run", str(trained), "--user", "1", "--data", str(odd)],
        "recommend --output": ["recommend", "--run", str(trained), "--item", _item(trained), "--output", str(odd)],
        "recommend --run": ["recommend", "--run", str(odd), "--item", "1"],
        "eval --data": ["eval", "--run", str(trained), "--data", str(odd)],
        "gpu-day --only failed": ["gpu-day", "--rehearse", "--out", str(folder), "--only", "failed", str(odd)],
        "gpu-day --out": ["gpu-day", "--rehearse", "--out", str(odd)],
        "gpu-bench --log": ["gpu-bench", "--rehearse", "--out", str(free), "--log", str(odd)],
        "gpu-bench results.json": ["gpu-bench", "--rehearse", "--out", str(copy), "--rows", "topk"],
    }
    # A folder is right for --out and --run.
    not_a_folder = ("train --out", "recommend --run", "gpu-day --out")
    files = {
        "model.safetensors": ["recommend", "--item", "1", "--run", str(copy)],
        "item_ids.json": ["recommend", "--item", "1", "--run", str(copy)],
        "config.yaml": ["recommend", "--user", "1", "--run", str(copy)],
        "state.pt": ["train", "--resume", str(copy)],
        "config.yaml of train": ["train", "--resume", str(copy)],
    }
    for kind in kinds:
        for name, command in calls.items():
            if kind == "folder" and name in not_a_folder:
                continue
            shutil.rmtree(copy, ignore_errors=True)
            copy.mkdir()
            _place(kind, copy / "results.json" if "results.json" in name else odd)
            _one(counts, run, f"{name}, {kind}", command, seconds)
        for name, command in files.items():
            shutil.rmtree(copy, ignore_errors=True)
            shutil.copytree(trained, copy)
            _place(kind, copy / name.partition(" ")[0])
            _one(counts, run, f"{name} of a run, {kind}", command, seconds)


def _item(trained: Path) -> str:
    return str(json.loads((trained / "item_ids.json").read_text())[1])


def _one(counts: Counts, run: Callable[[list[str]], int], name: str, command: list[str], seconds: float) -> None:
    out, err = io.StringIO(), io.StringIO()
    counts.tried(PATHS)
    try:
        with _limited(seconds), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = run(command)
    except _TooLong:
        counts.failed(PATHS, f"{name}: it waited more than {seconds} s", lost=True)
        return
    except BaseException as error:
        counts.failed(PATHS, f"{name}: {type(error).__name__}: {str(error)[:100]}")
        return
    said = [line for line in err.getvalue().splitlines() if line.startswith("lares-fast: error: ")]
    if code != 2 or len(said) != 1 or "Traceback" in err.getvalue():
        counts.failed(PATHS, f"{name}: code {code}, said {err.getvalue()[-200:]!r}")


def planted() -> dict[str, Callable[[Counts, Path], object]]:
    """Return the attacks on readers that are wrong on purpose."""

    def unguarded(path: Path) -> None:
        # This is the size of what the aliases stand for, which a loader would build.
        text = path.read_text()
        if "&a" in text or len(text) > config_file._MOST_BYTES:
            time.sleep(1)

    def waiting(command: list[str]) -> int:
        for word in command:
            if Path(word).is_fifo():
                with open(word):
                    pass
        return 2

    return {
        "settings that are read without a guard": lambda counts, folder: bombs(counts, folder, unguarded, 20, seconds=0.05),
        "a command that waits for a pipe": lambda counts, folder: _planted_wait(counts, folder, waiting),
    }


def _planted_wait(counts: Counts, folder: Path, run: Callable[[list[str]], int]) -> None:
    _place("pipe", folder / "odd")
    _one(counts, run, "planted", [str(folder / "odd")], 0.05)
