"""The items of a model as it scores them: the item table without PAD's row, and the shift of ids that follows from it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lares_fast import ops
from lares_fast._transfer import to_device
from lares_fast._watch import Watch
from lares_fast.ops._catalog_checks import check_exclude, checked_exclude
from lares_fast.reference.topk import Exclude
from lares_fast.sequences import PAD

_SHIFT = PAD + 1


class Catalog:
    """A view of an item table whose row 0 is PAD. Item id i has row i - 1 of :attr:`items`.

    The methods take and return item ids, so a caller never shifts them.
    """

    def __init__(self, table: Tensor) -> None:
        """Build the view of ``table`` [N, D], which holds the items as they are scored, with PAD's row."""
        self.items = table[_SHIFT:]

    def __len__(self) -> int:
        """Return the number of items, without PAD."""
        return len(self.items)

    def topk(
        self,
        queries: Tensor,
        k: int,
        *,
        exclude: Exclude | None = None,
        index: ops.CatalogIndex | None = None,
        backend: str | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return the scores [B, k] and the ids [B, k] (int64) of the best items for ``queries`` [B, D].

        The arguments and the errors are as in :func:`lares_fast.ops.topk`. An ``index`` must be built from :attr:`items`. Where
        fewer than ``k`` items are left, the id is -1. ``exclude`` holds item ids and may hold PAD, because padded histories do.
        Its lists may be on the CPU while the queries are on a GPU. Then their values are checked, and the CPU does not wait.
        """
        excluded_rows = None if exclude is None else self._excluded_rows(exclude, queries)
        scores, rows = ops.topk(queries, self.items, k, exclude=excluded_rows, index=index, backend=backend)
        return scores, torch.where(rows < 0, rows, rows + _SHIFT)

    def target_ranks(self, queries: Tensor, target: Tensor, exclude: Exclude) -> tuple[Tensor, Tensor]:
        """Return the ranks [B] (int64) of the items ``target`` [B] for ``queries`` [B, D], without and with ``exclude``.

        The arguments and the errors are as in :func:`lares_fast.ops.target_ranks`.
        """
        return ops.target_ranks(queries, self.items, target - _SHIFT, self._excluded_rows(exclude, queries))

    def _excluded_rows(self, exclude: Exclude, queries: Tensor) -> Exclude:
        """Check exclusion lists of item ids, and return them as lists of rows of :attr:`items`, without PAD.

        The result is on the device of ``queries``.
        """
        check_exclude(exclude, _at_lists(exclude, queries))
        offsets, ids = checked_exclude(*exclude, len(self.items) + _SHIFT)
        real = ids != PAD
        kept = torch.cat((real.new_zeros(1, dtype=torch.int64), real.cumsum(0)))
        # On a GPU a mask would make the CPU wait for the number of ids. There, every PAD moves behind the end of the last list.
        rows = ids[real if ids.device.type == "cpu" else real.logical_not().argsort(stable=True)] - _SHIFT
        return to_device(kept[offsets.clamp(0, len(ids))], queries.device), to_device(rows, queries.device)


def _at_lists(exclude: object, queries: Tensor) -> Tensor:
    """Return ``queries``, or an empty tensor with the same number of rows on the CPU if the lists ``exclude`` are there."""
    parts = exclude if isinstance(exclude, tuple | list) else ()
    there = [part.device.type for part in parts if isinstance(part, Tensor)]
    on_cpu = queries.device.type != "cpu" and there == ["cpu"] * len(parts)
    return torch.empty(len(queries), 0) if on_cpu else queries


class KeptTable:
    """A table that is computed from a weight, and kept while the weight is unchanged.

    On the CPU every call looks for changes in two ways. A :class:`Watch` notices changes that PyTorch makes. The product of
    every row with one random vector notices a write that bypasses PyTorch (``.data``, NumPy) to any row. Such a write goes
    unnoticed only if it is so small that the product rounds to its old value. On other devices the table is computed at every
    call: a comparison there would wait for the device, and the computation is cheap.
    """

    def __init__(self) -> None:
        self._kept: _Kept | None = None

    def table(self, weight: Tensor, compute: Callable[[Tensor], Tensor]) -> Tensor:
        """Return ``compute(weight)`` for ``weight`` [N, D] without gradients, or the equal table kept from an earlier call."""
        weight = weight.detach()
        if torch.compiler.is_compiling() or weight.device.type != "cpu" or weight.is_inference():
            return compute(weight)
        if self._kept is None or not self._kept.is_of(weight):
            # An inference tensor could not be used outside of inference mode later.
            with torch.inference_mode(False), torch.no_grad():
                self._kept = _Kept(weight, compute)
        return self._kept.table


class _Kept:
    """A table, and the data that show whether its weight has changed."""

    def __init__(self, weight: Tensor, compute: Callable[[Tensor], Tensor]) -> None:
        self._weight = weight
        self._vector = torch.rand(weight.shape[1], generator=torch.Generator().manual_seed(1)).to(weight) + 1
        # The table is computed last, so that a change during the computation is noticed.
        self._watch, self._products = Watch(weight), self._products_of(weight)
        self.table = compute(weight)

    def is_of(self, weight: Tensor) -> bool:
        """Return whether the table was computed from the present values of ``weight``."""
        return (
            _place(weight) == _place(self._weight)
            and self._watch.changed() is None
            and torch.equal(self._products_of(weight), self._products)
        )

    def _products_of(self, weight: Tensor) -> Tensor:
        # Autocast would round the operands of matmul, but not of mv. Bytes are compared, because a NaN does not equal itself.
        return torch.mv(weight, self._vector).view(torch.uint8)


def _place(tensor: Tensor) -> tuple[object, ...]:
    """Return values that differ between two tensors in different memory, or with different views of it."""
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype
