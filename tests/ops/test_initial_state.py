"""``ops.initial_state``: equal bits of the CPU backends, the stated tolerance of the Triton kernel, and errors."""

import itertools

import pytest
import torch

from lares_fast import _dispatch, explain, ops, reference
from lares_fast._errors import BackendError, InputError
from lares_fast._random import Draw, exact_normal_of, seed_of, state_uniforms, truncated_normal
from lares_fast.ops._initial_state_call import InitialStateCall, build_call
from tests.support.catalog_cases import needs_native
from tests.support.fake_device import NoScalarReads
from tests.support.launches import counted

KEY = (5, 2**32 - 7)
SEED = seed_of(KEY, torch.device("cpu"))
# docs/numerics.md states this largest absolute error.
TOLERANCE = 1e-6
NATIVE = pytest.param("native", marks=needs_native)


def offsets_of(lengths):
    return torch.tensor([0, *lengths]).cumsum(0)


def truth(lengths, width, rows, *, std=1.0):
    """Return h0 in fp64, sequence by sequence."""
    parts = [state_uniforms(KEY, row.expand(n), torch.arange(n), width) for row, n in zip(rows, lengths, strict=True)]
    return torch.cat([torch.empty(0, width, dtype=torch.float64), *map(exact_normal_of, parts)]) * std


def check(lengths, width, std=1.0, backend="triton"):
    rows = torch.arange(len(lengths)) * 977 % 2**32 + 3
    found = ops.initial_state(Draw(SEED, rows), offsets_of(lengths), sum(lengths) + 2, width, std=std, backend=backend)
    assert found.dtype == torch.float32 and found.shape == (sum(lengths) + 2, width)
    assert not found[-2:].any()
    error = (found[:-2].double() - truth(lengths, width, rows, std=std)).abs()
    assert not error.numel() or error.max() <= TOLERANCE * std


CASES = [([], 8), ([1], 1), ([0, 3, 0, 1], 64), ([20, 13], 128), ([33], 48), ([2, 5], 256), ([1] * 70, 20), ([32, 32], 64)]


@pytest.mark.parametrize(("lengths", "width"), CASES, ids=str)
@pytest.mark.parametrize("backend", ["reference", NATIVE])
def test_torch(lengths, width, backend):
    check(lengths, width, 0.7, backend)


@pytest.mark.interpreted
@pytest.mark.parametrize(("lengths", "width"), CASES, ids=str)
def test_triton(lengths, width, monkeypatch):
    from tests.support import triton_interpreter

    with triton_interpreter.interpreted(monkeypatch) as memory:
        check(lengths, width, 0.7)
    assert memory.launches == (1 if lengths else 0)


@pytest.mark.interpreted
def test_triton_keeps_its_tolerance_over_many_draws(monkeypatch):
    """256,000 numbers; some of them are near the ends -3 and 3."""
    from tests.support import triton_interpreter

    lengths = [100] * 10
    with triton_interpreter.interpreted(monkeypatch):
        check(lengths, 256)
    assert truth(lengths, 256, torch.arange(10) * 977 + 3).abs().max() > 2.99


@pytest.mark.interpreted
def test_the_fit_at_every_kind_of_word(monkeypatch):
    """The words next to 0, to the middle and to 2**32 give the numbers next to -3, 0 and 3."""
    from tests.support import triton_interpreter, triton_toys

    near = torch.arange(2048)
    words = torch.cat((near, 2**31 - 1024 + near, 2**32 - 1 - near, torch.randint(2**32, (2**17,))))
    words = torch.nn.functional.pad(words, (0, -len(words) % 4096))

    out = torch.empty(len(words))
    with triton_interpreter.interpreted(monkeypatch):
        triton_toys.normals[(len(words) // 4096,)](words, out, 4096)
    expected = exact_normal_of((words.double() + 0.5) / 2**32)
    assert (out.double() - expected).abs().max() <= TOLERANCE
    assert out.abs().max() <= 3


PLANTED = {
    "wrong site": ("_random", "_SITE_STATE = tl.constexpr(4)", "_SITE_STATE = tl.constexpr(0)"),
    "words in another order": ("_random", "tl.join(_normal(w0), _normal(w2))", "tl.join(_normal(w0), _normal(w1))"),
    "end from the rounded number": ("_random", "end * (2.0 - end)", "(1.0 - tl.abs(x)) * (1.0 + tl.abs(x))"),
    "wrong coefficient": ("_random", "3.4880209e-01", "3.4880409e-01"),
    "position of the batch": ("_packed", "position = row - begin", "position = row - tl.load(OFFSETS)"),
    "last tile lost": ("initial_state", "cdiv(P, R)", "P // R"),
    "no end": ("initial_state", "row >= tl.load(OFFSETS + S)", "row > tl.load(OFFSETS + S)"),
}


@pytest.mark.interpreted
@pytest.mark.parametrize("bug", PLANTED)
def test_a_planted_bug_is_caught(bug, monkeypatch, tmp_path):
    from triton.runtime.errors import InterpreterError

    from tests.support import triton_interpreter

    triton_interpreter.plant(monkeypatch, tmp_path, ("_random", "_packed", "initial_state"), *PLANTED[bug])
    with triton_interpreter.interpreted(monkeypatch), pytest.raises((AssertionError, InterpreterError)):
        check([50, 20, 30, 41], 64)


@pytest.mark.interpreted
def test_the_order_of_programs_changes_no_bit(monkeypatch):
    from tests.support import triton_interpreter

    def bits(order):
        with triton_interpreter.interpreted(monkeypatch, order):
            return ops.initial_state(Draw(KEY, torch.arange(4)), offsets_of([40, 20, 33, 1]), 94, 64, backend="triton")

    assert torch.equal(bits(None), bits(lambda n: range(n - 1, -1, -1)))


HUGE, LOW = 2**62, -(2**63)


@pytest.mark.interpreted
@pytest.mark.parametrize("offsets", [
    [3, 5, 20, 25, 40], [0, 5, 20, 25, HUGE], [LOW, 5, 20, 25, 40], [0, 20, 5, 25, 40], [0, HUGE, LOW, -1, 40],
    [HUGE] * 5, [2**63 - 1] * 5, [LOW] * 5, [0] * 5, [40, 30, 20, 10, 0],
], ids=str)  # fmt: skip
def test_wrong_offsets_stay_within_the_tensors(offsets, monkeypatch):
    from tests.support import triton_interpreter

    call = InitialStateCall(torch.tensor(offsets), torch.arange(4), SEED, 45, 16, 1.0, "triton")
    with triton_interpreter.interpreted(monkeypatch), NoScalarReads():
        out = _dispatch.run("initial_state", "triton", call)
    after = torch.arange(45) >= offsets[-1]
    assert not out[after].any()
    if offsets == sorted(offsets):
        inside = torch.zeros(45, dtype=torch.bool)
        for begin, end in itertools.pairwise(offsets):
            # Positions have 63 bits.
            if begin > LOW and end <= 45:
                inside[max(0, begin) : max(0, end)] = True
        assert out[inside].isfinite().all() and out[~inside & ~after].isnan().all()


def test_launches():
    call = build_call(Draw(SEED, torch.arange(2)), offsets_of([20, 3]), 25, 64, std=0.5)
    with counted() as launches:
        _dispatch.run("initial_state", "triton", call)
    assert launches == {"initial_state": 1}


@pytest.mark.parametrize("backend", ["reference", NATIVE])
@pytest.mark.parametrize("rows", [[4, 4, 4], [4, 4, 5]])
def test_the_numbers_are_those_of_their_addresses(rows, backend):
    """This also holds if all sequences share one row, which are drawn once; a tensor is as good a key as integers."""
    rows, lengths = torch.tensor(rows), [7, 0, 12]
    expected = torch.cat(
        [truncated_normal(KEY, row.expand(n), torch.arange(n), 20) for row, n in zip(rows, lengths, strict=True)]
    )
    for key in (KEY, SEED):
        found = ops.initial_state(Draw(key, rows), offsets_of(lengths), 19, 20, std=0.3, backend=backend)
        assert torch.equal(found, expected * 0.3)
        assert torch.equal(reference.initial_state(Draw(key, rows), offsets_of(lengths), 19, 20, std=0.3), found)


@needs_native
def test_sequences_that_share_a_row_are_drawn_once(monkeypatch):
    """In evaluation all sequences have the same h0."""
    from lares_fast.ops import _initial_state_native

    drawn = []
    real = _initial_state_native.state_uniforms
    monkeypatch.setattr(_initial_state_native, "state_uniforms", lambda *x: drawn.append(len(x[1])) or real(*x))
    ops.initial_state(Draw(KEY, torch.zeros(500, dtype=torch.int64)), 20 * torch.arange(501), 10_000, 64, backend="native")
    assert drawn == [20]


def test_no_tokens():
    for lengths in ([], [0, 0]):
        draw = Draw(KEY, torch.zeros(len(lengths), dtype=torch.int64))
        assert ops.initial_state(draw, offsets_of(lengths), 0, 8).shape == (0, 8)
    assert not ops.initial_state(Draw(KEY, torch.zeros(0, dtype=torch.int64)), offsets_of([]), 3, 8).any()


def test_opcheck_and_compile():
    draw, offsets = Draw(SEED, torch.arange(2)), offsets_of([4, 2])
    call = build_call(draw, offsets, 7, 8, std=0.5, backend="reference")
    torch.library.opcheck(torch.ops.lares_fast.initial_state, call.arguments())

    def step(offsets):
        return ops.initial_state(Draw(SEED, torch.arange(2)), offsets, 7, 8) * 2

    assert torch.equal(torch.compile(step, fullgraph=True, backend="aot_eager")(offsets), step(offsets))


@pytest.mark.parametrize(("change", "message"), [
    ({"offsets": torch.tensor([0, 6], dtype=torch.int32)}, r"offsets must be torch\.int64 \[S \+ 1\]"),
    ({"offsets": torch.tensor([0, 7])}, "offsets must rise from 0 to at most n_tokens = 6"),
    ({"offsets": torch.tensor([1, 6])}, "offsets must rise from 0 to at most n_tokens = 6"),
    ({"offsets": torch.tensor([0, 5, 4]), "draw": Draw(KEY, torch.arange(2))}, "offsets must rise from 0"),
    ({"offsets": torch.zeros(0, dtype=torch.int64), "draw": Draw(KEY, torch.arange(0))}, r"offsets must be .* \[S \+ 1\]"),
    ({"draw": Draw(KEY, torch.arange(2))}, r"draw.rows must be torch.int64 \[1\]"),
    ({"draw": Draw(KEY, torch.zeros(1))}, r"draw.rows must be torch.int64 \[1\]"),
    ({"draw": Draw(torch.zeros(1), torch.arange(1))}, r"draw.key must be two integers or int64 \[1\]"),
    ({"n_tokens": -1}, "n_tokens must be at least 0"),
    ({"n_tokens": 2.5}, "n_tokens must be an integer"),
    ({"width": 0}, "width must be between 1 and"),
    ({"width": 2**63, "n_tokens": 0, "offsets": torch.zeros(2, dtype=torch.int64)}, "width must be between 1 and"),
    ({"std": "big"}, "std must be a number"),
    ({"backend": "fast"}, "backend must be one of"),
])  # fmt: skip
def test_bad_arguments(change, message):
    good = {"draw": Draw(KEY, torch.arange(1)), "offsets": offsets_of([6]), "n_tokens": 6, "width": 8}
    with pytest.raises(InputError, match=message):
        ops.initial_state(**{**good, **change})


@pytest.mark.parametrize(("width", "reason"), [
    (64, "it runs on an NVIDIA GPU, and the tensors are on cpu"), (257, "it takes up to 256 columns, and width is 257"),
])  # fmt: skip
def test_triton_says_why_not(width, reason):
    arguments = (Draw(KEY, torch.arange(1)), offsets_of([6]), 6, width)
    assert f"triton     cannot run: {reason}" in explain("initial_state", *arguments)
    with pytest.raises(BackendError, match=reason):
        ops.initial_state(*arguments, backend="triton")
