"""SIGTERM, SIGHUP and SIGINT at any moment of a run. The run saves its state, says how to resume, and loses no step."""

from __future__ import annotations

import random
import signal
import time
from functools import partial
from pathlib import Path

from tests.reliability.counts import Counts
from tests.reliability.kill_calls import Plan
from tests.reliability.kill_child import Ended
from tests.reliability.kill_runs import Place, count, torn

ONE = "SIGTERM, SIGHUP or SIGINT at a chosen moment"
TWO = "two signals at once at a chosen moment"
OUTSIDE = "one or two signals from outside at a random moment"

_ALONE = [(signal.SIGTERM,), (signal.SIGINT,), (signal.SIGHUP,)]
_PAIRS = [first + second for first in _ALONE for second in _ALONE]
_TRIES = {ONE: (1, 30), TWO: (1, 36), OUTSIDE: (1, 24)}


def measure(counts: Counts, place: Place) -> None:
    """Interrupt, continue and compare."""
    _, whole = place.whole()
    draw = random.Random(4)
    for what, choices in ((ONE, _ALONE), (TWO, _PAIRS)):
        tries = []
        for number in range(_TRIES[what][not counts.quick]):
            plan = Plan(draw.randrange(len(whole.calls)), action="signal", signals=choices[number % len(choices)])
            tries.append((f"{_names(plan.signals)} at call {plan.at}", partial(_interrupted_at, place, plan)))
        count(counts, what, tries)
    tries = []
    for number in range(_TRIES[OUTSIDE][not counts.quick]):
        signals = [*_ALONE, *_PAIRS][number % 12]
        # In the long form, every fourth process is a new interpreter.
        own = not counts.quick and number % 4 == 0
        interrupt = partial(_interrupted_from_outside, place, random.Random(number), signals, own=own)
        tries.append((f"{_names(signals)}, try {number}", interrupt))
    count(counts, OUTSIDE, tries)


def _names(signals: tuple[int, ...]) -> str:
    return " and ".join(signal.Signals(number).name for number in signals)


def _interrupted_at(place: Place, plan: Plan) -> list[str]:
    out = place.new()
    ended = place.start(place.first(out), out, plan).wait()
    faults = _ending(ended, out, plan.signals)
    if faults or not out.exists():
        return faults
    # A run that was aborted makes the steps after its last checkpoint again.
    return place.finish(out, steps=ended.steps if "stopped and saved" in ended.err else None)


def _interrupted_from_outside(place: Place, draw: random.Random, signals: tuple[int, ...], *, own: bool) -> list[str]:
    out, child = place.running(draw, own=own)
    for number in signals:
        child.signal(number)
        time.sleep(draw.choice([0.0, 0.001, 0.02]))
    ended = child.wait()
    return _ending(ended, out, signals) or torn(out) or place.finish(out)


def _ending(ended: Ended, out: Path, signals: tuple[int, ...]) -> list[str]:
    """Return what is wrong with the way in which an interrupted process ended."""
    last = ended.err.strip().splitlines()[-1:] or [""]
    if "Traceback" in ended.err:
        return [f"a traceback: {ended.err[-400:]}"]
    if ended.code == 0:
        # The signal came after the last moment at which the run looks for it.
        return [] if "saved    " in ended.out else ["it ended as if it were finished"]
    if ended.code in (-signal.SIGTERM, -signal.SIGHUP) and not (out / ".lock").exists():
        # The signal came when the run had released its folder and the process was already ending.
        return []
    if ended.code != 130:
        return [f"the exit code is {ended.code}: {ended.err[-300:]}"]
    sentences = [f"stopped and saved; resume with: lares-fast train --resume {out}"]
    promised = "saving after this step" in ended.err
    # Two signals that come at once may arrive in the other order.
    if not promised or (len(signals) > 1 and signal.SIGINT in signals):
        sentences += [f"aborted; resume from the last saved state with: lares-fast train --resume {out}"]
        sentences += ["aborted before a state was saved; begin the run again."]
    if not any(last[0] == f"lares-fast: {sentence}" for sentence in sentences):
        return [f"the last line does not say how to resume: {last[0]}"]
    return []
