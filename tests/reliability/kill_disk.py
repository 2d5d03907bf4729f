"""Refuse every write of a run in turn: a full disk, an error of the disk, a file system that becomes read-only."""

from __future__ import annotations

import errno
import random
import shutil
import subprocess
from functools import partial
from pathlib import Path

from tests.reliability.counts import Counts
from tests.reliability.kill_calls import CHANGE, NEED_ROOM, Call, Plan
from tests.reliability.kill_child import Ended
from tests.reliability.kill_moments import sample
from tests.reliability.kill_runs import Place, changed, count

FULL = "the disk is full from one call on (ENOSPC)"
ONCE = "one call fails because the disk is full (ENOSPC)"
BROKEN = "one call fails because the disk is broken (EIO)"
READ_ONLY = "the file system becomes read-only from one call on (EROFS)"
SMALL = "a real file system that is too small"

# Kind -> (error, whether later calls fail too, kinds of calls, number of tries in the short form, number in the long form).
_KINDS = {
    FULL: (errno.ENOSPC, True, NEED_ROOM, 2, 10_000),
    ONCE: (errno.ENOSPC, False, NEED_ROOM, 0, 40),
    BROKEN: (errno.EIO, False, (*CHANGE, "sync folder", "lock"), 1, 50),
    READ_ONLY: (errno.EROFS, True, CHANGE, 1, 24),
}
_SIZES = (1, 16)


def measure(counts: Counts, place: Place) -> None:
    """Refuse writes, continue and compare."""
    draw = random.Random(5)
    for what, (code, lasting, kinds, few, many) in _KINDS.items():
        # Every call of a run that saves after each epoch, or a share of the calls of a run that saves after each step.
        more = ("--set", "checkpoint_minutes=10") if what == FULL else ()
        _, whole = place.whole(*more)
        plans = [
            Plan(at, draw.choice(["before", "middle"]), "fail", code=code, kinds=kinds if lasting else ())
            for at, call in enumerate(whole.calls)
            if call.kind in kinds
        ]
        tries = []
        for plan in sample(draw, plans, min(few if counts.quick else many, len(plans))):
            call = whole.calls[plan.at]
            tries.append((f"call {plan.at}, {call.kind} {call.name}", partial(refused, place, plan, call, *more)))
        count(counts, what, tries)
    size = sum(path.stat().st_size for path in place.whole()[0].iterdir())
    tries = []
    for number in range(_SIZES[not counts.quick]):
        room = draw.randrange(8_000, 2 * size)
        tries.append((f"{room:,} bytes", partial(_too_small, place, place.folder / f"small-{number}", room)))
    if _mount(place.folder / "small", "size=64m"):
        _unmount(place.folder / "small")
        count(counts, SMALL, tries)
    else:
        counts.note(SMALL, "not tried: this account cannot mount a file system")


def refused(place: Place, plan: Plan, call: Call, *more: str) -> list[str]:
    """Run, and refuse a call. Then continue the run to its end. Return what is wrong."""
    out = place.new()
    ended = place.start(place.first(out, *more), out, plan).wait()
    faults = _ending(ended, call, out) + changed(ended, {}, out)
    if plan.code == errno.ENOSPC and out.exists():
        # A full disk lets files be removed.
        faults += [f"{path.name} is left" for path in out.iterdir() if path.name.startswith(".")]
    return faults + place.finish(out, *more)


def _ending(ended: Ended, call: Call, out: Path) -> list[str]:
    """Return what is wrong with the way in which a process ended whose ``call`` has failed."""
    if call.kind == "remove" and ended.code == 0:
        # Only the lock is removed at last. It stays there, but nobody holds it.
        return []
    if ended.code != 2 or not ended.sentence:
        return [f"the code is {ended.code}, and the error output is {ended.err[-500:]!r}"]
    where = str(out) if call.name == out.name or call.kind == "remove" else str(out / call.name)
    if where not in ended.err:
        return [f"the error does not name {where}: {ended.err.strip()}"]
    return []


def _too_small(place: Place, folder: Path, room: int) -> list[str]:
    """Run on a file system of ``room`` bytes, then enlarge it and continue. Return what is wrong."""
    assert _mount(folder, f"size={room}")
    try:
        out = folder / "run"
        ended = place.start(place.first(out), out).wait()
        if ended.code == 0:
            return []
        good = ended.code == 2 and ended.sentence and str(out) in ended.err
        faults = [] if good else [f"the code is {ended.code}: {ended.err[-500:]}"]
        faults += changed(ended, {}, out)
        assert _mount(folder, "remount,size=64m")
        return faults + place.finish(out)
    finally:
        _unmount(folder)


def _mount(folder: Path, options: str) -> bool:
    """Mount a file system in memory, and return whether that is possible."""
    folder.mkdir(exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder]
    return shutil.which("mount") is not None and not subprocess.run(command, capture_output=True, check=False).returncode


def _unmount(folder: Path) -> None:
    subprocess.run(["umount", folder], check=True)
