"""Draw the number of reasoning steps T for training."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lares_fast.config import LARESConfig


def sample_batch_depth(config: LARESConfig, batch: int, generator: torch.Generator) -> Tensor:
    """Return the depths of ``batch`` sequences, int64 [B]: one depth for all, or one for each with ``per_sequence_depth``."""
    return sample_depth(config, batch if config.per_sequence_depth else 1, generator).expand(batch)


def sample_depth(config: LARESConfig, size: int, generator: torch.Generator) -> Tensor:
    """Return ``size`` depths, int64 [size], each at least 1.

    ``config.depth_sampling`` names the distribution around m = ``config.mean_depth``. All distributions are from the official
    code.
    """
    m = config.mean_depth
    match config.depth_sampling:
        case "constant":
            depth = torch.full((size,), m)
        case "non-recurrent":
            depth = torch.ones(size, dtype=torch.int64)
        case "uniform":
            depth = torch.randint(1, 2 * m + 1, (size,), generator=generator)
        case "poisson-unbounded":
            depth = _poisson(torch.full((size,), float(m)), generator)
        case "poisson-bounded":
            depth = _poisson(torch.full((size,), float(m)), generator).clamp(max=2 * m)
        case _:
            # This is poisson-lognormal with sigma 0.5. The shift by sigma^2 / 2 = 0.125 makes m the mean of the rates.
            rate = torch.exp(torch.randn(size, generator=generator) * 0.5 + math.log(m) - 0.125)
            depth = (_poisson(rate, generator) + 1).clamp(max=3 * m)
    return depth.clamp(min=1)


def _poisson(rate: Tensor, generator: torch.Generator) -> Tensor:
    return torch.poisson(rate, generator=generator).long()
