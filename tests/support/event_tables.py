"""Event logs as table files, and their content after reading."""

from collections import Counter

import numpy as np
import pytest

arrow = pytest.importorskip("pyarrow")
arrow_parquet = pytest.importorskip("pyarrow.parquet")

HEADER = ["user_id", "item_id", "timestamp", "title"]
MOST = 2**63 - 1


def written(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def table(path, rows, header=HEADER):
    """Write ``rows`` exactly as they are: no field is quoted or escaped."""
    separator = "," if path.suffix == ".csv" else "\t"
    return written(path, "".join(separator.join(map(str, row[: len(header)])) + "\n" for row in [header, *rows]))


def parquet(path, **columns):
    arrow_parquet.write_table(arrow.table(columns), path)
    return path


def events(log):
    """Return the events of ``log`` as text, and how often each occurs."""
    users = np.repeat(log.user_ids, log.lengths)
    return Counter(zip(map(str, users), map(str, log.item_ids[log.items]), map(str, log.times), strict=True))


def order(log):
    """Return the raw items of the only user."""
    assert log.n_users == 1
    return log.item_ids[log.history(0)].tolist()


def timed(path, times):
    """Write a log of one user, whose item k has the time ``times[k]``."""
    if path.suffix == ".inter":
        return table(path, [(1, item, time) for item, time in enumerate(times)], HEADER[:3])
    return table(path, [(1, item, time, "x") for item, time in enumerate(times)])
