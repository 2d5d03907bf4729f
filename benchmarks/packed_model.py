"""The model of official.py on packed sequences in plain PyTorch: the strongest eager rival of a whole step."""

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks import packed_torch
from benchmarks.baseline_official import OfficialLARES
from lares_fast.sequences import Sequences, unpad


class PackedLARES(OfficialLARES):
    """Padded sequences in, which it packs, and the states of :class:`OfficialLARES` out."""

    def __init__(self, config, *, sdpa):
        super().__init__(config)
        self.sdpa = sdpa

    def encode(self, item_seq, item_seq_len, T, state=None):
        p = self.config.dropout if self.training else 0.0
        sequences = Sequences.from_padded(item_seq, item_seq_len)
        _, positions = sequences.row_positions()
        x = F.dropout(self.input_norm(self.item_embedding(sequences.items) + self.position_embedding(positions)), p)
        plan = packed_torch.buckets(item_seq_len)
        pre = packed_torch.block(list(self.pre_block.parameters()), plan, self.config.n_heads, p, sdpa=self.sdpa)(x)
        if state is None:
            state = nn.init.trunc_normal_(torch.empty_like(x), a=-3, b=3) * self.config.state_scale
        else:
            state = unpad(state, sequences.offsets)
        weights = list(self.recurrence.parameters())
        steps = packed_torch.states(state, pre, item_seq_len, plan, weights, self.config.n_heads, T, p, sdpa=self.sdpa)
        return torch.stack(list(steps), 1)
