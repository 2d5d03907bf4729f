"""Full-ranking evaluation by streaming ranks: one integer a row is kept, never a [rows, N] matrix."""

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

# Which items compete with the target: all of them, or all but the user's own history.
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
    """Rank of each row's target (int64 [R], 0 is best, PAD never ranked), with the history masked and not.

    h0 is addressed by ``key`` and the row's index, so the batch size does not enter. Workspace: that of ``ops.target_rank``.
    Raises :class:`InputError` if weights or scores are not finite: the order of ids would be ranked.
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
    """(batch, its queries [B, D], items [N, D]) of an evaluation pass."""
    training, width = model.training, model.config.hidden_size
    require_usable(model, width)
    # One number a batch, read when all batches are done: a GPU is not waited for.
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
    """(rows done, batch) in order of length, which makes batches of like cost."""
    lengths = np.minimum(rows.ends - log.offsets[rows.users], max_len)
    order = np.argsort(lengths, kind="stable")
    for start in range(0, len(order), batch_size):
        index = order[start : start + batch_size]
        yield start + len(index), make_batch(log, rows, index, int(lengths[index[-1]]))


def history_of(log: InteractionLog, rows: Rows, index: Tensor) -> Exclude:
    """Everything the user had before each row's target, as an exclusion list of item ids."""
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
    """The rows whose target is among the first ``top`` in at least one of ``passes`` noisy passes.

    The official RPT data filter; PAD and history are ranked as there. A row that one pass keeps is not ranked again.
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
