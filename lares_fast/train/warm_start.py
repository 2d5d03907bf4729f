"""Take over the model of a run on another log, such as the log of yesterday: item rows are found by their raw ids."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from lares_fast._errors import InputError, with_path
from lares_fast._model_folder import read_item_ids
from lares_fast._weights import Weights, load_weights_about
from lares_fast.config import ITEMS, MODEL
from lares_fast.train.identity import ABOUT, require_same

# The only weights whose shape depends on the number of items.
_TABLE = "item_embedding.weight"


def is_of_other_log(theirs: dict[str, Any], ours: dict[str, Any]) -> bool:
    """Return whether the identities of two runs name other events. An earlier version did not write all entries."""
    return any(theirs.get(name, ours[name]) != ours[name] for name in ("data", "events"))


def require_fit(theirs: dict[str, Any], ours: dict[str, Any], run: Path) -> None:
    """Raise :class:`InputError` unless the models differ in nothing but the number of items, and the kind of split is the same.

    With another kind of split, the model of the run in the folder ``run`` may have been trained on rows that are held out here.
    """
    require_model(theirs["model"], ours["model"], run)
    there, here = (identity["split"].partition(" ")[0] for identity in (theirs, ours))
    require_same({"model": theirs["model"], "split": there}, {"split": here}, run, "start from")


def require_model(theirs: dict[str, Any], ours: dict[str, Any], run: Path) -> None:
    """Raise :class:`InputError` unless the settings of two models differ in nothing but the number of items."""
    require_same({"model": {**theirs, "n_items": ours["n_items"]}}, {"model": ours}, run, "start from")


def item_ids_of(run: Path, identity: dict[str, Any]) -> list[Any]:
    """Return the raw item ids of the run in the folder ``run``, whose identity is ``identity``; the first stands for PAD.

    Raises :class:`InputError` if item_ids.json is not the verified file of this run.
    """
    about = load_weights_about(run / MODEL)[2]
    again = f"lares-fast train {with_path('--resume', run)} writes it again"
    # A file of an earlier version holds no checksum of the ids.
    if "item_ids" not in about or any(about.get(name) != identity.get(name) for name in ABOUT):
        raise InputError(f"{run / MODEL} is not of the run in state.pt, so its items are not known: {again}.")
    return read_item_ids(run, about, identity["model"]["n_items"])


def carry_over(
    theirs: Weights, their_ids: list[Any], fresh: Weights, our_ids: list[Any], run: Path
) -> tuple[Weights, dict[str, int]]:
    """Return the weights ``theirs`` with an item table for ``our_ids``, and the numbers of kept, new and missing items.

    Items of both lists keep their rows, and new items have those of the ``fresh`` weights. Ids are compared as text. The first
    id of each list stands for PAD. Raises :class:`InputError` if no item is in both lists, or if the list ``their_ids`` of the
    run in the folder ``run`` does not fit the weights.
    """
    if _TABLE not in theirs or len(theirs[_TABLE]) != len(their_ids):
        raise InputError(f"{run / ITEMS} does not list the items of the weights in state.pt: continue from a copy of the run.")
    place = {str(raw): row for row, raw in enumerate(their_ids[1:], start=1)}
    rows = [(row, place[str(raw)]) for row, raw in enumerate(our_ids[1:], start=1) if str(raw) in place]
    if not rows:
        raise InputError(
            f"no item of the run in {run} is in this log, so its model is of no use here: give a log with the same raw item "
            "ids, or begin a run of its own."
        )
    ours, of_theirs = torch.tensor([(0, 0), *rows]).T
    table = fresh[_TABLE].clone()
    table[ours] = theirs[_TABLE][of_theirs]
    counts = {"kept": len(rows), "new": len(our_ids) - 1 - len(rows), "missing": len(place) - len(rows)}
    return {**theirs, _TABLE: table}, counts


def told(run: Path, counts: dict[str, int]) -> list[dict[str, Any]]:
    """Return the events that announce a model of the run in ``run`` and the ``counts`` of its items."""
    text = (
        f"the model of {run} continues on another log: {counts['kept']:,} items keep their rows, {counts['new']:,} new items "
        f"begin like those of a new model, and {counts['missing']:,} items are not in this log."
    )
    return [{"event": "notice", "text": text}, {"event": "warm_start", "run": str(run), **counts}]
