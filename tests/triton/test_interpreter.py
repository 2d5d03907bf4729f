"""The test harness around the interpreter catches the faults that it is made for, and computes bf16 as a GPU does."""

import pytest
import torch

pytestmark = pytest.mark.interpreted
SIZE = 64


@pytest.fixture(scope="module")
def kernels():
    from tests.support import triton_toys

    return triton_toys


@pytest.fixture
def memory(monkeypatch):
    from tests.support import triton_interpreter

    with triton_interpreter.interpreted(monkeypatch) as memory:
        yield memory


@pytest.fixture
def error():
    from triton.runtime.errors import InterpreterError

    return InterpreterError


def test_a_copy_is_allowed(kernels, memory):
    x, y = torch.randn(SIZE), torch.empty(SIZE)
    kernels.copy[(4,)](x, y, 0, 16)
    assert torch.equal(x, y)
    assert memory.launches == 1


@pytest.mark.parametrize("shift", [-1, 1])
def test_an_address_outside_is_caught(kernels, memory, error, shift):
    # The tensor is in the middle of its storage, so that a stray address hits memory that exists.
    whole = torch.randn(3 * SIZE)
    with pytest.raises(error, match="1 loads are outside every tensor"):
        kernels.copy[(4,)](whole[SIZE : 2 * SIZE], torch.empty(SIZE), shift, 16)
    with pytest.raises(error, match="1 stores are outside every tensor"):
        kernels.scatter[(4,)](whole[SIZE : 2 * SIZE], shift, 16)


def test_two_programs_that_store_to_one_element_are_caught(kernels, memory, error):
    with pytest.raises(error, match="two programs store to one element"):
        kernels.overlap[(4,)](torch.empty(SIZE), 16)


@pytest.mark.parametrize(
    ("operation", "x", "y", "exact"),
    [
        ("add", 2**31 - 2, 1, 2**31 - 1),
        ("add", 2**31 - 1, 1, None),
        ("sub", -(2**31), 1, None),
        ("sub", 1 - 2**31, 1, -(2**31)),
        ("mul", 2**16, 2**15, None),
        ("mul", -(2**16), 2**15, -(2**31)),
    ],
)
def test_a_number_of_32_bits_that_overflows_is_caught(operation, x, y, exact, kernels, memory, error):
    x, y = (torch.tensor([number], dtype=torch.int32) for number in (x, y))
    out = torch.zeros_like(x)
    if exact is None:
        with pytest.raises(error, match=f"int32 overflow detected for operation {operation}"):
            kernels.arithmetic[(1,)](x, y, out, operation)
    else:
        kernels.arithmetic[(1,)](x, y, out, operation)
        assert out.item() == exact
    out = torch.zeros(1, dtype=torch.int64)
    kernels.arithmetic[(1,)](x.long(), y.long(), out, operation)
    assert out.item() == {"add": x.long() + y, "sub": x.long() - y, "mul": x.long() * y}[operation]


def test_after_a_launch_and_after_a_fault_the_language_is_that_of_triton(kernels, memory, error):
    import triton.language as tl

    before = vars(tl).copy()
    one = torch.ones(1, dtype=torch.int32)
    kernels.arithmetic[(1,)](one, one, one.clone(), "add")
    with pytest.raises(error):
        kernels.arithmetic[(1,)](one * 2**30, one * 2**30, one.clone(), "add")
    assert vars(tl) == before


def test_what_is_not_written_is_nan(memory):
    for made in (torch.empty(5), torch.empty_like(torch.ones(5)), torch.ones(2).new_empty(5)):
        assert made.isnan().all()


def test_the_order_of_programs_is_chosen(kernels, monkeypatch):
    from tests.support import triton_interpreter

    # Program i adds a digit, so the number shows the order.
    for order, digits in ((None, 123), (lambda n: range(n - 1, -1, -1), 321)):
        spelled = torch.zeros(1)
        with triton_interpreter.interpreted(monkeypatch, order) as memory:
            memory.check = lambda *_, **__: None
            kernels.spell[(3,)](spelled)
        assert spelled.item() == digits


def test_casts_to_bf16_round_to_nearest_even(kernels, memory):
    x = torch.cat(
        (torch.randn(1000), torch.tensor([0.0, torch.inf, -torch.inf, torch.nan, 1e-40, 3.39e38, 1 + 2**-8, 1 + 3 * 2**-8]))
    )
    narrow, back = torch.empty(len(x), dtype=torch.bfloat16), torch.empty(len(x))
    kernels.round_trip[(1,)](x, narrow, back, len(x), 1024)
    torch.testing.assert_close(narrow, x.bfloat16(), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(back, x.bfloat16().float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dot_multiplies_the_values(kernels, memory, dtype):
    a, b = (torch.randint(-8, 9, (16, 16)).to(dtype) for _ in range(2))
    c = torch.empty(16, 16)
    kernels.product[(1,)](a, b, c, 16)
    assert torch.equal(c, a.float() @ b.float())


def test_arithmetic_in_bf16_is_refused(kernels, memory, error):
    x = torch.ones(16, dtype=torch.bfloat16)
    with pytest.raises(error, match="bf16 may only be"):
        kernels.double[(1,)](x, 16)


def calls():
    """Return a small call of each op, of rows [8, 64] on a backend."""
    from lares_fast import LARESConfig, ops, reference
    from lares_fast._random import Draw

    offsets, items, config = torch.tensor([0, 8]), torch.randn(40, 64), LARESConfig(n_items=2, inner_size=64, n_core_layers=1)
    weights = [weight.detach() for weight in reference.Recurrence(config).parameters()]
    how = {"n_heads": 2, "depth": 1, "longest": 8}
    draw = Draw((1, 2), torch.arange(2))
    return {
        "attention": lambda x, on: ops.attention(*3 * [x.view(8, 2, 32)], offsets, 8, backend=on),
        "embedding": lambda x, on: ops.embedding(torch.arange(1, 8), torch.tensor([0, 3, 7]), x, x, x[0], x[1], backend=on),
        "initial_state": lambda x, on: x + ops.initial_state(draw, torch.tensor([0, 3, 7]), 8, 64, backend=on),
        "linear_cross_entropy": lambda x, on: ops.target_logprob(x, items, torch.arange(8), backend=on),
        "recurrence": lambda x, on: ops.recurrence(x, offsets, weights, pre=x, backend=on, **how),
    }


# NumPy 2.5 raises an error where older versions warn. Triton up to 3.6 does it if a number bounds a loop or counts programs.
@pytest.mark.filterwarnings("error:Conversion of an array with ndim > 0 to a scalar:DeprecationWarning")
@pytest.mark.parametrize("op", ["attention", "embedding", "initial_state", "linear_cross_entropy", "recurrence"])
def test_no_array_is_taken_for_a_number(memory, op):
    call, x = calls()[op], torch.randn(8, 64)
    found = {}
    for backend in ("triton", "reference"):
        leaf = x.clone().requires_grad_()
        out = call(leaf, backend)
        found[backend] = out.detach(), *torch.autograd.grad(out, leaf, torch.linspace(-1, 1, out.numel()).view_as(out))
    for ours, theirs in zip(found["triton"], found["reference"], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_one_number_is_an_index_and_more_are_not():
    import operator

    import numpy as np
    from lares_fast.kernels._interpreted import patch_tensor

    class Tensor:
        """What Triton patches; its data as the interpreter holds them."""

        def __init__(self, data):
            self.handle = type("Handle", (), {"data": data})

    class Scope:
        set_attr = staticmethod(setattr)

    try:
        patch_tensor(Tensor, Scope)
    except TypeError:
        # Triton 3.5 undoes nothing.
        patch_tensor(Tensor)
    for shape in ((), (1,), (1, 1)):
        assert operator.index(Tensor(np.full(shape, 3))) == 3
    with pytest.raises(ValueError):
        operator.index(Tensor(np.arange(2)))
