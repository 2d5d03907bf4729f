"""Registration of ops with torch.library: opaque to compilers, with shapes known to fake tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

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
    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"lares_fast::{name}", fake, lib=_LIBRARY)
    if backward is not None:
        torch.library.register_autograd(f"lares_fast::{name}", backward, setup_context=save, lib=_LIBRARY)
    return getattr(torch.ops.lares_fast, name)


def no_gradient(op: str, instead: str) -> Callable[..., Any]:
    """A backward that refuses, naming the op to use instead."""

    def backward(*_: Any) -> Any:
        raise NotImplementedError(f"{op} has no gradient: {instead}.")

    return backward
