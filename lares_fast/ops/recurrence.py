"""``recurrence``: T steps of transformer layers over packed sequences."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from lares_fast import reference
from lares_fast._dispatch import Backend, register, run
from lares_fast._errors import InputError
from lares_fast._library import Once, register_op
from lares_fast._numbers import number, whole
from lares_fast._random import MOST_STEPS, Draw
from lares_fast.config import ADAPTERS
from lares_fast.ops import _recurrence_layers, _recurrence_native, _recurrence_triton, _triton
from lares_fast.ops._catalog_checks import check_dense

_WEIGHTS_A_LAYER = 16
_CPU = torch.device("cpu")


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
    bf16: bool = False,
    backend: str | None = None,
) -> Tensor:
    """``for _ in range(depth): h = layers(norm(adapter(h, pre)))`` over sequences that stand one behind the other.

    The layers are those of ``reference.Recurrence``: post-LN, causal within each sequence, exact GELU. Without ``pre`` a
    step is ``h = layers(h)``, which is a pre-block. Only what the output depends on is computed.

    Args:
        h: [P, D] float, the state before the first step.
        offsets: [B + 1] int64; sequence b is the rows ``offsets[b]:offsets[b + 1]``, at least one.
        weights: ``list(reference.Recurrence(config).parameters())``, or those of a block without ``pre``.
        n_heads: H, a divisor of D.
        pre: [P, D], what the adapter joins with each state.
        adapter: ``add``, ``concat`` or ``linear``; only read where ``pre`` is given.
        depth: T in 1..65,534, one int or int64 [B]; on the CPU, or where ``h`` is: then ``steps``, gradients and ``layers``
            wait for it.
        output: ``last``: the state of each sequence's last token after its last step, [B, D]; ``steps``: the same after every
            step, one sequence behind the other, [sum of depth, D]; ``tokens``: all states after the last step, [P, D].
        draw: the addresses of the dropout masks, whose ``rows`` are the B rows of the global batch, on the CPU or where ``h``
            is; ``None`` drops nothing. Steps count from 1, without ``pre`` from 0.
        dropout, attention_dropout: in [0, 1); ``None`` means "as dropout".
        eps: of the layer norms.
        longest: at least the length of every sequence; an integer, so that no GPU is waited for. Only ``triton`` needs it.
        bf16: round the operands of products with weights to bf16; sums and everything else stay in the dtype of ``h``. Without
            gradients, by ``native`` and ``reference``; ``native`` multiplies in bf16 where the CPU has AMX or AVX512_BF16.
        backend: ``auto`` (default), ``triton`` (fp32, fp16 and bf16 on a GPU, D 64 or 128, the inner size a multiple of 64,
            ``longest`` up to 128, in fp32 64), ``native`` (fp32 on the CPU, D a multiple of 16 up to 256, the inner size
            a multiple of 16, sequences of up to 512 tokens), ``layers`` (anything, packed, by PyTorch's layers and
            :func:`~lares_fast.ops.attention`; ``auto`` takes it on GPUs only) or ``reference`` (anything, padded).

    Gradients: of ``h``, ``pre`` and all weights, through every step, once.

    Raises:
        InputError: an argument has the wrong shape, dtype, device or range. The values of ``offsets`` and of a ``depth`` of
            each sequence's own are checked on the CPU only, because a check on a GPU would wait for it. There ``triton``
            answers NaN: for a sequence that is empty, longer than ``longest`` or has a depth outside of 1..65534, and
            for all if offsets do not rise from 0 to P. Then all gradients are NaN. ``layers`` and ``reference`` end in
            an error of PyTorch, after which the process must start again.
        BackendError: the backend asked for by name cannot take these arguments.
    """
    each, all_alike = (depth, 0) if isinstance(depth, Tensor) and depth.dim() else (None, whole("depth", depth))
    rows, key = (None, [0, 0]) if draw is None else (draw.rows, list(draw.key))
    dropout = number("dropout", dropout)
    rates = [dropout, dropout if attention_dropout is None else number("attention_dropout", attention_dropout)]
    joined_by = "none" if pre is None else adapter
    longest = None if longest is None else whole("longest", longest)
    numbers = (all_alike, key, rates, whole("n_heads", n_heads), joined_by, output, number("eps", eps), longest, bf16)
    call = _Call(h, pre, offsets, each, rows, list(weights), *numbers)
    _check(call)
    keep = torch.is_grad_enabled() and any(x.requires_grad for x in (h, pre, *weights) if x is not None)
    if bf16 and keep:
        raise InputError("bf16 has no gradient: call under torch.no_grad(), or leave bf16 out.")
    out: Tensor = _OP(*call.arguments(), keep, backend)[0]
    return out


@dataclass(frozen=True)
class _Call:
    """The arguments that forward and backward share, in the order of their schemas: first those that are tensors."""

    h: Tensor
    pre: Tensor | None
    offsets: Tensor
    depth: Tensor | None
    rows: Tensor | None
    weights: list[Tensor]
    # Of every sequence, where there is no `depth`.
    steps: int
    key: list[int]
    dropout: list[float]
    n_heads: int
    adapter: str
    output: str
    eps: float
    longest: int | None
    bf16: bool = False

    def arguments(self) -> tuple[Any, ...]:
        return tuple(getattr(self, field.name) for field in fields(self))

    def tensors(self) -> list[Tensor]:
        """Those that have gradients."""
        return [self.h, *([] if self.pre is None else [self.pre]), *self.weights]

    def depths(self) -> Tensor:
        """T of every sequence, [B]."""
        return self.depth if self.depth is not None else self.offsets.new_full((len(self.offsets) - 1,), self.steps)

    def draw(self) -> Draw | None:
        return None if self.rows is None else Draw((self.key[0], self.key[1]), self.rows)

    @property
    def layers(self) -> int:
        """How many layers the weights have."""
        return len(self.weights) // _WEIGHTS_A_LAYER

    def output_rows(self, total_depth: _Rows) -> _Rows:
        rows: dict[str, _Rows] = {"last": len(self.offsets) - 1, "steps": total_depth, "tokens": len(self.h)}
        return rows[self.output]


# In a compiler's trace some numbers of rows are symbols.
_Rows = int | torch.SymInt


# h to weights.
_TENSORS = 6
_SCHEMA = (
    "Tensor h, Tensor? pre, Tensor offsets, Tensor? depth, Tensor? rows, Tensor[] weights, int steps, int[] key,"
    " float[] dropout, int n_heads, str adapter, str output, float eps, int? longest, bool bf16"
)


def _check(call: _Call) -> None:
    h, offsets = call.h, call.offsets
    for name, value in (("h", h), *(("pre", x) for x in (call.pre,) if x is not None), *(("weights", x) for x in call.weights)):
        check_dense(name, value)
    if h.dim() != 2 or not h.dtype.is_floating_point:
        raise InputError(f"h must be a floating-point [P, D], but got {h.dtype} {list(h.shape)}.")
    if call.pre is not None and call.adapter not in ADAPTERS:
        raise InputError(f"adapter must be one of {', '.join(ADAPTERS)}, but got {call.adapter!r}.")
    if call.output not in _recurrence_native.OUTPUTS:
        raise InputError(f"output must be one of {', '.join(_recurrence_native.OUTPUTS)}, but got {call.output!r}.")
    if call.n_heads < 1 or h.shape[1] % call.n_heads:
        raise InputError(f"n_heads must divide the width of h, {h.shape[1]}, but got {call.n_heads}.")
    for name, rate in zip(("dropout", "attention_dropout"), call.dropout, strict=True):
        if not 0 <= rate < 1:
            raise InputError(f"{name} must be in [0, 1), but got {rate}.")
    _check_integers("offsets", offsets, None)
    if not len(offsets):
        raise InputError("offsets must have B + 1 entries, but are empty.")
    for name, vector in (("depth", call.depth), ("draw.rows", call.rows)):
        if vector is not None:
            _check_integers(name, vector, len(offsets) - 1)
    if offsets.device != h.device:
        raise InputError(f"offsets must be on {h.device} like h, but are on {offsets.device}.")
    for name, vector in (("depth", call.depth), ("draw.rows", call.rows)):
        if vector is not None and vector.device not in (h.device, _CPU):
            raise InputError(f"{name} must be on the CPU or on {h.device} like h, but is on {vector.device}.")
    if call.depth is None and not 1 <= call.steps <= MOST_STEPS:
        raise InputError(f"depth must be at least 1 and at most {MOST_STEPS:,}, but got {call.steps}.")
    if call.pre is not None:
        _check_like_h(call, "pre", call.pre, tuple(h.shape))
    for (name, shape), weight in zip(_shapes(call), call.weights, strict=True):
        _check_like_h(call, name, weight, shape)


def _check_integers(name: str, vector: Tensor, length: int | None) -> None:
    wanted = "[B + 1]" if length is None else f"[{length}] as offsets say"
    if not isinstance(vector, Tensor):
        raise InputError(f"{name} must be int64 {wanted}, but got {type(vector).__name__}.")
    if vector.dim() != 1 or vector.dtype != torch.int64 or (length is not None and len(vector) != length):
        raise InputError(f"{name} must be int64 {wanted}, but got {vector.dtype} {list(vector.shape)}.")


def _check_like_h(call: _Call, name: str, value: Tensor, shape: tuple[int, ...]) -> None:
    h = call.h
    if value.dtype != h.dtype or value.device != h.device or value.shape != torch.Size(shape):
        raise InputError(
            f"{name} must be {h.dtype} {list(shape)} on {h.device} like h, "
            f"but got {value.dtype} {list(value.shape)} on {value.device}."
        )


def _shapes(call: _Call) -> list[tuple[str, tuple[int, ...]]]:
    """Name and shape of every weight, as the reference's parameters are ordered."""
    width = call.h.shape[1]
    joining: list[tuple[str, tuple[int, ...]]] = []
    if call.adapter == "concat":
        joining = [("adapter.linear.weight", (width, 2 * width)), ("adapter.linear.bias", (width,))]
    if call.adapter == "linear":
        joining = [("adapter.gate", ())]
    if call.adapter != "none":
        joining = [*joining, ("norm.weight", (width,)), ("norm.bias", (width,))]
    layers, rest = divmod(len(call.weights) - len(joining), _WEIGHTS_A_LAYER)
    if layers < 1 or rest:
        raise InputError(
            f"weights must be the {len(joining)} of the adapter and its norm and {_WEIGHTS_A_LAYER} of each layer, "
            f"but there are {len(call.weights)}."
        )
    up = call.weights[len(joining) + 10]
    inner = up.shape[0] if up.dim() else 0
    layer: list[tuple[str, tuple[int, ...]]] = []
    for name, out, into in (
        ("attention.query", width, width), ("attention.key", width, width), ("attention.value", width, width),
        ("attention.output", width, width), ("attention.norm", width, 0),
        ("feed_forward.up", inner, width), ("feed_forward.down", width, inner), ("feed_forward.norm", width, 0),
    ):  # fmt: skip
        layer += [(f"{name}.weight", (out, into) if into else (out,)), (f"{name}.bias", (out,))]
    return joining + [(f"layers.{i}.{name}", shape) for i in range(layers) for name, shape in layer]


def _run(*arguments: Any) -> tuple[Tensor, Tensor]:
    *inputs, keep, backend = arguments
    call = _Call(*inputs)
    _check_values(call)
    out, tape = run("recurrence", backend, call.h, call.offsets, call.weights, call, keep)
    return out, _no_tape(call) if tape is None else tape


def _check_values(call: _Call) -> None:
    if call.depth is not None and call.depth.device == _CPU and len(call.depth):
        least, most = int(call.depth.min()), int(call.depth.max())
        if not 1 <= least <= most <= MOST_STEPS:
            raise InputError(f"depth must be at least 1 and at most {MOST_STEPS:,}, but spans {least}..{most}.")
    if call.offsets.device != _CPU:
        return
    lengths = call.offsets.diff()
    if int(call.offsets[0]) != 0 or int(call.offsets[-1]) != len(call.h) or bool((lengths < 1).any()):
        raise InputError(f"offsets must rise from 0 to the number of tokens, {len(call.h)}, by at least 1 a sequence.")
    if call.longest is not None and bool((lengths > call.longest).any()):
        raise InputError(f"longest must be at least every length, up to {int(lengths.max())}, but got {call.longest}.")


def _fake(*arguments: Any) -> tuple[Tensor, Tensor]:
    *inputs, keep, _ = arguments
    call = _Call(*inputs)
    new_size = torch.library.get_ctx().new_dynamic_size
    unknown = call.output == "steps" and call.depth is not None
    rows = call.output_rows(new_size() if unknown else (len(call.offsets) - 1) * call.steps)
    # The backend is chosen when the op runs, and each has a tape of its own.
    tape = call.h.new_empty((new_size(), new_size()), dtype=torch.int32) if keep else _no_tape(call)
    return call.h.new_empty(rows, call.h.shape[1]), tape


def _no_tape(call: _Call) -> Tensor:
    # Opaque: as floating-point numbers it would be taken for a result that has a gradient.
    return call.h.new_empty((0, 0), dtype=torch.int32)


def _reference(call: _Call) -> Tensor:
    return reference.recurrence(
        call.h,
        call.offsets,
        call.weights,
        n_heads=call.n_heads,
        pre=call.pre,
        adapter="add" if call.pre is None else call.adapter,
        depth=call.depths().to(call.h.device),
        output=call.output,
        draw=call.draw(),
        dropout=call.dropout[0],
        attention_dropout=call.dropout[1],
        eps=call.eps,
        bf16=call.bf16,
    )


def _reference_forward(call: _Call, keep: bool) -> tuple[Tensor, None]:
    return _reference(call), None


def _reference_backward(call: _Call, grad: Tensor, tape: Tensor) -> list[Tensor]:
    with torch.enable_grad():
        inputs = [x.detach().requires_grad_() for x in call.tensors()]
        count = len(inputs) - len(call.weights)
        fresh = replace(call, h=inputs[0], pre=inputs[1] if count == 2 else None, weights=inputs[count:])
        return list(torch.autograd.grad(_reference(fresh), inputs, grad))


def _of_call(run: Callable[..., Any]) -> Callable[..., Any]:
    """``run(call, ...)`` as dispatch calls it: behind the arguments that ``explain`` is given too."""
    return lambda h, offsets, weights, *rest: run(*rest)


for _op, *_runs in (
    ("recurrence", _recurrence_triton.forward, _recurrence_native.forward, _recurrence_layers.forward, _reference_forward),
    (
        "recurrence_backward",
        _recurrence_triton.backward, _recurrence_native.backward, _recurrence_layers.backward, _reference_backward,
    ),
):  # fmt: skip
    _triton_run, _native_run, _layers_run, _reference_run = map(_of_call, _runs)
    register(
        _op,
        Backend("triton", _triton_run, _recurrence_triton.obstacle, note=lambda h, *_: _triton.note("recurrence", h)),
        Backend("native", _native_run, _recurrence_native.obstacle),
        Backend("layers", _layers_run, _recurrence_layers.obstacle, _recurrence_layers.unasked),
        Backend("reference", _reference_run, lambda *_: None),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, weights = inputs[:_TENSORS]
    *ctx.rest, ctx.keep, _ = inputs[_TENSORS:]
    ctx.save_for_backward(output[1], *tensors, *weights)
    # PyTorch would make zeros as large as the tape, as the gradient of what has none.
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Any, ...]:
    if not ctx.keep:
        raise InputError("recurrence was called without keep, so it has no gradient.")
    tape, *saved = ctx.saved_tensors
    tensors, weights = saved[: _TENSORS - 1], saved[_TENSORS - 1 :]
    call = _Call(*(*tensors, weights, *ctx.rest))
    grads = [None] * len(call.tensors()) if grad is None else _BACKWARD_OP(*call.arguments(), grad, tape)
    if torch.is_grad_enabled() and grad is not None:
        grads = list(Once.apply("recurrence", len(grads), grad, *call.tensors(), *grads))
    count = len(grads) - len(weights)
    by_name = {"h": grads[0], "pre": grads[1] if count == 2 else None, "weights": grads[count:]}
    return *(by_name.get(field.name) for field in fields(call)), None, None


def _run_backward(*arguments: Any) -> list[Tensor]:
    *inputs, grad, tape = arguments
    call = _Call(*inputs)
    # The backend that ran forwards, whatever is asked for by now: its tape says which, and the reference leaves none.
    backend = "reference"
    if len(tape):
        columns = {_recurrence_triton.tape_columns(call.h): "triton", _recurrence_layers.TAPE_COLUMNS: "layers"}
        backend = columns.get(tape.shape[1], "native")
    result: list[Tensor] = run("recurrence_backward", backend, call.h, call.offsets, call.weights, call, grad, tape)
    return result


def _fake_backward(*arguments: Any) -> list[Tensor]:
    *inputs, _, _ = arguments
    return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in _Call(*inputs).tensors()]


_OP = register_op(f"recurrence({_SCHEMA}, bool keep, str? backend) -> (Tensor, Tensor)", _run, _fake, _backward, _setup_context)
# Without autograd's knowledge, which two backends need inside it; Once refuses a second derivative.
_BACKWARD_OP = register_op(
    f"recurrence_backward({_SCHEMA}, Tensor grad, Tensor tape) -> Tensor[]", _run_backward, _fake_backward
)
