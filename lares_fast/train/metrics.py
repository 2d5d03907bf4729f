"""Ranking metrics of one target a row, from its 0-based rank among all items, and their file."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def metrics(rank: Tensor, ks: Sequence[int]) -> dict[str, float]:
    """Means over ``rank`` [R] int64: ``recall@k`` (= hit rate), ``ndcg@k`` and ``mrr@k`` for each k."""
    place = rank.double() + 1
    result = {}
    for name, gain in (("recall", torch.ones_like(place)), ("ndcg", 1 / torch.log2(place + 1)), ("mrr", 1 / place)):
        for k in ks:
            result[f"{name}@{k}"] = torch.where(place <= k, gain, 0.0).mean().item()
    return result


def rows_csv(rows: Sequence[dict[str, Any]]) -> str:
    """``rows`` as CSV with every column that one of them has."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
