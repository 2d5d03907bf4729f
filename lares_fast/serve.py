"""Recommendations from a trained run: raw item ids in, raw item ids and scores out."""

from __future__ import annotations

import operator
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lares_fast import ops
from lares_fast._device import require_memory, resolve
from lares_fast._errors import InputError
from lares_fast._finite import NotFiniteError, largest, require_finite_scores, require_usable
from lares_fast._memory import allocating, enough_memory
from lares_fast._model_folder import read_item_ids, read_model
from lares_fast._numbers import choice, flag, is_masked, shown, whole
from lares_fast._settings import PRECISIONS
from lares_fast._torch_state import require_default_device, require_float32
from lares_fast._transfer import to_device, to_host
from lares_fast._weights import fits
from lares_fast.config import ITEMS, MODEL
from lares_fast.model import LARES
from lares_fast.ops._catalog_checks import native_obstacle
from lares_fast.sequences import PAD, Sequences

History = Iterable[Any]
# Python can be told to refuse the text of integers with more than 640 digits.
_MOST_BITS = 2048


@dataclass(frozen=True, eq=False)
class Recommendations:
    """The answers to U histories.

    ``ids``
        The raw item ids for each history, best first. A list has fewer than k ids if fewer items are left.
    ``scores``
        [U, k] fp32. The score is -inf where there is no item.
    ``unknown``
        The number of unknown items in all histories. The model does not know them, so they were left out.
    ``empty``
        The indices of the histories without a known item. Such a history gets no recommendations.
    """

    ids: list[list[Any]]
    scores: Tensor
    unknown: int
    empty: list[int]


class Recommender:
    """A model with the raw ids of its items.

    The answers are those of evaluation mode, whatever the mode of the model is, and the mode stays.

    The model computes on the device where it is. All results are on the CPU. On a GPU, the CPU waits once for the answers of a
    call, and not for each batch.

    The answer to a history depends neither on the batch size nor on the other histories, because every sequence starts from one
    fixed h0.
    """

    def __init__(self, model: LARES, item_ids: Sequence[Any]) -> None:
        """Take ``model`` and ``item_ids``: a placeholder for PAD, then the raw id of each item row.

        The ids are texts or integers, from any array library. The attribute :attr:`item_ids` leaves PAD out. Raises
        :class:`InputError` for anything else, for ids that occur twice, and for weights that are not fp32 or not finite.
        """
        if not isinstance(model, LARES):
            raise InputError(f"model must be a lares_fast.LARES, but got {shown(model)}.")
        if isinstance(item_ids, str | bytes) or not _can_be_read(item_ids) or not hasattr(item_ids, "__len__"):
            raise InputError(f"item_ids must be a list of raw ids, but got {shown(item_ids)}.")
        if len(item_ids) != model.config.n_items:
            raise InputError(
                f"item_ids must have {model.config.n_items} entries, one for each item row, but has {len(item_ids)}."
            )
        require_float32(model)
        self.model = model
        # Item id -> raw id. PAD has none.
        self._raw = {row: _raw_id(raw, f"item_ids[{row}]") for row, raw in enumerate(item_ids) if row != PAD}
        self.item_ids: list[Any] = list(self._raw.values())
        self._rows = {str(raw): row for row, raw in self._raw.items()}
        if len(self._rows) < len(self._raw):
            again = next(raw for row, raw in self._raw.items() if self._rows[str(raw)] != row)
            raise InputError(f"item_ids must be different from each other, but {again!r:.40} occurs twice.")
        require_usable(model, model.config.hidden_size)
        self._largest_item = largest([model.catalog().items])

    def knows(self, item: Any) -> bool:
        """Return whether the raw id ``item`` is in the catalog. ``"42"``, 42 and 42.0 are one id.

        Raises :class:`InputError` for anything that cannot be a raw id.
        """
        return str(_raw_id(item, "item")) in self._rows

    @torch.no_grad()
    def recommend(
        self,
        histories: Iterable[History],
        k: int = 10,
        *,
        exclude_seen: bool = True,
        num_steps: int | None = None,
        batch_size: int = 256,
    ) -> Recommendations:
        """Return the ``k`` best items for each of ``histories``.

        A history holds raw ids, oldest first. It is a sequence of texts and whole numbers, or a 1-D array or tensor of them.
        The model reads its last ``max_len`` known items. Unknown ids are left out and counted. ``exclude_seen`` leaves every
        item of the history out of the answer. ``num_steps`` is T; the default is the T of the configuration. The model
        encodes ``batch_size`` histories at a time.

        Raises :class:`InputError` for a ``k`` beyond the catalog, for anything that cannot be a raw id, and for scores that
        are not finite. It also raises it if the memory of a GPU is not enough for ``batch_size``. A GPU keeps the answers of
        a call, 12 k bytes for each history, until the end of the call.
        """
        k, num_steps, batch_size = whole("k", k), _steps(num_steps), whole("batch_size", batch_size)
        exclude_seen = flag("exclude_seen", exclude_seen)
        if not 1 <= k <= len(self.item_ids):
            raise InputError(f"k must be in 1..{len(self.item_ids)}, the number of items, but got {k}.")
        known, unknown = self._known(histories)
        scores = torch.full((len(known), k), -torch.inf, dtype=torch.float32)
        ids: list[list[Any]] = [[] for _ in known]
        order, answers, largest_queries = list[int](), list[tuple[Tensor, Tensor]](), list[Tensor]()
        with _enough_memory(batch_size):
            model, catalog = self.model.in_evaluation(), self.model.catalog()
            catalog_index = _index(catalog.items) if sum(map(bool, known)) > batch_size else None
            for index, sequences in self._batches(known, batch_size):
                seen = _packed([known[i] for i in index])
                exclude = (seen.offsets, seen.items) if exclude_seen else None
                queries = _queries(model, sequences, num_steps)
                largest_queries.append(queries.abs().amax())
                answers.append(catalog.topk(queries, k, exclude=exclude, index=catalog_index))
                order += index
            if order:
                self._require_finite(largest_queries)
                found, best = (to_host(torch.cat(part)) for part in zip(*answers, strict=True))
                if not found[best >= 0].isfinite().all():
                    raise NotFiniteError(
                        "the scores of the model are not finite: its weights were changed, so build the Recommender again."
                    )
                scores[order] = found
                for i, row in zip(order, best.tolist(), strict=True):
                    ids[i] = [self._raw[item] for item in row if item >= 0]
        return Recommendations(ids, scores, unknown, [i for i, items in enumerate(known) if not items])

    @torch.no_grad()
    def encode(self, histories: Iterable[History], *, num_steps: int | None = None, batch_size: int = 256) -> Tensor:
        """Return the queries [U, D] (fp32) of U histories. Their dot products with :meth:`item_vectors` are the scores.

        The arguments are as in :meth:`recommend`.

        Raises :class:`InputError` if a history has no known item, and the errors of :meth:`recommend`.
        """
        num_steps, batch_size = _steps(num_steps), whole("batch_size", batch_size)
        known, _ = self._known(histories)
        if empty := [i for i, items in enumerate(known) if not items]:
            raise InputError(f"history {empty[0]} holds no item that the model knows.")
        queries = torch.empty(len(known), self.model.config.hidden_size, dtype=torch.float32)
        order, found = list[int](), list[Tensor]()
        with _enough_memory(batch_size):
            model = self.model.in_evaluation()
            for index, sequences in self._batches(known, batch_size):
                found.append(_queries(model, sequences, num_steps))
                order += index
            if order:
                self._require_finite([part.abs().amax() for part in found])
                queries[order] = to_host(torch.cat(found))
        return queries

    def item_vectors(self) -> Tensor:
        """Return the vectors [number of items, D] in the order of :attr:`item_ids`, for an index of nearest neighbours."""
        items = self.model.catalog().items
        return items.clone() if items.device.type == "cpu" else to_host(items)

    def _require_finite(self, largest_queries: list[Tensor]) -> None:
        """Raise :class:`InputError` if a score could be infinite or NaN. ``largest_queries`` has a number for each batch."""
        require_finite_scores(largest([torch.stack(largest_queries)]), self._largest_item, self.model.config.hidden_size)

    def _known(self, histories: Iterable[History]) -> tuple[list[list[int]], int]:
        """Return the item ids of each history, and the number of unknown items."""
        if isinstance(histories, str | bytes | Mapping | Set) or not _can_be_read(histories):
            raise InputError(f"histories must be a list of histories, but are {shown(histories)}.")
        known, unknown = [], 0
        for number, history in enumerate(histories):
            rows = [self._rows.get(str(raw), PAD) for raw in _raw_ids(history, f"history {number}")]
            known.append([row for row in rows if row != PAD])
            unknown += len(rows) - len(known[-1])
        return known, unknown

    def _batches(self, known: list[list[int]], batch_size: int) -> Iterator[tuple[list[int], Sequences]]:
        """Yield the indices and the cut sequences of the histories that are not empty, in order of length."""
        if batch_size < 1:
            raise InputError(f"batch_size must be at least 1, but got {batch_size}.")
        require_default_device()
        longest = self.model.config.max_len
        order = sorted((i for i, items in enumerate(known) if items), key=lambda i: min(len(known[i]), longest))
        for start in range(0, len(order), batch_size):
            index = order[start : start + batch_size]
            yield index, _packed([known[i][-longest:] for i in index])


def _queries(model: LARES, sequences: Sequences, num_steps: int | None) -> Tensor:
    """Return the queries [B, D] on the device of the model."""
    items = to_device(sequences.items, model.item_embedding.weight.device)
    return model.queries(model.encode(items, sequences.offsets, num_steps=num_steps))


def _packed(lists: list[list[int]]) -> Sequences:
    return Sequences(torch.tensor(list(chain.from_iterable(lists))), torch.tensor([0, *map(len, lists)]).cumsum(0))


def _index(items: Tensor) -> ops.CatalogIndex | None:
    """Return an index for a catalog that is scored more than once, or ``None`` if no kernel can read one."""
    return None if native_obstacle(items, items) or items.is_inference() else ops.CatalogIndex(items)


def _enough_memory(batch_size: int) -> AbstractContextManager[None]:
    return enough_memory(batch_size, setting="batch_size")


def save(model: LARES, item_ids: Sequence[Any], folder: str | Path) -> None:
    """Write ``model``, trained anywhere, and ``item_ids`` into ``folder``, so that :func:`load` and the command line take it.

    ``item_ids`` are as in :class:`Recommender`: a placeholder for PAD, then the raw id of each item row. Raises the errors of
    :class:`Recommender`, and :class:`InputError` if a file cannot be written.
    """
    ids = Recommender(model, item_ids).item_ids
    model.save_pretrained(folder, item_ids=[0 if isinstance(ids[0], int) else "", *ids])


def load(run: str | Path, device: str | torch.device = "auto", *, precision: str = "fp32") -> Recommender:
    """Return a recommender with the model in the folder ``run``.

    A run wrote the folder, on any device, and it holds the run's best model; or :func:`save` wrote it.


    ``device`` is ``cpu``, ``cuda``, ``cuda:N``, or ``auto``: the first GPU whose kernels pass their self-test, else the CPU. A
    backend that is requested by name, such as ``LARES_FAST_BACKEND=reference``, takes the place of the kernels.
    ``precision`` is ``fp32``, or ``bf16`` to round the operands of products with weights while the model encodes, see
    :class:`LARES`. Scores are always fp32.

    Raises :class:`InputError` if a file is missing, is damaged, was written by another program, or does not fit the others.
    It also raises it for an unknown device or precision, and for a GPU that is missing, cannot be used, or has too little
    memory.
    """
    return load_about(run, device, precision)[0]


def load_about(
    run: str | Path, device: str | torch.device = "auto", precision: str = "fp32"
) -> tuple[Recommender, dict[str, str]]:
    """Return the recommender of :func:`load`, and the metadata of the log that the model was trained on.

    ``lares_fast.train.identity`` describes the metadata, which are empty for a file of an older version. Raises the errors of
    :func:`load`.
    """
    if not isinstance(run, str | os.PathLike):
        raise InputError(f"run must be the path of a folder, but got {shown(run)}.")
    choice("precision", precision, PRECISIONS)
    with allocating(f"the model in {run}", "end other programs, or train a smaller model"):
        return _load(Path(run), device, precision)


def _load(run: Path, device: str | torch.device, precision: str) -> tuple[Recommender, dict[str, str]]:
    weights, config, about = read_model(run)
    if not fits(weights, config):
        raise InputError(f"{run / MODEL} does not fit its own configuration: train again.")
    size = sum(value.nbytes for value in weights.values())
    require_memory(torch.device("cpu"), size, "the model")
    # A program may have chosen another default device or dtype.
    with torch.device("cpu"):
        model = LARES(config, bf16=precision == "bf16").float()
    model.load_state_dict(weights)
    path = run / ITEMS
    item_ids = read_item_ids(run, about, config.n_items)
    device = resolve(device)
    if device.type != "cpu":
        require_memory(device, size, "the model")
    try:
        return Recommender(model.eval().to(device), item_ids), about
    except NotFiniteError:
        raise NotFiniteError(f"{run / MODEL} holds weights too large to score with: train with a lower lr.") from None
    except InputError as error:
        raise InputError(f"{path} holds ids that cannot be used: {error}") from None


def _can_be_read(values: Any) -> bool:
    """Return whether ``values`` can be iterated. An array without dimensions looks iterable, but raises an error."""
    if isinstance(values, Tensor) and (values.layout != torch.strided or values.is_meta):
        return False
    return isinstance(values, Iterable) and getattr(values, "ndim", 1) != 0


def _raw_ids(history: Any, where: str) -> Iterator[int | str]:
    """Yield the raw ids of one history."""
    if isinstance(history, str | bytes):
        raise InputError(f"{where} must be a sequence of raw item ids, but is the text {history!r:.40}.")
    if isinstance(history, Mapping | Set) or not _can_be_read(history) or getattr(history, "ndim", 1) != 1:
        raise InputError(f"{where} must be a sequence of raw item ids, but is {shown(history)}.")
    for place, raw in enumerate(history):
        plain = type(raw) is str or (type(raw) is int and raw.bit_length() <= _MOST_BITS)
        yield raw if plain else _raw_id(raw, f"item {place} of {where}")


def _raw_id(raw: Any, where: str) -> int | str:
    """Return ``raw`` as an integer or text. Raises :class:`InputError` unless it is text or a whole number of any library."""
    value = raw
    if hasattr(raw, "ndim"):
        try:
            # item() would turn a time of NumPy into an integer.
            value = None if raw.ndim or is_masked(raw) or isinstance(raw, np.datetime64 | np.timedelta64) else raw.item()
            if isinstance(raw, Tensor) and raw.is_quantized:
                value = None
        except (RuntimeError, ValueError):
            value = None
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, float) and value.is_integer() and abs(value) <= _exact_below(raw):
        return int(value)
    if not isinstance(value, bool):
        try:
            if (found := operator.index(value)).bit_length() <= _MOST_BITS:
                return found
        except TypeError:
            pass
    raise InputError(f"{where} must be a raw id, which is text or a whole number, but is {shown(raw)}.")


def _exact_below(number: Any) -> float:
    """Return the bound up to which the floating-point type of ``number`` holds every integer. Beyond it, ids may be rounded."""
    if isinstance(number, Tensor):
        return 2 / torch.finfo(number.dtype).eps
    return 2 / float(np.finfo(getattr(number, "dtype", np.float64)).eps)


def _steps(num_steps: Any) -> int | None:
    return None if num_steps is None else whole("num_steps", num_steps)
