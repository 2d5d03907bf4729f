"""The model users build: the reference's parameters, with serving through the public ops."""

from __future__ import annotations

import warnings
from typing import Any, cast

import torch
from torch import Tensor, nn

from lares_fast import _modules, _native, _native_random, ops, reference
from lares_fast._dispatch import explain, requested
from lares_fast._errors import InputError
from lares_fast._numbers import whole
from lares_fast._random import SITE_INPUT, Draw, apply_dropout, drop_threshold, keep_hidden, normal_of
from lares_fast._transfer import sent
from lares_fast.config import LARESConfig
from lares_fast.ops._catalog_checks import check_exclude, checked_exclude
from lares_fast.reference.linear_cross_entropy import PAD
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
    # What was last warned of.
    _warned: str | None = None

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
        if (why := self._padded_because()) is not None:
            if self.bf16:
                raise InputError(f"bf16 needs the packed encoder, and the model runs padded, because {why}: leave bf16 out.")
            return super()._encode(item_seq, item_seq_len, passes, depth, state, draw, every_step)
        if not len(depth):
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

    def _padded_because(self) -> str | None:
        """Why the model is encoded as its reference is, module by module on padded sequences, or ``None``."""
        if self.config.backbone not in _CAUSAL:
            return f"the backbone {self.config.backbone!r} is not causal"
        if (why := _modules.changed(self)) is not None and why != self._warned:
            self._warned = why
            warnings.warn(f"LARES is encoded by its modules on padded sequences, which is slower, because {why}.", stacklevel=2)
        return why

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
        if items.device.type != "cpu":
            # A PAD within a sequence is refused on the CPU; elsewhere the check would wait, so the answer is NaN.
            x = x.masked_fill((items == PAD)[:, None], torch.nan)
        if draw is None or not self.config.dropout:
            return x
        sequence, position = sequence.cpu(), position.cpu()
        threshold, width = drop_threshold(self.config.dropout), x.shape[1]
        address: dict[str, Any] = {"site": SITE_INPUT, "step": 0, "layer": 0, "width": width}
        if _native.available()[0]:
            keep = _native_random.keep_hidden(draw.key, threshold, **address, rows=draw.rows[sequence], positions=position)
        else:
            length = int(position.max()) + 1
            keep = keep_hidden(draw.key, threshold, **address, rows=draw.rows, length=length)[sequence, position]
        return apply_dropout(x, sent(keep, x.device), threshold)

    def _steps(self, block: nn.Module, h: Tensor, offsets: Tensor, draw: Draw | None, **arguments: Any) -> Tensor:
        config = self.config
        return ops.recurrence(
            h,
            sent(offsets, h.device),
            # A parameter that two layers share comes twice.
            [parameter for _, parameter in block.named_parameters(remove_duplicate=False)],
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
        if not 1 <= whole("k", k) <= self.config.n_items - 1:
            raise InputError(f"k must be in 1..{self.config.n_items - 1}, the number of items, but got {k}.")
        hidden = self.encode(item_seq, item_seq_len, num_steps=num_steps, state=state)
        query, items = self.query_and_items(hidden)
        if exclude is not None:
            check_exclude(exclude, query)
            exclude = _without_pad(checked_exclude(*exclude, self.config.n_items))
        # Row 0 is PAD: rank the rows behind it, and shift ids back.
        scores, rows = ops.topk(query, items[1:], k, exclude=exclude, backend=backend or self.backend)
        return scores, torch.where(rows < 0, rows, rows + 1)


def accelerate(model: reference.LARES, *, backend: str | None = None) -> str:
    """Put the fast encoder under ``model``, which other code holds, and say what was replaced.

    ``model`` is a :class:`lares_fast.reference.LARES`, and becomes a :class:`LARES` in place: parameters, their names,
    optimizer state and hooks stay as they are. The fast encoder computes from the parameters and does not call the modules.
    So a model whose modules do more than their configuration says (a hook, a module of another class, a parametrised
    weight) is still encoded by its modules, and the answer says which one and why. ``backend`` as in :class:`LARES`.
    Raises :class:`InputError` for any other class, because a subclass may have changed what is replaced.
    """
    if type(model) not in (reference.LARES, LARES):
        raise InputError(f"model must be a reference.LARES, but is a {type(model).__name__}: build lares_fast.LARES instead.")
    requested(backend)
    model.__class__ = LARES
    cast(LARES, model).backend = backend
    items = model.item_embedding.weight.detach()
    h = items.new_empty(1, model.config.hidden_size)
    target = torch.ones(1, dtype=torch.int64, device=items.device)
    calls: dict[str, tuple[Any, ...]] = {"linear_cross_entropy": (h, items, target), "topk": (h, items, 1)}
    if (why := cast(LARES, model)._padded_because()) is None:
        encode = "encode: packed sequences, ops.recurrence"
        weights = [parameter for _, parameter in model.recurrence.named_parameters(remove_duplicate=False)]
        calls = {"recurrence": (h, torch.tensor([0, 1]), weights), **calls}
    else:
        encode = f"encode: as before, because {why}"
    return "\n".join([encode, *(explain(op, *arguments, backend=backend) for op, arguments in calls.items())])


class _NativeDraw(Draw):
    """The same h0 from the native module."""

    def initial_state(self, rows: Tensor, positions: Tensor, width: int) -> Tensor:
        """``rows`` and ``positions`` [P]."""
        return normal_of(_native_random.state_uniforms(self.key, rows, positions, width))


def _without_pad(exclude: Exclude) -> Exclude:
    """The same lists as rows of the table behind PAD; PAD entries, which padded histories hold, are left out."""
    offsets, ids = exclude
    real = ids != PAD
    kept = torch.cat((real.new_zeros(1, dtype=torch.int64), real.cumsum(0)))
    return kept[offsets.clamp(0, len(ids))], ids[real] - 1
