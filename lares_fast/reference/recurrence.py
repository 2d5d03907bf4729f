"""The recurrence: T steps of the core-block over a latent state. A step first joins the state with the pre-block's output."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lares_fast._random import Draw
from lares_fast.config import LARESConfig
from lares_fast.reference.attention import attention_mask
from lares_fast.reference.backbone import build_block
from lares_fast.reference.weights import WeightLayout
from lares_fast.sequences import pad, unpad


class AddAdapter(nn.Module):
    """The adapter ``add``: ``(h + pre) / 2``."""

    def forward(self, h: Tensor, pre: Tensor) -> Tensor:
        """Join ``h`` and ``pre``, [B, L, D] each, to [B, L, D]."""
        return (h + pre) / 2


class ConcatAdapter(nn.Module):
    """The adapter ``concat``: ``Linear([h, pre])``."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(2 * width, width)

    def forward(self, h: Tensor, pre: Tensor) -> Tensor:
        """Join ``h`` and ``pre``, [B, L, D] each, to [B, L, D]."""
        return self.linear(torch.cat((h, pre), dim=-1))


class LinearAdapter(nn.Module):
    """The adapter ``linear``: ``s * h + (1 - s) * pre`` with ``s = sigmoid(gate)``; the gate is one learned number."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(()))

    def forward(self, h: Tensor, pre: Tensor) -> Tensor:
        """Join ``h`` and ``pre``, [B, L, D] each, to [B, L, D]."""
        share = self.gate.sigmoid()
        return share * h + (1 - share) * pre


def build_adapter(config: LARESConfig) -> nn.Module:
    """Return the adapter that ``config.adapter`` names."""
    if config.adapter == "add":
        return AddAdapter()
    if config.adapter == "concat":
        return ConcatAdapter(config.hidden_size)
    return LinearAdapter()


class Recurrence(nn.Module):
    """``h = core(LN(adapter(h, pre)))``, T times with shared weights."""

    def __init__(self, config: LARESConfig) -> None:
        super().__init__()
        self.adapter = build_adapter(config)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.core = build_block(config, config.n_core_layers)

    def forward(self, h: Tensor, pre: Tensor, mask: Tensor, depth: Tensor, *, draw: Draw | None) -> Iterator[Tensor]:
        """Yield the state [B, L, D] after step 1, 2, ..., max(depth).

        ``h`` and ``pre`` are [B, L, D], ``mask`` is [B, 1, L, L], and ``depth`` is int64 [B]. A sequence that has taken its own
        number of steps keeps its state. Dropout addresses count steps from 1; step 0 is the pre-block.
        """
        steps = int(depth.max()) if len(depth) else 1
        for step in range(1, steps + 1):
            advanced = self.core(self.norm(self.adapter(h, pre)), mask, draw=draw, step=step)
            running = step <= depth
            h = advanced if running.all() else torch.where(running[:, None, None], advanced, h)
            yield h


def recurrence(
    h: Tensor,
    offsets: Tensor,
    weights: Sequence[Tensor],
    *,
    n_heads: int,
    pre: Tensor | None = None,
    adapter: str = "add",
    depth: Tensor,
    output: str = "last",
    draw: Draw | None = None,
    dropout: float = 0.0,
    attention_dropout: float = 0.0,
    eps: float = 1e-12,
    deepest: int | None = None,
    bf16: bool = False,
) -> Tensor:
    """Return :func:`lares_fast.ops.recurrence`, computed on padded sequences. ``depth`` must be int64 [B].

    With ``bf16`` the rounding of an operand does not round its gradient.
    """
    lengths = offsets.diff()
    longest = int(lengths.max()) if len(lengths) else 0
    real = torch.arange(longest, device=h.device) < lengths[:, None]
    # Padded rows are 1, -1, 1, ..., because the layer norm of equal numbers has a slope that is too large for fp16.
    fill = 1 - torch.arange(h.shape[1], device=h.device) % 2 * 2
    layout = WeightLayout.of(weights, "none" if pre is None else adapter, h.shape[1])
    config = LARESConfig.preview(
        hidden_size=layout.width,
        n_heads=n_heads,
        inner_size=layout.inner_size,
        n_core_layers=layout.n_layers,
        adapter="add" if pre is None else adapter,
        dropout=dropout,
        attention_dropout=attention_dropout,
        layer_norm_eps=eps,
    )
    with torch.device("meta"):
        steps = _Steps(config, with_adapter=pre is not None)
    if bf16:
        weights = [_rounded(weight) if weight.dim() == 2 else weight for weight in weights]
        for linear in filter(lambda module: isinstance(module, nn.Linear), steps.modules()):
            linear.register_forward_pre_hook(lambda _, x: (_rounded(x[0]),))
    named = dict(zip((name for name, _ in steps.named_parameters()), weights, strict=True))
    mask = attention_mask(real, h.dtype)
    padded = [None if x is None else pad(x, offsets, longest, fill) for x in (h, pre)]
    arguments = (*padded, mask, depth, draw)
    states = torch.func.functional_call(steps, named, arguments)
    if output == "tokens":
        return unpad(states[-1], offsets)
    last = (lengths - 1)[:, None, None].expand(-1, 1, h.shape[1])
    at_last = torch.cat([state.gather(1, last) for state in states], dim=1)
    if output == "last":
        return at_last[:, -1]
    packed = at_last[torch.arange(1, len(states) + 1, device=h.device) <= depth[:, None]]
    if deepest is None:
        return packed
    # The mask has one packed row for each depth, and after the packed rows there are rows of 0.
    return F.pad(packed, (0, 0, 0, len(lengths) * deepest - len(packed)))


def _rounded(x: Tensor) -> Tensor:
    """Return the nearest bf16 numbers, in the dtype of ``x``. The gradient of the result is the gradient of ``x``."""
    return x + (x.to(torch.bfloat16).to(x.dtype) - x).detach()


class _Steps(nn.Module):
    """A recurrence, or a block that is applied to its own output. It returns the list of the states after every step."""

    def __init__(self, config: LARESConfig, *, with_adapter: bool) -> None:
        super().__init__()
        self.inner = Recurrence(config) if with_adapter else build_block(config, config.n_core_layers)

    def forward(self, h: Tensor, pre: Tensor | None, mask: Tensor, depth: Tensor, draw: Draw | None) -> list[Tensor]:
        if pre is not None:
            return list(self.inner(h, pre, mask, depth, draw=draw))
        states = []
        for step in range(int(depth.max()) if len(depth) else 1):
            h = torch.where((step < depth)[:, None, None], self.inner(h, mask, draw=draw, step=step), h)
            states.append(h)
        return states
