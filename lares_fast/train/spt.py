"""Phase 1, self-supervised pre-training, as a module whose forward is the loss."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from lares_fast import reference
from lares_fast._random import Draw, Key, fold, generator
from lares_fast.data import Batch, InteractionLog, Rows, SameTargetIndex, make_batch
from lares_fast.reference.depth import sample_batch_depth
from lares_fast.train.config import SPTConfig

_CHOICES, _PASSES = 0, (1, 2, 3)


@dataclass(frozen=True, eq=False)
class SPTBatch:
    """B training rows with all random choices of one step.

    ``inputs``
        The rows: packed histories, and the target item of each row.
    ``partners``
        For each row, another row with the same target.
    ``passes``
        The depths [B] and the random numbers of the cross-entropy pass, the anchor pass and the partner pass.
    ``step_index``
        The index, counted from 0, of the step of the anchor pass whose state is aligned with the state of the last step.
    """

    inputs: Batch
    partners: Batch
    passes: tuple[reference.Pass, reference.Pass, reference.Pass]
    step_index: int

    def __len__(self) -> int:
        return len(self.inputs)

    def to(self, device: torch.device | str) -> SPTBatch:
        """Return a copy with both sets of rows on ``device``; depths and random numbers stay on the CPU."""
        return replace(self, inputs=self.inputs.to(device), partners=self.partners.to(device))


class SPT(nn.Module):
    """Self-supervised pre-training of ``model`` on training rows::

        phase = SPT(model, log, split.train)
        for index in torch.randperm(len(phase.rows)).split(phase.settings.batch_size):
            loss = phase(phase.batch(index, key))
            loss.backward()
            ...

    ``model``
        The model to train, in training mode, on any device. It is a submodule, so :meth:`parameters` are its parameters.
    ``rows``
        The training rows of ``log``. Other rows would leak their targets into training.
    ``settings``
        Weights of the losses. The module ignores the settings of the optimizer and of the loop.
    ``parts``
        Numbers about the last loss, as scalars without a gradient: its weighted parts ``ce``, ``trajectory`` and ``step``,
        and ``T``, the mean depth.
    """

    name: ClassVar[str] = "spt"

    def __init__(self, model: reference.LARES, log: InteractionLog, rows: Rows, settings: SPTConfig | None = None) -> None:
        """Group the rows by target. Raises :class:`InputError` if there is no row."""
        super().__init__()
        self.model, self.log, self.rows = model, log, rows
        self.settings = settings or SPTConfig()
        self._partners = SameTargetIndex(log, rows)
        self.parts: dict[str, Tensor] = {}

    def batch(self, index: Tensor, key: Key) -> SPTBatch:
        """Prepare the rows ``index`` ([B] int64, each in 0..R-1) on the CPU.

        All that is random is a function of ``key``, a pair of integers in [0, 2**32): partners, depths, initial states and
        dropout masks. Give every step its own key.
        """
        config, choices = self.model.config, generator(fold(key, _CHOICES))
        inputs = make_batch(self.log, self.rows, index, config.max_len)
        partners = make_batch(self.log, self.rows, self._partners.sample(index, choices), config.max_len)
        size = len(inputs)

        def depth() -> Tensor:
            return sample_batch_depth(config, size, choices)

        depths = [depth(), depth()]
        depths.append(depths[1] if self.settings.same_step else depth())
        step_index = int(torch.randint(int(depths[1].max()), (), generator=choices))
        rows = torch.arange(size)
        first, second, third = (
            reference.Pass(T, Draw(fold(key, number), rows)) for T, number in zip(depths, _PASSES, strict=True)
        )
        return SPTBatch(inputs, partners, (first, second, third), step_index)

    def forward(self, batch: SPTBatch) -> Tensor:
        """Return the loss, a scalar with a gradient, and set :attr:`parts`. It is :func:`lares_fast.reference.spt_loss`."""
        loss = reference.spt_loss(
            self.model,
            batch.inputs.sequences,
            batch.inputs.target,
            batch.partners.sequences,
            batch.passes,
            batch.step_index,
            alpha=self.settings.alpha,
            gamma=self.settings.gamma,
        )
        depths = [torch.as_tensor(each.num_steps).double().mean() for each in batch.passes]
        self.parts = {
            "ce": loss.cross_entropy.detach(),
            "trajectory": loss.trajectory.detach(),
            "step": loss.step.detach(),
            "T": torch.stack(depths).sum() / len(depths),
        }
        return loss.total
