"""The exact K best items of each query in one total order: score descending, then id ascending."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

# (offsets, ids): the items to leave out, ids[offsets[b]:offsets[b + 1]] for query b, int64. Ids may be in any order and repeat.
Exclude = tuple[Tensor, Tensor]

_CHUNK = 32768


def topk(
    query: Tensor, items: Tensor, k: int, *, bias: Tensor | None = None, exclude: Exclude | None = None
) -> tuple[Tensor, Tensor]:
    """Return the scores [B, k] and ids [B, k] (int64) of the best items by ``query @ items.T + bias``.

    ``query`` is [B, D], ``items`` [N, D] and ``bias`` [N]. A NaN score counts as -inf. Where fewer than ``k`` items are left,
    the remaining places have the id -1 and the score -inf. The workspace is B x (k + 32768) scores and ids.
    """
    batch = len(query)
    scores = query.new_empty(batch, 0)
    ids = torch.empty(batch, 0, dtype=torch.int64, device=query.device)
    for start, chunk in item_chunks(items):
        new = query @ chunk.T
        if bias is not None:
            new = new + bias[start : start + len(chunk)]
        # Adding 0 makes 0.0 of -0.0.
        new = new.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf) + 0.0
        new_ids = torch.arange(start, start + len(chunk), device=query.device).expand(batch, -1)
        if exclude is not None:
            gone = mask_excluded(exclude, batch, start, len(chunk))
            # An excluded item must come after an item with the score -inf. The id -1 says that it is not an item.
            new, new_ids = new.masked_fill(gone, -torch.inf), new_ids.masked_fill(gone, -1)
        scores, ids = _best(torch.cat((scores, new), 1), torch.cat((ids, new_ids), 1), k)
    missing = k - scores.shape[1]
    return (
        torch.nn.functional.pad(scores, (0, missing), value=-torch.inf),
        torch.nn.functional.pad(ids, (0, missing), value=-1),
    )


def _best(scores: Tensor, ids: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the first k in the order (is an item, score descending, position).

    The sorts are stable, so the least significant key is sorted first.
    """
    order = scores.argsort(dim=1, descending=True, stable=True)
    order = order.gather(1, (ids.gather(1, order) < 0).to(torch.int8).argsort(dim=1, stable=True))[:, :k]
    return scores.gather(1, order), ids.gather(1, order)


def item_chunks(items: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Yield ``(first id, rows)`` of consecutive parts of the item table."""
    for start in range(0, len(items), _CHUNK):
        yield start, items[start : start + _CHUNK]


def mask_excluded(exclude: Exclude, batch: int, start: int, size: int) -> Tensor:
    """Return bool [B, size]: True where item ``start + column`` is in the list of the query."""
    offsets, ids = exclude
    query = torch.repeat_interleave(torch.arange(batch, device=ids.device), offsets.diff())
    # Ids behind the end of the last list belong to no query.
    ids = ids[: len(query)]
    inside = (ids >= start) & (ids < start + size)
    mask = torch.zeros(batch, size, dtype=torch.bool, device=ids.device)
    mask[query[inside], ids[inside] - start] = True
    return mask
