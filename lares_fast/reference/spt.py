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
    ``deepest``
        At least every depth, or ``None``, see :meth:`LARES.trajectories`. :meth:`encode` does not read it.

    The same class holds the choices of G passes over the same sequences, in the forms that :meth:`LARES.trajectories` takes.
    """

    num_steps: int | Tensor
    draw: Draw | None = None
    state: Tensor | None = None
    deepest: int | None = None

    def encode(self, model: LARES, sequences: Pair, *, return_all_steps: bool = False) -> Tensor:
        """Return ``model.encode(*sequences)`` with the choices of this pass."""
        return model.encode(
            *sequences, num_steps=self.num_steps, state=self.state, draw=self.draw, return_all_steps=return_all_steps
        )

    def trajectories(self, model: LARES, sequences: Pair) -> Tensor:
        """Return ``model.trajectories(*sequences)`` with the choices of these G passes."""
        num_steps = torch.as_tensor(self.num_steps)
        return model.trajectories(*sequences, num_steps, state=self.state, draw=self.draw, deepest=self.deepest)


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
    final = ce_pass.encode(model, sequences)
    anchor = partner = state = None
    if alpha or gamma:
        anchor_states = anchor_pass.encode(model, sequences, return_all_steps=True)
        anchor = anchor_states[:, -1]
        if alpha:
            partner = partner_pass.encode(model, partners)
        if gamma and anchor_states.shape[1] > 1:
            state = anchor_states[:, step_index]
    return spt_terms(model, final, target, anchor, partner, state, alpha=alpha, gamma=gamma)


def spt_terms(
    model: LARES,
    final: Tensor,
    target: Tensor,
    anchor: Tensor | None,
    partner: Tensor | None,
    state: Tensor | None,
    *,
    alpha: float,
    gamma: float | Tensor,
) -> SPTLoss:
    """Return the loss of :func:`spt_loss` from the states of its passes, [B, D] each.

    ``final``, ``anchor`` and ``partner`` are the last states of the three passes. ``state`` is the anchor's state s. A term
    is 0 if one of its states is ``None``. ``gamma`` may be a scalar on the device of the states.
    """
    skip_pad = not model.config.pad_in_softmax
    cross_entropy = model.head.linear_cross_entropy(model.queries(final), model.item_table(), target, skip_pad=skip_pad)
    trajectory = step = torch.zeros_like(cross_entropy)
    if anchor is not None:
        a = model.normalise(anchor)
        if partner is not None:
            p = model.normalise(partner)
            trajectory = alpha / 2 * (info_nce(model, a, p) + info_nce(model, p, a))
        if state is not None:
            s = model.normalise(state)
            step = gamma / 2 * (info_nce(model, a, s) + info_nce(model, s, a))
    return SPTLoss(cross_entropy + trajectory + step, cross_entropy, trajectory, step)
