"""The call of ``recurrence``: its arguments, and their checks."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lares_fast._errors import InputError
from lares_fast._numbers import MOST_STEPS, check_dense, choice
from lares_fast._random import Draw, drop_threshold, key_of
from lares_fast.ops._call import Call
from lares_fast.ops._catalog_checks import check_rows
from lares_fast.reference.weights import WeightLayout, layout_of

OUTPUTS = ("last", "steps", "tokens")
# The backends, the preferred one first. The operator returns the position of the backend that ran.
BACKENDS = ("triton", "native", "layers", "reference")

# A number of rows; in a compiler's trace it may be a symbol.
Rows = int | torch.SymInt
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class RecurrenceCall(Call):
    """The arguments of the operator, for the forward and the backward."""

    op: ClassVar[str] = "recurrence"

    # [P, D] each. Without ``pre`` there is no adapter.
    h: Tensor
    pre: Tensor | None
    # [B + 1] int64.
    offsets: Tensor
    # T of each sequence, [B] int64. Without it every sequence takes ``steps`` steps.
    depth: Tensor | None
    # The rows [B] int64 of the global batch, and the seed [1] int64 of the dropout masks. Nothing is dropped without a seed.
    rows: Tensor | None
    seed: Tensor | None
    # All weights in one flat tensor, in the order of WeightLayout.
    weights: Tensor
    steps: int
    n_layers: int
    inner_size: int
    n_heads: int
    # ``none`` without ``pre``.
    adapter: str
    output: str
    dropout: float
    attention_dropout: float
    eps: float
    longest: int | None
    # At least every depth. It fixes the number of rows of the output "steps".
    deepest: int | None
    bf16: bool
    # Whether the forward keeps what the backward needs.
    keep: bool
    backend: str | None

    @property
    def width(self) -> int:
        """Return the width D."""
        return self.h.shape[1]

    @property
    def batch(self) -> int:
        """Return the number of sequences B."""
        return len(self.offsets) - 1

    @property
    def first_step(self) -> int:
        """Return the number of the first step in a dropout address: 0 for the pre-block, and 1 for the recurrence."""
        return 0 if self.pre is None else 1

    @functools.cached_property
    def weight_layout(self) -> WeightLayout:
        """Return the layout, which says where each weight is in ``weights``."""
        return layout_of(self.adapter, self.width, self.inner_size, self.n_layers)

    @property
    def thresholds(self) -> tuple[int, int]:
        """Return the dropout thresholds of hidden activations and of attention; both are 0 without a seed."""
        if self.rows is None or self.seed is None:
            return 0, 0
        return drop_threshold(self.dropout), drop_threshold(self.attention_dropout)

    def depths(self) -> Tensor:
        """Return T of every sequence, int64 [B]."""
        return self.depth if self.depth is not None else self.offsets.new_full((self.batch,), self.steps)

    def draw(self) -> Draw | None:
        """Return the addresses of the dropout masks, or ``None``. The host waits for a seed on a GPU."""
        return None if self.rows is None or self.seed is None else Draw(key_of(self.seed), self.rows)

    def output_rows(self, total_depth: Rows) -> Rows:
        """Return the number of rows of the output if the sum of all depths is ``total_depth``."""
        by_step = total_depth if self.deepest is None else self.batch * self.deepest
        rows: dict[str, Rows] = {"last": self.batch, "steps": by_step, "tokens": len(self.h)}
        return rows[self.output]

    def empty_gradients(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return new tensors for the gradients of ``h``, ``pre`` and ``weights``; without ``pre`` the second one is empty."""
        like_pre = self.h.new_empty(0) if self.pre is None else _dense_like(self.pre)
        return _dense_like(self.h), like_pre, _dense_like(self.weights)


def _dense_like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def check(call: RecurrenceCall) -> None:
    """Raise :class:`InputError` for a wrong shape, dtype, device or range, all of which compilers know, too.

    The public function has checked ``h`` and the weights before.
    """
    h, offsets = call.h, call.offsets
    choice("output", call.output, OUTPUTS)
    if call.n_heads < 1 or call.width % call.n_heads:
        raise InputError(f"n_heads must divide the width of h, {call.width}, but got {call.n_heads}.")
    for name, rate in (("dropout", call.dropout), ("attention_dropout", call.attention_dropout)):
        if not 0 <= rate < 1:
            raise InputError(f"{name} must be in [0, 1), but got {rate}.")
    if offsets.device != h.device:
        raise InputError(f"offsets must be on {h.device} like h, but are on {offsets.device}.")
    if call.depth is not None:
        check_integers("depth", call.depth, call)
    elif not 1 <= call.steps <= MOST_STEPS:
        raise InputError(f"depth must be at least 1 and at most {MOST_STEPS:,}, but got {call.steps}.")
    if call.deepest is not None:
        if not 1 <= call.deepest <= MOST_STEPS:
            raise InputError(f"deepest must be at least 1 and at most {MOST_STEPS:,}, but got {call.deepest}.")
        if call.steps > call.deepest:
            raise InputError(f"deepest must be at least every depth, up to {call.steps}, but got {call.deepest}.")
    if call.eps < 0:
        raise InputError(f"eps must be at least 0, but got {call.eps}.")
    if call.longest is not None and not 1 <= call.longest < 2**63:
        raise InputError(f"longest must be at least 1 and an integer of 64 bits, but got {call.longest}.")
    if call.pre is not None:
        check_like_h("pre", call.pre, tuple(h.shape), h)


def check_integers(name: str, vector: Tensor, call: RecurrenceCall | None) -> None:
    """Raise :class:`InputError` unless ``vector`` is int64 with an entry for each sequence of ``call``, on an allowed device.

    Without ``call`` neither the number of entries nor the device is checked.
    """
    wanted = "[B + 1]" if call is None else f"[{call.batch}] as offsets say"
    check_dense(name, vector)
    if call is None and not vector.numel():
        raise InputError(f"{name} must have B + 1 entries, but are empty.")
    if vector.dim() != 1 or vector.dtype != torch.int64 or (call is not None and len(vector) != call.batch):
        raise InputError(f"{name} must be int64 {wanted}, but got {vector.dtype} {list(vector.shape)}.")
    if call is not None and vector.device not in (call.h.device, _CPU):
        raise InputError(f"{name} must be on the CPU or on {call.h.device} like h, but is on {vector.device}.")


def check_like_h(name: str, value: Tensor, shape: tuple[int, ...], h: Tensor) -> None:
    """Raise :class:`InputError` unless ``value`` has this shape, and the dtype and device of ``h``."""
    if value.dtype != h.dtype or value.device != h.device or value.shape != shape:
        raise InputError(
            f"{name} must be {h.dtype} {list(shape)} on {h.device} like h, "
            f"but got {value.dtype} {list(value.shape)} on {value.device}."
        )


def check_values(call: RecurrenceCall) -> None:
    """Raise :class:`InputError` for a wrong size of ``weights``, and for wrong ``depth`` and ``offsets`` on the CPU."""
    if len(call.weights) != call.weight_layout.size:
        raise InputError(f"weights must have {call.weight_layout.size} numbers in all, but have {len(call.weights)}.")
    if call.depth is not None and call.depth.device == _CPU and len(call.depth):
        least, most = int(call.depth.min()), int(call.depth.max())
        if not 1 <= least <= most <= MOST_STEPS:
            raise InputError(f"depth must be at least 1 and at most {MOST_STEPS:,}, but spans {least}..{most}.")
        if call.deepest is not None and most > call.deepest:
            raise InputError(f"deepest must be at least every depth, up to {most}, but got {call.deepest}.")
    if call.seed is not None:
        check_rows(call.rows)
    if call.offsets.device != _CPU:
        return
    lengths = call.offsets.diff()
    if int(call.offsets[0]) != 0 or int(call.offsets[-1]) != len(call.h) or bool((lengths < 1).any()):
        raise InputError(f"offsets must rise from 0 to the number of tokens, {len(call.h)}, by at least 1 a sequence.")
    if call.longest is not None and bool((lengths > call.longest).any()):
        raise InputError(f"longest must be at least every length, up to {int(lengths.max())}, but got {call.longest}.")
