"""Kill, interrupt and hinder ``lares-fast recommend --output``. The output is the old file or the whole new one."""

from __future__ import annotations

import errno
import random
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from tests.reliability.counts import Counts
from tests.reliability.kill_calls import NEED_ROOM, Plan
from tests.reliability.kill_moments import sample
from tests.reliability.kill_runs import Place, count, differences

KILLED = "recommend --output: SIGKILL at any call"
HINDERED = "recommend --output: a full, broken or read-only disk, SIGTERM or SIGINT"
TWICE = "two processes of recommend with one output"
READING = "recommend reads a run while train writes it"

_OLD = b"an older output"
_USERS = 400
_TRIES = {KILLED: (2, 10_000), HINDERED: (2, 40), TWICE: (1, 16), READING: (0, 10)}


def measure(counts: Counts, place: Place) -> None:
    """Disturb, and compare the output."""
    draw = random.Random(7)
    goals = {what: numbers[not counts.quick] for what, numbers in _TRIES.items()}
    people = people_of(place)
    killed, hindered = [], []
    for ending in ("csv", "parquet"):
        expected, calls = _whole(place, people, ending)
        places = [n for n, call in enumerate(calls) if call.kind != "event"]
        one = partial(_one, place, people, ending, expected)
        for plan in sample(draw, [Plan(at) for at in places], min(goals[KILLED] // 2, len(places))):
            plan = replace(plan, when=draw.choice(["before", "middle", "after"]))
            killed.append((f"{ending}, {plan.when} call {plan.at}, {calls[plan.at].kind}", partial(one, plan)))
        for n in range(goals[HINDERED] // 2):
            at = draw.choice(places)
            if n % 2 == (ending == "csv"):
                plan = Plan(at, action="signal", signals=(draw.choice([signal.SIGINT, signal.SIGTERM]),))
            else:
                code = draw.choice([errno.ENOSPC, errno.EIO, errno.EROFS])
                plan = Plan(at, draw.choice(["before", "middle"]), "fail", code=code, kinds=NEED_ROOM)
            about = f"{ending}, {plan.action} {plan.code or plan.signals} at call {at}, {calls[at].kind}"
            hindered.append((about, partial(one, plan)))
    count(counts, KILLED, killed)
    count(counts, HINDERED, hindered)
    twice = [(n, ("csv", "parquet")[n % 2]) for n in range(goals[TWICE])]
    count(counts, TWICE, [(end, partial(two_at_once, place, people, end, random.Random(n))) for n, end in twice])
    if goals[READING]:
        allowed = set(_answers(place, people))
        reading = partial(_while_training, place, people, allowed)
        count(counts, READING, [(f"try {n}", partial(reading, random.Random(n))) for n in range(goals[READING])])


def people_of(place: Place) -> Path:
    """Write a log of many users, and return it."""
    people, draw = place.folder / "people.csv", random.Random(8)
    rows = [f"{user},{item},{n}" for user in range(_USERS) for n, item in enumerate(draw.sample(range(40), 3))]
    people.write_text("\n".join(["user_id,item_id,timestamp", *rows, ""]))
    return people


def killed_output(place: Place, fault: str) -> list[str]:
    """Kill a process inside a write, while ``fault`` is planted. Return what is wrong."""
    people = people_of(place)
    expected, calls = _whole(place, people, "csv")
    at = [n for n, call in enumerate(calls) if call.kind == "write"][1]
    return _one(place, people, "csv", expected, Plan(at, "middle", fault=fault))


def arguments(run: Path, people: Path, output: Path, k: int = 10) -> list[Any]:
    """Return the arguments of recommend."""
    return ["recommend", "--run", run, "--input", people, "--output", output, "--k", k]


def _whole(place: Place, people: Path, ending: str, k: int = 10) -> tuple[bytes, list[Any]]:
    """Return the output of an uninterrupted process, and its calls."""
    out = place.new().with_suffix(f".{ending}")
    ended = place.start(arguments(place.whole()[0], people, out, k), out).wait()
    assert ended.code == 0, ended.err
    assert not ended.unseen, f"{ended.unseen} bytes were written by calls without a number"
    return out.read_bytes(), ended.calls


def _one(place: Place, people: Path, ending: str, expected: bytes, plan: Plan) -> list[str]:
    """Disturb one process that replaces an older output. Return what is wrong."""
    out = place.new().with_suffix(f".{ending}")
    out.write_bytes(_OLD)
    ended = place.start(arguments(place.whole()[0], people, out), out, plan).wait()
    content = out.read_bytes() if out.exists() else b""
    faults = [] if content in (_OLD, expected) else [f"{len(content)} bytes were published"]
    left = [path.name for path in out.parent.iterdir() if path.name.startswith(".")]
    if plan.action == "kill":
        return [*faults, *([] if ended.code == -signal.SIGKILL else [f"the code is {ended.code}"])]
    if left:
        faults.append(f"{left[0]} is left")
    if plan.action == "signal":
        good = ended.code == 130 and ended.err == "lares-fast: aborted; everything that was saved before is intact.\n"
    else:
        good = ended.code == 2 and ended.sentence and str(out) in ended.err
    finished = ended.code == 0 and content == expected
    return faults if good or finished else [*faults, f"the code is {ended.code}, and the error output is {ended.err[-300:]!r}"]


def two_at_once(place: Place, people: Path, ending: str, draw: random.Random, fault: str = "") -> list[str]:
    """Let two processes write different outputs to one file. Return what is wrong, for example a mixture of both."""
    out = place.new().with_suffix(f".{ending}")
    run, whole = place.whole()[0], [_whole(place, people, ending, k)[0] for k in (5, 10)]
    children = []
    for k in (5, 10):
        children.append(place.start(arguments(run, people, out, k), out, Plan(fault=fault)))
        time.sleep(draw.choice([0.0, draw.random() * 0.2]))
    faults = [f"the code is {ended.code}: {ended.err[-300:]}" for ended in (child.wait() for child in children) if ended.code]
    faults += [f"{path.name} is left" for path in out.parent.iterdir() if path != out]
    return faults if out.read_bytes() in whole else [*faults, "the output is a mixture"]


def _while_training(place: Place, people: Path, allowed: set[bytes], draw: random.Random) -> list[str]:
    """Recommend again and again from a run that is being trained. Return what is wrong."""
    out = place.new()
    training = place.start(place.first(out), out)
    faults: list[str] = []
    while training.running and not faults:
        output = place.new().with_suffix(".csv")
        ended = place.start(arguments(out, people, output), output).wait()
        if ended.code == 0:
            faults += [] if output.read_bytes() in allowed else ["the output is of no model that the run has exported"]
        elif ended.code != 2 or not ended.sentence or str(out) not in ended.err:
            faults.append(f"the code is {ended.code}, and the error output is {ended.err[-300:]!r}")
        time.sleep(draw.random() * 0.05)
    ended = training.wait()
    return faults + ([f"training has failed: {ended.err[-300:]}"] if ended.code else differences(place.whole()[0], out))


def _answers(place: Place, people: Path) -> Iterator[bytes]:
    """Give the output from each model that an uninterrupted run exports, in any order."""
    calls = place.whole()[1].calls
    for at in [n for n, call in enumerate(calls) if (call.kind, call.name) == ("rename", "model.safetensors")]:
        out = place.new()
        place.start(place.first(out), out, Plan(at, "after")).wait()
        output = place.new().with_suffix(".csv")
        ended = place.start(arguments(out, people, output), output).wait()
        assert ended.code == 0, ended.err
        yield output.read_bytes()
