"""``ops.recurrence``: the tolerances of the backend ``layers``, PyTorch's layers around ``ops.attention``, and its choice."""

from collections import Counter
from dataclasses import replace

import pytest
import torch

from lares_fast import _dispatch, explain, ops
from lares_fast._errors import BackendError
from lares_fast.ops import _recurrence_layers
from tests.support import oracle
from tests.support.fake_device import NoScalarReads
from tests.support.recurrence_case import RAGGED, Case

HALF, BF16 = torch.float16, torch.bfloat16

# The kernels of `triton` take none of these sizes, and `native` takes only half of them.
CASES = [
    {"D": 48, "inner": 80, "p": 0, "layers": 1, "depth": 1},
    {"D": 48, "inner": 80, "adapter": "linear"},
    {"D": 24, "H": 3, "inner": 40, "adapter": "concat", "depth": RAGGED, "output": "steps"},
    {"D": 32, "inner": 48, "output": "steps", "p": 0.1},
    {"D": 32, "inner": 48, "output": "tokens", "depth": RAGGED, "adapter": "concat"},
    {"D": 32, "inner": 48, "depth": RAGGED, "adapter": "linear", "layers": 1},
    {"D": 40, "H": 1, "inner": 24, "adapter": None, "depth": 1, "output": "tokens"},
    {"D": 40, "H": 5, "inner": 24, "adapter": None, "depth": 2},
    {"D": 256, "H": 4, "inner": 96, "layers": 1, "depth": 2, "lengths": [1, 200, 33], "std": 0.05},
    {"D": 16, "H": 1, "inner": 16, "layers": 1, "depth": 2, "lengths": [520, 3]},
    {"D": 7, "H": 1, "inner": 5, "layers": 1, "depth": 1, "lengths": [1]},
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_stays_within_the_tolerances(case):
    before = Counter(_dispatch.calls)
    case = Case(**case)
    case.check("layers")
    counted = _dispatch.calls - before
    assert counted["recurrence", "layers"] == 1
    assert counted["recurrence_backward", "layers"] == case.upstreams


@pytest.mark.parametrize("dtype", [HALF, BF16])
@pytest.mark.parametrize("case", [{"adapter": "concat"}, {"D": 7, "H": 1, "depth": [1, 2, 1], "output": "steps"}], ids=str)
def test_stays_within_the_tolerances_in_half_precision(case, dtype):
    # With larger weights the reference itself exceeds the tolerances.
    few = {"lengths": [20, 3, 17], "D": 48, "inner": 64, "layers": 1, "depth": 1, "p": 0.1, "std": 0.05}
    Case(**{**few, **case}).check("layers", dtype)


@pytest.mark.interpreted
@pytest.mark.parametrize(("dtype", "case"), [
    (torch.float32, {"D": 32, "lengths": [20, 3, 49], "depth": [2, 1, 3], "output": "steps", "adapter": "linear"}),
    (torch.float32, {"D": 48, "lengths": [130, 20], "depth": 1, "adapter": "concat"}),
    (BF16, {"D": 48, "lengths": [20, 3, 17], "depth": 1, "p": 0.1, "adapter": "concat"}),
    (HALF, {"D": 96, "lengths": [17, 64], "depth": 1, "adapter": None}),
], ids=str)  # fmt: skip
def test_stays_within_the_tolerances_around_the_kernels_of_attention(dtype, case, monkeypatch):
    from tests.support import triton_interpreter

    case = Case(**{"inner": 64, "layers": 1, "std": 0.15 if dtype == torch.float32 else 0.05, **case})
    case.options["longest"] = int(case.offsets.diff().max())
    before = Counter(_dispatch.calls)
    with triton_interpreter.interpreted(monkeypatch) as memory:
        case.check("layers", dtype)
    counted = _dispatch.calls - before
    assert memory.launches
    assert counted["attention", "triton"] == sum(counted[name] for name in counted if name[0] == "attention")


def change(**changes):
    return lambda case, patch: case.options.update(changes)


def attribute(name, wrong):
    """Replace ``_Steps.name`` by ``wrong(right)``."""
    return lambda case, patch: patch.setattr(_recurrence_layers._Steps, name, wrong(getattr(_recurrence_layers._Steps, name)))


PLANTED = {
    "another key": lambda case, patch: change(draw=type(case.options["draw"])((3, 8), case.options["draw"].rows))(case, patch),
    "no dropout of attention": change(attention_dropout=0.0),
    "another epsilon": change(eps=1e-3),
    "the wrong heads": change(n_heads=4),
    "steps counted from 0": attribute("advance", lambda right: lambda self, t, *rest: right(self, t - 1, *rest)),
    "one layer's address for all": attribute(
        "layer", lambda right: lambda self, *rest, step, layer: right(self, *rest, step=step, layer=0)
    ),
    "sites exchanged": attribute("dropped", lambda right: lambda self, x, site, **where: right(self, x, 3 - site, **where)),
    "a norm without its bias": attribute(
        "norm",
        lambda right: lambda self, x, parts, name: right(self, x, {**parts, f"{name}.bias": 0 * parts[f"{name}.bias"]}, name),
    ),
    "sequences that stop late": attribute("__init__", lambda right: lambda self, call: (right(self, call), late(self))[0]),
}


def late(steps):
    steps.until = steps.until + 1


@pytest.mark.parametrize("bug", PLANTED)
def test_a_planted_bug_is_caught(bug, monkeypatch):
    right, wrong = (Case(lengths=[5, 20, 3], D=32, inner=48, depth=[2, 3, 1]) for _ in range(2))
    truth, twin = right.run("reference", torch.float64), right.run("reference")
    PLANTED[bug](wrong, monkeypatch)
    found = wrong.run("layers")
    for kind, i in (("forward", 0), ("gradient", 1)):
        with pytest.raises(AssertionError, match="exceeds"):
            oracle.check(kind, found[i], twin[i], truth[i])


def small(**changes):
    return Case(**{"lengths": [3, 1, 18], "D": 24, "H": 2, "inner": 40, "layers": 1, "depth": 2, **changes})


def test_a_batch_may_be_empty():
    for output in ("last", "steps", "tokens"):
        out, grads = small(lengths=[], output=output, depth=[]).run("layers")
        assert out["out"].shape == (0, 24)
        assert all(not grad.any() for grad in grads.values())


def test_without_gradients_the_same_bits():
    case = small()
    assert torch.equal(case.call(case.tensors, "layers"), case.run("layers")[0]["out"])


def test_a_sequence_does_not_depend_on_its_batch():
    Case(p=0, D=48, inner=64).check_alone("layers")


@pytest.mark.parametrize("changes", [{}, {"depth": [2, 1, 3], "output": "steps"}], ids=str)
def test_opcheck_and_compile(changes):
    case = small(**changes)
    case.tensors = {name: x.requires_grad_() for name, x in case.tensors.items()}
    tensors = list(case.tensors.values())
    call = case.operator_call(backend="layers")
    leaves = replace(call, weights=call.weights.detach().requires_grad_())
    torch.library.opcheck(torch.ops.lares_fast.recurrence, leaves.arguments())

    def step(x):
        return case.call({**case.tensors, "h": x}, "layers").square().sum()

    expected = torch.autograd.grad(step(tensors[0]), tensors)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for found, grad in zip(torch.autograd.grad(compiled(tensors[0]), tensors), expected, strict=True):
        assert torch.equal(found, grad)


def test_views_and_expanded_gradients():
    case = small(output="tokens")
    dense = {name: x.requires_grad_() for name, x in case.tensors.items()}
    case.call(dense, "layers").backward(torch.ones(22, 24))
    strided = {name: torch.stack((x, x), dim=-1).detach()[..., 0].requires_grad_() for name, x in dense.items()}
    case.call(strided, "layers").sum().backward()
    for name, x in dense.items():
        assert torch.equal(strided[name].grad, x.grad), name


def test_autocast_changes_nothing():
    case = small()
    plain = case.run("layers")
    with torch.autocast("cpu", dtype=BF16):
        out, grads = case.run("layers")
    assert torch.equal(out["out"], plain[0]["out"])
    assert all(torch.equal(grad, plain[1][name]) for name, grad in grads.items())


def test_the_backward_runs_where_the_forward_did():
    case = small()
    out = case.call({name: x.requires_grad_() for name, x in case.tensors.items()}, "layers").sum()
    before = Counter(_dispatch.calls)
    with _dispatch.backend("reference"):
        out.backward()
    assert (_dispatch.calls - before)["recurrence_backward", "layers"] == 1


def test_asked_for_by_the_environment_attention_still_chooses(monkeypatch):
    monkeypatch.setenv("LARES_FAST_BACKEND", "layers")
    case = small()
    assert case.call(case.tensors, None).shape == (3, 24)
    with pytest.raises(BackendError, match="attention has no backend 'layers'"):
        ops.attention(*[torch.zeros(3, 1, 16)] * 3, torch.tensor([0, 3]), 3)


@pytest.mark.parametrize("output", ["last", "steps", "tokens"])
def test_the_backward_waits_for_no_gpu(output):
    """This test checks the backward alone: tests/test_no_waiting.py checks the forward."""
    call = small(lengths=[20, 3]).operator_call(output=output, longest=20)
    with NoScalarReads():
        _, out, tape = _dispatch.run("recurrence", "layers", call)
        _dispatch.run("recurrence_backward", "layers", call, out, tape)


def test_dispatch_takes_them_for_gpus_only():
    case = small()
    h, _, *weights = case.tensors.values()
    said = explain("recurrence", h, case.offsets, weights).splitlines()
    assert [line.split()[0] for line in said[1:]] == ["triton", "native", "layers", "reference"]
    assert said[0] == "recurrence: reference"
    assert said[3] == "  layers     can run if it is requested: it is meant for GPUs, and h is on cpu"
    assert explain("recurrence", h, case.offsets, weights, backend="layers").startswith("recurrence: layers")


def test_dispatch_takes_them_on_a_gpu(monkeypatch):
    """The device ``meta`` stands for a GPU; it has no values and no kernels."""
    case = small()
    h, _, *weights = (x.to("meta") for x in case.tensors.values())
    monkeypatch.setattr(_recurrence_layers, "_is_gpu", lambda tensor: True)
    said = explain("recurrence", h, case.offsets.to("meta"), weights).splitlines()
    assert said[0] == "recurrence: layers"
    assert said[1] == "  triton     cannot run: it takes widths of 64 and 128, and h has 24"
    assert said[3:] == ["  layers     would run", "  reference  can run"]
