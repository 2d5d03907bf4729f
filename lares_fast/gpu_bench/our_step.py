"""Training steps of lares_fast, as the trainer makes them on the device of the rows."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lares_fast import LARESConfig
from lares_fast._random import Key, fold, root_key
from lares_fast.data import InteractionLog, Rows, Split, leave_one_out
from lares_fast.gpu_bench import cases
from lares_fast.gpu_bench.candidates import Result
from lares_fast.gpu_bench.machine import Machine
from lares_fast.gpu_bench.official_step import Weights, depths_of
from lares_fast.train import RPTConfig, RunConfig, SPTConfig
from lares_fast.train.phases import Phase, make_phase
from lares_fast.train.run import Run
from lares_fast.train.steps import make_steps

# A learning rate that changes no weight, for checks.
_STILL = 1e-30


@dataclass(frozen=True)
class Case:
    """One step: B training rows of a log with the size of Instruments.

    ``depths`` has T of the three passes of phase ``spt``, which are equal, or of the G trajectories of phase ``rpt``, in any
    order. With ``full`` every row has 20 items.
    """

    phase: str
    B: int
    depths: tuple[int, ...]
    full: bool = False

    def model(self, *, dropout: bool) -> dict[str, Any]:
        """Return the settings of the model, with the published dropout of the phase or without dropout."""
        if self.phase == "rpt":
            return {"dropout": RPTConfig().dropout if dropout else 0.0}
        p = LARESConfig.preview().dropout if dropout else 0.0
        return {"dropout": p, "depth_sampling": "constant", "mean_depth": self.depths[0]}

    def settings(self, n_items: int, *, dropout: bool) -> SPTConfig | RPTConfig:
        """Return the published settings of the phase, or the settings for a check without dropout.

        In a check, half of all items give a reward, because a model that is not trained would almost never get one. The
        weights stay as they are.
        """
        lr: dict[str, Any] = {} if dropout else {"lr": _STILL}
        if self.phase == "spt":
            return SPTConfig(batch_size=self.B, **lr)
        how: dict[str, Any] = {} if dropout else {"dropout": 0.0, "k": n_items // 2}
        return RPTConfig(batch_size=self.B, data_filter=False, **how, **lr)

    def split(self, log: InteractionLog) -> Split:
        """Return the split whose training rows are those of this case."""
        whole = leave_one_out(log)
        long = np.flatnonzero(whole.train.ends - log.offsets[whole.train.users] >= (20 if self.full else 1))
        rows = Rows(whole.train.users[long], whole.train.ends[long])
        return Split(rows, whole.valid, whole.test, whole.train_end, whole.protocol)

    def choice(self, phase: Phase) -> tuple[Tensor, Key]:
        """Return the rows of the step [B], and the first key that draws the depths of this case."""
        index = torch.from_numpy(np.random.default_rng(0).permutation(len(phase.rows))[: self.B])
        keys = (fold(root_key(0), number) for number in count())
        return index, next(key for key in keys if sorted(depths_of(phase.batch(index[:1], key))) == sorted(self.depths))


def log_of(machine: Machine) -> InteractionLog:
    """Return the log of all rows about training."""
    return cases.instruments_log(60, 300) if machine.rehearse else cases.instruments_log()


def run_config(machine: Machine, *, bf16: bool = True, **sections: Any) -> RunConfig:
    """Return the settings of a run on the device of the rows. On a GPU its precision is bf16, unless ``bf16`` is false."""
    where: dict[str, Any] = {"device": machine.device.type}
    if bf16 and not machine.rehearse:
        where["precision"] = "bf16"
    return RunConfig(**where, **sections)


class OurStep:
    """Steps of a run of the trainer from ``weights``, all on one batch. Without ``dropout`` they change no weight.

    With ``prepare`` each call also prepares the batch on the CPU, as the trainer does.
    """

    def __init__(
        self, machine: Machine, case: Case, weights: Weights, *, dropout: bool, bf16: bool, prepare: bool = False
    ) -> None:
        self._folder, self.notices = TemporaryDirectory(), list[str]()
        log = log_of(machine)
        settings: dict[str, Any] = {case.phase: case.settings(log.n_items, dropout=dropout)}
        config = run_config(machine, bf16=bf16, model=case.model(dropout=dropout), **settings)
        run = Run(config, log, case.split(log), Path(self._folder.name) / "run", self._listen)
        if case.phase == "rpt":
            run.state.progress.best = weights[1]
            run.enter("rpt")
        run.model.load_state_dict(weights[0])
        self._run, phase = run, make_phase(run).train()
        self._choice = case.choice(phase)
        optimizer = run.make_optimizer(phase.settings)
        # On the CPU, a step frees its gradients.
        self._gradients = list[Tensor]()
        optimizer.register_step_post_hook(self._keep_gradients)
        self._steps = make_steps(run, phase, optimizer)
        self._batch = None if prepare else self._steps.prepare([self._choice])

    def __call__(self) -> None:
        """Make a step, and read the numbers of all steps when the trainer would."""
        self._steps.make(self._steps.prepare([self._choice]) if self._batch is None else self._batch, None)
        if self._steps.due:
            self._steps.read()

    def gradients(self) -> list[Tensor]:
        """Return the loss and the gradient of each parameter, by name, after steps that are captured and replayed."""
        for _ in range(3):
            self()
            # A batch that is ready has the place of the first step in the numbers of many steps.
            self._steps.read()
        loss = torch.tensor(self._run.state.progress.means()["loss"])
        if self._run.device.type != "cpu":
            self._keep_gradients()
        return [loss.to(self._run.device), *self._gradients]

    def _keep_gradients(self, *_: Any) -> None:
        gradients = [parameter.grad for _, parameter in sorted(self._run.model.named_parameters())]
        self._gradients = [gradient for gradient in gradients if gradient is not None]

    def _listen(self, event: Result) -> None:
        if event["event"] == "notice":
            self.notices.append(event["text"])
