"""The model users build: the reference's parameters, with serving through the public ops."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from lares_fast import _native, ops, reference
from lares_fast._dispatch import explain, requested
from lares_fast._errors import InputError
from lares_fast._random import SITE_INPUT, Draw, drop_threshold, dropped, keep_hidden, normal_of
from lares_fast._transfer import sent
from lares_fast.config import LARESConfig
from lares_fast.reference.sequences import pack, places, repeat
from lares_fast.reference.topk import Exclude

# Backbones whose positions see only themselves and earlier ones.
_CAUSAL = {"transformer"}


class LARES(reference.LARES):
    """LARES with the parameters of :class:`lares_fast.reference.LARES` and exact recommendation on top.

    >>> model = LARES(LARESConfig(n_items=1000))  # doctest: +SKIP
    >>> scores, ids = model.eval().recommend(item_seq, item_seq_len, k=10)  # doctest: +SKIP
    """

    # Of every op; None means as the context, the environment or the arguments say.
    backend: str | None = None
    # Of encoding in evaluation mode, which then has no gradient: as in ops.recurrence.
    bf16: bool = False

    def __init__(self, config: LARESConfig, *, backend: str | None = None, bf16: bool = False) -> None:
        requested(backend)
        super().__init__(config)
        self.backend, self.bf16 = backend, bf16

    def linear_cross_entropy(self, *arguments: Any, **options: Any) -> Tensor:
        """:func:`lares_fast.ops.linear_cross_entropy` on this model's backend."""
        return ops.linear_cross_entropy(*arguments, backend=self.backend, **options)

    def target_logprob(self, *arguments: Any, **options: Any) -> Tensor:
        """:func:`lares_fast.ops.target_logprob` on this model's backend."""
        return ops.target_logprob(*arguments, backend=self.backend, **options)

    def target_logprob_and_rank(self, *arguments: Any, **options: Any) -> tuple[Tensor, Tensor]:
        """:func:`lares_fast.ops.target_logprob_and_rank` on this model's backend."""
        return ops.target_logprob_and_rank(*arguments, backend=self.backend, **options)

    def _encode(
        self,
        item_seq: Tensor,
        item_seq_len: Tensor,
        passes: int,
        depth: Tensor,
        state: Tensor | None,
        draw: Draw,
        every_step: bool,
    ) -> Tensor:
        """The reference's on packed sequences: exact for a causal block, whose real positions never see a later one."""
        if self.bf16 and self.config.backbone not in _CAUSAL:
            raise InputError(f"bf16 needs a causal backbone, and this is {self.config.backbone!r}: leave bf16 out.")
        if self.config.backbone not in _CAUSAL or not len(depth):
            return super()._encode(item_seq, item_seq_len, passes, depth, state, draw, every_step)
        if item_seq.dim() == 2:
            state = None if state is None else pack(state, item_seq_len.repeat(passes))[0]
            item_seq, item_seq_len = pack(item_seq, item_seq_len)
        items, offsets = repeat(item_seq, item_seq_len, passes)
        sequence, position = places(offsets)
        if state is None:
            state = self._packed_state(draw, sequence.cpu(), position.cpu())
        masks = draw if self.training and (self.config.dropout or self.config.attention_dropout) else None
        if masks is None:
            # No masks tell the passes apart before their h0 does.
            pre, _ = repeat(self._before(item_seq, item_seq_len, None), item_seq_len, passes)
        else:
            pre = self._before(items, offsets, masks)
        output = "steps" if every_step else "last"
        return self._steps(
            self.recurrence, sent(state, pre.device).to(pre), offsets, masks, pre=pre, depth=depth, output=output
        )

    def _packed_state(self, draw: Draw, sequence: Tensor, position: Tensor) -> Tensor:
        """h0 [P, D]."""
        if bool((draw.rows == draw.rows[0]).all()):
            # As without a draw in evaluation: every sequence has the same.
            return self._initial_state(draw, draw.rows[:1], torch.arange(int(position.max()) + 1))[position]
        return self._initial_state(
            _NativeDraw(draw.key, draw.rows) if _native.available()[0] else draw, draw.rows[sequence], position
        )

    def _before(self, items: Tensor, offsets: Tensor, draw: Draw | None) -> Tensor:
        """What every step reads, [P, D]."""
        x = self._input(items, *places(offsets), draw)
        return self._steps(self.pre_block, x, offsets, draw, output="tokens")

    def _input(self, items: Tensor, sequence: Tensor, position: Tensor, draw: Draw | None) -> Tensor:
        """What the pre-block reads, [P, D]."""
        x = self.input_norm(self.item_embedding(items) + self.position_embedding(sent(position, items.device)))
        if draw is None or not self.config.dropout:
            return x
        sequence, position = sequence.cpu(), position.cpu()
        threshold, width = drop_threshold(self.config.dropout), x.shape[1]
        address: dict[str, Any] = {"site": SITE_INPUT, "step": 0, "layer": 0, "width": width}
        if _native.available()[0]:
            keep = _native.keep_hidden(draw.key, threshold, **address, rows=draw.rows[sequence], positions=position)
        else:
            length = int(position.max()) + 1
            keep = keep_hidden(draw.key, threshold, **address, rows=draw.rows, length=length)[sequence, position]
        return dropped(x, sent(keep, x.device), threshold)

    def _steps(self, block: nn.Module, h: Tensor, offsets: Tensor, draw: Draw | None, **arguments: Any) -> Tensor:
        config = self.config
        return ops.recurrence(
            h,
            sent(offsets, h.device),
            list(block.parameters()),
            n_heads=config.n_heads,
            adapter=config.adapter,
            draw=draw,
            dropout=config.dropout,
            attention_dropout=config.attention_dropout,
            eps=config.layer_norm_eps,
            longest=config.max_len,
            bf16=self.bf16 and not self.training,
            backend=self.backend,
            **arguments,
        )

    @torch.no_grad()
    def recommend(
        self,
        item_seq: Tensor,
        item_seq_len: Tensor,
        k: int = 10,
        *,
        num_steps: int | None = None,
        state: Tensor | None = None,
        exclude: Exclude | None = None,
        backend: str | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Scores [B, k] and item ids [B, k] (int64) of the best items, PAD never among them.

        ``item_seq``, ``item_seq_len``, ``num_steps`` and ``state`` as in :meth:`encode`; ``exclude`` as in
        :func:`lares_fast.ops.topk`, in item ids; ``k`` up to the number of items. Raises :class:`InputError`.
        """
        if not 1 <= k <= self.config.n_items - 1:
            raise InputError(f"k must be in 1..{self.config.n_items - 1}, the number of items, but got {k}.")
        hidden = self.encode(item_seq, item_seq_len, num_steps=num_steps, state=state)
        query, items = self.query_and_items(hidden)
        if exclude is not None:
            exclude = _without_pad(exclude)
        # Row 0 is PAD: rank the rows behind it, and shift ids back.
        scores, rows = ops.topk(query, items[1:], k, exclude=exclude, backend=backend or self.backend)
        return scores, torch.where(rows < 0, rows, rows + 1)


def accelerate(model: reference.LARES, *, backend: str | None = None) -> str:
    """Put the fast encoder under ``model``, which other code holds, and say what was replaced.

    ``model`` is a :class:`lares_fast.reference.LARES`, and becomes a :class:`LARES` in place: parameters, their names,
    optimizer state and hooks stay as they are. ``backend`` as in :class:`LARES`. Raises :class:`InputError` for any other
    class, because a subclass may have changed what is replaced.
    """
    if type(model) not in (reference.LARES, LARES):
        raise InputError(f"model must be a reference.LARES, but is a {type(model).__name__}: build lares_fast.LARES instead.")
    requested(backend)
    model.__class__ = LARES
    cast(LARES, model).backend = backend
    items = model.item_embedding.weight.detach()
    h = items.new_empty(1, model.config.hidden_size)
    calls: dict[str, tuple[Any, ...]] = {"linear_cross_entropy": (h, items), "topk": (h, items, 1)}
    if model.config.backbone in _CAUSAL:
        encode = "encode: packed sequences, ops.recurrence"
        calls = {"recurrence": (h, torch.tensor([0, 1]), list(model.recurrence.parameters())), **calls}
    else:
        encode = f"encode: as before, because the backbone {model.config.backbone!r} is not causal"
    return "\n".join([encode, *(explain(op, *arguments, backend=backend) for op, arguments in calls.items())])


class _NativeDraw(Draw):
    """The same h0 from the native module."""

    def initial_state(self, rows: Tensor, positions: Tensor, width: int) -> Tensor:
        """``rows`` and ``positions`` [P]."""
        return normal_of(_native.state_uniforms(self.key, rows, positions, width))


def _without_pad(exclude: Exclude) -> Exclude:
    """The same lists as rows of the table behind PAD; PAD entries, which padded histories hold, are left out."""
    offsets, ids = exclude
    real = ids != 0
    kept = torch.cat((real.new_zeros(1, dtype=torch.int64), real.cumsum(0)))
    return kept[offsets], ids[real] - 1
