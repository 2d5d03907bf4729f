"""Register ops with torch.library, so that a compiler does not trace into them and knows the shapes of their results."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from torch._library.autograd import Info, make_autograd_impl
from torch.autograd import forward_ad

from lares_fast._dispatch import CHOSEN
from lares_fast._errors import InputError

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

    An op has no forward-mode derivative: it raises NotImplementedError for a tensor with a tangent.
    """
    name, run = schema.split("(")[0], without_autocast(run)
    if backward is not None and save is not None:
        save, backward = _same_request(save, backward)
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"lares_fast::{name}", fake, lib=_LIBRARY)
    _LIBRARY.impl(name, _autograd_kernel(name, backward, save), "Autograd", with_keyset=True)
    differentiable = None if backward is None else _function(name, run, backward, save)
    return _Op(getattr(torch.ops.lares_fast, name), run, differentiable)


class _Op:
    """An op, which public functions call.

    PyTorch's dispatcher takes longer than most kernels. It is needed only if something watches or changes calls: a compiler, a
    mode, a profiler, a forward-mode derivative, a transform of functions or a class of tensors. Any other call goes straight to
    the implementation, and to autograd if a tensor needs a gradient.
    """

    def __init__(self, registered: Any, run: Callable[..., Any], differentiable: type[torch.autograd.Function] | None) -> None:
        self._registered, self._run, self._differentiable = registered, run, differentiable

    def __call__(self, *arguments: Any) -> Any:
        if torch.compiler.is_compiling() or _watched():
            return self._registered(*arguments)
        direct, needs_gradient = True, False
        for value in arguments:
            kind = type(value)
            if kind is Tensor or kind is torch.nn.Parameter:
                # The memory of such a tensor does not hold its values.
                direct = direct and not (value.is_neg() or value._is_zerotensor() or value.is_meta)
                needs_gradient = needs_gradient or value.requires_grad
            elif kind not in _PLAIN:
                direct = False
                needs_gradient = needs_gradient or getattr(value, "requires_grad", False)
        needs_gradient = needs_gradient and torch.is_grad_enabled()
        if needs_gradient or not direct:
            self._check(arguments, needs_gradient)
        if direct and not needs_gradient:
            return self._run(*arguments)
        if direct and self._differentiable is not None:
            return self._differentiable.apply(*arguments)
        return self._registered(*arguments)

    def _check(self, arguments: tuple[Any, ...], needs_gradient: bool) -> None:
        """Raise :class:`InputError` for a tensor without values, and for one that autograd could not keep."""
        for at, value in enumerate(arguments):
            if isinstance(value, Tensor) and (value.is_meta or (needs_gradient and value.is_inference())):
                name = self._registered.default._schema.arguments[at].name
                if value.is_meta:
                    raise InputError(f"{name} must be a tensor with values, but is on the device meta, which has none.")
                raise InputError(f"{name} was made in inference mode, so a call with gradients cannot take it: clone it.")


def _autograd_kernel(name: str, backward: Callable[..., Any] | None, save: Callable[..., None] | None) -> Callable[..., Any]:
    """Return what the dispatcher calls first for the op ``name``; the arguments are as in :func:`register_op`.

    ``torch.library.register_autograd`` registers the same without the check. It ignores tangents, so that a forward-mode
    derivative would silently be zero.
    """
    op = getattr(torch.ops.lares_fast, name).default
    differentiable = None if backward is None else make_autograd_impl(op, Info(backward, save))

    def kernel(keyset: Any, *arguments: Any) -> Any:
        # Inside a transform of functions, only this kernel sees the tensors that carry the tangents.
        if forward_ad._current_level >= 0 and any(map(_has_tangent, arguments)):
            raise NotImplementedError(
                f"{name} has no forward-mode derivative: use a derivative in reverse mode, such as torch.autograd.grad, or the "
                "function of lares_fast.reference."
            )
        if differentiable is not None:
            return differentiable(keyset, *arguments)
        # Autograd stays active inside the op.
        return op.redispatch(keyset & torch._C._after_autograd_keyset, *arguments)

    return kernel


def _has_tangent(value: Any) -> bool:
    return isinstance(value, Tensor) and forward_ad.unpack_dual(value).tangent is not None


_PLAIN = {int, float, bool, str, type(None)}


def _watched() -> bool:
    """Return whether a mode, a profiler, a tracer, a forward-mode derivative or a transform of functions is active."""
    state: Any = torch._C
    return bool(
        forward_ad._current_level >= 0
        or state._len_torch_dispatch_stack()
        or state._len_torch_function_stack()
        or state._are_functorch_transforms_active()
        or state._get_tracing_state()
        or state._autograd._profiler_enabled()
    )


def _function(
    name: str, run: Callable[..., Any], backward: Callable[..., Any], save: Callable[..., None] | None
) -> type[torch.autograd.Function]:
    """Return the op ``name`` as autograd calls it without the dispatcher; the arguments are as in :func:`register_op`."""

    def forward(ctx: Any, *arguments: Any) -> Any:
        output = run(*arguments)
        if save is not None:
            save(ctx, arguments, output)
        return output

    return type(name, (torch.autograd.Function,), {"forward": staticmethod(forward), "backward": staticmethod(backward)})


def _same_request(save: Callable[..., None], backward: Callable[..., Any]) -> tuple[Callable[..., None], Callable[..., Any]]:
    """Return both functions, changed so that the backward requests the backend that its forward requested.

    The backward of a GPU runs in a thread of autograd, which does not know what the thread of the forward requested.
    """

    def keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.requested = CHOSEN.get()
        save(ctx, inputs, output)

    def again(ctx: Any, *grads: Any) -> Any:
        token = CHOSEN.set(ctx.requested)
        try:
            return backward(ctx, *grads)
        finally:
            CHOSEN.reset(token)

    return keep, again


def without_autocast(run: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``run`` with autocast disabled: it computes in the dtypes of its tensors.

    A backward does not run under the autocast of its forward, so the two would compute in different dtypes.
    """

    @functools.wraps(run)
    def plain(*arguments: Any) -> Any:
        # This question is asked at every call, and it is cheaper than the next two.
        if not torch._C._is_any_autocast_enabled():
            return run(*arguments)
        active = [device for device in _AUTOCAST_DEVICES if torch.is_autocast_enabled(device)]
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
