"""``lares-fast gpu-bench``: measure the speed on this GPU against the best rivals in PyTorch."""

from __future__ import annotations

import time
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from dataclasses import dataclass, field
from pathlib import Path

import torch

from lares_fast._errors import InputError
from lares_fast._files import locked
from lares_fast.cli.console import clock_text, counted, notice
from lares_fast.cli.outputs import files_in, require_apart, require_own_files
from lares_fast.gpu_bench.bench import NOT_REACHED, Bench, Listener
from lares_fast.gpu_bench.candidates import Result
from lares_fast.gpu_bench.results import BEGUN, Results
from lares_fast.gpu_bench.rows import Row, chosen, table
from lares_fast.verify.process import leaving_no_processes

# Seconds of rows that are taken to run at the guessed pace.
_STEADY = 60.0
_DESCRIPTION = """\
Measure the speed on this GPU: the ops, training steps of both phases, evaluation and whole runs.

Each row compares lares_fast with the best known ways to do the same in PyTorch, such as the official training step, eager and
compiled. Every candidate is first checked against the reference in fp64, and a wrong one is not timed. The candidates take
turns, and the GPU's own clock times them.

Results are written to DIR after every row: results.json and table.txt. Ctrl-C keeps them. A second call with the same DIR
measures only the rows that are missing or failed. Results of another GPU, driver or version need another DIR."""


def add_arguments(parser: ArgumentParser) -> None:
    """Add the arguments of ``gpu-bench``."""
    parser.description, parser.formatter_class = _DESCRIPTION, RawDescriptionHelpFormatter
    parser.add_argument(
        "--out", metavar="DIR", type=Path, default=Path("gpu-bench"), help="folder of the results (default: gpu-bench)"
    )
    parser.add_argument("--rows", metavar="NAME", nargs="+", help="measure only these rows or groups, such as spt_step or topk")
    parser.add_argument("--seconds", metavar="S", type=float, help="stop after S seconds; a second call measures the rest")
    parser.add_argument("--list", action="store_true", help="list the rows and stop")
    parser.add_argument("--log", metavar="FILE", type=Path, help="also train on this interaction log, for at most 240 seconds")
    parser.add_argument(
        "--rehearse", action="store_true", help="run tiny sizes on the CPU, to see that the rows run; the times mean nothing"
    )


def command(arguments: Namespace) -> int:
    """Run ``gpu-bench``. Return 0 if every chosen row passed or was skipped, else 1."""
    log, out = arguments.log, arguments.out
    if arguments.seconds is not None and not arguments.seconds > 0:
        raise InputError(f"--seconds must be greater than 0, but got {arguments.seconds:g}.")
    if log is not None and not log.is_file():
        raise InputError(f"--log {log} is not a file: give an interaction log.")
    rows = table(log)
    names = chosen(arguments.rows, rows)
    if arguments.list:
        print("\n".join(f"{name:<36} {rows[name].title}" for name in names))
        return 0
    if not arguments.rehearse and not torch.cuda.is_available():
        raise InputError("gpu-bench needs a GPU, but no GPU is visible to torch: give --rehearse to run it on the CPU.")
    require_apart("--out", files_in(out, ("logs.txt", "results.json", "table.txt")), {"--log": [log]})
    require_own_files("--out", out, ("table.txt",), begun=(out / "results.json").exists())
    end = time.monotonic() + arguments.seconds if arguments.seconds else float("inf")
    with locked(out, notice), leaving_no_processes():
        results = Results(out)
        left = results.missing(names, log)
        if len(left) < len(names):
            notice(f"{out} has {len(names) - len(left)} of {len(names)} rows: measuring the other {len(left)}")
        progress = _Progress({name: rows[name] for name in left}, results)
        bench = Bench(out / "logs.txt", rehearse=arguments.rehearse, log=log and log.absolute(), end=end)
        if left:
            bench.run(progress.rows, Listener(results.claim, progress.begin, progress.stage, progress.end))
        print(results.text())
        missing = results.missing(names, log)
    again = f" {counted(len(missing), 'row')} failed or not measured: call gpu-bench again." if missing else ""
    print(f"\nThe results are in {out}.{again}")
    return int(bool(missing))


@dataclass
class _Progress:
    """Shows which row runs and how long all will take, and stores the results."""

    rows: dict[str, Row]
    results: Results
    # Seconds of the finished rows: guessed and measured.
    _guessed: float = 0.0
    _took: float = 0.0
    _number: int = 0
    _name: str = field(default="", repr=False)

    def begin(self, name: str) -> None:
        """Show the start of a row."""
        self._name, self._number = name, list(self.rows).index(name) + 1
        left = sum(row.seconds for row in list(self.rows.values())[self._number - 1 :])
        # A few short rows say little about the pace.
        pace = (self._took + _STEADY) / (self._guessed + _STEADY)
        self.results.put(name, {"status": BEGUN, "title": self.rows[name].title})
        notice(f"row {self._number} of {len(self.rows)}, {name}: {self.rows[name].title} (ETA {clock_text(pace * left)})")

    def stage(self, what: str) -> None:
        """Show what a row does now."""
        notice(f"  {self._name}: {what}")

    def end(self, name: str, result: Result) -> None:
        """Store the result of a row and show its end."""
        row = self.rows[name]
        self.results.put(name, {"title": row.title, **result})
        if result["status"] != NOT_REACHED:
            self._guessed += row.seconds
            self._took += result.get("seconds", row.seconds)
        notice(f"  {name}: {'; '.join([result['status'], *result.get('faults', [])])} ({result.get('seconds', 0)} s)")
