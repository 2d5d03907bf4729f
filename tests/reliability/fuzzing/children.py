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
from pathlib import Path
from typing import Any

from tests.reliability.counts import ROOT

# No example may take longer, in seconds. The machine may be busy.
LONGEST = 60
# The address space of a child in bytes.
MEMORY = 12 << 30


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


def run_child(module: str, what: str, seed: int, number: int) -> tuple[int, list[tuple[str, str]]]:
    """Try ``number`` examples of ``what`` in a child. Return the number of tried examples, and (example, fault) of each failure.

    ``module`` has a function ``examples(what, seed, number, watch)``, which calls ``watch`` with each example, and a function
    ``fault(example)``.
    """
    with tempfile.TemporaryDirectory() as folder:
        state = Path(folder) / "state"
        command = [sys.executable, "-m", "tests.reliability.fuzzing.children", module, what, str(seed), str(number), str(state)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": folder}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            tried, faults = json.loads(done.stdout.splitlines()[-1])
            return tried, [(example, found) for example, found in faults]
        if not state.exists():
            return 1, [("the start of the child", f"ended with {done.returncode}: {done.stderr[-1500:]}")]
        tried, example = json.loads(state.read_text())
        if done.returncode == -signal.SIGALRM:
            return tried + 1, [(example, f"took longer than {LONGEST} s")]
        reason = f"signal {-done.returncode}" if done.returncode < 0 else f"code {done.returncode}"
        return tried + 1, [(example, f"ended the process with {reason}: {done.stderr[-1500:]}")]


def main() -> None:
    """Run the examples that the command line names, and print the number of examples and the faults as JSON."""
    name, what, seed, number, state = sys.argv[1:]
    warnings.simplefilter("ignore")
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    module = importlib.import_module(name)
    watcher = Watcher(state, module.fault)
    module.examples(what, int(seed), int(number), watcher)
    print(json.dumps([watcher.tried, watcher.faults]))


if __name__ == "__main__":
    main()
