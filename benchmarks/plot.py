"""Plot committed results: ``python -m benchmarks.plot ratios|cost ROWS.csv OUT.svg``.

``ratios`` shows the median ratio of every candidate, with its range. ``cost`` shows the time of a call of ``recurrence``
against T and against the number of tokens; a line shows the time that would be proportional.
"""

import argparse
import csv
import re
from pathlib import Path

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot

from lares_fast._files import atomic_write

_COST = "ns a token and layer application, by "


def ratios(rows: list[dict[str, str]]) -> pyplot.Figure:
    """Return a plot of the rows of comparisons."""
    rows = [row for row in rows if row["candidate"] != row["baseline"]]
    figure, axes = pyplot.subplots(figsize=(9, 0.3 * len(rows) + 1), layout="constrained")
    for place, row in enumerate(reversed(rows)):
        low, middle, high = (float(row[f"ratio_{name}"]) for name in ("min", "median", "max"))
        axes.errorbar(middle, place, xerr=[[middle - low], [high - middle]], fmt="o", color="tab:blue", capsize=3)
    axes.set_yticks(
        range(len(rows)), [f"{r['group']} {r['shape']}: {r['candidate']} / {r['baseline']}" for r in reversed(rows)]
    )
    axes.tick_params("y", labelsize=7)
    axes.set_xscale("log")
    axes.grid(axis="x", alpha=0.3)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xlabel("times faster")
    return figure


def cost(rows: list[dict[str, str]]) -> pyplot.Figure:
    """Return a plot of the facts of ``bench_recurrence.py``."""
    figure, places = pyplot.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    for axes, by in zip(places, ("T", "tokens"), strict=True):
        points = []
        for row in rows:
            if row["name"] != _COST + by:
                continue
            tokens, steps, layers = map(int, re.match(r"(\d+) tokens T(\d+) (\d+) layers", row["shape"]).groups())
            points.append((steps if by == "T" else tokens, float(row["value"]) * tokens * steps * layers * 1e-6))
        largest, time = max(points)
        axes.plot([0, largest], [0, time], color="black", linewidth=0.8, linestyle="--", label="in proportion")
        axes.plot(*zip(*points, strict=True), "o", color="tab:blue", label="measured")
        axes.set_xlabel(by)
        axes.set_ylabel("ms, forward and backward")
        axes.set_xlim(0)
        axes.set_ylim(0)
        axes.legend()
    return figure


def main(kind: str, source: str, target: str) -> None:
    """Draw ``source``, a file of harness.append, into ``target``."""
    with open(source) as file:
        figure = {"ratios": ratios, "cost": cost}[kind](list(csv.DictReader(file)))
    atomic_write(Path(target), lambda out: figure.savefig(out, format="svg", metadata={"Date": None}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("ratios", "cost"))
    parser.add_argument("rows", help="a CSV file of benchmarks/results")
    parser.add_argument("out", help="the SVG file to write")
    arguments = parser.parse_args()
    main(arguments.kind, arguments.rows, arguments.out)
