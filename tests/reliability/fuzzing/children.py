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
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.reliability.counts import ROOT

# No example may take longer, in seconds. The machine may be busy.
LONGEST = 60
# The address space of a child in bytes.
MEMORY = 8 << 30


class Watcher:
    """Checks one example after the other in a child. The file ``state`` always holds the present example."""

    def __init__(self, state: str, check: Callable[[Any], str | None]) -> None:
        self._file = os.open(state, os.O_CREAT | os.O_RDWR, 0o600)
        self._check = check
        self.tried, self.faults = 0, list[tuple[str, str]]()

    def __call__(self, example: Any) -> None:
        """Check ``example``."""
        text = str(example)
        os.pwrite(self._file, json.dumps([self.tried, text[:4000]]).encode().ljust(9000), 0)
        # The alarm ends the process, also while native code runs.
        signal.setitimer(signal.ITIMER_REAL, LONGEST)
        found = self._check(example)
        signal.setitimer(signal.ITIMER_REAL, 0)
        self.tried += 1
        if found is not None:
            self.faults.append((text[:1500], found))


@dataclass
class Found:
    """What a child found: how many examples it tried, and (example, fault) of each failure.

    ``peak`` is its largest memory in MiB. ``notes`` are those of the module's function ``notes``, if it has one.
    """

    tried: int
    faults: list[tuple[str, str]]
    peak: int = 0
    notes: dict[str, int] = field(default_factory=dict)


def run_child(module: str, what: str, seed: int, number: int) -> Found:
    """Try ``number`` examples of ``what`` in a child process.

    ``module`` has a function ``examples(what, seed, number, watch)``, which calls ``watch`` with each example, and a function
    ``fault(example)``.
    """
    with tempfile.TemporaryDirectory() as folder:
        state = Path(folder) / "state"
        command = [sys.executable, "-m", "tests.reliability.fuzzing.children", module, what, str(seed), str(number), str(state)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": folder}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            return Found(**json.loads(done.stdout.splitlines()[-1]))
        return ended(done.returncode, done.stderr, state)


def ended(code: int, errors: str, state: Path) -> Found:
    """Return what is known of a child that ended too early with ``code``, after it wrote ``errors``."""
    if not state.exists():
        return Found(1, [("the start of the child", f"ended with {code}: {errors[-1500:]}")])
    tried, example = json.loads(state.read_text())
    reason = f"signal {-code}" if code < 0 else f"code {code}"
    text = f"ended the process with {reason}: {errors[-1500:]}"
    if code == -signal.SIGALRM:
        text = f"took longer than {LONGEST} s"
    return Found(tried + 1, [(example, text)])


def main() -> None:
    """Run the examples that the command line names, and print the number of examples and the faults as JSON."""
    name, what, seed, number, state = sys.argv[1:]
    warnings.simplefilter("ignore")
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    module = importlib.import_module(name)
    watcher = Watcher(state, module.fault)
    os.chdir(Path(state).parent)
    module.examples(what, int(seed), int(number), watcher)
    report(watcher, module)


def report(watcher: Watcher, module: Any) -> None:
    """Print what the child found as JSON."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    notes = module.notes() if hasattr(module, "notes") else {}
    print(json.dumps({"tried": watcher.tried, "faults": watcher.faults, "peak": peak, "notes": notes}), flush=True)


if __name__ == "__main__":
    main()
