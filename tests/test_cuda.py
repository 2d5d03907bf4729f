"""What of the CUDA side runs without a GPU: launch plans, the wrappers' reasons and preparations, rules of the sources."""

import re
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lares_fast import _cuda, _native, _settings, ops
from lares_fast._errors import BackendError, InputError

CSRC = Path(__file__).parents[1] / "csrc"
needs_native = pytest.mark.skipif(not _native.available()[0], reason=_native.available()[1])

# Multiprocessors, shared memory a block, shared memory a multiprocessor: sm_80, sm_90 and sm_100, sm_120, a slice of one.
DEVICES = {
    "sm_80": (108, 163 << 10, 164 << 10),
    "sm_90": (132, 227 << 10, 228 << 10),
    "sm_120": (170, 99 << 10, 100 << 10),
    "slice": (1, 99 << 10, 100 << 10),
}


@needs_native
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("B", [1, 2, 127, 128, 129, 1024, 70_000])
@pytest.mark.parametrize("N", [0, 1, 63, 64, 65, 12_101, 10_000_000, 2**32 - 2])
def test_a_plan_covers_the_catalog_within_the_device(device, B, N):
    limits = DEVICES[device]
    for D in (0, 1, 33, 64, 256, 4096):
        walk = _native.load().plan_target_rank(B, N, D, limits)
        plans = [_native.load().plan_topk(B, N, D, k, limits) for k in (1, 32, 33, 100, 1024)]
        for plan in (walk, *plans):
            assert plan["query_tiles"] * 128 >= B > (plan["query_tiles"] - 1) * 128
            assert plan["item_tiles"] * 64 >= N > (plan["item_tiles"] - 1) * 64 or N == plan["item_tiles"] == 0
            assert plan["chunks"] * 32 >= D and plan["chunks"] >= 1
            assert 1 <= plan["splits"] <= max(1, plan["item_tiles"]) and plan["splits"] <= 65535
            assert plan["query_tiles"] < 2**31
            assert 0 < plan["shared_bytes"] <= limits[1]
            chunks = plan["chunks"] if plan["resident"] else 2
            assert plan["shared_bytes"] == 4 * (chunks * 128 * 32 + 2 * 64 * 33 + 128)
        for k, plan in zip((1, 32, 33, 100, 1024), plans, strict=True):
            assert plan["sorted"] % 32 == 0 and k <= plan["sorted"] < k + 32
            assert plan["merge_warps"] in (1, 2, 4, 8, 16)
            assert plan["workspace_bytes"] == 8 * B * (1 + plan["splits"] * (plan["sorted"] + 32))
            # Lists grow with the blocks that keep the device busy, not with the catalog.
            assert plan["workspace_bytes"] <= 8 * (B + 128 * (limits[0] * 3 + plan["query_tiles"])) * (1 + plan["sorted"] + 32)


@needs_native
@pytest.mark.parametrize("B", [1, 256, 1024, 4096])
def test_all_blocks_of_a_large_catalog_run_at_once(B):
    """Registers allow three blocks a multiprocessor, which tests/emulator/test_static.py reads from what ptxas says."""
    places = 3 * DEVICES["sm_90"][0]
    for D in (64, 128):
        topk = _native.load().plan_topk(B, 1_000_000, D, 100, DEVICES["sm_90"])
        rank = _native.load().plan_target_rank(B, 1_000_000, D, DEVICES["sm_90"])
        for plan in (topk, rank):
            # With four chunks of queries in shared memory two blocks fit.
            assert 0.9 * places * (2 if D == 128 else 3) / 3 < plan["query_tiles"] * plan["splits"] <= places


@needs_native
@pytest.mark.parametrize("N", [1, 64, 65, 700, 5000])
def test_every_tile_is_visited_once(N):
    for device in DEVICES.values():
        plan = _native.load().plan_topk(1, N, 4, 10, device)
        tiles, splits = plan["item_tiles"], plan["splits"]
        visited = []
        for split in range(splits):
            place = split * plan["stride"] % tiles
            for _ in range(split, tiles, splits):
                visited.append(place)
                place = (place + plan["step"]) % tiles
        assert sorted(visited) == list(range(tiles))


@needs_native
@pytest.mark.parametrize(("sizes", "said"), [
    ((0, 5, 3, 2), "B must be at least 1"),
    ((1, -1, 3, 2), "must not be negative"),
    ((1, 5, 3, 0), "k must be in 1..1024"),
    ((1, 5, 3, 1025), "k must be in 1..1024"),
    ((1, 2**32 - 1, 3, 2), "N must stay below"),
    ((1, 5, 2**31, 2), "D is too large"),
    ((2**31, 5, 3, 2), "too large"),
])  # fmt: skip
def test_a_plan_refuses_what_the_kernels_cannot_take(sizes, said):
    with pytest.raises(ValueError, match=said):
        _native.load().plan_topk(*sizes, DEVICES["sm_90"])
    with pytest.raises(ValueError, match=r"needs \d+ bytes of shared memory a block"):
        _native.load().plan_topk(1, 5, 3, 2, (4, 32 << 10, 64 << 10))


def test_why_the_kernels_cannot_run_is_said_in_words(monkeypatch):
    query, items = torch.ones(2, 3), torch.ones(5, 3)
    assert "query is on cpu" in _cuda.topk_obstacle(query, items, 2)
    assert "k up to 1024, and k is 1025" in _cuda.topk_obstacle(query, items, 1025)
    with pytest.raises(BackendError, match="cannot run on the backend 'cuda': it runs on CUDA devices"):
        ops.topk(query, items, 2, backend="cuda")

    class OnDevice:
        device, dtype = torch.device("cuda", 0), torch.float32

    monkeypatch.setattr(_cuda, "_able", {})
    monkeypatch.setattr(_cuda, "_current", lambda device: nullcontext())
    monkeypatch.setattr(_cuda, "_capturing", lambda device: False)
    monkeypatch.setattr(_native, "available", lambda: (True, ""))
    # What was wrong may have passed; what could run can.
    answers = iter(("the driver does not answer: all in use", "no kernel image: capturing", "ok: a device"))
    monkeypatch.setattr(_native, "capability", lambda device: next(answers))
    assert "all in use" in _cuda.obstacle(OnDevice(), items)
    assert "no kernel image" in _cuda.obstacle(OnDevice(), items)
    assert _cuda.obstacle(OnDevice(), items) is None
    assert _cuda.obstacle(OnDevice(), items) is None
    OnDevice.dtype = torch.float16
    assert "it takes float32" in _cuda.obstacle(OnDevice(), items)


@needs_native
def test_capability_names_a_reason():
    said = _native.capability(0)
    assert re.match("ok: |not built: |no driver|driver older than toolkit|no device|no kernel image|the dr|the de", said)


@needs_native
@pytest.mark.skipif(_native.capability().startswith("ok"), reason="there is a device, and these are no addresses of it")
def test_a_refused_launch_is_an_error_in_words(monkeypatch):
    monkeypatch.setattr(_cuda, "_index", lambda device: 0)
    monkeypatch.setattr(_cuda, "_limits", lambda index: DEVICES["sm_90"])
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=0))
    query, items, target = torch.ones(2, 3), torch.ones(5, 3), torch.tensor([0, 4])
    exclude = torch.tensor([0, 2, 2]), torch.tensor([3, 1])
    for call, op in (
        (lambda: _cuda.topk(query, items, 2, exclude=exclude), "topk"),
        (lambda: _cuda.target_rank(query, items, target, bias=torch.ones(5), exclude=exclude), "target_rank"),
    ):
        with pytest.raises(BackendError, match=rf"cpu refused {op} \((cudaError|not built).*: use backend='reference'"):
            call()
    with pytest.raises(RuntimeError, match=r"driver|not built|device"):
        _native.load().device_limits(0)


class Device:
    """Stands for ``torch.cuda`` and the native module where there is no GPU, and notes what they are told."""

    def __init__(self, monkeypatch):
        self.told, self.capturing, self.current = [], False, 0
        monkeypatch.setattr(_cuda, "_able", {})
        monkeypatch.setattr(_cuda, "_ran", set())
        monkeypatch.setattr(_cuda, "_limits", lambda index: [])
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=7))
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: self.capturing)
        monkeypatch.setattr(torch.cuda, "device", self.enter)
        monkeypatch.setattr(_native, "load", lambda: self)
        monkeypatch.setattr(_native, "capability", self.capability)

    @contextmanager
    def enter(self, device):
        before, self.current = self.current, device.index
        yield
        self.current = before

    def capability(self, index):
        self.told.append(("capability", index, self.current))
        return "ok"

    def topk_cuda(self, *arguments):
        *_, index, _ = arguments
        self.told.append(("topk", index, self.current))
        return ""


def test_the_tensors_device_is_current_where_the_native_module_runs(monkeypatch):
    """A module that switched by itself would leave a context on the device that it switches back to."""
    device = Device(monkeypatch)
    assert _cuda._capability(torch.device("cuda", 3)) == "ok"
    _cuda._launch("topk_cuda", torch.device("cuda", 3), ())
    assert device.told == [("capability", 3, 3), ("topk", 3, 3)]
    assert device.current == 0


def test_a_first_use_within_a_graph_capture_is_refused(monkeypatch):
    device, place = Device(monkeypatch), torch.device("cuda", 1)
    device.capturing = True
    with pytest.raises(RuntimeError, match="cuda:1 was not asked for the CUDA kernels before the graph capture"):
        _cuda._capability(place)
    with pytest.raises(RuntimeError, match="topk was not run on cuda:1 before the graph capture: call it once outside"):
        _cuda._launch("topk_cuda", place, ())
    assert not device.told
    device.capturing = False
    _cuda._capability(place)
    _cuda._launch("topk_cuda", place, ())
    device.capturing = True
    assert _cuda._capability(place) == "ok"
    _cuda._launch("topk_cuda", place, ())
    # Other products are other kernels.
    monkeypatch.setenv("LARES_FAST_CUDA_PRODUCTS", "ffma")
    with pytest.raises(RuntimeError, match="before the graph capture"):
        _cuda._launch("topk_cuda", place, ())


@pytest.mark.parametrize(("change", "said"), [
    ({"items": torch.ones(5, 4)}, r"items must be torch.float32 \[5, 3\] on cpu"),
    ({"bias": torch.ones(4)}, r"bias must be torch.float32 \[5\]"),
    ({"exclude": (torch.tensor([0, 1]), torch.tensor([1]))}, r"exclude offsets must be torch.int64 \[3\]"),
    ({"k": 0}, r"k must be in 1..1024"),
])  # fmt: skip
def test_the_wrapper_checks_what_the_kernel_trusts(change, said):
    arguments = {"query": torch.ones(2, 3), "items": torch.ones(5, 3), "k": 2, **change}
    with pytest.raises(InputError, match=said):
        _cuda.topk(arguments.pop("query"), arguments.pop("items"), arguments.pop("k"), **arguments)


def test_lists_are_sorted_query_by_query():
    lists = [[5, 1, 5, 0], [], [9], [3, 2]]
    offsets = torch.tensor([0, *map(len, lists)]).cumsum(0)
    ids = torch.tensor([i for part in lists for i in part])
    assert _cuda.sort_lists(offsets, ids, 10).tolist() == [0, 1, 5, 5, 9, 2, 3]


def test_lists_that_are_none_are_seen_to_be_none():
    """The kernels refuse a query by its own two offsets and by the ends of its list; others must keep what is theirs."""
    query, items = torch.ones(4, 2), torch.ones(10, 2)

    def given(offsets, ids):
        *_, places, kept = _cuda._inputs(query, items, None, (torch.tensor(offsets), torch.tensor(ids)))
        return places.tolist(), kept.tolist()

    # The third offset falls: the second and the third list end or begin there.
    places, ids = given([0, 3, 1, 5, 7], [5, 1, 0, 9, 2, 8, 3])
    assert places == [0, 3, -1, 5, 7]
    assert ids[:3] == [0, 1, 5] and ids[5:] == [3, 8]
    places, ids = given([0, 2, 4, 2**60, -(2**63)], [5, 1, 9, 2, 8])
    assert places == [0, 2, 4, 2**60, -1]
    assert ids[:4] == [1, 5, 2, 9]
    # Ids that are no items stay at an end of their own list.
    places, ids = given([0, 3, 5, 5, 7], [4, -(2**62), 1, 2**62, 3, 9, 0])
    assert places == [0, 3, 5, 5, 7]
    assert ids == [-1, 1, 4, 3, 10, 0, 9]


def test_products_are_chosen_by_the_environment(monkeypatch):
    assert _settings.cuda_products() == "3xtf32"
    monkeypatch.setenv("LARES_FAST_CUDA_PRODUCTS", "ffma")
    assert _settings.cuda_products() == "ffma"
    monkeypatch.setenv("LARES_FAST_CUDA_PRODUCTS", "bf16")
    with pytest.raises(InputError, match="LARES_FAST_CUDA_PRODUCTS must be one of 3xtf32, ffma"):
        _settings.cuda_products()


# What breaks streams, graph capture, other libraries' devices or the promise of fp32.
FORBIDDEN = (
    "cudaSetDevice",
    "cudaMalloc", "cudaFree", "cudaDeviceSynchronize", "cudaStreamSynchronize", "cudaDeviceReset", "cudaEventSynchronize",
    "cuCtxCreate", "volatile *", "volatile unsigned", "volatile int", "use_fast_math", "fmad=", "__fmul", "atomicCAS",
    "__nanosleep", "default-stream",
)  # fmt: skip


def test_sources_keep_the_rules_of_the_stream():
    files = [
        path for path in CSRC.rglob("*") if path.suffix in (".cu", ".cuh") or path.parent.name == "cuda" or path.stem == "plan"
    ]
    assert len(files) >= 8
    for path in [*files, CSRC.parent / "CMakeLists.txt"]:
        for word in FORBIDDEN:
            assert word not in path.read_text(), f"{path.name} has {word}"
    # No block waits for another: what others change is read once a tile, in no loop's condition.
    for path in files:
        assert not re.search(r"(while|for) \([^)]*(load_relaxed|atomic)", path.read_text()), path.name
