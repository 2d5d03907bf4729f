"""SIGKILL at chosen and at random moments of a run. The run continues and must end as if nothing had happened."""

from __future__ import annotations

import random
import signal
from functools import partial
from pathlib import Path

from tests.reliability.counts import Counts
from tests.reliability.kill_calls import CHANGE, Call, Plan
from tests.reliability.kill_child import Ended
from tests.reliability.kill_runs import Place, changed, count, torn

WHOLE = "no kill: every byte is written by a numbered call, and synced before its file gets its name"
INSIDE = "SIGKILL inside a write"
BEFORE = "SIGKILL between a written file and its rename"
BETWEEN = "SIGKILL after a rename, a link or a removal, between two files of one save"
EVENT = "SIGKILL in evaluation, in the row filter, at the change of phase or between steps"
OUTSIDE = "SIGKILL from outside at a random moment"
SEVERAL = "two to five SIGKILLs in one run"
POWER = "SIGKILL, and bytes that were not synced are lost, as in a power cut"

# Kind of moment -> (number of tries in the short form, number in the long form).
_TRIES = {
    INSIDE: (3, 40),
    BEFORE: (2, 30),
    BETWEEN: (2, 30),
    EVENT: (2, 37),
    POWER: (1, 20),
    SEVERAL: (1, 15),
    OUTSIDE: (1, 28),
}


def measure(counts: Counts, place: Place) -> None:
    """Kill, continue and compare."""
    _, whole = place.whole()
    draw = random.Random(3)
    count(counts, WHOLE, [("the run", lambda: _disorder(whole))])
    for what in (INSIDE, BEFORE, BETWEEN, EVENT, POWER):
        plans = moments(what, whole.calls)
        chosen = sample(draw, plans, min(_TRIES[what][not counts.quick], len(plans)))
        count(counts, what, [(_about(plan, whole.calls), partial(killed_at, place, plan)) for plan in chosen])
    tries = []
    for number in range(_TRIES[SEVERAL][not counts.quick]):
        plans = [Plan(draw.randrange(len(whole.calls)), draw.choice(["before", "middle"])) for _ in range(2 + number % 4)]
        tries.append((f"calls {', '.join(str(plan.at) for plan in plans)}", partial(killed_at, place, *plans)))
    count(counts, SEVERAL, tries)
    # In the long form, every fourth process is a new interpreter.
    outside = [
        (f"try {number}", partial(_killed_from_outside, place, random.Random(number), own=not counts.quick and number % 4 == 0))
        for number in range(_TRIES[OUTSIDE][not counts.quick])
    ]
    count(counts, OUTSIDE, outside)


def _disorder(whole: Ended) -> list[str]:
    """Return what was written by other calls than the numbered ones, and which files were renamed before they were synced."""
    faults = [f"{whole.unseen} bytes were written by calls without a number"] if whole.unseen else []
    for n, call in enumerate(whole.calls):
        # The file that gets the name state.previous.pt was synced before, and the folder is synced after the next rename.
        if call.kind == "rename" and not call.name.endswith("state.previous.pt"):
            around = [whole.calls[n - 1], whole.calls[n + 1].kind]
            if around != [Call("sync", call.name, True), "sync folder"]:
                faults.append(f"call {n} renames to {call.name} without a sync before and after it")
    return faults


def _about(plan: Plan, calls: list[Call]) -> str:
    return f"{plan.when} call {plan.at}, {calls[plan.at].kind} {calls[plan.at].name}"


def moments(what: str, calls: list[Call]) -> list[Plan]:
    """Return the plans of one kind of moment of a run that makes these calls."""
    numbers = {
        INSIDE: [(n, "middle") for n, call in enumerate(calls) if call.kind == "write"],
        BEFORE: [(n, "before") for n, call in enumerate(calls) if call.kind in ("sync", "rename")],
        BETWEEN: [(n, "after") for n, call in enumerate(calls) if call.kind in ("rename", "sync folder", "link", "remove")],
        EVENT: [(n, "before") for n, call in enumerate(calls) if call.kind == "event"],
        POWER: [(n, when) for n, call in enumerate(calls) if call.kind in CHANGE for when in ("before", "after")],
    }[what]
    return [Plan(at=at, when=when, action="power" if what == POWER else "kill") for at, when in numbers]


def sample(draw: random.Random, plans: list[Plan], number: int) -> list[Plan]:
    """Return ``number`` of the plans, such that every part of the run has its share."""
    size = len(plans) / max(number, 1)
    return [plans[int((n + draw.random()) * size)] for n in range(number)]


def killed_at(place: Place, *plans: Plan, resumed_with: str = "") -> list[str]:
    """Run, and kill the run at the moment of each plan in turn; then continue it to its end. Return what is wrong."""
    out = place.new()
    faults: list[str] = []
    before: dict[str, str] = {}
    for number, plan in enumerate(plans):
        ended = place.start(place.first(out) if not number else place.again(out), out, plan).wait()
        if number and ended.code == 0:
            break
        if ended.code != -signal.SIGKILL:
            return [*faults, f"the process ended with {ended.code}: {ended.err[-300:]}"]
        faults += after_a_kill(ended, out, before)
        before = {**before, **ended.published}
    return faults + place.finish(out, faulty=resumed_with)


def after_a_kill(ended: Ended, out: Path, before: dict[str, str]) -> list[str]:
    """Return what is wrong in the folder ``out`` of a killed run."""
    return changed(ended, before, out)


def _killed_from_outside(place: Place, draw: random.Random, *, own: bool) -> list[str]:
    """Kill a run at a random moment. Return what is wrong."""
    out, child = place.running(draw, own=own)
    child.signal(signal.SIGKILL)
    child.wait()
    return torn(out) + place.finish(out)
