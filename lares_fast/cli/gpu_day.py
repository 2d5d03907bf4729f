"""``lares-fast gpu-day``: run all GPU checks and write one report."""

from __future__ import annotations

import re
import time
from argparse import ArgumentParser, Namespace
from pathlib import Path

import torch

from lares_fast._errors import InputError
from lares_fast.cli.console import notice
from lares_fast.verify.gpu_plan import chosen, plan
from lares_fast.verify.gpu_report import Report, is_well, table
from lares_fast.verify.gpu_run import Limits, run_steps
from lares_fast.verify.process import leaving_no_processes

# --quick leaves out the steps whose names begin with one of these.
_LONG = ("large_", "graphs", "training", "self_tests")


def add_arguments(parser: ArgumentParser) -> None:
    """Add the arguments of ``gpu-day``."""
    parser.add_argument("--quick", action="store_true", help="run small shapes and few variants, in a few minutes")
    parser.add_argument("--rehearse", action="store_true", help="run on the CPU, with Triton's interpreter instead of a GPU")
    parser.add_argument(
        "--out", metavar="DIR", type=Path, default=Path(), help="folder of the report (default: the current folder)"
    )
    parser.add_argument(
        "--only",
        metavar="NAME",
        nargs="+",
        help="run only these steps or groups; 'failed REPORT' runs the steps that failed or were not reached in that report",
    )
    parser.add_argument("--jobs", metavar="N", type=int, default=1, help="number of steps that run at a time (default: 1)")
    parser.add_argument("--seconds", type=float, default=600, help="time limit of each step (default: 600)")
    parser.add_argument(
        "--total", metavar="SECONDS", type=float, help="time limit of all steps; later steps are reported as not reached"
    )


def command(arguments: Namespace) -> int:
    """Run ``gpu-day``. Return 0 if every step passed or was skipped, else 1."""
    if not torch.cuda.is_available() and not arguments.rehearse:
        raise InputError("gpu-day needs a GPU, but no GPU is visible to torch: give --rehearse to run it on the CPU.")
    if not arguments.out.is_dir():
        raise InputError(f"--out {arguments.out} is not a folder: create it first.")
    for name in ("jobs", "seconds", "total"):
        if (value := getattr(arguments, name)) is not None and not value > 0:
            raise InputError(f"--{name} must be greater than 0, but got {value:g}.")
    end = time.monotonic() + arguments.total if arguments.total else float("inf")
    steps = plan(rehearse=arguments.rehearse, quick=arguments.quick)
    if arguments.quick and not arguments.only:
        steps = {name: step for name, step in steps.items() if not name.startswith(_LONG)}
    gpu = "rehearsal" if arguments.rehearse else re.sub(r"\W+", "-", torch.cuda.get_device_name())
    path = arguments.out / f"gpu-day-{gpu}-{time.strftime('%Y-%m-%d')}.json"
    # Every report describes its machine.
    report = Report(path, dict.fromkeys(["machine", *chosen(arguments.only, steps)]), tell=notice)
    limits = Limits(arguments.seconds, arguments.jobs, end)
    with leaving_no_processes():
        run_steps({name: steps[name] for name in report.found}, report, limits, rehearse=arguments.rehearse)
    print(table(report.found))
    print(f"\nThe report is {path}: please attach it to an issue.")
    return int(not all(map(is_well, report.found.values())))
