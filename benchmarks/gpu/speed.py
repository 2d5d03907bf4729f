"""Time the ops and a training step on one GPU against the fastest ways known in PyTorch. first.py runs this file.

measurement.py says how a row is checked and timed. The floor of a row is the time that the machine needs for its bytes and
operations alone, by the rates that the row speed:peaks measured.
"""

import argparse
import functools
import json
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).resolve().parents[2]))
from benchmarks.gpu.catalog_rows import cross_entropy, target_rank, topk
from benchmarks.gpu.measurement import BF16, FP32, Machine, in_tf32
from benchmarks.gpu.sequence_rows import attention, recurrence
from benchmarks.gpu.training_step import training_step
from lares_fast.cli.console import notice
from lares_fast.verify.gpu_report import Report, read

# A row does not start with fewer seconds left.
LEAST_SECONDS = 12


def peaks(machine):
    """Measure the bandwidth of a copy, the rates of matrix products, and the time of a launch."""
    size, n = (64, 2**14) if machine.rehearse else (8192, 2**30)

    def median(call):
        call()
        return 1e-3 * statistics.median(machine.milliseconds({"": call})[""])

    a, b = torch.randn(n, device=machine.device), torch.empty(n, device=machine.device)
    machine.copy = 8 * n / median(functools.partial(b.copy_, a))
    del a, b
    for name, dtype in (("fp32", FP32), ("tf32", FP32), ("bf16", BF16)):
        x, y = (torch.randn(size, size, device=machine.device).to(dtype) for _ in range(2))
        product = lambda x=x, y=y: x @ y  # noqa: E731
        machine.peak[name] = 2 * size**3 / median(in_tf32(product) if name == "tf32" else product)
    one = torch.zeros(1, device=machine.device)
    facts = {"copy TB/s": machine.copy / 1e12, **{f"{name} TFLOP/s": rate / 1e12 for name, rate in machine.peak.items()}}
    facts["launch us"] = 1e6 * median(lambda: one.add_(1))
    return {"status": "passed", "summary": ", ".join(f"{name} {value:.4g}" for name, value in facts.items()), "facts": facts}


# The most valuable rows come first, because the time may end before the list does.
ROWS: dict[str, Callable[[Machine], dict]] = {
    "speed:peaks": peaks,
    "speed:topk:B256-N1M": lambda machine: topk(machine, 256, 1_000_000, 100),
    "speed:recurrence:fp32-B2048": lambda machine: recurrence(machine, 2048, 50, "mean 8.75", FP32, 4, False),
    "speed:recurrence:bf16-B2048": lambda machine: recurrence(machine, 2048, 50, "mean 8.75", BF16, 4, False),
    "speed:recurrence:bf16-B1024-gradients": lambda machine: recurrence(machine, 1024, 20, "instruments", BF16, 5, True),
    "speed:linear_cross_entropy:fp32-N24588": lambda machine: cross_entropy(machine, 1024, 24_588, FP32),
    "speed:linear_cross_entropy:bf16-N24588": lambda machine: cross_entropy(machine, 1024, 24_588, BF16),
    "speed:training_step": lambda machine: training_step(machine, "instruments"),
    "speed:target_rank:B256-N1M": lambda machine: target_rank(machine, 256, 1_000_000),
    "speed:topk:B256-N24588": lambda machine: topk(machine, 256, 24_588, 10),
    "speed:topk:B1-N1M": lambda machine: topk(machine, 1, 1_000_000, 100),
    "speed:attention:L50-full": lambda machine: attention(machine, 2048, 50, "full"),
    "speed:attention:L20-instruments": lambda machine: attention(machine, 2048, 20, "instruments"),
    "speed:linear_cross_entropy:bf16-N1M": lambda machine: cross_entropy(machine, 1024, 1_000_000, BF16),
    "speed:recurrence:bf16-full": lambda machine: recurrence(machine, 2048, 50, "full", BF16, 4, False),
    "speed:recurrence:bf16-B256": lambda machine: recurrence(machine, 256, 50, "mean 8.75", BF16, 4, False),
    "speed:recurrence:fp32-B1024-gradients": lambda machine: recurrence(machine, 1024, 20, "instruments", FP32, 5, True),
    "speed:target_rank:B4096-N24588": lambda machine: target_rank(machine, 4096, 24_588),
    "speed:topk:B4096-N100k": lambda machine: topk(machine, 4096, 100_000, 10),
    "speed:linear_cross_entropy:bf16-N24588-compiled": lambda machine: cross_entropy(
        machine, 1024, 24_588, BF16, compiled=True
    ),
    "speed:training_step-compiled": lambda machine: training_step(machine, "instruments", compiled=True),
    "speed:training_step-full": lambda machine: training_step(machine, "full"),
}


def run(names, machine, report, lines, end, clock=time.monotonic):
    """Run the rows ``names`` until ``end``. Each is written to ``report`` and ``lines`` before the next one starts."""
    for name in names:
        if end - clock() < LEAST_SECONDS:
            return
        # A row that hangs keeps this status.
        report.put(name, {"status": "begun"})
        began = time.monotonic()
        if not machine.rehearse:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        try:
            row = ROWS[name](machine)
        except Exception as error:
            traceback.print_exc()
            row = {"status": "failed", "log": f"{type(error).__name__}: {str(error)[:500]}"}
        row["seconds"] = round(time.monotonic() - began, 1)
        if not machine.rehearse:
            row["peak_mib"] = torch.cuda.max_memory_allocated() >> 20
        report.put(name, row)
        lines.write(json.dumps({"row": name, **row}) + "\n")
        lines.flush()
        # After an illegal address every later call of this process fails too.
        if "CUDA error" in row.get("log", ""):
            return


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--only", nargs="+", required=True)
    parser.add_argument("--rehearse", action="store_true")
    given = parser.parse_args()
    end = time.monotonic() + given.seconds
    if given.rehearse:
        # Threads that wait for each other on a busy machine would take minutes.
        torch.set_num_threads(1)
    path = given.out / "results.json"
    with (given.out / "speed.jsonl").open("a") as lines:
        run(given.only, Machine(given.rehearse), Report(path, (), read(path), tell=notice), lines, end)


if __name__ == "__main__":
    main()
