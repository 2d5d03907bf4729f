"""The steps of a phase: loss, gradient, update of the weights, and the numbers that a step leaves behind.

On the CPU the numbers of a step are checked before its update. On a GPU the host reads them once in many steps, so that it
does not wait. There the device itself keeps a step that is not finite, and all steps after it, from the weights.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lares_fast._memory import free_bytes
from lares_fast._random import Key
from lares_fast.train.device_log import DeviceLog
from lares_fast.train.graphs import Capture, Graphs, capture_on, sent
from lares_fast.train.optimizer import set_rate
from lares_fast.train.padding import EXACT, Padding
from lares_fast.train.parcel import Parcel
from lares_fast.train.phases import Phase
from lares_fast.train.run import Run
from lares_fast.train.schedule import is_constant, learning_rate, most_steps

# The host reads the numbers of a GPU after so many steps, or after so many seconds.
STEPS_AHEAD, SECONDS_AHEAD = 50, 1.0

# The training rows of a batch [B], and the key of all that is random in it.
Part = tuple[Tensor, Key]


class Steps:
    """The steps of ``phase`` on the CPU."""

    def __init__(self, run: Run, phase: Phase, optimizer: torch.optim.Adam) -> None:
        self.run, self.phase, self.optimizer = run, phase, optimizer
        self._names: tuple[str, ...] = ()
        self._most = most_steps(phase.settings, len(phase.rows))

    @property
    def due(self) -> bool:
        """Whether the numbers of the last steps should be read now."""
        return True

    def prepare(self, parts: Sequence[Part]) -> Any:
        """Return the batches of one step, in the form that :meth:`make` takes."""
        return tuple(self.phase.batch(index, key) for index, key in parts)

    def make(self, batches: Any, save: Callable[[], None] | None) -> None:
        """Do one step. ``save`` is called before the update, when the loss has shown that the weights are sound.

        Raises :class:`NotFiniteError` if the loss or the gradient is not finite. The weights then stay as they are.
        """
        numbers = self._numbers(batches)
        found = torch.stack([value.to(numbers[0].device, torch.float64) for value in numbers]).tolist()
        self._check(found)
        if save is not None:
            save()
        self._set_rate(self.run.state.progress.steps)
        self.optimizer.step()
        # Gradients are as large as the weights. Evaluation, and the loss of the next step, can use their memory.
        self.optimizer.zero_grad(set_to_none=True)
        self._add(found)

    def read(self) -> None:
        """Add the numbers of all steps to the progress of the run. Raises the errors of :meth:`make`."""

    def _set_rate(self, step: int) -> None:
        """Set the learning rate of step number ``step`` of the phase, counted from 0."""
        if not is_constant(self.phase.settings):
            set_rate(self.optimizer, self._rate(step), self.run.device)

    def _rate(self, step: int) -> float:
        return learning_rate(self.phase.settings, step, self._most)

    def _numbers(self, batches: Sequence[Any]) -> list[Tensor]:
        """Compute the mean gradient of all rows, clipped. Return its norm before, the loss and the parts of the loss."""
        self.optimizer.zero_grad(set_to_none=True)
        rows, means = sum(map(len, batches)), list[Tensor]()
        for batch in batches:
            loss = self.phase(batch)
            self._names = ("loss", *self.phase.parts)
            values = [loss.detach(), *self.phase.parts.values()]
            if len(batches) > 1:
                share = len(batch) / rows
                loss, values = loss * share, [value * share for value in values]
            loss.backward()
            means = [torch.add(*pair) for pair in zip(means, values, strict=True)] if means else values
        parameters = [each for each in self.run.model.parameters() if each.grad is not None]
        norm = torch.nn.utils.get_total_norm([each.grad for each in parameters if each.grad is not None])
        if (most := self.phase.settings.clip_norm) is not None:
            torch.nn.utils.clip_grads_with_norm_(parameters, most, norm)
        return [value.detach() for value in (norm, *means)]

    def _check(self, numbers: list[float]) -> None:
        """Raise :class:`NotFiniteError` unless the norm of the gradient and the loss, the first of ``numbers``, are finite."""
        norm, loss, *_ = numbers
        if not math.isfinite(loss) or not math.isfinite(norm):
            raise self.run.diverged(f"the loss is {loss} and the norm of its gradient {norm}")

    def _add(self, numbers: list[float]) -> None:
        """Add the numbers of a step to the progress of the run."""
        norm, *values = numbers
        rate = self._rate(self.run.state.progress.steps)
        self.run.add_step(dict(zip(self._names, values, strict=True)), grad_norm=norm, lr=rate)


class DeviceSteps(Steps):
    """The steps of ``phase`` on a GPU. ``log`` is the log there, and ``capture`` captures graphs (``None``: no graphs).

    All steps run in a block ``stream()``.
    """

    def __init__(
        self,
        run: Run,
        phase: Phase,
        optimizer: torch.optim.Adam,
        log: DeviceLog,
        capture: Capture | None,
        stream: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        super().__init__(run, phase, optimizer)
        self._stream = stream
        self._log, self._padding = log, Padding.of(phase.sizes(), run.model.config.mean_depth)
        self._graphs = Graphs(self._step, run.device, capture, lambda text: run.events.record("notice", text=text))
        self._unread, self._read_at = 0, time.monotonic()
        # The numbers of the steps since the last reading.
        self._rows: Tensor | None = None
        # 0 while all norms and all losses were finite, else NaN for ever.
        self._poison = torch.zeros(2, device=run.device)
        # 1 if there is a NaN. The optimizer then leaves the weights as they are.
        self._found = torch.zeros((), device=run.device)
        optimizer.found_inf = self._found  # type: ignore[attr-defined]

    @property
    def due(self) -> bool:
        """Whether the numbers of the last steps should be read now."""
        return self._unread >= STEPS_AHEAD or time.monotonic() - self._read_at > SECONDS_AHEAD

    def prepare(self, parts: Sequence[Part]) -> Any:
        """Return the batches of one step as one buffer, with padding if all are full batches, and whether they are."""
        settings = self.phase.settings
        full = sum(len(index) for index, _ in parts) == settings.accumulate * settings.batch_size
        batches: list[Any] = [self.phase.places(index, key, self._padding if full else EXACT) for index, key in parts]
        content = tuple(
            replace(batch, inputs=self._log.before(batch.inputs), mean_depth=batch.mean_depth.float()) for batch in batches
        )
        # The row of _rows that takes the numbers of this step.
        slot = torch.tensor([self._unread])
        return Parcel((slot, content), pinned=self.run.device.type == "cuda"), full

    def make(self, batches: Any, save: Callable[[], None] | None) -> None:
        """Do one step. With ``save`` the host waits for the numbers of the step before its update."""
        with self._stream():
            self._make(batches, save)

    def _make(self, batches: Any, save: Callable[[], None] | None) -> None:
        parcel, full = batches
        self._set_rate(self.run.state.progress.steps + self._unread)
        if save is None:
            self._graphs.run(parcel, captured=full)
            self._unread += 1
            return
        slot = self._unread
        self.read()
        numbers = self._gradient(parcel.opened(sent(parcel.host, self.run.device)))[slot].tolist()
        self._check(numbers)
        save()
        self.optimizer.step()
        self._add(numbers)

    def read(self) -> None:
        """Wait for the numbers of all steps, and add them to the progress of the run."""
        rows = [] if self._rows is None else self._rows[: self._unread].tolist()
        self._unread, self._read_at = 0, time.monotonic()
        for row in rows:
            self._check(row)
            self._add(row)

    def _step(self, content: Any) -> None:
        self._gradient(content)
        self.optimizer.step()

    def _gradient(self, content: Any) -> Tensor:
        """Compute the gradient of the batches in ``content``, and return the numbers of all unread steps. Nothing waits."""
        slot, batches = content
        batches = [replace(batch, inputs=self._log.after(batch.inputs)) for batch in batches]
        numbers = torch.stack([value.float() for value in self._numbers(batches)])
        if self._rows is None:
            self._rows = numbers.new_zeros(STEPS_AHEAD, len(numbers))
        self._rows.index_copy_(0, slot, numbers[None])
        # 0 times a number that is not finite is NaN.
        self._poison.addcmul_(numbers[:2], self._poison)
        torch.ne(self._poison.sum(), 0, out=self._found)
        return self._rows


def make_steps(run: Run, phase: Phase, optimizer: torch.optim.Adam) -> Steps:
    """Return the steps of ``phase`` on the device of ``run``."""
    if run.device.type == "cpu":
        return Steps(run, phase, optimizer)
    log = DeviceLog(run.log, run.device, free_bytes(run.device))
    if (capture := capture_on(run.device, run.model.backend)) is None:
        return DeviceSteps(run, phase, optimizer, log, None)
    return DeviceSteps(run, phase, optimizer, log, capture, capture.stream)
