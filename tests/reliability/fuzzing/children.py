"""Run random examples in a child process, so that a crash or a hang of the child is counted and its example is kept."""

from __future__ import annotations

import importlib
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.reliability.counts import ROOT, Counts

# The most seconds of processor time that an example may take, and of time by the clock, in which it may also wait. The
# second number is large, because a machine may be busy, or pause its processes.
LONGEST, LONGEST_WAIT = 60, 1800
# The address space of a child in bytes.
MEMORY = 8 << 30


Plan = list[tuple[str, int]]


class Watcher:
    """Checks one example after the other in a child. The file ``state`` always holds the present example.

    ``what`` is the kind of the examples that come next.
    """

    def __init__(self, state: str, check: Callable[[Any], str | None]) -> None:
        self._file = os.open(state, os.O_CREAT | os.O_RDWR, 0o600)
        self._check = check
        self.what = ""
        self.tried, self.faults = Counter[str](), list[tuple[str, str, str]]()

    def __call__(self, example: Any) -> None:
        """Check ``example``."""
        text = str(example)
        self.tried[self.what] += 1
        os.pwrite(self._file, json.dumps([self.what, self.tried, text[:4000]]).encode().ljust(30_000), 0)
        # These signals end the process, also while native code runs.
        signal.setitimer(signal.ITIMER_PROF, LONGEST)
        signal.setitimer(signal.ITIMER_REAL, LONGEST_WAIT)
        found = self._check(example)
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.setitimer(signal.ITIMER_PROF, 0)
        if found is not None:
            self.faults.append((self.what, text[:1500], found))


@dataclass
class Found:
    """What a child found: how many examples of each kind it tried, and (kind, example, fault) of each failure.

    ``peak`` is its largest memory in MiB. ``notes`` are those of the module's function ``notes``, if it has one.
    """

    tried: dict[str, int]
    faults: list[tuple[str, str, str]]
    peak: int = 0
    notes: dict[str, int] = field(default_factory=dict)


def run_child(module: str, seed: int, plan: Plan) -> Found:
    """Try examples in a child process: so many of each kind as ``plan`` says.

    ``module`` has a function ``examples(what, seed, number, watch)``, which calls ``watch`` with each example, and a function
    ``fault(example)``.
    """
    with tempfile.TemporaryDirectory() as folder:
        state = Path(folder) / "state"
        command = [sys.executable, "-m", "tests.reliability.fuzzing.children", module, str(seed), json.dumps(plan), str(state)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": folder}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            return Found(**json.loads(done.stdout.splitlines()[-1]))
        return ended(done.returncode, done.stderr, state)


def count(counts: Counts, module: str, long: dict[str, int], batch: int, quick: Plan) -> dict[str, list[Found]]:
    """Try the examples of ``long``, at most ``batch`` in a child, or those of ``quick`` in one child, and count them.

    Return the results of the children by kind.
    """
    batches = [(0, quick)] if counts.quick else []
    for what, number in {} if counts.quick else long.items():
        batches += [(seed, [(what, min(batch, number - seed))]) for seed in range(0, number, batch)]
    results: dict[str, list[Found]] = {}
    for seed, plan in batches:
        found = run_child(module, seed, plan)
        for what, tried in found.tried.items():
            counts.tried(what, tried, goal=0 if counts.quick else long[what])
            results.setdefault(what, []).append(found)
        for what, example, text in found.faults:
            wrong = not any(word in text for word in ("raised", "message", "refused a valid", "ended", "took"))
            counts.failed(what, f"{example}: {text}", lost=wrong)
    return results


def ended(code: int, errors: str, state: Path) -> Found:
    """Return what is known of a child that ended too early with ``code``, after it wrote ``errors``."""
    if not state.exists():
        return Found({"start": 1}, [("start", "a child", f"ended with {code}: {errors[-1500:]}")])
    what, tried, example = json.loads(state.read_text())
    reason = f"signal {-code}" if code < 0 else f"code {code}"
    text = f"ended the process with {reason}: {errors[-1500:]}"
    if code == -signal.SIGPROF:
        text = f"took longer than {LONGEST} s of processor time"
    if code == -signal.SIGALRM:
        text = f"took longer than {LONGEST_WAIT} s"
    return Found(tried, [(what, example, text)])


def main() -> None:
    """Run the examples that the command line names, and print what was found as JSON."""
    name, seed, plan, state = sys.argv[1:]
    warnings.simplefilter("ignore")
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    module = importlib.import_module(name)
    watcher = Watcher(state, module.fault)
    os.chdir(Path(state).parent)
    for what, number in json.loads(plan):
        watcher.what = what
        module.examples(what, int(seed), number, watcher)
    report(watcher, module)


def report(watcher: Watcher, module: Any) -> None:
    """Print what the child found as JSON."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    notes = module.notes() if hasattr(module, "notes") else {}
    print(json.dumps({"tried": watcher.tried, "faults": watcher.faults, "peak": peak, "notes": notes}), flush=True)


if __name__ == "__main__":
    main()
