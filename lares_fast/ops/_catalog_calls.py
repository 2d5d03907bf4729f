"""The calls of the ops that score a whole catalog: their arguments, checked when a call is built.

A call checks shapes, dtypes and devices, which compilers know too. It does not read the values of index tensors. The method
``check_values`` reads them, on the CPU only. The reference backends call it first. The native kernels check each value when
they read it, so the native backends call ``check_values`` only after an error, to get its message.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass, replace
from itertools import pairwise
from typing import ClassVar, NamedTuple, Self

import torch
from torch import Tensor

from lares_fast._errors import InputError
from lares_fast._numbers import check_dense, choice, flag, number, shown, whole
from lares_fast.ops._call import Call
from lares_fast.ops._catalog_checks import (
    ExcludeLists,
    check_exclude,
    check_floats,
    check_ids,
    check_index,
    checked_exclude,
)

TIES = ("order", "strict")
_LOWEST_SCALE, _HIGHEST_SCALE = 2.0**-100, 2.0**100


class IndexTables(NamedTuple):
    """The tables of a :class:`lares_fast.ops.CatalogIndex`. Without int8 screening the last three tables are empty."""

    # [D], finite numbers near the mean of the items.
    centre: Tensor
    # [D], powers of two.
    scale: Tensor
    # [panels, D, items of a panel].
    panels: Tensor
    # int8 codes of the items.
    codes: Tensor
    # The sum of an item with a query whose codes are all 0.
    start: Tensor
    # [panels of codes, 4]: how far a screened score can be from the exact score.
    bounds: Tensor


@dataclass(frozen=True)
class CatalogCall(Call):
    """The arguments that ``topk`` and ``target_rank`` share: query [B, D], items [N, D], bias [N] and lists of exclusions."""

    query: Tensor
    items: Tensor
    _: KW_ONLY
    bias: Tensor | None = None
    exclude: ExcludeLists | None = None
    backend: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        query, items, bias = self.query, self.items, self.bias
        check_dense("query", query)
        check_dense("items", items)
        check_floats("query", query, 2, "[B, D]")
        if items.dim() != 2 or items.shape[1] != query.shape[1]:
            raise InputError(f"items must be [N, {query.shape[1]}] like query, but got {list(items.shape)}.")
        _check_like(query, "query", "items", items, items.shape)
        if bias is not None:
            check_dense("bias", bias)
            _check_like(query, "query and items", "bias", bias, items.shape[:1])
        if self.exclude is not None:
            object.__setattr__(self, "exclude", check_exclude(self.exclude, query))

    def check_values(self) -> None:
        """Raise :class:`InputError` for a wrong value in the lists of exclusions; lists on a GPU are not read."""
        if self.exclude is not None:
            checked_exclude(*self.exclude, self.items.shape[0])


@dataclass(frozen=True)
class TopkCall(CatalogCall):
    """The arguments of :func:`lares_fast.ops.topk`."""

    op: ClassVar[str] = "topk"

    k: int
    _: KW_ONLY
    index: IndexTables | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "k", whole("k", self.k))
        if not 1 <= self.k <= self.items.shape[0]:
            raise InputError(f"k must be in 1..{self.items.shape[0]}, the number of items, but got {self.k}.")
        if self.index is not None and not isinstance(self.index, IndexTables):
            tables = getattr(self.index, "tables", None)
            if not callable(tables):
                raise InputError(f"index must be a CatalogIndex, but got {shown(self.index)}.")
            object.__setattr__(self, "index", tables(self.items))


@dataclass(frozen=True)
class TargetRankCall(CatalogCall):
    """The arguments of :func:`lares_fast.ops.target_rank` and :func:`lares_fast.ops.target_ranks`."""

    op: ClassVar[str] = "target_rank"

    target: Tensor
    _: KW_ONLY
    ties: str = "order"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_index("target", self.target, self.query)
        batch = self.query.shape[0]
        if self.target.shape[0] != batch:
            raise InputError(f"target must have B = {batch} entries like query, but got {self.target.shape[0]}.")
        check_ties(self.ties)

    def check_values(self) -> None:
        """Raise :class:`InputError` for a wrong value in the targets or the lists; values on a GPU are not read."""
        check_ids("target", self.target, 0, self.items.shape[0])
        super().check_values()


@dataclass(frozen=True)
class SoftmaxCall(Call):
    """The arguments that the softmax over a catalog and its gradients share: hidden [..., D], items [N, D], target [...].

    If ``items`` has three dimensions, there are J catalogs: hidden [J, M, D], items [J, N, D] and target [J, M].
    """

    hidden: Tensor
    items: Tensor
    target: Tensor
    _: KW_ONLY
    scale: float = 1.0
    skip_pad: bool = False
    bf16: bool = False
    backend: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        hidden, items, target = self.hidden, self.items, self.target
        object.__setattr__(self, "scale", number("scale", self.scale))
        object.__setattr__(self, "skip_pad", flag("skip_pad", self.skip_pad))
        object.__setattr__(self, "bf16", flag("bf16", self.bf16))
        for name, value in (("hidden", hidden), ("items", items), ("target", target)):
            check_dense(name, value)
        check_floats("hidden", hidden, max(1, hidden.dim()), "[..., D]")
        D = hidden.shape[-1]
        batched = items.dim() == 3 and items.shape[0] == hidden.shape[0] and hidden.dim() == 3
        if not (batched or items.dim() == 2) or items.shape[-1] != D or items.shape[-2] < 1 + self.skip_pad:
            least = "at least 2 rows with skip_pad" if self.skip_pad else "at least 1 row"
            wanted = f"[N, {D}] or [{hidden.shape[0]}, N, {D}]" if hidden.dim() == 3 else f"[N, {D}]"
            raise InputError(f"items must be {wanted} like hidden, with {least}, but got {list(items.shape)}.")
        if items.dtype != hidden.dtype or items.device != hidden.device:
            raise InputError(
                f"items must be {hidden.dtype} on {hidden.device} like hidden, but got {items.dtype} on {items.device}."
            )
        if target.dtype != torch.int64 or target.device != hidden.device or target.shape != hidden.shape[:-1]:
            raise InputError(
                f"target must be torch.int64 {list(hidden.shape[:-1])} on {hidden.device} like hidden, "
                f"but got {target.dtype} {list(target.shape)} on {target.device}."
            )
        if not _LOWEST_SCALE <= self.scale <= _HIGHEST_SCALE:
            raise InputError(f"scale must be a positive number in 2^-100..2^100, but got {self.scale}.")

    def rounded(self) -> Self:
        """Return the call on operands that are rounded as ``bf16`` says, in the dtype that they have."""
        if not self.bf16:
            return self
        hidden, items = (x.bfloat16().to(x.dtype) for x in (self.hidden, self.items))
        return replace(self, hidden=hidden, items=items, bf16=False)

    def check_values(self) -> None:
        """Raise :class:`InputError` unless all targets are items of the softmax; targets on a GPU are not read."""
        check_ids("target", self.target, int(self.skip_pad), self.items.shape[-2])


@dataclass(frozen=True)
class LogprobCall(SoftmaxCall):
    """The arguments of :func:`lares_fast.ops.target_logprob_and_rank`; with ``ties=None`` no rank is computed."""

    op: ClassVar[str] = "linear_cross_entropy"

    _: KW_ONLY
    ties: str | None = None
    ranked: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ties is not None:
            check_ties(self.ties)
        if self.ranked is not None:
            object.__setattr__(self, "ranked", whole("ranked", self.ranked))
            if not 0 <= self.ranked <= self.target.numel():
                raise InputError(f"ranked must be in 0..{self.target.numel()}, the number of rows, but got {self.ranked}.")

    def counted(self) -> int:
        """Return the number of rows that get a rank. They are the first ones."""
        if self.ties is None:
            return 0
        return self.target.numel() if self.ranked is None else self.ranked

    def rows(self) -> Self:
        """Return the call with hidden [M, D] and target [M], or the call itself if it has J catalogs."""
        if self.hidden.dim() == 2 or self.items.dim() == 3:
            return self
        return replace(self, hidden=self._flat_hidden(), target=self.target.reshape(-1))

    def _flat_hidden(self) -> Tensor:
        # With -1 for the number of rows, PyTorch could not tell it if D is 0.
        return self.hidden.reshape(self.target.numel(), self.hidden.shape[-1])

    def parts(self) -> Iterator[tuple[slice, Self]]:
        """Yield the calls of parts of the rows, and the place of each part among all rows.

        A part has one catalog, and either all of its rows get a rank or none.
        """
        hidden, target = self._flat_hidden(), self.target.reshape(-1)
        count, counted = len(target), self.counted()
        size = self.target.shape[-1] if self.items.dim() == 3 else count
        for start, end in pairwise(sorted({counted, *range(0, count + 1, max(1, size))})):
            items = self.items[start // size] if self.items.dim() == 3 else self.items
            ties = self.ties if start < counted else None
            rows = slice(start, end)
            yield rows, replace(self, hidden=hidden[rows], items=items, target=target[rows], ties=ties, ranked=None)


@dataclass(frozen=True)
class LogprobBackwardCall(SoftmaxCall):
    """The arguments of the gradients of ``target_logprob``, with hidden [M, D] and target [M], or with J catalogs.

    ``grad`` is the gradient of the log-probabilities, and ``lse`` is the log-sum-exp of the forward, in fp64. Both have the
    shape of ``target``. ``need_hidden`` and ``need_items`` say which gradients are computed.
    """

    op: ClassVar[str] = "linear_cross_entropy_backward"

    _: KW_ONLY
    grad: Tensor
    lse: Tensor
    need_hidden: bool
    need_items: bool

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_like(self.hidden, "hidden", "grad", self.grad, self.target.shape)
        if self.lse.dtype != torch.float64 or self.lse.shape != self.target.shape:
            raise InputError(f"lse must be torch.float64 {list(self.target.shape)}, but got {self.lse.dtype}.")

    def each(self) -> list[Self]:
        """Return a call for each catalog, with ``items`` [N, D]."""
        if self.items.dim() == 2:
            return [self]
        names = ("hidden", "items", "target", "grad", "lse")
        return [replace(self, **{name: getattr(self, name)[j] for name in names}) for j in range(len(self.items))]


def check_ties(ties: object) -> None:
    """Raise :class:`InputError` unless ``ties`` is one of ``TIES``."""
    choice("ties", ties, TIES)


def _check_like(model: Tensor, model_name: str, name: str, value: Tensor, shape: torch.Size) -> None:
    if value.dtype != model.dtype or value.device != model.device or value.shape != shape:
        raise InputError(
            f"{name} must be {model.dtype} {list(shape)} on {model.device} like {model_name}, "
            f"but got {value.dtype} {list(value.shape)} on {value.device}."
        )
