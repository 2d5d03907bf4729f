"""Sequences in their two forms: packed one behind the other, or padded on the right to a rectangle."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from lares_fast._transfer import to_device


def pack(padded: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """``(rows [P, ...], offsets [B + 1])`` of ``padded`` [B, L, ...] with ``lengths`` [B] int64, on the CPU or where it is."""
    offsets = F.pad(lengths.cumsum(0), (1, 0))
    sequence, position = (to_device(place, padded.device) for place in places(offsets))
    return padded[sequence, position], offsets


def pad(packed: Tensor, offsets: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """``(padded [B, length, ...], lengths [B])``, zeros behind each sequence: what :func:`pack` takes apart."""
    sequence, position = places(offsets)
    padded = packed.new_zeros(len(offsets) - 1, length, *packed.shape[1:])
    return padded.index_put((sequence, position), packed), offsets.diff()


def repeat(packed: Tensor, offsets: Tensor, times: int) -> tuple[Tensor, Tensor]:
    """The sequences ``times`` times over, as ``(rows, offsets)``."""
    first = len(packed) * torch.arange(times, device=offsets.device)
    offsets = torch.cat((offsets[:1], (first[:, None] + offsets[1:]).flatten()))
    return packed.repeat(times, *(1 for _ in packed.shape[1:])), offsets


def rectangle(states: Tensor, depth: Tensor) -> Tensor:
    """States [sum of depth, D] of sequences one behind the other as [B, T, D]: one that stopped repeats its last.

    ``depth`` [B] is on the CPU.
    """
    steps = torch.arange(int(depth.max()) if len(depth) else 1)
    if len(states) == len(depth) * len(steps):
        return states.unflatten(0, (len(depth), len(steps)))
    first = depth.cumsum(0) - depth
    return states[to_device(first[:, None] + steps.minimum(depth[:, None] - 1), states.device)]


def places(offsets: Tensor) -> tuple[Tensor, Tensor]:
    """``(sequence [P], position [P])`` of every packed row."""
    lengths = offsets.diff()
    sequence = torch.repeat_interleave(torch.arange(len(lengths), device=offsets.device), lengths)
    return sequence, torch.arange(len(sequence), device=offsets.device) - offsets[sequence]
