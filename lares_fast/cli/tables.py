"""Format results tables as aligned text that fits the width of the terminal."""

from __future__ import annotations

import shutil
from collections.abc import Sequence

from lares_fast.data import InteractionLog, Split, SyntheticLog, best_possible
from lares_fast.data.split import Rows
from lares_fast.train.config import EvalConfig
from lares_fast.train.evaluate import MASKED, NOT_MASKED
from lares_fast.train.results import Row

_SHORT = {"recall": "R", "ndcg": "N", "mrr": "MRR"}
_CELL = 8


def bound_rows(log: InteractionLog, rows: Rows, settings: EvalConfig) -> list[Row]:
    """Return the row of the best possible ranking of a synthetic log, whose true probabilities are known.

    For any other log, return no row.
    """
    if not isinstance(log, SyntheticLog):
        return []
    return [{"phase": "best possible", "history": NOT_MASKED, **best_possible(log, rows, settings.ks)}]


def results_text(rows: Sequence[Row], ks: Sequence[int], width: int | None = None) -> str:
    """Return one table for each treatment of the history. ``rows`` are rows of metrics.csv."""
    width = width or shutil.get_terminal_size((100, 24)).columns
    tables = []
    for history in (NOT_MASKED, MASKED):
        chosen = [row for row in rows if row["history"] == history]
        if chosen:
            tables.append(_table(f"history {history}", chosen, ks, width))
    return "\n\n".join(tables)


def protocol_text(log: InteractionLog, split: Split, part: str, settings: EvalConfig) -> str:
    """Return a few sentences that say how the metrics were computed."""
    text = (
        f"{part.capitalize()} rows of the {split.protocol} split. Each target is ranked among all {log.n_items - 1:,} items, "
        "without sampling and without PAD. 'History not masked' ranks the user's own history too; 'history masked' leaves it "
        f"out. Noise seed {settings.noise_seed}."
    )
    return text + (" The data is synthetic." if log.synthetic else "")


def _table(title: str, rows: Sequence[Row], ks: Sequence[int], width: int) -> str:
    names = [row_name(row) for row in rows]
    first = max(len(title), *map(len, names))
    columns = _columns(ks, max(1, (width - first) // _CELL))
    lines = [title.ljust(first) + "".join(_heading(column).rjust(_CELL) for column in columns)]
    lines.append("-" * len(lines[0]))
    for name, row in zip(names, rows, strict=True):
        cells = (f"{row[column]:.4f}" if column in row else "-" for column in columns)
        lines.append(name.ljust(first) + "".join(cell.rjust(_CELL) for cell in cells))
    return "\n".join(lines)


def row_name(row: Row) -> str:
    """Return what a row of a results table is about."""
    if "test_T" in row:
        return f"LARES {row['phase']} T={row['test_T']}"
    return "Markov chain" if row["phase"] == "markov" else str(row["phase"])


def _columns(ks: Sequence[int], room: int) -> list[str]:
    """Return as many columns as fit in ``room``. Metrics at 10 are chosen first, then recall and NDCG, then MRR."""
    everything = [f"{metric}@{k}" for metric in _SHORT for k in ks]
    rank = {"recall": 0, "ndcg": 0, "mrr": 1}
    wanted = sorted(everything, key=lambda name: (not name.endswith("@10"), rank[name.split("@")[0]]))[:room]
    return [name for name in everything if name in wanted]


def _heading(column: str) -> str:
    metric, k = column.split("@")
    return f"{_SHORT[metric]}@{k}"
