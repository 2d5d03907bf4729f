"""Plant faults, each of which one kind of try must find."""

from __future__ import annotations

import errno
from functools import partial

from tests.reliability.counts import Counts
from tests.reliability.kill_calls import NEED_ROOM, Call, Plan
from tests.reliability.kill_disk import refused
from tests.reliability.kill_folder import two_new_runs_at_once
from tests.reliability.kill_moments import killed_at
from tests.reliability.kill_recommend import killed_output
from tests.reliability.kill_runs import Place, count

PLANTED = "planted faults, which must be found"

_QUICK = ("write in place", "forget a step")


def measure(counts: Counts, place: Place) -> None:
    """Plant each fault."""
    _, whole = place.whole()
    found = {
        # This run makes fewer calls than a whole run, so its writes have other numbers.
        "write in place": lambda fault: any(
            killed_at(place, Plan(at, "middle", fault=fault)) for at in range(_of(whole.calls, "write", "state.pt", 9), 0, -1)
        ),
        "write the output in place": lambda _: killed_output(place, "write in place"),
        "no sync": lambda fault: killed_at(place, Plan(len(whole.calls) // 2, action="power", fault=fault)),
        "forget a step": lambda fault: killed_at(place, _third_step(whole.calls), resumed_with=fault),
        "forget the moments": lambda fault: killed_at(place, _third_step(whole.calls), resumed_with=fault),
        "keep leftovers": lambda fault: killed_at(
            place, Plan(_of(whole.calls, "write", "state.pt", 9), "middle"), resumed_with=fault
        ),
        # The system decides which run is first, so the two may not meet.
        "no lock": lambda fault: any(two_new_runs_at_once(place, fault) for _ in range(20)),
        "hide errors": lambda fault: _refused(place, whole.calls, fault),
    }

    def plant(fault: str) -> list[str]:
        return [] if found[fault](fault) else ["it was not found"]

    count(counts, PLANTED, [(fault, partial(plant, fault)) for fault in (_QUICK if counts.quick else found)])


def _of(calls: list[Call], kind: str, name: str, number: int) -> int:
    return [n for n, call in enumerate(calls) if (call.kind, call.name) == (kind, name)][number]


def _third_step(calls: list[Call]) -> Plan:
    return Plan(_of(calls, "event", "step spt", 2))


def _refused(place: Place, calls: list[Call], fault: str) -> list[str]:
    at = _of(calls, "write", "state.pt", 9)
    return refused(place, Plan(at, action="fail", code=errno.ENOSPC, kinds=NEED_ROOM, fault=fault), calls[at])
