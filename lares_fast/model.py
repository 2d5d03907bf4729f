"""The model that users build: it has the parameters of the reference, and it computes with the public ops."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from lares_fast import _modules, ops, reference
from lares_fast._dispatch import explain, requested
from lares_fast._errors import InputError
from lares_fast._model_folder import read_model, write_config, write_model
from lares_fast._numbers import whole
from lares_fast._random import Draw
from lares_fast._transfer import to_device
from lares_fast._weights import weights_of
from lares_fast.catalog import Catalog, KeptTable
from lares_fast.config import LARESConfig
from lares_fast.reference.head import Head
from lares_fast.reference.topk import Exclude
from lares_fast.sequences import Sequences

# Backbones in which every position sees only itself and earlier positions.
_CAUSAL = {"transformer"}


class LARES(reference.LARES):
    """LARES with the parameters of :class:`lares_fast.reference.LARES`, fast ops, and exact recommendation.

    ``backend``
        The backend of every op. ``None`` leaves the choice to :func:`lares_fast.ops.backend`, then to the environment
        variable, then to the arguments of the op.
    ``bf16``
        Round the operands of products with weights to bf16, see :func:`lares_fast.ops.recurrence`: in evaluation mode, where
        encoding then has no gradient on a CPU, and on a GPU also in training. There the losses round the queries and the
        items, too. Parameters, states and gradients stay in fp32.

    Raises :class:`InputError` for an unknown backend.

    >>> model = LARES(LARESConfig(n_items=1000))  # doctest: +SKIP
    >>> scores, ids = model.recommend(item_seq, item_seq_len, k=10)  # doctest: +SKIP
    """

    backend: str | None = None
    bf16: bool = False
    # The warnings that were given. None is repeated, and a copy for evaluation shares them.
    _warned: set[str]
    # The normalised item table, with cosine similarity.
    _kept_table: KeptTable | None = None

    def __init__(self, config: LARESConfig, *, backend: str | None = None, bf16: bool = False) -> None:
        requested(backend)
        super().__init__(config)
        self.backend, self.bf16 = backend, bf16

    def __getstate__(self) -> dict[str, Any]:
        """Return the attributes for copies and pickles, without the kept table: it is large and watches this model's weight."""
        return {name: value for name, value in vars(self).items() if name != "_kept_table"}

    @property
    def head(self) -> Head:
        """Return the ops with which the losses score targets against the item table, on this model's backend."""
        how: dict[str, Any] = {"bf16": self._trains_in_bf16(), "backend": self.backend}
        return Head(
            partial(ops.linear_cross_entropy, **how),
            partial(ops.target_logprob, **how),
            partial(ops.target_logprob_and_rank, **how),
        )

    def _trains_in_bf16(self) -> bool:
        return self.bf16 and self.item_embedding.weight.device.type != "cpu"

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
        """Encode packed sequences without padding. A causal block gives the same states, because no position sees a later one.

        The arguments and results are as in the reference. Raises :class:`InputError` if ``bf16`` is set and the model must run
        padded.
        """
        if (why := self._padded_because()) is not None and self.bf16:
            raise InputError(
                f"bf16 needs the packed encoder, but the model runs on padded sequences, because {why}: leave bf16 out."
            )
        if why is not None or not len(depth):
            return super()._encode(sequences, passes, depth, state, draw, every_step, deepest)
        repeated = sequences if passes == 1 else sequences.repeat(passes)
        if state is None:
            state = self._initial_rows(draw, repeated)
        masks = draw if self.training and (self.config.dropout or self.config.attention_dropout) else None
        # Without masks all passes have the same input to the first step.
        pre = (
            self._before(repeated, masks)
            if masks is not None or passes == 1
            else self._before(sequences, None).repeat(passes, 1)
        )
        output = "steps" if every_step else "last"
        state = to_device(state, pre.device).to(pre)
        how: dict[str, Any] = {"depth": depth, "output": output, "deepest": deepest}
        return self._steps(self.recurrence, state, repeated.offsets, masks, pre=pre, **how)

    def _padded_because(self) -> str | None:
        """Return why the model must run its modules on padded sequences, as the reference does, or ``None``."""
        if self.config.backbone not in _CAUSAL:
            return f"the backbone {self.config.backbone!r} is not causal"
        if (why := _modules.changed(self)) is not None and why not in vars(self).setdefault("_warned", set()):
            self._warned.add(why)
            warnings.warn(f"LARES is encoded by its modules on padded sequences, which is slower, because {why}.", stacklevel=2)
        return why

    def _initial_rows(self, draw: Draw, sequences: Sequences) -> Tensor:
        """Return h0 [P, D] of packed sequences, on the device of their items."""
        (items, offsets), width = sequences, self.config.hidden_size
        if not (std := self._state_std()):
            return torch.zeros(len(items), width, device=items.device)
        draw, offsets = _draw_on(draw, items.device), to_device(offsets, items.device)
        return ops.initial_state(draw, offsets, len(items), width, std=std, backend=self.backend)

    def _before(self, sequences: Sequences, draw: Draw | None) -> Tensor:
        """Return the output of the pre-block, [P, D], which every step reads."""
        x = self._input(sequences, draw)
        return self._steps(self.pre_block, x, sequences.offsets, draw, output="tokens")

    def _input(self, sequences: Sequences, draw: Draw | None) -> Tensor:
        """Return the input of the pre-block, [P, D]."""
        (items, offsets), config = sequences, self.config
        return ops.embedding(
            items,
            to_device(offsets, items.device),
            self.item_embedding.weight,
            self.position_embedding.weight,
            self.input_norm.weight,
            self.input_norm.bias,
            draw=None if draw is None else _draw_on(draw, items.device),
            dropout=config.dropout,
            eps=config.layer_norm_eps,
            backend=self.backend,
        )

    def _steps(self, block: nn.Module, h: Tensor, offsets: Tensor, draw: Draw | None, **arguments: Any) -> Tensor:
        """Run :func:`lares_fast.ops.recurrence` with the parameters of ``block`` and the settings of this model."""
        config = self.config
        return ops.recurrence(
            h,
            to_device(offsets, h.device),
            # A parameter that two layers share is listed twice.
            _modules.parameters(block),
            n_heads=config.n_heads,
            adapter=config.adapter,
            draw=draw,
            dropout=config.dropout,
            attention_dropout=config.attention_dropout,
            eps=config.layer_norm_eps,
            longest=config.max_len,
            bf16=self._trains_in_bf16() if self.training else self.bf16,
            backend=self.backend,
            **arguments,
        )

    def save_pretrained(self, folder: str | os.PathLike[str], *, item_ids: Sequence[Any] | None = None) -> None:
        """Write the model into ``folder``: ``model.safetensors``, ``config.json`` and, with ``item_ids``, ``item_ids.json``.

        ``item_ids`` are a placeholder for PAD and then the raw id of each item row, as texts or integers. With them,
        :func:`lares_fast.load` and the command line take the folder. The folder is made if it is missing, and its files are
        replaced. Raises :class:`InputError` if a file cannot be written, and for weights that are not finite.
        """
        write_model(Path(folder), weights_of(self), self.config, item_ids)
        write_config(Path(folder), self.config)

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str], *, backend: str | None = None, bf16: bool = False) -> LARES:
        """Return the model in ``folder``, in evaluation mode on the CPU.

        :meth:`save_pretrained`, a run or ``PyTorchModelHubMixin`` wrote the folder. Nothing is downloaded. ``backend`` and
        ``bf16`` are as in :class:`LARES`. Raises :class:`InputError` if a file is missing or damaged.
        """
        weights, config, _ = read_model(Path(folder))
        with torch.device("cpu"):
            model = cls(config, backend=backend, bf16=bf16).float()
        model.load_state_dict(weights)
        return model.eval()

    def in_evaluation(self) -> LARES:
        """Return this model in evaluation mode, as a copy that shares every parameter. The mode of this model stays."""
        # The copy shares this set.
        vars(self).setdefault("_warned", set())
        return _modules.in_evaluation(self)

    def catalog(self) -> Catalog:
        """Return the items as they are scored now, without gradients.

        With dot products this is a view of the item embedding. With cosine similarity it is the normalised table. On the CPU
        the model keeps that table, N x D numbers, until the embedding changes, see :class:`lares_fast.catalog.KeptTable`.
        """
        weight = self.item_embedding.weight.detach()
        if self.config.similarity == "dot":
            return Catalog(weight)
        if self._kept_table is None:
            self._kept_table = KeptTable()
        return Catalog(self._kept_table.table(weight, self.normalise))

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
        """Return the scores [B, k] and the item ids [B, k] (int64) of the best items. PAD is never among them.

        ``item_seq``, ``item_seq_len``, ``num_steps`` and ``state`` are as in :meth:`encode`. ``k`` is at most the number of
        items. ``exclude`` holds item ids, in the form that :func:`lares_fast.ops.topk` takes. The items are those of
        :meth:`catalog`. The answer is that of evaluation mode, whatever the mode of the model is, and the mode stays.
        Raises :class:`InputError` for arguments that do not fit.
        """
        if not 1 <= whole("k", k) <= self.config.n_items - 1:
            raise InputError(f"k must be in 1..{self.config.n_items - 1}, the number of items, but got {k}.")
        model = self.in_evaluation()
        queries = model.queries(model.encode(item_seq, item_seq_len, num_steps=num_steps, state=state))
        return self.catalog().topk(queries, k, exclude=exclude, backend=backend or self.backend)


def accelerate(model: reference.LARES, *, backend: str | None = None) -> str:
    """Make ``model`` use the fast encoder and the fast ops. Return a report: how it encodes, and which backend runs each op.

    ``model`` is a :class:`lares_fast.reference.LARES` and becomes a :class:`LARES` in place, so code that already holds the
    object uses the fast encoder, too. Parameters, their names, optimizer state and hooks stay as they are. ``backend`` is as
    in :class:`LARES`.

    The fast encoder computes from the parameters and does not call the modules. If a module does more than the configuration
    says (a hook, a module of another class, a parametrised weight), the model still runs its modules, and the report names
    the module and the reason.

    Raises :class:`InputError` for a model of any other class, because a subclass may have changed the replaced methods, and for
    an unknown backend.
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
        weights = _modules.parameters(model.recurrence)
        calls = {"recurrence": (h, torch.tensor([0, 1]), weights), **calls}
    else:
        encode = f"encode: as before, because {why}"
    return "\n".join([encode, *(explain(op, *arguments, backend=backend) for op, arguments in calls.items())])


def _draw_on(draw: Draw, device: torch.device) -> Draw:
    """Return ``draw`` with its rows on ``device``."""
    return Draw(draw.key, to_device(draw.rows, device))
