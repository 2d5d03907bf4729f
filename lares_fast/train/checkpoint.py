"""The file state.pt: it is verified when it is read, and reading it runs no code.

A damaged file raises an :class:`InputError` that names it. The file is an archive with checksums.
"""

from __future__ import annotations

import os
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

import torch

from lares_fast._errors import InputError
from lares_fast._files import atomic_write, keep_as
from lares_fast._finite import all_finite
from lares_fast._memory import missing_memory
from lares_fast._weights import FORMAT, Weights
from lares_fast.model import LARES


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
            torch.save({"format": FORMAT, **state}, sink)
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
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise StateError(path, f"is not a state of this version of the format ({FORMAT})")
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


def same_form(weights: Weights, other: Weights) -> bool:
    """Return whether both have tensors of equal names, shapes and dtypes."""
    return {name: (value.shape, value.dtype) for name, value in weights.items()} == {
        name: (value.shape, value.dtype) for name, value in other.items()
    }


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
