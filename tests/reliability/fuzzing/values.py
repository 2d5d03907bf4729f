"""Values for random calls: tensors of every kind, and values that are wrong for every argument."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
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
        if self.fill in ("normal", "equal", "zero"):
            shape = self.shape if self.fill == "normal" else ()
            return torch.full(self.shape, self.size * (self.fill != "zero")) * torch.from_numpy(
                np.asarray(random.standard_normal(shape))
            )
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
        tensor = torch.tensor(self.values, dtype=getattr(torch, self.dtype))
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
    "list": lambda: [1, 2, 3],
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
    "five dimensions": lambda: torch.ones(1, 1, 1, 1, 1),
    "tensor of 30 dimensions": lambda: torch.ones([1] * 30),
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


@st.composite
def odd_values(draw: Any) -> tuple[Any, bool]:
    """Return a value for any argument, and whether every argument must refuse it."""
    kind = draw(st.integers(0, 3))
    if kind < 2:
        return Odd(draw(st.sampled_from(sorted(ODD)))), True
    if kind == 2:
        return draw(st.sampled_from((*ODD_NUMBERS, *ODD_TEXTS))), False
    return draw(odd_tensors()), False


@st.composite
def odd_tensors(draw: Any) -> Floats | Ints:
    """Return a tensor with a shape and dtype of any kind."""
    shape = tuple(draw(st.lists(st.integers(0, 5), max_size=4)))
    if draw(st.booleans()):
        return Floats(shape, draw(st.sampled_from(FILLS)), "plain", draw(st.sampled_from(FLOATS)), draw(SEEDS))
    values = draw(st.sampled_from(((0,), (1,), (-1,), (2**31,), (2**63 - 1,), (-(2**63),))))
    dtype = draw(st.sampled_from(("int64", "int32", "uint8", "bool")))
    return Ints((values if dtype == "int64" else (1,)) * math.prod(shape), shape, "plain", dtype)


@st.composite
def odd_versions(draw: Any, value: Any) -> Any:
    """Return ``value``, a tensor, with another shape, dtype or values, so that it is nearly right."""
    if isinstance(value, Floats):
        change = draw(st.integers(0, 3))
        if change == 0:
            return replace(value, dtype=draw(st.sampled_from(FLOATS)))
        if change == 1:
            return replace(value, view=draw(st.sampled_from(VIEWS)))
        if change == 2:
            return replace(value, fill=draw(st.sampled_from(FILLS)))
        return replace(value, shape=draw(_other_shape(value.shape)))
    values = list(value.values)
    if value.shape is not None:
        return replace(value, dtype=draw(st.sampled_from(("int32", "float32", "int16"))))
    change = draw(st.integers(0, 4))
    if change == 0:
        return replace(
            value, dtype=draw(st.sampled_from(("int32", "float32", "float64", "int16"))), values=tuple(x % 100 for x in values)
        )
    if change == 1 and values:
        at = draw(st.integers(0, len(values) - 1))
        large = (2**31, 2**63 - 1, -(2**63), 2**62) if value.dtype == "int64" else ()
        values[at] = draw(st.sampled_from((-1, 0, 1, 5, 10**6, *large)))
        return replace(value, values=tuple(values))
    if change == 2:
        return replace(value, values=tuple(reversed(values)))
    if change == 3:
        return replace(value, values=tuple(values[:-1]) if draw(st.booleans()) else (*values, *(values[-1:] or [0])))
    return replace(value, view=draw(st.sampled_from(("strided", "shifted", "negative", "inference", "subclass"))))


@st.composite
def _other_shape(draw: Any, shape: tuple[int, ...]) -> tuple[int, ...]:
    change = draw(st.integers(0, 3))
    if change == 0 or not shape:
        return (*shape, draw(st.integers(0, 3)))
    if change == 1:
        return shape[1:]
    at = draw(st.integers(0, len(shape) - 1))
    size = 0 if change == 2 else shape[at] + draw(st.sampled_from((-1, 1)))
    return (*shape[:at], max(0, size), *shape[at + 1 :])


@dataclass
class Example:
    """One call: the name of the function, its arguments by name, and which of them are wrong.

    ``wrong`` names the arguments that were changed. ``refused`` says that the call must raise an error, and ``right`` that it must not.
    """

    name: str
    arguments: dict[str, Any]
    wrong: tuple[str, ...] = ()
    refused: bool = False
    right: bool = False
    notes: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        listed = ", ".join(f"{name}={value!r:.400}" for name, value in self.arguments.items())
        return f"{self.name}({listed}) wrong={','.join(self.wrong) or '-'}{' refused' * self.refused}{' right' * self.right}"

    def make(self, dtype: str | None = None) -> dict[str, Any]:
        """Return new arguments; ``dtype`` replaces the dtype of floating-point tensors."""
        return {name: made(value, dtype) for name, value in self.arguments.items()}


def made(value: Any, dtype: str | None = None) -> Any:
    """Return the value that an argument stands for."""
    if hasattr(value, "make"):
        return value.make(dtype)
    if type(value) in (tuple, list):
        return type(value)(made(item, dtype) for item in value)
    return value


@st.composite
def damaged(draw: Any, example: Example) -> Example:
    """Return ``example`` with one argument changed, or two."""
    arguments, wrong = {**example.arguments}, dict[str, bool]()
    for _ in range(draw(st.sampled_from((1, 1, 1, 2)))):
        name = draw(st.sampled_from(sorted(arguments)))
        value = arguments[name]
        if isinstance(value, Floats | Ints) and draw(st.booleans()):
            arguments[name], odd = draw(odd_versions(value)), False
        else:
            arguments[name], odd = draw(odd_values())
        wrong[name] = odd
    return replace(example, arguments=arguments, wrong=tuple(wrong), refused=any(wrong.values()), right=False)
