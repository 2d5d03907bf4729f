"""The results sheet of a run: validation and test quality, the time of T steps, and the training values of each step."""

from __future__ import annotations

import csv
import io
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lares_fast._errors import printable, require
from lares_fast._files import content
from lares_fast.train.config import PHASES
from lares_fast.train.evaluate import MASKED, NOT_MASKED
from lares_fast.train.files import steps_file
from lares_fast.train.results import MILLISECONDS, WATCHED, Row

# One colour for each kind of number.
_NDCG, _LOSS, _REWARD, _KL, _TIME, _FLOOR = "#1f5fa8", "#b3541e", "#2e7d4f", "#7a4fa3", "#8a6d1d", "#666666"
_HISTORY_STYLES = {NOT_MASKED: "-", MASKED: (0, (4, 2))}
_PHASE_NAMES = {"spt": "phase 1", "rpt": "phase 2"}
_PHASE_MARKERS = {"spt": "o", "rpt": "s"}
_FLOOR_STYLES = {"popularity": (0, (1, 2)), "markov": (0, (3, 1, 1, 1))}
# Lines of steps are drawn with so many points at most, each the mean of some steps.
_POINTS = 200

Columns = Mapping[str, list[float]]


def sheet(history: Sequence[Row], steps: Mapping[str, Columns], title: str, watched: str = NOT_MASKED) -> str:
    """Return the sheet as SVG text. The same numbers give the same text.

    ``history`` holds the rows of metrics.csv, and ``steps`` the columns of :func:`step_values` for each phase. ``watched`` is
    the treatment of the history that chooses the best epoch.
    Raises :class:`MissingExtraError` without matplotlib.
    """
    matplotlib = require("matplotlib", "train", "results.svg")
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    # A matplotlibrc file of the user may have LaTeX, other fonts or other sizes.
    with matplotlib.rc_context(), warnings.catch_warnings():
        # A letter that the font lacks is drawn as a box.
        warnings.simplefilter("ignore")
        matplotlib.rcdefaults()
        matplotlib.rcParams.update({"svg.hashsalt": "lares_fast", "axes.spines.top": False, "axes.spines.right": False})
        two = bool(steps.get("rpt"))
        figure = Figure(figsize=(12, 10.5 if two else 7.5), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.subplots(3 if two else 2, 2)
        _validation(axes[0, 0], history, watched)
        _quality(axes[0, 1], history)
        _steps(axes[1, 0], steps.get("spt", {}), ("loss", "ce", "trajectory", "step"), "Phase 1: loss by step", "loss", _LOSS)
        _time(axes[1, 1], history)
        if two:
            _steps(axes[2, 0], steps["rpt"], ("reward",), "Phase 2: mean reward by step", "reward", _REWARD)
            _steps(axes[2, 1], steps["rpt"], ("kl",), "Phase 2: KL term by step", "nats", _KL)
        # A name may have dollar signs, which are no formula.
        figure.suptitle(printable(title, 200), parse_math=False, fontsize=13)
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()


def step_values(folder: Path) -> dict[str, Columns]:
    """Return the columns of the files of steps in ``folder``, as means of equally many steps, for each phase that has steps."""
    found = {phase: _columns(content(folder / steps_file(phase)).decode(errors="replace")) for phase in PHASES}
    return {phase: columns for phase, columns in found.items() if columns.get("number")}


def _columns(text: str) -> Columns:
    rows = []
    for row in csv.DictReader(io.StringIO(text)):
        try:
            rows.append({name: float(value) for name, value in row.items()})
        except (TypeError, ValueError):
            # A line is damaged or half written.
            continue
    if not rows:
        return {}
    each = -(-len(rows) // _POINTS)
    groups = [rows[start : start + each] for start in range(0, len(rows), each)]
    return {name: [sum(row[name] for row in group) / len(group) for group in groups] for name in rows[0]}


def _validation(axis: Any, history: Sequence[Row], watched: str) -> None:
    """Draw both phases one after the other, with the best epoch of each and the baselines."""
    rows = [row for row in history if row["split"] == "valid"]
    before = 0
    for phase in PHASES:
        last = before
        for treatment, style in _HISTORY_STYLES.items():
            found = [row for row in rows if (row["phase"], row["history"]) == (phase, treatment)]
            if not found:
                continue
            places, values = [before + row["epoch"] for row in found], [row[WATCHED] for row in found]
            marker, label = _PHASE_MARKERS[phase], f"{_PHASE_NAMES[phase]}, history {treatment}"
            axis.plot(places, values, linestyle=style, color=_NDCG, marker=marker, markersize=3.5, linewidth=1.4, label=label)
            if treatment == watched:
                best = max(range(len(values)), key=lambda i: (values[i], i))
                axis.plot(places[best], values[best], marker="*", color="#d1a000", markersize=13, mec="black", zorder=5)
            last = max(last, *places)
        if phase != PHASES[-1] and any(row["phase"] == PHASES[-1] for row in rows):
            axis.axvline(last, color="#bbbbbb", linewidth=1)
            place: dict[str, Any] = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points"}
            axis.annotate("phase 2", (last, 0.0), (4, 4), fontsize=8, color=_FLOOR, **place)
        before = last
    _floors(axis, rows)
    _finish(axis, "NDCG@10 of the validation users (stars: best epoch)", "epoch", "NDCG@10")


def _quality(axis: Any, history: Sequence[Row]) -> None:
    rows = [row for row in history if row["split"] == "test"]
    for phase, fill in (("spt", "none"), ("rpt", "full")):
        for treatment, style in _HISTORY_STYLES.items():
            found = [row for row in rows if (row["phase"], row["history"]) == (phase, treatment)]
            if found:
                x, y = [row["test_T"] for row in found], [row[WATCHED] for row in found]
                label = f"{_PHASE_NAMES[phase]}, history {treatment}"
                axis.plot(x, y, linestyle=style, color=_NDCG, marker="o", fillstyle=fill, markersize=5, label=label)
    _floors(axis, rows)
    _finish(axis, "NDCG@10 of the test users by number of steps T", "steps T", "NDCG@10")


def _floors(axis: Any, rows: Sequence[Row]) -> None:
    """Draw a line for each baseline, where the history is not masked."""
    for name, style in _FLOOR_STYLES.items():
        for row in rows:
            if (row["phase"], row["history"]) == (name, NOT_MASKED):
                axis.axhline(row[WATCHED], color=_FLOOR, linestyle=style, linewidth=1.2, label=f"baseline {name}")


def _time(axis: Any, history: Sequence[Row]) -> None:
    for phase, fill in (("spt", "none"), ("rpt", "full")):
        found = [row for row in history if (row["phase"], row["split"], row["history"]) == (phase, "test", NOT_MASKED)]
        found = [row for row in found if MILLISECONDS in row]
        if found:
            x, y = [row["test_T"] for row in found], [row[MILLISECONDS] for row in found]
            axis.plot(x, y, color=_TIME, marker="o", fillstyle=fill, markersize=5, label=_PHASE_NAMES[phase])
    if axis.lines:
        axis.set_ylim(bottom=0)
    _finish(axis, "Time to encode and rank one test user, in batches", "steps T", "milliseconds")


def _steps(axis: Any, columns: Columns, names: Sequence[str], title: str, unit: str, colour: str) -> None:
    styles = ("-", "--", ":", "-.")
    for name, style in zip(names, styles, strict=False):
        if name in columns:
            width = 1.6 if name == names[0] else 1.0
            axis.plot(columns["number"], columns[name], linestyle=style, color=colour, linewidth=width, label=name)
    _finish(axis, title, "step", unit)


def _finish(axis: Any, title: str, x: str, y: str) -> None:
    axis.set_title(title, fontsize=10.5, loc="left")
    axis.set_xlabel(x, fontsize=9)
    axis.set_ylabel(y, fontsize=9)
    axis.tick_params(labelsize=8)
    axis.grid(alpha=0.25, linewidth=0.6)
    # Epochs, steps and T are whole numbers, also if there is one of them only.
    low, high = axis.get_xlim()
    if high - low < 1:
        axis.set_xlim(round((low + high) / 2) - 1, round((low + high) / 2) + 1)
    axis.xaxis.get_major_locator().set_params(integer=True)
    handles = axis.get_legend_handles_labels()[0]
    if not handles:
        axis.text(0.5, 0.5, "no data yet", ha="center", transform=axis.transAxes, color=_FLOOR)
    elif len(handles) > 1:
        # The legend is below the axis, so that it covers no data.
        axis.legend(
            fontsize=7.5, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=3 if len(handles) > 4 else 4, frameon=False
        )
