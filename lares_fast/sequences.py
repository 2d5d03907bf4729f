"""Item sequences in packed form, and the conversion of padded sequences to it.

Packed means that one sequence follows the other in one tensor, without padding. :meth:`Sequences.from_input` checks the
sequences of a caller and packs padded ones, once for each call. All later steps get packed sequences.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lares_fast._errors import InputError
from lares_fast._numbers import check_stored, is_integer
from lares_fast._transfer import to_device

# The item id of padding. Its row in the item table is row 0.
PAD = 0


class Sequences(NamedTuple):
    """B packed item sequences with P items in total, as the pair ``(items, offsets)``.

    ``items``
        [P] int64 item ids, each sequence oldest first.
    ``offsets``
        [B + 1] int64. Sequence b is ``items[offsets[b]:offsets[b + 1]]``. The offsets may be on the CPU while the items are
        on a GPU.
    """

    items: Tensor
    offsets: Tensor

    @classmethod
    def from_padded(cls, item_seq: Tensor, item_seq_len: Tensor) -> Sequences:
        """Pack ``item_seq`` [B, L], padded on the right, with lengths ``item_seq_len`` [B]. Nothing is checked."""
        offsets = F.pad(item_seq_len.to(torch.int64).cumsum(0), (1, 0))
        return cls(unpad(item_seq.to(torch.int64), offsets), offsets)

    @classmethod
    def from_input(cls, item_seq: Tensor, item_seq_len: Tensor, *, n_items: int, max_len: int) -> Sequences:
        """Check sequences that a caller gave, padded or packed, and return them packed.

        ``item_seq`` is [B, L] and ``item_seq_len`` holds the lengths [B], or ``item_seq`` is packed [P] and
        ``item_seq_len`` holds the offsets [B + 1]. Every sequence must have 1 to ``max_len`` items, and every item must be in
        1..``n_items`` - 1. The values of items on a GPU are not checked, because the check would wait for the GPU.

        Raises :class:`InputError` for sequences that are not like this.
        """
        for name, value in (("item_seq", item_seq), ("item_seq_len", item_seq_len)):
            if not isinstance(value, Tensor) or not is_integer(value):
                got = value.dtype if isinstance(value, Tensor) else type(value).__name__
                raise InputError(f"{name} must be a tensor of integers, but got {got}.")
            check_stored(name, value)
        if item_seq.dim() == 1:
            _check_offsets(item_seq, item_seq_len, max_len)
            sequences = cls(item_seq.to(torch.int64), item_seq_len.to(torch.int64))
        else:
            _check_lengths(item_seq, item_seq_len, max_len)
            sequences = cls.from_padded(item_seq, item_seq_len)
        if item_seq.device.type == "cpu" and item_seq.numel():
            lowest, highest = int(item_seq.min()), int(item_seq.max())
            if not PAD <= lowest <= highest < n_items:
                raise InputError(f"item_seq must hold ids in {PAD}..{n_items - 1}, but it spans {lowest}..{highest}.")
            if lowest == PAD:
                _check_pads(sequences)
        return sequences

    def padded(self, length: int) -> tuple[Tensor, Tensor]:
        """Return ``(item_seq [B, length], item_seq_len [B])``, padded with 0 on the right, on the device of the items."""
        return pad(self.items, self.offsets, length), to_device(self.lengths, self.items.device)

    def repeat(self, passes: int) -> Sequences:
        """Return all sequences ``passes`` times: all of them once, then all of them again, and so on."""
        first = len(self.items) * torch.arange(passes, device=self.offsets.device)
        offsets = torch.cat((self.offsets[:1], (first[:, None] + self.offsets[1:]).flatten()))
        return Sequences(self.items.repeat(passes), offsets)

    @property
    def batch(self) -> int:
        """The number of sequences, B."""
        return len(self.offsets) - 1

    @property
    def lengths(self) -> Tensor:
        """The number of items of each sequence, [B] int64."""
        return self.offsets.diff()

    def row_positions(self) -> tuple[Tensor, Tensor]:
        """Return :func:`row_positions` of the items."""
        return row_positions(self.offsets)


def row_positions(offsets: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``(sequence [P], position [P])``: the sequence of every packed row, and its position in that sequence.

    ``offsets`` is [B + 1]. Both results are int64 and on its device.
    """
    lengths = offsets.diff()
    sequence = torch.repeat_interleave(torch.arange(len(lengths), device=offsets.device), lengths)
    return sequence, torch.arange(len(sequence), device=offsets.device) - offsets[sequence]


def pad(rows: Tensor, offsets: Tensor, length: int, fill: Tensor | None = None) -> Tensor:
    """Return packed ``rows`` [P, ...] as [B, length, ...], with ``fill`` after the end of each sequence.

    ``fill`` broadcasts to [B, length, ...]. The default is 0.
    """
    sequence, position = (to_device(place, rows.device) for place in row_positions(offsets))
    padding = rows.new_zeros(()) if fill is None else fill.to(rows)
    return padding.expand(len(offsets) - 1, length, *rows.shape[1:]).index_put((sequence, position), rows)


def unpad(padded: Tensor, offsets: Tensor) -> Tensor:
    """Return ``padded`` [B, L, ...] as packed rows [P, ...]: the inverse of :func:`pad`."""
    sequence, position = (to_device(place, padded.device) for place in row_positions(offsets))
    return padded[sequence, position]


def _check_offsets(items: Tensor, offsets: Tensor, max_len: int) -> None:
    if offsets.device.type != "cpu" and offsets.dim() == 1 and len(offsets):
        # A check on a GPU would make the CPU wait.
        return
    if offsets.dim() != 1 or not len(offsets) or int(offsets[0]) or int(offsets[-1]) != len(items):
        raise InputError(f"item_seq_len must be the offsets [B + 1] from 0 to {len(items)}, the number of packed items.")
    lengths = offsets.diff()
    if len(lengths) and not 1 <= int(lengths.min()) <= int(lengths.max()) <= max_len:
        raise InputError(
            f"item_seq_len must give every sequence 1..{max_len} items, but gives {int(lengths.min())}..{int(lengths.max())}."
        )


def _check_lengths(item_seq: Tensor, lengths: Tensor, max_len: int) -> None:
    if item_seq.dim() != 2 or item_seq.shape[1] > max_len:
        raise InputError(f"item_seq must be [B, L] with L <= {max_len}, but got {list(item_seq.shape)}.")
    if lengths.shape != item_seq.shape[:1]:
        raise InputError(f"item_seq_len must be [{len(item_seq)}], but got {list(lengths.shape)}.")
    if len(item_seq) and not 1 <= int(lengths.min()) <= int(lengths.max()) <= item_seq.shape[1]:
        raise InputError(
            f"item_seq_len must be in 1..{item_seq.shape[1]}, but it spans "
            f"{int(lengths.min())}..{int(lengths.max())}; drop empty histories."
        )


def _check_pads(sequences: Sequences) -> None:
    pads = (sequences.items == PAD).nonzero()
    if len(pads):
        sequence, position = (int(place.to(pads.device)[pads[0]]) for place in sequences.row_positions())
        raise InputError(
            f"item_seq holds PAD (0) inside a sequence, at position {position} of sequence {sequence}: padding must follow "
            "the last item, so move padding on the left to the right and remove PADs between items."
        )
