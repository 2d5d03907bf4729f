"""Index tensors that the host cannot read: with any values in them, the kernels stay within the tensors and return NaN."""

import importlib
import itertools
from dataclasses import replace

import pytest
import torch

from lares_fast import _dispatch, ops
from lares_fast._errors import InputError
from lares_fast.ops import _triton
from lares_fast.ops.attention import AttentionCall
from tests.support.fake_device import NoScalarReads
from tests.support.recurrence_case import Case

pytestmark = pytest.mark.interpreted
HUGE, LOW = 2**62, -(2**63)


@pytest.fixture
def memory(monkeypatch):
    """Check every address, and that no two programs store to one element. Unwritten elements are NaN or a large number."""
    from tests.support import triton_interpreter

    with triton_interpreter.interpreted(monkeypatch) as memory:
        yield memory


# offsets, longest, and the sequences whose results are right; the rows of the others are NaN.
OFFSETS = [
    ([0, 5, 105, 110, 115], 20, [0, 2, 3]),
    ([0, 5, 26, 110, 115], 20, [0, 3]),
    ([0, 5, 40, 45, HUGE], 20, [0, 2]),
    ([0, 5, 40, 45, 110], 64, [0, 1, 2]),
    ([3, 5, 40, 45, 115], 64, [1, 2]),
    ([LOW, -7, 40, 45, 115], 64, [2]),
    ([0, 5, 40, 35, 115], 64, []),
    ([0, HUGE, LOW, -1, 115], 64, []),
    ([LOW, HUGE, LOW, HUGE, LOW], 20, []),
    ([115, 100, 50, 10, 0], 20, []),
    ([-1, -1, -1, -1, -1], 20, []),
    ([0, 0, 0, 0, 0], 20, []),
    ([0, 5, 5, 5, 2**31 + 5], 64, [0]),
]
ROWS = 115


def rows_of(offsets, sequences):
    """Return which of the rows belong to ``sequences``."""
    inside = torch.zeros(ROWS, dtype=torch.bool)
    for b in sequences:
        inside[offsets[b] : offsets[b + 1]] = True
    return inside


@pytest.mark.parametrize(("offsets", "longest", "right"), OFFSETS, ids=str)
@pytest.mark.parametrize("drop", [False, True])
def test_attention(offsets, longest, right, drop, memory):
    kernels = _triton.kernels("attention")
    query, key, value, grad = (torch.randn(ROWS, 2, 16) for _ in range(4))
    rows, seed = (torch.arange(4), torch.tensor([77])) if drop else (None, None)
    call = AttentionCall(query, key, value, torch.tensor(offsets), rows, seed, longest, 0.5, 0, 0, "triton")
    out, lse = kernels.forward(call)
    gradients = kernels.backward(call, out, lse, grad)
    inside = rows_of(offsets, right)
    for x in (out, *gradients):
        assert x[~inside].isnan().all() and x[inside].isfinite().all()
    for b in right:
        alone = slice(offsets[b], offsets[b + 1])
        own = {name: getattr(call, name)[alone].contiguous() for name in ("query", "key", "value")}
        bounds = torch.tensor([0, offsets[b + 1] - offsets[b]])
        wanted, _ = kernels.forward(replace(call, **own, offsets=bounds, rows=None if rows is None else rows[b : b + 1]))
        assert torch.equal(out[alone], wanted)


def call_of(offsets, longest, depth, output="tokens"):
    """Build a call whose values are not checked."""
    case = Case(lengths=[5, 35, 5, 70], D=64, H=2, inner=64, layers=1, depth=depth, p=0.25, output=output)
    return replace(case.operator_call(longest=longest), offsets=torch.tensor(offsets))


@pytest.mark.parametrize(("offsets", "longest", "right"), OFFSETS, ids=str)
@pytest.mark.parametrize("output", ["last", "steps", "tokens"])
def test_recurrence(offsets, longest, right, output, memory):
    lengths = [after - before for before, after in itertools.pairwise(offsets)]
    # The op takes no empty sequences, and if the first or the last offset is wrong, no sequence is right.
    right = [b for b in right if lengths[b] > 0 and offsets[0] == 0 and offsets[-1] == ROWS]
    call = call_of(offsets, longest, 2, output)
    _, out, tape = _dispatch.run("recurrence", "triton", call)
    if output == "tokens":
        inside = rows_of(offsets, right)
    else:
        inside = torch.zeros(4, dtype=torch.bool)
        inside[right] = True
        inside = inside.repeat_interleave(2) if output == "steps" else inside
    assert out[~inside].isnan().all() and out[inside].isfinite().all()
    grads = _dispatch.run("recurrence_backward", "triton", call, torch.ones_like(out), tape)
    for grad in grads:
        # Every weight's gradient is a sum over all sequences.
        assert grad.isnan().all()


def test_a_sequence_that_is_longer_than_its_tile_does_not_hide_its_neighbours(memory):
    """The results of its neighbours equal the results of a call without the long sequence."""
    offsets = [0, 5, 105, 110, 115]
    call = replace(call_of(offsets, 20, 2), keep=False)
    _, out, _ = _dispatch.run("recurrence", "triton", call)
    few = torch.cat((torch.arange(5), torch.arange(105, 115)))
    rest = {"h": call.h[few], "pre": call.pre[few], "offsets": torch.tensor([0, 5, 10, 15]), "rows": call.rows[[0, 2, 3]]}
    _, wanted, _ = _dispatch.run("recurrence", "triton", replace(call, **rest))
    torch.testing.assert_close(out[few], wanted, rtol=0, atol=0)


@pytest.mark.parametrize("depth", [[1, 0, 2, 1], [1, -5, 2, 1], [1, 2**16, 2, 1], [1, HUGE, 2, 1], [1, LOW, 2, 1]], ids=str)
@pytest.mark.parametrize("output", ["last", "tokens"])
def test_steps_that_are_none_or_without_end(depth, output, memory, monkeypatch):
    offsets = [0, 5, 60, 65, 115]
    call = call_of(offsets, 64, depth, output)
    with pytest.raises(InputError, match=r"depth must be in 1\.\.65534, but it spans"):
        _dispatch.run("recurrence", "triton", call)
    # Without gradients nothing waits for a GPU.
    monkeypatch.setattr(importlib.import_module("lares_fast.ops._recurrence_triton"), "_on_host", lambda depth: False)
    with NoScalarReads():
        _, out, _ = _dispatch.run("recurrence", "triton", replace(call, keep=False))
    inside = rows_of(offsets, [0, 2, 3]) if output == "tokens" else torch.tensor([True, False, True, True])
    assert out[~inside].isnan().all() and out[inside].isfinite().all()


@pytest.mark.parametrize("output", ["last", "steps", "tokens"])
def test_a_depth_above_its_bound(output, memory):
    offsets = [0, 5, 60, 65, 115]
    call = replace(call_of(offsets, 64, [1, 4, 2, 1], output), deepest=3)
    with NoScalarReads():
        _, out, tape = _dispatch.run("recurrence", "triton", call)
        grads = _dispatch.run("recurrence_backward", "triton", call, torch.ones_like(out), tape)
    inside = {
        "last": torch.tensor([True, False, True, True]),
        # The sequence has as many rows as the bound allows. After the last sequence there are rows of 0.
        "steps": torch.tensor([True, False, False, False] + [True] * 8),
        "tokens": rows_of(offsets, [0, 2, 3]),
    }[output]
    assert out[~inside].isnan().all() and out[inside].isfinite().all()
    assert output != "steps" or (out[4:7].any(1).all() and not out[7:].any())
    assert all(grad.isnan().all() for grad in grads)


def test_what_the_host_knows_is_refused(memory):
    with pytest.raises(InputError, match="offsets must rise from 0 to the number of tokens, 115, but there is only one offset"):
        _dispatch.run("recurrence", "triton", call_of([0], 64, 1))
    query = torch.randn(5, 2, 16)
    with pytest.raises(ValueError, match="offsets must rise from 0 to 5, the rows of query, but there is only one offset"):
        _triton.kernels("attention").forward(
            AttentionCall(query, query, query, torch.tensor([0]), None, None, 5, 0.0, 0, 0, "triton")
        )
    # On the CPU the host reads all offsets.
    with pytest.raises(InputError, match="offsets must rise from 0 to 5"):
        ops.attention(query, query, query, torch.tensor([0, 6]), 5, backend="triton")
