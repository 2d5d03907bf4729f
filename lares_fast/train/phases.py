"""The two phases of training, and how each is made from a run."""

from __future__ import annotations

from collections.abc import Callable

import torch

from lares_fast._errors import InputError
from lares_fast.data import Rows
from lares_fast.train.evaluate import keep_rankable
from lares_fast.train.keys import filter_key
from lares_fast.train.rpt import RPT
from lares_fast.train.run import Run
from lares_fast.train.spt import SPT

Phase = SPT | RPT


def make_phase(run: Run) -> Phase:
    """Return the current phase of ``run``."""
    return _MAKERS[run.state.phase](run)


def _spt(run: Run) -> SPT:
    return SPT(run.model, run.log, run.split.train, run.config.spt)


def _rpt(run: Run) -> RPT:
    assert run.start is not None
    rows = _rankable_rows(run) if run.config.rpt.data_filter else run.split.train
    return RPT(run.model, run.start, run.log, rows, run.config.rpt)


_MAKERS: dict[str, Callable[[Run], Phase]] = {"spt": _spt, "rpt": _rpt}


def _rankable_rows(run: Run) -> Rows:
    """Return the training rows that the filter keeps. The filter runs once, and the state of the run holds its result."""
    progress = run.state.progress
    if progress.kept is None:
        assert run.start is not None
        settings, rows = run.config.rpt, run.split.train
        kept = keep_rankable(
            run.start,
            run.log,
            rows,
            key_of_pass=lambda number: filter_key(run.key, number),
            passes=settings.filter_passes,
            top=settings.filter_top,
            batch_size=run.config.evaluation.batch_size,
            progress=run.events.progress("filter"),
        )
        if not len(kept):
            raise InputError(
                f"rpt.filter_top {settings.filter_top} leaves no training row: raise it or train spt longer.",
                setting="rpt.filter_top",
            )
        progress.kept = {"users": torch.from_numpy(kept.users), "ends": torch.from_numpy(kept.ends)}
        run.events.record("filtered", kept=len(kept), rows=len(rows))
        run.save()
    return Rows(progress.kept["users"].numpy(), progress.kept["ends"].numpy())
