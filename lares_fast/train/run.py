"""The parts of a run that its epochs, validations and phases share. This module also saves and resumes them."""

from __future__ import annotations

import copy
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lares_fast._device import resolve
from lares_fast._errors import InputError, with_path
from lares_fast._finite import NotFiniteError, all_finite
from lares_fast._memory import require_room
from lares_fast._model_folder import read_item_ids, read_model
from lares_fast._random import DrawFrom, root_key
from lares_fast._weights import Weights, weights_of
from lares_fast.config import ITEMS, MODEL, LARESConfig
from lares_fast.data import InteractionLog, Split
from lares_fast.model import LARES
from lares_fast.train import warm_start
from lares_fast.train.checkpoint import StateError, check_weights, load_into
from lares_fast.train.config import PhaseConfig, RunConfig, needs_start
from lares_fast.train.events import Event, Events, Listener
from lares_fast.train.files import NEWEST, OLDER, holds_run
from lares_fast.train.folder import RunFolder
from lares_fast.train.identity import ABOUT, identity_of, require_same
from lares_fast.train.keys import initial_weights_seed
from lares_fast.train.optimizer import adam, moments, saved_state
from lares_fast.train.resume import changed_data, environment, resume_events, settings_of
from lares_fast.train.state import Progress, RunState, SavedRun, load_run

# An import of PyTorch's compiler takes less.
_COMPILER = 224 * 2**20


def checked_device(config: RunConfig) -> torch.device:
    """Return the device that ``config`` names. Raises :class:`InputError` if it cannot be used, or not in this precision."""
    try:
        device = resolve(config.device)
    except InputError as error:
        raise InputError(str(error), setting="device") from None
    if config.precision != "fp32" and device.type == "cpu":
        raise InputError(
            f"precision {config.precision} needs a GPU, but device {config.device} is the CPU here: set precision to fp32, or "
            "choose a machine with a GPU.",
            setting="precision=fp32",
        )
    return device


class Run:
    """One training run.

    ``config, log, split``
        The settings and the data.
    ``folder, events``
        The run folder, and the channel for events and for a request to stop.
    ``device``
        Where the models are. Everything that is saved is on the CPU.
    ``key``
        The root of the run's random keys.
    ``model``
        The model in training.
    ``start``
        The frozen model that phase ``rpt`` started from, or ``None`` in phase ``spt``.
    ``state``
        The state of the run: its phase, its progress and its results so far.
    ``news``
        Events that came up before the folder was locked. They are recorded when training begins.
    """

    def __init__(self, config: RunConfig, log: InteractionLog, split: Split, out: Path, listener: Listener) -> None:
        """Set up a new run, or continue the run whose state is in the folder ``out``.

        Raises the errors of :class:`lares_fast.train.Trainer`.
        """
        self.config, self.log, self.split = config, log, split
        self.key = root_key(config.seed)
        model_config = LARESConfig.from_dict({**config.model, "n_items": log.n_items})
        if max(config.rpt.k, *config.evaluation.ks) > log.n_items - 1:
            raise InputError(f"rpt.k and evaluation.ks must be at most {log.n_items - 1}, the number of items.")
        self.device = checked_device(config)
        self.state = RunState(identity=identity_of(config, model_config, log, split))
        # The CPU draws the weights, so that they are the same on every device. Other threads may draw at the same time.
        with torch.device("cpu"), DrawFrom(torch.Generator().manual_seed(initial_weights_seed(self.key))):
            self.model = LARES(model_config, bf16=config.precision == "bf16")
        self.model.to(self.device)
        self.start: LARES | None = None
        self.news: list[Event] = []
        self.folder = RunFolder(out)
        self.events = Events(listener, self.folder)
        self._optimizer: torch.optim.Adam | None = None
        # The loaded state of the optimizer, until an optimizer takes it over.
        self._loaded_optimizer: dict[str, Any] | None = None
        # The loaded state, until the files of the folder have been compared with it.
        self._loaded: SavedRun | None = None
        if self.folder.has_state():
            self._resume(*self.folder.load())

    @property
    def best(self) -> Weights:
        """The best weights of the current phase; empty before its first validation."""
        return self.state.progress.best or {}

    def start_from(self, run: Path) -> None:
        """Take over the best ``spt`` model of the run in the folder ``run``. Raises the errors of ``Trainer.start_from``."""
        if self.folder.has_state() or self.state.progress.steps:
            raise InputError(
                f"{self.folder.path} holds a run already: a run that starts from another's model needs a new folder."
            )
        path = run / NEWEST
        if not holds_run(run) and (run / MODEL).is_file():
            return self._start_from_model(run)
        try:
            saved = load_run(path)
        except StateError as error:
            if not (run / OLDER).is_file():
                raise
            raise InputError(
                f"{path} {error.fault}: lares-fast train {with_path('--resume', run)} continues that run from {OLDER}; start "
                "from it then."
            ) from None
        # The other run may have any seed.
        theirs = {**saved.state.identity, "seed": self.config.seed}
        continues = warm_start.is_of_other_log(theirs, self.state.identity)
        if continues:
            warm_start.require_fit(theirs, self.state.identity, run)
        else:
            require_same(theirs, self.state.identity, run, "start from")
        weights = saved.start if needs_start(saved.state.phase) else saved.state.progress.best
        if not weights:
            raise InputError(f"{run} holds no model of phase spt: run --phase spt there first.")
        news: list[Event] = []
        if continues:
            ids, ours = warm_start.item_ids_of(run, theirs), self.log.item_ids.tolist()
            weights, counts = warm_start.carry_over(weights, ids, weights_of(self.model), ours, run)
            news = warm_start.told(run, counts)
        load_into(self.model, weights, path, "best")
        self.news += news
        self.state.progress.best = weights
        self.state.restarts = saved.state.restarts + 1

    def _start_from_model(self, folder: Path) -> None:
        """Take over a model that no run wrote, such as the one of ``LARES.save_pretrained``."""
        theirs, config, about = read_model(folder)
        ids, ours = read_item_ids(folder, about, config.n_items), self.log.item_ids.tolist()
        warm_start.require_model(config.to_dict(), self.state.identity["model"], folder)
        weights, counts = warm_start.carry_over(theirs, ids, weights_of(self.model), ours, folder)
        load_into(self.model, weights, folder / MODEL, "best")
        self.news += warm_start.told(folder, counts)
        self.state.progress.best, self.state.restarts = weights, 1

    def enter(self, phase: str) -> None:
        """Begin ``phase`` from the best model of the phase before it."""
        self.model.load_state_dict(self.best)
        self.start = copy.deepcopy(self.model)
        self._optimizer = self._loaded_optimizer = None
        self.state.phase, self.state.progress = phase, Progress()

    def make_optimizer(self, settings: PhaseConfig) -> torch.optim.Adam:
        """Return the optimizer of the current phase, which continues from the state that was loaded, if any."""
        if "torch._dynamo" not in sys.modules:
            require_room(_COMPILER, "PyTorch's compiler, which its optimizers import,")
        self._optimizer = adam(self.model, settings, self._optimizer_state(), self.folder.state_file)
        self._loaded_optimizer = None
        return self._optimizer

    def held_bytes(self) -> int:
        """Return the bytes on the device that training will not need again: the models, and on the CPU what was loaded."""
        models = [model for model in (self.model, self.start) if model is not None]
        parts: list[Tensor] = [value for model in models for value in model.parameters()]
        if self.device.type == "cpu":
            parts += [*self.best.values(), *moments(self._loaded_optimizer)]
        return sum(value.nbytes for value in parts)

    def add_step(self, values: dict[str, float], *, grad_norm: float, lr: float) -> None:
        """Count one step. ``values`` are the loss and its parts."""
        progress = self.state.progress
        progress.add_step(values)
        row = {"epoch": progress.epoch + 1, "number": progress.steps, **values, "grad_norm": grad_norm, "lr": lr}
        self.folder.steps.add(self.state.phase, row)

    def save(self) -> None:
        """Write state.pt, metrics.csv and the rows of the last steps.

        Raises :class:`NotFiniteError` for weights or moments that are not finite.
        """
        self.folder.steps.flush()
        saved = SavedRun(
            state=self.state,
            optimizer=self._optimizer_state(),
            model=weights_of(self.model, copy=False),
            start=None if self.start is None else weights_of(self.start, copy=False),
            settings=settings_of(self.config),
            environment=environment(self.device),
            files=self.folder.checksums(),
        )
        if not all_finite([*saved.model.values(), *moments(saved.optimizer)]):
            raise self.diverged("the weights or Adam's moments are not finite")
        self.folder.save(saved)

    def export_best(self) -> bool:
        """Write the best model for serving, and return ``False`` if its files were there already."""
        about = {name: self.state.identity[name] for name in ABOUT}
        return self.folder.export(self.best, self.model.config, self.log.item_ids.tolist(), about)

    def mend_folder(self) -> None:
        """Compare the files of the folder with the state that was loaded, and write again what differs, once.

        The folder must be locked.
        """
        if self._loaded is None:
            return
        texts = self.folder.mend(self._loaded)
        if self.best and self.export_best():
            texts.append(
                f"{self.folder.path / MODEL} or {ITEMS} did not have the best model of the state, so both were written again."
            )
        self.news += [{"event": "notice", "text": text} for text in texts]
        self._loaded = None

    def diverged(self, found: str) -> NotFiniteError:
        """Return the error of a run that has diverged; ``found`` says what is not finite."""
        phase, progress = self.state.phase, self.state.progress
        setting: str | None = f"{phase}.lr"
        if progress.steps:
            decay = f" or {phase}.weight_decay" if getattr(self.config, phase).weight_decay else ""
            remedy = f"lower {setting}{decay} and resume; {self.folder.state_file} holds an earlier state that is finite"
        elif needs_start(phase) or self.state.restarts:
            setting = None
            remedy = (
                "the phase has made no step, so the model that it starts from has diverged: begin a new run with a lower spt.lr"
            )
        else:
            setting = "model.tau"
            remedy = "no step was made yet, so a setting of the model is out of range: model.tau may be too small"
        where = f"in epoch {progress.epoch + 1} of phase {phase}, after {progress.step} of its steps"
        return NotFiniteError(f"{found} {where}: {remedy}.", setting=setting)

    def _optimizer_state(self) -> dict[str, Any] | None:
        return self._loaded_optimizer if self._optimizer is None else saved_state(self._optimizer)

    def _resume(self, saved: SavedRun, notice: str | None) -> None:
        path = self.folder.state_file if notice is None else self.folder.older_file
        changed = changed_data(saved.settings or {}, self.config)
        require_same(saved.state.identity, self.state.identity, self.folder.path, "resume with", changed)
        if notice is not None:
            self.news.append({"event": "notice", "text": notice})
        self.news += resume_events(saved, self.config, self.device, self.folder.path)
        load_into(self.model, saved.model, path, "model")
        if saved.start:
            self.start = copy.deepcopy(self.model)
            load_into(self.start, saved.start, path, "start")
        if best := saved.state.progress.best:
            check_weights(self.model, best, path, "best")
        if not all_finite(moments(saved.optimizer)):
            raise InputError(f"{path} holds numbers of the optimizer that are not finite: begin a new run.")
        # An earlier version wrote a shorter identity.
        self.state = replace(saved.state, identity=self.state.identity)
        self._loaded_optimizer, self._loaded = saved.optimizer, saved
