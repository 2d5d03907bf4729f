"""The folder of a model: ``model.safetensors``, which holds its configuration too, and ``item_ids.json`` with raw item ids.

A run folder is such a folder. ``config.json`` is for people and for other programs. If ``model.safetensors`` was written by
another program, such as ``PyTorchModelHubMixin``, the configuration is read from it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lares_fast._errors import InputError, with_path
from lares_fast._files import read_small, write_text
from lares_fast._weights import Weights, has_config, load_foreign, load_weights_about, save_weights, sha256
from lares_fast.config import ITEMS, MODEL, LARESConfig

CONFIG = "config.json"
# A configuration has about 25 settings.
_MOST_BYTES = 100_000


def write_model(
    folder: Path, weights: Weights, config: LARESConfig, item_ids: Sequence[Any] | None, about: dict[str, str] | None = None
) -> None:
    """Write ``model.safetensors`` and, with ``item_ids``, ``item_ids.json`` into ``folder``, which is made if it is missing.

    ``item_ids`` are texts and integers, one for each item row. ``about`` joins the metadata.
    """
    about = dict(about or {})
    if item_ids is not None:
        text = json.dumps(list(item_ids))
        about["item_ids"] = sha256(text.encode())
        write_text(folder / ITEMS, text)
    save_weights(folder / MODEL, weights, config, about)


def read_model(folder: Path) -> tuple[Weights, LARESConfig, dict[str, str]]:
    """Return the weights, the configuration and the metadata of the model in ``folder``.

    Raises :class:`InputError` if a file is missing or damaged, or if ``config.json`` has another configuration than the
    weights.
    """
    path = folder / MODEL
    written = read_config(folder)
    if written is not None and not has_config(path):
        return load_foreign(path, written), written, {}
    weights, config, about = load_weights_about(path)
    if written is not None and written != config:
        raise InputError(
            f"{folder / CONFIG} has other settings than {path}: remove it, because those in {MODEL} belong to the weights."
        )
    return weights, config, about


def write_config(folder: Path, config: LARESConfig) -> None:
    """Write ``config.json``."""
    write_text(folder / CONFIG, json.dumps({"model_type": "lares", **config.to_dict()}, indent=1) + "\n")


def read_config(folder: Path) -> LARESConfig | None:
    """Return the configuration in ``config.json``, or ``None`` if there is no such file."""
    path = folder / CONFIG
    if not os.path.lexists(path):
        return None
    try:
        values = json.loads(read_small(path, _MOST_BYTES))
        # The mixin of the hub writes the arguments of the class.
        values = values.get("config", values) if isinstance(values, dict) else values
        if isinstance(values, dict):
            values.pop("model_type", None)
        return LARESConfig.from_dict(values)
    except (ValueError, RecursionError, TypeError, OSError) as error:
        raise InputError(
            f"{path} is not the configuration of a model ({str(error)[:200]}): remove it, or use a copy."
        ) from None


def read_item_ids(folder: Path, about: dict[str, str], n_items: int) -> list[Any]:
    """Return the raw id of each item row of the model in ``folder``, whose metadata are ``about``.

    Raises :class:`InputError` if the file is missing or damaged, or does not have ``n_items`` ids.
    """
    path, checksum = folder / ITEMS, about.get("item_ids")
    again = f"if it is of a run, lares-fast train {with_path('--resume', folder)} writes it again"
    if os.path.exists(path) and not os.path.isfile(path):
        raise InputError(f"{path} is not a file: the list of item ids must be there.")
    try:
        data = path.read_bytes()
        if checksum is not None and sha256(data) != checksum:
            raise InputError(
                f"{path} is damaged or belongs to another model ({MODEL} has another checksum for it): use a copy, or {again}."
            )
        item_ids = json.loads(data)
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}): it must be beside {MODEL}; {again}.") from None
    except (ValueError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} is not a JSON list of ids: it is truncated, or another program wrote it.") from None
    if not isinstance(item_ids, list):
        raise InputError(f"{path} is not a JSON list of ids: another program wrote it.")
    if len(item_ids) != n_items:
        raise InputError(f"{path} does not list the {n_items} item rows of {MODEL}: they belong to two models.")
    return item_ids
