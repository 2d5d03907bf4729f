"""``recurrence``: T steps of transformer layers over packed sequences."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lares_fast import reference
from lares_fast._dispatch import Backend, register, run
from lares_fast._errors import InputError
from lares_fast._library import Once, register_op
from lares_fast._numbers import check_dense, choice, flag, number, shown, whole
from lares_fast._random import Draw, drop_threshold
from lares_fast.config import ADAPTERS
from lares_fast.ops import _recurrence_layers, _recurrence_native, _recurrence_triton, _triton
from lares_fast.ops._catalog_checks import check_draw, check_floats
from lares_fast.ops._recurrence_call import BACKENDS, RecurrenceCall, check, check_integers, check_like_h, check_values
from lares_fast.reference.weights import WeightLayout


def recurrence(
    h: Tensor,
    offsets: Tensor,
    weights: Sequence[Tensor],
    *,
    n_heads: int,
    pre: Tensor | None = None,
    adapter: str = "add",
    depth: int | Tensor = 1,
    output: str = "last",
    draw: Draw | None = None,
    dropout: float = 0.0,
    attention_dropout: float | None = None,
    eps: float = 1e-12,
    longest: int | None = None,
    deepest: int | None = None,
    bf16: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Run ``for _ in range(depth): h = layers(norm(adapter(h, pre)))`` over packed sequences.

    The layers are the layers of ``reference.Recurrence``: post-LN, causal within each sequence, with the exact GELU. Without
    ``pre`` a step is ``h = layers(h)``, as in the pre-block. ``native`` computes only the states on which the output depends.

    Args:
        h: [P, D] float, the state before the first step.
        offsets: [B + 1] int64; sequence b is the rows ``offsets[b]:offsets[b + 1]``, at least one.
        weights: ``list(reference.Recurrence(config).parameters())``, or the parameters of a block without ``pre``.
        n_heads: H, a divisor of D.
        pre: [P, D]; the adapter joins it with each state.
        adapter: ``add``, ``concat`` or ``linear``; it is only read if ``pre`` is given.
        depth: T in 1..65,534, one int or int64 [B], on the CPU or on the device of ``h``. Without ``deepest`` the CPU waits for
            a ``depth`` on a GPU if the output is ``steps``, if a gradient is needed, or on the backend ``layers``.
        output: ``last``: the state of each sequence's last token after its last step, [B, D]; ``steps``: the state of each
            sequence's last token after every step, one sequence after the other, [sum of depth, D]; ``tokens``: the state of
            every token after its sequence's last step, [P, D].
        draw: the addresses of the dropout masks. Its ``rows`` [B] are rows of the global batch, on the CPU or on the device of
            ``h``. ``None`` drops nothing. In an address steps count from 1, or without ``pre`` from 0.
        dropout: the probability that a hidden activation is dropped, in [0, 1).
        attention_dropout: the probability that an attention probability is dropped, in [0, 1); ``None`` means ``dropout``.
        eps: the epsilon of the layer norms.
        longest: at least the length of every sequence. It is an integer, so that the CPU does not wait for a GPU. Only
            ``triton`` needs it.
        deepest: at least every depth. It is an integer, so that the CPU does not wait for a ``depth`` on a GPU. With it the
            output ``steps`` is [B * deepest, D]: first the rows as above, and then rows of 0.
        bf16: round the operands of products with weights to bf16; sums and everything else stay in the dtype of ``h``.
            ``triton`` and ``reference`` can do this, and ``native`` without gradients. ``triton`` rounds the operands of the
            attention's products, too. Gradients have the dtype of ``h``. ``native`` multiplies in bf16 if the CPU has AMX or
            AVX512_BF16.
        backend: ``auto`` (default), ``triton`` (fp32, fp16 and bf16 on a GPU, D 64 or 128, the inner size a multiple of 64,
            D/H 16, 32, 64 or 128, ``longest`` up to 128, or up to 64 if products are in fp32), ``native`` (fp32 on the CPU, D a
            multiple of 16 up to 256, the inner size a multiple of 16 up to 65,536, sequences of up to 512 tokens), ``layers``
            (all sizes and dtypes, with PyTorch's layers and :func:`~lares_fast.ops.attention` on packed sequences; ``auto``
            chooses it on GPUs only) or ``reference`` (all sizes and dtypes, on padded sequences).

    Returns:
        The states that ``output`` names, in the dtype of ``h``. ``h``, ``pre`` and all weights have gradients through every
        step; they can be differentiated once.

    Raises:
        InputError: an argument has the wrong shape, dtype, device or range. The values of ``offsets`` and of a tensor ``depth``
            are checked on the CPU only, because a check on a GPU would wait for it. On a GPU ``triton`` returns NaN instead:
            for a sequence that is empty, is longer than ``longest`` or has a depth outside of 1..65534 or above ``deepest``,
            and for all sequences if offsets do not rise from 0 to P. Then all gradients are NaN. ``layers`` and ``reference``
            end in an error of PyTorch, after which the process must be restarted.
        BackendError: the requested backend cannot take these arguments.
    """
    options = {
        "n_heads": n_heads, "pre": pre, "adapter": adapter, "depth": depth, "output": output, "draw": draw, "dropout": dropout,
        "attention_dropout": attention_dropout, "eps": eps, "longest": longest, "deepest": deepest, "bf16": bf16,
        "backend": backend,
    }  # fmt: skip
    out: Tensor = _OP(*_call(h, offsets, weights, options).arguments())[0]
    return out


def _call(h: Tensor, offsets: Tensor, weights: Sequence[Tensor], options: Mapping[str, Any]) -> RecurrenceCall:
    """Build and check the call that the public arguments describe."""
    pre, depth, draw = options["pre"], options["depth"], options["draw"]
    each, steps = (depth, 0) if isinstance(depth, Tensor) and depth.dim() else (None, whole("depth", depth))
    dropout, attention_dropout = number("dropout", options["dropout"]), options["attention_dropout"]
    attention_dropout = dropout if attention_dropout is None else number("attention_dropout", attention_dropout)
    longest, deepest = (None if (x := options[name]) is None else whole(name, x) for name in ("longest", "deepest"))
    layout = _checked_layout(h, pre, weights, options["adapter"])
    check_integers("offsets", offsets, None)
    rows = None if draw is None else check_draw(draw, len(offsets) - 1, h.device, or_cpu=True).rows
    keep = torch.is_grad_enabled() and any(x.requires_grad for x in (h, pre, *weights) if x is not None)
    call = RecurrenceCall(
        h=h,
        pre=pre,
        offsets=offsets,
        depth=each,
        rows=rows,
        seed=None,
        weights=layout.flatten(weights),
        steps=steps,
        n_layers=layout.n_layers,
        inner_size=layout.inner_size,
        n_heads=whole("n_heads", options["n_heads"]),
        adapter=layout.adapter,
        output=options["output"],
        dropout=dropout,
        attention_dropout=attention_dropout,
        eps=number("eps", options["eps"]),
        longest=longest,
        deepest=deepest,
        bf16=flag("bf16", options["bf16"]),
        keep=keep,
        backend=options["backend"],
    )
    check(call)
    drops = draw is not None and (drop_threshold(dropout) or drop_threshold(attention_dropout))
    return replace(call, seed=draw.seed(h.device)) if drops else call


def _checked_layout(h: Tensor, pre: Tensor | None, weights: Sequence[Tensor], adapter: str) -> WeightLayout:
    """Check ``h``, ``pre`` and the weights. Return the layout of the weights."""
    for name, value in (("h", h), *(("pre", x) for x in (pre,) if x is not None)):
        check_dense(name, value)
    check_floats("h", h, 2, "[P, D]")
    if pre is not None:
        choice("adapter", adapter, ADAPTERS)
    if not isinstance(weights, Sequence | torch.nn.ParameterList):
        raise InputError(f"weights must be a list of tensors, but got {shown(weights)}.")
    for weight in weights:
        check_dense("weights", weight)
    layout = WeightLayout.of(weights, "none" if pre is None else adapter, h.shape[1])
    dtype, device = h.dtype, h.device
    for (name, shape), weight in zip(layout.shapes.items(), weights, strict=True):
        if weight.dtype != dtype or weight.device != device or weight.shape != shape:
            check_like_h(name, weight, shape, h)
    return layout


def build_call(h: Tensor, offsets: Tensor, weights: Sequence[Tensor], **options: Any) -> RecurrenceCall:
    """Build and check the call that the arguments of :func:`recurrence` describe."""
    return _call(h, offsets, weights, {**(recurrence.__kwdefaults__ or {}), **options})


def _explained(h: Tensor, offsets: Tensor, weights: Sequence[Tensor], **options: Any) -> RecurrenceCall:
    """Build the call for ``explain``. A missing ``n_heads``, ``pre`` or ``longest`` gets a value that every backend accepts."""
    adapter = WeightLayout.guess_adapter(weights)
    heads = 2 if h.shape[-1] % 2 == 0 else 1
    assumed = {"n_heads": heads, "longest": 1, "pre": None if adapter == "none" else h, "adapter": adapter}
    return build_call(h, offsets, weights, **{**assumed, **options})


def _run(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    call = RecurrenceCall(*arguments)
    check_values(call)
    backend, out, tape = run("recurrence", call.backend, call)
    return out, _no_tape(call) if tape is None else tape, call.h.new_empty(_tag_of(backend), dtype=torch.int32)


def _fake(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    call = RecurrenceCall(*arguments)
    new_size = torch.library.get_ctx().new_dynamic_size
    unknown = call.output == "steps" and call.depth is not None and call.deepest is None
    rows = call.output_rows(new_size() if unknown else call.batch * call.steps)
    # The backend is chosen when the op runs, and every backend has another form of tape.
    tape = call.h.new_empty((new_size(), new_size()), dtype=torch.int32) if call.keep else _no_tape(call)
    return call.h.new_empty(rows, call.width), tape, call.h.new_empty((new_size(), 0), dtype=torch.int32)


def _no_tape(call: RecurrenceCall) -> Tensor:
    # The tape is int32, because PyTorch would expect a gradient for a floating-point result.
    return call.h.new_empty((0, 0), dtype=torch.int32)


def _tag_of(backend: str) -> tuple[int, int]:
    """Return the shape of the operator's third result, from which the backward knows the backend of the forward.

    The host knows a shape without waiting. It would have to wait for a number that is stored on a GPU.
    """
    return BACKENDS.index(backend), 0


def _reference(call: RecurrenceCall) -> Tensor:
    return reference.recurrence(
        call.h,
        call.offsets,
        list(call.weight_layout.cut(call.weights).values()),
        n_heads=call.n_heads,
        pre=call.pre,
        adapter=call.adapter,
        depth=call.depths().to(call.h.device),
        output=call.output,
        draw=call.draw(),
        dropout=call.dropout,
        attention_dropout=call.attention_dropout,
        eps=call.eps,
        deepest=call.deepest,
        bf16=call.bf16,
    )


def _reference_forward(call: RecurrenceCall) -> tuple[Tensor, None]:
    return _reference(call), None


def _reference_backward(call: RecurrenceCall, grad: Tensor, tape: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    with torch.enable_grad():
        h, weights = (x.detach().requires_grad_() for x in (call.h, call.weights))
        pre = None if call.pre is None else call.pre.detach().requires_grad_()
        out = _reference(replace(call, h=h, pre=pre, weights=weights))
        if pre is None:
            h_grad, weights_grad = torch.autograd.grad(out, [h, weights], grad)
            return h_grad, call.empty_gradients()[1], weights_grad
        h_grad, pre_grad, weights_grad = torch.autograd.grad(out, [h, pre, weights], grad)
        return h_grad, pre_grad, weights_grad


_Forward = Callable[[RecurrenceCall], tuple[Tensor, Tensor | None]]


def _named(backend: str, forward: _Forward) -> Callable[[RecurrenceCall], tuple[str, Tensor, Tensor | None]]:
    """Put the name of the backend before the results of its ``forward``."""
    return lambda call: (backend, *forward(call))


def _backends(triton: Any, native: Any, layers: Any, reference: Any) -> tuple[Backend, ...]:
    return (
        Backend("triton", triton, _recurrence_triton.obstacle, note=lambda call, *_: _triton.note("recurrence", call.h)),
        Backend("native", native, _recurrence_native.obstacle),
        Backend("layers", layers, _recurrence_layers.obstacle, _recurrence_layers.not_automatic),
        Backend("reference", reference),
    )


_FORWARDS = (_recurrence_triton.forward, _recurrence_native.forward, _recurrence_layers.forward, _reference_forward)
register("recurrence", *_backends(*map(_named, BACKENDS, _FORWARDS)), build=_explained)
register(
    "recurrence_backward",
    *_backends(_recurrence_triton.backward, _recurrence_native.backward, _recurrence_layers.backward, _reference_backward),
)

# The fields of a call that hold tensors come first: h to weights.
_TENSORS = 7


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.save_for_backward(*output[1:], *inputs[:_TENSORS])
    ctx.rest = inputs[_TENSORS:]
    # Otherwise PyTorch would allocate zeros for the gradients of the tape and the tag, which have none.
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    tape, tag, *tensors = ctx.saved_tensors
    call = RecurrenceCall(*tensors, *ctx.rest)
    if not call.keep:
        raise InputError("this call of recurrence kept nothing for a gradient: call it with gradients enabled.")
    if grad is None:
        return (None,) * RecurrenceCall.count()
    grads = _BACKWARD_OP(*call.arguments(), grad, tape, tag)
    if torch.is_grad_enabled():
        grads = Once.apply("recurrence", len(grads), grad, call.h, call.pre, call.weights, *grads)
    found = {"h": grads[0], "pre": None if call.pre is None else grads[1], "weights": grads[2]}
    return tuple(found.get(name) for name, *_ in RecurrenceCall.layout)


def _run_backward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    *inputs, grad, tape, tag = arguments
    # The backend that ran the forward must run the backward, even if another backend is requested now.
    h_grad, pre_grad, weights_grad = run("recurrence_backward", BACKENDS[len(tag)], RecurrenceCall(*inputs), grad, tape)
    return h_grad, pre_grad, weights_grad


def _fake_backward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    return RecurrenceCall(*arguments[: RecurrenceCall.count()]).empty_gradients()


_OP = register_op(f"recurrence({RecurrenceCall.schema()}) -> (Tensor, Tensor, Tensor)", _run, _fake, _backward, _setup_context)
# The op is registered without no_gradient, because two backends differentiate inside it. Once raises the error for a second
# derivative.
_BACKWARD_OP = register_op(
    f"recurrence_backward({RecurrenceCall.schema(after='Tensor grad, Tensor tape, Tensor tag')}) -> (Tensor, Tensor, Tensor)",
    _run_backward,
    _fake_backward,
)
