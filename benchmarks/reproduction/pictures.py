"""Draw the pictures of docs/results.md and docs/choosing-t.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

from benchmarks.reproduction.experiments import Experiment
from benchmarks.reproduction.runs import USUAL, Run
from lares_fast._files import atomic_write

matplotlib.use("svg")
matplotlib.rcParams["svg.hashsalt"] = "lares_fast"
from matplotlib import pyplot  # noqa: E402 - the backend comes first

# Runs that differ in the mean of T alone.
MEAN_DEPTHS = {"ablation-mean-2": "mean T 2", "ablation-none": "mean T 4", "ablation-mean-8": "mean T 8"}


def picture(kind: str, data: str = "") -> str:
    """Return the path of a picture as the pages name it."""
    return f"results/{kind}{'-' + data.split('.')[0].lower() if data else ''}.svg"


def draw(runs: dict[str, Run], experiments: Sequence[Experiment], folder: Path) -> None:
    """Draw the pictures of the runs as SVG files into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    shown = [runs[experiment.name] for experiment in experiments if runs[experiment.name].phases()]
    for data in dict.fromkeys(run.experiment.data for run in shown):
        of_data = [run for run in shown if run.experiment.data == data and run.experiment.section in ("main", "rival")]
        if of_data:
            _draw_curves(of_data, folder / Path(picture("curves", data)).name)
    ablations = [run for run in shown if run.experiment.section == "ablation"]
    if ablations:
        _draw_curves(ablations, folder / Path(picture("ablations")).name)
    main = [run for run in shown if run.experiment.section == "main"]
    tested = [run for run in main if any(run.tested(phase, USUAL[run.experiment.data]) for phase in run.phases())]
    if tested:
        _draw_depth(tested, folder / Path(picture("depth")).name)
        _draw_depth(tested, folder / Path(picture("choosing-t")).name, relative=True)
    means = [runs[name] for name in MEAN_DEPTHS if name in runs and runs[name].phases()]
    if means:
        _draw_curves(means, folder / Path(picture("mean-depth")).name, MEAN_DEPTHS)


def _draw_depth(runs: Sequence[Run], path: Path, *, relative: bool = False) -> None:
    """Draw test NDCG@10 against T, in absolute numbers or as a share of NDCG@10 at the largest T."""
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    for run in runs:
        history = USUAL[run.experiment.data]
        for phase in run.phases():
            rows = run.tested(phase, history)
            if not rows:
                continue
            scale = 100 / rows[-1]["ndcg@10"] if relative else 1
            label = f"{run.experiment.name} after {phase.upper()}, {history}"
            axes.plot([row["test_T"] for row in rows], [scale * row["ndcg@10"] for row in rows], marker=".", label=label)
    y = "test NDCG@10, % of its value at the largest T" if relative else "test NDCG@10"
    _finish(figure, axes, "steps T at test time", y, path)


def _draw_curves(runs: Sequence[Run], path: Path, labels: Mapping[str, str] | None = None) -> None:
    """Draw validation NDCG@10 by epoch; the epochs of phase 2 follow the epochs of phase 1."""
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    for run in runs:
        history = USUAL[run.experiment.data]
        before, colour = 0, None
        for phase in run.phases():
            rows = run.validated(phase, history)
            name = (labels or {}).get(run.experiment.name, run.experiment.name)
            label = f"{name}, {history}" if colour is None else None
            style = {"spt": "-", "rpt": ":"}[phase]
            places = [before + row["epoch"] for row in rows]
            (line,) = axes.plot(places, [row["ndcg@10"] for row in rows], style, marker=".", color=colour, label=label)
            before, colour = before + int(rows[-1]["epoch"]), line.get_color()
    dotted = " (dotted: phase 2)" if any("rpt" in run.phases() for run in runs) else ""
    _finish(figure, axes, f"epoch{dotted}", "validation NDCG@10", path)


def _finish(figure: Any, axes: Any, x: str, y: str, path: Path) -> None:
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    atomic_write(path, lambda out: figure.savefig(out, format="svg", metadata={"Date": None}))
    pyplot.close(figure)
