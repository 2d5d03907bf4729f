"""The picture curves.png: training losses, validation metrics, and test metrics against T."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lares_fast._errors import printable, require
from lares_fast._files import atomic_write
from lares_fast.train.config import PHASES
from lares_fast.train.evaluate import NOT_MASKED
from lares_fast.train.results import Row

_LOSSES = {"spt": ("loss", "ce", "trajectory", "step"), "rpt": ("reward", "kl", "adv-nonzero")}


def save_curves(path: Path, history: Sequence[Row], title: str) -> None:
    """Draw the rows of metrics.csv and atomically write the picture to ``path``.

    Raises :class:`MissingExtraError` without matplotlib.
    """
    require("matplotlib", "train", "curves.png")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [row for row in history if row["history"] == NOT_MASKED]
    figure = Figure(figsize=(11, 7), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 2)
    for axis, phase, name in zip(axes[0], PHASES, ("Phase 1 (SPT)", "Phase 2 (RPT)"), strict=True):
        _losses(axis, rows, phase, f"{name}: training means")
    _validation(axes[1, 0], rows)
    _depths(axes[1, 1], rows)
    # A name may have dollar signs, which are no formula.
    figure.suptitle(printable(title, 200), parse_math=False)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=110)
    atomic_write(path, lambda file: file.write(picture.getvalue()))


def _losses(axis: Any, rows: Sequence[Row], phase: str, title: str) -> None:
    rows = [row for row in rows if (row["phase"], row["split"]) == (phase, "valid")]
    for name in _LOSSES[phase]:
        points = [(row["epoch"], row[name]) for row in rows if name in row]
        if points:
            axis.plot(*zip(*points, strict=True), marker=".", label=name)
    _finish(axis, title, "epoch")


def _validation(axis: Any, rows: Sequence[Row]) -> None:
    """Draw both phases one after the other, with a line where the second phase begins."""
    rows = [row for row in rows if row["split"] == "valid"]
    shift = max((row["epoch"] for row in rows if row["phase"] == "spt"), default=0)
    places = [row["epoch"] + (shift if row["phase"] == "rpt" else 0) for row in rows]
    for name in ("recall@10", "ndcg@10"):
        axis.plot(places, [row[name] for row in rows], marker=".", label=name)
    if shift and any(row["phase"] == "rpt" for row in rows):
        axis.axvline(shift, color="grey", linestyle="--", label="RPT begins")
    _finish(axis, "Validation, history not masked", "epoch")


def _depths(axis: Any, rows: Sequence[Row]) -> None:
    for phase in PHASES:
        tested = [row for row in rows if (row["phase"], row["split"]) == (phase, "test")]
        for name, style in (("recall@10", "-"), ("ndcg@10", "--")):
            if tested:
                depths = [row["test_T"] for row in tested]
                axis.plot(depths, [row[name] for row in tested], style, marker="o", label=f"{phase} {name}")
    for row in rows:
        if row["phase"] == "markov" and row["split"] == "test":
            axis.axhline(row["ndcg@10"], color="grey", linestyle=":", label="Markov chain ndcg@10")
    _finish(axis, "Test quality against T, history not masked", "reasoning steps T")


def _finish(axis: Any, title: str, x: str) -> None:
    axis.set_title(title, fontsize=10)
    axis.set_xlabel(x)
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.grid(alpha=0.3)
    if axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize=8)
    else:
        axis.text(0.5, 0.5, "no data yet", ha="center", transform=axis.transAxes)
