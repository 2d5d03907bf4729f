"""LARES in readable PyTorch. Every faster implementation is tested against it."""

from lares_fast.reference.attention import attention, attention_mask, packed_attention
from lares_fast.reference.backbone import register_backbone
from lares_fast.reference.depth import sample_depth
from lares_fast.reference.embedding import embedding
from lares_fast.reference.initial_state import initial_state
from lares_fast.reference.linear_cross_entropy import linear_cross_entropy, target_logprob, target_logprob_and_rank
from lares_fast.reference.model import LARES, without_numbers
from lares_fast.reference.recurrence import Recurrence, recurrence
from lares_fast.reference.rpt import RPTLoss, RPTRows, group_advantage, ranking_reward, rpt_loss, rpt_rows
from lares_fast.reference.spt import Pass, SPTLoss, info_nce, spt_loss, spt_terms
from lares_fast.reference.target_rank import target_rank
from lares_fast.reference.topk import topk
from lares_fast.sequences import Sequences

__all__ = [
    "LARES",
    "Pass",
    "RPTLoss",
    "RPTRows",
    "Recurrence",
    "SPTLoss",
    "Sequences",
    "attention",
    "attention_mask",
    "embedding",
    "group_advantage",
    "info_nce",
    "initial_state",
    "linear_cross_entropy",
    "packed_attention",
    "ranking_reward",
    "recurrence",
    "register_backbone",
    "rpt_loss",
    "rpt_rows",
    "sample_depth",
    "spt_loss",
    "spt_terms",
    "target_logprob",
    "target_logprob_and_rank",
    "target_rank",
    "topk",
    "without_numbers",
]
