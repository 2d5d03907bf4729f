"""Call functions of the native module by keyword, and raise ``InputError`` for values that it cannot take."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from lares_fast import _native
from lares_fast._errors import InputError


def call_native(function: str, **arguments: object) -> None:
    """Call ``function`` of the native module with the :func:`addresses` of ``arguments``.

    The caller must keep the tensors alive and must have checked their dtypes, devices and shapes, because the native code does
    not check them.

    Raises:
        InputError: the native code found a value out of range, or a number too large for its type, or its workspace does not
            fit into memory.
        NotBuiltError: there is no native module.
    """
    call = getattr(_native.load(), function)
    try:
        call(**addresses(arguments))
    except MemoryError as error:
        raise InputError(f"{function}: there is not enough memory for the workspace: pass fewer rows or threads.") from error
    except (ValueError, TypeError) as error:
        sentence = str(error).partition("\n")[0]
        raise InputError(f"{function}: {sentence}.") from error


def addresses(arguments: dict[str, object]) -> dict[str, object]:
    """Return ``arguments`` as the native module takes them: the address of a tensor, 0 for ``None``, other values unchanged."""
    return {
        name: value.data_ptr() if isinstance(value, Tensor) else 0 if value is None else value
        for name, value in arguments.items()
    }


def contiguous(name: str, tensor: Tensor) -> Tensor:
    """Return ``tensor`` in contiguous memory, without a gradient; :class:`InputError` if a copy does not fit into memory."""
    if tensor.is_contiguous() and not tensor.is_neg():
        return tensor
    with allocation(f"{name} {list(tensor.shape)}"):
        return tensor.detach().resolve_neg().contiguous()


@contextmanager
def allocation(what: str) -> Iterator[None]:
    """Raise :class:`InputError` if PyTorch runs out of memory within the ``with`` block; ``what`` describes the tensor."""
    try:
        yield
    except RuntimeError as error:
        raise InputError(f"{what} does not fit into memory: pass fewer rows at a time ({error}).") from error


def thread_count(threads: int | None) -> int:
    """Return ``threads``, or PyTorch's number of threads for ``None``; :class:`InputError` if it is below 1."""
    threads = torch.get_num_threads() if threads is None else threads
    if threads < 1:
        raise InputError(f"threads must be at least 1, but got {threads}.")
    return threads
