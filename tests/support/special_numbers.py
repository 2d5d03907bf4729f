"""Checks of what each op does with no rows, subnormal numbers, -0.0, infinities and NaN: the table in docs/numerics.md.

A check takes a seed and a backend, plants special numbers, and raises AssertionError if the result is not the documented one.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Callable

import torch
from torch import Tensor

from lares_fast import ops
from lares_fast._errors import InputError
from lares_fast._random import Draw
from tests.support.recurrence_case import Case

INF = float("inf")
# The bits of NaN as PyTorch makes it, with a payload, with a sign, and of a signalling NaN.
NANS = [struct.unpack("<f", struct.pack("<I", bits))[0] for bits in (0x7FC00000, 0x7FC00001, 0xFFC54321)]
SPOILERS = [*NANS, INF, -INF]
HARMLESS = [-0.0, 1e-41, -1e-45, 2.0**-149, 1.17e-38]
NO_ROWS = torch.zeros(0, dtype=torch.int64)


def _products(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return rows [M, 1] and items [N, 1] with special numbers, and their products [M, N] in fp32."""
    draw = random.Random(seed)
    numbers = [*SPOILERS, *HARMLESS, 0.0, 1.0, -1.0, 2.0, 0.5, 1e-30]
    sizes = (1, 2, 5), (1, 2, 9, 40)
    rows, items = (torch.tensor([[draw.choice(numbers)] for _ in range(draw.choice(size))]) for size in sizes)
    return rows, items, (rows * items.T) + 0.0


def _ordered(products: Tensor) -> Tensor:
    return torch.where(products.isnan(), -INF, products)


def check_topk(seed: int, backend: str) -> None:
    """Check scores, bit by bit, and ids: a NaN score is -inf, -0.0 is 0.0, and subnormal scores keep their order."""
    rows, items, products = _products(seed)
    scores, ids = ops.topk(rows, items, len(items), backend=backend)
    wanted, order = _ordered(products).sort(dim=1, descending=True, stable=True)
    assert torch.equal(ids, order)
    assert torch.equal(scores.view(torch.int32), wanted.view(torch.int32))
    scores, ids = ops.topk(rows[:0], items, 1, backend=backend)
    assert scores.shape == ids.shape == (0, 1)
    scores, ids = ops.topk(torch.zeros(2, 0), torch.zeros(3, 0), 3, backend=backend)
    assert ids.tolist() == [[0, 1, 2]] * 2 and not scores.any()


def check_target_rank(seed: int, backend: str) -> None:
    """Check ranks in the order of :func:`check_topk`."""
    rows, items, products = _products(seed)
    scores = _ordered(products)
    for target in range(len(items)):
        own = scores[:, target : target + 1]
        strict = (scores > own).sum(1)
        places = {"strict": strict, "order": strict + (scores[:, :target] == own).sum(1)}
        for ties, place in places.items():
            found = ops.target_rank(rows, items, torch.full((len(rows),), target), ties=ties, backend=backend)
            assert torch.equal(found, place), (ties, target)
    assert ops.target_rank(rows[:0], items, NO_ROWS, backend=backend).shape == (0,)


def check_cross_entropy(seed: int, backend: str) -> None:
    """Check log-probabilities of every target, and which gradients are not finite."""
    rows, items, products = _products(seed)
    lse = products.double().logsumexp(1)
    for target in random.Random(seed).sample(range(len(items)), k=min(len(items), 2)):
        hidden, table = rows.clone().requires_grad_(), items.clone().requires_grad_()
        found = ops.target_logprob(hidden, table, torch.full((len(rows),), target), backend=backend)
        torch.testing.assert_close(
            found.detach().double(), products[:, target].double() - lse, rtol=1e-5, atol=1e-6, equal_nan=True
        )
        found.sum().backward()
        spoiled = ~lse.isfinite()
        assert hidden.grad[spoiled].isnan().all()
        assert table.grad.isnan().all() if spoiled.any() else True
        if items.isfinite().all():
            assert hidden.grad[~spoiled].isfinite().all()
            assert spoiled.any() or table.grad.isfinite().all()
        else:
            # The items of probability 0 are multiplied too.
            assert not hidden.grad.isfinite().any()
    hidden = rows[:0].clone().requires_grad_()
    assert ops.target_logprob(hidden, items, NO_ROWS, backend=backend).shape == (0,)
    losses = {how: ops.linear_cross_entropy(hidden, items, NO_ROWS, reduction=how, backend=backend) for how in ("sum", "mean")}
    assert losses["sum"] == 0 and losses["mean"].isnan()
    if backend != "triton":
        # Without columns all products are 0.
        found = ops.target_logprob(torch.zeros(2, 0), torch.zeros(3, 0), torch.tensor([0, 2]), backend=backend)
        torch.testing.assert_close(found, -torch.full((2,), 3.0).log())


def _planted(
    draw: random.Random, tensors: dict[str, Tensor], rows: range, names: list[str], spoiler: float
) -> dict[str, Tensor]:
    """Return copies of ``tensors``, with ``spoiler`` at a random place of one of them, in one of the ``rows``."""
    copies = {name: x.clone() for name, x in tensors.items()}
    x = copies[draw.choice(names)]
    x[(draw.choice(rows), *(draw.randrange(n) for n in x.shape[1:]))] = spoiler
    return copies


def _run(function: Callable[..., Tensor], tensors: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    leaves = {name: x.clone().requires_grad_() for name, x in tensors.items()}
    out = function(leaves)
    out.sum().backward()
    return out.detach(), {name: x.grad for name, x in leaves.items()}


def _same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.view(torch.int32), b.view(torch.int32))


def check_attention(seed: int, backend: str) -> None:
    """Check that a special number stays in its sequence, and that subnormal numbers and -0.0 are numbers as any other."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    lengths = [draw.randint(0, 6) for _ in range(3)]
    lengths[draw.randrange(3)] += 2
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    tensors = {name: torch.randn(sum(lengths), 2, 16) for name in ("query", "key", "value")}

    def attend(leaves: dict[str, Tensor]) -> Tensor:
        return ops.attention(*leaves.values(), offsets, max(lengths), backend=backend)

    clean = _run(attend, tensors)
    b = max(range(3), key=lambda i: lengths[i])
    own = range(*offsets[b : b + 2].tolist())
    out, grads = _run(attend, _planted(draw, tensors, own, list(tensors), draw.choice(SPOILERS)))
    others = [row for row in range(sum(lengths)) if row not in own]
    assert _same(out[others], clean[0][others])
    assert all(_same(grads[name][others], clean[1][name][others]) for name in tensors)
    out, grads = _run(attend, _planted(draw, tensors, own, list(tensors), draw.choice(HARMLESS)))
    assert out.isfinite().all() and all(grad.isfinite().all() for grad in grads.values())
    nothing = torch.zeros(0, 2, 16)
    assert ops.attention(nothing, nothing, nothing, torch.tensor([0, 0]), 1, backend=backend).shape == (0, 2, 16)


def check_embedding(seed: int, backend: str) -> None:
    """Check that a special number in the table makes the rows of its item NaN, and the gradients that they reach."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    items, offsets = torch.tensor([1, 2, 3, 4, 2]), torch.tensor([0, 3, 3, 5])
    tensors = {"items": torch.randn(6, 16), "positions": torch.randn(3, 16), "weight": torch.ones(16), "bias": torch.zeros(16)}

    def embed(leaves: dict[str, Tensor]) -> Tensor:
        return ops.embedding(items, offsets, *leaves.values(), backend=backend)

    clean = _run(embed, tensors)[0]
    out, grads = _run(embed, _planted(draw, tensors, range(2, 3), ["items"], draw.choice(SPOILERS)))
    assert out[[1, 4]].isnan().all() and _same(out[[0, 2, 3]], clean[[0, 2, 3]])
    wanted = {"items": [2], "positions": [1], "weight": range(16), "bias": []}
    for name, rows in wanted.items():
        spoiled = torch.tensor([row in rows for row in range(len(grads[name]))])
        assert torch.equal(grads[name].isnan().reshape(len(spoiled), -1).all(1), spoiled), name
        assert grads[name][~spoiled].isfinite().all(), name
    out, grads = _run(embed, _planted(draw, tensors, range(2, 3), ["items"], draw.choice(HARMLESS)))
    assert out.isfinite().all() and all(grad.isfinite().all() for grad in grads.values())
    assert ops.embedding(NO_ROWS, torch.tensor([0]), *tensors.values(), backend=backend).shape == (0, 16)


def check_initial_state(seed: int, backend: str) -> None:
    """Check that ``std`` must be finite, and that it may be 0, negative or subnormal."""
    std, draw = random.Random(seed).choice([*HARMLESS, 0.0, -1.5]), Draw((seed, 2), torch.tensor([0, 1, 2]))
    offsets = torch.tensor([0, 2, 2, 3])
    one, out = (ops.initial_state(draw, offsets, 4, 3, std=x, backend=backend) for x in (1.0, std))
    torch.testing.assert_close(out, (one.double() * std).float(), rtol=1e-6, atol=2.0**-149)
    assert not out[3].any()
    for wrong in SPOILERS:
        try:
            ops.initial_state(draw, offsets, 4, 3, std=wrong, backend=backend)
        except InputError as error:
            assert "std must be a finite number" in str(error)
        else:
            raise AssertionError(f"std = {wrong} is accepted")
    assert ops.initial_state(Draw((1, 2), NO_ROWS), torch.tensor([0]), 0, 3, backend=backend).shape == (0, 3)


def check_recurrence(seed: int, backend: str) -> None:
    """Check that a special number stays in its sequence, and which gradients of weights it reaches."""
    draw = random.Random(seed)
    lengths = [draw.randint(1, 5) for _ in range(draw.randint(2, 4))]
    adapter, output = draw.choice(("add", "linear", "concat")), draw.choice(("last", "steps", "tokens"))
    width = 64 if backend == "triton" else draw.choice((16, 32))
    depth = [draw.randint(1, 3) for _ in lengths]
    options = {"D": width, "H": 2 if width == 64 else 1, "inner": 64, "layers": 1, "depth": depth, "output": output}
    case = Case(lengths=lengths, adapter=adapter, p=draw.choice((0, 0.3)), **options)

    def recur(leaves: dict[str, Tensor]) -> Tensor:
        return case.call(leaves, backend, longest=max(lengths))

    clean = _run(recur, case.tensors)
    b = draw.randrange(len(lengths))
    own = range(*case.offsets[b : b + 2].tolist())
    # The output of the last token sees every token of its sequence.
    out, grads = _run(recur, _planted(draw, case.tensors, own, ["h", "pre"], draw.choice(SPOILERS)))
    counts = {"last": [1] * len(lengths), "steps": depth, "tokens": lengths}[output]
    mine = torch.arange(len(lengths)).repeat_interleave(torch.tensor(counts)) == b
    # On ``triton`` NaN reaches the other sequences of its tile.
    if backend != "triton":
        assert _same(out[~mine], clean[0][~mine]), "another sequence changed"
    assert not out[mine][-1].isfinite().any(), "the own sequence is finite"
    others = [row for row in range(sum(lengths)) if row not in own]
    if backend != "triton":
        assert all(_same(grads[name][others], clean[1][name][others]) for name in ("h", "pre")), "another gradient changed"
    for name, grad in grads.items():
        if name.endswith("key.bias") and backend in ("native", "triton"):
            assert not grad.any(), name
        elif name.endswith((".weight", ".gate")):
            assert not grad.isfinite().any(), f"{name} is finite"
    out, grads = _run(recur, _planted(draw, case.tensors, own, ["h", "pre"], draw.choice(HARMLESS)))
    assert out.isfinite().all() and all(grad.isfinite().all() for grad in grads.values())


def check_recurrence_of_nothing(seed: int, backend: str) -> None:
    """Check a batch without sequences, an empty sequence, and a state of equal numbers."""
    width = {"D": 64, "H": 2, "inner": 64, "layers": 1, "depth": 2}
    case = Case(lengths=[], adapter=("add", "linear", "concat")[seed % 3], **width)
    out, grads = _run(lambda leaves: case.call(leaves, backend, longest=1), case.tensors)
    assert out.shape == (0, 64) and not any(grad.any() for grad in grads.values())
    try:
        empty = Case(lengths=[2, 0], p=0, **width)
        empty.call(empty.tensors, backend, longest=2)
    except InputError as error:
        assert "at least 1" in str(error)
    else:
        raise AssertionError("an empty sequence is accepted")
    case = Case(lengths=[3], p=0, output="tokens", **width)
    equal = {
        **case.tensors,
        **{name: torch.full_like(case.tensors[name], (0.0, -0.0, 1e-42)[seed % 3]) for name in ("h", "pre")},
    }
    assert case.call(equal, backend, longest=3).isfinite().all()


# The checks, and the backends on a machine without a GPU; ``triton`` is interpreted.
CHECKS: dict[str, tuple[Callable[[int, str], None], tuple[str, ...]]] = {
    "topk": (check_topk, ("native", "reference")),
    "target_rank": (check_target_rank, ("native", "reference")),
    "cross entropy": (check_cross_entropy, ("native", "reference", "triton")),
    "attention": (check_attention, ("reference", "triton")),
    "embedding": (check_embedding, ("native", "reference", "triton")),
    "initial_state": (check_initial_state, ("native", "reference", "triton")),
    "recurrence": (check_recurrence, ("native", "reference", "layers", "triton")),
    "recurrence of nothing": (check_recurrence_of_nothing, ("native", "reference", "layers", "triton")),
}
