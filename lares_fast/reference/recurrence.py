"""The recurrence: T steps of the core-block over a latent state, each joined with the pre-block's output."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from lares_fast._random import Draw
from lares_fast.config import LARESConfig
from lares_fast.reference.backbone import build_block


class AddAdapter(nn.Module):
    """``(h + pre) / 2``."""

    def forward(self, h: Tensor, pre: Tensor) -> Tensor:
        """``h``, ``pre`` [B, L, D] -> [B, L, D]."""
        return (h + pre) / 2


class ConcatAdapter(nn.Module):
    """``Linear([h, pre])``, state first."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(2 * width, width)

    def forward(self, h: Tensor, pre: Tensor) -> Tensor:
        """``h``, ``pre`` [B, L, D] -> [B, L, D]."""
        return self.linear(torch.cat((h, pre), dim=-1))


class LinearAdapter(nn.Module):
    """``s * h + (1 - s) * pre`` with ``s = sigmoid(gate)``, one learned scalar."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(()))

    def forward(self, h: Tensor, pre: Tensor) -> Tensor:
        """``h``, ``pre`` [B, L, D] -> [B, L, D]."""
        share = self.gate.sigmoid()
        return share * h + (1 - share) * pre


def build_adapter(config: LARESConfig) -> nn.Module:
    """The adapter named by ``config.adapter``."""
    if config.adapter == "add":
        return AddAdapter()
    if config.adapter == "concat":
        return ConcatAdapter(config.hidden_size)
    return LinearAdapter()


class Recurrence(nn.Module):
    """``h <- core(LN(adapter(h, pre)))``, T times with shared weights."""

    def __init__(self, config: LARESConfig) -> None:
        super().__init__()
        self.adapter = build_adapter(config)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.core = build_block(config, config.n_core_layers)

    def forward(self, h: Tensor, pre: Tensor, mask: Tensor, depth: Tensor, *, draw: Draw | None) -> Iterator[Tensor]:
        """Yield the state [B, L, D] after step 1, 2, ..., max(depth).

        ``depth`` [B] int: a sequence that has done its own number of steps keeps its state. Dropout addresses
        count steps from 1; step 0 is the pre-block.
        """
        steps = int(depth.max()) if len(depth) else 1
        for step in range(1, steps + 1):
            advanced = self.core(self.norm(self.adapter(h, pre)), mask, draw=draw, step=step)
            running = step <= depth
            h = advanced if running.all() else torch.where(running[:, None, None], advanced, h)
            yield h
