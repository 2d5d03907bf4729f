"""The model users build: the reference's parameters, with serving through the public ops."""

from __future__ import annotations

import torch
from torch import Tensor

from lares_fast import ops, reference
from lares_fast._errors import InputError
from lares_fast.reference.topk import Exclude


class LARES(reference.LARES):
    """LARES with the parameters of :class:`lares_fast.reference.LARES` and exact recommendation on top.

    >>> model = LARES(LARESConfig(n_items=1000))  # doctest: +SKIP
    >>> scores, ids = model.eval().recommend(item_seq, item_seq_len, k=10)  # doctest: +SKIP
    """

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


def _without_pad(exclude: Exclude) -> Exclude:
    """The same lists as rows of the table behind PAD; PAD entries, which padded histories hold, are left out."""
    offsets, ids = exclude
    real = ids != 0
    kept = torch.cat((real.new_zeros(1, dtype=torch.int64), real.cumsum(0)))
    return kept[offsets], ids[real] - 1
