"""The table of gpu-bench: times, ratios to rivals, floors and shares of the floor, from the results of the rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from lares_fast.gpu_bench.candidates import NOT_EXACT, OURS

Results = Mapping[str, Mapping[str, Any]]

_COLUMNS = ("candidate", "ms", "min..max", "times as fast as the best rival", "floor ms", "share of floor")
_ABOUT = """\
ms: the median of all turns, with the fastest and the slowest turn. Candidates take turns. A ratio compares the times of one
turn: the median ratio, with the smallest and the largest. Floor: the time for the least bytes and operations alone, by the
rates of the ceilings. Share of floor: floor / ms. A candidate is timed only if its results are right. A rival that is marked
(not exact) rounds more than the reference, and no ratio to it is given."""


@dataclass(frozen=True)
class Ratio:
    """The median, the smallest and the largest ratio of two candidates over their turns."""

    middle: float
    least: float
    most: float

    @classmethod
    def of(cls, slow: Sequence[float], fast: Sequence[float]) -> Ratio:
        """Return how many times as fast ``fast`` is as ``slow``, from the milliseconds of equal turns."""
        ratios = [a / b for a, b in zip(slow, fast, strict=True)]
        return cls(median(ratios), min(ratios), max(ratios))

    def __str__(self) -> str:
        return f"{self.middle:.2f} ({self.least:.2f}..{self.most:.2f})"


def best_of(turns: Mapping[str, Sequence[float]]) -> tuple[str | None, str | None]:
    """Return the names of our fastest candidate and of the fastest rival that computes the same, if there are any."""
    ours = [name for name in turns if name.startswith(OURS)]
    rivals = [name for name in turns if name not in ours and NOT_EXACT not in name]
    fastest = (min(names, key=lambda name: median(turns[name]), default=None) for names in (ours, rivals))
    mine, theirs = fastest
    return mine, theirs


def floor_ms(work: Mapping[str, float], rates: Mapping[str, float]) -> float | None:
    """Return the least time for ``work``, or ``None`` if a rate that it needs was not measured."""
    if not work or any(not rates.get(limit) for limit in work):
        return None
    return 1e3 * max(amount / rates[limit] for limit, amount in work.items())


def text_of(machine: Mapping[str, str], rows: Results) -> str:
    """Return the table of all ``rows``, under the description of the machine."""
    rates: Mapping[str, float] = next((row["rates"] for row in rows.values() if "rates" in row), {})
    head = "\n".join(f"{name}: {value}" for name, value in machine.items())
    return "\n\n".join([head, _ABOUT, *(_row_text(name, row, rates) for name, row in rows.items())])


def _row_text(name: str, row: Mapping[str, Any], rates: Mapping[str, float]) -> str:
    seconds = f", {row['seconds']} s" if "seconds" in row else ""
    lines = [f"{row.get('title', name)}  [{name}: {row['status']}{seconds}]"]
    if turns := row.get("turns_ms"):
        floor = floor_ms(row.get("work", {}), rates)
        ours, rival = best_of(turns)
        lines += _aligned([_COLUMNS, *(_cells(one, turns, rival, floor) for one in turns)])
        if ours is not None:
            rivals = [one for one in turns if not one.startswith(OURS) and NOT_EXACT not in one]
            against = ", ".join(f"{one} {Ratio.of(turns[one], turns[ours])}" for one in rivals)
            lines.append(f"  {ours}, times as fast as: {against or 'no rival'}")
        if "rows" in row:
            speeds = ", ".join(f"{one} {1e3 * row['rows'] / median(times):,.0f}" for one, times in turns.items())
            lines.append(f"  rows a second: {speeds}")
    lines += [f"  {what}: {_number(value)}" for what, value in row.get("facts", {}).items()]
    lines += [f"  fault: {fault}" for fault in row.get("faults", ())]
    lines += [f"  left out: {one}: {why}" for one, why in row.get("left_out", {}).items()]
    if "why" in row:
        lines.append(f"  {row['why']}")
    return "\n".join(" ".join(line.split("\n")) for line in lines)


def _cells(name: str, turns: Mapping[str, Sequence[float]], rival: str | None, floor: float | None) -> tuple[str, ...]:
    times = turns[name]
    ratio = "" if rival is None or NOT_EXACT in name else str(Ratio.of(turns[rival], times))
    share = ("", "") if floor is None else (f"{floor:.4g}", f"{floor / median(times):.1%}")
    return name, f"{median(times):.4g}", f"{min(times):.4g}..{max(times):.4g}", ratio, *share


def _aligned(cells: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["  " + "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells]


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
