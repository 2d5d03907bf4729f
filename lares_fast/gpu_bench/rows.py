"""The rows of ``lares-fast gpu-bench``, in the order in which they run: the most valuable rows come first."""

from __future__ import annotations

import difflib
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from lares_fast._errors import InputError
from lares_fast.gpu_bench.candidates import BF16, FP32, Result, in_tf32
from lares_fast.gpu_bench.catalog_rows import cross_entropy, target_rank, topk
from lares_fast.gpu_bench.machine import Call, Machine
from lares_fast.gpu_bench.model_rows import encode, evaluation
from lares_fast.gpu_bench.our_step import Case
from lares_fast.gpu_bench.run_rows import CUT_SECONDS, log_run, rows_per_second, synthetic_run
from lares_fast.gpu_bench.sequence_rows import attention, recurrence
from lares_fast.gpu_bench.step_rows import RPT_CASE, SPT_CASE, training_step

CEILINGS, WITH_LOG = "ceilings", "run:log"
# A row does not start with fewer seconds left.
LEAST_SECONDS = 12.0


@dataclass(frozen=True)
class Row:
    """One row. ``seconds`` is a guess of how long it takes on an H200, for the estimate of the remaining time."""

    title: str
    seconds: float
    run: Callable[[Machine], Result]

    @property
    def limit(self) -> float:
        """The seconds after which the row is stopped, because it hangs."""
        return 180 + 4 * self.seconds


def ceilings(machine: Machine) -> Result:
    """Measure the bandwidth of a copy, the rates of matrix products, and the time of a launch.

    The rate of exponentials is calculated: a multiprocessor computes 16 in a cycle, and the clock is taken as 1.8 GHz.
    """
    size, n = (64, 2**14) if machine.rehearse else (8192, 2**28)

    def seconds(name: str, call: Call) -> float:
        machine.stage(name)
        call()
        return 1e-3 * statistics.median(machine.turns({name: call})[name])

    a, b = torch.randn(n, device=machine.device), torch.empty(n, device=machine.device)
    rates = {"bytes": 8 * n / seconds("copy", partial(b.copy_, a))}
    del a, b
    for name, dtype in (("bf16", BF16), ("tf32", FP32), ("fp32", FP32)):
        x, y = (torch.randn(size, size, device=machine.device).to(dtype) for _ in range(2))
        product = partial(torch.mm, x, y)
        rates[name] = 2 * size**3 / seconds(name, in_tf32(product) if name == "tf32" else product)
    one = torch.zeros(1, device=machine.device)
    launch = seconds("launch", partial(one.add_, 1))
    processors = 1 if machine.rehearse else torch.cuda.get_device_properties(0).multi_processor_count
    rates["exponentials"] = processors * 16 * 1.8e9
    facts = {"copy TB/s": rates["bytes"] / 1e12, **{f"{name} TFLOP/s": rates[name] / 1e12 for name in ("bf16", "tf32", "fp32")}}
    return {"status": "passed", "rates": rates, "facts": {**facts, "launch us": 1e6 * launch}}


def _catalog_rows() -> dict[str, Row]:
    """Return the rows of ``topk`` and ``target_rank``: (number of items, width, (B, K) of each row)."""
    sizes: list[tuple[str, int, int, list[tuple[int, int]]]] = [
        ("1M", 1_000_000, 64, [(256, 100), (1024, 100), (1, 100), (32, 100), (8192, 100)]),
        ("24588", 24_588, 64, [(256, 100), (1024, 100), (1, 100), (8192, 100)]),
        ("1M", 1_000_000, 64, [(256, 10), (256, 1000), (1024, 10), (1024, 1000)]),
        ("1M", 1_000_000, 128, [(1, 100), (1024, 100)]),
        ("10M", 10_000_000, 64, [(1, 100), (1024, 100)]),
        ("10M", 10_000_000, 128, [(256, 100), (8192, 100)]),
    ]
    rows: dict[str, Row] = {}
    for label, N, d, each in sizes:
        for B, K in each:
            # Larger scores take longer, in the row and in its check.
            cost = 4 + B * N * d / 4e10
            width = "" if d == 64 else f", D {d}"
            name = f"B{B}-N{label}" + ("" if d == 64 else f"-D{d}")
            rows[f"topk:{name}-K{K}"] = Row(f"top-K B {B} N {N:,} K {K}{width}, fp32", cost, partial(topk, B=B, N=N, k=K, d=d))
            rows[f"target_rank:{name}"] = Row(
                f"target rank B {B} N {N:,}{width}, fp32", cost, partial(target_rank, B=B, N=N, d=d)
            )
    return rows


def _sequence_rows() -> dict[str, Row]:
    """Return the rows of ``recurrence``, ``attention``, ``linear_cross_entropy`` and ``encode``."""
    names = {"fp32": FP32, "bf16": BF16}
    rows = {
        f"encode:{name}-B{B}": Row(f"encode B {B} T 4 {_INSTRUMENTS}, {name}", 50, partial(encode, B=B, dtype=dtype))
        for B in (1024, 2048)
        for name, dtype in names.items()
    }
    inference = ((2048, "mean 8.75", "fp32"), (2048, "mean 8.75", "bf16"), (2048, "full", "bf16"), (256, "mean 8.75", "bf16"))
    for B, kind, name in inference:
        run = partial(recurrence, B=B, longest=50, kind=kind, dtype=names[name], T=4, gradients=False)
        label = f"B{B}-full" if kind == "full" else f"B{B}"
        rows[f"recurrence:{name}-{label}"] = Row(f"recurrence B {B} T 4 2 layers, lengths {kind}, {name}", 12, run)
    for name, dtype in reversed(names.items()):
        run = partial(recurrence, B=1024, longest=20, kind="instruments", dtype=dtype, T=5, gradients=True)
        title = f"recurrence with gradients B 1024 T 5 2 layers, Instruments lengths, {name}"
        rows[f"recurrence:{name}-B1024-gradients"] = Row(title, 25, run)
    for longest, kind in ((50, "full"), (20, "instruments")):
        title = f"attention with gradients B 2048 L {longest}, lengths {kind}, bf16"
        run = partial(attention, B=2048, longest=longest, kind=kind)
        rows[f"attention:L{longest}-{kind}"] = Row(title, 8, run)
    for name, N in (("fp32", 24_588), ("bf16", 24_588), ("bf16", 1_000_000)):
        run = partial(cross_entropy, M=1024, N=N, dtype=names[name])
        title = f"cross entropy with gradients M 1024 N {N:,}, {name}"
        rows[f"cross_entropy:{name}-N{'1M' if N == 1_000_000 else N}"] = Row(title, 20, run)
    return rows


_INSTRUMENTS = "2+2 layers Instruments lengths"
_SPT = f"SPT step B {SPT_CASE.B} T 5"
_RPT = f"RPT step B {RPT_CASE.B} G {len(RPT_CASE.depths)} T {'/'.join(map(str, RPT_CASE.depths))}"


def _step(case: Case, seconds: float, *, bf16: bool, compiled: bool = False) -> Row:
    lengths = "2+2 layers, 20 items each" if case.full else _INSTRUMENTS
    title = f"{_SPT if case.phase == 'spt' else _RPT} {lengths}, {'bf16' if bf16 else 'fp32'}"
    run = partial(training_step, case=case, bf16=bf16, compiled=compiled)
    return Row(f"{title}, against compiled steps" if compiled else title, seconds, run)


ROWS: dict[str, Row] = {
    CEILINGS: Row("ceilings: copy, products, launch", 8, ceilings),
    "spt_step:bf16": _step(SPT_CASE, 40, bf16=True),
    "rpt_step:bf16": _step(RPT_CASE, 50, bf16=True),
    "rows_per_second": Row("SPT rows a second", 60, rows_per_second),
    "spt_step:bf16-compiled": _step(SPT_CASE, 130, bf16=True, compiled=True),
    "rpt_step:bf16-compiled": _step(RPT_CASE, 150, bf16=True, compiled=True),
    "evaluation": Row("evaluation of 57,439 rows T 4 N 24,588, fp32", 30, evaluation),
    "run:synthetic": Row("both phases on a synthetic log", 60, synthetic_run),
    **_sequence_rows(),
    "spt_step:fp32": _step(SPT_CASE, 30, bf16=False),
    "rpt_step:fp32": _step(RPT_CASE, 40, bf16=False),
    "spt_step:bf16-full": _step(replace(SPT_CASE, full=True), 40, bf16=True),
    **_catalog_rows(),
}


def table(log: Path | None = None) -> dict[str, Row]:
    """Return all rows by name. The run on a log is one of them if there is a ``log``."""
    if log is None:
        return ROWS
    title = f"both phases on {log.name}, stopped after {CUT_SECONDS:.0f} s"
    return {**ROWS, WITH_LOG: Row(title, CUT_SECONDS, partial(log_run, path=log))}


def chosen(wanted: Sequence[str] | None, rows: Iterable[str]) -> list[str]:
    """Return the names of ``rows`` that ``wanted`` lists, as names or as groups before a colon. Without it return all names.

    Raises :class:`InputError` for a name that is neither.
    """
    rows = list(rows)
    for name in wanted or ():
        if name == WITH_LOG and name not in rows:
            raise InputError(f"--rows {WITH_LOG} needs a log: add --log FILE.")
        if not any(_belongs(row, name) for row in rows):
            groups = dict.fromkeys(row.partition(":")[0] for row in rows)
            near = difflib.get_close_matches(name, [*rows, *groups], 1, cutoff=0.0)[0]
            raise InputError(f"--rows {name} is not a row: did you mean {near}? lares-fast gpu-bench --list shows all rows.")
    return [row for row in rows if not wanted or any(_belongs(row, name) for name in wanted)]


def _belongs(row: str, name: str) -> bool:
    return row == name or row.startswith(f"{name}:")
