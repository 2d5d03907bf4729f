"""Phase 2, reinforcement post-training, as a module whose forward is the loss."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from lares_fast import reference
from lares_fast._random import Draw, Key, fold, generator
from lares_fast.data import Batch, InteractionLog, Rows, make_batch
from lares_fast.reference.depth import sample_batch_depth
from lares_fast.train.config import RPTConfig

_DEPTHS, _POLICY, _REFERENCE = range(3)


@dataclass(frozen=True, eq=False)
class RPTBatch:
    """B training rows with all random choices of one step.

    ``inputs``
        The rows: packed histories, and the target item of each row.
    ``policy_pass, start_pass``
        The depths [G, B] and the random numbers of G trajectories a row, for the model in training and for the frozen
        model. The depths are equal in both.
    ``rows``
        The states that the loss reads.
    """

    inputs: Batch
    policy_pass: reference.Pass
    start_pass: reference.Pass
    rows: reference.RPTRows

    def __len__(self) -> int:
        return len(self.inputs)

    def to(self, device: torch.device | str) -> RPTBatch:
        """Return a copy with the rows and the tables on ``device``; depths and random numbers stay on the CPU."""
        tables = reference.RPTRows(*(table.to(device, non_blocking=True) for table in self.rows))
        return replace(self, inputs=self.inputs.to(device), rows=tables)


class RPT(nn.Module):
    """Reinforcement post-training of ``model`` against the frozen model ``start``::

        phase = RPT(model, copy.deepcopy(model), log, split.train)
        for index in torch.randperm(len(phase.rows)).split(phase.settings.batch_size):
            loss = phase(phase.batch(index, key))
            loss.backward()
            ...

    ``model``
        The model to train, in training mode, on any device. Its dropout is set to ``settings.dropout``.
    ``start``
        The pre-trained model, on the same device. It is put in evaluation mode and stays there, and its parameters
        require no gradient. It is a submodule too, so an optimizer must take ``model.parameters()``.
    ``rows``
        The training rows of ``log``.
    ``settings``
        The group size, the reward and the weight of the KL term. The module ignores the settings of the optimizer, of the
        loop and of the row filter.
    ``parts``
        Numbers about the last loss, as scalars without a gradient: the mean ``reward``, the ``kl`` term before its weight,
        ``adv-nonzero``, the share of trajectories with an advantage other than 0, and ``T``, the mean depth.
    """

    name: ClassVar[str] = "rpt"

    def __init__(
        self,
        model: reference.LARES,
        start: reference.LARES,
        log: InteractionLog,
        rows: Rows,
        settings: RPTConfig | None = None,
    ) -> None:
        super().__init__()
        self.model, self.log, self.rows = model, log, rows
        self.settings = settings or RPTConfig()
        self.start = start.eval().requires_grad_(False)
        model.set_dropout(self.settings.dropout)
        self.parts: dict[str, Tensor] = {}

    def train(self, mode: bool = True) -> RPT:
        """Set the mode of ``model``; ``start`` stays in evaluation mode."""
        super().train(mode)
        self.start.eval()
        return self

    def batch(self, index: Tensor, key: Key) -> RPTBatch:
        """Prepare the rows ``index`` ([B] int64, each in 0..R-1) on the CPU.

        All that is random is a function of ``key``, a pair of integers in [0, 2**32): depths, initial states and dropout
        masks. Give every step its own key.
        """
        config, group = self.model.config, self.settings.group_size
        inputs = make_batch(self.log, self.rows, index, config.max_len)
        size, choices = len(inputs), generator(fold(key, _DEPTHS))
        depth = torch.stack([sample_batch_depth(config, size, choices) for _ in range(group)])
        policy = reference.Pass(depth, Draw(fold(key, _POLICY), torch.arange(group * size)))
        # With shared noise, the frozen model starts from the initial states of the model in training.
        noise = _POLICY if config.share_reference_noise else _REFERENCE
        start = replace(policy, draw=Draw(fold(key, noise), torch.arange(group * size)))
        return RPTBatch(inputs, policy, start, reference.rpt_rows(depth))

    def forward(self, batch: RPTBatch) -> Tensor:
        """Return the loss, a scalar with a gradient, and set :attr:`parts`. It is :func:`lares_fast.reference.rpt_loss`."""
        loss = reference.rpt_loss(
            self.model,
            self.start,
            batch.inputs.sequences,
            batch.inputs.target,
            batch.policy_pass,
            batch.start_pass,
            k=self.settings.k,
            beta=self.settings.beta,
            reward=self.settings.reward,
            scores=self.settings.scores,
            rows=batch.rows,
        )
        self.parts = {
            "reward": loss.rewards.mean(),
            "kl": loss.kl.detach(),
            "adv-nonzero": (loss.advantages != 0).double().mean(),
            "T": torch.as_tensor(batch.policy_pass.num_steps).double().mean(),
        }
        return loss.total
