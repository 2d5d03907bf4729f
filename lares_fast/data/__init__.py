"""Interaction logs, their readers, splits into rows, batches, same-target partners, and a synthetic log."""

from lares_fast.data.batch import Batch, epoch_order, make_batch
from lares_fast.data.filters import Filters
from lares_fast.data.log import InteractionLog
from lares_fast.data.partners import SameTargetIndex
from lares_fast.data.readers import FORMATS, log_from_sequences, read_log
from lares_fast.data.split import Rows, Split, cutoffs, leave_one_out, temporal_split
from lares_fast.data.synthetic import Shop, SyntheticLog, best_possible, synthetic_log

__all__ = [
    "FORMATS",
    "Batch",
    "Filters",
    "InteractionLog",
    "Rows",
    "SameTargetIndex",
    "Shop",
    "Split",
    "SyntheticLog",
    "best_possible",
    "cutoffs",
    "epoch_order",
    "leave_one_out",
    "log_from_sequences",
    "make_batch",
    "read_log",
    "synthetic_log",
    "temporal_split",
]
