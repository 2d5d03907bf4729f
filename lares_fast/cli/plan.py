"""``lares-fast doctor --plan``: predict how much memory training, evaluation and serving need, without doing any of it."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from lares_fast import LARESConfig
from lares_fast._device import choose
from lares_fast._errors import InputError
from lares_fast._memory import free_bytes, resident_bytes
from lares_fast.cli import settings
from lares_fast.cli.inputs import open_log, split_log
from lares_fast.train import RunConfig
from lares_fast.train.config import PHASES
from lares_fast.train.memory import (
    LogSizes,
    Need,
    log_needs,
    program_bytes,
    serving_needs,
    training_needs,
)

_SYNTHETIC_LENGTH = 12


def add_arguments(parser: ArgumentParser) -> None:
    """Add the arguments of the plan."""
    parser.add_argument(
        "--plan", metavar="CONFIG", help="predict the memory of this configuration: a YAML file, a preset or a run folder"
    )
    parser.add_argument("--data", metavar="PATH", help="with --plan: the log; without it, sizes come from the settings")
    for name, what in (("items", "items"), ("events", "events"), ("users", "users")):
        parser.add_argument(f"--{name}", metavar="N", type=int, help=f"with --plan and without --data: the number of {what}")
    settings.add_set_argument(parser)
    parser.add_argument("--device", default="cpu", help="with --plan: the device that trains (default: cpu)")


def require_unused(arguments: Namespace) -> None:
    """Raise :class:`InputError` if an argument of the plan is given, for a call without ``--plan``."""
    given = {name: getattr(arguments, name) is not None for name in ("data", "items", "events", "users")}
    given |= {"set": bool(arguments.assignments), "device": arguments.device != "cpu"}
    if (name := next((name for name, is_given in given.items() if is_given), None)) is not None:
        raise InputError(f"--{name} has no effect without --plan: add --plan CONFIG, or leave --{name} out.")


class Line(NamedTuple):
    """A line of the plan, in bytes: what the process holds after this part, and its peak during this part."""

    part: str
    what: str
    kept: int
    more: int
    peak: int


def plan(arguments: Namespace) -> dict[str, Any]:
    """Return the lines of the plan of each process, the peaks, and the free memory."""
    source = Path(arguments.plan)
    config = settings.build(source / "config.yaml" if source.is_dir() else arguments.plan, arguments.assignments)
    device = choose(arguments.device).device
    # The log is not there yet.
    program, serving = (program_bytes(resident_bytes(), trains=trains) for trains in (True, False))
    sizes = _sizes(config, arguments)
    model = LARESConfig.from_dict({**config.model, "n_items": sizes.items})
    lines: list[Line] = []
    host = [Need("Python and PyTorch", program), log_needs(sizes)]
    for phase in PHASES:
        needs = training_needs(phase, config, model, sizes, device.type)
        lines += _lines(f"phase {phase}", [*host, *needs] if device.type == "cpu" else needs)
    host = [Need("Python and PyTorch", serving), log_needs(sizes)]
    lines += _lines("recommend", [*host, *serving_needs(model, sizes, users=sizes.users)])
    return {
        "sizes": asdict(sizes),
        "device": str(device),
        "lines": [line._asdict() for line in lines],
        "peaks": {part: max(line.peak for line in lines if line.part == part) for part in dict.fromkeys(x.part for x in lines)},
        "free": free_bytes(device),
    }


def text(report: dict[str, Any]) -> str:
    """Return the plan as a table in MiB."""
    sizes = report["sizes"]
    lines = [
        f"a log of {sizes['users']:,} users, {sizes['items'] - 1:,} items and {sizes['events']:,} events; "
        f"inputs of {sizes['mean_length']:.1f} items on average; trained on {report['device']}",
        "",
        f"{'process':<10}  {'part':<24}{'keeps':>10}{'and needs':>11}{'peak':>10}  MiB",
    ]
    for line in report["lines"]:
        numbers = f"{_mib(line['kept']):>10}{_mib(line['more']):>11}{_mib(line['peak']):>10}"
        lines.append(f"{line['part']:<10}  {line['what']:<24}{numbers}")
    lines.append("")
    for part, peak in report["peaks"].items():
        lines.append(f"{part:<10}  peak {_mib(peak)} MiB")
    lines.append(f"{'free':<10}  {_mib(report['free'])} MiB on {report['device']}")
    return "\n".join(lines)


def _mib(size: float) -> str:
    return f"{size / 2**20:,.0f}"


def _lines(part: str, needs: list[Need]) -> list[Line]:
    lines, kept = [], 0
    for need in needs:
        kept += need.kept
        lines.append(Line(part, need.what, need.kept, need.more, kept + need.more))
    return lines


def _sizes(config: RunConfig, arguments: Namespace) -> LogSizes:
    """Return the sizes of the log: of a file, or those that the flags or the settings state."""
    max_len = LARESConfig.preview(**config.model).max_len
    path = arguments.data or config.data.path
    given = {name: getattr(arguments, name) for name in ("items", "events", "users")}
    if path is not None and any(value is not None for value in given.values()):
        raise InputError("--items, --events and --users describe a log that is not there: leave them out, or leave --data out.")
    if path is not None:
        log = open_log(config.data, path)
        return LogSizes.of(log, split_log(config.data, log), max_len)
    users = given["users"] or config.data.synthetic_users
    items = given["items"] or config.data.synthetic_items
    events = given["events"] or users * _SYNTHETIC_LENGTH
    if min(users, items, events) < 1 or events < 4 * users:
        raise InputError(f"--events must be at least 4 for each user, but is {events} for {users} users.")
    return LogSizes.assumed(users, items, events, max_len)
