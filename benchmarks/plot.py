"""``python benchmarks/plot.py ROWS.csv OUT.svg``: the median ratio of every candidate, with its range."""

import csv
import sys

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot


def main(source: str, target: str) -> None:
    """Draw ``source`` (rows of harness.append) into ``target``."""
    with open(source) as file:
        rows = [row for row in csv.DictReader(file) if row["candidate"] != row["baseline"]]
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
    figure.savefig(target, metadata={"Date": None})


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
