"""Compare the speed of the C++ kernels of two checkouts.

``python -m benchmarks.compare_checkouts BEFORE AFTER [--rounds 24] [--core 1] [--only recurrence]``

Build the native module of each checkout in place first. Two processes on one core take turns (before, after, after, before), so
that other programs slow both equally. The ratio of a round compares the CPU times. A ratio above 1 means that AFTER is faster.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

# Tokens, users and items of the calls. The calls of the recurrence have the sizes of bench_recurrence.py.
WIDTH, ROWS, ITEMS, BEST = 64, 256, 12_101, 100
SMALL = 200


def calls() -> dict[str, Callable[[], object]]:
    """Return the calls to time by name. Each returns tensors, or one tensor."""
    import torch

    from benchmarks import bench_linear_cross_entropy, bench_recurrence, bench_topk
    from lares_fast import ops

    def recurrence(kind: str, p: float, part: int = 4) -> dict[str, Callable[[], object]]:
        n = bench_recurrence.lengths(kind)
        call = bench_recurrence.Call(n[: len(n) // part], p)
        return {
            "forward": lambda: bench_recurrence.without_grad(call.forward),
            "both": lambda: call.gradients(call.forward()),
        }

    found = {
        f"recurrence {kind} p{p} {name}": run
        for kind in ("mean 7", "all 50")
        for p in (0.0, 0.5)
        for name, run in recurrence(kind, p).items()
    }
    small = recurrence("mean 7", 0.0, part=1024)["forward"]
    found[f"recurrence, {SMALL} calls with one sequence"] = lambda: [small() for _ in range(SMALL)][-1]
    items = bench_topk.catalog("Gaussian", ITEMS)
    query, targets = bench_topk.queries(ROWS, items), torch.arange(ROWS)
    index = ops.CatalogIndex(items)
    found["topk"] = lambda: ops.topk(query, items, BEST, backend="native")
    found["topk with an index"] = lambda: ops.topk(query, items, BEST, index=index, backend="native")
    found["target_rank"] = lambda: ops.target_rank(query, items, targets, backend="native")
    few = query[:1], items[:512]
    found[f"topk, {SMALL} calls with one query and 512 items"] = lambda: [
        ops.topk(*few, BEST, backend="native") for _ in range(SMALL)
    ][-1]
    hidden, table, target = bench_linear_cross_entropy.case(ROWS, ITEMS)

    def loss() -> torch.Tensor:
        return ops.linear_cross_entropy(hidden, table, target, backend="native")

    found["linear_cross_entropy forward"] = lambda: bench_recurrence.without_grad(loss)
    found["linear_cross_entropy both"] = lambda: torch.autograd.grad(loss().mean(), (hidden, table))
    return found


def norms(result: object) -> list[float]:
    """Return the norm of each tensor of ``result``."""
    import torch

    parts = result if isinstance(result, list | tuple) else [result]
    return [float(part.detach().double().norm()) for part in parts if isinstance(part, torch.Tensor)]


def work(tree: Path) -> None:
    """Print the names of the calls and the norms of their results. Then read numbers of calls, and print the CPU seconds.

    All of them are calls to the package of ``tree``.
    """
    sys.path.insert(0, str(tree))
    import torch

    import benchmarks  # noqa: F401 - the package of `tree`

    # The package `benchmarks` has moved the checkout to the end of the path, after an installed package.
    sys.path.insert(0, str(tree))
    torch.set_num_threads(1)
    runs = calls()
    print(
        "ready", *(f"{name}\t{norm!r}" for name, run in runs.items() for norm in norms(run())), sep="\n", end="\n\n", flush=True
    )
    order = list(runs.values())
    for line in sys.stdin:
        began = time.process_time()
        order[int(line)]()
        print(time.process_time() - began, flush=True)


def compare(trees: list[Path], rounds: int, core: int, only: str) -> None:
    """Print the ratio of every call whose name contains ``only``."""
    os.sched_setaffinity(0, {core})
    workers = [
        subprocess.Popen(
            [sys.executable, "-P", __file__, "--work", str(tree)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for tree in trees
    ]

    def seconds(worker: subprocess.Popen, number: int) -> float:
        worker.stdin.write(f"{number}\n")
        worker.stdin.flush()
        return float(worker.stdout.readline())

    before, after = (results(worker) for worker in workers)
    for (name, a), (_, b) in zip(before, after, strict=True):
        if abs(a - b) > 1e-4 * abs(a):
            sys.exit(f"the checkouts disagree: a result of {name} has norm {a} in one and {b} in the other.")
    print(f"The norms of all results are {'equal' if before == after else 'equal to 1e-4'}.")
    first, second = workers
    for number, name in enumerate(dict(before)):
        if only not in name:
            continue
        ratios = []
        for _ in range(rounds):
            a, b, more_b, more_a = (seconds(worker, number) for worker in (first, second, second, first))
            ratios.append((a + more_a) / (b + more_b))
        low, middle, high = statistics.quantiles(ratios, n=4)
        text = f"quartiles {low:.3f} {high:.3f}, min {min(ratios):.3f}, max {max(ratios):.3f}"
        print(f"{name:55} x{middle:.3f} ({text})", flush=True)


def results(worker: subprocess.Popen) -> list[tuple[str, float]]:
    """Return pairs (name of a call, norm of one of its results) that ``worker`` prints."""
    lines = []
    while (line := worker.stdout.readline()) not in ("", "\n"):
        lines.append(line)
    if lines[:1] != ["ready\n"] or not line:
        sys.exit("a checkout does not run: build its native module in place first.")
    return [(name, float(norm)) for name, _, norm in (line.partition("\t") for line in lines[1:])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trees", nargs="*", type=Path, metavar="CHECKOUT", help="the checkout before, and the checkout after")
    parser.add_argument("--rounds", type=int, default=24, help="rounds of each comparison (default: 24)")
    parser.add_argument("--core", type=int, default=1, help="number of the core that both processes use (default: 1)")
    parser.add_argument("--only", default="", metavar="TEXT", help="time only the calls whose name contains this text")
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work is not None:
        work(arguments.work)
    elif len(arguments.trees) != 2:
        parser.error("give two checkouts: before and after")
    else:
        compare(arguments.trees, arguments.rounds, arguments.core, arguments.only)


if __name__ == "__main__":
    main()
