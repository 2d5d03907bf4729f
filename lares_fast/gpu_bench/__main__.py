"""``python -P -m lares_fast.gpu_bench REQUEST``: run rows and print a line of JSON for each event. bench.py starts it.

The events are ``machine``, the description of the machine, and ``begin``, ``stage`` and ``end`` of each row. A row that takes
too long ends this process, with the traceback of every thread in its log. So does an error after which the GPU is unusable.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from lares_fast.gpu_bench.bench import marker
from lares_fast.gpu_bench.candidates import Result, is_fatal
from lares_fast.gpu_bench.machine import Machine, describe
from lares_fast.gpu_bench.rows import LEAST_SECONDS, Row, table
from lares_fast.train.graphs import CudaCapture

Emit = Callable[..., None]


def run(rows: Mapping[str, Row], machine: Machine, emit: Emit, end: float, clock: Callable[[], float] = time.monotonic) -> None:
    """Run ``rows`` until ``end``, and emit the events of each. An error that makes the GPU unusable ends the loop.

    So does a capture that failed. Another process then runs the rows that are left.
    """
    for name, row in rows.items():
        left = end - clock()
        if left < LEAST_SECONDS:
            return
        if left < row.seconds and not machine.rehearse:
            # It would be stopped before its end. A later row may be shorter.
            continue
        print(marker(name), file=sys.stderr, end="", flush=True)
        emit(event="begin", row=name)
        faulthandler.dump_traceback_later(min(row.limit, left), exit=True)
        result, usable = run_row(row, machine)
        faulthandler.cancel_dump_traceback_later()
        emit(event="end", row=name, result=result)
        # After a capture that failed, PyTorch may keep freed memory for ever.
        if not usable or CudaCapture.failed:
            return


def run_row(row: Row, machine: Machine) -> tuple[Result, bool]:
    """Return the result of ``row``, and whether the GPU is still usable."""
    began = time.monotonic()
    usable = True
    if not machine.rehearse:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    try:
        result = row.run(machine)
    except torch.cuda.OutOfMemoryError:
        result = {"status": "skipped", "why": "it needs more memory than this GPU has free"}
    except Exception as error:
        traceback.print_exc()
        usable = not is_fatal(error)
        result = {"status": "failed", "faults": [f"{type(error).__name__}: {str(error)[:500]}"]}
    result["seconds"] = round(time.monotonic() - began, 1)
    if usable and not machine.rehearse:
        result["peak MiB"] = torch.cuda.max_memory_allocated() >> 20
    return result, usable


def _prepare(rehearse: bool) -> None:
    if rehearse:
        # Threads that wait for each other on a busy machine would take minutes.
        torch.set_num_threads(1)
        return
    # A row compiles the same functions for several models and modes. Past its limit torch.compile would run them eagerly.
    from torch._dynamo import config

    config.recompile_limit, config.accumulated_recompile_limit, config.fail_on_recompile_limit_hit = 256, 4096, True


def main() -> None:
    """Run the rows of the request in the first argument."""
    request: dict[str, Any] = json.loads(sys.argv[1])
    # Compilers print on the standard output, so events get a file of their own.
    events = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def emit(**event: Any) -> None:
        events.write(json.dumps(event) + "\n")
        events.flush()

    end = time.monotonic() + request["seconds"]
    _prepare(request["rehearse"])
    emit(event="machine", machine=describe(rehearse=request["rehearse"]))
    rows = table(Path(request["log"]) if request["log"] else None)
    machine = Machine(rehearse=request["rehearse"], stage=lambda name: emit(event="stage", stage=name))
    run({name: rows[name] for name in request["rows"]}, machine, emit, end)


if __name__ == "__main__":
    main()
