"""The trainer: it runs both phases, stops early, saves checkpoints, and resumes interrupted runs.

Everything random is a function of (seed, phase, epoch, step), so a checkpoint holds no generator state. A run that is
interrupted after any step and resumed gives the bits of a run without the interruption, if the versions, the thread count, the
instruction set, the device and the backend are equal. On another device it gives numbers within the tolerance at first, and
then drifts apart as runs with other seeds do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from lares_fast._errors import InputError
from lares_fast._memory import allocating, enough_memory
from lares_fast._torch_state import require_defaults
from lares_fast.data import InteractionLog, Split
from lares_fast.model import LARES
from lares_fast.train import config_file
from lares_fast.train.config import PHASES, RunConfig, checked_phases, needs_start
from lares_fast.train.epoch import train_epoch
from lares_fast.train.events import Event, Interrupted
from lares_fast.train.keys import epoch_key, phase_key
from lares_fast.train.memory import require_memory
from lares_fast.train.phases import Phase, make_phase
from lares_fast.train.run import Run
from lares_fast.train.source import with_source
from lares_fast.train.state import RunState
from lares_fast.train.steps import make_steps
from lares_fast.train.validation import rank_baselines, rank_test_rows, tell_of_start, validate


class Trainer:
    """A run of one or both phases in the folder ``out``.

    The run writes its settings into config.yaml, with the settings that read ``log`` again if a file or
    :func:`lares_fast.data.synthetic_log` gave it. :attr:`config` has them, too.

    ``emit`` is called with each event, a dictionary whose entry ``event`` names its kind: progress bars and logs listen to
    it. It may call :meth:`request_stop`.
    """

    def __init__(
        self,
        config: RunConfig,
        log: InteractionLog,
        split: Split,
        out: str | Path,
        emit: Callable[[Event], None] = lambda _: None,
    ) -> None:
        """Set up a new run, or continue the run in ``out``.

        ``out`` may hold the state of an earlier run of the same model, data and seed that was interrupted or was shorter.
        :meth:`run` then continues it, and emits a ``changed`` event for every setting that has another value now.
        If ``state.pt`` is damaged or missing, the run continues from the checkpoint before it, and a ``notice`` event says so.
        Raises :class:`InputError` if both are damaged, if the state belongs to another run, or if a setting has changed that
        the state depends on. It is also raised if PyTorch's default dtype is not float32 or its default device not the CPU.
        """
        require_defaults()
        # The listener may change the working directory.
        self.config, self.log, self.split, self.out = with_source(config, log, split), log, split, Path(out).absolute()
        self._emit = emit
        self._start: Path | None = None
        # Whether an error has ended the run. Its model and its table of results may not fit each other.
        self._broken = False
        self._run = self._new_run()

    def _new_run(self) -> Run:
        # In inference mode, the model would be made of tensors that cannot be trained.
        with (
            torch.inference_mode(False),
            allocating("the model and its saved state", "lower model.hidden_size", "model.hidden_size"),
        ):
            run = Run(self.config, self.log, self.split, self.out, self._emit)
            if self._start is not None and not run.folder.has_state():
                run.start_from(self._start)
        return run

    @property
    def model(self) -> LARES:
        """The model in training."""
        return self._run.model

    @property
    def state(self) -> RunState:
        """The state of the run. Its ``history`` holds the rows of metrics.csv so far."""
        return self._run.state

    def request_stop(self) -> None:
        """Make :meth:`run` save its state after the current step and raise :class:`Interrupted`."""
        self._run.events.request_stop()

    def start_from(self, run: str | Path) -> None:
        """Start a new run from the best ``spt`` model of the run in the folder ``run``, which is not changed.

        Phase ``rpt`` can follow at once. Phase ``spt`` trains the model further, with a new optimizer, other random numbers
        and the settings of this run.
        Raises :class:`InputError` if the other run has another model or other data or no such model, or if this run has
        already begun.
        """
        start = Path(run).absolute()
        self._run.start_from(start)
        self._start = start

    def run(self, phases: Sequence[str]) -> list[dict[str, Any]]:
        """Train ``phases`` (of ``spt``, ``rpt``), test the best model of each, and return the rows of metrics.csv.

        ``rpt`` alone needs a folder with a finished ``spt`` phase, or :meth:`start_from`. While this method runs, no other run
        can write into the folder. It trains in inference mode and under ``torch.no_grad()``, too.
        Raises :class:`InputError` for another phase, for a folder that is in use, for a phase that needs more memory than is
        free, and for a model that diverges; its state is not saved then. It is also raised for a default dtype or device as in
        :meth:`__init__`. After any error, also one of the listener, this method continues from the last saved state, as a new
        trainer would, with a new :attr:`model`.
        """
        require_defaults()
        wanted = checked_phases(phases)
        if self._broken:
            self._run, self._broken = self._new_run(), False
        run = self._run
        if all(map(needs_start, wanted)) and not needs_start(run.state.phase) and not run.best:
            raise InputError(f"{self.out} holds no model of phase spt: run --phase spt or both first.")
        left = [phase for phase in PHASES[PHASES.index(run.state.phase) :] if phase in wanted and not self._is_over(phase)]
        # Settings that config.yaml cannot hold are refused before anything is written.
        settings = config_file.dump(self.config)
        require_memory(self.config, self.log, self.split, left, run.device, run.held_bytes())
        with run.folder.holding(tell=lambda text: run.news.append({"event": "notice", "text": text})):
            run.folder.write_config(settings)
            # The listener may write files of its own now.
            run.events.show("begin")
            try:
                with (
                    torch.inference_mode(False),
                    torch.enable_grad(),
                    allocating("the run", "end other programs, or choose a smaller model or a smaller log"),
                ):
                    self._train(wanted)
            except Interrupted:
                run.save()
                run.events.forget_stop()
                raise
            except BaseException:
                self._broken = True
                raise
        return run.state.history

    def _is_over(self, phase: str) -> bool:
        """Return whether the current phase is ``phase`` and needs no further step."""
        state = self._run.state
        return phase == state.phase and not state.progress.step and state.progress.is_over(getattr(self.config, phase))

    def _train(self, wanted: set[str]) -> None:
        run = self._run
        run.mend_folder()
        while run.news:
            run.events.record(**run.news.pop(0))
        rank_baselines(run)
        for phase in PHASES:
            if phase not in wanted:
                continue
            if PHASES.index(run.state.phase) > PHASES.index(phase):
                if len(wanted) == 1:
                    run.events.record("notice", text=f"phase {phase} is finished in {self.out}: there is nothing to train.")
                continue
            if phase != run.state.phase:
                with allocating("the frozen model of phase rpt", "lower model.hidden_size", "model.hidden_size"):
                    run.enter(phase)
            setting = f"{phase}.batch_size"
            with enough_memory(getattr(self.config, phase).batch_size, setting, setting):
                _train_phase(run, make_phase(run))
                tell_of_start(run)
                if self.config.evaluation.test:
                    rank_test_rows(run)
        if run.best:
            run.export_best()


def _train_phase(run: Run, phase: Phase) -> None:
    progress = run.state.progress
    key = phase_key(run.key, phase.name, run.state.restarts)
    steps = make_steps(run, phase, run.make_optimizer(phase.settings))
    if progress.best_value < 0 and (needs_start(phase.name) or run.best):
        # The model that the phase starts from gives the first best value.
        validate(run, epoch=0, means={})
    if not run.folder.has_state():
        # A run that diverges in its first epoch goes back to this state.
        run.save()
    # An interrupted epoch ends with its validation even if it has made the last step of the phase.
    while progress.step or not progress.is_over(phase.settings):
        train_epoch(run, steps, epoch_key(key, progress.epoch))
