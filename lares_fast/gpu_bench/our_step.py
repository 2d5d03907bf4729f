"""Training steps of lares_fast, as the trainer makes them on the device of the rows."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lares_fast import LARES, LARESConfig, reference
from lares_fast._random import root_key
from lares_fast.data import InteractionLog, Rows, leave_one_out
from lares_fast.gpu_bench import cases
from lares_fast.gpu_bench.machine import Machine
from lares_fast.gpu_bench.official_step import Weights, loss_and_gradients
from lares_fast.train import RPT, SPT, RPTConfig, RunConfig, SPTConfig
from lares_fast.train.rpt import RPTBatch
from lares_fast.train.spt import SPTBatch


@dataclass(frozen=True)
class Case:
    """One step: B training rows of a log with the size of Instruments.

    ``depths`` has T of the three passes of phase ``spt``, or of the G trajectories of phase ``rpt``. With ``full`` every
    row has 20 items.
    """

    phase: str
    B: int
    depths: tuple[int, ...]
    full: bool = False

    def dropout(self) -> float:
        """Return the published dropout of the phase."""
        return LARESConfig.preview().dropout if self.phase == "spt" else RPTConfig().dropout

    def settings(self, log: InteractionLog, *, dropout: float) -> SPTConfig | RPTConfig:
        """Return the published settings of the phase with another ``dropout``.

        Without dropout, which is for a check, half of all items give a reward. A model that is not trained would almost never
        get one otherwise.
        """
        if self.phase == "spt":
            return SPTConfig()
        return RPTConfig(dropout=dropout) if dropout else RPTConfig(dropout=0.0, k=log.n_items // 2)

    def phase_of(self, model: reference.LARES, start: reference.LARES, log: InteractionLog) -> SPT | RPT:
        """Return the module whose forward is the loss of the phase, with the dropout of ``model``."""
        rows, settings = leave_one_out(log).train, self.settings(log, dropout=model.config.dropout)
        if isinstance(settings, RPTConfig):
            return RPT(model, start, log, rows, settings)
        assert isinstance(settings, SPTConfig)
        return SPT(model, log, rows, settings)

    def batch(self, phase: SPT | RPT) -> SPTBatch | RPTBatch:
        """Return the batch of this step, on the CPU."""
        chosen = np.random.default_rng(0).permutation(_eligible(phase.log, phase.rows, 20 if self.full else 1))[: self.B]
        batch = phase.batch(torch.from_numpy(chosen), root_key(0))
        size = len(batch)
        if isinstance(batch, SPTBatch):
            first, second, third = (
                replace(one, num_steps=torch.full((size,), T)) for one, T in zip(batch.passes, self.depths, strict=True)
            )
            return replace(batch, passes=(first, second, third), step_index=2)
        num_steps = torch.tensor(self.depths)[:, None].expand(-1, size)
        policy, start = (replace(one, num_steps=num_steps) for one in (batch.policy_pass, batch.start_pass))
        return replace(batch, policy_pass=policy, start_pass=start)


def _eligible(log: InteractionLog, rows: Rows, least: int) -> Any:
    """Return the indices of the rows with at least ``least`` items."""
    return np.flatnonzero(rows.ends - log.offsets[rows.users] >= least)


def log_of(machine: Machine) -> InteractionLog:
    """Return the log of all rows about training."""
    return cases.instruments_log(60, 300) if machine.rehearse else cases.instruments_log()


def run_config(machine: Machine, *, bf16: bool = True, **sections: Any) -> RunConfig:
    """Return the settings of a run on the device of the rows. On a GPU its precision is bf16, unless ``bf16`` is false."""
    where: dict[str, Any] = {} if machine.rehearse else {"device": "cuda", "precision": "bf16" if bf16 else "fp32"}
    return RunConfig(**sections, **where)


class OurStep:
    """A step of lares_fast with Adam, on one batch."""

    def __init__(self, machine: Machine, case: Case, weights: Weights, *, dropout: float, bf16: bool) -> None:
        log = log_of(machine)
        config = LARESConfig(n_items=log.n_items, dropout=dropout)
        model, start = (LARES(config, bf16=bf16 and not machine.rehearse) for _ in range(2))
        for each, values in zip((model, start), weights, strict=True):
            each.load_state_dict(values)
            each.to(machine.device)
        self.model, self.phase = model.train(), case.phase_of(model, start, log).train()
        self.batch = case.batch(self.phase).to(machine.device)
        self.optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=not machine.rehearse)

    def loss(self) -> Tensor:
        """Return the loss of the batch."""
        loss: Tensor = self.phase(self.batch)
        return loss

    def gradients(self) -> list[Tensor]:
        """Return the loss and the gradient of each parameter, by name."""
        return loss_and_gradients(self.model, self.loss())

    def __call__(self) -> Tensor:
        """Make a step and return its loss."""
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss()
        loss.backward()
        self.optimizer.step()
        return loss.detach()
