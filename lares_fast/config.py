"""The model's configuration: every switch of the official code, with the published run as the default."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from lares_fast._errors import InputError
from lares_fast._numbers import number, whole

ADAPTERS = ("add", "concat", "linear")
DEPTH_SAMPLINGS = ("poisson-lognormal", "poisson-unbounded", "poisson-bounded", "uniform", "constant", "non-recurrent")
STATE_INITS = ("normal", "normal_zero", "zero")
SIMILARITIES = ("dot", "cos")


@dataclass(frozen=True, kw_only=True)
class LARESConfig:
    """Configuration of one LARES model. The defaults are the published Musical Instruments run.

    ``n_items``
        Rows of the item table, the PAD row 0 included (RecBole's ``item_num``); item ids are 1..n_items-1.
    ``max_len``
        L: histories are cut to their last ``max_len`` items.
    ``hidden_size, n_heads, inner_size, n_pre_layers, n_core_layers``
        D, H, the feed-forward width, and the layers of the pre-block and of the recurrent core-block.
    ``backbone``
        Name of a registered block kind (see ``lares_fast.reference.backbone``).
    ``adapter``
        How a step joins the state h and the pre-block's output: ``add`` is (h + pre) / 2, ``concat`` is
        Linear(2D -> D), ``linear`` is a scalar sigmoid gate.
    ``dropout, attention_dropout``
        Hidden dropout and attention dropout; ``None`` means "as hidden", which is what the official code
        does whatever its own setting says.
    ``mean_depth, depth_sampling, per_sequence_depth, eval_depth``
        m and the law of the number of steps T in training (always T >= 1; the official plain Poisson laws can
        draw T = 0, which scores raw noise); one T a batch, or one a sequence (not official); T at
        evaluation, ``None`` meaning m.
    ``state_init, state_std, state_scale``
        h0 = scale * truncated normal(std, cut at 3 std): ``normal`` also at evaluation, ``normal_zero`` in
        training only, ``zero`` never.
    ``share_reference_noise``
        In reinforcement post-training the frozen reference sees the policy's h0 (not official: there it draws
        its own, which gives the KL term a floor).
    ``similarity, tau``
        ``dot``, or ``cos``: both sides L2-normalised and divided by ``tau``.
    ``pad_in_softmax``
        The PAD row takes part in the training softmax (official) or not.
    """

    n_items: int
    max_len: int = 20
    hidden_size: int = 64
    n_heads: int = 2
    inner_size: int = 256
    n_pre_layers: int = 2
    n_core_layers: int = 2
    backbone: str = "transformer"
    adapter: str = "add"
    dropout: float = 0.5
    attention_dropout: float | None = None
    layer_norm_eps: float = 1e-12
    initializer_range: float = 0.02
    mean_depth: int = 4
    depth_sampling: str = "poisson-lognormal"
    per_sequence_depth: bool = False
    eval_depth: int | None = None
    state_init: str = "normal"
    state_std: float = 1.0
    state_scale: float = 3.0
    share_reference_noise: bool = False
    similarity: str = "dot"
    tau: float = 1.0
    pad_in_softmax: bool = True

    def __post_init__(self) -> None:
        for field in fields(self):
            self._take(field.name, str(field.type))
        for name in ("max_len", "hidden_size", "n_heads", "inner_size", "n_pre_layers", "n_core_layers", "mean_depth"):
            _check(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        _check(self.n_items >= 2, "n_items", self.n_items, "at least 2: the PAD row and one item")
        _check(
            self.hidden_size % self.n_heads == 0,
            "hidden_size",
            self.hidden_size,
            f"a multiple of n_heads, which is {self.n_heads}",
        )
        for name in ("dropout", "attention_dropout"):
            value = getattr(self, name)
            _check(value is None or 0 <= value < 1, name, value, "in [0, 1)")
        _check(self.eval_depth is None or self.eval_depth >= 1, "eval_depth", self.eval_depth, "at least 1")
        for name in ("layer_norm_eps", "initializer_range", "tau"):
            _check(getattr(self, name) > 0, name, getattr(self, name), "greater than 0")
        for name in ("state_std", "state_scale"):
            _check(getattr(self, name) >= 0, name, getattr(self, name), "0 or greater")
        for name, allowed in (
            ("adapter", ADAPTERS),
            ("depth_sampling", DEPTH_SAMPLINGS),
            ("state_init", STATE_INITS),
            ("similarity", SIMILARITIES),
        ):
            _check(getattr(self, name) in allowed, name, repr(getattr(self, name)), f"one of {', '.join(allowed)}")

    def _take(self, name: str, kind: str) -> None:
        """Give the field ``name`` the type it says, or raise :class:`InputError`: a setting may come from a file."""
        value = getattr(self, name)
        if value is None and kind.endswith("| None"):
            return
        if kind.startswith("int"):
            value = whole(name, value)
        elif kind.startswith("float"):
            value = number(name, value)
            _check(math.isfinite(value), name, value, "finite")
        else:
            _check(
                isinstance(value, bool if kind == "bool" else str),
                name,
                repr(value),
                "true or false" if kind == "bool" else "text",
            )
        object.__setattr__(self, name, value)

    @property
    def steps(self) -> int:
        """T at evaluation."""
        return self.eval_depth or self.mean_depth

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> LARESConfig:
        """A named configuration: ``instruments`` (published run) or ``tiny`` (for tests); ``n_items`` must be given."""
        if name not in PRESETS:
            raise InputError(f"preset must be one of {', '.join(PRESETS)}, but got {name!r}.")
        return cls(**{**PRESETS[name], **overrides})

    @classmethod
    def preview(cls, **settings: Any) -> LARESConfig:
        """Return a configuration for use before the catalog is known: ``n_items`` is 2, the smallest valid value.

        All other values are checked and filled in as usual, so it describes every part of a model except its item table.
        """
        return cls(n_items=2, **settings)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> LARESConfig:
        """The inverse of :meth:`to_dict`; an unknown key is an :class:`InputError`."""
        known = {field.name for field in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise InputError(f"unknown model setting {unknown[0]!r}; known are {', '.join(sorted(known))}.")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON or YAML."""
        return asdict(self)

    def replace(self, **changes: Any) -> LARESConfig:
        """A copy with some fields changed."""
        return replace(self, **changes)


PRESETS: dict[str, dict[str, Any]] = {
    "instruments": {},
    "tiny": {
        "hidden_size": 16,
        "inner_size": 32,
        "n_pre_layers": 1,
        "n_core_layers": 1,
        "max_len": 10,
        "dropout": 0.1,
        "mean_depth": 2,
    },
}


def _check(holds: bool, name: str, value: object, expected: str) -> None:
    if not holds:
        raise InputError(f"{name} must be {expected}, but got {value}.")
