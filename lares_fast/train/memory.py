"""Predict the memory of a run from its settings and the sizes of its log, and refuse a run that does not fit."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch

from lares_fast._errors import InputError
from lares_fast._memory import as_size, free_bytes
from lares_fast.config import LARESConfig
from lares_fast.data import InteractionLog, Split
from lares_fast.data.batch import input_lengths
from lares_fast.train.config import PHASES, RunConfig, needs_start
from lares_fast.train.device_log import SHARE

_MIB = 2**20
# The modules that PyTorch's optimizers import, and the parts of PyTorch's libraries that the first step and the first
# recommendation read from the disk. They were measured with PyTorch 2.13 and Python 3.11.
_COMPILER, _STEP_CODE, _SERVING_CODE = 148 * _MIB, 45 * _MIB, 25 * _MIB
_NUMBER, _INTEGER = 4, 8
# The native code divides the catalog into so many parts, takes so many rows of a softmax at a time, has so many sets of
# gradients, and makes blocks of so many tokens.
_PARTS, _ROWS, _SETS, _BLOCK = 16, 4096, 8, 168
# On a GPU: the most rows times parts of the softmax whose gradients are summed after its kernel.
_GPU_ROWS = 2**16
# The largest depth that a distribution draws, as a multiple of the mean depth. For an unbounded distribution it is a depth
# that hardly any draw exceeds.
_DEEPEST = {"constant": 1, "non-recurrent": 0, "uniform": 2, "poisson-bounded": 2}


class Need(NamedTuple):
    """A part of a run: the bytes that it keeps from then on, and the bytes that it needs besides while it lasts."""

    what: str
    kept: int
    more: int = 0


def peak(needs: Iterable[Need]) -> int:
    """Return the largest number of bytes that parts, one after the other, need at a time."""
    kept = most = 0
    for need in needs:
        kept += need.kept
        most = max(most, kept + need.more)
    return most


@dataclass(frozen=True, kw_only=True)
class LogSizes:
    """The sizes of a log and its split on which memory depends.

    ``users, items, events``
        The number of users, of items with PAD, and of events.
    ``rows, ranked``
        The number of training rows, and of the rows of validation or test.
    ``mean_length, longest``
        The mean and the largest number of items of a training row's input.
    ``id_bytes``
        The bytes of all raw ids.
    ``times``
        Whether the events have times.
    """

    users: int
    items: int
    events: int
    rows: int
    ranked: int
    mean_length: float
    longest: int
    id_bytes: int
    times: bool = False

    @classmethod
    def of(cls, log: InteractionLog, split: Split, max_len: int) -> LogSizes:
        """Return the sizes of a log and its split."""
        lengths = input_lengths(log, split.train, max_len)
        return cls(
            users=log.n_users,
            items=log.n_items,
            events=log.n_events,
            rows=len(split.train),
            ranked=max(len(split.valid), len(split.test)),
            mean_length=float(lengths.mean()) if len(lengths) else 0.0,
            longest=int(lengths.max(initial=0)),
            id_bytes=sum(_bytes_of_ids(ids) for ids in (log.user_ids, log.item_ids)),
            times=log.times is not None,
        )

    @classmethod
    def assumed(cls, users: int, items: int, events: int, max_len: int) -> LogSizes:
        """Return the sizes of a log of integer ids, split by leave-one-out, whose users have equally many events."""
        each = max(4, events // users)
        return cls(
            users=users,
            items=items + 1,
            events=events,
            rows=max(1, events - 3 * users),
            ranked=users,
            mean_length=float(np.minimum(np.arange(1, each - 2), max_len).mean()),
            longest=min(each - 3, max_len),
            id_bytes=_INTEGER * (users + items),
        )


def _bytes_of_ids(ids: Any) -> int:
    if ids.dtype != object:
        return int(ids.nbytes)
    some = ids[:: max(1, len(ids) // 1000)]
    # A Python string has a header of about 50 bytes.
    return int(len(ids) * (8 + 16 * math.ceil((50 + np.mean([len(text) for text in some])) / 16)))


class _Weights(NamedTuple):
    """The bytes of all parameters, of the item table, and of the largest of the two blocks."""

    all: int
    table: int
    block: int

    @classmethod
    def of(cls, config: LARESConfig) -> _Weights:
        width, inner = config.hidden_size, config.inner_size
        layer = 4 * width**2 + 2 * width * inner + 9 * width + inner
        adapter = {"concat": 2 * width**2 + width, "linear": 1}.get(config.adapter, 0)
        blocks = config.n_pre_layers * layer, config.n_core_layers * layer + adapter + 2 * width
        table = config.n_items * width
        numbers = table + (config.max_len + 2) * width + sum(blocks)
        return cls(_NUMBER * numbers, _NUMBER * table, _NUMBER * max(blocks))


@dataclass(frozen=True)
class _Batch:
    """The sizes of a full batch of a phase with the deepest trajectories.

    ``rows, tokens, trajectories, scored``
        Training rows, packed items of all passes, sequences of all passes, and states that are scored against all items.
    ``repeats``
        How many passes encode the same packed items.
    ``dropout``
        Whether the phase has dropout.
    ``normalised``
        Whether the loss compares with normalised items.
    """

    rows: int
    tokens: float
    trajectories: int
    scored: int
    repeats: int
    depth: int
    dropout: bool
    normalised: bool

    @classmethod
    def of(cls, phase: str, config: RunConfig, model: LARESConfig, sizes: LogSizes) -> _Batch:
        cos = model.similarity == "cos"
        depth = max(1, _DEEPEST.get(model.depth_sampling, 3) * model.mean_depth)
        rows = min(getattr(config, phase).batch_size, sizes.rows)
        if needs_start(phase):
            group = config.rpt.group_size
            count = group * rows
            return cls(
                rows,
                sizes.mean_length * count,
                count,
                count * depth,
                group,
                depth,
                config.rpt.dropout > 0,
                cos and config.rpt.scores == "model",
            )
        count = rows * (3 if config.spt.alpha else 2 if config.spt.gamma else 1)
        dropout = model.dropout > 0 or (model.attention_dropout or 0) > 0
        return cls(rows, sizes.mean_length * count, count, rows, 1, depth, dropout, cos)


def training_needs(
    phase: str, config: RunConfig, model: LARESConfig, sizes: LogSizes, device: str, there: int = 0
) -> list[Need]:
    """Return the parts of ``phase`` in the memory of ``device`` (its type, such as ``cpu``), without the log and the program.

    ``there`` are bytes of the model that the process has already.
    """
    weights, batch = _Weights.of(model), _Batch.of(phase, config, model, sizes)
    # The model and Adam's two moments; in phase 2 also the frozen model.
    copies = 4 if needs_start(phase) else 3
    if device != "cpu":
        kept = (copies + 1) * weights.all - there
        step = 2 * (_gpu_states(model, batch) + _NUMBER * 2 * model.hidden_size * (_GPU_ROWS + batch.scored))
        return [Need("model, gradients, Adam", kept), Need("step", 0, step)]
    return [
        # The best weights so far are in memory, too.
        Need("model, Adam, best model", (copies + 1) * weights.all - there),
        Need("step", _pool(model, weights), _step(phase, config, model, weights, batch)),
        Need("evaluation", 0, _evaluation(config.evaluation.batch_size, model, weights, sizes)),
        # The file that an export replaces is mapped and compared, and the raw ids become JSON.
        Need("checkpoint, export", 0, weights.all + 50 * sizes.items),
    ]


def log_needs(sizes: LogSizes) -> Need:
    """Return what the log, its split and the groups of equal targets need on the CPU."""
    kept = sizes.events * (_NUMBER + sizes.times * _INTEGER) + 16 * sizes.users + sizes.id_bytes
    kept += sizes.rows * 32 + sizes.ranked * 24 + 16 * sizes.items
    return Need("log, split", kept, 70 * sizes.events)


def program_bytes(resident: int, *, trains: bool) -> int:
    """Return the bytes of Python and PyTorch in a process that trains or serves.

    ``resident`` are the bytes of this process, after it has imported the package.
    """
    if not trains:
        return resident + _SERVING_CODE
    return resident + _STEP_CODE + (0 if "torch._dynamo" in sys.modules else _COMPILER)


def serving_needs(model: LARESConfig, sizes: LogSizes, batch_size: int = 256, users: int = 1) -> list[Need]:
    """Return the parts of a process that recommends to ``users`` users on the CPU, without the program and without a log."""
    weights = _Weights.of(model)
    # A raw id is in a list, in a dictionary from its text, and in a list that JSON gave.
    ids = sizes.items * (8 + 8 + 100 + 60)
    index = int(1.3 * weights.table) if users > batch_size else 0
    queries = _evaluation(min(batch_size, users), model, weights, sizes)
    return [
        # The file is mapped until its weights are copied into the model.
        Need("model, raw ids", weights.all + ids, weights.all),
        Need("recommend", index + _pool(model, weights), queries),
    ]


def require_memory(
    config: RunConfig, log: InteractionLog, split: Split, phases: Iterable[str], device: torch.device, there: int = 0
) -> None:
    """Raise :class:`InputError` if one of ``phases`` needs more memory than is free on ``device``.

    ``there`` are bytes of the model that the process has already. The message names the setting to lower.
    """
    free = free_bytes(device)
    for phase in (name for name in PHASES if name in set(phases)):
        needs = partial(_needed, phase=phase, log=log, split=split, device=device, there=there, free=free)
        if (needed := needs(config)) > free:
            setting, remedy = _remedy(phase, config, needs, free)
            if device.type == "cpu":
                found = f"needs about {as_size(needed)} of memory, and {as_size(free)} are free: {remedy}"
            else:
                found = f"needs about {as_size(needed)} of memory on {device}, where {as_size(free)} are free: {remedy}"
                found += ", or end other programs on the GPU"
            raise InputError(f"phase {phase} {found}.", setting)


def _needed(
    config: RunConfig, *, phase: str, log: InteractionLog, split: Split, device: torch.device, there: int, free: int
) -> int:
    """Return the bytes that a phase needs beyond those that the process has."""
    model = LARESConfig.from_dict({**config.model, "n_items": log.n_items})
    sizes = LogSizes.of(log, split, model.max_len)
    needed = peak(training_needs(phase, config, model, sizes, device.type, there))
    if device.type == "cpu":
        return needed + program_bytes(0, trains=True)
    return needed + (log.items.nbytes if log.items.nbytes <= SHARE * free else 0)


def _remedy(phase: str, config: RunConfig, needs: Callable[[RunConfig], int], free: int) -> tuple[str | None, str]:
    """Return the setting to lower, with a value that fits, and a clause that says so."""
    model = LARESConfig.preview(**config.model)
    settings: tuple[tuple[str, int, int], ...] = (
        (f"{phase}.batch_size", getattr(config, phase).batch_size, 1),
        ("evaluation.batch_size", config.evaluation.batch_size, 1),
        ("model.mean_depth", model.mean_depth, 1),
        ("model.inner_size", model.inner_size, 1),
        ("model.hidden_size", model.hidden_size, model.n_heads),
    )
    for setting, value, unit in settings:
        section, _, name = setting.partition(".")
        lower = value // 2 // unit * unit
        while lower:
            old = getattr(config, section)
            changed: Any = {**old, name: lower} if section == "model" else replace(old, **{name: lower})
            if needs(replace(config, **{section: changed})) <= free:
                return f"{setting}={lower}", f"lower {setting}, which is {value}"
            lower = lower // 2 // unit * unit
    return None, "use a machine with more memory, or a smaller catalog"


def _gpu_states(config: LARESConfig, batch: _Batch) -> int:
    """Return the bytes of the states of a step on a GPU."""
    layers, width = config.n_pre_layers + config.n_core_layers, config.hidden_size
    # The state before every step, the output of every step and its gradient, and what the backward keeps of one step.
    states = (batch.tokens + 3 * batch.trajectories) * batch.depth * width
    one_step = batch.tokens * ((2 * layers + 7) * width + layers * (8 * width + 2 * config.inner_size))
    return round(_NUMBER * (states + one_step))


def _forward_and_backward(config: LARESConfig, weights: _Weights, batch: _Batch) -> int:
    """Return the bytes that the loss of a step and its gradient need on the CPU."""
    width, tokens, trajectories = config.hidden_size, batch.tokens, batch.trajectories
    states = _NUMBER * width * tokens
    every_step = _NUMBER * width * trajectories * batch.depth
    scored = _NUMBER * width * batch.scored
    cos = batch.normalised
    # The tape has two normalised rows and their deviations for each token, layer and step.
    tape = _NUMBER * (2 * width + 2)
    tapes = tape * tokens * config.n_core_layers * batch.depth - tape * (tokens - trajectories)
    # Without dropout all passes share the output of the pre-block.
    shared = 1 if batch.dropout else batch.repeats
    tapes += tape * tokens / shared * config.n_pre_layers
    # h0, the output of the pre-block; its input, the sums of items and positions, and the factors of the dropout.
    kept = tapes + 2 * states + (3 if batch.dropout else 2) * states / shared + 40 * tokens
    losses = every_step + (scored if batch.repeats > 1 else 12 * _NUMBER * width * batch.rows) + cos * (weights.table + scored)
    frozen = max(3 * states, 2 * states + every_step + scored) if batch.repeats > 1 else 0
    block = _NUMBER * width * min(_ROWS, batch.scored)
    # The gradient of the items; PyTorch's gradient of a normalisation needs three more tables of this size.
    softmax = weights.table * (1 + 3 * cos) + scored + (_PARTS + 3) * block
    # The gradients of the states of every step, of h0 and of the output of the pre-block.
    recurrence = weights.table + every_step + 2 * states
    sum_of_gradients = (2 + cos) * weights.table + 7 * states
    return round(max(kept + losses + max(frozen, softmax, recurrence), sum_of_gradients))


def _step(phase: str, config: RunConfig, model: LARESConfig, weights: _Weights, batch: _Batch) -> int:
    """Return the bytes that a step needs on the CPU."""
    # The gradient of the batches before the last one.
    earlier = weights.all if getattr(config, phase).accumulate > 1 else 0
    return max(_forward_and_backward(model, weights, batch) + earlier, _update(config, phase, weights))


def _update(config: RunConfig, phase: str, weights: _Weights) -> int:
    """Return the bytes of the gradients and of Adam's intermediate results on the CPU."""
    decayed = getattr(config, phase).weight_decay > 0
    return weights.all + (3 if decayed else 2) * weights.table


def _pool(config: LARESConfig, weights: _Weights) -> int:
    """Return the bytes of the buffers that the native code keeps between calls."""
    width, inner = config.hidden_size, config.inner_size
    workspace = _NUMBER * max(_BLOCK, config.max_len) * (17 * width + 2 * inner)
    return (_SETS + 2) * weights.block + torch.get_num_threads() * workspace


def _evaluation(batch_size: int, config: LARESConfig, weights: _Weights, sizes: LogSizes) -> int:
    """Return the bytes that the ranking of a batch needs on the CPU."""
    rows = min(batch_size, sizes.ranked)
    states = _NUMBER * config.hidden_size * rows * sizes.longest
    history = 48 * rows * sizes.events // sizes.users
    table = weights.table if config.similarity == "cos" else 0
    return 3 * states + history + 4 * _NUMBER * config.hidden_size * rows + table
