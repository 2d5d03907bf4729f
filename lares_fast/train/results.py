"""The rows of results that metrics.csv and the results tables hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from lares_fast.train.baselines import markov_ranks, popularity_ranks
from lares_fast.train.ranking import metrics

Row = dict[str, Any]

# The metric that early stopping watches.
WATCHED = "ndcg@10"
# The columns of the mean, and of the root of the mean square, of the cosines between the states of the validation users.
COSINE, COSINE_RMS = "state_cosine", "state_cosine_rms"
# The column of the time in which a test row is encoded and ranked, with and without its history.
MILLISECONDS = "ms_per_user"

# The baselines of every results table: name -> function that ranks the rows of a split.
BASELINES = {"popularity": popularity_ranks, "markov": markov_ranks}


def result_rows(ranks: Mapping[str, Tensor], ks: Sequence[int], **labels: Any) -> list[Row]:
    """Return one row of metrics for each treatment of the history in ``ranks``. Every row begins with ``labels``."""
    return [{**labels, "history": history, **metrics(rank, ks)} for history, rank in ranks.items()]
