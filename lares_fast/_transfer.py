"""Copies from the CPU to a GPU that the CPU does not wait for."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Return ``tensor`` on ``device``. A copy from the CPU to a GPU goes through page-locked memory, so nothing waits for it.

    Raises RuntimeError within a graph capture: each replay of the graph would copy the content that the CPU memory has then.
    """
    if tensor.device == device:
        return tensor
    if device.type == "cuda" and tensor.device.type == "cpu":
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "A tensor on the CPU cannot be copied within a graph capture: move it to the GPU before the capture begins."
            )
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
