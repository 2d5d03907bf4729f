"""The settings of a training run. The default values are the settings of the published run on Musical Instruments.

The classes raise :class:`InputError`, which names the setting, for a value of another type and for a value out of range. The
functions that read, split and draw a log check the ranges in :class:`DataConfig`.
"""

from __future__ import annotations

import difflib
import os
import reprlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from typing import Any

from lares_fast._errors import InputError
from lares_fast._numbers import MOST_STEPS, is_truth, number, whole
from lares_fast._settings import PRECISIONS
from lares_fast.config import DUPLICATES, REWARDS, SCORES, LARESConfig

PHASES = ("spt", "rpt")
SPLITS = ("leave-one-out", "temporal")
OPTIMIZERS = ("adam", "adamw")
SCHEDULES = ("constant", "linear", "cosine")
# The value of data.format of a run whose log was in memory, so that no file can be named.
MEMORY = "memory"


def needs_start(phase: str) -> bool:
    """Return whether ``phase`` starts from the best model of the phase before it."""
    return phase != PHASES[0]


def _check_types(settings: Any) -> None:
    """Convert every field to the type of its annotation.

    Raises :class:`InputError` for a value of another type, and for a number that is not finite.
    """
    for each in fields(settings):
        value, kinds = getattr(settings, each.name), str(each.type).split(" | ")
        if kinds[0] not in _WORDS or (value is None and "None" in kinds):
            continue
        many = kinds[0].startswith("tuple")
        kind = kinds[0].removeprefix("tuple[").removesuffix(", ...]")
        if many and not isinstance(value, list | tuple):
            plain: Any = None
        else:
            plain = tuple(_plain(kind, item) for item in value) if many else _plain(kind, value)
        if plain is None or (many and None in plain):
            raise _wrong_value(settings, each.name, _WORDS[kinds[0]], reprlib.repr(value))
        # A number type of an array library could be saved, but not read again.
        object.__setattr__(settings, each.name, plain)


_LARGEST = 1e37
_WORDS = {
    "int": "an integer",
    "float": "a finite number",
    "bool": "true or false",
    "str": "text",
    "tuple[int, ...]": "a list of integers",
    "tuple[float, ...]": "a list of finite numbers",
}


def _plain(kind: str, value: Any) -> Any:
    """Return ``value`` as a plain value of ``kind``, or ``None`` if it is not one."""
    if kind == "str":
        return os.fspath(value) if isinstance(value, str | os.PathLike) else None
    if kind == "bool" or is_truth(value):
        return bool(value) if kind == "bool" and is_truth(value) else None
    if isinstance(value, str | bytes):
        return None
    try:
        plain = whole("value", value) if kind == "int" else number("value", value)
    except InputError:
        return None
    # Larger numbers overflow in the arithmetic of fp32 weights.
    return plain if kind == "int" or abs(plain) <= _LARGEST else None


def _positive(settings: object, *names: str) -> None:
    for name in names:
        value = getattr(settings, name)
        if value is not None and value <= 0:
            raise _wrong_value(settings, name, "greater than 0", value)


def _not_negative(settings: object, *names: str) -> None:
    for name in names:
        if (value := getattr(settings, name)) < 0:
            raise _wrong_value(settings, name, "0 or greater", value)


def _wrong_value(settings: object, name: str, expected: str, value: object) -> InputError:
    """Return the error for the field ``name`` of ``settings``, which must be ``expected`` but is ``value``."""
    section = next((section for section, kind in SECTIONS.items() if type(settings) is kind), None)
    setting = name if section is None else f"{section}.{name}"
    return InputError(f"{setting} must be {expected}, but got {value}.", setting=setting)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The settings of the log and its split."""

    path: str | None = None
    """The file of the log. ``None`` makes a synthetic log."""
    format: str = "auto"
    """The format of the file, as in :func:`lares_fast.data.read_log`. ``auto`` detects it.
    ``memory`` stands for a log that a program has made, and that no command can read again.
    """
    separator: str = "auto"
    """What separates the columns of a ``csv`` file: ``comma``, ``tab``, ``semicolon`` or ``pipe``. ``auto`` reads it from the
    header. Columns between tabs have no quotes.
    """
    user: str | None = None
    """The name of the column with the user ids. ``None`` means ``user_id``."""
    item: str | None = None
    """The name of the column with the item ids. ``None`` means ``item_id``."""
    time: str | None = None
    """The name of the column with the times. ``None`` means ``timestamp``. With the text ``none``, events keep the order of the
    file.
    """
    rating: str | None = None
    """The name of the column with the ratings, which only ``min_rating`` reads. ``None`` means ``rating``."""
    min_rating: float | None = None
    """The first filter of the log: events with a lower rating are left out. ``None`` leaves out none."""
    duplicates: str = "keep"
    """The second filter. ``same-time`` keeps one of the events with the same user, item and time. ``first`` and ``last`` keep
    only the first or the last event of a user with an item. ``keep`` leaves out none.
    """
    min_events: int = 3
    """The last filter, together with ``min_item_events``: users with fewer events are left out. Both are applied in turns until
    nothing changes.
    """
    min_item_events: int = 1
    """Items with fewer events are left out. With the same number k as in ``min_events``, the rest is the k-core."""
    split: str = "leave-one-out"
    """How rows for validation and test are chosen. ``leave-one-out`` takes the last event of each user for the test and the one
    before it for validation. ``temporal`` has two cut-off times, which are the same for all users.
    """
    valid_fraction: float = 0.1
    """The fraction of the events that a temporal split leaves for validation."""
    test_fraction: float = 0.1
    """The fraction of the events that a temporal split leaves for the test."""
    synthetic_users: int = 3000
    """The number of users of the synthetic log."""
    synthetic_items: int = 600
    """The number of items of the synthetic log."""
    synthetic_seed: int = 0
    """The seed of the synthetic log."""

    def __post_init__(self) -> None:
        _check_types(self)
        _positive(self, "min_events", "min_item_events")
        for name, allowed in (("split", SPLITS), ("duplicates", DUPLICATES)):
            if (value := getattr(self, name)) not in allowed:
                raise _wrong_value(self, name, f"one of {', '.join(allowed)}", repr(value))


@dataclass(frozen=True, kw_only=True)
class PhaseConfig:
    """The settings that both phases have: the settings of the optimizer, and when to stop."""

    batch_size: int = 1024
    """B, the number of training rows in a batch."""
    lr: float = 1e-3
    """The largest learning rate."""
    weight_decay: float = 0.0
    """The weight decay of the optimizer."""
    epochs: int = 300
    """The largest number of epochs of the phase. An epoch reads every training row once."""
    patience: int = 10
    """The phase stops after more than this number of epochs in a row without an improvement on the validation rows."""
    max_steps: int | None = None
    """The largest number of steps of the phase. ``None`` means no limit."""
    optimizer: str = "adam"
    """``adam``, where the weight decay is a part of the gradient, or ``adamw``, where it shrinks the weights directly."""
    schedule: str = "constant"
    """The learning rate after the warm-up: ``constant``, or falling to 0 over all ``epochs``, along a line (``linear``) or half
    a cosine (``cosine``)."""
    warmup_steps: int = 0
    """The number of first steps in which the learning rate rises to ``lr``."""
    clip_norm: float | None = None
    """The largest norm of the gradient of all weights. A longer gradient is shortened to it."""
    accumulate: int = 1
    """The number of batches in one step. Their gradients are averaged, as if one larger batch had been computed in parts."""

    def __post_init__(self) -> None:
        _check_types(self)
        _positive(self, "batch_size", "lr", "epochs", "max_steps", "clip_norm", "accumulate")
        _not_negative(self, "weight_decay", "patience", "warmup_steps")
        for name, allowed in (("optimizer", OPTIMIZERS), ("schedule", SCHEDULES)):
            if (value := getattr(self, name)) not in allowed:
                raise _wrong_value(self, name, f"one of {', '.join(allowed)}", repr(value))


@dataclass(frozen=True, kw_only=True)
class SPTConfig(PhaseConfig):
    """The settings of phase 1, self-supervised pre-training."""

    alpha: float = 0.1
    """The weight of the trajectory-level alignment."""
    gamma: float = 0.5
    """The weight of the step-level alignment."""
    same_step: bool = True
    """Whether the two passes that are aligned have the same depth."""


@dataclass(frozen=True, kw_only=True)
class RPTConfig(PhaseConfig):
    """The settings of phase 2, reinforcement post-training."""

    group_size: int = 4
    """G, the number of trajectories for each sequence."""
    k: int = 10
    """The cut-off of the reward: the reward looks at the first ``k`` items of a ranking."""
    beta: float = 1.0
    """The weight of the KL term, which keeps the model near the model that the phase started from."""
    reward: str = "recall"
    """The reward of a trajectory: ``recall`` or ``ndcg`` at ``k``."""
    scores: str = "dot"
    """The scores that rewards and probabilities are computed from. ``dot`` means plain dot products even if the model ranks by
    ``cos``, as in the official code. ``model`` means the scores that the model ranks by.
    """
    dropout: float = 0.1
    """The dropout in this phase, in place of the model's dropout."""
    data_filter: bool = True
    """Whether training keeps only the rows that the filter passes: rows whose target is among the first ``filter_top`` items in
    at least one of ``filter_passes`` passes of the phase-1 model.
    """
    filter_top: int = 100
    """The number of items at the top of the ranking among which the filter looks for the target."""
    filter_passes: int = 3
    """The number of passes of the filter. Each pass has its own random initial states."""
    batch_size: int = 400
    """B, the number of training rows in a batch."""
    lr: float = 5e-4
    """The largest learning rate."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _positive(self, "k", "filter_top", "filter_passes")
        if self.group_size < 2:
            raise _wrong_value(self, "group_size", "at least 2, because advantages compare trajectories", self.group_size)
        for name, allowed in (("reward", REWARDS), ("scores", SCORES)):
            if (value := getattr(self, name)) not in allowed:
                raise _wrong_value(self, name, f"one of {', '.join(allowed)}", repr(value))
        if not 0 <= self.dropout < 1:
            raise _wrong_value(self, "dropout", "in [0, 1)", self.dropout)


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """The settings of evaluation, which ranks every item of the catalog."""

    batch_size: int = 256
    """The number of rows that are encoded at once. It has no influence on the results beyond rounding."""
    ks: tuple[int, ...] = (5, 10, 20, 50)
    """The cut-offs of the metrics. They must hold 10, which early stopping watches."""
    depth_ratios: tuple[float, ...] = (0.25, 0.5, 1.0, 2.0, 3.0, 4.0)
    """The test uses these multiples of the mean depth as numbers of steps T, and T = 1."""
    noise_seed: int = 0
    """The seed of the initial states. With one seed, every evaluation of the same weights gives the same numbers."""
    watch_masked: bool = False
    """Whether early stopping watches the ranking without the items of the user's history, and not that of all items."""
    test: bool = True
    """Whether the test rows are ranked at the end of each phase. Turn it off while you try settings."""

    def __post_init__(self) -> None:
        _check_types(self)
        _positive(self, "batch_size")
        if 10 not in self.ks or min(self.ks) < 1:
            raise _wrong_value(self, "ks", "positive and hold 10, which early stopping watches", self.ks)
        if min(self.depth_ratios, default=1) <= 0:
            raise _wrong_value(self, "depth_ratios", "greater than 0", self.depth_ratios)

    def depths(self, mean_depth: int) -> list[int]:
        """Return the numbers of steps T of the test, ascending. Raises :class:`InputError` for more than a model can make."""
        if max(self.depth_ratios, default=1) * mean_depth > MOST_STEPS:
            most = f"at most {MOST_STEPS / mean_depth:g}, because a model makes at most {MOST_STEPS:,} steps"
            raise _wrong_value(self, "depth_ratios", most, self.depth_ratios)
        return sorted({1, *(max(1, int(ratio * mean_depth)) for ratio in self.depth_ratios)})


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """All settings of a run."""

    model: dict[str, Any] = field(default_factory=dict)
    """Fields of :class:`~lares_fast.LARESConfig`, except ``n_items``, which the log determines."""
    data: DataConfig = DataConfig()
    """The settings of the log and its split."""
    spt: SPTConfig = SPTConfig()
    """The settings of phase 1."""
    rpt: RPTConfig = RPTConfig()
    """The settings of phase 2."""
    evaluation: EvalConfig = EvalConfig()
    """The settings of evaluation."""
    seed: int = 2025
    """The seed of everything random in training, in 0..2**64-1."""
    checkpoint_minutes: float = 10.0
    """The minutes between two saves of the state within an epoch. The state is also saved after each epoch."""
    device: str = "auto"
    """Where the model trains: ``auto`` (a GPU whose kernels pass their self-test, else the CPU), ``cpu``, ``cuda`` or
    ``cuda:N``. A run may be resumed on another device.
    """
    precision: str = "fp32"
    """``fp32``, or on a GPU ``bf16``: products with weights and items are then taken in bf16. Weights, gradients and the
    optimizer stay in fp32.
    """

    def __post_init__(self) -> None:
        _check_types(self)
        for name, kind in {**SECTIONS, "model": dict}.items():
            if not isinstance(getattr(self, name), kind):
                raise _wrong_value(self, name, f"a {kind.__name__}", reprlib.repr(getattr(self, name)))
        plain = {name: value.item() if hasattr(value, "item") else value for name, value in self.model.items()}
        object.__setattr__(self, "model", plain)
        if type(depth := plain.get("mean_depth", LARESConfig.mean_depth)) is int:
            self.evaluation.depths(depth)
        _not_negative(self, "checkpoint_minutes")
        if not 0 <= self.seed < 2**64:
            raise _wrong_value(self, "seed", "in 0..2**64-1", self.seed)
        if self.precision not in PRECISIONS:
            raise _wrong_value(self, "precision", f"one of {', '.join(PRECISIONS)}", repr(self.precision))

    def to_dict(self) -> dict[str, Any]:
        """Return nested plain values, ready for YAML."""
        values = asdict(self)
        for name, value in values["evaluation"].items():
            values["evaluation"][name] = list(value) if isinstance(value, tuple) else value
        return values


# Each section of the settings by its name, and the class that checks it. ``RunConfig.model`` holds no ``n_items``.
SECTIONS: dict[str, type] = {
    "model": LARESConfig,
    **{each.name: type(each.default) for each in fields(RunConfig) if is_dataclass(each.default)},
}


def checked_phases(given: Sequence[str]) -> set[str]:
    """Return ``given`` as a set of phases; raises :class:`InputError` with a suggestion if it is not a sequence of phases."""
    names = given if isinstance(given, Sequence | set | frozenset) and not isinstance(given, str | bytes) else None
    if names and all(isinstance(name, str) and name in PHASES for name in names):
        return set(names)
    meant = {"spt": "spt", "phase1": "spt", "pretraining": "spt", "rpt": "rpt", "phase2": "rpt", "posttraining": "rpt"}
    wrong = (
        [given if isinstance(given, str) else "both"]
        if names is None
        else [name for name in names if name not in PHASES] or ["both"]
    )
    near = [difflib.get_close_matches(str(name).lower(), [*meant, "both"], 1, cutoff=0.0)[0] for name in wrong]
    right = [phase for phase in PHASES if "both" in near or phase in [*(names or ()), *(meant.get(name) for name in near)]]
    raise InputError(f"phases must be a tuple of {' and '.join(PHASES)}, but got {given!r:.60}: did you mean {tuple(right)}?")
