"""Copies from the CPU to a GPU that the CPU does not wait for."""

from __future__ import annotations

import torch
from torch import Tensor


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """``tensor`` on ``device``; one of the CPU goes through page-locked memory, which the GPU fetches on its own.

    Raises RuntimeError within a graph capture, whose replays would fetch what stands there by then.
    """
    if tensor.device == device:
        return tensor
    if device.type == "cuda" and tensor.device.type == "cpu":
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError("A tensor on the CPU cannot be copied within a graph capture: move it to the GPU before.")
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
