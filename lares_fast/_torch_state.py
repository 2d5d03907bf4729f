"""Check settings of PyTorch that a program may have changed, and the numbers of a model that a program has made."""

from __future__ import annotations

import torch
from torch import nn

from lares_fast._errors import InputError


def require_defaults() -> None:
    """Raise :class:`InputError` unless PyTorch makes tensors of float32 on the CPU where nothing else is said."""
    if (dtype := torch.get_default_dtype()) != torch.float32:
        raise InputError(
            f"PyTorch's default dtype must be torch.float32, but is {dtype}: call torch.set_default_dtype(torch.float32)."
        )
    require_default_device()


def require_default_device() -> None:
    """Raise :class:`InputError` unless PyTorch makes tensors on the CPU where nothing else is said."""
    if (device := torch.get_default_device()).type != "cpu":
        raise InputError(
            f"PyTorch's default device must be the CPU, but is {device}: call torch.set_default_device(None). The device of a "
            "model is chosen by its own argument."
        )


def require_float32(model: nn.Module) -> None:
    """Raise :class:`InputError` unless all parameters of ``model`` are numbers of float32."""
    for name, value in model.named_parameters():
        if value.is_meta:
            raise InputError(f"model must hold numbers, but its {name} is on the device meta, which has none.")
        if value.dtype != torch.float32:
            raise InputError(
                f"model must have parameters of torch.float32, but its {name} is {value.dtype}: call model.float(). "
                "LARES(config, bf16=True) multiplies in bf16."
            )
