"""The steps of a phase: loss, gradient, update of the weights, and the numbers that a step leaves behind.

On the CPU the numbers of a step are checked before its update. On a GPU the host reads them once in many steps, so that it
does not wait. There the device itself keeps a step that is not finite, and all steps after it, from the weights.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lares_fast._memory import free_bytes
from lares_fast._random import Key
from lares_fast.train.device_log import DeviceLog
from lares_fast.train.graphs import Capture, Graphs, capture_on, sent
from lares_fast.train.padding import EXACT, Padding
from lares_fast.train.parcel import Parcel
from lares_fast.train.phases import Phase
from lares_fast.train.run import Run

# The host reads the numbers of a GPU after so many steps, or after so many seconds.
STEPS_AHEAD, SECONDS_AHEAD = 50, 1.0


class Steps:
    """The steps of ``phase`` on the CPU."""

    def __init__(self, run: Run, phase: Phase, optimizer: torch.optim.Adam) -> None:
        self.run, self.phase, self.optimizer = run, phase, optimizer
        self._names: tuple[str, ...] = ()

    @property
    def due(self) -> bool:
        """Whether the numbers of the last steps should be read now."""
        return True

    def prepare(self, index: Tensor, key: Key) -> Any:
        """Return the batch of the training rows ``index`` [B], in the form that :meth:`make` takes."""
        return self.phase.batch(index, key)

    def make(self, batch: Any, save: Callable[[], None] | None) -> None:
        """Do one step. ``save`` is called before the update, when the loss has shown that the weights are sound.

        Raises :class:`NotFiniteError` if the loss or the gradient is not finite. The weights then stay as they are.
        """
        numbers = self._numbers(batch)
        values = self._checked(torch.stack([value.to(numbers[0].device, torch.float64) for value in numbers]).tolist())
        if save is not None:
            save()
        self.optimizer.step()
        # Gradients are as large as the weights. Evaluation, and the loss of the next step, can use their memory.
        self.optimizer.zero_grad(set_to_none=True)
        self.run.state.progress.add_step(values)

    def read(self) -> None:
        """Add the numbers of all steps to the progress of the run. Raises the errors of :meth:`make`."""

    def _numbers(self, batch: Any) -> list[Tensor]:
        """Compute the gradient. Return its norm, the loss and the parts of the loss, as scalars."""
        loss = self.phase(batch)
        parts = self.phase.parts
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self._names = ("loss", *parts)
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.run.model.parameters() if p.grad is not None])
        return [value.detach() for value in (norm, loss, *parts.values())]

    def _checked(self, numbers: list[float]) -> dict[str, float]:
        """Return the loss and its parts by name."""
        size, *values = numbers
        if not math.isfinite(values[0]) or not math.isfinite(size):
            raise self.run.diverged(f"the loss is {values[0]} and the norm of its gradient {size}")
        return dict(zip(self._names, values, strict=True))


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

    def prepare(self, index: Tensor, key: Key) -> Any:
        """Return the batch as one buffer, with padding if it is a full batch, and whether it is one."""
        full = len(index) == self.phase.settings.batch_size
        batch: Any = self.phase.places(index, key, self._padding if full else EXACT)
        content = replace(batch, inputs=self._log.before(batch.inputs), mean_depth=batch.mean_depth.float())
        # The row of _rows that takes the numbers of this step.
        slot = torch.tensor([self._unread])
        return Parcel((slot, content), pinned=self.run.device.type == "cuda"), full

    def make(self, batch: Any, save: Callable[[], None] | None) -> None:
        """Do one step. With ``save`` the host waits for the numbers of the step before its update."""
        with self._stream():
            self._make(batch, save)

    def _make(self, batch: Any, save: Callable[[], None] | None) -> None:
        parcel, full = batch
        if save is None:
            self._graphs.run(parcel, captured=full)
            self._unread += 1
            return
        slot = self._unread
        self.read()
        values = self._checked(self._gradient(parcel.opened(sent(parcel.host, self.run.device)))[slot].tolist())
        save()
        self.optimizer.step()
        self.run.state.progress.add_step(values)

    def read(self) -> None:
        """Wait for the numbers of all steps, and add them to the progress of the run."""
        rows = [] if self._rows is None else self._rows[: self._unread].tolist()
        self._unread, self._read_at = 0, time.monotonic()
        for row in rows:
            self.run.state.progress.add_step(self._checked(row))

    def _step(self, content: Any) -> None:
        self._gradient(content)
        self.optimizer.step()

    def _gradient(self, content: Any) -> Tensor:
        """Compute the gradient of the batch in ``content``, and return the numbers of all unread steps. Nothing waits."""
        slot, batch = content
        batch = replace(batch, inputs=self._log.after(batch.inputs))
        numbers = torch.stack([value.float() for value in self._numbers(batch)])
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
