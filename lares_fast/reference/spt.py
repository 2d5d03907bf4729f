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
    """Return the cross entropy of ``x @ y^T / tau`` [..., B, B] against the diagonal: all other rows are negatives.

    ``x`` and ``y`` are [B, D], or [J, B, D] for J pairs. The result is the mean over B, a scalar or [J].
    """
    target = torch.arange(x.shape[-2], device=x.device).expand(x.shape[:-1])
    return -model.head.target_logprob(x, y, target, scale=1 / model.config.tau).mean(-1)


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
    states = [ce_pass.encode(model, sequences)]
    if alpha or gamma:
        anchor = anchor_pass.encode(model, sequences, return_all_steps=True)
        states.append(anchor[:, -1])
        if alpha:
            states.append(partner_pass.encode(model, partners))
        gamma = gamma if anchor.shape[1] > 1 else 0.0
        if gamma:
            states.append(anchor[:, step_index])
    return spt_terms(model, torch.stack(states), target, alpha=alpha, gamma=gamma)


def spt_terms(model: LARES, states: Tensor, target: Tensor, *, alpha: float, gamma: float | Tensor) -> SPTLoss:
    """Return the loss of :func:`spt_loss` from the states of its passes.

    ``states``
        [1 to 4, B, D]: the last states of the pass for the cross entropy; then, if ``alpha`` or ``gamma`` is not the number 0,
        the last states of the anchor pass, then with ``alpha`` the last states of the partner pass, and at last with ``gamma``
        the anchor's states s.
    ``target``, ``alpha``
        As in :func:`spt_loss`.
    ``gamma``
        As in :func:`spt_loss`, or a scalar tensor on the device of the states.
    """
    final, others = states.split((1, len(states) - 1))
    skip_pad = not model.config.pad_in_softmax
    queries = model.queries(final.squeeze(0))
    cross_entropy = model.head.linear_cross_entropy(queries, model.item_table(), target, skip_pad=skip_pad)
    trajectory = step = torch.zeros_like(cross_entropy)
    if len(others) > 1:
        anchor, *aligned = model.normalise(others).unbind()
        # Both directions of all pairs are one call.
        left = [side for other in aligned for side in (anchor, other)]
        right = [side for other in aligned for side in (other, anchor)]
        terms = list(info_nce(model, torch.stack(left), torch.stack(right)).view(-1, 2).sum(1).unbind())
        if alpha:
            trajectory = alpha / 2 * terms.pop(0)
        if terms:
            step = gamma / 2 * terms[0]
    return SPTLoss(cross_entropy + trajectory + step, cross_entropy, trajectory, step)
