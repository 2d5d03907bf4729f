"""Public ops. Each op chooses a backend from the arguments of the call; :func:`lares_fast.explain` reports the choice."""

from lares_fast._dispatch import backend, explain
from lares_fast.ops._catalog_index import CatalogIndex
from lares_fast.ops.attention import attention
from lares_fast.ops.embedding import embedding
from lares_fast.ops.initial_state import initial_state
from lares_fast.ops.linear_cross_entropy import linear_cross_entropy, target_logprob, target_logprob_and_rank
from lares_fast.ops.recurrence import recurrence
from lares_fast.ops.target_rank import target_rank, target_ranks
from lares_fast.ops.topk import topk

__all__ = [
    "CatalogIndex",
    "attention",
    "backend",
    "embedding",
    "explain",
    "initial_state",
    "linear_cross_entropy",
    "recurrence",
    "target_logprob",
    "target_logprob_and_rank",
    "target_rank",
    "target_ranks",
    "topk",
]
