"""Serve in a forked child, as ``gunicorn --preload`` does: ``python -m tests.reliability.serve_after_fork PARENT CHILD``.

The parent builds and uses a ``Recommender`` on PARENT threads, and the child uses it on CHILD threads; 0 leaves the number of
the parent. PARENT is 0 if only the child builds one. Prints ``works`` or ``hangs``.
"""

from __future__ import annotations

import os
import signal
import sys
import time

import torch

from lares_fast import LARES, LARESConfig
from lares_fast.serve import Recommender

ITEMS = 3000
HISTORIES = [list(range(1, 40)), [5, 6, 7]] * 40
# Seconds after which a child counts as hung.
LIMIT = 60.0


def recommender() -> Recommender:
    """Return a recommender with random weights."""
    torch.manual_seed(0)
    model = LARES(LARESConfig(n_items=ITEMS + 1, hidden_size=64, max_len=50))
    return Recommender(model, ["PAD", *range(1, ITEMS + 1)])


def main(parent: int, child: int) -> None:
    """Fork, and wait for the child."""
    shared = None
    if parent:
        torch.set_num_threads(parent)
        shared = recommender()
        shared.recommend(HISTORIES)
    began = time.monotonic()
    pid = os.fork()
    if pid == 0:
        if child:
            torch.set_num_threads(child)
        (shared or recommender()).recommend(HISTORIES)
        os._exit(0)
    while time.monotonic() < began + LIMIT:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            print("works" if status == 0 else f"status {status}")
            return
        time.sleep(0.01)
    # A child that waits for threads takes no time of the processor, and one on a busy machine does.
    with open(f"/proc/{pid}/stat") as file:
        ticks = sum(map(int, file.read().rpartition(")")[2].split()[11:13]))
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    print(f"hangs after {ticks / os.sysconf('SC_CLK_TCK'):.1f} s of work")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:3]))
