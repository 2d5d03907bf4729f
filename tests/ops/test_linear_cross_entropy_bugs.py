"""Bugs planted in the Triton kernels of ``linear_cross_entropy`` are found by the checks of its results."""

import pytest
import torch

from lares_fast.ops import _triton
from tests.support.softmax_cases import (
    check_batched_rank,
    check_far_scores,
    check_large_logits,
    check_tiny_distances,
    check_triton,
)

pytestmark = pytest.mark.interpreted


@pytest.fixture
def interpreted(monkeypatch):
    from tests.support import triton_interpreter

    with triton_interpreter.interpreted(monkeypatch) as memory:
        yield memory


FORWARD, BACKWARD, SHARED = "linear_cross_entropy", "_catalog_backward", "_catalog"
TRITON_BUGS = {
    "one item too many": (FORWARD, "(item[None, :] < high) &", "(item[None, :] <= high) &"),
    "the last tile unseen": (FORWARD, "range(low, high, S)", "range(low, high - S + 1, S)"),
    "PAD is not skipped": (FORWARD, "int(call.skip_pad)", "0"),
    "a part written to the first": (FORWARD, "tl.store(COUNT + place * M + row", "tl.store(COUNT + j * parts * M + row"),
    "sum not moved with its origin": (FORWARD, "total = total * shrink", "total = total * 1"),
    "items of the first catalog": (FORWARD, "items_at = ITEMS + j * N * D", "items_at = ITEMS + 0 * j * N * D"),
    "rows of the first catalog": (
        FORWARD, ".\n    hidden = load_operand(HIDDEN + j", "\n    hidden = load_operand(HIDDEN + 0 * j"
    ),
    "targets of the first catalog": (FORWARD, "TARGET + j * M + row", "TARGET + 0 * j * M + row"),
    "ranks of too few rows": (FORWARD, "counts = j * M + start < ranked", "counts = start < ranked - S"),
    "own score without its scale": (SHARED, "mine = (own - origin) * scale", "mine = own - origin"),
    "a part is not merged": (SHARED, "(number[:, None] < parts) & (row[None", "(number[:, None] < parts - 1) & (row[None"),
    "powers of two taken for powers of e": (SHARED, "* (scale / base)", "* 1.0"),
    "merged sum not moved": (SHARED, "tl.where(total > 0, tl.exp((origin - moved) * scale), 0.0)", "1.0"),
    "a catalog's sums merged twice": (SHARED, "place = j * parts + number", "place = 0 * j * parts + number"),
    "ranks beyond the first rows": (SHARED, "(row >= 0) & (row < ranked)", "row >= 0"),
    "digits near 0 lost": (SHARED, "tl.where(one == 1.0, x, tl.log(one) * (x / ", "(tl.log(one) * (1.0 + 0 * x / "),
    "a part's gradient lost": (SHARED, "(number[:, None] < parts) & (at[None", "(number[:, None] < parts - 1) & (at[None"),
    "gradients of the first catalog": (SHARED, "PART + (j * parts + number", "PART + (0 * j * parts + number"),
    "scale forgotten in the backward": (BACKWARD, "(grad * scale * rounding)", "(grad * rounding)"),
    "the part of log-sum-exp beyond a product": (BACKWARD, "-rest[:, None]", "15.0 + 0.0 * rest[:, None]"),
    "origins of the parts ignored": (SHARED, "(found - moved[None, :]) * scale + power", "power"),
    "the target's own column": (BACKWARD, "miss[:, None], p)", "p, p)"),
    "1 - p with the wrong sign": (BACKWARD, "miss = expm1(", "miss = -expm1("),
    "numbers of the first catalog": (BACKWARD, "M + row\n    tl.store(at", "0 + row\n    tl.store(at"),
    "own scores of the first catalog": (BACKWARD, "(hidden, ITEMS + j * N * D", "(hidden, ITEMS + 0 * j * N * D"),
    "places outside of the catalog": (BACKWARD, "tl.where(item[None, :] < high, slopes, 0.0)", "slopes"),
    "unit forgotten": (BACKWARD, "ditems * (unit * ", "ditems * ("),
    "PAD gets a gradient": (BACKWARD, "(item >= first)[:, None]", "(item >= 0)[:, None]"),
    "a tile of items without gradient": (FORWARD, 'cdiv(N, run.keywords["S"])', 'N // run.keywords["S"]'),
    "a tile of rows unwritten": (FORWARD, "backward_hidden, J * tiles * parts,", "backward_hidden, J * tiles * parts - 1,"),
    "one gradient for all rows": (FORWARD, "any(call.grad.stride())", "False"),
}  # fmt: skip


def check_everything(patch):
    kernels = _triton.kernels(FORWARD)
    # Small catalogs have several parts too, of one tile or of two, and the parts are merged in several steps.
    patch.setattr(kernels, "SHORTEST_PART", 1)
    patch.setattr(kernels, "PROGRAMS", 8)
    patch.setitem(kernels.SUMS, "P", 2)
    check_triton((), 40, 100, 40, torch.float32, True, 0.5)
    check_triton((2,), 40, 100, 40, torch.float32, True, 0.5)
    check_triton((), 20, 40, 16, torch.float16, True, 0.5)
    check_tiny_distances()
    check_far_scores(torch.float32)
    check_large_logits(1, "triton")
    check_batched_rank("order", True, 140, "triton")


def test_no_bug_is_found_in_the_kernels_as_they_are(interpreted, monkeypatch):
    check_everything(monkeypatch)


@pytest.mark.parametrize("bug", TRITON_BUGS)
def test_a_bug_planted_in_triton_is_caught(bug, monkeypatch, tmp_path):
    from triton.runtime.errors import InterpreterError

    from tests.support import triton_interpreter

    triton_interpreter.plant(monkeypatch, tmp_path, (SHARED, BACKWARD, FORWARD), *TRITON_BUGS[bug])
    with triton_interpreter.interpreted(monkeypatch), pytest.raises((AssertionError, InterpreterError)):
        check_everything(monkeypatch)
