"""One epoch of a phase: its steps, checkpoints within it, and its validation."""

from __future__ import annotations

import math
import time
from typing import Any

import torch

from lares_fast._random import Key
from lares_fast.data import epoch_order
from lares_fast.train.keys import order_key, step_key
from lares_fast.train.phases import Phase
from lares_fast.train.run import Run
from lares_fast.train.validation import validate


def train_epoch(run: Run, phase: Phase, optimizer: torch.optim.Optimizer, key: Key) -> None:
    """Do the remaining steps of the current epoch, then validate and save. All random numbers depend on ``key``.

    Raises :class:`NotFiniteError` if the model diverges, and :class:`Interrupted` if a stop was requested.
    """
    progress, settings = run.state.progress, phase.settings
    batches = epoch_order(len(phase.rows), order_key(key)).split(settings.batch_size)
    last = len(batches)
    if settings.max_steps is not None:
        last = min(last, progress.step + settings.max_steps - progress.steps)
    clock = _Clock(run)
    phase.train()
    while progress.step < last:
        batch = clock.fetch(phase, batches[progress.step], step_key(key, progress.step))
        parts = _loss_and_gradient(run, phase, optimizer, batch)
        # Here the saved weights have shown that their next loss is finite, so a run can continue from them.
        clock.save_if_due()
        optimizer.step()
        progress.add_step(parts)
        clock.show_step(phase, last)
        run.events.raise_if_stopping()
    cost = {"seconds": progress.seconds, "data_wait": progress.data_wait()}
    # A stop during validation leaves the state at the epoch's last step. A resumed run validates again from there.
    validate(run, progress.epoch + 1, {**progress.means(), **cost})
    progress.end_epoch()
    run.save()


def _loss_and_gradient(run: Run, phase: Phase, optimizer: torch.optim.Optimizer, batch: Any) -> dict[str, float]:
    """Compute the loss of ``batch`` and its gradient, and return the loss and its parts as numbers.

    Raises :class:`NotFiniteError` if the loss or the gradient is not finite.
    """
    loss = phase(batch)
    parts = phase.parts
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in run.model.parameters() if p.grad is not None])
    # All numbers come in one copy, before the step: a number that is not finite must not reach the weights.
    numbers = torch.stack([value.detach().to(norm.device, torch.float64) for value in (norm, loss, *parts.values())])
    size, *values = numbers.tolist()
    if not math.isfinite(values[0]) or not math.isfinite(size):
        raise run.diverged(f"the loss is {values[0]} and the norm of its gradient {size}")
    return dict(zip(("loss", *parts), values, strict=True))


class _Clock:
    """Measures the time of an epoch, including its time before the run was resumed, and saves the run at intervals."""

    def __init__(self, run: Run) -> None:
        self._run, self._progress = run, run.state.progress
        self._began = self._saved = time.monotonic()
        self._earlier, self._first_step = self._progress.seconds, self._progress.step

    def fetch(self, phase: Phase, index: torch.Tensor, key: Key) -> Any:
        """Return the batch of the rows ``index``, and count the time that its preparation takes."""
        began = time.monotonic()
        batch = phase.batch(index, key)
        self._progress.waited += time.monotonic() - began
        return batch

    def save_if_due(self) -> None:
        """Save the run if the last save was more than ``checkpoint_minutes`` ago."""
        if time.monotonic() - self._saved > 60 * self._run.config.checkpoint_minutes:
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
            users_per_s=(progress.step - self._first_step) * settings.batch_size / max(elapsed, 1e-9),
        )
