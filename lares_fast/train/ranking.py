"""Ranking metrics from the rank of each row's target, and the file metrics.csv."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def metrics(rank: Tensor, ks: Sequence[int]) -> dict[str, float]:
    """Return ``recall@k`` (the hit rate), ``ndcg@k`` and ``mrr@k`` for each k of ``ks``.

    They are means over ``rank`` ([R] int64), the ranks of R targets among all items; rank 0 is the best.
    """
    place = rank.double() + 1
    result = {}
    for name, gain in (("recall", torch.ones_like(place)), ("ndcg", 1 / torch.log2(place + 1)), ("mrr", 1 / place)):
        for k in ks:
            result[f"{name}@{k}"] = torch.where(place <= k, gain, 0.0).mean().item()
    return result


def rows_csv(rows: Sequence[dict[str, Any]]) -> str:
    """Return ``rows`` as CSV text, with every column that at least one row has."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
