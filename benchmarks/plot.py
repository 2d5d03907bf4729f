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
    figure, axes = pyplot.subplots(figsize=(9, 0.45 * len(rows) + 1.2), layout="constrained")
    for place, row in enumerate(reversed(rows)):
        low, middle, high = (float(row[f"ratio_{name}"]) for name in ("min", "median", "max"))
        axes.barh(place, middle, color="tab:blue", xerr=[[middle - low], [high - middle]], ecolor="black", capsize=3)
    axes.set_yticks(
        range(len(rows)), [f"{r['group']} {r['shape']}: {r['candidate']} / {r['baseline']}" for r in reversed(rows)]
    )
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xlabel("times faster (CPU time, one core, median and range of interleaved rounds)")
    figure.savefig(target, metadata={"Date": None})


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
