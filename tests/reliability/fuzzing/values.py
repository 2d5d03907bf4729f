"""Values for random calls: tensors of every kind, and values that are wrong for every argument."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

FLOATS = ("float32", "float64", "float16", "bfloat16")
FILLS = ("normal", "integers", "special", "tiny", "huge", "equal", "zero")
VIEWS = ("plain", "transposed", "strided", "shifted", "negative", "expanded", "parameter", "inference", "subclass")

SIZES = st.sampled_from((0, 1, 1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 31))
SEEDS = st.integers(0, 2**16)


class Sub(Tensor):
    """A class of tensors that changes nothing."""


@dataclass(frozen=True)
class Floats:
    """A floating-point tensor; the text of this object is enough to make the tensor again."""

    shape: tuple[int, ...]
    fill: str = "normal"
    view: str = "plain"
    dtype: str = "float32"
    seed: int = 0
    size: float = 1.0

    def make(self, dtype: str | None = None) -> Tensor:
        """Return the tensor. Its values are those of ``self.dtype`` also if ``dtype`` is wider."""
        values = self._values().to(getattr(torch, self.dtype))
        return viewed(values.to(getattr(torch, dtype or self.dtype)), self.view)

    def _values(self) -> Tensor:
        random = np.random.default_rng(self.seed)
        if self.fill == "normal":
            return torch.from_numpy(np.asarray(random.standard_normal(self.shape))) * self.size
        if self.fill in ("equal", "zero"):
            return torch.full(self.shape, random.integers(1, 9) / 4 * (self.fill == "equal"))
        values = torch.from_numpy(random.integers(-3, 4, self.shape)).double()
        if self.fill == "special":
            kinds = torch.tensor([0.0, -0.0, math.nan, math.inf, -math.inf], dtype=torch.float64)
            odd = torch.from_numpy(random.integers(0, 60, self.shape))
            values = torch.where(odd < len(kinds), kinds[odd.clamp(max=len(kinds) - 1)], values)
        narrow = self.dtype == "float16"
        return values * {"tiny": 2.0 ** (-24 if narrow else -140), "huge": 2.0 ** (13 if narrow else 124)}.get(self.fill, 1.0)


@dataclass(frozen=True)
class Ints:
    """A tensor of integers: its values, and its form."""

    values: tuple[Any, ...]
    shape: tuple[int, ...] | None = None
    view: str = "plain"
    dtype: str = "int64"

    def make(self, _: str | None = None) -> Tensor:
        """Return the tensor."""
        tensor = torch.tensor(self.values).to(getattr(torch, self.dtype))
        return viewed(tensor if self.shape is None else tensor.reshape(self.shape), self.view)


def viewed(x: Tensor, view: str) -> Tensor:
    """Return the values of ``x`` in memory of another form, or in another class."""
    if view == "transposed" and x.dim() > 1:
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if view == "strided" and x.dim():
        return torch.stack((x, x + 1), dim=-1)[..., 0]
    if view == "shifted":
        return torch.cat((x.new_ones(3), x.flatten()))[3:].view(x.shape)
    if view == "expanded" and x.dim() and len(x):
        # One row in memory stands for all rows.
        return x[:1].expand(x.shape)
    if view == "negative":
        return torch._neg_view(-x)
    if view == "parameter" and x.is_floating_point():
        return torch.nn.Parameter(x, requires_grad=False)
    if view == "inference":
        with torch.inference_mode():
            return x.clone()
    return x.as_subclass(Sub) if view == "subclass" else x


@dataclass(frozen=True)
class Odd:
    """A value that no argument takes, by its name in ``ODD``."""

    name: str

    def make(self, _: str | None = None) -> Any:
        """Return the value."""
        return ODD[self.name]()


def _quantised() -> Tensor:
    return torch.quantize_per_tensor(torch.ones(2, 3), 0.1, 0, torch.quint8)


ODD = {
    "text": lambda: "text",
    "long text": lambda: "x" * 10_000,
    "control characters": lambda: "a\n\x1b[31mb. c",
    "bytes": lambda: b"\xff",
    "list": lambda: [1, 2, "3"],
    "tuple": lambda: (1, (2, [3])),
    "dict": lambda: {"a": 1},
    "set": lambda: {1},
    "object": object,
    "class": lambda: int,
    "function": lambda: len,
    "module": lambda: torch,
    "dtype": lambda: torch.float32,
    "device": lambda: torch.device("cpu"),
    "complex": lambda: 1j,
    "not a number": lambda: math.nan,
    "10**5000": lambda: 10**5000,
    "array": lambda: np.arange(6.0).reshape(2, 3),
    "array of objects": lambda: np.array([None, "a"]),
    "date": lambda: np.datetime64("2020-01-01"),
    "sparse": lambda: torch.eye(3).to_sparse(),
    "sparse rows": lambda: torch.eye(3).to_sparse_csr(),
    "meta": lambda: torch.empty(2, 3, device="meta"),
    "quantised": _quantised,
    "complex tensor": lambda: torch.ones(2, 3, dtype=torch.complex64),
    "conjugate": lambda: torch.ones(2, 3, dtype=torch.complex64).conj(),
    "float8": lambda: torch.ones(2, 3).to(torch.float8_e4m3fn),
    "bool tensor": lambda: torch.ones(2, 3, dtype=torch.bool),
    "nested": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
    "mkldnn": lambda: torch.ones(2, 3).to_mkldnn(),
    "no memory": lambda: torch._efficientzerotensor((2, 3)),
    "five dimensions": lambda: torch.ones(1, 2, 1, 1, 1),
    "tensor of 30 dimensions": lambda: torch.ones([2] + [1] * 29),
}

# Values that are sometimes right: the call must then do the same on the backend and on the reference.
ODD_NUMBERS = (
    None,
    True,
    False,
    0,
    1,
    2,
    -1,
    3,
    2.0,
    2.5,
    -0.0,
    1e-30,
    2**16,
    2**31 - 1,
    2**31,
    2**32,
    2**63 - 1,
    2**63,
    2**64,
    -(2**63),
)
ODD_NUMBERS += (-(2**63) - 1, math.inf, -math.inf, 1e308, np.int64(2), np.uint64(2**64 - 1), np.float32(0.25), np.bool_(True))
ODD_TEXTS = ("", "auto", "native", "reference", "layers", "triton", "cuda", "numpy", "AUTO", "order", "strict", "mean", "sum")
ODD_TEXTS += ("none", "add", "last", "tokens", "steps")


def odd_value(random: Random) -> tuple[Any, bool]:
    """Return a value for any argument, and whether every argument must refuse it."""
    kind = random.randrange(4)
    if kind < 2:
        name = random.choice(list(ODD))
        # Its values are zeros, although no memory holds them.
        return Odd(name), name != "no memory"
    if kind == 2:
        return random.choice((*ODD_NUMBERS, *ODD_TEXTS)), False
    return odd_tensor(random), False


def odd_tensor(random: Random) -> Floats | Ints:
    """Return a tensor with a shape and dtype of any kind."""
    shape = tuple(random.randrange(6) for _ in range(random.randrange(5)))
    if random.random() < 0.5:
        return Floats(shape, random.choice(FILLS), "plain", random.choice(FLOATS), random.randrange(10**6))
    dtype = random.choice(("int64", "int32", "uint8", "bool"))
    value = random.choice((0, 1, -1, 2**31, 2**63 - 1, -(2**63))) if dtype == "int64" else 1
    return Ints((value,) * math.prod(shape), shape, "plain", dtype)


def odd_version(value: Floats | Ints, random: Random) -> Floats | Ints:
    """Return ``value`` with another shape, dtype or values, so that it is nearly right."""
    if isinstance(value, Floats):
        changes = (
            {"dtype": random.choice(FLOATS)},
            {"view": random.choice(VIEWS)},
            {"fill": random.choice(FILLS)},
            {"shape": _other_shape(value.shape, random)},
        )
        return replace(value, **random.choice(changes))
    narrow = random.choice(("int32", "float32", "float64", "int16"))
    if value.shape is not None:
        return replace(value, dtype=narrow)
    values = list(value.values)
    if values:
        large = (2**31, 2**63 - 1, -(2**63), 2**62) if value.dtype == "int64" else ()
        values[random.randrange(len(values))] = random.choice((-1, 0, 1, 5, 10**6, *large))
    changes = (
        {"dtype": narrow, "values": tuple(x % 100 for x in value.values)},
        {"values": tuple(values)},
        {"values": value.values[::-1]},
        {"values": value.values[:-1] if random.random() < 0.5 else (*value.values, *(value.values[-1:] or (0,)))},
        {"view": random.choice(("strided", "shifted", "negative", "inference", "subclass"))},
    )
    return replace(value, **random.choice(changes))


def _other_shape(shape: tuple[int, ...], random: Random) -> tuple[int, ...]:
    change = random.randrange(4)
    if change == 0 or not shape:
        return (*shape, random.randrange(4))
    if change == 1:
        return shape[1:]
    at = random.randrange(len(shape))
    size = 0 if change == 2 else shape[at] + random.choice((-1, 1))
    return (*shape[:at], max(0, size), *shape[at + 1 :])


@dataclass
class Example:
    """One call: the name of the function, its arguments by name, and which of them are wrong.

    ``wrong`` names the arguments that were changed. ``refused`` says that the call must raise an error, and ``right`` that it
    must not.
    """

    name: str
    arguments: dict[str, Any]
    wrong: tuple[str, ...] = ()
    refused: bool = False
    right: bool = False
    notes: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        listed = ", ".join(f"{name}={text_of(value)[:400]}" for name, value in self.arguments.items())
        return f"{self.name}({listed}) wrong={','.join(self.wrong) or '-'}{' refused' * self.refused}{' right' * self.right}"

    def make(self, dtype: str | None = None) -> dict[str, Any]:
        """Return new arguments; ``dtype`` replaces the dtype of floating-point tensors."""
        return {name: made(value, dtype) for name, value in self.arguments.items()}


def text_of(value: Any) -> str:
    """Return ``repr(value)``, or the type of a value that has no text, such as an integer of thousands of digits."""
    try:
        return repr(value)
    except ValueError:
        return f"<{type(value).__name__} without a text>"


def made(value: Any, dtype: str | None = None) -> Any:
    """Return the value that an argument stands for."""
    if hasattr(value, "make"):
        return value.make(dtype)
    if type(value) in (tuple, list):
        return type(value)(made(item, dtype) for item in value)
    return value


def damaged(example: Example, random: Random) -> Example:
    """Return ``example`` with one argument changed, or two."""
    arguments, wrong = {**example.arguments}, dict[str, bool]()
    for _ in range(random.choice((1, 1, 1, 2))):
        name = random.choice([name for name in arguments if name not in example.notes.get("fixed", ())])
        value = arguments[name]
        if isinstance(value, Floats | Ints) and random.random() < 0.5:
            arguments[name], wrong[name] = odd_version(value, random), False
        else:
            arguments[name], odd = odd_value(random)
            # Some arguments take lists of many kinds.
            wrong[name] = odd and name not in example.notes.get("loose", ())
    return replace(example, arguments=arguments, wrong=tuple(wrong), refused=any(wrong.values()), right=False)
