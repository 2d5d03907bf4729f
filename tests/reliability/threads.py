"""Call the native code from several threads, after forks, under limits, during signals and at the end of the interpreter."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time

from tests.reliability.counts import ROOT, Counts
from tests.support.native_program import build_thread_program

# Three daemon threads are inside calls of the native module when the interpreter ends. PyTorch is not imported: its own
# functions end the process with an error if a daemon thread is inside one of them (before Python 3.14).
EXIT = """
import sys, threading, time
import numpy as np
from lares_fast import _native
module = _native.load()
query, items = np.ones((64, 16), np.float32), np.ones((20_000, 16), np.float32)
def work():
    scores, ids = np.zeros((64, 9), np.float32), np.zeros((64, 9), np.int64)
    arrays = {"query": query, "items": items, "scores": scores, "ids": ids}
    addresses = {name: array.ctypes.data for name, array in arrays.items()}
    sizes = {"B": 64, "N": 20_000, "D": 16, "k": 9, "threads": 2}
    while True:
        module.topk(**addresses, **sizes, bias=0, exclude_offsets=0, exclude_ids=0)
for _ in range(3):
    threading.Thread(target=work, daemon=True).start()
time.sleep(float(sys.argv[1]))
"""


def measure(counts: Counts) -> None:
    """Count the cases of thread_cases.py, ends of the interpreter, and calls under the thread sanitizer."""
    cases(counts)
    ends(counts, 3 if counts.quick else 60)
    served(counts, 1 if counts.quick else 10)
    if not counts.quick:
        sanitized(counts)


def environment() -> dict[str, str]:
    """Return an environment in which PyTorch starts with one thread."""
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def cases(counts: Counts) -> None:
    """Run thread_cases.py in a new interpreter, and count what it prints."""
    command = [sys.executable, "-m", "tests.reliability.thread_cases", *(["--quick"] if counts.quick else [])]
    what = ""
    with subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            case = json.loads(line)
            what = case["what"]
            counts.tried(what, case["number"])
            if case["failed"]:
                counts.failed(what, case["failed"], lost=case["lost"])
    if process.returncode != 0:
        counts.failed(what or "start", f"the process of the cases ended with exit code {process.returncode}")


def ends(counts: Counts, number: int) -> None:
    """End ``number`` interpreters while daemon threads are inside calls."""
    what = "ends of the interpreter beside daemon threads"
    for i in range(number):
        command = [sys.executable, "-P", "-c", EXIT, str(0.02 + 0.01 * (i % 10))]
        done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300, check=False)
        counts.tried(what, goal=number)
        if done.returncode != 0 or done.stderr:
            counts.failed(what, f"exit code {done.returncode}: {done.stderr[-300:]}")


# The threads of the main process and of a forked worker, as docs/tutorial.md advises. 0 threads of the main process: it has no
# model. The first pair is what the page warns of.
WARNING, *ADVICE = [("2", "0"), ("1", "0"), ("1", "2"), ("0", "2")]


def served(counts: Counts, number: int) -> None:
    """Serve in forked workers ``number`` times for each advice of docs/tutorial.md."""
    what = "forked workers that follow the advice of docs/tutorial.md"
    for _ in range(number):
        for pair in ADVICE if not counts.quick else ADVICE[1:2]:
            found = _serve(*pair)
            counts.tried(what)
            if found != "works":
                counts.failed(what, f"{pair[0]} threads, then {pair[1]}: {found}")
    if not counts.quick:
        hung = sum("hangs" in _serve(*WARNING) for _ in range(3))
        counts.note(what, f"without the advice {hung} of 3 workers waited forever for threads of PyTorch")


def _serve(*pair: str) -> str:
    command = [sys.executable, "-m", "tests.reliability.serve_after_fork", *pair]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    return done.stdout.strip() or done.stderr[-300:]


def sanitized(counts: Counts) -> None:
    """Make calls from 8 C++ threads under the thread sanitizer for about ten minutes, and plant a race."""
    program = build_thread_program()
    what = "calls from 8 C++ threads under the thread sanitizer"
    end = time.monotonic() + 600
    seed = 0
    while time.monotonic() < end:
        for level in ("generic", "avx2"):
            seed += 8
            command = [*program, level, "10", "10", "8", str(seed)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            made = re.search(r"(\d+) valid, (\d+) invalid", done.stdout)
            counts.tried(what, sum(map(int, made.groups())) if made else 1)
            if done.returncode != 0 or not made:
                counts.failed(what, (done.stdout + done.stderr)[-600:], lost="should be" in done.stderr)
    done = subprocess.run([*program, "generic", "0", "0", "1", "1", "race"], capture_output=True, text=True, check=False)
    what = "planted faults are noticed"
    counts.tried(what)
    if "data race" not in done.stderr:
        counts.failed(what, done.stderr[-300:])
