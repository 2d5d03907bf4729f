"""Compare the speed of the C++ recurrence of two checkouts.

``python -m benchmarks.compare_checkouts BEFORE AFTER [--rounds 24] [--core 1]``

Build the native module of each checkout in place first. Two processes on one core take turns (before, after, after, before), so
that other programs slow both equally. The ratio of a round compares the CPU times. A ratio above 1 means that AFTER is faster.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

SHAPES = [(kind, p) for kind in ("mean 7", "all 50") for p in (0.0, 0.5)]
RUNS = [(kind, p, what) for kind, p in SHAPES for what in ("forward", "both")]


def work(tree: Path) -> None:
    """Read numbers of RUNS from standard input, do each run, and print its CPU seconds."""
    sys.path.insert(0, str(tree))
    import torch

    from benchmarks import bench_recurrence

    # The package `benchmarks` has moved the checkout to the end of the path, after an installed package.
    sys.path.insert(0, str(tree))

    torch.set_num_threads(1)
    calls = {}
    for kind, p in SHAPES:
        n = bench_recurrence.lengths(kind)
        calls[kind, p] = bench_recurrence.Call(n[: len(n) // 4], p)

    def run(kind: str, p: float, what: str) -> float:
        call, began = calls[kind, p], time.process_time()
        if what == "forward":
            bench_recurrence.without_grad(call.forward)
        else:
            call.gradients(call.forward())
        return time.process_time() - began

    for each in RUNS:
        run(*each)
    sizes = [float(gradient.norm()) for call in calls.values() for gradient in call.gradients(call.forward())]
    print("ready", *sizes, flush=True)
    for line in sys.stdin:
        print(run(*RUNS[int(line)]), flush=True)


def compare(before: Path, after: Path, rounds: int, core: int) -> None:
    """Print the ratio of every run."""
    os.sched_setaffinity(0, {core})
    workers = [
        subprocess.Popen(
            [sys.executable, "-P", __file__, "--work", str(tree)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for tree in (before, after)
    ]

    def seconds(worker: subprocess.Popen, number: int) -> float:
        worker.stdin.write(f"{number}\n")
        worker.stdin.flush()
        return float(worker.stdout.readline())

    results = [worker.stdout.readline().split() for worker in workers]
    if any(result[:1] != ["ready"] for result in results):
        sys.exit("a checkout does not run: build its native module in place first.")
    for a, b in zip(*(map(float, result[1:]) for result in results), strict=True):
        if abs(a - b) > 1e-4 * abs(a):
            sys.exit(f"the checkouts disagree: a gradient has norm {a} in one and {b} in the other.")
    first, second = workers
    for number, each in enumerate(RUNS):
        ratios = []
        for _ in range(rounds):
            a, b, more_b, more_a = (seconds(worker, number) for worker in (first, second, second, first))
            ratios.append((a + more_a) / (b + more_b))
        low, middle, high = statistics.quantiles(ratios, n=4)
        print(*each, f"x{middle:.3f} (quartiles {low:.3f} {high:.3f})", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trees", nargs="*", type=Path, metavar="CHECKOUT", help="the checkout before, and the checkout after")
    parser.add_argument("--rounds", type=int, default=24, help="rounds of each comparison (default: 24)")
    parser.add_argument("--core", type=int, default=1, help="number of the core that both processes use (default: 1)")
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work is not None:
        work(arguments.work)
    elif len(arguments.trees) != 2:
        parser.error("give two checkouts: before and after")
    else:
        compare(*arguments.trees, arguments.rounds, arguments.core)


if __name__ == "__main__":
    main()
