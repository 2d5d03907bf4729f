"""Sequences in their two forms: packed one behind the other, or padded on the right to a rectangle."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def pack(padded: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """``(rows [P, ...], offsets [B + 1])`` of ``padded`` [B, L, ...] with ``lengths`` [B] int64."""
    real = torch.arange(padded.shape[1], device=lengths.device) < lengths[:, None]
    return padded[real], F.pad(lengths.cumsum(0), (1, 0))


def pad(packed: Tensor, offsets: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """``(padded [B, length, ...], lengths [B])``, zeros behind each sequence: what :func:`pack` takes apart."""
    sequence, position = places(offsets)
    padded = packed.new_zeros(len(offsets) - 1, length, *packed.shape[1:])
    return padded.index_put((sequence, position), packed), offsets.diff()


def places(offsets: Tensor) -> tuple[Tensor, Tensor]:
    """``(sequence [P], position [P])`` of every packed row."""
    lengths = offsets.diff()
    sequence = torch.repeat_interleave(torch.arange(len(lengths), device=offsets.device), lengths)
    return sequence, torch.arange(len(sequence), device=offsets.device) - offsets[sequence]
