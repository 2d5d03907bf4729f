"""One epoch of a phase: its steps, checkpoints within it, and its validation."""

from __future__ import annotations

import time
from typing import Any

from lares_fast._random import Key
from lares_fast.data import epoch_order
from lares_fast.train.keys import order_key, step_key
from lares_fast.train.phases import Phase
from lares_fast.train.run import Run
from lares_fast.train.schedule import steps_of_epoch
from lares_fast.train.steps import Part, Steps
from lares_fast.train.validation import validate


def train_epoch(run: Run, steps: Steps, key: Key) -> None:
    """Do the remaining steps of the current epoch, then validate and save. All random numbers depend on ``key``.

    Raises :class:`NotFiniteError` if the model diverges, and :class:`Interrupted` if a stop was requested.
    """
    progress, phase = run.state.progress, steps.phase
    settings = phase.settings
    batches = epoch_order(len(phase.rows), order_key(key)).split(settings.batch_size)
    parts = [(batch, step_key(key, number)) for number, batch in enumerate(batches)]
    last = steps_of_epoch(settings, len(phase.rows))
    if settings.max_steps is not None:
        last = min(last, progress.step + settings.max_steps - progress.steps)
    clock = _Clock(run)
    phase.train()
    for number in range(progress.step, last):
        first = number * settings.accumulate
        batch = clock.fetch(steps, parts[first : first + settings.accumulate])
        # The saved weights have shown that their next loss is finite, so a run can continue from them.
        steps.make(batch, clock.save if clock.save_is_due() else None)
        if number + 1 == last or run.events.stopping or steps.due:
            steps.read()
            clock.show_step(phase, last)
            run.events.raise_if_stopping()
    cost = {"seconds": progress.seconds, "data_wait": progress.data_wait()}
    # A stop during validation leaves the state at the epoch's last step. A resumed run validates again from there.
    validate(run, progress.epoch + 1, {**progress.means(), **cost})
    progress.end_epoch()
    run.save()


class _Clock:
    """Measures the time of an epoch, including its time before the run was resumed, and saves the run at intervals."""

    def __init__(self, run: Run) -> None:
        self._run, self._progress = run, run.state.progress
        self._began = self._saved = time.monotonic()
        self._earlier, self._first_step = self._progress.seconds, self._progress.step

    def fetch(self, steps: Steps, parts: list[Part]) -> Any:
        """Return the batches of one step, and count the time that their preparation takes."""
        began = time.monotonic()
        batch = steps.prepare(parts)
        self._progress.waited += time.monotonic() - began
        return batch

    def save_is_due(self) -> bool:
        """Return whether the last save was more than ``checkpoint_minutes`` ago."""
        return time.monotonic() - self._saved > 60 * self._run.config.checkpoint_minutes

    def save(self) -> None:
        """Save the run."""
        self._run.save()
        self._saved = time.monotonic()

    def show_step(self, phase: Phase, last: int) -> None:
        """Count the time of the step that has just been made, and show the step. The epoch has ``last`` steps."""
        progress, settings = self._progress, phase.settings
        elapsed = time.monotonic() - self._began
        progress.seconds = self._earlier + elapsed
        self._run.events.show(
            "step",
            phase=phase.name,
            epoch=progress.epoch + 1,
            epochs=settings.epochs,
            step=progress.step,
            steps=last,
            means=progress.means(),
            data_wait=progress.data_wait(),
            # A coarse clock may show no time at all.
            users_per_s=(progress.step - self._first_step) * settings.batch_size * settings.accumulate / max(elapsed, 1e-9),
        )
