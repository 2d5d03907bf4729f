"""Write results.svg and report.html into the folder of a run while it trains."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from lares_fast._errors import InputError, LaresFastError, MissingExtraError, printable
from lares_fast._files import write_text
from lares_fast._memory import require_room
from lares_fast.cli.console import Event, notice
from lares_fast.cli.plots import sheet, step_values
from lares_fast.cli.report_page import page
from lares_fast.train import Trainer
from lares_fast.train.advice import about_results
from lares_fast.train.evaluate import MASKED, NOT_MASKED
from lares_fast.train.files import REPORT, SHEET
from lares_fast.train.results import Row

_REDRAW_SECONDS = 60
# A plot and its libraries take less.
_DRAWING = 192 * 2**20


class Pictures:
    """A listener that draws after a validation, but at most once a minute, because a plot takes a second.

    ``rows_of`` turns the history of the run into the rows of the results table. ``details`` has the other arguments of
    :func:`lares_fast.cli.report_page.page`.
    """

    def __init__(self, trainer: Trainer, title: str, rows_of: Callable[[list[Row]], list[Row]], **details: Any) -> None:
        self._trainer, self._title, self._rows_of, self._details = trainer, title, rows_of, details
        self._drawn = time.monotonic()
        self._possible = True
        self._watched = MASKED if trainer.config.evaluation.watch_masked else NOT_MASKED

    def __call__(self, event: Event) -> None:
        """Take an event of the run."""
        if event["event"] == "valid" and time.monotonic() - self._drawn > _REDRAW_SECONDS:
            self.draw()

    def draw(self) -> None:
        """Write both files. What prevents it is told on stderr, because no picture is worth a run."""
        self._drawn = time.monotonic()
        if not self._possible:
            return
        try:
            # NumPy's OpenBLAS ends the process if it gets no memory.
            require_room(_DRAWING, f"{SHEET} is not drawn, because it")
        except InputError as error:
            notice(str(error))
            return
        out, history = self._trainer.out, self._trainer.state.history
        try:
            picture = sheet(history, step_values(out), self._title, self._watched)
        except MissingExtraError as error:
            self._possible = False
            notice(str(error))
            return
        except LaresFastError:
            raise
        except Exception as error:
            notice(printable(f"{SHEET} is not drawn, because matplotlib raised {type(error).__name__}: {error}"))
            return
        write_text(out / SHEET, picture)
        notes = about_results(history, self._watched)
        text = page(title=self._title, notes=notes, sheet=picture, rows=self._rows_of(history), **self._details)
        write_text(out / REPORT, text)
