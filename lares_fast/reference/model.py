"""LARES (arXiv 2505.16865) in plain PyTorch, as the official code computes it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from lares_fast._errors import InputError
from lares_fast._numbers import MOST_STEPS, check_stored, flag, is_integer, number, shown, whole
from lares_fast._random import SITE_INPUT, Draw, root_key
from lares_fast._transfer import to_device
from lares_fast.config import LARESConfig
from lares_fast.reference.attention import attention_mask
from lares_fast.reference.backbone import build_block
from lares_fast.reference.depth import sample_batch_depth
from lares_fast.reference.head import REFERENCE_HEAD, Head
from lares_fast.reference.recurrence import Recurrence
from lares_fast.sequences import PAD, Sequences, pad, unpad

_EVALUATION_KEY = root_key(0)


class LARES(nn.Module):
    """Item embeddings -> pre-block once -> core-block T times -> last position -> scores of every item."""

    def __init__(self, config: LARESConfig) -> None:
        super().__init__()
        self.config = config
        self.item_embedding = nn.Embedding(config.n_items, config.hidden_size, padding_idx=PAD)
        self.position_embedding = nn.Embedding(config.max_len, config.hidden_size)
        self.input_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.pre_block = build_block(config, config.n_pre_layers)
        self.recurrence = Recurrence(config)
        self.apply(self._initialise)

    @property
    def head(self) -> Head:
        """Return the functions with which the losses score targets against the item table."""
        return REFERENCE_HEAD

    def _initialise(self, module: nn.Module) -> None:
        # The PAD row gets random values like every other row, because the training softmax scores it.
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)

    def set_dropout(self, p: float) -> None:
        """Set hidden and attention dropout to ``p`` from now on. The two training phases use different values."""
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
        """Return the latent state at the last position of each sequence, [B, D].

        ``item_seq``, ``item_seq_len``
            Padded: int64 item ids [B, L], filled with 0 on the right, where L is at most ``max_len``, and int64 lengths [B],
            each at least 1. Packed: the items [P] of all sequences one after the other, and int64 offsets [B + 1]. A
            :class:`lares_fast.reference.Sequences` is the packed pair: ``encode(*batch.sequences)``.
        ``num_steps``
            T, one integer or int64 [B]. The default is ``config.steps`` in evaluation. In training the default is drawn at
            random.
        ``state``
            h0 [B, L, D], or [P, D] for packed sequences. The default is as ``config.state_init`` says.
        ``return_all_steps``
            Return the states after every step, [B, T, D] with the largest T. A sequence that stopped earlier repeats its
            last state.
        ``draw``
            The addresses of the random numbers of this pass. The default in training is a fresh key from torch's global
            generator. The default in evaluation is one fixed h0 for every sequence, so that equal histories give equal
            answers in any batch.

        Lengths, offsets and depths may be on the CPU while the items are on a GPU. Then the CPU does not wait for the GPU.

        Raises :class:`InputError` for arguments that do not fit, and for a PAD inside a sequence. The values of items on a
        GPU are not checked: there ``lares_fast.LARES`` returns NaN for a sequence with a PAD inside.
        """
        sequences = self._sequences(item_seq, item_seq_len)
        return_all_steps = flag("return_all_steps", return_all_steps)
        depth, state, draw = self._choices(item_seq, sequences, 1, num_steps, state, draw)
        states = self._encode(sequences, 1, depth, state, draw, return_all_steps)
        return _rectangle(states, depth) if return_all_steps else states

    def trajectories(
        self,
        item_seq: Tensor,
        item_seq_len: Tensor,
        num_steps: Tensor,
        *,
        state: Tensor | None = None,
        draw: Draw | None = None,
        deepest: int | None = None,
    ) -> Tensor:
        """Return the latent states after every step of G passes over the same B sequences, [sum of ``num_steps``, D].

        The states are ordered pass by pass, then sequence by sequence, then step by step. ``num_steps`` is int64 [G, B].
        ``state`` is [G * B, L, D], or [G * P, D] for packed sequences, and ``draw`` has G * B rows, both pass by pass. The
        other arguments and the errors are as in :meth:`encode`.

        ``deepest`` is an integer, at least as large as every depth. With it ``num_steps`` may be on a GPU, and the CPU does not
        wait for it. The result then has G * B * ``deepest`` rows: the states, and after them rows of 0.
        """
        sequences = self._sequences(item_seq, item_seq_len)
        batch = sequences.batch
        if isinstance(num_steps, Tensor):
            check_stored("num_steps", num_steps)
        if not isinstance(num_steps, Tensor) or num_steps.dim() != 2 or num_steps.shape[1] != batch or not len(num_steps):
            got = list(num_steps.shape) if isinstance(num_steps, Tensor) else shown(num_steps)
            raise InputError(f"num_steps must be [G, {batch}] with a row for each of G passes, but got {got}.")
        passes = len(num_steps)
        deepest = None if deepest is None else whole("deepest", deepest)
        depth, state, draw = self._choices(item_seq, sequences, passes, num_steps.flatten(), state, draw, deepest)
        return self._encode(sequences, passes, depth, state, draw, True, deepest)

    def _sequences(self, item_seq: Tensor, item_seq_len: Tensor) -> Sequences:
        return Sequences.from_input(item_seq, item_seq_len, n_items=self.config.n_items, max_len=self.config.max_len)

    def _choices(
        self,
        item_seq: Tensor,
        sequences: Sequences,
        passes: int,
        num_steps: int | Tensor | None,
        state: Tensor | None,
        draw: Draw | None,
        deepest: int | None = None,
    ) -> tuple[Tensor, Tensor | None, Draw]:
        """Check the choices of ``passes`` passes over ``sequences``, and fill in the missing ones.

        The caller gave the sequences as ``item_seq``, which decides the shape of ``state``.

        Returns ``(depth [passes * B] int64, state [passes * P, D] or None, draw)``. The depth is on the CPU, or it stays where
        the caller put it if ``deepest`` is given.
        """
        rows = passes * sequences.batch
        draw = self._default_draw(rows) if draw is None else draw
        if not isinstance(draw, Draw):
            raise InputError(f"draw must be a Draw, but got {shown(draw)}.")
        check_stored("draw.rows", draw.rows)
        if draw.rows.shape != (rows,) or not is_integer(draw.rows):
            raise InputError(
                f"draw.rows must be int64 [{rows}], one for each sequence, but got {draw.rows.dtype} {list(draw.rows.shape)}."
            )
        if state is not None:
            check_stored("state", state)
            shape = (passes * len(item_seq), *item_seq.shape[1:], self.config.hidden_size)
            if state.shape != shape or not state.dtype.is_floating_point:
                raise InputError(f"state must be floating-point {list(shape)}, but got {state.dtype} {list(state.shape)}.")
            if item_seq.dim() == 2:
                state = unpad(state, sequences.repeat(passes).offsets)
        return self._depth(num_steps, rows, draw, deepest), state, draw

    def _encode(
        self,
        sequences: Sequences,
        passes: int,
        depth: Tensor,
        state: Tensor | None,
        draw: Draw,
        every_step: bool,
        deepest: int | None = None,
    ) -> Tensor:
        """Run ``passes`` passes over B sequences with the choices that :meth:`_choices` returns.

        Returns the last states [passes * B, D], or the states of every step in the form of :meth:`trajectories`.
        """
        sequences, max_len = sequences.repeat(passes), self.config.max_len
        item_seq, item_seq_len = sequences.padded(max_len)
        depth = depth.to(item_seq.device)
        state = self.initial_state(draw, max_len) if state is None else pad(state, sequences.offsets, max_len)
        last = (item_seq_len - 1)[:, None, None].expand(-1, 1, self.config.hidden_size)
        at_last = [h.gather(1, last) for h in self._states(item_seq, state, depth, draw if self.training else None)]
        if not every_step:
            return at_last[-1].squeeze(1)
        running = torch.arange(len(at_last), device=depth.device) < depth[:, None]
        states = torch.cat(at_last, dim=1)[running]
        return states if deepest is None else F.pad(states, (0, 0, 0, len(depth) * deepest - len(states)))

    def _states(self, item_seq: Tensor, state: Tensor, depth: Tensor, draw: Draw | None) -> Iterator[Tensor]:
        x = self.item_embedding(item_seq) + self.position_embedding.weight[: item_seq.shape[1]]
        x = self.input_norm(x)
        if draw is not None:
            x = draw.hidden(x, self.config.dropout, site=SITE_INPUT, step=0, layer=0)
        mask = attention_mask(item_seq, x.dtype)
        pre = self.pre_block(x, mask, draw=draw, step=0)
        return self.recurrence(state.to(x), pre, mask, depth, draw=draw)

    def initial_state(self, draw: Draw, length: int) -> Tensor:
        """Return h0 [B, L, D] as ``config.state_init`` says: fp32 noise that ``draw`` addresses, or zeros."""
        return self._initial_state(draw, draw.rows[:, None], torch.arange(length))

    def _initial_state(self, draw: Draw, rows: Tensor, positions: Tensor) -> Tensor:
        if not (std := self._state_std()):
            return torch.zeros(*torch.broadcast_shapes(rows.shape, positions.shape), self.config.hidden_size)
        return draw.initial_state(rows, positions, self.config.hidden_size) * std

    def _state_std(self) -> float:
        """Return the factor of the normal numbers of h0, as ``config.state_init`` says; 0 stands for zeros."""
        config = self.config
        if config.state_init == "zero" or (config.state_init == "normal_zero" and not self.training):
            return 0.0
        return config.state_std * config.state_scale

    def _default_draw(self, batch: int) -> Draw:
        if self.training:
            return Draw(root_key(int(torch.randint(2**62, ()))), torch.arange(batch))
        return Draw(_EVALUATION_KEY, torch.zeros(batch, dtype=torch.int64))

    def _depth(self, num_steps: int | Tensor | None, batch: int, draw: Draw, deepest: int | None) -> Tensor:
        if num_steps is None:
            num_steps = sample_batch_depth(self.config, batch, draw.generator()) if self.training else self.config.steps
        if not isinstance(num_steps, Tensor):
            steps = whole("num_steps", num_steps)
            if not 1 <= steps <= MOST_STEPS:
                raise InputError(f"num_steps must be at least 1 and at most {MOST_STEPS:,}, but got {steps}.")
            num_steps = torch.tensor(steps)
        check_stored("num_steps", num_steps)
        if not is_integer(num_steps) or num_steps.shape not in ((), (1,), (batch,)):
            raise InputError(
                f"num_steps must be an integer or int64 [{batch}], but got {num_steps.dtype} {list(num_steps.shape)}."
            )
        if deepest is not None and num_steps.device.type != "cpu":
            return num_steps.to(torch.int64)
        depth, most = (
            num_steps.to("cpu", torch.int64).expand(batch),
            MOST_STEPS if deepest is None else min(deepest, MOST_STEPS),
        )
        if batch and not 1 <= int(depth.min()) <= int(depth.max()) <= most:
            raise InputError(
                f"num_steps must be at least 1 and at most {most:,}, but spans {int(depth.min())}..{int(depth.max())}."
            )
        return depth

    def normalise(self, x: Tensor) -> Tensor:
        """Return ``x`` [..., D] scaled to length 1 for the similarity ``cos``, or unchanged for ``dot``."""
        return F.normalize(x, dim=-1) if self.config.similarity == "cos" else x

    def queries(self, hidden: Tensor) -> Tensor:
        """Return the queries [..., D] of the states ``hidden``. Their dot products with :meth:`item_table` are the scores."""
        return self.normalise(hidden) / self.config.tau if self.config.similarity == "cos" else hidden

    def item_table(self) -> Tensor:
        """Return the item table [N, D] as it is scored, with PAD's row 0. Gradients reach the embedding."""
        return self.normalise(self.item_embedding.weight)

    def query_and_items(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``(queries(hidden), item_table())``. Their dot products are the scores of ``hidden`` [..., D]."""
        return self.queries(hidden), self.item_table()

    def forward(self, item_seq: Tensor, item_seq_len: Tensor, *, num_steps: int | Tensor | None = None) -> Tensor:
        """Return the scores [B, N] of every row of the item table, PAD included. The arguments are as in :meth:`encode`."""
        return self.queries(self.encode(item_seq, item_seq_len, num_steps=num_steps)) @ self.item_table().T


def without_numbers(config: LARESConfig) -> LARES:
    """Return a model on the device ``meta``: it has modules and shapes, but no numbers, and it takes no memory."""
    with torch.device("meta"), _NoDraws():
        return LARES(config)


class _NoDraws(TorchFunctionMode):
    """Leave new parameters without initial values: a draw on the device ``meta`` makes PyTorch import its compiler, 150 MiB."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return kwargs["tensor"] if func is nn.init.normal_ else func(*args, **(kwargs or {}))


def _rectangle(states: Tensor, depth: Tensor) -> Tensor:
    """Return packed states [sum of depth, D] as [B, T, D]. A sequence that stopped early repeats its last state.

    ``depth`` [B] is on the CPU.
    """
    steps = torch.arange(int(depth.max()) if len(depth) else 1)
    if len(states) == len(depth) * len(steps):
        return states.unflatten(0, (len(depth), len(steps)))
    first = depth.cumsum(0) - depth
    return states[to_device(first[:, None] + steps.minimum(depth[:, None] - 1), states.device)]
