"""The pictures of docs/results.md."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

from benchmarks.reproduction.experiments import Experiment
from benchmarks.reproduction.runs import USUAL, Run

matplotlib.use("svg")
matplotlib.rcParams["svg.hashsalt"] = "lares_fast"
from matplotlib import pyplot  # noqa: E402 - the backend comes first


def picture(kind: str, data: str = "") -> str:
    """The path of a picture as docs/results.md names it."""
    return f"results/{kind}{'-' + data.split('.')[0].lower() if data else ''}.svg"


def draw(runs: dict[str, Run], experiments: Sequence[Experiment], folder: Path) -> None:
    """The pictures of the runs, as SVG files in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    shown = [runs[experiment.name] for experiment in experiments if runs[experiment.name].phases()]
    for data in dict.fromkeys(run.experiment.data for run in shown):
        of_data = [run for run in shown if run.experiment.data == data and run.experiment.section in ("main", "rival")]
        if of_data:
            _draw_curves(of_data, folder / Path(picture("curves", data)).name)
    ablations = [run for run in shown if run.experiment.section == "ablation"]
    if ablations:
        _draw_curves(ablations, folder / Path(picture("ablations")).name)
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    drawn = False
    for run in (run for run in shown if run.experiment.section == "main"):
        history = USUAL[run.experiment.data]
        for phase in run.phases():
            if rows := run.tested(phase, history):
                drawn = True
                label = f"{run.experiment.name} after {phase.upper()}, {history}"
                axes.plot([row["test_T"] for row in rows], [row["ndcg@10"] for row in rows], marker=".", label=label)
    if drawn:
        _finish(figure, axes, "steps T at test time", "test NDCG@10", folder / Path(picture("depth")).name)
    pyplot.close(figure)


def _draw_curves(runs: Sequence[Run], path: Path) -> None:
    """Validation NDCG@10 by epoch; the epochs of phase 2 stand behind those of phase 1."""
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    for run in runs:
        history = USUAL[run.experiment.data]
        before, colour = 0, None
        for phase in run.phases():
            rows = run.validated(phase, history)
            label = f"{run.experiment.name}, {history}" if colour is None else None
            style = {"spt": "-", "rpt": ":"}[phase]
            places = [before + row["epoch"] for row in rows]
            (line,) = axes.plot(places, [row["ndcg@10"] for row in rows], style, marker=".", color=colour, label=label)
            before, colour = before + int(rows[-1]["epoch"]), line.get_color()
    _finish(figure, axes, "epoch (dotted: phase 2)", "validation NDCG@10", path)
    pyplot.close(figure)


def _finish(figure: Any, axes: Any, x: str, y: str, path: Path) -> None:
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, metadata={"Date": None})
