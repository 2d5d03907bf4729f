"""The file format of safetensors, written and read tensor by tensor, so that no second copy of the tensors is needed.

A file has the length of its header in 8 bytes, the header as JSON, and the numbers of all tensors one after the other.
The package safetensors is not used: version 0.8 leaks memory for each tensor that ``safe_open`` reads, and its ``load`` ends
in a Rust panic if no memory is left. Source of the format: https://huggingface.co/docs/safetensors.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

_NAMES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}
_METADATA = "__metadata__"


def bytes_of(value: Tensor) -> memoryview:
    """Return the numbers of ``value``, without a copy if it is contiguous on the CPU."""
    data: memoryview = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
    return data


def write_tensors(file: IO[bytes], tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write ``tensors`` in the order of their names, and ``metadata``."""
    header: dict[str, Any] = {_METADATA: metadata}
    end = 0
    for name, value in sorted(tensors.items()):
        begin, end = end, end + value.nbytes
        header[name] = {"dtype": _NAMES[value.dtype], "shape": list(value.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for _, value in sorted(tensors.items()):
        file.write(bytes_of(value))


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors and the metadata of the file ``path``.

    Raises :class:`ValueError` if the file has another format, and OSError if it cannot be read.
    """
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        header, start = _header(file)
        metadata = header.pop(_METADATA, {})
        tensors: dict[str, Tensor] = {}
        end = 0
        # The tensors fill the file without gaps.
        for name, (dtype, shape, offsets) in sorted(_entries(header, size).items(), key=lambda entry: entry[1][2]):
            begin, end = end, end + math.prod(shape) * dtype.itemsize
            if offsets != [begin, end] or start + end > size:
                raise ValueError(f"the tensor {name} is not where it should be")
            tensors[name] = torch.empty(shape, dtype=dtype, device="cpu")
            if end > begin and file.readinto(bytes_of(tensors[name])) != end - begin:
                raise ValueError("the file is truncated")
        if file.read(1):
            raise ValueError("the file goes on after its last tensor")
    return tensors, metadata


def read_metadata(path: Path) -> dict[str, str]:
    """Return the metadata of the file ``path``. Raises the errors of :func:`read_tensors`."""
    with open(path, "rb") as file:
        metadata: dict[str, str] = _header(file)[0].get(_METADATA, {})
    return metadata


def _header(file: IO[bytes]) -> tuple[dict[str, Any], int]:
    """Return the header, and where the numbers begin."""
    length = int.from_bytes(file.read(8), "little")
    if length + 8 > os.fstat(file.fileno()).st_size:
        raise ValueError("the file is truncated")
    try:
        header = json.loads(file.read(length))
    except RecursionError:
        header = None
    metadata = header.get(_METADATA, {}) if isinstance(header, dict) else None
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("the header has another format")
    return header, length + 8


def _entries(header: dict[str, Any], size: int) -> dict[str, tuple[torch.dtype, list[int], list[int]]]:
    """Return the dtype, the shape and the offsets of each tensor in a file of ``size`` bytes."""
    try:
        entries = {name: (_DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]) for name, entry in header.items()}
    except (KeyError, TypeError, IndexError):
        raise ValueError("the header has another format") from None
    for _, shape, offsets in entries.values():
        if not (isinstance(shape, list) and isinstance(offsets, list) and len(offsets) == 2):
            raise ValueError("the header has another format")
        if not all(type(number) is int and 0 <= number <= size for number in (*shape, *offsets)):
            raise ValueError("the header has another format")
    return entries
