"""Evaluation by full ranking. It stores one rank for each row, and never a matrix of [R, N] scores."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from lares_fast import ops, reference
from lares_fast._random import Draw, Key
from lares_fast.catalog import Catalog
from lares_fast.data import Batch, InteractionLog, Rows, make_batch
from lares_fast.reference.topk import Exclude
from lares_fast.train.finite import largest, require_finite_scores, require_usable

Progress = Callable[[int, int], None]

# The items that are ranked with the target: all items, or all except the user's history.
NOT_MASKED, MASKED = "not masked", "masked"


def model_ranks(
    model: reference.LARES,
    log: InteractionLog,
    rows: Rows,
    *,
    key: Key,
    num_steps: int | None = None,
    batch_size: int = 256,
    progress: Progress | None = None,
) -> dict[str, Tensor]:
    """Return the rank of each row's target ([R] int64, 0 is the best), under the names ``not masked`` and ``masked``.

    ``not masked`` ranks all items, ``masked`` leaves out the items of the user's history. PAD is never ranked.
    ``num_steps`` is T (default: the model's). The initial states depend on ``key`` and on each row's index, not on
    ``batch_size``. ``progress`` is called after each batch with the number of finished rows and of all rows.
    It needs the workspace of ``ops.target_ranks``.
    Raises :class:`InputError` if weights or scores are not finite, because the ranks would show the order of the ids only.
    """
    ranks = {name: torch.empty(len(rows), dtype=torch.int64) for name in (NOT_MASKED, MASKED)}
    for batch, query, items in _queries(model, log, rows, key, num_steps, batch_size, progress):
        of_batch = Catalog(items).target_ranks(query, batch.target, history_of(log, rows, batch.rows))
        for name, rank in zip((NOT_MASKED, MASKED), of_batch, strict=True):
            ranks[name][batch.rows] = rank
    return ranks


@torch.no_grad()
def _queries(
    model: reference.LARES,
    log: InteractionLog,
    rows: Rows,
    key: Key,
    num_steps: int | None,
    batch_size: int,
    progress: Progress | None,
) -> Iterator[tuple[Batch, Tensor, Tensor]]:
    """Yield (batch, its queries [B, D], all items [N, D]) of an evaluation pass."""
    training, width = model.training, model.config.hidden_size
    require_usable(model, width)
    # One number for each batch. They are read after the last batch, so that no batch has to wait for a GPU.
    largest_queries, items = list[Tensor](), model.item_table()
    model.eval()
    try:
        for done, batch in _batches(log, rows, model.config.max_len, batch_size):
            draw = Draw(key, batch.rows)
            query = model.queries(model.encode(*batch.sequences, num_steps=num_steps, draw=draw))
            largest_queries.append(query.abs().amax())
            yield batch, query, items
            if progress is not None:
                progress(done, len(rows))
        require_finite_scores(largest(largest_queries), largest([items]), width)
    finally:
        model.train(training)


def _batches(log: InteractionLog, rows: Rows, max_len: int, batch_size: int) -> Iterator[tuple[int, Batch]]:
    """Yield (number of finished rows, batch). The rows come in order of length, so that a batch has rows of similar length."""
    lengths = np.minimum(rows.ends - log.offsets[rows.users], max_len)
    order = np.argsort(lengths, kind="stable")
    for start in range(0, len(order), batch_size):
        index = order[start : start + batch_size]
        yield start + len(index), make_batch(log, rows, index, int(lengths[index[-1]]))


def history_of(log: InteractionLog, rows: Rows, index: Tensor) -> Exclude:
    """Return the history of the rows ``index`` [B] as an exclusion list of item ids: (offsets [B + 1], ids)."""
    chosen = index.numpy()
    items, offsets = log.events(log.offsets[rows.users[chosen]], rows.ends[chosen])
    return torch.from_numpy(offsets), torch.from_numpy(items)


def keep_rankable(
    model: reference.LARES,
    log: InteractionLog,
    rows: Rows,
    *,
    key_of_pass: Callable[[int], Key],
    passes: int,
    top: int,
    batch_size: int = 256,
    progress: Progress | None = None,
) -> Rows:
    """Return the rows whose target is among the first ``top`` items in at least one of ``passes`` passes.

    This is the row filter of the official phase-2 trainer, which also ranks PAD and the history. The key of each pass gives it
    other initial states. A row that one pass keeps is not ranked again.
    """
    left = np.arange(len(rows))
    for number in range(passes):
        part = Rows(rows.users[left], rows.ends[left])
        kept = np.zeros(len(left), dtype=bool)
        for batch, query, items in _queries(model, log, part, key_of_pass(number), None, batch_size, progress):
            kept[batch.rows.numpy()] = (ops.target_rank(query, items, batch.target) < top).numpy()
        left = left[~kept]
    keep = np.ones(len(rows), dtype=bool)
    keep[left] = False
    return Rows(rows.users[keep], rows.ends[keep])
