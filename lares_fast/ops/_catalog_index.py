"""A catalog prepared once for many calls of ``topk``."""

from __future__ import annotations

import torch
from torch import Tensor

from lares_fast import _native
from lares_fast._errors import InputError
from lares_fast.ops._catalog_checks import check_dense


class CatalogIndex:
    """``items`` [N, D] laid out for the native kernel: ``topk(query, items, k, index=index)`` gives the same answer sooner.

    Holds a transposed copy and, where the SIMD level is AVX2 or above and N >= 32,768 and D <= 512, int8 tables that prove
    of most items that they cannot be among the best: about 1.3 times the memory of ``items``. An index is of the values that
    ``items`` had: after an in-place change ``topk`` refuses it. A change through ``.data`` or NumPy goes unseen.

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
        self._version = items._version
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
        if items._version != self._version:
            raise InputError("index is stale, because items changed after it was built: build CatalogIndex(items) again.")
        return self._tables
