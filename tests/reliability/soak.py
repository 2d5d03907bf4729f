"""Train, evaluate and recommend again and again in one process, and watch what the process holds."""

from __future__ import annotations

import contextlib
import csv
import ctypes
import gc
import io
import os
import random
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch

from lares_fast import serve
from lares_fast.cli import main
from lares_fast.data import InteractionLog, Split, leave_one_out, synthetic_log
from lares_fast.train import EvalConfig, RPTConfig, RunConfig, SPTConfig, Trainer
from tests.reliability.counts import Counts

MINUTES = 120
CYCLES = "cycles of train, evaluate and recommend"

# What the process may grow by, from the second quarter of the cycles to the last. Memory is in MiB.
ALLOWED = {"memory": 4.0, "Python objects": 200.0, "open files": 0.0, "threads": 0.0}
# A few cycles have more noise than thousands, and libraries such as pyarrow still start their threads.
ALLOWED_QUICK = {**ALLOWED, "memory": 12.0, "Python objects": 2000.0, "threads": 4.0}


def measure(counts: Counts) -> None:
    """Run for two hours, or for a few cycles in the quick form."""
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    try:
        measures = _soak(counts, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    judge(counts, measures, ALLOWED_QUICK if counts.quick else ALLOWED)


def judge(counts: Counts, measures: dict[str, list[float]], allowed: dict[str, float]) -> None:
    """Count as failed each of ``measures``, by cycle, that has grown by more than ``allowed``."""
    for name, values in measures.items():
        what = f"growth of {name}"
        before, after = ends(values)
        counts.tried(what)
        counts.note(what, f"{before:,.0f} to {after:,.0f}{' MiB' if name == 'memory' else ''} over {len(values):,} cycles")
        if after - before > allowed[name]:
            counts.failed(what, f"from {before:.1f} to {after:.1f}, more than {allowed[name]} more", lost=True)


def ends(values: list[float]) -> tuple[float, float]:
    """Return the medians of the second and of the last quarter. The first quarter fills caches."""
    quarter = len(values) // 4
    return statistics.median(values[quarter : 2 * quarter]), statistics.median(values[-quarter:])


def _soak(counts: Counts, folder: Path) -> dict[str, list[float]]:
    """Run the cycles, and return what the process held after each of them."""
    log = synthetic_log(n_users=300, n_items=500, n_brands=20, mean_length=12, seed=3)
    split, out = leave_one_out(log), folder / "run"
    table = _write(log, folder / "log.csv")
    long_lived: serve.Recommender | None = None
    measures: dict[str, list[float]] = {name: [] for name in READINGS}
    # The first use of the command line imports many modules.
    _by_command_line(table, out, 0)
    began, cycle = time.monotonic(), 0
    draw = random.Random(0)
    while cycle < 8 if counts.quick else time.monotonic() - began < 60 * MINUTES:
        shutil.rmtree(out, ignore_errors=True)
        if cycle % 4 == 3:
            _by_command_line(table, out, cycle)
        else:
            _by_python(log, split, out, cycle)
        fresh = serve.load(out, "cpu")
        long_lived = long_lived or fresh
        for recommender in (fresh, long_lived):
            histories = [draw.choices(recommender.item_ids, k=draw.randrange(1, 40)) for _ in range(draw.randrange(1, 600))]
            answers = recommender.recommend(histories, 10, batch_size=128)
            if len(answers.ids) != len(histories) or any(len(row) != 10 for row in answers.ids):
                counts.failed(CYCLES, f"cycle {cycle} has a history without its 10 items", lost=True)
        cycle += 1
        share = (time.monotonic() - began) / (60 * MINUTES)
        counts.tried(CYCLES, goal=8 if counts.quick else max(cycle, round(cycle / share)))
        del fresh, recommender, answers, histories
        gc.collect()
        for name, read in READINGS.items():
            measures[name].append(read())
    return measures


def _by_python(log: InteractionLog, split: Split, out: Path, cycle: int) -> None:
    # The sizes change from cycle to cycle, so that memory is asked for in other pieces.
    config = RunConfig(
        model={"hidden_size": 32, "inner_size": 64, "max_len": 8 + cycle % 5, "mean_depth": 2},
        spt=SPTConfig(batch_size=100 + cycle % 7, epochs=1, max_steps=6),
        rpt=RPTConfig(batch_size=100 + cycle % 7, epochs=1, max_steps=4, group_size=2),
        evaluation=EvalConfig(depth_ratios=(1.0, 2.0)),
        seed=cycle % 3,
    )
    Trainer(config, log, split, out).run(("spt", "rpt"))
    # A second trainer resumes the finished run.
    Trainer(config, log, split, out).run(("spt", "rpt"))


def _by_command_line(table: Path, out: Path, cycle: int) -> None:
    few = ["spt.epochs=1", "rpt.epochs=1", "spt.max_steps=6", "rpt.max_steps=4", f"seed={cycle % 3}"]
    settings = [word for setting in few for word in ("--set", setting)]
    answers = out.with_name("answers.parquet")
    for command in (
        ["train", "--config", "tiny", "--data", table, "--out", out, *settings],
        ["eval", "--run", out],
        ["recommend", "--run", out, "--input", table, "--output", answers],
    ):
        said = io.StringIO()
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            code = main([str(word) for word in command])
        if code:
            raise RuntimeError(f"{command[0]} ended with {code}: {said.getvalue()[-500:]}")


def _give_back() -> None:
    """Let the allocator of glibc return its free memory to the system. Other allocators keep it."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _write(log: InteractionLog, path: Path) -> Path:
    """Write ``log`` as a table, and return its path."""
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(("user_id", "item_id", "timestamp"))
        for user in range(log.n_users):
            first, last = log.offsets[user : user + 2].tolist()
            rows.writerows((user, item, place) for place, item in enumerate(log.items[first:last].tolist()))
    return path


def _memory() -> float:
    """Return the memory that the process holds, in MiB.

    Pages of files do not count: they come and go. Free memory that the allocator keeps for later does not count either. It
    grows until the largest of many random sizes have come by chance, so it would hide or feign a leak of a few MiB.
    """
    _give_back()
    sizes = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return sum(int(sizes[name].split()[0]) for name in ("RssAnon", "VmSwap")) / 1024


READINGS: dict[str, Callable[[], float]] = {
    "memory": _memory,
    "Python objects": lambda: float(len(gc.get_objects())),
    "open files": lambda: float(len(os.listdir("/proc/self/fd"))),
    "threads": lambda: float(max(len(os.listdir("/proc/self/task")), threading.active_count())),
}
