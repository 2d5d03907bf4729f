"""Registration of ops with torch.library: opaque to compilers, with shapes known to fake tensors."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

_AUTOCAST_DEVICES = ("cpu", "cuda")

# Library.define + impl costs under a millisecond; torch.library.custom_op imports the compiler on its first call.
_LIBRARY = torch.library.Library("lares_fast", "DEF")


def register_op(
    schema: str,
    run: Callable[..., Any],
    fake: Callable[..., Any],
    backward: Callable[..., Any] | None = None,
    save: Callable[..., None] | None = None,
) -> Any:
    """Define ``schema`` ("name(args) -> results") with its implementation, its fake and its backward; return the op.

    ``backward(ctx, *grads)`` returns one gradient per input, from what ``save(ctx, inputs, output)`` kept. An op that has no
    gradient raises there, or is itself a backward and has none.
    """
    name = schema.split("(")[0]
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, without_autocast(run), "CompositeExplicitAutograd")
    torch.library.register_fake(f"lares_fast::{name}", fake, lib=_LIBRARY)
    if backward is not None:
        torch.library.register_autograd(f"lares_fast::{name}", backward, setup_context=save, lib=_LIBRARY)
    return getattr(torch.ops.lares_fast, name)


def without_autocast(run: Callable[..., Any]) -> Callable[..., Any]:
    """``run`` in the dtypes of its tensors, whatever autocast its caller has: a backward would not have that of its forward."""

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
    """A backward that refuses, naming the op to use instead."""

    def backward(*_: Any) -> Any:
        raise NotImplementedError(f"{op} has no gradient: {instead}.")

    return backward


class Once(torch.autograd.Function):
    """``Once.apply(op, count, *inputs, *gradients)``: the last ``count``, whose own differentiation is refused.

    For a backward that is no op with a :func:`no_gradient`: without it a second derivative would be lost in silence.
    """

    @staticmethod
    def forward(ctx: Any, op: str, count: int, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        """The gradients as they are."""
        ctx.op = op
        return tuple(None if x is None else x.view_as(x) for x in tensors[-count:])

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        """Refused."""
        raise NotImplementedError(f"{ctx.op} can be differentiated once, and not twice.")
