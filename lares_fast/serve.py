"""Serving a trained run: raw item ids in, raw item ids and scores out."""

from __future__ import annotations

import json
import operator
import os
import reprlib
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lares_fast import ops
from lares_fast._errors import InputError
from lares_fast._numbers import whole
from lares_fast.model import LARES
from lares_fast.ops._catalog_checks import native_obstacle
from lares_fast.train.checkpoint import fits, load_weights_about, sha256
from lares_fast.train.finite import NotFiniteError, largest, require_finite_scores, require_usable

History = Iterable[Any]


@dataclass(frozen=True, eq=False)
class Recommendations:
    """Answers to U histories.

    ``ids``
        For each history its raw item ids, best first; fewer than k where the catalog has no more to offer.
    ``scores``
        [U, k] fp32, -inf where there is no item.
    ``unknown``
        How many items of the histories the model does not know; they were left out.
    ``empty``
        The histories of which nothing was left: they get no recommendation.
    """

    ids: list[list[Any]]
    scores: Tensor
    unknown: int
    empty: list[int]


class Recommender:
    """A model in evaluation with its raw item ids.

    Answers do not depend on the batch size nor on the other histories: every sequence starts from the same fixed h0.
    """

    def __init__(self, model: LARES, item_ids: Sequence[Any]) -> None:
        """``item_ids`` are the raw ids of the model's item rows, :attr:`item_ids` behind an entry for PAD.

        They are texts or integers, of any array library. Raises :class:`InputError` for anything else, for ids that occur
        twice, and for a model whose weights are not finite.
        """
        if len(item_ids) != model.config.n_items:
            raise InputError(f"item_ids must be {model.config.n_items} ids, PAD's included, but are {len(item_ids)}.")
        self.model = model.eval()
        self.item_ids: list[Any] = [_raw_id(raw, f"item_ids[{row}]") for row, raw in enumerate(item_ids[1:], start=1)]
        self._rows = {str(raw): row for row, raw in enumerate(self.item_ids, start=1)}
        if len(self._rows) < len(self.item_ids):
            again = next(raw for row, raw in enumerate(self.item_ids, start=1) if self._rows[str(raw)] != row)
            raise InputError(f"item_ids must be different from each other, but {again!r:.40} occurs twice.")
        require_usable(model, model.config.hidden_size)
        with torch.no_grad():
            self._largest_item = largest([self._items()])

    def knows(self, item: Any) -> bool:
        """Whether the raw id ``item`` is in the catalog; ``"42"``, 42 and 42.0 are the same. Raises as :meth:`recommend`."""
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
        """The ``k`` best items after each of ``histories``, raw ids oldest first.

        The model reads the last ``max_len`` known items; ``exclude_seen`` keeps all items of the history out. Unknown
        ids are left out and counted. ``num_steps`` is T. A history is a sequence of texts and whole numbers, or a 1-D array
        or tensor of them. Raises :class:`InputError` for a ``k`` beyond the catalog, for what can be no raw id, and for
        scores that are not finite.
        """
        k, num_steps, batch_size = whole("k", k), _steps(num_steps), whole("batch_size", batch_size)
        if not 1 <= k <= len(self.item_ids):
            raise InputError(f"k must be in 1..{len(self.item_ids)}, the number of items, but got {k}.")
        known, unknown = self._known(histories)
        scores = torch.full((len(known), k), -torch.inf)
        ids: list[list[Any]] = [[] for _ in known]
        items = self._items()
        catalog = _index(items) if sum(map(bool, known)) > batch_size else None
        for index, *sequences in self._batches(known, batch_size):
            exclude = None
            if exclude_seen:
                seen = [torch.tensor(known[i]) - 1 for i in index]
                offsets = torch.tensor([0, *map(len, seen)]).cumsum(0)
                exclude = (offsets, torch.cat(seen))
            scores[index], best = ops.topk(self._queries(sequences, num_steps), items, k, exclude=exclude, index=catalog)
            if not scores[index][best >= 0].isfinite().all():
                raise NotFiniteError(
                    "the scores of the model are not finite: its weights were changed; build the Recommender anew."
                )
            for i, found in zip(index, best.tolist(), strict=True):
                ids[i] = [self.item_ids[item] for item in found if item >= 0]
        return Recommendations(ids, scores, unknown, [i for i, items in enumerate(known) if not items])

    @torch.no_grad()
    def encode(self, histories: Iterable[History], *, num_steps: int | None = None, batch_size: int = 256) -> Tensor:
        """Queries [U, D] whose dot products with :meth:`item_vectors` are the scores.

        Raises :class:`InputError` if nothing of a history is known, and as :meth:`recommend`.
        """
        num_steps, batch_size = _steps(num_steps), whole("batch_size", batch_size)
        known, _ = self._known(histories)
        if empty := [i for i, items in enumerate(known) if not items]:
            raise InputError(f"history {empty[0]} holds no item that the model knows.")
        queries = torch.empty(len(known), self.model.config.hidden_size)
        for index, *sequences in self._batches(known, batch_size):
            queries[index] = self._queries(sequences, num_steps)
        return queries

    @torch.no_grad()
    def item_vectors(self) -> Tensor:
        """[number of items, D], in the order of :attr:`item_ids`: what an index of nearest neighbours needs."""
        return self._items().clone()

    def _queries(self, sequences: Sequence[Tensor], num_steps: int | None) -> Tensor:
        """[B, D]; raises :class:`InputError` if a score could be infinite or NaN."""
        query, _ = self.model.query_and_items(self.model.encode(sequences[0], sequences[1], num_steps=num_steps))
        require_finite_scores(largest([query]), self._largest_item, query.shape[1])
        return query

    def _items(self) -> Tensor:
        width = self.model.config.hidden_size
        return self.model.query_and_items(torch.zeros(1, width))[1][1:]

    def _known(self, histories: Iterable[History]) -> tuple[list[list[int]], int]:
        """The item rows of each history, and how many items were unknown."""
        if isinstance(histories, str | bytes | Mapping | Set) or not _can_be_read(histories):
            raise InputError(f"histories must be a list of histories, but are {reprlib.repr(histories)}.")
        known, unknown = [], 0
        for number, history in enumerate(histories):
            rows = [self._rows.get(str(raw), 0) for raw in _raw_ids(history, f"history {number}")]
            known.append([row for row in rows if row])
            unknown += len(rows) - len(known[-1])
        return known, unknown

    def _batches(self, known: list[list[int]], batch_size: int) -> Iterator[tuple[list[int], Tensor, Tensor]]:
        """(indices, items [P], offsets [B + 1]) of the histories that hold something, in order of length."""
        if batch_size < 1:
            raise InputError(f"batch_size must be at least 1, but got {batch_size}.")
        longest = self.model.config.max_len
        order = sorted((i for i, items in enumerate(known) if items), key=lambda i: min(len(known[i]), longest))
        for start in range(0, len(order), batch_size):
            index = order[start : start + batch_size]
            cut = [torch.tensor(known[i][-longest:]) for i in index]
            yield index, torch.cat(cut), torch.tensor([0, *map(len, cut)]).cumsum(0)


def _index(items: Tensor) -> ops.CatalogIndex | None:
    """For a catalog that is scored more than once, where the kernel that reads an index runs."""
    return None if native_obstacle(items, items) or items.is_inference() else ops.CatalogIndex(items)


def load(run: str | Path) -> Recommender:
    """The best model of the folder ``run`` that ``lares-fast train`` wrote.

    Raises :class:`InputError` if its files are missing, damaged, of another program, or do not fit each other.
    """
    return load_about(run)[0]


def load_about(run: str | Path) -> tuple[Recommender, dict[str, str]]:
    """As :func:`load`, with what the model says of its log: see ``lares_fast.train.identity``; empty for an older file."""
    run = Path(run)
    weights, config, about = load_weights_about(run / "model.safetensors")
    if not fits(weights, config):
        raise InputError(f"{run / 'model.safetensors'} does not fit its own configuration: train again.")
    model = LARES(config)
    model.load_state_dict(weights)
    path = run / "item_ids.json"
    item_ids = _item_ids(path, about.get("item_ids"))
    if len(item_ids) != config.n_items:
        raise InputError(f"{path} does not list the {config.n_items} item rows of model.safetensors: it is of another run.")
    try:
        return Recommender(model, item_ids), about
    except NotFiniteError:
        raise NotFiniteError(
            f"{run / 'model.safetensors'} holds weights too large to score with: train with a lower lr."
        ) from None
    except InputError as error:
        raise InputError(f"{path} holds ids that cannot be used: {error}") from None


def _item_ids(path: Path, checksum: str | None) -> list[Any]:
    if os.path.exists(path) and not os.path.isfile(path):
        raise InputError(f"{path} is no file: the list of item ids belongs there.")
    try:
        data = path.read_bytes()
        if checksum is not None and sha256(data) != checksum:
            raise InputError(
                f"{path} is damaged or of another run (model.safetensors has another checksum for it): "
                f"lares-fast train --resume {path.parent} writes it again."
            )
        item_ids = json.loads(data)
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}): it belongs beside model.safetensors.") from None
    except (ValueError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} is not the JSON list that training wrote: it is truncated or of another program.") from None
    if not isinstance(item_ids, list):
        raise InputError(f"{path} is not the JSON list that training wrote: it is of another program.")
    return item_ids


def _can_be_read(values: Any) -> bool:
    """Whether ``values`` can be gone through; arrays of no dimension have an iterator that raises."""
    return isinstance(values, Iterable) and getattr(values, "ndim", 1) != 0


def _raw_ids(history: Any, where: str) -> Iterator[int | str]:
    """The raw ids of one history."""
    if isinstance(history, str | bytes):
        raise InputError(f"{where} must be a sequence of raw item ids, but is the text {history!r:.40}.")
    if isinstance(history, Mapping | Set) or not _can_be_read(history) or getattr(history, "ndim", 1) != 1:
        raise InputError(f"{where} must be a sequence of raw item ids, but is {reprlib.repr(history)}.")
    for place, raw in enumerate(history):
        yield raw if type(raw) is str or type(raw) is int else _raw_id(raw, f"item {place} of {where}")


def _raw_id(raw: Any, where: str) -> int | str:
    """``raw`` as an integer or text; :class:`InputError` unless it is one, or a whole number of any array library."""
    value = raw
    if hasattr(raw, "ndim"):
        try:
            # Times of numpy, too, become integers.
            value = None if raw.ndim or isinstance(raw, np.datetime64 | np.timedelta64) else raw.item()
        except (RuntimeError, ValueError):
            value = None
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, float) and value.is_integer() and abs(value) <= _exact_below(raw):
        return int(value)
    if not isinstance(value, bool):
        try:
            return operator.index(value)
        except TypeError:
            pass
    raise InputError(f"{where} must be a raw id, which is text or a whole number, but is {reprlib.repr(raw)}.")


def _exact_below(number: Any) -> float:
    """Up to where the floating-point type of ``number`` holds every integer: beyond, it may have been rounded."""
    if isinstance(number, Tensor):
        return 2 / torch.finfo(number.dtype).eps
    return 2 / float(np.finfo(getattr(number, "dtype", np.float64)).eps)


def _steps(num_steps: Any) -> int | None:
    return None if num_steps is None else whole("num_steps", num_steps)
