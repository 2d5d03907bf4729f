"""Serving a trained run: raw item ids in, raw item ids and scores out."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lares_fast import ops
from lares_fast._errors import InputError
from lares_fast.model import LARES
from lares_fast.ops._catalog_checks import native_obstacle
from lares_fast.train.checkpoint import load_weights

History = Sequence[Any]


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
        """``item_ids`` are the raw ids of the model's item rows, :attr:`item_ids` behind an entry for PAD."""
        if len(item_ids) != model.config.n_items:
            raise InputError(f"item_ids must be {model.config.n_items} ids, PAD's included, but are {len(item_ids)}.")
        self.model = model.eval()
        self.item_ids: list[Any] = list(item_ids[1:])

    @cached_property
    def _rows(self) -> dict[str, int]:
        return {str(raw): row for row, raw in enumerate(self.item_ids, start=1)}

    def knows(self, item: Any) -> bool:
        """Whether the raw id ``item`` is in the catalog; ``"42"`` finds 42."""
        return str(item) in self._rows

    @torch.no_grad()
    def recommend(
        self,
        histories: Sequence[History],
        k: int = 10,
        *,
        exclude_seen: bool = True,
        num_steps: int | None = None,
        batch_size: int = 256,
    ) -> Recommendations:
        """The ``k`` best items after each of ``histories``, raw ids oldest first.

        The model reads the last ``max_len`` known items; ``exclude_seen`` keeps all items of the history out. Unknown
        ids are left out and counted. ``num_steps`` is T. Raises :class:`InputError` for a ``k`` beyond the catalog.
        """
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
            query, _ = self.model.query_and_items(self.model.encode(*sequences, num_steps=num_steps))
            scores[index], best = ops.topk(query, items, k, exclude=exclude, index=catalog)
            for i, found in zip(index, best.tolist(), strict=True):
                ids[i] = [self.item_ids[item] for item in found if item >= 0]
        return Recommendations(ids, scores, unknown, [i for i, items in enumerate(known) if not items])

    @torch.no_grad()
    def encode(self, histories: Sequence[History], *, num_steps: int | None = None, batch_size: int = 256) -> Tensor:
        """Queries [U, D] whose dot products with :meth:`item_vectors` are the scores.

        Raises :class:`InputError` if nothing of a history is known.
        """
        known, _ = self._known(histories)
        if empty := [i for i, items in enumerate(known) if not items]:
            raise InputError(f"history {empty[0]} holds no item that the model knows.")
        queries = torch.empty(len(known), self.model.config.hidden_size)
        for index, *sequences in self._batches(known, batch_size):
            hidden = self.model.encode(*sequences, num_steps=num_steps)
            queries[index] = self.model.query_and_items(hidden)[0]
        return queries

    @torch.no_grad()
    def item_vectors(self) -> Tensor:
        """[number of items, D], in the order of :attr:`item_ids`: what an index of nearest neighbours needs."""
        return self._items().clone()

    def _items(self) -> Tensor:
        width = self.model.config.hidden_size
        return self.model.query_and_items(torch.zeros(1, width))[1][1:]

    def _known(self, histories: Sequence[History]) -> tuple[list[list[int]], int]:
        """The item rows of each history, and how many items were unknown."""
        known, unknown = [], 0
        for number, history in enumerate(histories):
            if isinstance(history, str | bytes):
                raise InputError(f"history {number} must be a sequence of raw item ids, but is the text {history!r}.")
            rows = [self._rows.get(str(raw), 0) for raw in history]
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

    Raises :class:`InputError` if its files are missing, truncated, of another program, or do not fit each other.
    """
    run = Path(run)
    weights, config = load_weights(run / "model.safetensors")
    model = LARES(config)
    try:
        model.load_state_dict(weights)
    except RuntimeError:
        raise InputError(f"{run / 'model.safetensors'} does not fit its own configuration: train again.") from None
    path = run / "item_ids.json"
    try:
        item_ids = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}): it belongs beside model.safetensors.") from None
    except ValueError:
        raise InputError(f"{path} is not the JSON list that training wrote: it is truncated or of another program.") from None
    if not isinstance(item_ids, list) or len(item_ids) != config.n_items:
        raise InputError(f"{path} does not list the {config.n_items} item rows of model.safetensors: it is of another run.")
    return Recommender(model, item_ids)
