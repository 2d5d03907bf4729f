"""``ops.recurrence``: the Triton kernels in the interpreter (``-m interpreted``), and when they are not chosen."""

import pytest
import torch

from lares_fast import _dispatch, explain
from lares_fast._errors import BackendError
from lares_fast.ops import _triton
from tests.support import oracle
from tests.support.fake_device import NoScalarReads
from tests.support.launches import Counted
from tests.support.recurrence_case import Case

HALF, BF16 = torch.float16, torch.bfloat16
FILES = ("_random", "_layers", "_recurrence_plan", "recurrence", "_recurrence_weights", "_recurrence_backward")

# dtype, longest and the case. These are pairs and not all combinations. A tile has 64 rows, or 128 if longest exceeds 64.
# The cases with the linear adapter are small, because its gate needs four gradients.
CASES = [
    (torch.float32, 64, {"lengths": [1, 2, 20, 49], "depth": 1, "p": 0, "layers": 2}),
    (torch.float32, 64, {"lengths": [64, 63, 1], "depth": 2, "p": 0.1, "adapter": "concat"}),
    (torch.float32, 64, {"lengths": [50, 3], "depth": [1, 2], "output": "steps", "adapter": "linear"}),
    (torch.float32, 50, {"lengths": [20, 20, 20, 4], "depth": [8, 7, 6, 5], "output": "tokens", "adapter": None}),
    (torch.float32, 64, {"lengths": [33], "depth": 1, "output": "tokens", "D": 128, "H": 4, "adapter": "linear"}),
    (BF16, 64, {"lengths": [49, 2, 20, 50], "depth": 2, "output": "steps", "H": 1}),
    (BF16, 128, {"lengths": [65, 128, 1], "depth": 1, "H": 4, "adapter": "concat"}),
    (BF16, 64, {"lengths": [64, 20], "depth": [1, 2], "D": 128, "H": 1, "p": 0.1, "output": "tokens"}),
    (HALF, 128, {"lengths": [128, 63], "depth": 1, "D": 128, "H": 2, "adapter": None, "output": "tokens"}),
    (HALF, 64, {"lengths": [20, 1, 2, 33], "depth": [1, 4, 2, 3], "p": 0.1, "adapter": "concat", "output": "last"}),
]
# The same for products in bf16 of tensors in fp32.
BF16_CASES = [
    (128, {"lengths": [65, 20, 1], "depth": [1, 2, 1], "output": "steps", "layers": 2, "p": 0.1}),
    (64, {"lengths": [20, 3], "depth": 1, "adapter": "concat", "output": "tokens"}),
    (64, {"lengths": [33, 31], "depth": 2, "adapter": None, "p": 0}),
]


@pytest.mark.interpreted
@pytest.mark.parametrize(("dtype", "longest", "case"), CASES, ids=str)
def test_stays_within_the_tolerances(dtype, longest, case, monkeypatch):
    from tests.support import triton_interpreter

    # In half precision the reference itself exceeds the tolerances with larger weights, because the softmax is too sharp.
    case = Case(**{"layers": 1, "inner": 64, "std": 0.15 if dtype == torch.float32 else 0.05, **case})
    case.options["longest"] = longest
    before = _dispatch.calls["recurrence_backward", "triton"]
    with triton_interpreter.interpreted(monkeypatch):
        case.check("triton", dtype)
    assert _dispatch.calls["recurrence_backward", "triton"] == before + case.upstreams


def small(**changes):
    case = Case(**{"lengths": [20, 30, 7, 25], "layers": 1, "inner": 64, "depth": 2, "output": "tokens", **changes})
    case.options["longest"] = 64
    return case


@pytest.mark.interpreted
def test_the_order_of_programs_changes_no_bit(monkeypatch):
    from tests.support import triton_interpreter

    results = []
    for order in (None, lambda n: range(n - 1, -1, -1), lambda n: torch.randperm(n).tolist()):
        with triton_interpreter.interpreted(monkeypatch, order):
            results.append(small(lengths=[40, 30, 50], adapter="concat").run("triton"))
    for result in results[1:]:
        for mine, other in zip(results[0], result, strict=True):
            assert all(torch.equal(mine[name], other[name]) for name in mine)


@pytest.mark.interpreted
def test_the_surroundings_of_the_inputs_are_neither_read_nor_written(monkeypatch):
    from tests.support import triton_interpreter

    case = small()
    guarded = {name: triton_interpreter.between_guards(x) for name, x in case.tensors.items()}
    with triton_interpreter.interpreted(monkeypatch), torch.no_grad():
        out = case.call({name: inner for name, (inner, _) in guarded.items()}, "triton")
    twin, truth = case.run("reference")[0], case.run("reference", torch.float64)[0]
    oracle.check("forward", {"out": out}, twin, truth)
    assert all(untouched() for _, untouched in guarded.values())


@pytest.mark.interpreted
@pytest.mark.parametrize(("longest", "case"), BF16_CASES, ids=str)
def test_bf16_stays_within_the_tolerances_of_bf16(longest, case, monkeypatch):
    from tests.support import triton_interpreter

    case = Case(**{"layers": 1, "inner": 64, "std": 0.05, **case})
    case.tensors = {name: x.bfloat16().float() for name, x in case.tensors.items()}
    case.options["longest"] = longest
    with triton_interpreter.interpreted(monkeypatch):
        found = case.run("triton", bf16=True)
    twin, truth = case.run("reference", bf16=True), case.run("reference", torch.float64)
    assert all(x.dtype == torch.float32 for part in found for x in part.values())
    for kind, mine, other, exact in zip(("forward", "gradient"), found, twin, truth, strict=True):
        mine, other = ({name: x.bfloat16() for name, x in part.items()} for part in (mine, other))
        oracle.check(kind, mine, other, exact)


@pytest.mark.interpreted
def test_bf16_rounds_operands_alone(monkeypatch):
    """Biases and norms stay in fp32: where all matrices are numbers of bf16 and 0, the result has the tolerances of fp32."""
    from tests.support import triton_interpreter

    case = Case(lengths=[9], layers=1, inner=64, depth=1, p=0, output="tokens")
    case.options["longest"] = 9
    case.tensors = {name: 0 * x if x.dim() == 2 and name not in ("h", "pre") else x for name, x in case.tensors.items()}
    with triton_interpreter.interpreted(monkeypatch), torch.no_grad():
        found = {"out": case.call(case.tensors, "triton", bf16=True)}
    oracle.check("forward", found, case.run("reference")[0], case.run("reference", torch.float64)[0])


@pytest.mark.interpreted
@pytest.mark.parametrize("output", ["last", "steps", "tokens"])
def test_deepest_changes_no_bit_and_adds_rows_of_0(output, monkeypatch):
    from tests.support import triton_interpreter

    case = small(lengths=[20, 30, 7], depth=[1, 3, 2], output=output, p=0.1)
    with triton_interpreter.interpreted(monkeypatch):
        known, bounded = case.run("triton"), None
        rows = len(known[0]["out"])
        right = case.call

        def padded(tensors, backend, **changes):
            out = right(tensors, backend, **changes, deepest=5)
            assert len(out) == (15 if output == "steps" else rows)
            assert not out[rows:].any()
            return out[:rows]

        case.call = padded
        bounded = case.run("triton")
    for mine, other in zip(known, bounded, strict=True):
        assert all(torch.equal(mine[name], other[name]) for name in mine)


PLANTED = {
    "wrong mask column": ("_layers", "(column <= tile_rows(G)", "(column <= 1 + tile_rows(G)"),
    "sequences see each other": ("_layers", "(column >= begin[:, :, None])", "(column >= 0 * begin[:, :, None])"),
    "off-by-one offset": ("recurrence", "place = tl.load(OFFSETS + sequence)", "place = tl.load(OFFSETS + sequence) + 1"),
    "missing centring": ("_layers", "x -= (tl.sum(x, 2) / D)[:, :, None]", "x -= 0 * (tl.sum(x, 2) / D)[:, :, None]"),
    "missing norm bias": ("_layers", "* vector(base, D) + vector(base + D, D)", "* vector(base, D)"),
    "unwritten tile": ("recurrence", "recurrence_forward, plan.tiles,", "recurrence_forward, plan.tiles - 3,"),
    "wrong dropout site": ("_layers", "SITE_FEED_FORWARD_OUT = tl.constexpr(2)", "SITE_FEED_FORWARD_OUT = tl.constexpr(1)"),
    "wrong dropout quad": ("_layers", "(four - begin_four) // 4", "four // 4"),
    "one step too few": ("recurrence", "real & (t + 1 == depth)", "real & (t + 2 == depth)"),
    "missing norm term of the gradient": ("_recurrence_backward", " - x * (tl.sum(dx * x, 2) / D)[:, :, None]", ""),
    "keys' gradient not turned": ("_recurrence_backward", "rows_times(turned, q, G)", "rows_times(ds, q, G)"),
    "gradient of a wrong slope": ("_recurrence_backward", "-0.5 * u * u", "-u * u"),
    "slot forgotten": ("_recurrence_weights", "total += tl.load(SLOT + at)", "total += 0 * tl.load(SLOT + at)"),
    "the feed-forward half passes no gradient on": ("_recurrence_backward", "dx += rows_times(du, up, G)", "dx += 0"),
    "values pass no gradient on": ("_recurrence_backward", "k in range(0, 3 * D, PIECE)", "k in range(0, 2 * D, PIECE)"),
    "the output's gradient a step late": ("_recurrence_backward", "real & (t + 1 == depth), D)", "real & (t + 2 == depth), D)"),
    "one step's gradient of pre": ("_recurrence_backward", "dpre += load_tile(DPRE", "dpre += 0 * load_tile(DPRE"),
    "sums of tiles do not begin at 0": ("_recurrence_backward", "if t + 1 == deepest:\n", "if t == deepest:\n"),
    "factors of another half": ("_recurrence_backward", "store_tile(F + 3 * D, dsum,", "store_tile(F + 3 * D, 2 * dsum,"),
    "norms of the first tile alone": ("_recurrence_weights", "(r + row < tiles)", "(r + row < 1)"),
}  # fmt: skip


@pytest.mark.interpreted
@pytest.mark.parametrize("bug", PLANTED)
def test_a_planted_bug_is_caught(bug, monkeypatch, tmp_path):
    from triton.runtime.errors import InterpreterError

    from tests.support import triton_interpreter

    triton_interpreter.plant(monkeypatch, tmp_path, FILES, *PLANTED[bug])
    with triton_interpreter.interpreted(monkeypatch), pytest.raises((AssertionError, InterpreterError)):
        small().check("triton")


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("adapter", ["add", "concat", None])
@pytest.mark.parametrize("output", ["last", "steps", "tokens"])
def test_a_call_has_few_launches(output, adapter, bf16, monkeypatch):
    """All launches are counted, those of PyTorch included. With bf16 the weights are cast in each direction."""
    from lares_fast.kernels import _launch

    monkeypatch.setattr(_triton, "obstacle", lambda tensor: None)
    case, names = small(adapter=adapter, output=output, depth=[1, 2, 3, 1]), []
    call = case.operator_call(bf16=bf16, deepest=5)
    token = _launch.stand_in.set(lambda kernel, *_: names.append(kernel.fn.__name__))
    try:
        with Counted() as counted, NoScalarReads():
            _, out, tape = _dispatch.run("recurrence", "triton", call)
            assert names == ["plan", "recurrence_forward"]
            assert counted.launches.total() == bf16, counted.launches.table()
            _dispatch.run("recurrence_backward", "triton", call, torch.empty_like(out), tape)
    finally:
        _launch.stand_in.reset(token)
    assert names[2:] == [*["step_backward", "weight_gradients"] * 5, "collect_gradients"]
    assert counted.launches.total() == 2 * bf16, counted.launches.table()


@pytest.mark.interpreted
def test_no_sequences_launch_nothing(monkeypatch):
    from tests.support import triton_interpreter

    with triton_interpreter.interpreted(monkeypatch) as memory:
        out, grads = small(lengths=[]).run("triton")
    assert out["out"].shape == (0, 64)
    assert all(not grad.any() for grad in grads.values())
    assert memory.launches == 0


@pytest.mark.interpreted
def test_never_waits_for_the_device(monkeypatch):
    from tests.support import triton_interpreter

    call = small(lengths=[20, 3]).operator_call(output="steps")
    with triton_interpreter.interpreted(monkeypatch), NoScalarReads():
        _, out, tape = _dispatch.run("recurrence", "triton", call)
        _dispatch.run("recurrence_backward", "triton", call, out, tape)


@pytest.mark.parametrize(("change", "longest", "reason"), [
    ({}, 64, "it runs on an NVIDIA GPU, and the tensors are on cpu"),
    ({}, None, "it needs longest, the length of the longest sequence"),
    ({}, 65, "it takes sequences of up to 64 rows in torch.float32, and longest is 65"),
    ({"D": 48, "inner": 64}, 64, "it takes widths of 64 and 128, and h has 48"),
    ({"inner": 96}, 64, "it takes inner sizes that are multiples of 64, and the weights have 96"),
    ({"H": 8}, 64, "it takes heads of 16, 32, 64 or 128 columns, and they have 8"),
])  # fmt: skip
def test_says_why_not(change, longest, reason):
    case = small(**change)
    with pytest.raises(BackendError, match=reason):
        case.call(case.tensors, "triton", longest=longest)
    case.call(case.tensors, None, longest=longest)


def test_is_the_first_choice():
    h, _, *weights = small().tensors.values()
    assert explain("recurrence", h, torch.tensor([0, 82]), weights).splitlines()[1].startswith("  triton")
