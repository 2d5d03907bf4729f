"""The files state.pt and model.safetensors: they are verified when they are read, and reading them runs no code.

A damaged file raises an :class:`InputError` that names it. ``state.pt`` is an archive with checksums. The metadata of
``model.safetensors`` holds a SHA-256 of everything in the file, and one of ``item_ids.json``. Files of an earlier version
have no SHA-256 and are read without that check.
"""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

import torch
from torch import Tensor

from lares_fast._errors import InputError, with_path
from lares_fast._files import atomic_write, keep_as
from lares_fast._memory import missing_memory
from lares_fast.config import LARESConfig
from lares_fast.model import LARES
from lares_fast.reference import without_numbers
from lares_fast.train._tensors import bytes_of, read_metadata, read_tensors, write_tensors
from lares_fast.train.finite import NotFiniteError, all_finite

_FORMAT = "lares_fast-1"

Weights = dict[str, Tensor]


class StateError(InputError):
    """The file ``path`` is missing, or is no usable state; ``fault`` says why, as the rest of a sentence about the file."""

    def __init__(self, path: Path, fault: str, remedy: str = "continue from a copy, or train again") -> None:
        super().__init__(f"{path} {fault}: {remedy}.")
        self.fault = fault


def save_state(path: Path, state: dict[str, Any], older: Path | None = None) -> None:
    """Write ``state`` to ``path`` atomically; it holds tensors and plain values only.

    The file that was at ``path`` stays under the name ``older``. There is a whole state at ``path`` or at ``older`` at any
    time.
    """

    def write(file: IO[bytes]) -> None:
        # If it is interrupted, PyTorch's writer writes once more when it is deleted. An error there ends the process, so what
        # it then writes is only counted.
        sink = SimpleNamespace(write=file.write, flush=file.flush)
        try:
            torch.save({"format": _FORMAT, **state}, sink)
        finally:
            sink.write = len
        if older is not None:
            # The new file is on the disk before the oldest one goes.
            file.flush()
            os.fsync(file.fileno())
            keep_as(path, older)

    atomic_write(path, write)


def load_state(path: Path) -> dict[str, Any]:
    """Read the file that :func:`save_state` wrote, onto the CPU.

    Raises :class:`StateError` if the file is missing or damaged, or if something else wrote it.
    """
    if not os.path.isfile(path):
        raise StateError(path, "is not a file" if os.path.exists(path) else "does not exist", "name the folder of a run")
    try:
        with zipfile.ZipFile(path) as archive:
            # torch.load does not check the checksums.
            damaged = archive.testzip()
        state = None if damaged else torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        if missing_memory(error) is not None:
            raise
        raise StateError(path, "is not a readable state (it is truncated, or another program wrote it)") from error
    if damaged:
        raise StateError(path, f"is damaged ({damaged!r:.80} does not have its checksum)")
    if not isinstance(state, dict) or state.get("format") != _FORMAT:
        raise StateError(path, f"is not a state of this version of the format ({_FORMAT})")
    return state


def peek(path: Path, entry: str) -> Any:
    """Return ``entry`` of the state ``path`` without reading its tensors, or ``None`` if it cannot be read."""
    try:
        with zipfile.ZipFile(path) as archive:
            # Reading the record of everything but tensors verifies its checksum.
            archive.read(next(name for name in archive.namelist() if name.endswith("/data.pkl")))
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True).get(entry)
    except Exception:
        return None


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
    metadata = {_FORMAT: json.dumps(content)}
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
    if _FORMAT not in metadata:
        raise InputError(f"{path} was not written by lares_fast ({_FORMAT}): convert official weights with lares_fast.convert.")
    values, about = _verified(path, metadata[_FORMAT], weights)
    config = _config(path, values)
    if not all_finite(weights.values()):
        raise NotFiniteError(f"{path} holds weights that are not finite: its model has diverged; train again with a lower lr.")
    return weights, config, about


def weights_digest(weights: Weights, config: LARESConfig, about: dict[str, str]) -> str:
    """Return the SHA-256 of everything that :func:`save_weights` writes with these arguments."""
    return _digest(weights, {"config": config.to_dict(), "about": about})


def stored_digest(path: Path) -> str | None:
    """Return :func:`weights_digest` as the file ``path`` holds it, not verified, or ``None`` if there is none."""
    try:
        found = json.loads(read_metadata(path)[_FORMAT])["sha256"]
    except Exception:
        return None
    return found if isinstance(found, str) else None


def sha256(data: bytes) -> str:
    """Return the SHA-256 of ``data`` as 64 hex digits."""
    return hashlib.sha256(data).hexdigest()


def same_form(weights: Weights, other: Weights) -> bool:
    """Return whether both have tensors of equal names, shapes and dtypes."""
    return {name: (value.shape, value.dtype) for name, value in weights.items()} == {
        name: (value.shape, value.dtype) for name, value in other.items()
    }


def weights_of(model: LARES, *, copy: bool = True) -> Weights:
    """Return a copy of the parameters by name, on the CPU. With ``copy=False`` those of a model on the CPU are no copies."""
    return {name: value.detach().to("cpu", copy=copy) for name, value in model.state_dict().items()}


def check_weights(model: LARES, weights: Weights, path: Path, part: str) -> None:
    """Raise :class:`InputError` unless ``weights``, which are ``part`` of the state ``path``, can be weights of ``model``."""
    if not same_form(weights, model.state_dict()):
        raise InputError(f"{path} holds weights under {part!r} of another model: continue from a copy, or train again.")
    if not all_finite(weights.values()):
        raise InputError(f"{path} holds weights under {part!r} that are not finite: begin a new run with a lower lr.")


def load_into(model: LARES, weights: Weights, path: Path, part: str) -> None:
    """Give ``model`` the ``weights``. Raises the errors of :func:`check_weights`."""
    check_weights(model, weights, path, part)
    model.load_state_dict(weights)


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
