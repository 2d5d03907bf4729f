"""A catalog prepared once for many calls of ``topk``."""

from __future__ import annotations

import functools
import weakref
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from lares_fast import _native
from lares_fast._errors import InputError
from lares_fast.ops._catalog_checks import check_dense

# Rows that every call compares with what the index was built from.
_SAMPLED = 256

# All that are alive.
_indexes: weakref.WeakSet[CatalogIndex] = weakref.WeakSet()


class CatalogIndex:
    """``items`` [N, D] laid out for the native kernel: ``topk(query, items, k, index=index)`` gives the same answer sooner.

    Holds a transposed copy and, where the SIMD level is AVX2 or above and N >= 32,768 and D <= 512, int8 tables that prove
    of most items that they cannot be among the best: about 1.3 times the memory of ``items``.

    An index is of the values that ``items`` had when it was built, and ``topk`` refuses a stale one. It notices an in-place
    operation of PyTorch, a step of a ``torch.optim`` optimizer that holds ``items``, and any other change of one of the 256
    or more rows, at equal distances, that it compares at every call. A write past PyTorch (``.data``, NumPy, another
    process) that leaves all of those rows as they were goes unseen: call :meth:`refresh` after one.

    Raises:
        InputError: ``items`` is not a contiguous fp32 [N, D] on the CPU, or is an inference tensor.
        NotBuiltError: there is no native module.
    """

    def __init__(self, items: Tensor) -> None:
        check_dense("items", items)
        fits = items.dim() == 2 and items.dtype == torch.float32 and items.device.type == "cpu" and items.is_contiguous()
        if not fits or items.is_inference():
            kind = "an inference tensor" if items.is_inference() else f"{items.dtype} {list(items.shape)} on {items.device}"
            raise InputError(f"items must be a contiguous torch.float32 [N, D] on the CPU that tracks changes, but got {kind}.")
        # Held, so that no other tensor can come to stand at the same address.
        self._items = items.detach()
        self.refresh()
        _watch_optimizers()
        _indexes.add(self)

    def refresh(self) -> None:
        """Build the index again, of the values that ``items`` has now."""
        # Before the tables: a change meanwhile is then noticed.
        self._version, self._stepped, self._sample = self._items._version, False, self._sampled().clone()
        self._tables = _native.build_index(self._items)

    def __repr__(self) -> str:
        screened = "int8 screening" if self._tables[3].numel() else "panels only"
        return f"CatalogIndex({list(self._items.shape)}, {screened}, {self.nbytes / 2**20:.0f} MiB)"

    @property
    def nbytes(self) -> int:
        """Bytes of the tables, ``items`` itself not counted."""
        return sum(table.nbytes for table in self._tables)

    def tables(self, items: Tensor) -> list[Tensor]:
        """What the kernel reads, if ``items`` is what this index was built from; else :class:`InputError`."""
        if items.is_inference() or (items.data_ptr(), items.shape, items.stride()) != (
            self._items.data_ptr(),
            self._items.shape,
            self._items.stride(),
        ):
            raise InputError("index was built from another tensor than items: build CatalogIndex(items) again.")
        # Bit by bit: a NaN is equal to itself here.
        same = torch.equal(self._sampled().view(torch.int32), self._sample.view(torch.int32))
        if items._version != self._version or self._stepped or not same:
            raise InputError("index is stale, because items changed after it was built: call index.refresh().")
        return self._tables

    def _sampled(self) -> Tensor:
        """Up to 512 rows at equal distances from the first one on."""
        return self._items[:: max(1, len(self._items) // _SAMPLED)]

    def _overlaps(self, tensor: Tensor) -> bool:
        return tensor.device.type == "cpu" and tensor.untyped_storage().data_ptr() == self._items.untyped_storage().data_ptr()


@functools.cache
def _watch_optimizers() -> None:
    """Have every optimizer's step tell the indexes of its parameters: a fused step leaves their version as it was."""
    register_optimizer_step_post_hook(_after_step)


def _after_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    for index in _indexes:
        index._stepped |= any(index._overlaps(p) for group in optimizer.param_groups for p in group["params"])
