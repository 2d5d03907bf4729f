"""Settings of a training run; the defaults are the published Musical Instruments run."""

from __future__ import annotations

import difflib
import os
import reprlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import numpy as np

from lares_fast._errors import InputError
from lares_fast._numbers import number, whole
from lares_fast.reference.rpt import REWARDS, SCORES

PHASES = ("spt", "rpt")
SPLITS = ("leave-one-out", "temporal")


def _check_types(settings: Any) -> None:
    """Have every field hold exactly what its annotation says, finite and in Python's own types; raises :class:`InputError`."""
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
            raise InputError(f"{_name(settings, each.name)} must be {_WORDS[kinds[0]]}, but got {reprlib.repr(value)}.")
        # A number of an array library could be saved and not be read again.
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
    """``value`` as ``kind``, or ``None`` if it is something else."""
    if kind == "str":
        return os.fspath(value) if isinstance(value, str | os.PathLike) else None
    if isinstance(value, bool | np.bool_) or kind == "bool":
        return bool(value) if kind == "bool" and isinstance(value, bool | np.bool_) else None
    if isinstance(value, str | bytes):
        return None
    try:
        plain = whole("value", value) if kind == "int" else number("value", value)
    except InputError:
        return None
    # Larger ones overflow in the arithmetic of fp32 weights.
    return plain if kind == "int" or abs(plain) <= _LARGEST else None


def _positive(settings: object, *names: str) -> None:
    for name in names:
        value = getattr(settings, name)
        if value is not None and value <= 0:
            raise InputError(f"{_name(settings, name)} must be greater than 0, but got {value}.")


def _not_negative(settings: object, *names: str) -> None:
    for name in names:
        if (value := getattr(settings, name)) < 0:
            raise InputError(f"{_name(settings, name)} must be 0 or greater, but got {value}.")


def _name(settings: object, name: str) -> str:
    """The dotted name of a setting."""
    section = _section(settings)
    return f"{section}.{name}" if section else name


def _section(settings: object) -> str:
    """The section of a run's settings that an object of this class fills."""
    sections = {DataConfig: "data", SPTConfig: "spt", RPTConfig: "rpt", EvalConfig: "evaluation", RunConfig: ""}
    return sections.get(type(settings), "phase")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the log comes from and how it is split.

    ``path``
        A log file; ``None`` makes the synthetic log of ``synthetic``.
    ``format, user, item, time``
        As in :func:`lares_fast.data.read_log`: the format (``auto`` looks), and the column names of event logs.
    ``split, valid_fraction, test_fraction``
        ``leave-one-out``, or ``temporal``: global cut-off times that leave these fractions of the events to the two
        last windows.
    ``synthetic_users, synthetic_items, synthetic_seed``
        Size and seed of the synthetic log.
    """

    path: str | None = None
    format: str = "auto"
    user: str | None = None
    item: str | None = None
    time: str | None = None
    split: str = "leave-one-out"
    valid_fraction: float = 0.1
    test_fraction: float = 0.1
    synthetic_users: int = 3000
    synthetic_items: int = 600
    synthetic_seed: int = 0

    def __post_init__(self) -> None:
        _check_types(self)
        if self.split not in SPLITS:
            raise InputError(f"data.split must be one of {', '.join(SPLITS)}, but got {self.split!r}.")


@dataclass(frozen=True, kw_only=True)
class PhaseConfig:
    """What both phases have: Adam's settings and when to stop.

    ``epochs`` at most; ``patience`` non-improving epochs are borne and the next one stops the phase; ``max_steps``
    ends it after so many steps.
    """

    batch_size: int = 1024
    lr: float = 1e-3
    weight_decay: float = 0.0
    epochs: int = 300
    patience: int = 10
    max_steps: int | None = None

    def __post_init__(self) -> None:
        _check_types(self)
        _positive(self, "batch_size", "lr", "epochs", "max_steps")
        _not_negative(self, "weight_decay", "patience")


@dataclass(frozen=True, kw_only=True)
class SPTConfig(PhaseConfig):
    """Phase 1. ``alpha``, ``gamma`` weigh the two alignments; ``same_step`` gives the aligned passes one depth."""

    alpha: float = 0.1
    gamma: float = 0.5
    same_step: bool = True


@dataclass(frozen=True, kw_only=True)
class RPTConfig(PhaseConfig):
    """Phase 2. ``group_size`` G trajectories a sequence, rewarded by ``reward`` at ``k``, KL weighted by ``beta``.

    ``scores`` are what trajectories are rewarded and weighed by: ``dot``, plain dot products whatever the model's similarity
    (official), or ``model``, what the model ranks by, which differs with ``cos``.

    ``data_filter`` keeps the training rows whose target is among the first ``filter_top`` in one of
    ``filter_passes`` noisy passes of the phase-1 model. ``dropout`` replaces the model's in this phase.
    """

    group_size: int = 4
    k: int = 10
    beta: float = 1.0
    reward: str = "recall"
    scores: str = "dot"
    dropout: float = 0.1
    data_filter: bool = True
    filter_top: int = 100
    filter_passes: int = 3
    batch_size: int = 400
    lr: float = 5e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        _positive(self, "k", "filter_top", "filter_passes")
        if self.group_size < 2:
            raise InputError(f"rpt.group_size must be at least 2, but got {self.group_size}: advantages compare trajectories.")
        for name, allowed in (("reward", REWARDS), ("scores", SCORES)):
            if (value := getattr(self, name)) not in allowed:
                raise InputError(f"rpt.{name} must be one of {', '.join(allowed)}, but got {value!r}.")
        if not 0 <= self.dropout < 1:
            raise InputError(f"rpt.dropout must be in [0, 1), but got {self.dropout}.")


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Full ranking of every item. ``ks`` cut-offs; ``depth_ratios`` times the mean depth are the T's tested (T = 1
    always is); ``noise_seed`` addresses h0, so that every evaluation of the same weights gives the same numbers.
    Early stopping watches the ranking with the history in it, or with ``watch_masked`` the one without. ``test`` ranks
    the test rows when a phase is over; a trial of settings leaves them alone.
    """

    batch_size: int = 256
    ks: tuple[int, ...] = (5, 10, 20, 50)
    depth_ratios: tuple[float, ...] = (0.25, 0.5, 1.0, 2.0, 3.0, 4.0)
    noise_seed: int = 0
    watch_masked: bool = False
    test: bool = True

    def __post_init__(self) -> None:
        _check_types(self)
        _positive(self, "batch_size")
        if 10 not in self.ks or min(self.ks) < 1:
            raise InputError(f"evaluation.ks must be positive and hold 10, which early stopping watches, but got {self.ks}.")

    def depths(self, mean_depth: int) -> list[int]:
        """The T's of the test table, ascending."""
        return sorted({1, *(max(1, int(ratio * mean_depth)) for ratio in self.depth_ratios)})


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A whole run. ``model`` holds :class:`~lares_fast.LARESConfig` fields except ``n_items``, which the data tells."""

    model: dict[str, Any] = field(default_factory=dict)
    data: DataConfig = DataConfig()
    spt: SPTConfig = SPTConfig()
    rpt: RPTConfig = RPTConfig()
    evaluation: EvalConfig = EvalConfig()
    seed: int = 2025
    checkpoint_minutes: float = 10.0

    def __post_init__(self) -> None:
        _check_types(self)
        for name, kind in {
            "model": dict,
            "data": DataConfig,
            "spt": SPTConfig,
            "rpt": RPTConfig,
            "evaluation": EvalConfig,
        }.items():
            if not isinstance(getattr(self, name), kind):
                raise InputError(f"{name} must be a {kind.__name__}, but got {reprlib.repr(getattr(self, name))}.")
        plain = {name: value.item() if hasattr(value, "item") else value for name, value in self.model.items()}
        object.__setattr__(self, "model", plain)
        _not_negative(self, "checkpoint_minutes")
        if not 0 <= self.seed < 2**64:
            raise InputError(f"seed must be in 0..2**64-1, but got {self.seed}.")

    def to_dict(self) -> dict[str, Any]:
        """Nested plain values, ready for YAML."""
        values = asdict(self)
        for name, value in values["evaluation"].items():
            values["evaluation"][name] = list(value) if isinstance(value, tuple) else value
        return values


def checked_phases(given: Sequence[str]) -> set[str]:
    """``given`` as phases; :class:`InputError` with the nearest names for anything else, a single text included."""
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
