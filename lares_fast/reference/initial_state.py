"""h0 of packed sequences: truncated normal numbers, addressed by the row of the batch and the position."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lares_fast._random import Draw
from lares_fast.sequences import row_positions


def initial_state(draw: Draw, offsets: Tensor, n_tokens: int, width: int, *, std: float = 1.0) -> Tensor:
    """Return ``std`` times standard normal numbers truncated to [-3, 3], [P, D] fp32 for ``n_tokens`` = P and ``width`` = D.

    Sequence b is the rows ``offsets[b]:offsets[b + 1]``; ``draw`` has one row for each sequence. Rows from ``offsets[-1]`` on
    are 0.
    """
    return spread(lambda rows, positions: draw.initial_state(rows, positions, width), draw.rows, offsets, n_tokens).mul_(std)


def spread(normal: Callable[[Tensor, Tensor], Tensor], rows: Tensor, offsets: Tensor, n_tokens: int) -> Tensor:
    """Return ``normal(rows [P], positions [P])``, [P, D], for the tokens of packed sequences, with 0 after the last sequence.

    On the CPU, sequences that share one row of the batch are drawn once.
    """
    if not len(rows):
        return torch.zeros_like(normal(offsets.new_zeros(n_tokens), offsets.new_zeros(n_tokens)))
    sequence, position = token_places(offsets, n_tokens)
    on_cpu = offsets.device.type == "cpu"
    if on_cpu and n_tokens and bool((rows == rows[0]).all()):
        count = torch.arange(int(position.max()) + 1)
        state = normal(rows[:1].expand(len(count)), count)[position]
    else:
        state = normal(rows[sequence], position)
    if on_cpu and int(offsets[-1]) == n_tokens:
        return state
    return state.masked_fill_((torch.arange(n_tokens, device=offsets.device) >= offsets[-1])[:, None], 0)


def token_places(offsets: Tensor, n_tokens: int) -> tuple[Tensor, Tensor]:
    """Return ``(sequence [P], position [P])`` of ``n_tokens`` = P packed tokens, int64 on the device of ``offsets``.

    On a GPU the host reads no value. Tokens after the last sequence are counted as tokens of it.
    """
    if offsets.device.type == "cpu" and int(offsets[-1]) == n_tokens:
        return row_positions(offsets)
    token = torch.arange(n_tokens, device=offsets.device)
    sequence = torch.searchsorted(offsets, token, right=True).sub_(1).clamp_(0, max(0, len(offsets) - 2))
    return sequence, token - offsets[sequence]
