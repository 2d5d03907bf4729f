"""Copy tensors from the CPU to a GPU without making the CPU wait, copy them back, and recognise a graph capture."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Return ``tensor`` on ``device``. A copy from the CPU to a GPU uses page-locked memory, so the CPU does not wait for it.

    Raises RuntimeError for such a copy within a graph capture, because every replay of the graph would copy the values that are
    in the CPU memory at that time.
    """
    if tensor.device == device:
        return tensor
    if device.type == "cuda" and tensor.device.type == "cpu":
        if capturing(device):
            raise RuntimeError(
                "A tensor on the CPU cannot be copied within a graph capture: move it to the GPU before the capture begins."
            )
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def to_host(tensor: Tensor) -> Tensor:
    """Return ``tensor`` on the CPU. If it is on a GPU, the CPU waits for it."""
    return tensor.cpu()


def capturing(device: torch.device) -> bool:
    """Return whether ``device`` is a GPU whose current stream captures a graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
