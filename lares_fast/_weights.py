"""The file model.safetensors: the weights of a model with its configuration, and checksums that are verified when it is read.

A damaged file raises an :class:`InputError` that names it, and reading runs no code. The metadata holds a SHA-256 of everything
in the file, and one of ``item_ids.json``. Files of an earlier version have no SHA-256 and are read without that check.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import fields
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lares_fast._errors import InputError, with_path
from lares_fast._files import atomic_write
from lares_fast._finite import NotFiniteError, all_finite
from lares_fast._memory import missing_memory
from lares_fast._tensors import bytes_of, read_metadata, read_tensors, write_tensors
from lares_fast.config import LARESConfig
from lares_fast.reference import without_numbers

FORMAT = "lares_fast-1"

Weights = dict[str, Tensor]


def weights_of(model: nn.Module, *, copy: bool = True) -> Weights:
    """Return a copy of the parameters by name, on the CPU. With ``copy=False`` those of a model on the CPU are no copies."""
    return {name: value.detach().to("cpu", copy=copy) for name, value in model.state_dict().items()}


def save_weights(path: Path, weights: Weights, config: LARESConfig, about: dict[str, str] | None = None) -> None:
    """Write a safetensors file to ``path`` atomically.

    Its metadata holds ``config``, ``about`` (entries on the log and the split) and :func:`weights_digest`.
    Raises :class:`NotFiniteError` for weights that are not finite.
    """
    if not all_finite(weights.values()):
        raise NotFiniteError(f"{path} is not written: the weights are not finite; train with a lower lr.")
    about = about or {}
    content = {"config": config.to_dict(), "about": about, "sha256": weights_digest(weights, config, about)}
    # One entry, because safetensors writes several entries in no fixed order, and equal runs must give equal files.
    metadata = {FORMAT: json.dumps(content)}
    atomic_write(path, lambda file: write_tensors(file, weights, metadata))


def load_weights(path: Path) -> tuple[Weights, LARESConfig]:
    """Return the weights and the configuration in a file that :func:`save_weights` wrote.

    Raises :class:`InputError` if the file is missing or damaged, if something else wrote it, or if it holds weights that are
    not finite.
    """
    return load_weights_about(path)[:2]


def load_weights_about(path: Path) -> tuple[Weights, LARESConfig, dict[str, str]]:
    """Return the weights, the configuration and ``about``, which is empty for files of an earlier version.

    Raises the errors of :func:`load_weights`.
    """
    _require_file(path)
    try:
        weights, metadata = read_tensors(path)
    except Exception as error:
        if missing_memory(error) is not None:
            raise
        raise InputError(f"{path} is not a readable safetensors file: it is truncated or has another format.") from error
    if FORMAT not in metadata:
        raise InputError(f"{path} was not written by lares_fast ({FORMAT}): convert official weights with lares_fast.convert.")
    values, about = _verified(path, metadata[FORMAT], weights)
    return _finite_ones(path, weights), _config(path, values), about


def has_config(path: Path) -> bool:
    """Return whether ``path`` is a file that holds the configuration of its model, or cannot be read."""
    try:
        return FORMAT in read_metadata(path)
    except Exception:
        return True


def load_foreign(path: Path, config: LARESConfig) -> Weights:
    """Return the weights of a model of ``config`` in a safetensors file of another program, which has no checksums.

    Raises :class:`InputError` if they do not fit ``config`` or are not finite.
    """
    try:
        weights = read_tensors(path)[0]
    except Exception as error:
        if missing_memory(error) is not None:
            raise
        raise InputError(f"{path} is not a readable safetensors file: it is truncated or has another format.") from error
    if not fits(weights, config):
        raise InputError(f"{path} does not fit the configuration beside it: convert official weights with lares_fast.convert.")
    return _finite_ones(path, weights)


def weights_digest(weights: Weights, config: LARESConfig, about: dict[str, str]) -> str:
    """Return the SHA-256 of everything that :func:`save_weights` writes with these arguments."""
    return _digest(weights, {"config": config.to_dict(), "about": about})


def stored_digest(path: Path) -> str | None:
    """Return :func:`weights_digest` as the file ``path`` holds it, not verified, or ``None`` if there is none."""
    try:
        found = json.loads(read_metadata(path)[FORMAT])["sha256"]
    except Exception:
        return None
    return found if isinstance(found, str) else None


def sha256(data: bytes) -> str:
    """Return the SHA-256 of ``data`` as 64 hex digits."""
    return hashlib.sha256(data).hexdigest()


def fits(weights: Weights, config: LARESConfig) -> bool:
    """Return whether a model of ``config`` has tensors with the names and shapes of ``weights``; it allocates no tensor."""
    if config.n_pre_layers + config.n_core_layers > len(weights):
        return False
    try:
        expected = without_numbers(config).state_dict()
    except (InputError, RuntimeError, OverflowError):
        # The backbone is not registered, or a size is too large for any tensor.
        return False
    return {name: value.shape for name, value in weights.items()} == {name: value.shape for name, value in expected.items()}


def _finite_ones(path: Path, weights: Weights) -> Weights:
    if not all_finite(weights.values()):
        raise NotFiniteError(f"{path} holds weights that are not finite: its model has diverged; train again with a lower lr.")
    return weights


def _verified(path: Path, text: str, weights: Weights) -> tuple[Any, dict[str, str]]:
    """Return the configuration and ``about`` in a metadata entry."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise InputError(f"{path} is damaged (its metadata cannot be read): train again, or use a copy.")
    if "n_items" in content:
        # An earlier version wrote only the configuration.
        return content, {}
    stored = content.pop("sha256", None)
    if set(content) != {"config", "about"} or stored != _digest(weights, content):
        raise InputError(
            f"{path} is damaged (its checksum is wrong): lares-fast train {with_path('--resume', path.parent)} writes it again."
        )
    return content["config"], content["about"]


def _digest(weights: Weights, content: dict[str, Any]) -> str:
    """Return the SHA-256 of ``content`` and of the tensors with their names, dtypes and shapes."""
    forms = [(name, str(value.dtype), list(value.shape)) for name, value in sorted(weights.items())]
    digest = hashlib.sha256(json.dumps([content, forms], sort_keys=True).encode())
    for _, value in sorted(weights.items()):
        digest.update(bytes_of(value))
    return digest.hexdigest()


_KINDS: dict[str, tuple[type, ...]] = {
    "int": (int,),
    "float": (int, float),
    "str": (str,),
    "bool": (bool,),
    "None": (type(None),),
}


def _config(path: Path, values: Any) -> LARESConfig:
    try:
        config = LARESConfig.from_dict(values)
    except (TypeError, ValueError) as error:
        raise InputError(f"{path} holds a configuration that cannot be used ({error}): train again, or use a copy.") from None
    for field in fields(config):
        allowed = {kind for part in str(field.type).split(" | ") for kind in _KINDS[part]}
        if type(value := getattr(config, field.name)) not in allowed:
            raise InputError(f"{path} holds a configuration that cannot be used ({field.name} is {value!r:.40}): train again.")
    return config


def _require_file(path: Path) -> None:
    # Unlike Path.is_file, this never raises.
    if not os.path.isfile(path):
        raise InputError(f"{path} does not exist: name the folder of a run.")
