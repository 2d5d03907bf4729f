"""Run random calls of the ops, and compare what they do with the reference."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from lares_fast import ops
from lares_fast._errors import BackendError, LaresFastError
from lares_fast.ops._pack import pack
from lares_fast.verify.tolerance import ROUNDING, judge
from tests.reliability.fuzzing.model_examples import MODEL_FUNCTIONS
from tests.reliability.fuzzing.values import Example, Floats

_LONGEST_MESSAGE = 1000
# The largest upstream gradient is about this.
UPSTREAM = 3.0
RANKS = ("target_rank", "target_logprob_and_rank")
SOFTMAX = ("linear_cross_entropy", "target_logprob", "target_logprob_and_rank")

# The functions, and the arguments of each whose gradients are compared.
FUNCTIONS: dict[str, Callable[..., Any]] = {
    name: getattr(ops, name) for name in ops.__all__ if name not in ("backend", "explain")
}
FUNCTIONS["pack"] = pack
FUNCTIONS |= MODEL_FUNCTIONS
DIFFERENTIABLE = {
    "linear_cross_entropy": ("hidden", "items"),
    "target_logprob": ("hidden", "items"),
    "target_logprob_and_rank": ("hidden", "items"),
    "attention": ("query", "key", "value"),
    "embedding": ("item_table", "position_table", "weight", "bias"),
    "recurrence": ("h", "pre", "weights"),
}


def sentence_fault(text: str) -> str | None:
    """Return what keeps ``text`` from being one printable sentence of a reasonable length, or ``None``."""
    if not text.endswith((".", "?")) or len(text) > _LONGEST_MESSAGE or not text.isprintable():
        return f"the message is not one sentence: {text[:300]!r}"
    return None


def fault(example: Example) -> str | None:
    """Run the call, and return what is wrong with its outcome, or ``None``."""
    try:
        result = run(example)
    except LaresFastError as error:
        return _error_fault(example, error)
    except Exception as error:
        return f"raised {type(error).__name__}: {str(error)[:200]!r}"
    if example.refused:
        return "accepted an argument that must be refused"
    return _difference(example, result)


def _error_fault(example: Example, error: LaresFastError) -> str | None:
    message = str(error)
    if (found := sentence_fault(message)) is not None:
        return found
    if example.right and not isinstance(error, BackendError) and "inference mode" not in message:
        return f"refused a valid call: {message}"
    if not isinstance(error, BackendError) and not any(name[:6] in message for name in (*example.arguments, "index")):
        return f"the message names no argument: {message}"
    return None


class Result:
    """The tensors that a call returns, and the gradients of its arguments."""

    def __init__(self, found: Any, gradients: Mapping[str, Tensor]) -> None:
        values = {f"result {at}": x for at, x in enumerate(found if isinstance(found, tuple) else (found,))}
        tensors = {name: x.detach() for name, x in values.items() if isinstance(x, Tensor)}
        self.forward = {name: x for name, x in tensors.items() if x.dtype.is_floating_point}
        self.exact = {name: x for name, x in tensors.items() if not x.dtype.is_floating_point}
        self.gradients = dict(gradients)


def run(example: Example, dtype: str | None = None, **changes: Any) -> Result:
    """Return what the call returns, in ``dtype`` if it is given, with ``changes`` of its arguments."""
    arguments = example.make(dtype)
    _add_index(example, arguments)
    arguments |= changes
    if dtype is not None and example.name in MODEL_FUNCTIONS:
        arguments["dtype"] = dtype
    leaves = _leaves(example, arguments)
    found = FUNCTIONS[example.name](**arguments)
    if not leaves:
        return Result(found, {})
    out = found[0] if isinstance(found, tuple) else found
    if not out.requires_grad:
        return Result(found, {})
    seed = torch.Generator().manual_seed(len(str(example.name)) + out.numel())
    upstream = torch.randn(out.shape, generator=seed, dtype=torch.float32)
    rounded = upstream.to(getattr(torch, _dtype(example))).to(out.dtype)
    grads = torch.autograd.grad(out, list(leaves.values()), rounded, allow_unused=True)
    return Result(found, {name: grad for name, grad in zip(leaves, grads, strict=True) if grad is not None})


def _dtype(example: Example) -> str:
    return next((value.dtype for value in example.arguments.values() if isinstance(value, Floats)), "float32")


def _add_index(example: Example, arguments: dict[str, Any]) -> None:
    kind = example.notes.get("index")
    if kind is None or not isinstance(arguments.get("items"), Tensor) or arguments["items"].dtype != torch.float32:
        return
    items = arguments["items"]
    arguments["index"] = ops.CatalogIndex(items.clone() if kind == "other" else items)
    if kind == "stale":
        items.add_(1)


def _leaves(example: Example, arguments: dict[str, Any]) -> dict[str, Tensor]:
    """Ask for the gradients of the arguments in every second valid call, and return these by name."""
    if not example.right or (hash_of := sum(map(ord, str(example)))) % 2:
        return {}
    leaves: dict[str, Tensor] = {}
    for name in DIFFERENTIABLE.get(example.name, ()):
        value = arguments.get(name)
        found = {f"{name}[{i}]": x for i, x in enumerate(value)} if isinstance(value, list) else {name: value}
        for part, x in found.items():
            # Some of the arguments have no gradient.
            if isinstance(x, Tensor) and not x.is_inference() and (hash_of := hash_of * 7 // 3 + 1) % 5:
                leaves[part] = x.requires_grad_() if x.is_leaf else x
    return leaves


def _difference(example: Example, result: Result) -> str | None:
    """Return how ``result`` differs from the results of the reference, or ``None``."""
    if "backend" not in example.arguments:
        return None
    try:
        twin = run(example, backend="reference", **({"index": None} if "index" in example.notes else {}))
    except Exception as error:
        return f"the reference raised {type(error).__name__} where the call gave a result: {str(error)[:200]!r}"
    for name in twin.exact:
        if not torch.equal(result.exact[name], twin.exact[name]) and (why := _inexact(example, name, result, twin)):
            return why
    for kind in ("forward", "gradients"):
        found, expected = getattr(result, kind), getattr(twin, kind)
        if found.keys() != expected.keys():
            return f"{kind} of {sorted(found)} instead of {sorted(expected)}"
        if all(_same(found[name], expected[name]) for name in found):
            continue
        if (why := _out_of_tolerance(example, kind, found, expected)) is not None:
            return why
    return None


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and bool(((a == b) | (a.isnan() & b.isnan())).all())


def _within_rounding(example: Example, scores: Tensor, truth: Tensor) -> bool:
    """Return whether scores differ by no more than their sums can round, for the size of the terms: sums may cancel."""
    arguments = example.make("float64")
    terms = (arguments["query"].abs() @ arguments["items"].abs().T).amax(dim=1, keepdim=True)
    if arguments.get("bias") is not None:
        terms = terms + arguments["bias"].abs().max()
    most = (arguments["query"].shape[1] + 2) * torch.finfo(scores.dtype).eps * terms
    return bool((((scores.double() - truth).abs() <= most) | (scores == truth)).all())


def _all_finite(example: Example) -> bool:
    arguments = example.make()
    return all(bool(arguments[name].isfinite().all()) for name in ("hidden", "items"))


def _within_terms(
    example: Example, kind: str, found: dict[str, Tensor], truth: dict[str, Tensor], finite: dict[str, Tensor]
) -> bool:
    """Return whether gradients differ by the roundings of the largest term of their sums: the sums may cancel.

    The error of a sum of n rounded terms grows with the square root of n.
    """
    if kind != "gradients":
        return False
    arguments = example.make("float64")
    scale = float(arguments.get("scale", 1.0))
    other = {"hidden": arguments["items"], "items": arguments["hidden"]}
    for name, x in found.items():
        rows = 1 if name == "hidden" else arguments["target"].numel()
        dtype = torch.finfo(x.dtype)
        roundings = 4 + (len(arguments["items"]) if name == "hidden" else rows) ** 0.5
        most = other[name].nan_to_num(0.0, 0.0, 0.0).abs().max() * scale * UPSTREAM * rows
        error = (x.double() - truth[name])[finite[name]].abs()
        if error.numel() and error.max() > roundings * dtype.eps * (most + dtype.smallest_normal):
            return False
    return True


def _nearly(x: Tensor, truth: Tensor) -> bool:
    """Return whether ``x`` differs from ``truth`` by no more than a few of the smallest normal numbers."""
    return not x.numel() or bool((x.double() - truth).abs().max() <= 4 * torch.finfo(x.dtype).smallest_normal)


def _inexact(example: Example, name: str, result: Result, twin: Result) -> str | None:
    """Return how integers differ. Where sums are rounded, two backends may order nearly equal scores in two ways."""
    fills = {value.fill for value in example.arguments.values() if isinstance(value, Floats)}
    found, expected = (values.exact[name].flatten() for values in (result, twin))
    rounded = fills & {"normal", "huge", "tiny"} and result.exact[name].shape == twin.exact[name].shape
    if not rounded or (example.name in RANKS and not _is_possible_rank(example, name, found)):
        return f"{name} differs: {found[:20].tolist()} instead of {expected[:20].tolist()}"
    return None


def _is_possible_rank(example: Example, name: str, rank: Tensor) -> bool:
    """Return whether each rank follows from scores that differ from the exact ones by what their sums can round."""
    arguments = example.make("float64")
    query, items, target = (arguments.get(key) for key in ("query", "items", "target"))
    if query is None:
        query = arguments["hidden"]
    if items.dim() == 3:
        return True
    query, target = query.reshape(target.numel(), items.shape[1])[: len(rank)], target.flatten()[: len(rank), None]
    scores, bias = query @ items.T, arguments.get("bias")
    terms = query.abs() @ items.abs().T
    if bias is not None:
        scores, terms = scores + bias, terms + bias.abs()
    # Larger sums overflow in one order of their terms and not in another.
    dtype = torch.finfo(getattr(torch, _dtype(example)))
    overflows = (terms > dtype.max / 4).any(dim=1)
    terms = terms.nan_to_num(nan=0.0, posinf=0.0)
    scores = scores.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    slack = (items.shape[1] + 2) * dtype.eps * (terms + terms.gather(1, target))
    gap = (scores - scores.gather(1, target)).nan_to_num(nan=0.0)
    others = torch.arange(len(items)) != target
    kept = others if arguments.get("skip_pad") is not True else others & (torch.arange(len(items)) > 0)
    surely, maybe = ((gap > slack) & kept).sum(1), ((gap >= -slack) & kept).sum(1)
    if arguments.get("exclude") is not None and (example.name == "target_rank" or name == "result 1"):
        # Excluded items outrank nothing.
        surely = torch.zeros_like(surely)
    return bool((overflows | ((surely <= rank) & (rank <= maybe))).all())


def _out_of_tolerance(example: Example, kind: str, found: dict[str, Tensor], twin: dict[str, Tensor]) -> str | None:
    truth = getattr(run(example, "float64", backend="reference", **({"index": None} if "index" in example.notes else {})), kind)
    if not any(x.dtype == torch.float64 for x in truth.values()):
        # The recommender always computes in fp32.
        close = all(torch.allclose(x, twin[name], rtol=1e-4, atol=1e-5) for name, x in found.items())
        return None if close else "the results differ"
    for name, x in found.items():
        if x.shape != twin[name].shape or x.dtype != twin[name].dtype:
            return f"{name} is {x.dtype} {list(x.shape)} instead of {twin[name].dtype} {list(twin[name].shape)}"
    if any(isinstance(value, Floats) and value.fill == "huge" for value in example.arguments.values()):
        # Sums of such numbers overflow in one order and not in another.
        return None
    if example.name == "topk" and _within_rounding(example, found["result 0"], truth["result 0"]):
        return None
    finite = {name: x.isfinite() for name, x in truth.items()}
    for name, x in found.items():
        mask = finite[name] & twin[name].isfinite()
        # Gradients of the softmax are right, or NaN if a row has a log-sum-exp that is not finite.
        may_be_nan = kind == "gradients" and example.name in SOFTMAX and not _all_finite(example)
        mask = mask & x.isfinite() if may_be_nan else mask
        if not bool(x[mask].isfinite().all()):
            return f"{name}: not finite where the reference is"
        if bool((x.isfinite() & ~finite[name] & ~twin[name].isfinite()).any()):
            return f"{name}: finite where the reference is not"
        finite[name] = mask
    if not all(x.dtype in ROUNDING for x in found.values()):
        close = all(torch.allclose(x[finite[n]], truth[n][finite[n]], rtol=1e-8, atol=1e-10) for n, x in found.items())
        return None if close else "fp64 results differ"
    if all(_nearly(x[finite[name]], truth[name][finite[name]]) for name, x in found.items()):
        return None
    if example.name in SOFTMAX and _within_terms(example, kind, found, truth, finite):
        return None
    parts = [{name: x[finite[name]] for name, x in values.items()} for values in (found, twin, truth)]
    if not any(x.numel() for x in parts[2].values()):
        return None
    verdicts = judge("forward" if kind == "forward" else "gradient", *parts)
    # The reference may be beyond the ceiling of the rule on random numbers. Then a result may be as far off.
    faults = (verdict.fault for verdict in verdicts if not verdict.error <= 1.5 * verdict.twin_error)
    return next(filter(None, faults), None)
