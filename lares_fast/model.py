"""The model users build: the reference's parameters, with serving through the public ops."""

from __future__ import annotations

import torch
from torch import Tensor

from lares_fast import _native, ops, reference
from lares_fast._errors import InputError
from lares_fast._random import Draw, Key
from lares_fast.reference.topk import Exclude

# Backbones whose positions see only themselves and earlier ones.
_CAUSAL = {"transformer"}
# More groups skip more padding, smaller ones cost more calls.
_GROUPS, _SMALLEST_GROUP = 6, 32


class LARES(reference.LARES):
    """LARES with the parameters of :class:`lares_fast.reference.LARES` and exact recommendation on top.

    >>> model = LARES(LARESConfig(n_items=1000))  # doctest: +SKIP
    >>> scores, ids = model.eval().recommend(item_seq, item_seq_len, k=10)  # doctest: +SKIP
    """

    linear_cross_entropy = staticmethod(ops.linear_cross_entropy)
    target_logprob = staticmethod(ops.target_logprob)
    target_logprob_and_rank = staticmethod(ops.target_logprob_and_rank)

    def _encode(
        self, item_seq: Tensor, item_seq_len: Tensor, depth: Tensor, state: Tensor | None, draw: Draw, return_all_steps: bool
    ) -> Tensor:
        """The reference's, in groups of similar length that are cropped to their longest.

        That is exact for a causal block, whose real positions never see a later one, because random numbers are
        addressed by row and position and not by the shape they are drawn in. Other blocks run uncropped.
        """
        if self.config.backbone not in _CAUSAL or not len(item_seq):
            return super()._encode(item_seq, item_seq_len, depth, state, draw, return_all_steps)
        # Random numbers are drawn on the CPU, so the groups are chosen there too.
        order = item_seq_len.cpu().argsort()
        groups = []
        for group in order.tensor_split(max(1, min(_GROUPS, len(order) // _SMALLEST_GROUP))):
            length = int(item_seq_len[group].max())
            hidden = super()._encode(
                item_seq[group, :length],
                item_seq_len[group],
                depth[group],
                None if state is None else state[group, :length],
                _draw(draw.key, draw.rows[group]),
                return_all_steps,
            )
            groups.append(hidden)
        return torch.cat(_same_steps(groups) if return_all_steps else groups)[order.argsort()]

    @torch.no_grad()
    def recommend(
        self,
        item_seq: Tensor,
        item_seq_len: Tensor,
        k: int = 10,
        *,
        num_steps: int | None = None,
        state: Tensor | None = None,
        exclude: Exclude | None = None,
        backend: str | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Scores [B, k] and item ids [B, k] (int64) of the best items, PAD never among them.

        ``item_seq``, ``item_seq_len``, ``num_steps`` and ``state`` as in :meth:`encode`; ``exclude`` as in
        :func:`lares_fast.ops.topk`, in item ids; ``k`` up to the number of items. Raises :class:`InputError`.
        """
        if not 1 <= k <= self.config.n_items - 1:
            raise InputError(f"k must be in 1..{self.config.n_items - 1}, the number of items, but got {k}.")
        hidden = self.encode(item_seq, item_seq_len, num_steps=num_steps, state=state)
        query, items = self.query_and_items(hidden)
        if exclude is not None:
            exclude = _without_pad(exclude)
        # Row 0 is PAD: rank the rows behind it, and shift ids back.
        scores, rows = ops.topk(query, items[1:], k, exclude=exclude, backend=backend)
        return scores, torch.where(rows < 0, rows, rows + 1)


class _NativeDraw(Draw):
    """The same masks, bit for bit, from the native module."""

    _keep_hidden = staticmethod(_native.keep_hidden)
    _keep_attention = staticmethod(_native.keep_attention)


def _draw(key: Key, rows: Tensor) -> Draw:
    return _NativeDraw(key, rows) if _native.available()[0] else Draw(key, rows)


def _same_steps(groups: list[Tensor]) -> list[Tensor]:
    """Groups [b, T_g, D] brought to one T: a group that stopped earlier repeats its last state."""
    steps = max(group.shape[1] for group in groups)
    return [torch.cat((group, group[:, -1:].expand(-1, steps - group.shape[1], -1)), dim=1) for group in groups]


def _without_pad(exclude: Exclude) -> Exclude:
    """The same lists as rows of the table behind PAD; PAD entries, which padded histories hold, are left out."""
    offsets, ids = exclude
    real = ids != 0
    kept = torch.cat((real.new_zeros(1, dtype=torch.int64), real.cumsum(0)))
    return kept[offsets], ids[real] - 1
