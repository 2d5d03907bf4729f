"""``ops.recurrence``: the native backend against the padded reference in fp64, with dropout, and what the op promises."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lares_fast import _dispatch, _native, _random, explain, ops, reference
from lares_fast._errors import BackendError, InputError
from lares_fast._random import Draw
from lares_fast.config import LARESConfig
from tests.support import oracle
from tests.support.recurrence_case import LENGTHS, RAGGED, Case

pytestmark = pytest.mark.skipif(not _native.available()[0], reason=_native.available()[1])


@pytest.mark.parametrize("case", [
    {"p": 0, "layers": 1, "depth": 1}, {"p": 0}, {"p": 0.1, "depth": RAGGED}, {"p": 0.5, "layers": 1},
    {"adapter": "linear"}, {"adapter": "concat"}, {"adapter": "concat", "depth": RAGGED, "output": "steps"},
    {"adapter": None, "depth": 1, "output": "tokens"}, {"adapter": None, "depth": 2},
    {"output": "steps"}, {"output": "steps", "depth": RAGGED}, {"output": "tokens", "depth": RAGGED},
    {"D": 16, "H": 1, "inner": 32}, {"D": 16, "H": 2, "inner": 32}, {"D": 16, "H": 4, "inner": 48},
    {"H": 1}, {"H": 4}, {"D": 128, "H": 4, "inner": 256, "layers": 1},
    {"D": 48, "inner": 80, "adapter": "concat"}, {"lengths": [1]}, {"lengths": [300, 512], "layers": 1, "depth": 2},
], ids=str)  # fmt: skip
def test_stays_within_the_tolerances(case):
    before = _dispatch.calls["recurrence_backward", "native"]
    case = Case(**case)
    case.check()
    assert _dispatch.calls["recurrence_backward", "native"] == before + case.upstreams


def change(**changes):
    return lambda case: case.options.update(changes)


def shift_offsets(case):
    case.offsets[3] += 1


PLANTED = {
    "a mask of other rows": lambda case: change(draw=Draw((3, 7), case.options["draw"].rows.roll(1)))(case),
    "a mask of another key": lambda case: change(draw=Draw((3, 8), case.options["draw"].rows))(case),
    "another dropout scale": change(dropout=0.5 + 2**-15),
    "no dropout of attention": change(attention_dropout=0.0),
    "a sequence that begins one token late": shift_offsets,
    "one step more": change(depth=4),
    "another epsilon": change(eps=1e-3),
    "the wrong heads": change(n_heads=4),
}


@pytest.mark.parametrize("bug", PLANTED)
def test_a_planted_bug_is_caught(bug):
    right, wrong = Case(), Case()
    PLANTED[bug](wrong)
    truth, twin, found = right.run("reference", torch.float64), right.run("reference"), wrong.run("native")
    for kind, i in (("forward", 0), ("gradient", 1)):
        with pytest.raises(AssertionError):
            oracle.check(kind, found[i], twin[i], truth[i])


def test_threads_do_not_change_a_bit(monkeypatch):
    case = Case(lengths=LENGTHS * 3, depth=RAGGED * 3)
    threads = torch.get_num_threads()
    results = []
    for n in (1, 2, 3):
        torch.set_num_threads(n)
        try:
            results.append(case.run("native"))
        finally:
            torch.set_num_threads(threads)
    for out, grads in results[1:]:
        assert torch.equal(out["out"], results[0][0]["out"])
        for name, grad in grads.items():
            assert torch.equal(grad, results[0][1][name]), name


def test_a_batch_may_be_empty():
    case = Case(lengths=[])
    out, grads = case.run("native")
    assert out["out"].shape == (0, 64)
    assert all(not grad.any() for grad in grads.values())


def test_without_gradients_the_same_bits():
    case = Case()
    assert torch.equal(case.call(case.tensors, "native"), case.run("native")[0]["out"])


def test_a_sequence_does_not_depend_on_its_batch():
    Case(p=0).check_alone("native")


def leaves_of(call):
    """Return the arguments of the operator. The flat tensor of weights is a leaf, because opcheck needs its gradient."""
    return replace(call, weights=call.weights.detach().requires_grad_()).arguments()


def test_opcheck_and_compile():
    case = Case(lengths=[3, 1, 18], D=16, H=2, inner=32, layers=1)
    case.tensors = {name: x.requires_grad_() for name, x in case.tensors.items()}
    h, _, *weights = case.tensors.values()
    torch.library.opcheck(torch.ops.lares_fast.recurrence, leaves_of(case.operator_call(backend="native")))
    compiled = torch.compile(lambda x: case.call({**case.tensors, "h": x}, "native") * 2, fullgraph=True, backend="aot_eager")
    out = compiled(h)
    assert torch.equal(out, case.call(case.tensors, "native") * 2)
    out.sum().backward()
    assert torch.isfinite(weights[0].grad).all()


@pytest.mark.parametrize(("change", "message"), [
    ({"h": torch.ones(3)}, "h must be a floating-point"),
    ({"pre": torch.ones(3, 16)}, r"pre must be torch\.float32 \[5, 16\]"),
    ({"offsets": torch.tensor([0.0, 5.0])}, "offsets must be int64"),
    ({"offsets": torch.tensor([0, 2, 4])}, "offsets must rise from 0 to the number of tokens, 5"),
    ({"offsets": torch.tensor([0, 5, 5])}, "by at least 1 a sequence"),
    ({"offsets": torch.zeros(0, dtype=torch.int64)}, "offsets must have B"),
    ({"depth": 0}, "depth must be at least 1 and at most 65,534, but got 0"),
    ({"depth": 2**63 - 1}, "depth must be at least 1 and at most 65,534"),
    ({"depth": torch.tensor([1, 0])}, "depth must be at least 1 and at most 65,534, but spans 0..1"),
    ({"depth": torch.tensor([1, 65_535])}, "but spans 1..65535"),
    ({"depth": torch.tensor([1])}, r"depth must be int64 \[2\]"),
    ({"depth": 1.5}, "depth must be an integer, but got 1.5"),
    ({"offsets": torch.tensor([0, 2, 5], device="meta")}, "offsets must be on cpu like h, but are on meta"),
    ({"adapter": "sum"}, "adapter must be one of add, concat, linear, but got 'sum'"),
    ({"adapter": "none"}, "adapter must be one of add, concat, linear, but got 'none'"),
    ({"output": "all"}, "output must be one of"),
    ({"n_heads": 3}, "n_heads must divide the width"),
    ({"dropout": 1.0}, r"dropout must be in \[0, 1\)"),
    ({"weights": [torch.ones(16)] * 4}, "weights must have 2 tensors of the adapter"),
    ({"weights": [torch.ones(3)] * 18}, "norm.weight must be"),
    ({"draw": Draw((0, 0), torch.arange(3))}, r"draw\.rows must be torch\.int64 \[2\]"),
    ({"longest": 2}, "longest must be at least every length, up to 3, but got 2"),
    ({"depth": 4, "deepest": 3}, "deepest must be at least every depth, up to 4, but got 3"),
    ({"depth": torch.tensor([1, 4]), "deepest": 3}, "deepest must be at least every depth, up to 4, but got 3"),
    ({"deepest": 0}, "deepest must be at least 1 and at most 65,534, but got 0"),
    ({"deepest": 1.5}, "deepest must be an integer, but got 1.5"),
    ({"backend": "fast"}, "backend must be one of"),
])  # fmt: skip
def test_bad_arguments(change, message):
    case = Case(lengths=[2, 3], D=16, H=2, inner=32, layers=1)
    h, pre, *weights = case.tensors.values()
    arguments = {"h": h, "offsets": case.offsets, "weights": weights, "n_heads": 2, "pre": pre, **change}
    with pytest.raises(InputError, match=message):
        ops.recurrence(arguments.pop("h"), arguments.pop("offsets"), arguments.pop("weights"), **arguments)


def test_what_the_native_backend_leaves_to_the_reference():
    case = Case(lengths=[2, 3], D=24, H=2, inner=32, layers=1)
    with pytest.raises(BackendError, match="multiples of 16 up to 256, and h has 24"):
        case.run("native")
    h, _, *weights = case.tensors.values()
    assert explain("recurrence", h, case.offsets, weights).startswith("recurrence: reference")
    assert case.run(None)[0]["out"].shape == (2, 24)


class Revealed:
    """A model that shows a mask of its last layer in the signs of its states. Only the weights that are set here are not 0."""

    def __init__(self, D, H, layers, lengths):
        config = LARESConfig(n_items=2, hidden_size=D, n_heads=H, inner_size=32, n_core_layers=layers, adapter="concat")
        module = reference.Recurrence(config)
        self.weights = {name: torch.full_like(x, float("norm.weight" in name)) for name, x in module.named_parameters()}
        self.lengths, self.H, self.last = lengths, H, f"core.layers.{layers - 1}"
        # The input of a step is `pre` alone.
        self.weights["adapter.linear.weight"][:, D:] = torch.eye(D)

    def states(self, pre, draw, depth, **rates):
        offsets = torch.tensor([0, *self.lengths]).cumsum(0)
        weights = list(self.weights.values())
        options = {"n_heads": self.H, "pre": pre, "adapter": "concat", "depth": depth, "output": "tokens", "draw": draw}
        out = ops.recurrence(torch.zeros_like(pre), offsets, weights, backend="native", **options, **rates)
        return out.split(self.lengths)


@pytest.mark.parametrize(("p", "key"), [(0.1, (1, 2)), (0.5, (2**32 - 1, 7))])
@pytest.mark.parametrize(("layers", "depth"), [(1, 1), (1, 3), (3, 2)])
class TestMasksBitForBit:
    """The kernel applies the masks of ``_random``, also at rows and steps far from 0."""

    lengths = (1, 5, 17, 50)
    draw_rows = torch.tensor([2**32 - 1, 0, 70000, 3])

    @pytest.mark.parametrize("D", [64, 208])
    @pytest.mark.parametrize(("bias", "site"), [("attention.output", 1), ("feed_forward.down", 2)])
    def test_hidden(self, bias, site, D, layers, depth, p, key):
        model = Revealed(D, 2, layers, self.lengths)
        # The bias is far above the state and column 0, so a column is above the mean if it is kept, and below if not.
        model.weights[f"{model.last}.{bias}.bias"][1:] = 1e4
        draw = Draw(key, self.draw_rows)
        found = model.states(torch.randn(sum(self.lengths), D), draw, depth, dropout=p, attention_dropout=0.0)
        address = {"site": site, "step": depth, "layer": layers - 1, "rows": self.draw_rows, "length": 50, "width": D}
        keep = _random.keep_hidden(key, _random.drop_threshold(p), **address)
        for states, mask in zip(found, keep, strict=True):
            assert torch.equal(states[:, 1:] > 0, mask[: len(states), 1:])

    @pytest.mark.parametrize(("D", "H"), [(64, 1), (128, 2), (256, 4)])
    def test_attention(self, D, H, layers, depth, p, key):
        model = Revealed(D, H, layers, self.lengths)
        width = D // H
        # Token j has a column of its own in each head. The first column belongs to no token.
        pre = torch.cat([torch.eye(width)[1 : length + 1].repeat(1, H) for length in self.lengths])
        low, high = torch.nn.functional.layer_norm(pre[0], (D,)).aminmax()
        model.weights[f"{model.last}.attention.value.weight"] += torch.eye(D) / (high - low)
        model.weights[f"{model.last}.attention.value.bias"] -= low / (high - low)
        # All visible keys have equal weights, and a kept key is far above the state. If no key is kept, the first column is.
        model.weights[f"{model.last}.attention.output.weight"] += 1e6 * torch.eye(D)
        model.weights[f"{model.last}.attention.output.bias"][0] = 1e4
        draw = Draw(key, self.draw_rows)
        found = model.states(pre, draw, depth, dropout=0.0, attention_dropout=p)
        address = {"step": depth, "layer": layers - 1, "rows": self.draw_rows, "heads": H, "length": 50}
        keep = _random.keep_attention(key, _random.drop_threshold(p), **address).tril()
        for states, mask in zip(found, keep, strict=True):
            length = len(states)
            by_head = states.view(length, H, width)[..., 1 : length + 1].transpose(0, 1)
            assert torch.equal(by_head > 0, mask[:, :length, :length])


def test_depths_by_sequence_compile_with_all_steps():
    case = Case(lengths=[3, 1, 18], D=16, H=2, inner=32, layers=1, depth=[2, 1, 3], output="steps")
    case.tensors = {name: x.requires_grad_() for name, x in case.tensors.items()}
    tensors = list(case.tensors.values())

    def step(x):
        return case.call({**case.tensors, "h": x}, None).square().sum()

    expected = torch.autograd.grad(step(tensors[0]), tensors)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for found, grad in zip(torch.autograd.grad(compiled(tensors[0]), tensors), expected, strict=True):
        assert torch.equal(found, grad)


def test_the_backward_runs_where_the_forward_did():
    case = Case(lengths=[3, 4], D=16, H=2, inner=32, layers=1)
    tensors = {name: x.requires_grad_() for name, x in case.tensors.items()}
    out = case.call(tensors, "reference").sum()
    before = Counter(_dispatch.calls)
    with _dispatch.backend("native"):
        out.backward()
    assert _dispatch.calls - before == Counter({("recurrence_backward", "reference"): 1})


@pytest.mark.parametrize("backend", ["native", "layers", "reference"])
def test_the_operator_reads_the_key_from_its_seed(backend):
    case = Case(lengths=[3, 4], D=16, H=2, inner=32, layers=1)
    key = (2**31 + 5, 2**32 - 1)
    expected = case.call(case.tensors, backend, draw=Draw(key, case.options["draw"].rows))
    call = case.operator_call(backend=backend, keep=False)
    assert not torch.equal(torch.ops.lares_fast.recurrence(*call.arguments())[0], expected)
    call.seed.copy_(_random.seed_of(key, call.seed.device))
    assert torch.equal(torch.ops.lares_fast.recurrence(*call.arguments())[0], expected)


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_the_operator_checks_the_size_of_its_weights(backend):
    call = Case(lengths=[3, 4], D=16, H=2, inner=32, layers=1).operator_call(backend=backend)
    with pytest.raises(InputError, match=f"weights must have {len(call.weights)} numbers in all, but have 7"):
        torch.ops.lares_fast.recurrence(*replace(call, weights=call.weights[:7]).arguments())


def test_the_tape_has_no_gradient():
    made = []

    class Log(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            made.append(func)
            return result

    case = Case()
    h = case.tensors["h"].requires_grad_()
    out = case.call(case.tensors, "native")
    with Log():
        torch.autograd.grad(out, h, torch.ones_like(out))
    # Otherwise PyTorch would make zeros as large as the tape, as its gradient.
    assert torch.ops.lares_fast.recurrence_backward.default in made
    assert torch.ops.aten.zeros.default not in made


def test_an_undefined_gradient_passes_through():
    class Undefined(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return None

    case = Case()
    h = case.tensors["h"].requires_grad_()
    Undefined.apply(case.call(case.tensors, "native")).sum().backward()
    assert h.grad is None


def test_views_and_expanded_gradients():
    case = Case(lengths=[3, 4], D=16, H=2, inner=32, layers=1)
    expected = case.call(case.tensors, "native")
    strided = {name: torch.stack((x, x), dim=-1)[..., 0].requires_grad_() for name, x in case.tensors.items()}
    out = case.call(strided, "native")
    assert torch.equal(out, expected)
    out.sum().backward()
    dense = {name: x.detach().clone().requires_grad_() for name, x in case.tensors.items()}
    case.call(dense, "native").backward(torch.ones_like(expected))
    for name, x in dense.items():
        assert torch.equal(strided[name].grad, x.grad), name


def test_a_sequence_too_long_for_the_native_backend():
    case = Case(lengths=[513], D=16, H=1, inner=16, layers=1, depth=1, p=0)
    with pytest.raises(BackendError, match="sequences of up to 512 tokens, and one has 513"):
        case.call(case.tensors, "native")
    before = Counter(_dispatch.calls)
    case.call(case.tensors, None)
    assert _dispatch.calls - before == Counter({("recurrence", "reference"): 1})


@pytest.mark.parametrize("backend", ["reference", "layers", "native"])
@pytest.mark.parametrize("of", ["h", "pre", "weights"])
def test_a_second_derivative_is_refused(backend, of):
    case = Case(lengths=[2, 3], D=16, H=2, inner=32, layers=1)
    if backend == "native" and not _native.available()[0]:
        pytest.skip(_native.available()[1])
    h, pre, *weights = (x.detach().float() for x in case.tensors.values())
    wanted = {"h": [h], "pre": [pre], "weights": weights}[of]
    for leaf in wanted:
        leaf.requires_grad_()
    out = ops.recurrence(h, case.offsets, weights, n_heads=2, pre=pre, depth=2, backend=backend)
    gradients = torch.autograd.grad(out.sum(), wanted, create_graph=True)
    with pytest.raises(NotImplementedError, match="recurrence can be differentiated only once"):
        sum(gradient.square().sum() for gradient in gradients).backward()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_padding_of_the_reference_has_no_gradient_of_its_own(dtype):
    """Short and long sequences together. Equal numbers as padding of the short one would overflow fp16 in a layer norm."""
    case = Case(lengths=[1, 9], D=16, H=2, inner=32, layers=2)
    leaves = [x.detach().to(dtype).requires_grad_() for x in case.tensors.values()]
    h, pre, *weights = leaves
    out = ops.recurrence(h, case.offsets, weights, n_heads=2, pre=pre, depth=3, backend="reference")
    for gradient in torch.autograd.grad(out.float().sum(), leaves):
        assert gradient.isfinite().all()


@pytest.mark.parametrize(("change", "message"), [
    ({"threads": None}, "threads is missing"),
    ({"width": "wide"}, "width has a wrong type or is out of range"),
    ({"hidden_threshold": -1}, "hidden_threshold has a wrong type or is out of range"),
    ({"adapter": "sum"}, "adapter has an unknown value"),
    ({"weights": [0]}, "the number of weights is wrong"),
    ({"speed": 3}, "an unknown argument was given"),
])  # fmt: skip
def test_the_native_function_takes_each_argument_by_its_name(change, message):
    weight = torch.zeros(256)
    numbers = {"batch": 0, "width": 16, "n_heads": 1, "inner_size": 16, "n_layers": 1, "eps": 1e-12, "threads": 1}
    words = {"adapter": "none", "output": "last", "bf16": False, "key": (0, 0), "weights": [weight.data_ptr()] * 16}
    dropout = {"hidden_threshold": 0, "attention_threshold": 0, "first_step": 0}
    tensors = dict.fromkeys(("h", "pre", "offsets", "depth", "rows", "tape", "out"), 0)
    right = {**numbers, **words, **dropout, **tensors}
    _native.load().recurrence_forward(**right)
    wrong = {name: value for name, value in {**right, **change}.items() if value is not None}
    with pytest.raises((TypeError, ValueError), match=message):
        _native.load().recurrence_forward(**wrong)
