"""The functions with which the losses score targets against the item table."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from lares_fast.reference.linear_cross_entropy import linear_cross_entropy, target_logprob, target_logprob_and_rank


class Head(NamedTuple):
    """Three functions, which take the arguments of the functions of these names in ``lares_fast.reference``.

    A loss takes them from the model, so that it runs on the backend of the model.
    """

    linear_cross_entropy: Callable[..., Tensor]
    target_logprob: Callable[..., Tensor]
    target_logprob_and_rank: Callable[..., tuple[Tensor, Tensor]]


REFERENCE_HEAD = Head(linear_cross_entropy, target_logprob, target_logprob_and_rank)
