"""Phase 2, reinforcement post-training, as a module whose forward is the loss."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor, nn

from lares_fast import reference
from lares_fast._random import Key, fold, generator
from lares_fast.data import InteractionLog, Rows, make_batch
from lares_fast.data.batch import Inputs, Places, input_lengths
from lares_fast.reference.depth import sample_batch_depth
from lares_fast.train.config import RPTConfig
from lares_fast.train.padding import Padding, Sizes, padded_pass

_DEPTHS, _POLICY, _REFERENCE = range(3)
# Depths and numbers of states vary more than in phase 1. With few sizes of tokens, a published run captures about 40 graphs.
_PARTS = 4

Held = TypeVar("Held", bound=Inputs | Places)


@dataclass(frozen=True, eq=False)
class RPTBatch(Generic[Held]):
    """B training rows with all random choices of one step.

    ``inputs``
        The rows: packed histories, and the target item of each row.
    ``policy_pass, start_pass``
        The depths [G, B] and the random numbers of G trajectories a row, for the model in training and for the frozen
        model. The depths are equal in both.
    ``rows``
        The states that the loss reads.
    ``mean_depth``
        The mean of the depths, an fp64 scalar.
    ``batch``
        B.
    """

    inputs: Held
    policy_pass: reference.Pass
    start_pass: reference.Pass
    rows: reference.RPTRows
    mean_depth: Tensor
    batch: int

    def __len__(self) -> int:
        return self.batch

    def to(self: RPTBatch[Inputs], device: torch.device | str) -> RPTBatch[Inputs]:
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

    def batch(self, index: Tensor, key: Key) -> RPTBatch[Inputs]:
        """Prepare the rows ``index`` ([B] int64, each in 0..R-1) on the CPU.

        All that is random is a function of ``key``, a pair of integers in [0, 2**32): depths, initial states and dropout
        masks. Give every step its own key.
        """
        inputs = make_batch(self.log, self.rows, index, self.model.config.max_len)
        return RPTBatch(inputs, **self._choices(len(index), key, None))

    def places(self, index: Tensor, key: Key, padding: Padding) -> RPTBatch[Places]:
        """Prepare the same batch for a device that has the log, with the sizes of ``padding``."""
        places = padding.places(self.log, self.rows, index, self.model.config.max_len, len(index))
        return RPTBatch(places, **self._choices(len(index), key, padding))

    def sizes(self) -> Sizes:
        """Return the sizes of a full batch."""
        config, batch, group = self.model.config, self.settings.batch_size, self.settings.group_size
        lengths = input_lengths(self.log, self.rows, config.max_len)
        return Sizes(
            float(lengths.mean()) * batch, int(lengths.max()), group, group * batch, group * batch * config.mean_depth, _PARTS
        )

    def _choices(self, size: int, key: Key, padding: Padding | None) -> dict[str, Any]:
        """Return the fields of a batch of ``size`` rows, except the inputs."""
        config, choices = self.model.config, generator(fold(key, _DEPTHS))
        depth = torch.stack([sample_batch_depth(config, size, choices) for _ in range(self.settings.group_size)])
        # With shared noise, the frozen model starts from the initial states of the model in training.
        noise = _POLICY if config.share_reference_noise else _REFERENCE
        policy, start = (padded_pass(depth, fold(key, site), padding) for site in (_POLICY, noise))
        if padding is None:
            tables = reference.rpt_rows(depth)
        else:
            every = torch.as_tensor(policy.num_steps)
            first = (every.flatten().cumsum(0).view_as(every) - every)[:, :size]
            tables = reference.rpt_rows(depth, first, padding.scored(depth))
        return {
            "policy_pass": policy,
            "start_pass": start,
            "rows": tables,
            "mean_depth": depth.double().mean(),
            "batch": size,
        }

    def forward(self, batch: RPTBatch[Inputs]) -> Tensor:
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
            "T": batch.mean_depth,
        }
        return loss.total
