"""One training step of phase 2: depths and random numbers of the group; the loss is ``reference.rpt_loss``."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from lares_fast import reference
from lares_fast._random import Draw, Key, fold, generator
from lares_fast.data import Batch, InteractionLog, Rows, make_batch
from lares_fast.reference.depth import sample_batch_depth
from lares_fast.train.config import RPTConfig

_DEPTHS, _POLICY, _REFERENCE = range(3)


class RPT:
    """Reinforcement post-training of ``model`` against the frozen ``start`` model."""

    name: ClassVar[str] = "rpt"

    def __init__(
        self, model: reference.LARES, start: reference.LARES, log: InteractionLog, rows: Rows, settings: RPTConfig
    ) -> None:
        self.model, self.log, self.rows, self.settings = model, log, rows, settings
        self._start = start.eval().requires_grad_(False)
        model.set_dropout(settings.dropout)

    def batch(self, index: Tensor, key: Key) -> Batch:
        """The rows ``index``."""
        return make_batch(self.log, self.rows, index, self.model.config.max_len)

    def loss(self, batch: Batch, key: Key) -> tuple[Tensor, dict[str, float]]:
        """The loss of one :meth:`batch` and its parts; everything random is a function of ``key``."""
        config, settings, size = self.model.config, self.settings, len(batch)
        choices = generator(fold(key, _DEPTHS))
        group = settings.group_size
        depths = [sample_batch_depth(config, size, choices) for _ in range(group)]
        rows = torch.arange(group * size)
        policy = reference.Pass(torch.stack(depths), Draw(fold(key, _POLICY), rows))
        theirs = fold(key, _POLICY if config.share_reference_noise else _REFERENCE)
        frozen = replace(policy, draw=Draw(theirs, rows))
        loss = reference.rpt_loss(
            self.model,
            self._start,
            batch.sequences,
            batch.target,
            policy,
            frozen,
            k=settings.k,
            beta=settings.beta,
            reward=settings.reward,
            scores=settings.scores,
        )
        parts = {
            "reward": loss.rewards.mean().item(),
            "kl": loss.kl.item(),
            "adv-nonzero": (loss.advantages != 0).double().mean().item(),
            "T": torch.stack(depths).double().mean().item(),
        }
        return loss.total, parts
