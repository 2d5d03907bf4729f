"""One training step of phase 1: which partners, depths and random numbers; the loss is ``reference.spt_loss``."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from lares_fast import reference
from lares_fast._random import Draw, Key, fold, generator
from lares_fast.data import InteractionLog, Rows, SameTargetIndex, make_batch
from lares_fast.reference.depth import sample_batch_depth
from lares_fast.train.config import SPTConfig

_CHOICES, _PASSES = 0, (1, 2, 3)


class SPT:
    """Self-supervised pre-training on ``rows`` of ``log``."""

    name: ClassVar[str] = "spt"

    def __init__(self, model: reference.LARES, log: InteractionLog, rows: Rows, settings: SPTConfig) -> None:
        self.model, self.log, self.rows, self.settings = model, log, rows, settings
        self._partners = SameTargetIndex(log, rows)

    def batch(self, index: Tensor, key: Key) -> tuple[reference.Sequences, Tensor, reference.Sequences, torch.Generator]:
        """(sequences, targets, partner sequences, the generator of this step's remaining choices)."""
        choices = generator(fold(key, _CHOICES))
        length = self.model.config.max_len
        own = make_batch(self.log, self.rows, index, length)
        partner = make_batch(self.log, self.rows, self._partners.sample(index, choices), length)
        return own.sequences, own.target, partner.sequences, choices

    def loss(
        self, batch: tuple[reference.Sequences, Tensor, reference.Sequences, torch.Generator], key: Key
    ) -> tuple[Tensor, dict[str, float]]:
        """The loss of one :meth:`batch` and its parts; everything random is a function of ``key``."""
        sequences, target, partners, choices = batch
        config, size = self.model.config, len(target)

        def depth() -> Tensor:
            return sample_batch_depth(config, size, choices)

        depths = [depth(), depth()]
        depths.append(depths[1] if self.settings.same_step else depth())
        step_index = int(torch.randint(int(depths[1].max()), (), generator=choices))
        rows = torch.arange(size)
        first, second, third = (
            reference.Pass(T, Draw(fold(key, number), rows)) for T, number in zip(depths, _PASSES, strict=True)
        )
        loss = reference.spt_loss(
            self.model,
            sequences,
            target,
            partners,
            (first, second, third),
            step_index,
            alpha=self.settings.alpha,
            gamma=self.settings.gamma,
        )
        parts = {
            "ce": loss.cross_entropy.item(),
            "trajectory": loss.trajectory.item(),
            "step": loss.step.item(),
            "T": float(np.mean([T.double().mean() for T in depths])),
        }
        return loss.total, parts
