"""The plan of ``ops.recurrence``: the kernel that divides sequences into tiles, in the interpreter (``-m interpreted``)."""

import itertools
from dataclasses import replace

import pytest
import torch

from lares_fast.ops import _triton
from tests.support.recurrence_case import Case

pytestmark = pytest.mark.interpreted


def planned(lengths, depth, longest, most):
    """Return the parts of the table that the kernel makes for a call, by name."""
    offsets = torch.tensor([0, *itertools.accumulate(lengths)])
    call, P, B = Case(lengths=[2], depth=1).operator_call(longest=longest), int(offsets[-1]), len(lengths)
    call = replace(call, h=torch.empty(P, 64), offsets=offsets, depth=torch.tensor(depth))
    plan = _triton.kernels("_recurrence_plan").Plan(call, call.weights)
    table = torch.full((plan.words,), -1, dtype=torch.int32)
    plan.fill(table, most)
    names = {"head": 4, "steps": B, "begin": B, "out_row": B + 1, "first": plan.tiles + 1}
    parts = table.split([*names.values(), plan.words - sum(names.values())])
    return dict(zip(names, map(torch.Tensor.tolist, parts), strict=False))


def tiles_of(lengths, R, segment=128):
    """Return the tiles of a call as pairs (first sequence, end), and the row of its tile where each sequence begins."""
    tiles, begins, filled = [], [], R
    for b, length in enumerate(lengths):
        size = -(-min(max(length, 1), R) // 4) * 4
        if b % segment == 0 or filled + size > R:
            tiles.append((b, b))
            filled = 0
        begins.append(filled)
        tiles[-1] = (tiles[-1][0], b + 1)
        filled += size
    return tiles, begins


def check(lengths, depth, longest=64, most=9):
    found = planned(lengths, depth, longest, most)
    tiles, begins = tiles_of(lengths, 64 if longest <= 64 else 128)
    valid = [1 <= n <= longest and 1 <= T <= most for n, T in zip(lengths, depth, strict=True)]
    steps = [T * one for T, one in zip(depth, valid, strict=True)]
    taken = [min(max(T, 1), most) for T in depth]
    first = found.pop("first")
    assert found == {
        "head": [1, int(all(valid)), sum(taken), max(steps)],
        "steps": steps,
        "begin": begins,
        "out_row": [0, *itertools.accumulate(taken)],
    }
    assert [pair for pair in itertools.pairwise(first) if pair[0] != pair[1]] == tiles


@pytest.fixture(autouse=True)
def interpreter(monkeypatch):
    from tests.support import triton_interpreter

    with triton_interpreter.interpreted(monkeypatch):
        yield


CALLS = {
    "one": ([5], [3]),
    "long ones": ([64] * 200, [1] * 200),
    "short ones": ([1] * 1100, [9] * 1100),
    "mixed": ([1 + 37 * b % 64 for b in range(300)], [1 + b % 9 for b in range(300)]),
    "invalid ones": ([0, 5, 65, 500, 0, 0, 7] * 40, [1, 2, 3, 4, 5, 10, 0] * 40),
    "empty ones": ([0] * 500, [1] * 500),
}


@pytest.mark.parametrize("longest", [64, 128])
@pytest.mark.parametrize("name", CALLS)
def test_sequences_are_divided_into_tiles(name, longest):
    check(*CALLS[name], longest)


def test_many_sequences():
    check([1 + b % 3 for b in range(70_000)], [1] * 70_000)


@pytest.mark.parametrize("offsets", [[1, 5, 9], [0, 5, 8], [0, 10, 9], [0, 2**62, 9], [-(2**63), 2**62, 9], [9, 5, 0]], ids=str)
def test_offsets_that_do_not_rise_from_0_make_no_tile(offsets):
    call = replace(Case(lengths=[5, 4], depth=1).operator_call(longest=64), offsets=torch.tensor(offsets))
    plan = _triton.kernels("_recurrence_plan").Plan(call, call.weights)
    table = torch.full((plan.words,), -1, dtype=torch.int32)
    plan.fill(table, 9)
    assert table[:2].tolist() == [0, 0] and table[4:6].tolist() == [0, 0]
    assert not table[11 : 12 + plan.tiles].any()


PLANTED = {
    "a tile that is too full": ("opens = filled + size > R", "opens = filled + size > R + 4"),
    "a segment that overlaps the next": ("number = 2 * (rows", "number = (rows"),
    "a tile that goes on in the next segment": ("filled = tl.full((LANES,), R,", "filled = tl.full((LANES,), 0,"),
    "tiles without an end": ("mask=i <= left", "mask=i < left"),
    "lengths that are not checked": ("(after - place <= longest)", "(after - place <= 2 * longest)"),
    "a block that forgets the one before": ("total += tl.sum(taken, 0)", "total = tl.sum(taken, 0)"),
}


@pytest.mark.parametrize("bug", PLANTED)
def test_a_planted_bug_is_caught(bug, monkeypatch, tmp_path):
    from triton.runtime.errors import InterpreterError

    from tests.support import triton_interpreter

    triton_interpreter.plant(
        monkeypatch, tmp_path, ("_random", "_layers", "_recurrence_plan"), "_recurrence_plan", *PLANTED[bug]
    )
    with pytest.raises((AssertionError, InterpreterError)):
        check([1 + 37 * b % 80 for b in range(1100)], [1] * 1100)
