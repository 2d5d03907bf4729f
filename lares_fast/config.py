"""The configuration of a model: every setting of the official code, with the published run as the default."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from lares_fast._errors import InputError
from lares_fast._numbers import MOST_STEPS, choice, number, shown, whole

ADAPTERS = ("add", "concat", "linear")
DEPTH_SAMPLINGS = ("poisson-lognormal", "poisson-unbounded", "poisson-bounded", "uniform", "constant", "non-recurrent")
STATE_INITS = ("normal", "normal_zero", "zero")
SIMILARITIES = ("dot", "cos")

# The files of a model: its weights with their configuration, and the raw ids of its items.
MODEL, ITEMS = "model.safetensors", "item_ids.json"
# Of phase 2: the rewards, and the scores that rewards and probabilities are computed from.
REWARDS = ("recall", "ndcg")
SCORES = ("dot", "model")
# Of a log: which of several equal events stay.
DUPLICATES = ("keep", "same-time", "first", "last")


@dataclass(frozen=True, kw_only=True)
class LARESConfig:
    """Configuration of one LARES model. The defaults are the settings of the published Musical Instruments run.

    Raises :class:`InputError` for a value of the wrong type or out of range.
    """

    n_items: int
    """N, the number of rows of the item table, which includes the PAD row 0 (RecBole's ``item_num``). Item ids are
    1..``n_items`` - 1.
    """
    max_len: int = 20
    """L, the largest length of a sequence: the model reads the last ``max_len`` items of a history."""
    hidden_size: int = 64
    """D, the width of the model and of its item vectors. It is a multiple of ``n_heads``."""
    n_heads: int = 2
    """H, the number of attention heads of each layer."""
    inner_size: int = 256
    """The width of the feed-forward layers."""
    n_pre_layers: int = 2
    """The number of layers of the pre-block, which reads the sequence once."""
    n_core_layers: int = 2
    """The number of layers of the core-block, which every step T applies."""
    backbone: str = "transformer"
    """The name of a registered kind of blocks. ``lares_fast.reference.register_backbone`` adds one."""
    adapter: str = "add"
    """How a step joins the state h and the output of the pre-block: ``add`` is (h + pre) / 2, ``concat`` is Linear(2D -> D),
    and ``linear`` is a gate, the sigmoid of one learned number.
    """
    dropout: float = 0.5
    """The probability of hidden dropout in training."""
    attention_dropout: float | None = None
    """The probability of attention dropout in training. ``None`` means the hidden dropout. The official code always uses the
    hidden dropout and ignores its own setting of attention dropout.
    """
    layer_norm_eps: float = 1e-12
    """The epsilon of the layer norms."""
    initializer_range: float = 0.02
    """The standard deviation of the initial weights."""
    mean_depth: int = 4
    """m, the number around which training draws the number of steps T."""
    depth_sampling: str = "poisson-lognormal"
    """The distribution around m = ``mean_depth`` from which training draws the number of steps T: ``poisson-lognormal``,
    ``poisson-unbounded``, ``poisson-bounded``, ``uniform``, ``constant`` or ``non-recurrent``. T is always at least 1. (The
    plain Poisson distributions of the official code can draw T = 0. Then the model scores noise.)
    """
    per_sequence_depth: bool = False
    """Whether training draws one T for each sequence instead of one for each batch. This is not official."""
    eval_depth: int | None = None
    """T at evaluation. ``None`` means ``mean_depth``."""
    state_init: str = "normal"
    """How the initial state h0 is made. ``normal`` draws it. ``normal_zero`` draws it in training, and it is zero at
    evaluation. With ``zero`` it is always zero.
    """
    state_std: float = 1.0
    """The standard deviation of the normal draw of h0, which is truncated at 3 ``state_std``."""
    state_scale: float = 3.0
    """The factor by which the normal draw of h0 is multiplied."""
    share_reference_noise: bool = False
    """Whether the frozen reference of reinforcement post-training starts from the h0 of the policy. This is not official: the
    official reference draws its own h0, so the KL term cannot fall to 0.
    """
    similarity: str = "dot"
    """How items are scored: ``dot`` by dot products, ``cos`` by cosines divided by ``tau``."""
    tau: float = 1.0
    """The number by which cosines are divided. It has no effect on ``dot``."""
    pad_in_softmax: bool = True
    """Whether the PAD row is part of the training softmax. In the official code it is."""

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
        # Training draws up to three times the mean depth.
        _check(self.mean_depth <= MOST_STEPS // 3, "mean_depth", self.mean_depth, f"at most {MOST_STEPS // 3:,}")
        depth = self.eval_depth
        _check(depth is None or 1 <= depth <= MOST_STEPS, "eval_depth", depth, f"at least 1 and at most {MOST_STEPS:,}")
        for name in ("layer_norm_eps", "initializer_range", "tau"):
            _check(getattr(self, name) > 0, name, getattr(self, name), "greater than 0")
        _check(2.0**-100 <= self.tau <= 2.0**100, "tau", self.tau, "in 2^-100..2^100")
        for name in ("state_std", "state_scale"):
            _check(getattr(self, name) >= 0, name, getattr(self, name), "0 or greater")
        for name, allowed in (
            ("adapter", ADAPTERS),
            ("depth_sampling", DEPTH_SAMPLINGS),
            ("state_init", STATE_INITS),
            ("similarity", SIMILARITIES),
        ):
            _check(getattr(self, name) in allowed, name, getattr(self, name), f"one of {', '.join(allowed)}")

    def _take(self, name: str, kind: str) -> None:
        """Convert the field ``name`` to its declared type. Raises :class:`InputError` if that fails."""
        value = getattr(self, name)
        if value is None and kind.endswith("| None"):
            return
        if kind.startswith("int"):
            value = whole(name, value)
        elif kind.startswith("float"):
            value = number(name, value)
        else:
            _check(
                isinstance(value, bool if kind == "bool" else str),
                name,
                value,
                "true or false" if kind == "bool" else "text",
            )
        object.__setattr__(self, name, value)

    @property
    def steps(self) -> int:
        """The number of steps T at evaluation."""
        return self.eval_depth or self.mean_depth

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> LARESConfig:
        """Return the configuration ``instruments`` (the published run) or ``tiny`` (for tests), with ``overrides``.

        ``overrides`` must have ``n_items``. Raises :class:`InputError` for another name.
        """
        return cls(**{**PRESETS[choice("preset", name, list(PRESETS))], **overrides})

    @classmethod
    def preview(cls, **settings: Any) -> LARESConfig:
        """Return a configuration for use before the catalog is known: ``n_items`` is 2, the smallest valid value.

        All other values are checked and filled in as usual, so it describes every part of a model except its item table.
        """
        return cls(n_items=2, **settings)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> LARESConfig:
        """Return the configuration from the plain values of :meth:`to_dict`. Raises :class:`InputError` for an unknown key."""
        if not isinstance(values, dict):
            raise InputError(f"values must be a dictionary of settings, but got {shown(values)}.")
        known = {field.name for field in fields(cls)}
        if unknown := sorted(set(values) - known, key=str):
            raise InputError(f"unknown model setting {shown(unknown[0])}; the known settings are {', '.join(sorted(known))}.")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, ready for JSON or YAML."""
        return asdict(self)

    def replace(self, **changes: Any) -> LARESConfig:
        """Return a copy with some fields changed."""
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
        raise InputError(f"{name} must be {expected}, but got {shown(value)}.")
