"""Loss of phase 1, self-supervised pre-training: cross entropy, and alignment of trajectories and of single steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lares_fast._random import Draw
from lares_fast.reference.model import LARES

# The first two arguments of LARES.encode: padded (item_seq [B, L], item_seq_len [B]), or packed, such as Sequences.
Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Pass:
    """The choices of one forward pass.

    ``num_steps``
        The depth T: an integer or int64 [B].
    ``draw``
        The addresses of the random numbers. The default is as in :meth:`LARES.encode`.
    ``state``
        h0, in the form that :meth:`LARES.encode` takes. The default is drawn.

    The same class holds the choices of G passes over the same sequences, in the forms that :meth:`LARES.trajectories` takes.
    """

    num_steps: int | Tensor
    draw: Draw | None = None
    state: Tensor | None = None

    def encode(self, model: LARES, sequences: Pair, *, return_all_steps: bool = False) -> Tensor:
        """Return ``model.encode(*sequences)`` with the choices of this pass."""
        return model.encode(
            *sequences, num_steps=self.num_steps, state=self.state, draw=self.draw, return_all_steps=return_all_steps
        )

    def trajectories(self, model: LARES, sequences: Pair) -> Tensor:
        """Return ``model.trajectories(*sequences)`` with the choices of these G passes."""
        return model.trajectories(*sequences, torch.as_tensor(self.num_steps), state=self.state, draw=self.draw)


class SPTLoss(NamedTuple):
    """The total loss and its three weighted parts. Every field is a scalar."""

    total: Tensor
    cross_entropy: Tensor
    trajectory: Tensor
    step: Tensor


def info_nce(model: LARES, x: Tensor, y: Tensor) -> Tensor:
    """Return the cross entropy of ``x @ y^T / tau`` [B, B] against the diagonal: all other rows are negatives."""
    return model.head.linear_cross_entropy(x, y, torch.arange(len(x), device=x.device), scale=1 / model.config.tau)


def spt_loss(
    model: LARES,
    sequences: Pair,
    target: Tensor,
    partners: Pair,
    passes: tuple[Pass, Pass, Pass],
    step_index: int,
    *,
    alpha: float,
    gamma: float,
) -> SPTLoss:
    """Return ``CE + alpha/2 [NCE(a, p) + NCE(p, a)] + gamma/2 [NCE(a, s) + NCE(s, a)]`` (official ``calculate_loss``).

    ``sequences``, ``target``
        B sequences in a form that :meth:`LARES.encode` takes, and the next item of each sequence, int64 [B].
    ``partners``
        B other sequences with the same ``target``.
    ``passes``
        Three passes: for the cross entropy, for the anchor a (over the same sequences again) and for the partner p. The
        official code gives the last two passes the same depth.
    ``step_index``
        s is the anchor's state after step ``step_index`` + 1. The last step is allowed. For an anchor with a single step the
        step-level term is 0.
    ``alpha``, ``gamma``
        The weights of the terms. A term with weight 0 is 0, and a pass that only such terms need is not run.
    """
    ce_pass, anchor_pass, partner_pass = passes
    queries = model.queries(ce_pass.encode(model, sequences))
    skip_pad = not model.config.pad_in_softmax
    cross_entropy = model.head.linear_cross_entropy(queries, model.item_table(), target, skip_pad=skip_pad)

    trajectory = step = torch.zeros_like(cross_entropy)
    if not alpha and not gamma:
        return SPTLoss(cross_entropy, cross_entropy, trajectory, step)
    trajectory_states = model.normalise(anchor_pass.encode(model, sequences, return_all_steps=True))
    anchor = trajectory_states[:, -1]
    if alpha:
        partner = model.normalise(partner_pass.encode(model, partners))
        trajectory = alpha / 2 * (info_nce(model, anchor, partner) + info_nce(model, partner, anchor))
    if gamma and trajectory_states.shape[1] > 1:
        state = trajectory_states[:, step_index]
        step = gamma / 2 * (info_nce(model, anchor, state) + info_nce(model, state, anchor))
    return SPTLoss(cross_entropy + trajectory + step, cross_entropy, trajectory, step)
