"""Register ops with torch.library, so that a compiler does not trace into them and knows the shapes of their results."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

_AUTOCAST_DEVICES = ("cpu", "cuda")

# Library.define and impl take less than a millisecond. torch.library.custom_op would import the compiler on its first call.
_LIBRARY = torch.library.Library("lares_fast", "DEF")


def register_op(
    schema: str,
    run: Callable[..., Any],
    fake: Callable[..., Any],
    backward: Callable[..., Any] | None = None,
    save: Callable[..., None] | None = None,
) -> Any:
    """Define an op and return it.

    Args:
        schema: "name(arguments) -> results".
        run: the implementation.
        fake: returns empty results of the right shapes, for compilers.
        backward: ``backward(ctx, *grads)`` returns one gradient for each argument. An op without a gradient gives
            :func:`no_gradient` here. An op that is itself a backward may give ``None``.
        save: ``save(ctx, inputs, output)`` keeps the values that ``backward`` needs.
    """
    name = schema.split("(")[0]
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, without_autocast(run), "CompositeExplicitAutograd")
    torch.library.register_fake(f"lares_fast::{name}", fake, lib=_LIBRARY)
    if backward is not None:
        torch.library.register_autograd(f"lares_fast::{name}", backward, setup_context=save, lib=_LIBRARY)
    return getattr(torch.ops.lares_fast, name)


def without_autocast(run: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``run`` with autocast disabled: it computes in the dtypes of its tensors.

    A backward does not run under the autocast of its forward, so the two would compute in different dtypes.
    """

    @functools.wraps(run)
    def plain(*arguments: Any) -> Any:
        active = [device for device in _AUTOCAST_DEVICES if torch.is_autocast_enabled(device)]
        if not active:
            return run(*arguments)
        with ExitStack() as stack:
            for device in active:
                stack.enter_context(torch.autocast(device, enabled=False))
            return run(*arguments)

    return plain


def no_gradient(op: str, instead: str) -> Callable[..., Any]:
    """Return a backward that raises NotImplementedError. ``instead`` is a clause that says what to do."""

    def backward(*_: Any) -> Any:
        raise NotImplementedError(f"{op} has no gradient: {instead}.")

    return backward


class Once(torch.autograd.Function):
    """Raise an error for a second derivative: ``Once.apply(op, count, *inputs, *gradients)`` returns the ``count`` gradients.

    A backward op that is registered without :func:`no_gradient` needs this. Otherwise a second derivative would silently be
    wrong.
    """

    @staticmethod
    def forward(ctx: Any, op: str, count: int, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        """Return the gradients unchanged."""
        ctx.op = op
        return tuple(None if x is None else x.view_as(x) for x in tensors[-count:])

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        """Raise NotImplementedError."""
        raise NotImplementedError(f"{ctx.op} can be differentiated only once.")
