"""``ops.recurrence``: the options ``bf16`` and ``deepest`` of the backends that run on the CPU."""

from collections import Counter
from dataclasses import replace

import pytest
import torch

from lares_fast import _dispatch, _native
from lares_fast._errors import BackendError
from tests.support import oracle
from tests.support.recurrence_case import RAGGED, Case

pytestmark = pytest.mark.skipif(not _native.available()[0], reason=_native.available()[1])


@pytest.mark.parametrize("case", [
    {"depth": RAGGED, "output": "steps"}, {"adapter": "concat"}, {"adapter": "linear", "H": 4, "output": "tokens"},
    {"adapter": None, "depth": 1, "output": "tokens"}, {"D": 48, "H": 4, "inner": 80}, {"p": 0, "D": 16, "H": 1, "inner": 32},
], ids=str)  # fmt: skip
def test_bf16_stays_within_the_tolerances_of_bf16(case):
    case = Case(**case)
    case.tensors = {name: x.bfloat16().float() for name, x in case.tensors.items()}
    before = _dispatch.calls["recurrence", "native"]
    found = case.call(case.tensors, "native", bf16=True)
    assert _dispatch.calls["recurrence", "native"] == before + 1
    dtypes = (torch.bfloat16, torch.float64)
    twin, truth = (case.call({name: x.to(dtype) for name, x in case.tensors.items()}, "reference") for dtype in dtypes)
    oracle.check("forward", {"out": found.bfloat16()}, {"out": twin}, {"out": truth})


@pytest.mark.parametrize("adapter", ["add", "concat", None])
def test_bf16_rounds_what_the_reference_rounds(adapter):
    """One layer stays within the tolerances of fp32, and unrounded products do not. More layers would round differently."""
    case = Case(adapter=adapter, layers=1, depth=1)
    exact = case.call(case.tensors, "native")
    double = {name: x.double() for name, x in case.tensors.items()}
    truth, twin, found = (
        {"out": case.call(tensors, backend, bf16=True)}
        for tensors, backend in ((double, "reference"), (case.tensors, "reference"), (case.tensors, "native"))
    )
    oracle.check("forward", found, twin, truth)
    with pytest.raises(AssertionError):
        oracle.check("forward", {"out": exact}, twin, truth)


def test_bf16_has_gradients_on_the_reference_alone():
    case = Case(lengths=[2, 3], D=16, inner=32)
    with pytest.raises(BackendError, match="it has no gradients with bf16"):
        Case(lengths=[2], D=16, inner=32).run("native", bf16=True)
    with pytest.raises(BackendError, match="for bf16 give it bfloat16 tensors"):
        case.call(case.tensors, "layers", bf16=True)
    before = Counter(_dispatch.calls)
    case.run(None, bf16=True)
    assert set(_dispatch.calls - before) == {("recurrence", "reference"), ("recurrence_backward", "reference")}


@pytest.mark.parametrize("adapter", ["add", "concat"])
def test_bf16_rounds_operands_and_not_gradients(adapter):
    """A gradient stays close to the gradient without rounding, and it is no number of bf16."""
    case = Case(adapter=adapter, lengths=[20, 3, 17], layers=1, depth=2, std=0.05)
    case.tensors = {name: x.bfloat16().float() for name, x in case.tensors.items()}
    found, exact = case.run("reference", bf16=True), case.run("reference", torch.float64)
    half = case.run("reference", torch.bfloat16)
    for kind, mine, twin, truth in zip(("forward", "gradient"), found, half, exact, strict=True):
        oracle.check(kind, {name: x.bfloat16() for name, x in mine.items()}, twin, truth)
    for name, grad in found[1].items():
        assert grad.dtype == torch.float32
        if grad.numel() > 100:
            assert not torch.equal(grad, grad.bfloat16().float()), name


@pytest.mark.parametrize("backend", ["native", "layers", "reference"])
@pytest.mark.parametrize("output", ["last", "steps", "tokens"])
@pytest.mark.parametrize("depth", [2, [1, 3, 2]], ids=str)
def test_deepest_changes_nothing_but_the_rows_after_the_last_step(depth, output, backend):
    case = Case(lengths=[3, 1, 18], D=16, H=2, inner=32, layers=1, depth=depth, output=output)
    leaves = {name: x.requires_grad_() for name, x in case.tensors.items()}
    known, bounded = case.call(leaves, backend), case.call(leaves, backend, deepest=5)
    assert len(bounded) == (15 if output == "steps" else len(known))
    assert torch.equal(bounded[: len(known)], known)
    assert not bounded[len(known) :].any()
    weights = torch.randn_like(bounded)
    expected = torch.autograd.grad(known, list(leaves.values()), weights[: len(known)])
    for found, grad in zip(torch.autograd.grad(bounded, list(leaves.values()), weights), expected, strict=True):
        assert torch.equal(found, grad)


@pytest.mark.parametrize("depth", [2, [1, 3, 2]], ids=str)
def test_with_deepest_compilers_know_the_number_of_rows(depth):
    case = Case(lengths=[3, 1, 18], D=16, H=2, inner=32, layers=1, depth=depth, output="steps")
    case.options["deepest"] = 5
    # The flat tensor of weights is a leaf, because opcheck needs its gradient.
    call = case.operator_call(backend="native")
    torch.library.opcheck(
        torch.ops.lares_fast.recurrence, replace(call, weights=call.weights.detach().requires_grad_()).arguments()
    )
    compiled = torch.compile(lambda x: case.call({**case.tensors, "h": x}, None), fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(case.tensors["h"]), case.call(case.tensors, None))
