"""The self-test of kernels: which faults it finds, which backend runs then, and which errors lead to no other backend."""

import errno
import importlib
import json
import os
import threading
import time

import pytest
import torch

from lares_fast import _dispatch, _files, explain, ops
from lares_fast._errors import BackendError
from lares_fast.ops import _triton
from lares_fast.verify import cases, self_test

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
WITH_KERNELS = ["attention", "embedding", "initial_state", "linear_cross_entropy", "recurrence"]


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """Treat the CPU as a GPU; return the folder of stored results."""
    monkeypatch.setenv("LARES_FAST_CACHE", str(tmp_path))
    monkeypatch.setattr(_triton, "obstacle", lambda tensor: None)
    monkeypatch.setattr(_triton, "_is_gpu", lambda tensor: True)
    monkeypatch.setattr(self_test, "identity", lambda device: {"gpu": "none"})
    monkeypatch.setattr(self_test, "_known", {})
    return tmp_path / "self_test"


def softmax():
    return torch.randn(3, 16), torch.randn(40, 16), torch.tensor([1, 5, 39])


def backend_of(call):
    before = _dispatch.calls.copy()
    call()
    return [backend for _, backend in _dispatch.calls - before]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", cases.ops())
def test_the_reference_passes_every_trial(op, dtype, monkeypatch):
    """For integers all backends give equal results."""
    fast = cases.Case.results
    monkeypatch.setattr(cases.Case, "results", lambda self, backend, *rest: fast(self, "reference", *rest))
    assert self_test.run(op, CPU, dtype) is None


@pytest.mark.interpreted
@pytest.mark.parametrize(
    ("op", "dtype", "variant"),
    [
        *[("attention", dtype, {"width": 32, "drop": True, "short": False}) for dtype in DTYPES],
        ("attention", torch.float32, {"width": 24, "drop": False, "short": True}),
        ("attention", torch.bfloat16, {"width": 128, "drop": True, "short": False}),
        *[("embedding", dtype, {}) for dtype in DTYPES],
        ("embedding", torch.float32, {"width": 40, "drop": False}),
        ("embedding", torch.float32, {"width": 256, "train": False}),
        *[("initial_state", torch.float32, {"width": width}) for width in (1, 40, 64, 256)],
        *[("linear_cross_entropy", dtype, {"width": 64}) for dtype in DTYPES],
        *[("linear_cross_entropy", torch.float32, {"width": width}) for width in (1, 40, 256)],
        ("recurrence", torch.float32, {"width": 64}),
        ("recurrence", torch.bfloat16, {"width": 64}),
        ("recurrence", torch.float32, {"adapter": "add", "output": "steps", "bf16": True}),
        ("recurrence", torch.float32, {"inner": 256, "adapter": "add", "output": "last", "drop": False, "train": False}),
        ("recurrence", torch.bfloat16, {"adapter": "none", "output": "tokens", "drop": False, "train": False, "long": True}),
        ("recurrence", torch.bfloat16, {"inner": 64, "adapter": "linear", "output": "steps", "heads": 4}),
    ],
)
def test_the_kernels_pass(op, dtype, variant, monkeypatch):
    from tests.support import triton_interpreter

    with triton_interpreter.interpreted(monkeypatch) as memory:
        assert self_test.run(op, CPU, dtype, **variant) is None
    assert memory.launches


PLANTED = {
    "wrong mask column": ("attention", "_tiles", "key[None, :] <= query[:, None]", "key[None, :] < query[:, None]"),
    "unwritten tile": ("attention", "attention", "* H * tiles if P else 0", "* H * tiles - 1 if P else 0"),
    "sum not rescaled": ("attention", "attention", "total = total * shrink +", "total = total +"),
    "keys' gradient unscaled": ("attention", "attention", "dk * (scale / LOG2E)", "dk"),
    "dropped weights in dV forgotten": ("attention", "attention", "weight = p * factor", "weight = p"),
    "wrong sequence": ("embedding", "_packed", "high = tl.where(later, high, middle)", "high = middle"),
    "wrong site of h0": ("initial_state", "_random", "_SITE_STATE = tl.constexpr(4)", "_SITE_STATE = tl.constexpr(3)"),
    "ties lost": ("linear_cross_entropy", "linear_cross_entropy", "(item[None, :] < target[:, None])", "(item[None, :] < 0)"),
    "last item lost": (
        "linear_cross_entropy",
        "linear_cross_entropy",
        "(item[None, :] < high) &",
        "(item[None, :] < high - 1) &",
    ),
    "wrong target's slope": ("linear_cross_entropy", "_catalog_backward", "miss[:, None], p)", "-miss[:, None], p)"),
    "sequences see each other": ("recurrence", "_layers", "(column >= begin[:, :, None])", "(column >= 0 * begin[:, :, None])"),
    "keys' gradient not turned": ("recurrence", "_recurrence_backward", "rows_times(turned, q, G)", "rows_times(ds, q, G)"),
}
FILES = {
    "embedding": ("_random", "_packed", "embedding"),
    "initial_state": ("_random", "_packed", "initial_state"),
    "attention": ("_random", "_tiles", "attention"),
    "linear_cross_entropy": ("_random", "_tiles", "_catalog", "_catalog_backward", "linear_cross_entropy"),
    "recurrence": ("_random", "_layers", "_recurrence_plan", "recurrence", "_recurrence_weights", "_recurrence_backward"),
}


@pytest.mark.interpreted
@pytest.mark.parametrize("bug", PLANTED)
def test_a_planted_bug_is_found(bug, monkeypatch, tmp_path):
    from tests.support import triton_interpreter

    op, *where = PLANTED[bug]
    triton_interpreter.plant(monkeypatch, tmp_path, FILES[op], *where)
    with triton_interpreter.interpreted(monkeypatch):
        assert "its self-test failed on this GPU" in self_test.run(op, CPU, torch.bfloat16)


@pytest.mark.interpreted
@pytest.mark.parametrize("wrong", [False, True])
def test_a_wrong_kernel_gives_way_and_a_right_one_is_tried_once(wrong, gpu, monkeypatch, tmp_path):
    from tests.support import triton_interpreter

    if wrong:
        folder = tmp_path / "planted"
        folder.mkdir()
        triton_interpreter.plant(monkeypatch, folder, FILES["linear_cross_entropy"], *PLANTED["ties lost"][1:])
    with triton_interpreter.interpreted(monkeypatch) as memory:
        used = backend_of(lambda: ops.target_logprob(*softmax()))
        assert used[-1] != "triton" if wrong else used[-1] == "triton"
        (stored,) = gpu.iterdir()
        assert bool(json.loads(stored.read_text())["fault"]) == wrong
        # Another process would find the stored result.
        self_test._known.clear()
        launches = memory.launches
        assert ("its self-test failed" in explain("linear_cross_entropy", *softmax())) == wrong
        assert memory.launches == launches
        if wrong:
            with pytest.raises(BackendError, match="its self-test failed on this GPU"):
                ops.target_logprob(*softmax(), backend="triton")


def failing(monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(cases.Case, "results", fail)


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
        self_test._known.clear()
        failing(monkeypatch, error)
        assert backend_of(lambda: ops.target_logprob(*softmax())) != ["triton"]
        with pytest.raises(BackendError, match=f"cannot be compiled or loaded here .{type(error).__name__}"):
            ops.target_logprob(*softmax(), backend="triton")
    # They may work after an upgrade, or when there is space again.
    assert not gpu.exists()


def test_no_self_test_within_a_capture(gpu, monkeypatch):
    monkeypatch.setattr(self_test, "capturing", lambda device: True)
    with pytest.raises(RuntimeError, match="run lares-fast warmup"):
        ops.target_logprob(*softmax())


def test_two_answers_are_one_too_many(monkeypatch):
    answers = iter((1.0, 2.0))

    def results(self, backend, dtype, device):
        truth = self.truth(dtype)
        return cases.Results({name: x * next(answers) for name, x in truth.forward.items()}, truth.exact, truth.gradients)

    monkeypatch.setattr(cases.Case, "results", results)
    assert "different results" in self_test.run("attention", CPU, torch.float32)


def test_a_folder_that_cannot_be_written_is_no_obstacle(gpu, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("LARES_FAST_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(self_test, "run", lambda *_, **__: "it is wrong")
    assert self_test.refusal("attention", CPU, torch.float32) == "it is wrong"


def test_a_damaged_verdict_is_made_again(gpu, monkeypatch):
    monkeypatch.setattr(self_test, "run", lambda *_, **__: None)
    self_test.refusal("attention", CPU, torch.float32)
    (stored,) = gpu.iterdir()
    stored.write_text("{")
    self_test._known.clear()
    monkeypatch.setattr(self_test, "run", lambda *_, **__: "it is wrong")
    assert self_test.refusal("attention", CPU, torch.float32) == "it is wrong"


def test_a_verdict_of_another_user_or_about_another_thing_is_made_again(gpu, monkeypatch):
    monkeypatch.setattr(self_test, "run", lambda *_, **__: None)
    self_test.refusal("attention", CPU, torch.float32)
    (stored,) = gpu.iterdir()
    right = stored.read_text()
    monkeypatch.setattr(self_test, "run", lambda *_, **__: "it is wrong")

    def refused():
        self_test._known.clear()
        return self_test.refusal("attention", CPU, torch.float32)

    assert refused() is None
    for damage in (right.replace('"none"', '"another"'), '{"fault": null}', "[" * 100_000, right.replace("null", "[]")):
        stored.write_text(damage)
        assert refused() == "it is wrong", damage[:50]
    stored.write_text(right)
    assert refused() is None
    stored.write_text(right)
    # Everybody trusts files of root.
    if os.geteuid() == 0:
        os.chown(stored, 4242, -1)
    else:
        mine = os.geteuid()
        monkeypatch.setattr(os, "geteuid", lambda: mine + 1)
    with pytest.warns(UserWarning, match="belongs to another account"):
        assert refused() == "it is wrong"


def test_nothing_is_left_of_a_verdict_that_cannot_be_written(gpu, monkeypatch):
    monkeypatch.setattr(self_test, "run", lambda *_, **__: None)

    def full(descriptor):
        raise OSError(errno.ENOSPC, "no space left")

    monkeypatch.setattr(_files.os, "fsync", full)
    assert self_test.refusal("attention", CPU, torch.float32) is None
    assert list(gpu.iterdir()) == []


def together(count, call):
    """Return the results, or errors, of ``count`` threads."""
    answers = []

    def one():
        try:
            answers.append(call())
        except RuntimeError as error:
            answers.append(str(error))

    threads = [threading.Thread(target=one) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
        assert not thread.is_alive(), "a thread waits for ever"
    return answers


def test_threads_wait_for_the_verdict_of_the_first(gpu, monkeypatch):
    tried = []

    def slow(op, *_, **__):
        tried.append(op)
        time.sleep(0.2)
        # This is a call made by the self-test, which must not wait for itself.
        assert self_test.refusal("attention", CPU, torch.float32) is None
        return "it is wrong"

    monkeypatch.setattr(self_test, "run", slow)
    answers = together(6, lambda: self_test.refusal("attention", CPU, torch.float32))
    assert answers == ["it is wrong"] * 6
    assert len(tried) == 1


def test_who_waited_tries_for_himself_where_the_first_one_failed(gpu, monkeypatch):
    tried = []

    def fail(*_, **__):
        tried.append(1)
        time.sleep(0.05)
        raise RuntimeError("an illegal memory access")

    monkeypatch.setattr(self_test, "run", fail)
    assert together(3, lambda: self_test.refusal("attention", CPU, torch.float32)) == ["an illegal memory access"] * 3
    assert len(tried) == 3
    assert not self_test._trying and not self_test._own


def test_a_capture_does_not_wait_for_another_thread(gpu, monkeypatch):
    monkeypatch.setattr(self_test, "capturing", lambda device: True)
    monkeypatch.setattr(self_test, "_trying", {("attention", CPU, torch.float32)})
    with pytest.raises(RuntimeError, match="were not tested on this GPU before the graph capture"):
        self_test.refusal("attention", CPU, torch.float32)


def test_a_backward_of_a_self_test_needs_no_other_thread(gpu, monkeypatch):
    """On a GPU the backward would run in the only thread of the device, which may be waiting for the self-test."""
    seen = []

    def note(*_, **__):
        seen.append(torch._C._is_multithreading_enabled())

    monkeypatch.setattr(self_test, "run", note)
    self_test.refusal("attention", CPU, torch.float32)
    assert seen[-1] is False


def variants(call):
    """Return the variants that a call passes to ``_triton.refusal``, which the self-test of ``recurrence`` tries."""
    asked = []
    triton = importlib.import_module("lares_fast.ops._recurrence_triton")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton._triton, "refusal", lambda op, tensor, **variant: asked.append(variant) or "not now")
        call()
    return asked


def test_the_self_test_tries_what_is_launched():
    """A call of the published model without gradients has its own kernels, and no kernel of a backward."""
    from tests.support.recurrence_case import Case

    case = Case(lengths=[5, 20], inner=256, layers=1, adapter="add", depth=2, output="last", p=0)
    (answer,) = variants(lambda: case.call(case.tensors, None, longest=20))
    assert answer in cases.shipped("recurrence")
    assert not answer["train"] and not answer["drop"]
    case = Case(lengths=[5, 20], inner=256, layers=1, adapter="add", depth=2, output="steps", p=0.5)
    leaves = {name: x.clone().requires_grad_() for name, x in case.tensors.items()}
    train = variants(lambda: case.call(leaves, None, longest=20))
    assert train[0] in cases.shipped("recurrence") and train[0]["train"] and train[0]["drop"]
    # Each property that compiles another kernel gives another variant.
    others = [
        Case(lengths=[5, 20], inner=64, layers=1, adapter="add", depth=2, p=0),
        Case(lengths=[5, 20], inner=256, layers=1, adapter="linear", depth=2, p=0),
        Case(lengths=[5, 20], inner=256, layers=1, adapter=None, depth=2, p=0),
        Case(lengths=[5, 20], inner=256, layers=1, adapter="add", depth=2, p=0, H=4),
        Case(lengths=[5, 20], inner=256, layers=1, adapter="add", depth=2, p=0.5),
        Case(lengths=[5, 20], inner=256, layers=1, adapter="add", depth=2, p=0, output="tokens"),
        Case(lengths=[5, 20], inner=256, layers=1, adapter="add", depth=2, p=0),
    ]
    others[-1].options["bf16"] = True
    found = [
        answer,
        *(variant for one in others for variant in variants(lambda one=one: one.call(one.tensors, None, longest=20))),
    ]
    half = {name: x.half() for name, x in case.tensors.items()}
    found += [v for v in variants(lambda: case.call(half, None, longest=100))]
    assert len({tuple(sorted(variant.items())) for variant in found}) == len(found) == len(others) + 2


@pytest.mark.interpreted
def test_the_self_test_of_an_answer_launches_no_backward(monkeypatch):
    from lares_fast.kernels import _launch

    from tests.support import triton_interpreter

    names = []
    launch = _launch.launch
    module = importlib.import_module("lares_fast.kernels._recurrence_plan")
    monkeypatch.setattr(
        module, "launch", lambda kernel, *rest, **how: names.append(kernel.__name__) or launch(kernel, *rest, **how)
    )
    (answer, *_) = (v for v in cases.shipped("recurrence") if not v["train"])
    with triton_interpreter.interpreted(monkeypatch):
        assert self_test.run("recurrence", CPU, torch.float32, **answer) is None
    assert set(names) == {"plan", "recurrence_forward"}


@pytest.mark.parametrize("variant", cases.shipped("recurrence"), ids=str)
def test_the_reference_passes_every_shipped_trial(variant, monkeypatch):
    fast = cases.Case.results
    monkeypatch.setattr(cases.Case, "results", lambda self, backend, *rest: fast(self, "reference", *rest))
    assert self_test.run("recurrence", CPU, torch.float32, **variant) is None
