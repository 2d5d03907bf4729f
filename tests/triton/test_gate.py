"""Check ptxas's output for every kernel: few spilled registers, products on tensor cores, vector loads."""

import pytest
import torch

from lares_fast import ops
from lares_fast._random import Draw
from lares_fast.verify import cases

pytestmark = pytest.mark.compiled

ALL = (80, 86, 90, 100, 120)
# In CI two versions of Triton share the cases: the newest, and the version of the newest CUDA build of torch
# (-m older_triton). Triton 3.6, the version of torch 2.10 and 2.11, compiles the cases for Hopper (-m hopper_triton).
NEWEST, OLDER, BOTH = "newest", "older", "both"
# D/H, dtype, dropout, longest; for which GPUs, and by which Triton. These are pairs and not all combinations, because the
# recurrence in fp32 takes up to a minute to compile.
CASES = [
    (16, torch.bfloat16, 0.2, 200, (86, 100), NEWEST),
    (32, torch.bfloat16, 0.2, 50, ALL, BOTH),
    (64, torch.bfloat16, 0.0, 50, (86, 90, 120), BOTH),
    (64, torch.float16, 0.2, 200, (80, 100), NEWEST),
    (128, torch.bfloat16, 0.2, 50, (80, 100), OLDER),
    (128, torch.bfloat16, 0.2, 50, (90, 120), NEWEST),
    # Triton 3.8 takes 255 registers for the queries' gradient on sm_80.
    (32, torch.float32, 0.2, 50, (80, 90), NEWEST),
    (128, torch.float32, 0.2, 50, (100,), NEWEST),
]
# The number of products of tiles, and of loaded tiles, in each kernel.
DOTS = {"attention_forward": 2, "attention_backward_query": 3, "attention_backward_key_value": 4}
TILES = {"attention_forward": 3, "attention_backward_query": 5, "attention_backward_key_value": 4}
# Registers by the bytes of a row of a head. With 128 registers a thread, eight programs of 64 threads fit.
REGISTERS = {32: 144, 64: 176, 128: 240, 256: 200, 512: 255}
# Higher ceilings for some versions of Triton: version -> (what, kernel, width, dtype, dropout) -> ceiling.
# To measure again, run this file under that Triton: a failure prints the numbers of each kernel above its ceiling.
ABOVE = {
    "3.6": {
        ("registers", "attention_backward_query", 32, torch.float32, True): 255,
        ("stack", "attention_backward_query", 32, torch.float32, True): 32,
        ("stack", "recurrence_forward", 128, torch.bfloat16, True): 808,
        ("stack", "step_backward", 128, torch.bfloat16, True): 1528,
    },
}
# The least warps of a multiprocessor: two for each of its four schedulers.
RESIDENT_WARPS = 8
# The size of one multiply-add instruction of a tensor core is 16 x 8 x 16.
PRODUCT = 2048


def each(cases):
    """Return a parameter for each case and GPU."""
    marks = {NEWEST: [pytest.mark.newest_triton], OLDER: [pytest.mark.older_triton]}
    marks[BOTH] = marks[NEWEST] + marks[OLDER]
    hopper = {90: [pytest.mark.hopper_triton]}
    return [
        pytest.param(*case, architecture, marks=marks[tritons] + hopper.get(architecture, []))
        for *case, architectures, tritons in cases
        for architecture in architectures
    ]


def hold(kernel, width, dtype, p, **ceilings):
    """Check that a kernel takes no more registers a thread, and no more bytes of stack, than its ceiling."""
    import triton

    above = ABOVE.get(triton.__version__.rpartition(".")[0], {})
    faults = []
    for what, ceiling in ceilings.items():
        ceiling = above.get((what, kernel.name, width, dtype, p > 0), ceiling)
        if getattr(kernel, what) > ceiling:
            faults.append(f"{getattr(kernel, what)} {what} > {ceiling}")
    assert not faults, f"{kernel.name}, width {width}, {dtype}, dropout {p}: {', '.join(faults)}"


def run(E, dtype, p, longest):
    query, key, value = (torch.zeros(longest, 2, E, dtype=dtype, requires_grad=True) for _ in range(3))
    draw = Draw((1, 2), torch.zeros(1, dtype=torch.int64))
    out = ops.attention(query, key, value, torch.tensor([0, longest]), longest, draw=draw, dropout=p, backend="triton")
    out.backward(torch.zeros_like(out))


@pytest.mark.parametrize(("E", "dtype", "p", "longest", "architecture"), each(CASES))
def test_attention(E, dtype, p, longest, architecture, monkeypatch):
    from tests.support import triton_gate

    kernels = triton_gate.compile_launches(monkeypatch, architecture, lambda: run(E, dtype, p, longest))
    assert [kernel.name for kernel in kernels] == list(DOTS)
    for kernel in kernels:
        assert not kernel.wrapping, kernel
        S, C, size = kernel.constants["S"], kernel.constants["C"], dtype.itemsize
        threads = 32 * kernel.warps
        assert kernel.shared <= triton_gate.SHARED_LIMIT[architecture] // 2, kernel
        assert kernel.resident_warps(architecture) >= RESIDENT_WARPS, kernel
        hold(kernel, E, dtype, p, registers=REGISTERS[E * size], stack=spills(E, dtype, kernel.name))
        assert kernel.count("LDG.E.128") >= TILES[kernel.name] * S * C * size // 16 // threads, kernel
        if dtype == torch.float32:
            # A product in TF32 would run on a tensor core.
            assert kernel.products == 0, kernel
        else:
            assert kernel.products >= DOTS[kernel.name] * S * S * C // PRODUCT // kernel.warps, kernel
            # There must be no WGMMA and no tcgen05, which older versions of ptxas and Triton sometimes compile wrongly.
            assert kernel.products == kernel.count("HMMA"), kernel


def spills(E, dtype, name):
    """Return how many bytes a thread may have in local memory: none in the forward of half precision."""
    if dtype == torch.float32:
        return 288 if E == 128 and name == "attention_backward_query" else 8
    if E == 128 and name == "attention_backward_key_value":
        # It clamps its offsets to the tensors, which takes two registers more than there are.
        return 16
    return 8 if E >= 64 and name != "attention_forward" else 0


def test_the_gate_sees_a_kernel_above_its_ceiling():
    from types import SimpleNamespace

    import triton

    kernel = SimpleNamespace(name="softmax_forward", registers=240, stack=17)
    hold(kernel, 64, torch.float32, 0.0, registers=240, stack=17)
    with pytest.raises(AssertionError, match=r"softmax_forward, width 64, .*: 17 stack > 16"):
        hold(kernel, 64, torch.float32, 0.0, registers=240, stack=16)
    for (what, name, width, dtype, drop), ceiling in ABOVE.get(triton.__version__.rpartition(".")[0], {}).items():
        kernel = SimpleNamespace(name=name, **{what: ceiling + 1})
        with pytest.raises(AssertionError):
            hold(kernel, width, dtype, 0.2 * drop, **{what: 0})


def test_the_gate_sees_a_spill(monkeypatch):
    from lares_fast.kernels import attention

    from tests.support import triton_gate

    monkeypatch.setattr(attention, "tile_size", lambda longest, row_bytes: 64)
    *_, wide = triton_gate.compile_launches(monkeypatch, 80, lambda: run(32, torch.bfloat16, 0.2, 200))
    assert wide.stack > spills(32, torch.bfloat16, wide.name)


def test_the_gate_sees_an_offset_that_wraps(monkeypatch):
    from lares_fast.kernels._launch import launch

    from tests.support import triton_gate, triton_toys

    def call():
        launch(triton_toys.copy, 4, torch.zeros(64), torch.zeros(64), 0, warps=4, S=16)

    (naive,) = triton_gate.compile_launches(monkeypatch, 80, call)
    # The load and the store.
    assert len(naive.wrapping) == 2


@pytest.mark.parametrize(("ptxas", "wgmma"), [((12, 9), False), ((13, 3), True)])
def test_the_gate_sees_products_that_are_not_sound(ptxas, wgmma, monkeypatch):
    from lares_fast.kernels import _launch, attention

    from tests.support import triton_gate

    monkeypatch.setitem(attention.WARPS, torch.bfloat16, 4)
    monkeypatch.setattr(attention, "tile_size", lambda longest, row_bytes: 64)
    monkeypatch.setattr(_launch, "_ptxas", lambda architecture: ptxas)
    forward, *_ = triton_gate.compile_launches(monkeypatch, 90, lambda: run(64, torch.bfloat16, 0.0, 64))
    assert (forward.count("HGMMA") > 0) == wgmma
    assert forward.products


# D, dtype; for which GPUs, and by which Triton.
CATALOG_CASES = [
    (64, torch.bfloat16, (90, 120), BOTH),
    (64, torch.bfloat16, (80, 100), OLDER),
    (64, torch.bfloat16, (86,), NEWEST),
    (128, torch.float16, (80, 120), NEWEST),
    (256, torch.bfloat16, (90, 100), NEWEST),
    (64, torch.float32, (86,), OLDER),
    (64, torch.float32, (90,), NEWEST),
]
# Kernel -> products of tiles, loaded tiles, and the ceiling of registers. Where a target's score is one of the products, the
# compiler keeps only its diagonal. The kernels that merge have no tiles.
CATALOG = {
    "softmax_forward": (1, 4, 240),
    "merge_sums": (0, 0, 128),
    "prepare_backward": (0, 2, 64),
    "softmax_backward_hidden": (2, 2, 240),
    "merge_gradients": (0, 0, 64),
    "softmax_backward_items": (2, 2, 240),
}


def catalog(D, dtype):
    hidden = torch.zeros(100, D, dtype=dtype, requires_grad=True)
    items = torch.zeros(1000, D, dtype=dtype, requires_grad=True)
    target = torch.ones(100, dtype=torch.int64)
    logprob, _ = ops.target_logprob_and_rank(hidden, items, target, skip_pad=True, backend="triton")
    logprob.sum().backward()


@pytest.mark.parametrize(("D", "dtype", "architecture"), each(CATALOG_CASES))
def test_linear_cross_entropy(D, dtype, architecture, monkeypatch):
    from tests.support import triton_gate

    kernels = triton_gate.compile_launches(monkeypatch, architecture, lambda: catalog(D, dtype))
    assert [kernel.name for kernel in kernels] == list(CATALOG)
    for kernel in kernels:
        products, loads, registers = CATALOG[kernel.name]
        assert not kernel.wrapping, kernel
        assert kernel.shared <= triton_gate.SHARED_LIMIT[architecture] // 2, kernel
        assert kernel.resident_warps(architecture) >= RESIDENT_WARPS, kernel
        hold(kernel, D, dtype, 0.0, registers=registers, stack=16)
        if not loads:
            assert kernel.products == 0, kernel
            continue
        S, C = kernel.constants["S"], kernel.constants["C"]
        # 16 bytes a thread.
        assert kernel.count("LDG.E.128") >= loads * S * C * dtype.itemsize // 16 // (32 * kernel.warps), kernel
        if dtype == torch.float32:
            assert kernel.products == 0, kernel
        else:
            assert kernel.products >= max(1, products * S * S * C // PRODUCT // kernel.warps), kernel
            assert kernel.products == kernel.count("HMMA"), kernel


# D, H, dtype, dropout, longest, adapter, whether the backward is compiled too; for which GPUs, and by which Triton.
RECURRENCE_CASES = [
    (64, 2, torch.bfloat16, 0.0, 50, "add", False, ALL, BOTH),
    (64, 2, torch.float16, 0.0, 128, "concat", False, (80, 90), NEWEST),
    (128, 2, torch.bfloat16, 0.0, 50, "add", True, (80,), NEWEST),
    (128, 2, torch.bfloat16, 0.0, 50, "add", False, (90, 120), BOTH),
    (128, 4, torch.bfloat16, 0.0, 128, "add", False, (80, 100), BOTH),
    (64, 2, torch.bfloat16, 0.5, 50, "add", True, (80,), OLDER),
    (64, 2, torch.bfloat16, 0.5, 50, "add", True, (90,), NEWEST),
    (64, 2, torch.bfloat16, 0.0, 20, "concat", True, (120,), NEWEST),
    (128, 2, torch.bfloat16, 0.5, 50, "add", True, (90,), NEWEST),
    (64, 2, torch.float32, 0.0, 20, "add", False, (90,), NEWEST),
]


def recurrence_stack(D, dtype, p, architecture):
    """Return how many bytes a thread of the forward kernel may have in local memory."""
    if dtype == torch.float32:
        return 512
    if p:
        return 224 if D == 64 else 704
    if D == 64:
        return 16 if architecture < 90 else 0
    return 256 if architecture < 90 else 128


# Bytes a thread of the other kernels may have in local memory: at D = 64, at D = 128, and at D = 128 with dropout.
OTHER_STACK = {
    "plan": (0, 0, 0),
    # Its values for all phases of a step are in use at one time. Most of them are places of rows.
    "step_backward": (640, 1200, 1504),
    "weight_gradients": (0, 0, 0),
    "collect_gradients": (0, 0, 0),
}
# The kernels that multiply no matrices.
NO_PRODUCTS = {"plan", "collect_gradients"}


def recurrence(D, H, dtype, p, longest, adapter, backward):
    from tests.support.recurrence_case import Case

    case = Case(lengths=[longest, 3], D=D, H=H, inner=4 * D, layers=1, adapter=adapter, depth=1, p=p)
    case.options["longest"] = longest
    out = case.call({name: x.to(dtype).requires_grad_(backward) for name, x in case.tensors.items()}, "triton")
    if backward:
        out.backward(torch.zeros_like(out))


@pytest.mark.parametrize(("D", "H", "dtype", "p", "longest", "adapter", "backward", "architecture"), each(RECURRENCE_CASES))
def test_recurrence(D, H, dtype, p, longest, adapter, backward, architecture, monkeypatch):
    from tests.support import triton_gate

    how = D, H, dtype, p, longest, adapter, backward
    kernels = triton_gate.compile_launches(monkeypatch, architecture, lambda: recurrence(*how))
    assert {kernel.name for kernel in kernels} == {"plan", "recurrence_forward", *(OTHER_STACK if backward else ())}
    for kernel in kernels:
        assert kernel.shared <= triton_gate.SHARED_LIMIT[architecture] // 2, kernel
        assert kernel.resident_warps(architecture) >= RESIDENT_WARPS, kernel
        limit = (
            recurrence_stack(D, dtype, p, architecture)
            if kernel.name == "recurrence_forward"
            else OTHER_STACK[kernel.name][0 if D == 64 else 2 if p else 1]
        )
        hold(kernel, D, dtype, p, stack=limit)
        if dtype == torch.float32:
            assert kernel.products == 0, kernel
        elif kernel.name not in NO_PRODUCTS:
            assert kernel.products > 0, kernel
            assert kernel.products == kernel.count("HMMA"), kernel
            assert kernel.count("LDG.E.128") > 0, kernel


@pytest.mark.newest_triton
@pytest.mark.hopper_triton
@pytest.mark.parametrize(
    "variant", [one for one in cases.shipped("recurrence") if one["output"] == "steps" and not one["bf16"]]
)
def test_training_in_fp32_compiles(variant):
    """Triton 3.6 once failed with an error of its own, and the cases above have no such kernel: it takes half a minute."""
    from lares_fast.kernels._offline import compiling

    from lares_fast.ops import _triton

    with _triton.anywhere(), compiling(90) as compiled:
        cases.case("recurrence", integers=False, **variant).results("triton", torch.float32)
    assert {kernel.metadata.name for kernel in compiled} == {"plan", "recurrence_forward", *OTHER_STACK}


# D, dtype, dropout; for which GPUs, and by which Triton.
PACKED_CASES = [
    (64, torch.float32, 0.5, ALL, BOTH),
    (64, torch.bfloat16, 0.0, (80,), OLDER),
    (128, torch.float32, 0.5, (80, 90), NEWEST),
    (256, torch.float16, 0.5, (90, 120), NEWEST),
    (48, torch.float32, 0.5, (100,), NEWEST),
]


def packed(D, dtype, p):
    tables = [torch.zeros(size, dtype=dtype, requires_grad=True) for size in ((100, D), (20, D), (D,), (D,))]
    draw, offsets = Draw(torch.tensor([7]), torch.arange(2)), torch.tensor([0, 20, 33])
    ops.initial_state(draw, offsets, 33, D, backend="triton")
    out = ops.embedding(torch.ones(33, dtype=torch.int64), offsets, *tables, draw=draw, dropout=p, backend="triton")
    out.backward(torch.zeros_like(out))


@pytest.mark.parametrize(("D", "dtype", "p", "architecture"), each(PACKED_CASES))
def test_embedding_and_initial_state(D, dtype, p, architecture, monkeypatch):
    from tests.support import triton_gate

    kernels = triton_gate.compile_launches(monkeypatch, architecture, lambda: packed(D, dtype, p))
    assert [kernel.name for kernel in kernels] == [
        "initial_state", "embedding_forward", "embedding_backward_rows", "embedding_backward_sums",
    ]  # fmt: skip
    for kernel in kernels:
        assert not kernel.wrapping, kernel
        assert kernel.shared <= triton_gate.SHARED_LIMIT[architecture] // 2, kernel
        assert kernel.resident_warps(architecture) >= RESIDENT_WARPS, kernel
        hold(kernel, D, dtype, p, registers=128, stack=8 if D % 64 else 0)
        # Rows are read and written 16 bytes a thread.
        if D % 64 == 0 and kernel.name != "embedding_backward_sums":
            assert kernel.name == "initial_state" or kernel.count("LDG.E.128") >= 2, kernel
            assert kernel.count("STG.E.128"), kernel


@pytest.mark.parametrize("architecture", each([((80, 90, 120), BOTH)]))
def test_a_batch_is_packed_without_offsets_that_wrap(architecture, monkeypatch):
    from lares_fast.ops._pack import pack
    from tests.support import triton_gate

    def call():
        for starts in (torch.zeros(1, dtype=torch.int64), torch.zeros(257, dtype=torch.int64)):
            offsets = torch.arange(len(starts) + 1)
            pack(torch.ones(300, dtype=torch.int32), starts, offsets, len(starts), 1)

    found = triton_gate.compile_launches(monkeypatch, architecture, call)
    assert {kernel.name for kernel in found} == {"pack"} and len({str(kernel.constants) for kernel in found}) == 1
    for kernel in found:
        assert kernel.registers <= 64 and kernel.stack == kernel.shared == 0 and kernel.wrapping == []
