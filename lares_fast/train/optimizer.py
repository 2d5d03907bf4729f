"""The optimizer of a phase."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lares_fast._errors import InputError
from lares_fast._settings import strict
from lares_fast.model import LARES
from lares_fast.train.config import PhaseConfig

# The entries of a group that choose an implementation of Adam, with their values on the CPU. On a GPU all tensors are updated
# by a few launches, and no number is read from the host.
_CPU = {"foreach": None, "fused": None, "capturable": False}
# In strict mode: the other implementations take square roots from MKL, which are not exact and differ between Intel and AMD.
_STRICT = {"foreach": None, "fused": True, "capturable": False}
_GPU = {"foreach": None, "fused": True, "capturable": True}


def adam(model: LARES, settings: PhaseConfig, saved: dict[str, Any] | None, path: Path) -> torch.optim.Adam:
    """Return the optimizer of a phase. It continues from its ``state_dict`` ``saved`` in the file ``path``, if there is one.

    Raises :class:`InputError` if ``saved`` is not the state of an optimizer of ``model``.
    """
    device = next(model.parameters()).device
    kind: dict[str, Any] = _GPU if device.type != "cpu" else _STRICT if strict() else _CPU
    own: dict[str, Any] = {"weight_decay": settings.weight_decay, "decoupled_weight_decay": settings.optimizer == "adamw"}
    optimizer = torch.optim.Adam(model.parameters(), lr=settings.lr, **own, **kind)
    # Steps that run launch by launch need no warning.
    optimizer._warned_capturable_if_run_uncaptured = True
    if saved is None:
        return optimizer
    try:
        optimizer.load_state_dict({**saved, "param_groups": [{**group, **kind} for group in saved["param_groups"]]})
        fits = all(
            moment.shape in (torch.Size(), parameter.shape)
            for parameter, values in optimizer.state.items()
            for moment in values.values()
        )
    except (AttributeError, KeyError, TypeError, ValueError):
        fits = False
    if not fits:
        raise InputError(f"{path} holds the optimizer of another model: continue from a copy, or train again.")
    # A resumed run may have other settings, but the saved state holds the old ones.
    for group in optimizer.param_groups:
        group.update(lr=settings.lr, **own)
    return optimizer


def set_rate(optimizer: torch.optim.Adam, rate: float, device: torch.device) -> None:
    """Set the learning rate of the next step. On a GPU it is kept there, where a captured graph reads it."""
    for group in optimizer.param_groups:
        if device.type == "cpu":
            group["lr"] = rate
        elif isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = torch.tensor(rate, dtype=torch.float32, device=device)


def saved_state(optimizer: torch.optim.Adam) -> dict[str, Any]:
    """Return the ``state_dict`` of ``optimizer`` in the form that it has on the CPU. A GPU is waited for."""
    saved = optimizer.state_dict()
    state = {number: {name: x.to("cpu") for name, x in values.items()} for number, values in saved["state"].items()}
    # A GPU may hold the learning rate.
    return {"state": state, "param_groups": [{**group, **_CPU, "lr": float(group["lr"])} for group in saved["param_groups"]]}


def moments(saved: dict[str, Any] | None) -> Iterator[Tensor]:
    """Yield the tensors in the ``state_dict`` of an optimizer."""
    for values in (saved or {}).get("state", {}).values():
        yield from (value for value in values.values() if isinstance(value, Tensor))
