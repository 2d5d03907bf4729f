"""``ops.recurrence``: the native backend against the padded reference in fp64, dropout included, and its contract."""

import subprocess
import sys
from pathlib import Path

import oracle
import pytest
import torch
from recurrence_case import LENGTHS, RAGGED, Case

from lares_fast import _dispatch, _native, explain, ops
from lares_fast._errors import BackendError, InputError
from lares_fast._random import Draw

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
def test_obeys_the_tolerance_law(case):
    before = _dispatch.calls["recurrence_backward", "native"]
    Case(**case).check()
    assert _dispatch.calls["recurrence_backward", "native"] == before + 1


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
    case = Case(p=0)
    whole = case.call(case.tensors, "native")
    first, last = case.offsets[4:6].tolist()
    alone = {**case.tensors, "h": case.tensors["h"][first:last], "pre": case.tensors["pre"][first:last]}
    case.offsets = torch.tensor([0, last - first])
    assert torch.allclose(case.call(alone, "native")[0], whole[4], rtol=0, atol=1e-5)


@pytest.mark.parametrize("level", ["generic", "avx2", "avx512"])
def test_at_every_simd_level(level):
    from lares_fast import _C

    now = _C.level()
    try:
        _C.use_level(level)
    except ValueError as error:
        pytest.skip(str(error))
    _C.use_level(now)
    code = "import test_recurrence as t; t.Case(depth=t.RAGGED, adapter='concat').check(); t.Case(D=48, inner=80).check()"
    environment = {"LARES_FAST_SIMD": level, "PYTHONPATH": ":".join([str(Path(__file__).parent), *filter(None, sys.path)])}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr


def test_opcheck_and_compile():
    case = Case(lengths=[3, 1, 18], D=16, H=2, inner=32, layers=1)
    case.tensors = {name: x.requires_grad_() for name, x in case.tensors.items()}
    h, pre, *weights = case.tensors.values()
    rows = case.options["draw"].rows
    arguments = (
        h,
        pre,
        case.offsets,
        None,
        2,
        weights,
        rows,
        [3, 7],
        [0.5, 0.5],
        2,
        "add",
        "last",
        1e-12,
        None,
        True,
        "native",
    )
    torch.library.opcheck(torch.ops.lares_fast.recurrence, arguments)
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
    ({"depth": 0}, "depth must be at least 1, but got 0"),
    ({"depth": torch.tensor([1, 0])}, "depth must be at least 1, but it falls to 0"),
    ({"depth": torch.tensor([1])}, r"depth must be int64 \[2\]"),
    ({"adapter": "sum"}, "adapter must be one of"),
    ({"output": "all"}, "output must be one of"),
    ({"n_heads": 3}, "n_heads must divide the width"),
    ({"dropout": 1.0}, r"dropout must be in \[0, 1\)"),
    ({"weights": [torch.ones(16)] * 4}, "weights must be the 2 of the adapter"),
    ({"weights": [torch.ones(3)] * 18}, "norm.weight must be"),
    ({"draw": Draw((0, 0), torch.arange(3))}, r"draw\.rows must be int64 \[2\]"),
    ({"longest": 2}, "longest must be at least the length of every sequence, 3"),
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
