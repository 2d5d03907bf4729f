"""Check that the modules of a model are as its configuration says, and view a model in evaluation mode.

The packed encoder computes from the parameters and does not call the modules. So its result would be wrong for a module that
was changed.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple, TypeVar

import torch
from torch import nn
from torch.nn.modules import module as torch_module

from lares_fast import reference
from lares_fast.config import LARESConfig
from lares_fast.reference.backbone import TransformerBlock

_HOOKS = {
    "_forward_pre_hooks": "a forward pre-hook",
    "_forward_hooks": "a forward hook",
    "_backward_pre_hooks": "a backward pre-hook",
    "_backward_hooks": "a backward hook",
}
# Methods of the reference that a subclass or an attribute of the model may replace.
_METHODS = ("initial_state", "_initial_state", "_states")

_Module = TypeVar("_Module", bound=nn.Module)


class _Expected(NamedTuple):
    """A module of an unchanged model.

    ``parent`` is the index of its parent in the list of all modules, and ``name`` is its name in the parent. ``settings`` holds
    its plain attributes. ``parameters`` and ``modules`` are the names of its own parameters and of its direct children.
    """

    path: str
    parent: int
    name: str
    kind: type
    settings: dict[str, Any]
    parameters: list[str]
    modules: list[str]


def changed(model: reference.LARES) -> str | None:
    """Return, as a clause, the first change of ``model`` that a computation from its parameters would miss, or ``None``.

    Such a change is a hook, a module of another class or with other settings, a parametrised weight, or a replaced method.
    """
    for name in _METHODS:
        if name in vars(model) or getattr(type(model), name) is not getattr(reference.LARES, name):
            return f"its method {name} was replaced"
    if torch_module._has_any_global_hook():
        return "there is a hook on all modules"
    found: list[nn.Module] = [model]
    for expected in _expected(model.config):
        module = found[expected.parent]._modules.get(expected.name)
        if module is None:
            return f"{expected.path} is missing"
        if (why := _changed(module, expected)) is not None:
            return f"{expected.path} {why}"
        found.append(module)
    return None


def _changed(module: nn.Module, expected: _Expected) -> str | None:
    if type(module) is not expected.kind:
        return f"is a {type(module).__name__} instead of a {expected.kind.__name__}"
    held = vars(module)
    if (modules := list(held["_modules"])) != expected.modules:
        return f"has the modules {', '.join(modules)} where the configuration says {', '.join(expected.modules)}"
    for hooks, what in _HOOKS.items():
        if held.get(hooks):
            return f"has {what}"
    if "forward" in held:
        return "has a forward of its own"
    for name, value in expected.settings.items():
        if held.get(name) != value:
            return f"has {name} {held.get(name)!r} where the configuration says {value!r}"
    if [name for name, value in module._parameters.items() if value is not None] != expected.parameters:
        return f"has other parameters than {', '.join(expected.parameters) or 'none'}"
    return None


def parameters(module: nn.Module) -> list[nn.Parameter]:
    """Return ``list(module.parameters())``, in a third of the time. A parameter that two modules share is listed twice."""
    found = [parameter for parameter in module._parameters.values() if parameter is not None]
    for child in module._modules.values():
        if child is not None:
            found += parameters(child)
    return found


def in_evaluation(module: _Module, copies: dict[nn.Module, nn.Module] | None = None) -> _Module:
    """Return ``module`` in evaluation mode, as a copy that shares every tensor and hook. The mode of ``module`` stays.

    Another thread may train the module, or change its mode, in the meantime. ``copies`` holds the copies of modules so far,
    because two modules may share a child.
    """
    copies = {} if copies is None else copies
    # copy.copy fails for a parametrised module.
    view = object.__new__(type(module))
    vars(view).update(vars(module), training=False)
    copies[module] = view
    children = dict(vars(module)["_modules"])
    for name, child in children.items():
        if child is not None:
            children[name] = copies[child] if child in copies else in_evaluation(child, copies)
    vars(view)["_modules"] = children
    return view


@functools.lru_cache(maxsize=64)
def _expected(config: LARESConfig) -> list[_Expected]:
    model = reference.without_numbers(config.replace(backbone="transformer"))
    with torch.device("meta"):
        # The name "transformer" may be registered for other blocks by now.
        model.pre_block = TransformerBlock(config, config.n_pre_layers)
        model.recurrence.core = TransformerBlock(config, config.n_core_layers)
    found: list[_Expected] = []
    numbers = {"": 0}
    for path, module in model.named_modules():
        if path:
            parent, _, name = path.rpartition(".")
            numbers[path] = len(numbers)
            parameters = [own for own, value in module._parameters.items() if value is not None]
            found.append(
                _Expected(path, numbers[parent], name, type(module), _settings(module), parameters, list(module._modules))
            )
    return found


def _settings(module: nn.Module) -> dict[str, Any]:
    return {
        name: value
        for name, value in vars(module).items()
        if not name.startswith("_") and name != "training" and isinstance(value, int | float | tuple | str | None)
    }
