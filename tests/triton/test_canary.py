"""The canary: what it finds wrong, what follows from it, and what it must never answer with another backend."""

import json

import pytest
import torch

from lares_fast import _dispatch, explain, ops
from lares_fast._errors import BackendError
from lares_fast.ops import _canary, _trials, _triton

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
WITH_KERNELS = ["attention", "linear_cross_entropy", "recurrence"]


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """The CPU taken for a GPU; returns the folder of verdicts."""
    monkeypatch.setenv("LARES_FAST_CACHE", str(tmp_path))
    monkeypatch.setattr(_triton, "obstacle", lambda tensor: None)
    monkeypatch.setattr(_triton, "_is_gpu", lambda tensor: True)
    monkeypatch.setattr(_canary, "identity", lambda device: {"gpu": "none"})
    monkeypatch.setattr(_canary, "_known", {})
    return tmp_path / "canary"


def softmax():
    return torch.randn(3, 16), torch.randn(40, 16), torch.tensor([1, 5, 39])


def backend_of(call):
    before = _dispatch.calls.copy()
    call()
    return [backend for _, backend in _dispatch.calls - before]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", _trials.ops())
def test_the_reference_passes_every_trial(op, dtype, monkeypatch):
    """Of integers all backends have the same answer."""
    fast = _trials.Trial.results
    monkeypatch.setattr(_trials.Trial, "results", lambda self, backend, *rest: fast(self, "reference", *rest))
    assert _canary.try_out(op, CPU, dtype) is None


@pytest.mark.interpreted
@pytest.mark.parametrize(
    ("op", "dtype", "variant"),
    [
        *[("attention", dtype, {"width": 32, "drop": True, "short": False}) for dtype in DTYPES],
        ("attention", torch.float32, {"width": 24, "drop": False, "short": True}),
        ("attention", torch.bfloat16, {"width": 128, "drop": True, "short": False}),
        *[("linear_cross_entropy", dtype, {"width": 64}) for dtype in DTYPES],
        *[("linear_cross_entropy", torch.float32, {"width": width}) for width in (1, 40, 256)],
        ("recurrence", torch.float32, {"width": 64}),
        ("recurrence", torch.bfloat16, {"width": 64}),
    ],
)
def test_the_kernels_pass(op, dtype, variant, monkeypatch):
    import triton_interpreter

    with triton_interpreter.interpreted(monkeypatch) as memory:
        assert _canary.try_out(op, CPU, dtype, **variant) is None
    assert memory.launches


PLANTED = {
    "wrong mask column": ("attention", "_tiles", "key[None, :] <= query[:, None]", "key[None, :] < query[:, None]"),
    "unwritten tile": ("attention", "attention", "* H * tiles if P else 0", "* H * tiles - 1 if P else 0"),
    "sum not rescaled": ("attention", "attention", "total = total * shrink +", "total = total +"),
    "keys' gradient unscaled": ("attention", "attention", "dk * (scale / LOG2E)", "dk"),
    "dropped weights in dV forgotten": ("attention", "attention", "weight = p * factor", "weight = p"),
    "ties lost": ("linear_cross_entropy", "linear_cross_entropy", "(item[None, :] < target[:, None])", "(item[None, :] < 0)"),
    "last item lost": (
        "linear_cross_entropy",
        "linear_cross_entropy",
        "(item[None, :] < high) &",
        "(item[None, :] < high - 1) &",
    ),
    "wrong target's slope": ("linear_cross_entropy", "linear_cross_entropy", "miss[:, None], -p)", "miss[:, None], p)"),
}


@pytest.mark.interpreted
@pytest.mark.parametrize("bug", PLANTED)
def test_a_planted_bug_is_found(bug, monkeypatch, tmp_path):
    import triton_interpreter

    op, *where = PLANTED[bug]
    triton_interpreter.plant(monkeypatch, tmp_path, ("_random", "_tiles", op), *where)
    with triton_interpreter.interpreted(monkeypatch):
        assert "its canary came out wrong on this GPU" in _canary.try_out(op, CPU, torch.bfloat16)


@pytest.mark.interpreted
@pytest.mark.parametrize("wrong", [False, True])
def test_a_wrong_kernel_gives_way_and_a_right_one_is_tried_once(wrong, gpu, monkeypatch, tmp_path):
    import triton_interpreter

    if wrong:
        folder = tmp_path / "planted"
        folder.mkdir()
        files = ("_random", "_tiles", "linear_cross_entropy")
        triton_interpreter.plant(monkeypatch, folder, files, *PLANTED["ties lost"][1:])
    with triton_interpreter.interpreted(monkeypatch) as memory:
        used = backend_of(lambda: ops.target_logprob(*softmax()))
        assert used[-1] != "triton" if wrong else used[-1] == "triton"
        (stored,) = gpu.iterdir()
        assert bool(json.loads(stored.read_text())["fault"]) == wrong
        # Another process finds the verdict.
        _canary._known.clear()
        launches = memory.launches
        assert ("its canary came out wrong" in explain("linear_cross_entropy", *softmax())) == wrong
        assert memory.launches == launches
        if wrong:
            with pytest.raises(BackendError, match="its canary came out wrong on this GPU"):
                ops.target_logprob(*softmax(), backend="triton")


def failing(monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(_trials.Trial, "results", fail)


def test_a_gpu_beyond_use_is_no_reason_for_another_backend(gpu, monkeypatch):
    for text in ("CUDA error: an illegal memory access was encountered", "Triton Error [CUDA]: misaligned address"):
        failing(monkeypatch, RuntimeError(text))
        for backend in (None, "triton"):
            with pytest.raises(RuntimeError, match=text.split(":")[1]):
                ops.target_logprob(*softmax(), backend=backend)
    assert not gpu.exists()


def test_kernels_that_do_not_fit_or_compile_give_way(gpu, monkeypatch):
    from triton.runtime.errors import OutOfResources

    for error in (
        OutOfResources(200_000, 100_000, "shared memory"),
        OSError("no space"),
        RuntimeError("Failed to find C compiler"),
    ):
        _canary._known.clear()
        failing(monkeypatch, error)
        assert backend_of(lambda: ops.target_logprob(*softmax())) != ["triton"]
        with pytest.raises(BackendError, match=f"cannot be compiled or loaded here .{type(error).__name__}"):
            ops.target_logprob(*softmax(), backend="triton")
    # They may do after an upgrade, or when there is space again.
    assert not gpu.exists()


def test_no_canary_within_a_capture(gpu, monkeypatch):
    monkeypatch.setattr(_canary, "_capturing", lambda device: True)
    with pytest.raises(RuntimeError, match="run lares-fast warmup"):
        ops.target_logprob(*softmax())


def test_two_answers_are_one_too_many(monkeypatch):
    answers = iter((1.0, 2.0))

    def results(self, backend, dtype, device):
        truth = self.truth(dtype)
        return _trials.Results({name: x * next(answers) for name, x in truth.forward.items()}, truth.exact, truth.gradients)

    monkeypatch.setattr(_trials.Trial, "results", results)
    assert "two answers" in _canary.try_out("attention", CPU, torch.float32)


def test_a_folder_that_cannot_be_written_is_no_obstacle(gpu, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("LARES_FAST_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(_canary, "try_out", lambda *_, **__: "it is wrong")
    assert _canary.refusal("attention", CPU, torch.float32) == "it is wrong"


def test_a_damaged_verdict_is_made_again(gpu, monkeypatch):
    monkeypatch.setattr(_canary, "try_out", lambda *_, **__: None)
    _canary.refusal("attention", CPU, torch.float32)
    (stored,) = gpu.iterdir()
    stored.write_text("{")
    _canary._known.clear()
    monkeypatch.setattr(_canary, "try_out", lambda *_, **__: "it is wrong")
    assert _canary.refusal("attention", CPU, torch.float32) == "it is wrong"
