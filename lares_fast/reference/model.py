"""LARES (arXiv 2505.16865) in plain PyTorch, as the official code computes it."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lares_fast._errors import InputError
from lares_fast._numbers import number, whole
from lares_fast._random import MOST_STEPS, SITE_INPUT, Draw, root_key
from lares_fast.config import LARESConfig
from lares_fast.reference.attention import attention_mask
from lares_fast.reference.backbone import build_block
from lares_fast.reference.depth import sample_depth
from lares_fast.reference.linear_cross_entropy import PAD, linear_cross_entropy, target_logprob, target_logprob_and_rank
from lares_fast.reference.recurrence import Recurrence
from lares_fast.reference.sequences import pad, rectangle, repeat

_EVALUATION_KEY = root_key(0)


class LARES(nn.Module):
    """Item embeddings -> pre-block once -> core-block T times -> last position -> scores of every item."""

    # The head of the losses, which a subclass may compute another way.
    linear_cross_entropy = staticmethod(linear_cross_entropy)
    target_logprob = staticmethod(target_logprob)
    target_logprob_and_rank = staticmethod(target_logprob_and_rank)

    def __init__(self, config: LARESConfig) -> None:
        super().__init__()
        self.config = config
        self.item_embedding = nn.Embedding(config.n_items, config.hidden_size, padding_idx=PAD)
        self.position_embedding = nn.Embedding(config.max_len, config.hidden_size)
        self.input_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.pre_block = build_block(config, config.n_pre_layers)
        self.recurrence = Recurrence(config)
        self.apply(self._initialise)

    def _initialise(self, module: nn.Module) -> None:
        # The PAD row is drawn like any other: it is scored by the training softmax.
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)

    def set_dropout(self, p: float) -> None:
        """Use hidden and attention dropout ``p`` from now on (the two training phases differ in it)."""
        p = number("p", p)
        self.config = self.config.replace(dropout=p, attention_dropout=None)
        for module in self.modules():
            for name in ("dropout", "attention_dropout"):
                if isinstance(getattr(module, name, None), float):
                    setattr(module, name, p)

    def encode(
        self,
        item_seq: Tensor,
        item_seq_len: Tensor,
        *,
        num_steps: int | Tensor | None = None,
        state: Tensor | None = None,
        return_all_steps: bool = False,
        draw: Draw | None = None,
    ) -> Tensor:
        """The latent state at each sequence's last position.

        ``item_seq`` [B, L] int64 item ids, right-padded with 0, L <= ``max_len``; ``item_seq_len`` [B] int64, each
        at least 1. Or packed: ``item_seq`` [P], one sequence behind the other, with offsets [B + 1] in the place of
        ``item_seq_len``. Lengths, offsets and depths may be on the CPU while items are on a GPU: nothing then waits for the
        GPU, and items are checked by PyTorch's embedding alone. ``num_steps`` T, one int or int64 [B] (default: drawn in
        training, ``config.steps`` in evaluation); ``state`` h0 [B, L, D], packed [P, D] (default: drawn by
        ``config.state_init``); ``draw`` addresses the random numbers of this pass. Without ``draw``, training takes a fresh
        key from torch's global generator, and evaluation gives every sequence the same fixed h0, so that equal histories
        give equal answers in any batch.

        Returns [B, D], or [B, T, D] with ``return_all_steps`` (T the largest depth; a sequence that
        stopped earlier repeats its last state). Raises :class:`InputError` for arguments that do not fit, and for a PAD inside
        a sequence. Items on a GPU are not looked at: there ``lares_fast.LARES`` gives NaN for such a sequence.
        """
        self._check_sequences(item_seq, item_seq_len)
        batch = len(item_seq_len) - (item_seq.dim() == 1)
        draw = draw or self._default_draw(batch)
        self._check_choices(item_seq, batch, 1, state, draw)
        depth = self._depth(num_steps, batch, draw)
        states = self._encode(item_seq, item_seq_len, 1, depth, state, draw, return_all_steps)
        return rectangle(states, depth) if return_all_steps else states

    def trajectories(
        self,
        item_seq: Tensor,
        item_seq_len: Tensor,
        num_steps: Tensor,
        *,
        state: Tensor | None = None,
        draw: Draw | None = None,
    ) -> Tensor:
        """The latent state at each sequence's last position after every step of G passes over the same B sequences.

        ``num_steps`` [G, B] int64; ``state`` [G * B, L, D], packed [G * P, D], and ``draw`` with G * B rows, pass by pass; the
        rest as in :meth:`encode`. Returns [sum of ``num_steps``, D]: pass by pass, sequence by sequence, step by step.
        """
        self._check_sequences(item_seq, item_seq_len)
        batch = len(item_seq_len) - (item_seq.dim() == 1)
        if not isinstance(num_steps, Tensor) or num_steps.dim() != 2 or num_steps.shape[1] != batch or not len(num_steps):
            got = list(num_steps.shape) if isinstance(num_steps, Tensor) else repr(num_steps)[:40]
            raise InputError(f"num_steps must be [G, {batch}] with a row for each of G passes, but got {got}.")
        passes = len(num_steps)
        draw = draw or self._default_draw(passes * batch)
        self._check_choices(item_seq, batch, passes, state, draw)
        depth = self._depth(num_steps.flatten(), passes * batch, draw)
        return self._encode(item_seq, item_seq_len, passes, depth, state, draw, True)

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
        """``passes`` passes over B sequences with every choice made, ``depth`` [passes * B] int64 on the CPU.

        Returns the last states [passes * B, D], or those of every step as :meth:`trajectories` has them.
        """
        item_seq_len, depth = item_seq_len.to(item_seq.device), depth.to(item_seq.device)
        if item_seq.dim() == 1:
            item_seq, offsets = repeat(item_seq, item_seq_len, passes)
            state = None if state is None else pad(state, offsets, self.config.max_len)[0]
            item_seq, item_seq_len = pad(item_seq, offsets, self.config.max_len)
        else:
            item_seq, item_seq_len = item_seq.repeat(passes, 1), item_seq_len.repeat(passes)
        if state is None:
            state = self.initial_state(draw, item_seq.shape[1])
        last = (item_seq_len - 1)[:, None, None].expand(-1, 1, self.config.hidden_size)
        at_last = [h.gather(1, last) for h in self._states(item_seq, state, depth, draw if self.training else None)]
        if not every_step:
            return at_last[-1].squeeze(1)
        running = torch.arange(len(at_last), device=depth.device) < depth[:, None]
        return torch.cat(at_last, dim=1)[running]

    def _states(self, item_seq: Tensor, state: Tensor, depth: Tensor, draw: Draw | None) -> Iterator[Tensor]:
        x = self.item_embedding(item_seq) + self.position_embedding.weight[: item_seq.shape[1]]
        x = self.input_norm(x)
        if draw is not None:
            x = draw.hidden(x, self.config.dropout, site=SITE_INPUT, step=0, layer=0)
        mask = attention_mask(item_seq, x.dtype)
        pre = self.pre_block(x, mask, draw=draw, step=0)
        return self.recurrence(state.to(x), pre, mask, depth, draw=draw)

    def initial_state(self, draw: Draw, length: int) -> Tensor:
        """h0 [B, L, D] by ``config.state_init``: noise (fp32) addressed by ``draw``, or zeros."""
        return self._initial_state(draw, draw.rows[:, None], torch.arange(length))

    def _initial_state(self, draw: Draw, rows: Tensor, positions: Tensor) -> Tensor:
        config = self.config
        if config.state_init == "zero" or (config.state_init == "normal_zero" and not self.training):
            return torch.zeros(*torch.broadcast_shapes(rows.shape, positions.shape), config.hidden_size)
        return draw.initial_state(rows, positions, config.hidden_size) * (config.state_std * config.state_scale)

    def _default_draw(self, batch: int) -> Draw:
        if self.training:
            return Draw(root_key(int(torch.randint(2**62, ()))), torch.arange(batch))
        return Draw(_EVALUATION_KEY, torch.zeros(batch, dtype=torch.int64))

    def _depth(self, num_steps: int | Tensor | None, batch: int, draw: Draw) -> Tensor:
        if num_steps is None:
            if not self.training:
                num_steps = self.config.steps
            else:
                size = batch if self.config.per_sequence_depth else 1
                num_steps = sample_depth(self.config, size, draw.generator())
        if not isinstance(num_steps, Tensor):
            num_steps = torch.tensor(whole("num_steps", num_steps))
        if _not_integers(num_steps) or num_steps.shape not in ((), (1,), (batch,)):
            raise InputError(
                f"num_steps must be an integer or int64 [{batch}], but got {num_steps.dtype} {list(num_steps.shape)}."
            )
        depth = num_steps.to("cpu", torch.int64).expand(batch)
        if batch and not 1 <= int(depth.min()) <= int(depth.max()) <= MOST_STEPS:
            raise InputError(
                f"num_steps must be at least 1 and at most {MOST_STEPS:,}, but spans {int(depth.min())}..{int(depth.max())}."
            )
        return depth

    def _check_sequences(self, item_seq: Tensor, item_seq_len: Tensor) -> None:
        for name, value in (("item_seq", item_seq), ("item_seq_len", item_seq_len)):
            if not isinstance(value, Tensor) or _not_integers(value):
                got = value.dtype if isinstance(value, Tensor) else type(value).__name__
                raise InputError(f"{name} must be a tensor of integers, but got {got}.")
        packed = item_seq.dim() == 1
        if packed:
            self._check_offsets(item_seq, item_seq_len)
        else:
            self._check_lengths(item_seq, item_seq_len)
        if item_seq.device.type != "cpu" or not item_seq.numel():
            return
        lowest, highest = int(item_seq.min()), int(item_seq.max())
        if not 0 <= lowest <= highest < self.config.n_items:
            raise InputError(f"item_seq must hold ids in 0..{self.config.n_items - 1}, but it spans {lowest}..{highest}.")
        if lowest:
            return
        pads = item_seq == PAD
        if not packed:
            pads &= torch.arange(item_seq.shape[1]) < item_seq_len.cpu()[:, None]
        if bool(pads.any()):
            raise InputError(
                f"item_seq holds PAD (0) inside a sequence, at {pads.nonzero()[0].tolist()}: padding belongs behind the last "
                "item, so move left padding there and drop PADs between items."
            )

    def _check_offsets(self, item_seq: Tensor, offsets: Tensor) -> None:
        longest = self.config.max_len
        if offsets.dim() != 1 or not len(offsets) or int(offsets[0]) or int(offsets[-1]) != len(item_seq):
            raise InputError(f"the offsets of packed sequences must be [B + 1] from 0 to {len(item_seq)}, the number of items.")
        lengths = offsets.diff()
        if len(lengths) and not 1 <= int(lengths.min()) <= int(lengths.max()) <= longest:
            raise InputError(
                f"packed sequences must have 1..{longest} items, but have {int(lengths.min())}..{int(lengths.max())}."
            )

    def _check_lengths(self, item_seq: Tensor, lengths: Tensor) -> None:
        longest = self.config.max_len
        if item_seq.dim() != 2 or item_seq.shape[1] > longest:
            raise InputError(f"item_seq must be [B, L] with L <= {longest}, but got {list(item_seq.shape)}.")
        if lengths.shape != item_seq.shape[:1]:
            raise InputError(f"item_seq_len must be [{len(item_seq)}], but got {list(lengths.shape)}.")
        if len(item_seq) and not 1 <= int(lengths.min()) <= int(lengths.max()) <= item_seq.shape[1]:
            raise InputError(
                f"item_seq_len must be in 1..{item_seq.shape[1]}, but it spans "
                f"{int(lengths.min())}..{int(lengths.max())}; drop empty histories."
            )

    def _check_choices(self, item_seq: Tensor, batch: int, passes: int, state: Tensor | None, draw: Draw) -> None:
        """h0 and the addresses of the random numbers of ``passes`` passes over ``batch`` sequences."""
        if draw.rows.shape != (passes * batch,) or _not_integers(draw.rows):
            raise InputError(
                f"draw.rows must be int64 [{passes * batch}], one of each sequence, "
                f"but got {draw.rows.dtype} {list(draw.rows.shape)}."
            )
        shape = (passes * len(item_seq), *item_seq.shape[1:], self.config.hidden_size)
        if state is not None and (state.shape != shape or not state.dtype.is_floating_point):
            raise InputError(f"state must be floating-point {list(shape)}, but got {state.dtype} {list(state.shape)}.")

    def compared(self, x: Tensor) -> Tensor:
        """``x`` [..., D] as it enters similarities between states: itself, or its direction with ``cos``."""
        return F.normalize(x, dim=-1) if self.config.similarity == "cos" else x

    def query_and_items(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """``(query [..., D], items [N, D])`` whose dot products are the scores of ``hidden`` [..., D]."""
        items = self.compared(self.item_embedding.weight)
        if self.config.similarity == "cos":
            return self.compared(hidden) / self.config.tau, items
        return hidden, items

    def forward(self, item_seq: Tensor, item_seq_len: Tensor, *, num_steps: int | Tensor | None = None) -> Tensor:
        """Scores [B, N] of every row of the item table, PAD included; arguments as in :meth:`encode`."""
        query, items = self.query_and_items(self.encode(item_seq, item_seq_len, num_steps=num_steps))
        return query @ items.T


def _not_integers(tensor: Tensor) -> bool:
    return tensor.dtype == torch.bool or tensor.dtype.is_floating_point or tensor.dtype.is_complex
