"""Files of a run: written atomically, read without unpickling code."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as safetensors_bytes
from torch import Tensor

from lares_fast._errors import InputError
from lares_fast.config import LARESConfig

_FORMAT = "lares_fast-1"


def atomic_write(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Have ``write(file)`` fill a temporary neighbour, and move it onto ``path`` only when it is safely on the disk.

    Raises :class:`InputError` if the disk is full or refuses; what stood at ``path`` before is then untouched.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            temporary = Path(file.name)
            try:
                write(file)
                file.flush()
                os.fsync(file.fileno())
                temporary.chmod(0o644)
                temporary.replace(path)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise
    except (OSError, RuntimeError) as error:
        # torch.save reports a failed write as a RuntimeError.
        raise InputError(
            f"{path} could not be written ({error}); free the disk and resume: the previous file is intact."
        ) from error


def write_text(path: Path, text: str) -> None:
    """Atomically write ``text`` as UTF-8."""
    atomic_write(path, lambda file: file.write(text.encode()))


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Atomically write the resumable state: tensors and plain values only."""
    atomic_write(path, lambda file: torch.save({"format": _FORMAT, **state}, file))


def load_state(path: Path) -> dict[str, Any]:
    """Read :func:`save_state`'s file; :class:`InputError` if it is missing, truncated or something else."""
    _require_file(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise InputError(f"{path} is no readable lares_fast state: it is truncated or of another program.") from error
    if not isinstance(state, dict) or state.get("format") != _FORMAT:
        raise InputError(f"{path} is not a state of this version ({_FORMAT}): train again, or use the version that wrote it.")
    return state


def save_weights(path: Path, weights: dict[str, Tensor], config: LARESConfig) -> None:
    """Atomically write a safetensors file with ``config`` in its metadata."""
    # One entry: safetensors writes several in no fixed order, and equal runs are to give equal files.
    metadata = {_FORMAT: json.dumps(config.to_dict())}
    content = safetensors_bytes({name: value.contiguous() for name, value in weights.items()}, metadata)
    atomic_write(path, lambda file: file.write(content))


def load_weights(path: Path) -> tuple[dict[str, Tensor], LARESConfig]:
    """Read :func:`save_weights`' file; :class:`InputError` if it is missing, truncated or something else."""
    _require_file(path)
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - safe_open is no mapping
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"{path} is no readable safetensors file: it is truncated or of another format.") from error
    if _FORMAT not in metadata:
        raise InputError(f"{path} was not written by lares_fast ({_FORMAT}): convert official weights with lares_fast.convert.")
    return weights, LARESConfig.from_dict(json.loads(metadata[_FORMAT]))


def _require_file(path: Path) -> None:
    if not path.is_file():
        raise InputError(f"{path} does not exist: name the folder of a run.")
