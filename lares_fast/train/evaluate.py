"""Evaluation by full ranking. It stores one rank for each row, and never a matrix of [R, N] scores."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from lares_fast import ops, reference
from lares_fast._finite import largest, require_finite_scores, require_usable
from lares_fast._memory import enough_memory
from lares_fast._modules import in_evaluation
from lares_fast._random import Draw, Key
from lares_fast._transfer import to_device, to_host
from lares_fast.catalog import Catalog
from lares_fast.data import Batch, InteractionLog, Rows, make_batch
from lares_fast.reference.topk import Exclude
from lares_fast.sequences import Sequences

Progress = Callable[[int, int], None]

# The items that are ranked with the target: all items, or all except the user's history.
NOT_MASKED, MASKED = "not masked", "masked"

# The setting of the batch size, which the error about too little memory names.
_BATCH_SIZE = "evaluation.batch_size"


def model_ranks(
    model: reference.LARES,
    log: InteractionLog,
    rows: Rows,
    *,
    key: Key,
    num_steps: int | None = None,
    batch_size: int = 256,
    progress: Progress | None = None,
    observe: Callable[[Tensor], object] | None = None,
) -> dict[str, Tensor]:
    """Return the rank of each row's target ([R] int64, 0 is the best), under the names ``not masked`` and ``masked``.

    ``not masked`` ranks all items, ``masked`` leaves out the items of the user's history. PAD is never ranked.
    ``num_steps`` is T (default: the model's). The initial states depend on ``key`` and on each row's index, not on
    ``batch_size``. ``progress`` is called after each batch with the number of finished rows and of all rows,
    and ``observe`` with the queries [B, D] of each batch. It needs the workspace of ``ops.target_ranks``.

    The work is done on the device of the model, and the result is on the CPU. On a GPU, ranks stay there until the end, so the
    CPU waits once and not for each batch; ``progress`` then counts rows whose work was given to the GPU.

    Raises :class:`InputError` if weights or scores are not finite, because the ranks would show the order of the ids only, and
    if the memory of a GPU is not enough for ``batch_size``.
    """
    order, ranks = list[Tensor](), list[Tensor]()
    with enough_memory(batch_size, setting=_BATCH_SIZE):
        for batch, query, items in _queries(model, log, rows, key, num_steps, batch_size, progress):
            if observe is not None:
                observe(query)
            target = to_device(batch.target, query.device)
            ranks.append(torch.stack(Catalog(items).target_ranks(query, target, history_of(log, rows, batch.rows))))
            order.append(batch.rows)
        not_masked, masked = _in_order(order, ranks) if ranks else torch.empty(2, 0, dtype=torch.int64)
    return {NOT_MASKED: not_masked, MASKED: masked}


def _in_order(order: list[Tensor], values: list[Tensor]) -> Tensor:
    """Return the ``values`` of batches, each [..., B], as one CPU tensor [..., R]. ``order`` has the rows of each batch."""
    there = to_host(torch.cat(values, dim=-1))
    return torch.empty_like(there).index_copy_(-1, torch.cat(order), there)


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
    """Yield (batch, its queries [B, D], all items [N, D]) of an evaluation pass.

    The batch is on the CPU, the queries and items are on the device of the model.
    """
    width = model.config.hidden_size
    require_usable(model, width)
    evaluated = in_evaluation(model)
    # One number for each batch. They are read after the last batch, so that no batch has to wait for a GPU.
    largest_queries, items = list[Tensor](), model.item_table()
    for done, batch in _batches(log, rows, model.config.max_len, batch_size):
        draw = Draw(key, batch.rows)
        # Offsets, depths and rows stay on the CPU, where the model reads them without waiting.
        sequences = Sequences(to_device(batch.items, items.device), batch.offsets)
        query = model.queries(evaluated.encode(*sequences, num_steps=num_steps, draw=draw))
        largest_queries.append(query.abs().amax())
        yield batch, query, items
        if progress is not None:
            progress(done, len(rows))
    if largest_queries:
        require_finite_scores(largest([torch.stack(largest_queries)]), largest([items]), width)


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
    other initial states. A row that one pass keeps is not ranked again. On a GPU, the CPU waits once in each pass.

    Raises the errors of :func:`model_ranks`.
    """
    left = np.arange(len(rows))
    for number in range(passes):
        part = Rows(rows.users[left], rows.ends[left])
        order, kept = list[Tensor](), list[Tensor]()
        with enough_memory(batch_size, setting=_BATCH_SIZE):
            for batch, query, items in _queries(model, log, part, key_of_pass(number), None, batch_size, progress):
                kept.append(ops.target_rank(query, items, to_device(batch.target, query.device)) < top)
                order.append(batch.rows)
            if kept:
                left = left[~_in_order(order, kept).numpy()]
    keep = np.ones(len(rows), dtype=bool)
    keep[left] = False
    return Rows(rows.users[keep], rows.ends[keep])
