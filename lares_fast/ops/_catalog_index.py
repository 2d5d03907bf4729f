"""``CatalogIndex``: a catalog that is prepared once for many calls of ``topk``."""

from __future__ import annotations

import torch
from torch import Tensor

from lares_fast import _native
from lares_fast._errors import InputError
from lares_fast._native_call import call_native, thread_count
from lares_fast._numbers import check_dense
from lares_fast._watch import Watch
from lares_fast.ops._catalog_calls import IndexTables


class CatalogIndex:
    """An index of ``items`` [N, D] for the native kernel: ``topk(query, items, k, index=index)`` gives the same answer faster.

    The index holds a transposed copy. It also holds int8 tables if the SIMD level is AVX2 or higher, N >= 32,768 and D <= 512.
    For most items these tables prove that the item cannot be among the best. The index takes about 1.3 times the memory of
    ``items``.

    An index belongs to the values that ``items`` had when it was built, and ``topk`` raises an error for a stale index. It
    notices an in-place operation of PyTorch, a step of a ``torch.optim`` optimizer that holds ``items``, and any other change
    of one of the rows that it compares in every call: at least 256 rows at equal distances, or all rows of a smaller table. A
    write that bypasses PyTorch (``.data``, NumPy, another process) and changes none of these rows is not noticed: call
    :meth:`refresh` after one.

    Raises:
        InputError: ``items`` is not a contiguous fp32 [N, D] on the CPU, or it is an inference tensor.
        NotBuiltError: there is no native module.
    """

    def __init__(self, items: Tensor) -> None:
        check_dense("items", items)
        fits = items.dim() == 2 and items.dtype == torch.float32 and items.device.type == "cpu" and items.is_contiguous()
        if not fits or items.is_inference() or items.is_neg():
            kind = "an inference tensor" if items.is_inference() else f"{items.dtype} {list(items.shape)} on {items.device}"
            kind = "a negated view" if items.is_neg() else kind
            raise InputError(f"items must be a contiguous torch.float32 [N, D] on the CPU that tracks changes, but got {kind}.")
        # The index keeps the tensor, so that no other tensor can be allocated at its address.
        self._items = items.detach()
        self.refresh()

    def refresh(self) -> None:
        """Build the index again from the values that ``items`` has now."""
        # The watch comes first, so that it notices a change while the tables are built.
        self._watch = Watch(self._items)
        self._tables = build_index(self._items)

    def __repr__(self) -> str:
        screened = "int8 screening" if self._tables.codes.numel() else "panels only"
        return f"CatalogIndex({list(self._items.shape)}, {screened}, {self.nbytes / 2**20:.0f} MiB)"

    @property
    def nbytes(self) -> int:
        """The size of the tables in bytes, without ``items`` itself."""
        return sum(table.nbytes for table in self._tables)

    def tables(self, items: Tensor) -> IndexTables:
        """Return the tables that the kernel reads.

        Raises :class:`InputError` if ``items`` is not the tensor from which the index was built, or if it has changed since.
        """
        ours = self._items
        same = (items.data_ptr(), items.shape, items.stride()) == (ours.data_ptr(), ours.shape, ours.stride())
        if items.is_inference() or not same:
            raise InputError("index was built from another tensor than items: build CatalogIndex(items) again.")
        # An alias made by .data has a version counter of its own.
        if items._version != ours._version or self._watch.changed():
            raise InputError("index is stale, because items changed after it was built: call index.refresh().")
        return self._tables


def build_index(items: Tensor, threads: int | None = None) -> IndexTables:
    """Return the tables of ``items``, a contiguous fp32 [N, D] on the CPU. csrc/topk/index.h describes them."""
    count, width = items.shape
    panel, panels, coded_panel, coded_panels, code_bytes, lane_bytes = _native.load().index_shape(N=count, D=width)
    centre, scale = _centre_and_scale(items) if coded_panels else (items.new_zeros(width), items.new_ones(width))
    tables = IndexTables(
        centre,
        scale,
        panels=items.new_empty(panels, width, panel),
        codes=items.new_empty((coded_panels, code_bytes, coded_panel), dtype=torch.int8),
        start=items.new_empty((coded_panels, coded_panel), dtype=torch.int16 if lane_bytes == 2 else torch.int32),
        bounds=items.new_empty(coded_panels, 4),
    )
    call_native("build_index", items=items, N=count, D=width, threads=thread_count(threads), **tables._asdict())
    return tables


def _centre_and_scale(items: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean [D], and for each dimension a power of two [D] near the spread around the mean.

    The answers of ``topk`` are equal for every finite centre and every power of two. These values make the bounds tight,
    because each dimension then uses the whole range of the codes.
    """
    centre = items.mean(dim=0)
    centre = torch.where(centre.isfinite(), centre, 0.0)
    spread = (items[:: max(1, len(items) // 16384)] - centre).std(dim=0)
    exponent = spread.log2().nan_to_num(nan=0.0, posinf=0.0, neginf=0.0).round().clamp(-12, 12)
    return centre, exponent.exp2()
