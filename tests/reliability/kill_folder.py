"""Take the folder of a run away, make it read-only, and let two processes use it."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from tests.reliability.counts import Counts
from tests.reliability.kill_calls import Plan
from tests.reliability.kill_child import Ended
from tests.reliability.kill_runs import Place, count, differences, published

READ_ONLY = "a read-only folder, for a new run and for a resume"
GONE = "the folder is moved, removed or replaced while a run writes into it"
FRESH = "two new runs with other settings in one folder"
RESUMED = "two resumes of one run"

_RATES = (("--set", "spt.lr=0.001"), ("--set", "spt.lr=0.01"))
_TRIES = {READ_ONLY: (1, 6), GONE: (1, 24), FRESH: (1, 16), RESUMED: (0, 16)}


def measure(counts: Counts, place: Place) -> None:
    """Disturb, continue and compare."""
    draw = random.Random(6)
    goals = {what: numbers[not counts.quick] for what, numbers in _TRIES.items()}
    _, whole = place.whole()
    held = next(n for n, call in enumerate(whole.calls) if call.kind == "event")
    free = next(n for n, call in enumerate(whole.calls) if call.kind == "remove")
    if _can_be_made_read_only(place.new().parent):
        tries = [
            (("a new run", "a resume")[number % 2], partial(_read_only, place, random.Random(number), resume=number % 2 == 1))
            for number in range(goals[READ_ONLY])
        ]
        count(counts, READ_ONLY, tries)
    else:
        counts.note(READ_ONLY, "not tried: this account cannot make a folder read-only")
    tries = []
    for number in range(goals[GONE]):
        plan = Plan(at=draw.randrange(held, free - 1), action=("move", "remove", "replace")[number % 3])
        tries.append((f"{plan.action} at call {plan.at}", partial(_gone, place, plan)))
    count(counts, GONE, tries)
    for what, function in ((FRESH, _two_new_runs_at_intervals), (RESUMED, _two_resumes)):
        count(counts, what, [(f"try {n}", partial(function, place, random.Random(n))) for n in range(goals[what])])


def _read_only(place: Place, draw: random.Random, *, resume: bool) -> list[str]:
    out = place.new()
    if resume:
        place.start(place.first(out), out, Plan(at=draw.randrange(100, 400))).wait()
    else:
        out.mkdir()
    before = published(out)
    with _without_writing(out):
        ended = place.start(place.again(out), out).wait()
    faults = _refusal(ended, str(out))
    if published(out) != before:
        faults.append("a file has changed")
    return faults + place.finish(out)


@contextmanager
def _without_writing(folder: Path) -> Iterator[None]:
    """Make ``folder`` read-only. An administrator may write to any folder, and needs a read-only file system."""
    if os.geteuid():
        folder.chmod(0o555)
        yield
        folder.chmod(0o755)
        return
    subprocess.run(["mount", "--bind", folder, folder], check=True, capture_output=True)
    try:
        subprocess.run(["mount", "-o", "remount,ro,bind", folder], check=True, capture_output=True)
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


def _can_be_made_read_only(folder: Path) -> bool:
    try:
        with _without_writing(folder):
            return True
    except (OSError, subprocess.CalledProcessError):
        return False


def _gone(place: Place, plan: Plan) -> list[str]:
    """Take the folder away at one call. The run must stop, and a moved folder must be complete."""
    out = place.new()
    ended = place.start(place.first(out), out, plan).wait()
    faults = _refusal(ended, str(out))
    if left := [path.name for path in out.glob("*")]:
        faults.append(f"the old place holds {', '.join(sorted(left))}")
    if plan.action == "remove":
        return faults
    moved = out.with_name("moved")
    if not moved.exists():
        return [*faults, "the moved folder is missing"]
    shutil.rmtree(out, ignore_errors=True)
    return faults + place.finish(moved)


def _two_new_runs_at_intervals(place: Place, draw: random.Random) -> list[str]:
    """Begin two runs in one folder. Return what is wrong, for example a folder with files of both."""
    return _two_new_runs(place, _at_intervals(place, draw, _RATES))


def two_new_runs_at_once(place: Place, fault: str) -> list[str]:
    """Begin two runs in one folder at once, both with a planted fault. Return what is wrong."""
    return _two_new_runs(place, iter(_RATES), fault)


def _two_new_runs(place: Place, rates: Iterator[tuple[str, ...]], fault: str = "") -> list[str]:
    out = place.new()
    began = [(rate, place.start(place.first(out, *rate), out, Plan(fault=fault))) for rate in rates]
    ended = [(rate, child.wait()) for rate, child in began]
    winners = [rate for rate, end in ended if end.code == 0]
    faults = [text for _, end in ended if end.code for text in _refusal(end, str(out))]
    if len(winners) != 1:
        return [*faults, f"{len(winners)} runs have ended without an error"]
    return faults + differences(place.whole(*winners[0])[0], out)


def _two_resumes(place: Place, draw: random.Random) -> list[str]:
    out = place.new()
    killed = place.start(place.first(out), out, Plan(at=draw.randrange(100, 400))).wait()
    if killed.code != -signal.SIGKILL:
        return [f"the run was not killed but ended with {killed.code}"]
    began = [place.start(place.again(out), out) for _ in _at_intervals(place, draw, (1, 2))]
    ended = [child.wait() for child in began]
    faults = [text for end in ended if end.code for text in _refusal(end, str(out))]
    if all(end.code for end in ended):
        faults.append("no run has ended without an error")
    return faults + differences(place.whole()[0], out)


def _at_intervals(place: Place, draw: random.Random, values: tuple[Any, ...]) -> Iterator[Any]:
    """Give the values in a random order, some at once and some after a part of a run's time."""
    for number, value in enumerate(draw.sample(values, len(values))):
        if number:
            time.sleep(draw.choice([0.0, draw.random() * 0.1, draw.random() * place.seconds]))
        yield value


def _refusal(ended: Ended, name: str) -> list[str]:
    """Return what is wrong with a process that must end with one sentence which holds ``name``."""
    if ended.code == 2 and ended.sentence and name in ended.err:
        return []
    return [f"the code is {ended.code}, and the error output is {ended.err[-400:]!r}"]
