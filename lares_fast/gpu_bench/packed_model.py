"""The model of official.py on packed sequences: the fastest baseline of a whole step in eager PyTorch."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lares_fast import LARESConfig
from lares_fast.gpu_bench import packed_torch
from lares_fast.gpu_bench.official import OfficialLARES
from lares_fast.sequences import Sequences, unpad


class Packed(NamedTuple):
    """A packed batch on a device: items [P], their positions [P], offsets [B + 1], lengths [B], and the plan of attention."""

    items: Tensor
    positions: Tensor
    offsets: Tensor
    lengths: Tensor
    plan: packed_torch.Plan


def pack(item_seq: Tensor, item_seq_len: Tensor, device: torch.device | str = "cpu") -> Packed:
    """Pack a padded batch on the CPU, and copy it to ``device``."""
    sequences = Sequences.from_padded(item_seq, item_seq_len)
    _, positions = sequences.row_positions()
    plan = [group.to(device) for group in packed_torch.buckets(item_seq_len)]
    items, offsets = (x.to(device) for x in sequences)
    return Packed(items, positions.to(device), offsets, item_seq_len.to(device), plan)


class PackedLARES(OfficialLARES):
    """A model that packs its padded input and returns the states of :class:`OfficialLARES`."""

    def __init__(self, config: LARESConfig, *, sdpa: bool) -> None:
        super().__init__(config)
        self.sdpa = sdpa

    def encode(self, item_seq: Tensor, item_seq_len: Tensor, T: int, state: Tensor | None = None) -> Tensor:
        """Return the states [B, T, D] of the last position after every step. ``state`` is h0 [B, L, D]; None draws it."""
        batch = pack(item_seq, item_seq_len)
        return self.encode_packed(batch, T, None if state is None else unpad(state, batch.offsets))

    def encode_packed(self, batch: Packed, T: int, state: Tensor | None = None) -> Tensor:
        """Return the states [B, T, D] of a packed batch. ``state`` is h0 [P, D]; None draws it."""
        p = self.config.dropout if self.training else 0.0
        x = F.dropout(self.input_norm(self.item_embedding(batch.items) + self.position_embedding(batch.positions)), p)
        how: dict[str, Any] = {"n_heads": self.config.n_heads, "p": p, "sdpa": self.sdpa}
        pre = packed_torch.block(list(self.pre_block.parameters()), batch.plan, **how)(x)
        if state is None:
            state = nn.init.trunc_normal_(torch.empty_like(x), a=-3, b=3) * self.config.state_scale
        weights = list(self.recurrence.parameters())
        steps = packed_torch.states(state, pre, batch.lengths, batch.plan, weights, depth=T, **how)
        return torch.stack(list(steps), 1)
