"""Test cases: a small call of every op, and the equal call of the reference.

Self-tests, ``lares-fast report``, ``lares-fast tune`` and ``lares-fast gpu-day`` run them. On integers the results of all ops
but ``embedding``, ``initial_state`` and ``recurrence`` are exact, or exact before one rounding: every softmax gets scores that
are either equal or far apart.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor

from lares_fast import reference
from lares_fast._random import Draw, DrawFrom, exact_normal_of, seed_of, state_uniforms
from lares_fast.config import LARESConfig
from lares_fast.reference.initial_state import spread

Values = Mapping[str, Tensor]
_KEY = (5, 7)


@dataclass(frozen=True)
class Results:
    """The results of a call, on the CPU: floating-point tensors, integer tensors, and gradients."""

    forward: dict[str, Tensor]
    exact: dict[str, Tensor]
    gradients: dict[str, Tensor]

    def parts(self) -> tuple[dict[str, Tensor], ...]:
        """Return the three parts."""
        return self.forward, self.exact, self.gradients


@dataclass(frozen=True)
class Case:
    """One test case: ``fast(leaves, backend)`` calls the op, and ``plain(leaves)`` calls the reference.

    ``leaves`` are the floating-point inputs, in fp64 on the CPU.
    """

    leaves: Values
    fast: Callable[[Values, str], dict[str, Tensor]]
    plain: Callable[[Values], dict[str, Tensor]]
    differentiable: bool = True
    # True if results are exact before the last rounding, so that a self-test needs no twin.
    exact: bool = False
    # The dtype of products if the call rounds their operands. Then the inputs are numbers of this dtype, and the results are
    # compared in it.
    products: torch.dtype | None = None

    def results(self, backend: str, dtype: torch.dtype, device: torch.device | str = "cpu") -> Results:
        """Return the results of the op on ``backend`` in ``dtype`` on ``device``."""
        found = self._run(lambda leaves: self.fast(leaves, backend), self.products or dtype, dtype, device)
        return self._compared(found)

    def twin(self, dtype: torch.dtype) -> Results:
        """Return the results of the reference in ``dtype``."""
        return self._compared(self._run(self.plain, self.products or dtype, dtype, "cpu"))

    def truth(self, dtype: torch.dtype) -> Results:
        """Return the results of the reference in fp64, on inputs that were rounded to ``dtype``."""
        return self._run(self.plain, self.products or dtype, torch.float64, "cpu")

    def _compared(self, found: Results) -> Results:
        """Return ``found`` in the dtype in which results are compared."""
        if self.products is None:
            return found
        forward, gradients = (
            {name: x.to(self.products) for name, x in part.items()} for part in (found.forward, found.gradients)
        )
        return Results(forward, found.exact, gradients)

    def _run(
        self, call: Callable[[Values], dict[str, Tensor]], rounded: torch.dtype, dtype: torch.dtype, device: Any
    ) -> Results:
        leaves = {name: leaf.to(rounded).to(device, dtype, copy=True) for name, leaf in self.leaves.items()}
        for leaf in leaves.values():
            leaf.requires_grad_(self.differentiable)
        found = call(leaves)
        numbers = {name: value for name, value in found.items() if value.dtype.is_floating_point}
        gradients = {}
        if self.differentiable:
            torch.autograd.backward(list(numbers.values()), [_upstream(value) for value in numbers.values()])
            gradients = {f"d {name}": leaf.grad.cpu() for name, leaf in leaves.items() if leaf.grad is not None}
        exact = {name: value.cpu() for name, value in found.items() if name not in numbers}
        return Results({name: value.detach().cpu() for name, value in numbers.items()}, exact, gradients)


def case(op: str, *, integers: bool, **variant: Any) -> Case:
    """Return the test case of ``op``.

    With ``integers`` the inputs are small integers, else normal random numbers; ``topk`` and ``target_rank`` always get
    integers. ``variant`` chooses among the kernels of the op, with the names that its self-test uses.
    """
    return _CASES[op](integers, **variant)


def ops() -> list[str]:
    """Return the names of the ops that have test cases."""
    return list(_CASES)


def _upstream(value: Tensor) -> Tensor:
    """Return a gradient of -2, -1, 1 and 2 for ``value``."""
    counted = torch.arange(value.numel(), device=value.device) * 7 % 4 - 2
    return (counted + (counted >= 0)).view(value.shape).to(value.dtype)


def _fill(integers: bool, *shape: int) -> Tensor:
    """Return reproducible normal numbers, or integers in -2..2."""
    generator = torch.Generator().manual_seed(sum(shape))
    if integers:
        return torch.randint(-2, 3, shape, generator=generator).double()
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def _codes(index: Tensor, width: int, length: float) -> Tensor:
    """Return rows [..., ``width``] of integers for ``index`` [...].

    The rows come from a Hadamard matrix of size S, the largest power of two that is at most ``width``. Their first S entries
    differ from 0. The product of two rows is at least ``length`` if their indices are equal modulo S, and 0 otherwise.
    """
    size = 1 << width.bit_length() - 1
    common = (index % size)[..., None] & torch.arange(size)
    ones = torch.stack([common >> bit & 1 for bit in range(size.bit_length())]).sum(0)
    sign = 1 - 2 * (ones & 1)
    factor = 1
    while factor * factor * size < length:
        factor *= 2
    return torch.nn.functional.pad(factor * sign.double(), (0, width - size))


def _attention(integers: bool, width: int = 32, drop: bool = True, short: bool = False, train: bool = True) -> Case:
    from lares_fast.ops import attention

    lengths = torch.tensor([16, 0, 1, 7] if short else [50, 0, 1, 33])
    offsets = torch.cat((torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)))
    rows, longest, heads = int(offsets[-1]), int(lengths.max()), 2
    query, key, value = (_fill(integers, rows + i, heads, width)[:rows] for i in range(3))
    if integers:
        index = torch.cat([torch.arange(int(n)) // 2 for n in lengths])[:, None] + torch.arange(heads)
        # The scores stay far apart after the division by the square root of the width.
        query = key = _codes(index, width, 64 * width**0.5)
    how: dict[str, Any] = {"dropout": 0.5 if drop else 0.0, "step": 2, "layer": 1}

    def draw(device: torch.device | None = None) -> Draw | None:
        return Draw((5, 7), torch.arange(len(lengths), device=device)) if drop else None

    def fast(leaves: Values, backend: str) -> dict[str, Tensor]:
        query, key, value = leaves.values()
        how_fast = {**how, "draw": draw(query.device), "backend": backend}
        return {"out": attention(query, key, value, offsets.to(query.device), longest, **how_fast)}

    def plain(leaves: Values) -> dict[str, Tensor]:
        query, key, value = leaves.values()
        return {"out": reference.packed_attention(query, key, value, offsets, longest, draw=draw(), **how)}

    return Case({"query": query, "key": key, "value": value}, fast, plain, differentiable=train, exact=integers)


def _embedding(integers: bool, width: int = 64, drop: bool = True, train: bool = True) -> Case:
    from lares_fast.ops import embedding

    offsets = torch.tensor([0, 20, 20, 21, 37])
    items, sizes = 1 + torch.arange(37) * 13 % 29, {"item_table": 31, "position_table": 20}
    leaves = {name: _fill(integers, rows, width) for name, rows in sizes.items()}
    leaves |= {"weight": _fill(integers, width), "bias": _fill(integers, width + 1)[:width]}
    how = {"dropout": 0.25 if drop else 0.0}

    def call(leaves: Values, function: Callable[..., Tensor], **more: Any) -> dict[str, Tensor]:
        device = leaves["weight"].device
        draw = _draw(4, device) if drop else None
        return {"out": function(items.to(device), offsets.to(device), *leaves.values(), draw=draw, **how, **more)}

    def fast(leaves: Values, backend: str) -> dict[str, Tensor]:
        return call(leaves, embedding, backend=backend)

    def plain(leaves: Values) -> dict[str, Tensor]:
        return call(leaves, reference.embedding)

    return Case(leaves, fast, plain, differentiable=train)


def _initial_state(integers: bool, width: int = 64) -> Case:
    """Build the case of h0, which has no inputs; its leaf only names the device and the dtype."""
    from lares_fast.ops import initial_state

    offsets, rows = torch.tensor([0, 20, 20, 21, 70]), 75

    def fast(leaves: Values, backend: str) -> dict[str, Tensor]:
        device = leaves["leaf"].device
        return {"h0": initial_state(_draw(4, device), offsets.to(device), rows, width, std=0.5, backend=backend)}

    def plain(leaves: Values) -> dict[str, Tensor]:
        if leaves["leaf"].dtype != torch.float64:
            return {"h0": reference.initial_state(_draw(4), offsets, rows, width, std=0.5)}

        def normal(rows: Tensor, positions: Tensor) -> Tensor:
            return exact_normal_of(state_uniforms(_KEY, rows, positions, width))

        return {"h0": spread(normal, _draw(4).rows, offsets, rows) * 0.5}

    return Case({"leaf": torch.zeros(1, dtype=torch.float64)}, fast, plain, differentiable=False)


def _draw(batch: int, device: torch.device | str = "cpu") -> Draw:
    """Return a draw with its key and its rows on ``device``."""
    return Draw(seed_of(_KEY, torch.device(device)), torch.arange(batch, device=device))


def _linear_cross_entropy(integers: bool, width: int = 64, bf16: bool = False, train: bool = True) -> Case:
    from lares_fast import ops
    from lares_fast.ops._catalog_calls import TIES

    rows = 37
    items = 2 * (1 << width.bit_length() - 1) + 11 if integers else 501
    target = 1 + torch.arange(rows) * 11 % (items - 1)
    leaves = {"hidden": _fill(integers, rows, width), "items": _fill(integers, items, width)}
    if integers:
        # Every second target is among the items that have the largest score.
        index = torch.where(torch.arange(rows) % 2 == 1, target, torch.arange(items - rows, items))
        leaves = {"hidden": _codes(index, width, 64), "items": _codes(torch.arange(items), width, 64)}
    scale = 1.0 if integers else width**-0.5

    # Two catalogs share the rows of the case; the second one has the items in reverse order. Some rows get no rank.
    half, ranked = rows // 2, rows // 2 + 3
    both = target[: 2 * half].view(2, half)

    def call(function: Callable[..., tuple[Tensor, Tensor]], leaves: Values, **how: Any) -> dict[str, Tensor]:
        hidden, items = leaves["hidden"], leaves["items"]
        targets, of_both = (x.to(hidden.device) for x in (target, both))
        found: dict[str, Tensor] = {}
        for ties in TIES:
            found |= named(ties, *function(hidden, items, targets, ties=ties, **how))
        batched = hidden[: 2 * half].view(2, half, width), torch.stack((items, items.flip(0))), of_both
        return found | named("batched", *function(*batched, ranked=ranked, **how))

    def fast(leaves: Values, backend: str) -> dict[str, Tensor]:
        hidden, items = leaves["hidden"], leaves["items"]
        how: dict[str, Any] = {"scale": scale, "skip_pad": True, "bf16": bf16, "backend": backend}
        found = {"logprob": ops.target_logprob(hidden, items, target.to(hidden.device), **how)}
        return found | call(ops.target_logprob_and_rank, leaves, **how)

    def plain(leaves: Values) -> dict[str, Tensor]:
        how: dict[str, Any] = {"scale": scale, "skip_pad": True}
        found = {"logprob": reference.target_logprob(leaves["hidden"], leaves["items"], target, **how)}
        return found | call(reference.target_logprob_and_rank, leaves, **how)

    def named(ties: str, logprob: Tensor, rank: Tensor) -> dict[str, Tensor]:
        # Ranks are compared on integers only: rounding may change the order of other scores.
        return {f"logprob with {ties} rank": logprob, **({f"{ties} rank": rank} if integers else {})}

    products = torch.bfloat16 if bf16 else None
    return Case(leaves, fast, plain, differentiable=train, exact=integers, products=products)


def _recurrence(
    integers: bool,
    width: int = 64,
    heads: int = 2,
    inner: int | None = None,
    adapter: str = "concat",
    output: str = "tokens",
    drop: bool = True,
    long: bool = False,
    bf16: bool = False,
    train: bool = True,
) -> Case:
    """Build the case of the recurrence.

    ``adapter="none"`` is a block without ``pre``. ``long`` needs a tile of 128 rows. ``deepest`` exceeds every depth.
    """
    from lares_fast.ops import recurrence
    from lares_fast.reference.backbone import build_block

    lengths, depth = torch.tensor([5, 1, 9, 70 if long else 20]), torch.tensor([2, 1, 2, 1])
    offsets = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    rows, longest = int(offsets[-1]), int(lengths.max())
    sizes: dict[str, Any] = {"hidden_size": width, "n_heads": heads, "inner_size": inner or 2 * width, "n_core_layers": 1}
    joins = adapter != "none"
    config = LARESConfig.preview(adapter=adapter if joins else "add", **sizes)
    with DrawFrom(torch.Generator().manual_seed(1)):
        module = reference.Recurrence(config) if joins else build_block(config, 1)
        weights = {name: weight.detach().double() for name, weight in module.named_parameters()}
    pre = {"pre": _fill(integers, rows + 1, width)[:rows]} if joins else {}
    leaves = {"h": _fill(integers, rows, width), **pre, **weights}
    how: dict[str, Any] = {"n_heads": heads, "adapter": config.adapter, "output": output, "deepest": 3}
    how |= {"dropout": 0.25, "attention_dropout": 0.25} if drop else {}

    def call(leaves: Values, function: Callable[..., Tensor], *, with_longest: bool, **more: Any) -> dict[str, Tensor]:
        h, *rest = leaves.values()
        draw = Draw((5, 7), torch.arange(len(depth), device=h.device)) if drop else None
        more |= {"pre": rest.pop(0)} if joins else {}
        more |= {"longest": longest} if with_longest else {}
        return {"out": function(h, offsets.to(h.device), rest, depth=depth.to(h.device), draw=draw, **how, **more)}

    def fast(leaves: Values, backend: str) -> dict[str, Tensor]:
        return call(leaves, recurrence, with_longest=True, bf16=bf16, backend=backend)

    def plain(leaves: Values) -> dict[str, Tensor]:
        # The truth, in fp64, is not rounded.
        rounds = bf16 and leaves["h"].dtype != torch.float64
        return call(leaves, reference.recurrence, with_longest=False, bf16=rounds)

    return Case(leaves, fast, plain, differentiable=train, products=torch.bfloat16 if bf16 else None)


def _catalog() -> tuple[dict[str, Tensor], Tensor, tuple[Tensor, Tensor]]:
    """Return queries and items of integers (which makes ties), targets, and exclusion lists."""
    leaves = {"query": _fill(True, 9, 32), "items": _fill(True, 300, 32)}
    exclude = torch.arange(0, 10) * 2, torch.arange(18) * 13 % 300
    return leaves, torch.arange(9) * 31, exclude


def _topk(integers: bool) -> Case:
    from lares_fast import ops

    leaves, _, exclude = _catalog()

    def fast(leaves: Values, backend: str) -> dict[str, Tensor]:
        lists = exclude[0].to(leaves["query"].device), exclude[1].to(leaves["query"].device)
        scores, ids = ops.topk(leaves["query"], leaves["items"], 40, exclude=lists, backend=backend)
        return {"scores": scores, "ids": ids}

    def plain(leaves: Values) -> dict[str, Tensor]:
        scores, ids = reference.topk(leaves["query"], leaves["items"], 40, exclude=exclude)
        return {"scores": scores, "ids": ids}

    return Case(leaves, fast, plain, differentiable=False, exact=True)


def _target_rank(integers: bool) -> Case:
    from lares_fast import ops

    leaves, target, exclude = _catalog()

    def fast(leaves: Values, backend: str) -> dict[str, Tensor]:
        targets, *lists = (x.to(leaves["query"].device) for x in (target, *exclude))
        rank = ops.target_rank(leaves["query"], leaves["items"], targets, exclude=(lists[0], lists[1]), backend=backend)
        return {"rank": rank}

    def plain(leaves: Values) -> dict[str, Tensor]:
        return {"rank": reference.target_rank(leaves["query"], leaves["items"], target, exclude=exclude)}

    return Case(leaves, fast, plain, differentiable=False, exact=True)


_CASES: dict[str, Callable[..., Case]] = {
    "attention": _attention,
    "embedding": _embedding,
    "initial_state": _initial_state,
    "linear_cross_entropy": _linear_cross_entropy,
    "recurrence": _recurrence,
    "target_rank": _target_rank,
    "topk": _topk,
}


def shipped(op: str) -> list[dict[str, Any]]:
    """Return the variants of the kernels of ``op`` that models of published sizes use, in inference and in training."""
    if op == "attention":
        sizes = product((32, 64), (False, True), (False, True))
        return [{"width": width, "drop": drop, "short": False, "train": train} for width, drop, train in sizes]
    if op == "embedding":
        drops = ((False, False), (True, False), (True, True))
        return [{"width": width, "drop": drop, "train": train} for width in (64, 128) for drop, train in drops]
    if op == "initial_state":
        return [{"width": width} for width in (64, 128)]
    if op == "linear_cross_entropy":
        every = product((64, 128), (False, True), (False, True))
        return [{"width": width, "bf16": bf16, "train": train} for width, bf16, train in every]
    # Inference calls the pre-block, and the core with its last states. Training calls the pre-block, the core with its last
    # states, and the core with the states of every step.
    calls = [("none", "tokens", False), ("add", "last", False)]
    calls += [("none", "tokens", True), ("add", "last", True), ("add", "steps", True)]
    found = [(width, *call, False) for width in (64, 128) for call in (calls if width == 64 else calls[1::3])]
    found += [(64, *call, True) for call in calls[2::2]]
    return [
        {"width": width, "heads": 2, "inner": 4 * width, "long": False, "adapter": adapter, "output": output}
        | {"drop": train, "bf16": bf16, "train": train}
        for width, adapter, output, train, bf16 in found
    ]
