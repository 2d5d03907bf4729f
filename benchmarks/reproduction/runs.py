"""Read run folders, and copy the files that describe a run."""

from __future__ import annotations

import csv
import re
from collections import defaultdict
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from benchmarks.reproduction.experiments import Experiment
from benchmarks.reproduction.runner import FINISHED, RECORD, RUNNING, is_finished, is_trained, read_record
from lares_fast._files import write_text
from lares_fast.train.evaluate import MASKED, NOT_MASKED

_PHASES = ("spt", "rpt")

# The ranking that publications report for a log. For logs that are not listed, items of the history are not masked.
USUAL = defaultdict(lambda: NOT_MASKED, {"Beauty.txt": MASKED})

Row = dict[str, Any]


def collect(runs: Path, copies: Path, experiments: Sequence[Experiment]) -> None:
    """Copy the settings, the metrics and the record of each run from ``runs`` to ``copies``, but no data and no model."""
    for experiment in experiments:
        source, target = runs / experiment.name, copies / experiment.name
        if not (source / "metrics.csv").is_file():
            continue
        target.mkdir(parents=True, exist_ok=True)
        # The folder of the data has no meaning elsewhere. The checksum in the first line no longer fits when it is replaced.
        settings = re.sub(r"\A#.*\n", "", (source / "config.yaml").read_text())
        settings = re.sub(r"(?m)^(  path: ).*$", rf"\g<1>{experiment.data}", settings)
        write_text(target / "config.yaml", settings)
        for name in ("metrics", *experiment.evaluations):
            if (source / f"{name}.csv").is_file():
                write_text(target / f"{name}.csv", (source / f"{name}.csv").read_text())
        if (source / RECORD).is_file():
            write_text(target / RECORD, (source / RECORD).read_text())


class Run:
    """The results in the run folder of ``experiment``. If the folder does not exist, the run has not begun."""

    def __init__(self, experiment: Experiment, folder: Path) -> None:
        self.experiment, self.folder = experiment, folder
        self.evaluations = list(experiment.evaluations)

    @cached_property
    def rows(self) -> list[Row]:
        """Return the rows of metrics.csv."""
        return _read(self.folder / "metrics.csv")

    @cached_property
    def record(self) -> dict[str, Any]:
        """Return the record that the runner wrote."""
        return read_record(self.folder)

    @property
    def state(self) -> str:
        """Return the state of the run in words."""
        if is_finished(self.experiment, self.folder):
            return FINISHED
        if is_trained(self.experiment, self.record):
            return "trained, evaluations not finished"
        sittings = self.record.get("sittings", [])
        if not sittings:
            return "not finished" if self.rows else "not begun"
        if sittings[-1]["ended"] == RUNNING:
            return "running, or cut without notice"
        return (
            "finished under other settings" if sittings[-1]["ended"] == FINISHED else f"not finished: {sittings[-1]['ended']}"
        )

    def phases(self) -> list[str]:
        """Return the phases that have validation rows."""
        return [phase for phase in _PHASES if self._rows(phase, "valid")]

    def validated(self, phase: str, history: str) -> list[Row]:
        """Return the validation rows, one for each epoch."""
        return [row for row in self._rows(phase, "valid") if row["history"] == history]

    def tested(self, phase: str, history: str) -> list[Row]:
        """Return the test rows, one for each T; a baseline has one row."""
        return [row for row in self._rows(phase, "test") if row["history"] == history]

    def at_own_depth(self, phase: str, history: str) -> Row | None:
        """Return the test row of the T that validation used."""
        tested = self.tested(phase, history)
        return next((row for row in tested if row["test_T"] == float(self.setting("mean_depth"))), None)

    def final(self, history: str) -> Row | None:
        """Return :meth:`at_own_depth` of the last phase that was tested. The row's ``phase`` names it."""
        tested = [row for phase in self.phases() if (row := self.at_own_depth(phase, history))]
        return tested[-1] if tested else None

    def evaluated(self, name: str, history: str) -> list[Row]:
        """Return the model's rows of an evaluation's file."""
        return [row for row in _read(self.folder / f"{name}.csv") if row.get("test_T") and row["history"] == history]

    def epochs(self, phase: str) -> tuple[int, int]:
        """Return (number of epochs, best epoch by the ranking that early stopping watched)."""
        watched = self.validated(phase, MASKED if self.setting("watch_masked", "false") == "true" else NOT_MASKED)
        # If epochs are equally good, the run stores the last one.
        best = max(watched, key=lambda row: (row["ndcg@10"], row["epoch"]))
        return int(watched[-1]["epoch"]), int(best["epoch"])

    def validation(self, phase: str, history: str) -> tuple[int, float]:
        """Return (best epoch, its NDCG@10 in the ranking ``history``)."""
        best = self.epochs(phase)[1]
        return best, next(row["ndcg@10"] for row in self.validated(phase, history) if row["epoch"] == best)

    def training_seconds(self, phase: str) -> float:
        """Return the seconds of all training steps, without validation."""
        return sum(row.get("seconds", 0.0) for row in self.validated(phase, MASKED))

    def setting(self, name: str, default: str = "") -> str:
        """Return the text of a setting whose name occurs once in config.yaml."""
        found = re.search(rf"(?m)^ *{name}: (.*)$", (self.folder / "config.yaml").read_text())
        return found[1] if found else default

    def _rows(self, phase: str, split: str) -> list[Row]:
        return [row for row in self.rows if (row["phase"], row["split"]) == (phase, split)]


def _read(file: Path) -> list[Row]:
    """Return the rows of a CSV file, with numbers as floats and without empty cells; [] if there is no file."""
    if not file.is_file():
        return []
    with file.open() as lines:
        return [{name: _value(text) for name, text in row.items() if text} for row in csv.DictReader(lines)]


def _value(text: str) -> Any:
    try:
        return float(text)
    except ValueError:
        return text
