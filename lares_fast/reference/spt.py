"""Phase 1, self-supervised pre-training: cross entropy + trajectory-level + step-level alignment."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lares_fast._random import Draw
from lares_fast.reference.model import LARES

# (item_seq [B, L], item_seq_len [B]), or packed (items [P], offsets [B + 1])
Sequences = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Pass:
    """What one forward pass is free to choose: its depth T, its random numbers, and (for parity) its h0 [B, L, D].

    Or what G passes over the same sequences choose, as ``LARES.trajectories`` takes it.
    """

    num_steps: int | Tensor
    draw: Draw | None = None
    state: Tensor | None = None

    def encode(self, model: LARES, sequences: Sequences, *, return_all_steps: bool = False) -> Tensor:
        """``model.encode`` with this pass's choices."""
        return model.encode(
            *sequences, num_steps=self.num_steps, state=self.state, draw=self.draw, return_all_steps=return_all_steps
        )

    def trajectories(self, model: LARES, sequences: Sequences) -> Tensor:
        """``model.trajectories`` with these passes' choices."""
        return model.trajectories(*sequences, torch.as_tensor(self.num_steps), state=self.state, draw=self.draw)


class SPTLoss(NamedTuple):
    """The total loss and its three weighted parts; every field a scalar."""

    total: Tensor
    cross_entropy: Tensor
    trajectory: Tensor
    step: Tensor


def info_nce(model: LARES, x: Tensor, y: Tensor) -> Tensor:
    """Cross entropy of ``x @ y^T / tau`` [B, B] against the diagonal: every other row of the batch is a negative."""
    return model.linear_cross_entropy(x, y, torch.arange(len(x), device=x.device), scale=1 / model.config.tau)


def spt_loss(
    model: LARES,
    sequences: Sequences,
    target: Tensor,
    partners: Sequences,
    passes: tuple[Pass, Pass, Pass],
    step_index: int,
    *,
    alpha: float,
    gamma: float,
) -> SPTLoss:
    """``CE + alpha/2 [NCE(a, p) + NCE(p, a)] + gamma/2 [NCE(a, s) + NCE(s, a)]`` (official ``calculate_loss``).

    ``partners`` are other sequences with the same ``target`` [B]. ``passes`` are the cross-entropy pass,
    the anchor pass a (the same sequences again) and the partner pass p; the official code gives the last two one
    depth. s is the anchor's state after step ``step_index`` + 1, the last step included; an anchor of a single
    step has no step-level term. A term of weight 0 is 0, and a pass that only such terms need is not made.
    """
    ce_pass, anchor_pass, partner_pass = passes
    query, items = model.query_and_items(ce_pass.encode(model, sequences))
    cross_entropy = model.linear_cross_entropy(query, items, target, skip_pad=not model.config.pad_in_softmax)

    trajectory = step = torch.zeros_like(cross_entropy)
    if not alpha and not gamma:
        return SPTLoss(cross_entropy, cross_entropy, trajectory, step)
    trajectory_states = model.compared(anchor_pass.encode(model, sequences, return_all_steps=True))
    anchor = trajectory_states[:, -1]
    if alpha:
        partner = model.compared(partner_pass.encode(model, partners))
        trajectory = alpha / 2 * (info_nce(model, anchor, partner) + info_nce(model, partner, anchor))
    if gamma and trajectory_states.shape[1] > 1:
        state = trajectory_states[:, step_index]
        step = gamma / 2 * (info_nce(model, anchor, state) + info_nce(model, state, anchor))
    return SPTLoss(cross_entropy + trajectory + step, cross_entropy, trajectory, step)
