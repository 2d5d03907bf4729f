"""What ``state.pt`` holds."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lares_fast._errors import InputError
from lares_fast.model import LARES
from lares_fast.train.checkpoint import Weights, load_state, same_form
from lares_fast.train.config import PHASES, PhaseConfig, RunConfig
from lares_fast.train.finite import all_finite

State = dict[str, Any]

_COUNTS = ("epoch", "step", "steps", "best_epoch", "bad_epochs")
_NUMBERS: tuple[type, ...] = (int, float)
_MAYBE_DICT: tuple[type, ...] = (dict, type(None))
_KINDS: dict[str, tuple[type, ...]] = {
    "identity": (dict,),
    "phase": (str,),
    "history": (list,),
    **dict.fromkeys(_COUNTS, (int,)),
    "best_value": _NUMBERS,
    "sums": (dict,),
    "model": (dict,),
    "start": _MAYBE_DICT,
    "best": _MAYBE_DICT,
    "kept": _MAYBE_DICT,
    "optimizer": _MAYBE_DICT,
}
# What an earlier version did not write.
_NEWER: dict[str, tuple[type, ...]] = {
    "restarts": (int,),
    "seconds": _NUMBERS,
    "waited": _NUMBERS,
    "settings": (dict,),
    "environment": (dict,),
}


def fresh_phase() -> State:
    """The state at the beginning of a phase."""
    return {
        "epoch": 0,
        "step": 0,
        "steps": 0,
        "sums": {},
        "seconds": 0.0,
        "waited": 0.0,
        "best_value": -1.0,
        "best_epoch": 0,
        "bad_epochs": 0,
        "best": None,
        "kept": None,
        "optimizer": None,
    }


def load_run(path: Path) -> State:
    """The state of a run; :class:`InputError` if ``path`` is damaged or lacks something, and never a default instead."""
    state = load_state(path)
    if fault := _fault(state):
        raise InputError(f"{path} is no usable state of a run ({fault}): go on from a copy, or train again.")
    return state


def _fault(state: State) -> str | None:
    kinds = {**_KINDS, **{name: kind for name, kind in _NEWER.items() if name in state}}
    if "settings" in state:
        kinds |= {name: _NEWER[name] for name in ("restarts", "environment")}
    for name, kind in kinds.items():
        if name not in state:
            return f"it lacks {name!r}"
        if not isinstance(state[name], kind) or isinstance(state[name], bool):
            return f"{name!r} is a {type(state[name]).__name__}"
    for name in (*_COUNTS, "restarts"):
        if state.get(name, 0) < 0:
            return f"{name!r} is {state[name]}"
    if state["phase"] not in PHASES:
        return f"'phase' is {state['phase']!r:.40}"
    if state["phase"] == "rpt" and state["start"] is None:
        return "'start' is empty in phase rpt"
    for name in ("model", "start", "best"):
        if not all(isinstance(value, Tensor) for value in (state[name] or {}).values()):
            return f"{name!r} holds something other than tensors"
    numbers: list[Any] = [state["best_value"], *state["sums"].values(), state.get("seconds", 0.0), state.get("waited", 0.0)]
    if not all(isinstance(value, int | float) and math.isfinite(value) for value in numbers):
        return "its running sums are no finite numbers"
    if not all(isinstance(row, dict) and {"phase", "split", "history"} <= row.keys() for row in state["history"]):
        return "'history' is no table of results"
    optimizer = state["optimizer"]
    if optimizer is not None and not (
        isinstance(optimizer.get("state"), dict) and all(isinstance(value, dict) for value in optimizer["state"].values())
    ):
        return "'optimizer' is no state of an optimizer"
    kept = state["kept"]
    if kept is not None and not (
        kept.keys() == {"users", "ends"}
        and all(isinstance(value, Tensor) and value.dim() == 1 for value in kept.values())
        and len(kept["users"]) == len(kept["ends"])
    ):
        return "'kept' is no list of rows"
    wanted = {"model": dict, "seed": int, "data": str, "split": str}
    if not all(isinstance(state["identity"].get(name), kind) for name, kind in wanted.items()):
        return "'identity' does not say whose run it is"
    return None


def load_into(model: LARES, weights: Weights, path: Path, part: str) -> None:
    """Give ``model`` the weights under ``part`` of the state ``path``; :class:`InputError` if they cannot be its own."""
    if not same_form(weights, model.state_dict()):
        raise InputError(f"{path} holds weights under {part!r} that are not of this model: go on from a copy, or train again.")
    if not all_finite(weights.values()):
        raise InputError(f"{path} holds weights under {part!r} that are not finite: begin a new run with a lower lr.")
    model.load_state_dict(weights)


def adam(model: LARES, settings: PhaseConfig, saved: dict[str, Any] | None, path: Path) -> torch.optim.Adam:
    """The optimizer of a phase, with what ``path`` ``saved`` of it; :class:`InputError` if that is not of ``model``."""
    optimizer = torch.optim.Adam(model.parameters(), lr=settings.lr, weight_decay=settings.weight_decay)
    if saved is None:
        return optimizer
    try:
        optimizer.load_state_dict(saved)
        fits = all(
            moment.shape in (torch.Size(), parameter.shape)
            for parameter, values in optimizer.state.items()
            for moment in values.values()
        )
    except (AttributeError, KeyError, TypeError, ValueError):
        fits = False
    if not fits:
        raise InputError(f"{path} holds an optimizer that is not of this model: go on from a copy, or train again.")
    # A resumed run may be given other settings, and its optimizer's state holds the old ones.
    for group in optimizer.param_groups:
        group.update(lr=settings.lr, weight_decay=settings.weight_decay)
    return optimizer


def weights_of(model: LARES) -> Weights:
    """A copy of the parameters by name."""
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def moments(optimizer: dict[str, Any] | None) -> Iterator[Tensor]:
    """The tensors in the ``state_dict`` of an optimizer."""
    for values in (optimizer or {}).get("state", {}).values():
        yield from (value for value in values.values() if isinstance(value, Tensor))


def remedy_of_divergence(state: State, config: RunConfig, path: Path) -> str:
    """The rest of a sentence that says what is not finite in a run with ``state``."""
    phase = state["phase"]
    if state["steps"]:
        decay = f" or {phase}.weight_decay" if getattr(config, phase).weight_decay else ""
        remedy = f"lower {phase}.lr{decay} and resume; {path} holds an earlier state that is sound"
    elif phase == "rpt" or state["restarts"]:
        remedy = (
            "the phase has made no step, so the model that it starts from has diverged: begin a new run with a lower spt.lr"
        )
    else:
        remedy = "no step is made yet, so a setting of the model is out of range: model.tau may be too small"
    return f"in epoch {state['epoch'] + 1} of phase {phase}, after {state['step']} of its steps: {remedy}."
