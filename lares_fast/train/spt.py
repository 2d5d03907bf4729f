"""Phase 1, self-supervised pre-training, as a module whose forward is the loss."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from lares_fast import reference
from lares_fast._random import Key, fold, generator
from lares_fast.data import InteractionLog, Rows, SameTargetIndex, make_batch
from lares_fast.data.batch import Inputs, Places, input_lengths
from lares_fast.reference.depth import sample_batch_depth
from lares_fast.train.config import SPTConfig
from lares_fast.train.padding import Padding, Sizes, padded_pass

_CHOICES, _PASSES = range(2)
# The published run then has two sizes of tokens, and needs 6 graphs.
_PARTS = 16

Held = TypeVar("Held", bound=Inputs | Places)


class SPTRows(NamedTuple):
    """Which states of the packed passes the loss reads; made by :func:`spt_rows`.

    ``chosen``
        The rows of these states in the result of :meth:`LARES.trajectories`, int64: the B last states of each pass, and then,
        for the step-level term, the B states of the anchor pass after the step that is aligned with its last step.
    ``level``
        The weight of the step-level term, an fp32 scalar: 0 if no anchor takes more than one step, else 1.
    """

    chosen: Tensor
    level: Tensor


def spt_rows(num_steps: Tensor, step_index: int | None) -> SPTRows:
    """Return the tables for the depths ``num_steps`` [passes, B] of packed passes, which are on the CPU.

    ``step_index`` is as in :func:`lares_fast.reference.spt_loss`, or ``None`` without the step-level term. An anchor that takes
    fewer steps is aligned at its last step.
    """
    end = num_steps.flatten().cumsum(0).view_as(num_steps)
    chosen = [end.flatten() - 1]
    level = 0.0
    if step_index is not None:
        chosen.append(end[1] - num_steps[1] + num_steps[1].clamp(max=step_index + 1) - 1)
        level = float(int(num_steps[1].max()) > 1)
    return SPTRows(torch.cat(chosen), torch.tensor(level))


@dataclass(frozen=True, eq=False)
class SPTBatch(Generic[Held]):
    """B training rows with all random choices of one step, as one packed batch of up to three passes.

    ``inputs``
        S = passes * B rows, pass by pass: the rows, for the cross entropy; the rows again, as anchors; and for each row another
        row with the same target, its partner.
    ``choices``
        The depths [1, S] and the random numbers of the S sequences.
    ``rows``
        The states that the loss reads.
    ``mean_depth``
        The mean of the depths, an fp64 scalar.
    ``batch``
        B.
    """

    inputs: Held
    choices: reference.Pass
    rows: SPTRows
    mean_depth: Tensor
    batch: int

    def __len__(self) -> int:
        return self.batch

    def to(self: SPTBatch[Inputs], device: torch.device | str) -> SPTBatch[Inputs]:
        """Return a copy with the rows and the tables on ``device``; depths and random numbers stay on the CPU."""
        tables = SPTRows(*(table.to(device, non_blocking=True) for table in self.rows))
        return replace(self, inputs=self.inputs.to(device), rows=tables)


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

    def batch(self, index: Tensor, key: Key) -> SPTBatch[Inputs]:
        """Prepare the rows ``index`` ([B] int64, each in 0..R-1) on the CPU.

        All that is random is a function of ``key``, a pair of integers in [0, 2**32): partners, depths, initial states and
        dropout masks. Give every step its own key.
        """
        rows, chosen = self._choices(index, key, None)
        return SPTBatch(make_batch(self.log, self.rows, rows, self.model.config.max_len), **chosen)

    def places(self, index: Tensor, key: Key, padding: Padding) -> SPTBatch[Places]:
        """Prepare the same batch for a device that has the log, with the sizes of ``padding``."""
        rows, chosen = self._choices(index, key, padding)
        places = padding.places(self.log, self.rows, rows, self.model.config.max_len, len(index))
        return SPTBatch(places, **chosen)

    def sizes(self) -> Sizes:
        """Return the sizes of a full batch."""
        batch, lengths = self.settings.batch_size, input_lengths(self.log, self.rows, self.model.config.max_len)
        sequences = batch * self._passes
        return Sizes(float(lengths.mean()) * sequences, int(lengths.max()), 1, sequences, batch, _PARTS)

    @property
    def _passes(self) -> int:
        # A pass that only terms of weight 0 need is left out.
        return 3 if self.settings.alpha else 2 if self.settings.gamma else 1

    def _choices(self, index: Tensor, key: Key, padding: Padding | None) -> tuple[Tensor, dict[str, Any]]:
        """Return the S rows of a batch, and its other fields."""
        config, choices, size = self.model.config, generator(fold(key, _CHOICES)), len(index)
        partners = self._partners.sample(index, choices)
        depths = [sample_batch_depth(config, size, choices) for _ in range(2)]
        depths.append(depths[1] if self.settings.same_step else sample_batch_depth(config, size, choices))
        step_index = int(torch.randint(int(depths[1].max()), (), generator=choices))
        index = torch.as_tensor(index)
        num_steps = torch.stack(depths[: self._passes])
        return torch.cat((index, index, partners)[: self._passes]), {
            "choices": padded_pass(num_steps.view(1, -1), fold(key, _PASSES), padding),
            "rows": spt_rows(num_steps, step_index if self.settings.gamma else None),
            "mean_depth": num_steps.double().mean(),
            "batch": size,
        }

    def forward(self, batch: SPTBatch[Inputs]) -> Tensor:
        """Return the loss, a scalar with a gradient, and set :attr:`parts`. It is :func:`lares_fast.reference.spt_loss`."""
        size, settings = len(batch), self.settings
        states = batch.choices.trajectories(self.model, batch.inputs.sequences)[batch.rows.chosen]
        loss = reference.spt_terms(
            self.model,
            states.view(-1, size, states.shape[-1]),
            batch.inputs.target[:size],
            alpha=settings.alpha,
            gamma=settings.gamma * batch.rows.level if settings.gamma else 0.0,
        )
        self.parts = {
            "ce": loss.cross_entropy.detach(),
            "trajectory": loss.trajectory.detach(),
            "step": loss.step.detach(),
            "T": batch.mean_depth,
        }
        return loss.total
