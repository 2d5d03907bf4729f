"""Blocks: the stacks of layers that LARES runs once (pre-block) or T times (core-block). They are looked up by name."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional as F

from lares_fast._errors import InputError
from lares_fast._random import SITE_ATTENTION_OUT, SITE_FEED_FORWARD_OUT, Draw
from lares_fast.config import LARESConfig
from lares_fast.reference.attention import attention

BACKBONES: dict[str, Callable[[LARESConfig, int], nn.Module]] = {}


def register_backbone(name: str, build: Callable[[LARESConfig, int], nn.Module]) -> None:
    """Make ``backbone=name`` build its blocks with ``build(config, n_layers)``.

    The model calls a block as ``block(x [B, L, D], mask [B, 1, L, L], draw=..., step=...)``. The block must return [B, L, D].
    """
    BACKBONES[name] = build


def build_block(config: LARESConfig, n_layers: int) -> nn.Module:
    """Return a new block of ``config.backbone`` with ``n_layers`` layers. An unknown backbone raises :class:`InputError`."""
    if config.backbone not in BACKBONES:
        raise InputError(f"backbone must be one of {', '.join(sorted(BACKBONES))}, but got {config.backbone!r}.")
    return BACKBONES[config.backbone](config, n_layers)


class SelfAttention(nn.Module):
    """The attention half of a layer: ``LN(dropout(output(attention(x))) + x)``."""

    def __init__(self, config: LARESConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.query, self.key, self.value, self.output = (nn.Linear(width, width) for _ in range(4))
        self.norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.n_heads = config.n_heads
        self.dropout = config.dropout
        self.attention_dropout = config.dropout if config.attention_dropout is None else config.attention_dropout

    def forward(self, x: Tensor, mask: Tensor, *, draw: Draw | None, step: int, layer: int) -> Tensor:
        """Map ``x`` [B, L, D] to [B, L, D]; ``mask`` is [B, 1, L, L]."""

        def heads(y: Tensor) -> Tensor:
            return y.unflatten(-1, (self.n_heads, -1)).transpose(1, 2)

        context = attention(
            heads(self.query(x)),
            heads(self.key(x)),
            heads(self.value(x)),
            mask,
            draw=draw,
            dropout=self.attention_dropout,
            step=step,
            layer=layer,
        )
        y = self.output(context.transpose(1, 2).flatten(-2))
        if draw is not None:
            y = draw.hidden(y, self.dropout, site=SITE_ATTENTION_OUT, step=step, layer=layer)
        return self.norm(y + x)


class FeedForward(nn.Module):
    """The feed-forward half of a layer: ``LN(dropout(down(gelu(up(x)))) + x)``, with the exact (erf) GELU."""

    def __init__(self, config: LARESConfig) -> None:
        super().__init__()
        self.up = nn.Linear(config.hidden_size, config.inner_size)
        self.down = nn.Linear(config.inner_size, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = config.dropout

    def forward(self, x: Tensor, *, draw: Draw | None, step: int, layer: int) -> Tensor:
        """Map ``x`` [B, L, D] to [B, L, D]."""
        y = self.down(F.gelu(self.up(x)))
        if draw is not None:
            y = draw.hidden(y, self.dropout, site=SITE_FEED_FORWARD_OUT, step=step, layer=layer)
        return self.norm(y + x)


class TransformerLayer(nn.Module):
    """A post-LN transformer layer."""

    def __init__(self, config: LARESConfig) -> None:
        super().__init__()
        self.attention = SelfAttention(config)
        self.feed_forward = FeedForward(config)

    def forward(self, x: Tensor, mask: Tensor, *, draw: Draw | None, step: int, layer: int) -> Tensor:
        """Map ``x`` [B, L, D] to [B, L, D]."""
        x = self.attention(x, mask, draw=draw, step=step, layer=layer)
        return self.feed_forward(x, draw=draw, step=step, layer=layer)


class TransformerBlock(nn.Module):
    """A stack of ``n_layers`` post-LN transformer layers."""

    def __init__(self, config: LARESConfig, n_layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(TransformerLayer(config) for _ in range(n_layers))

    def forward(self, x: Tensor, mask: Tensor, *, draw: Draw | None, step: int) -> Tensor:
        """Map ``x`` [B, L, D] to [B, L, D]. If ``draw`` is given, dropout has the address (``step``, layer)."""
        for layer, module in enumerate(self.layers):
            x = module(x, mask, draw=draw, step=step, layer=layer)
        return x


register_backbone("transformer", TransformerBlock)
