"""The parts of the CUDA backends that run without a GPU: launch plans, reasons, preparation of inputs, rules of sources."""

import re
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lares_fast import _native, _settings, ops
from lares_fast._errors import BackendError, InputError
from lares_fast.ops import _cuda_launch, _target_rank_cuda, _topk_cuda
from lares_fast.ops._catalog_calls import TargetRankCall, TopkCall

CSRC = Path(__file__).parents[1] / "csrc"
needs_native = pytest.mark.skipif(not _native.available()[0], reason=_native.available()[1])

# Multiprocessors, bytes of shared memory of a block and of a multiprocessor. sm_100 has the limits of sm_90.
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
        walk = _native.load().plan_target_rank(B=B, N=N, D=D, limits=limits)
        plans = [_native.load().plan_topk(B=B, N=N, D=D, k=k, limits=limits) for k in (1, 32, 33, 100, 1024)]
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
            # The lists grow with the number of blocks that keep the device busy, and not with the catalog.
            assert plan["workspace_bytes"] <= 8 * (B + 128 * (limits[0] * 3 + plan["query_tiles"])) * (1 + plan["sorted"] + 32)


@needs_native
@pytest.mark.parametrize("B", [1, 256, 1024, 4096])
def test_all_blocks_of_a_large_catalog_run_at_once(B):
    """Registers allow three blocks on a multiprocessor: tests/emulator/test_static.py reads it from the output of ptxas."""
    places = 3 * DEVICES["sm_90"][0]
    for D in (64, 128):
        sizes = {"B": B, "N": 1_000_000, "D": D, "limits": DEVICES["sm_90"]}
        topk = _native.load().plan_topk(**sizes, k=100)
        rank = _native.load().plan_target_rank(**sizes)
        for plan in (topk, rank):
            # With four chunks of queries in shared memory, two blocks fit.
            assert 0.9 * places * (2 if D == 128 else 3) / 3 < plan["query_tiles"] * plan["splits"] <= places


@needs_native
@pytest.mark.parametrize("N", [1, 64, 65, 700, 5000])
def test_every_tile_is_visited_once(N):
    for device in DEVICES.values():
        plan = _native.load().plan_topk(B=1, N=N, D=4, k=10, limits=device)
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
        _native.load().plan_topk(**dict(zip("BNDk", sizes, strict=True)), limits=DEVICES["sm_90"])
    with pytest.raises(ValueError, match=r"needs \d+ bytes of shared memory a block"):
        _native.load().plan_topk(B=1, N=5, D=3, k=2, limits=(4, 32 << 10, 64 << 10))


def test_why_the_kernels_cannot_run_is_said_in_words(monkeypatch):
    query, items = torch.ones(2, 3), torch.ones(5, 3)
    assert "query is on cpu" in _topk_cuda.obstacle(TopkCall.build(query, items, 2))
    assert "k up to 1024, and k is 1025" in _topk_cuda.obstacle(TopkCall.build(query, torch.ones(2000, 3), 1025))
    with pytest.raises(BackendError, match="cannot run on the backend 'cuda': it runs on CUDA devices"):
        ops.topk(query, items, 2, backend="cuda")

    on_device = SimpleNamespace(device=torch.device("cuda", 0), dtype=torch.float32)
    call = SimpleNamespace(query=on_device, items=items)
    monkeypatch.setattr(_cuda_launch, "_able", {})
    monkeypatch.setattr(_cuda_launch, "_current", lambda device: nullcontext())
    monkeypatch.setattr(_cuda_launch, "capturing", lambda device: False)
    monkeypatch.setattr(_native, "available", lambda: (True, ""))
    # A fault may be temporary, so the driver is queried again after one. After a success it is not queried again.
    answers = iter(("the driver does not answer: all in use", "no kernel image: capturing", "ok: a device"))
    monkeypatch.setattr(_native, "capability", lambda device: next(answers))
    assert "all in use" in _cuda_launch.obstacle(call)
    assert "no kernel image" in _cuda_launch.obstacle(call)
    assert _cuda_launch.obstacle(call) is None
    assert _cuda_launch.obstacle(call) is None
    on_device.dtype = torch.float16
    assert "it takes float32" in _cuda_launch.obstacle(call)


@needs_native
def test_capability_names_a_reason():
    said = _native.capability(0)
    assert re.match("ok: |not built: |no driver|driver older than toolkit|no device|no kernel image|the dr|the de", said)


@needs_native
@pytest.mark.skipif(_native.capability().startswith("ok"), reason="there is a device, and this test uses invalid addresses")
def test_a_refused_launch_is_an_error_in_words(monkeypatch):
    monkeypatch.setattr(_cuda_launch, "device_index", lambda device: 0)
    monkeypatch.setattr(_cuda_launch, "limits", lambda index: DEVICES["sm_90"])
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=0))
    query, items, target = torch.ones(2, 3), torch.ones(5, 3), torch.tensor([0, 4])
    exclude = torch.tensor([0, 2, 2]), torch.tensor([3, 1])
    topk = TopkCall.build(query, items, 2, exclude=exclude)
    target_rank = TargetRankCall.build(query, items, target, bias=torch.ones(5), exclude=exclude)
    for run, call in ((_topk_cuda.run, topk), (_target_rank_cuda.run, target_rank)):
        said = rf"cpu did not accept the launch of {call.op} \((cudaError|not built).*: use backend='reference'"
        with pytest.raises(BackendError, match=said):
            run(call)
    with pytest.raises(RuntimeError, match=r"driver|not built|device"):
        _native.load().device_limits(device=0)


class Device:
    """Takes the place of ``torch.cuda`` and the native module where there is no GPU, and records their calls."""

    def __init__(self, monkeypatch):
        self.told, self.capturing, self.current = [], False, 0
        monkeypatch.setattr(_cuda_launch, "_able", {})
        monkeypatch.setattr(_cuda_launch, "_ran", set())
        monkeypatch.setattr(_cuda_launch, "limits", lambda index: [])
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

    def topk_cuda(self, *, device, **arguments):
        self.told.append(("topk", device, self.current))
        return ""


def test_the_tensors_device_is_current_where_the_native_module_runs(monkeypatch):
    """If the module switched the device itself, it would leave a context on the device that it switches back to."""
    device = Device(monkeypatch)
    assert _cuda_launch.capability(torch.device("cuda", 3)) == "ok"
    _cuda_launch.enqueue("topk", torch.device("cuda", 3))
    assert device.told == [("capability", 3, 3), ("topk", 3, 3)]
    assert device.current == 0


def test_a_first_use_within_a_graph_capture_is_refused(monkeypatch):
    device, place = Device(monkeypatch), torch.device("cuda", 1)
    device.capturing = True
    with pytest.raises(RuntimeError, match="cuda:1 was not tested for the CUDA kernels before the graph capture"):
        _cuda_launch.capability(place)
    with pytest.raises(RuntimeError, match="topk was not run on cuda:1 before the graph capture: call it once outside"):
        _cuda_launch.enqueue("topk", place)
    assert not device.told
    device.capturing = False
    _cuda_launch.capability(place)
    _cuda_launch.enqueue("topk", place)
    device.capturing = True
    assert _cuda_launch.capability(place) == "ok"
    _cuda_launch.enqueue("topk", place)
    # Each kind of products has kernels of its own.
    monkeypatch.setenv("LARES_FAST_CUDA_PRODUCTS", "ffma")
    with pytest.raises(RuntimeError, match="before the graph capture"):
        _cuda_launch.enqueue("topk", place)


def test_lists_are_sorted_query_by_query():
    lists = [[5, 1, 5, 0], [], [9], [3, 2]]
    offsets = torch.tensor([0, *map(len, lists)]).cumsum(0)
    ids = torch.tensor([i for part in lists for i in part])
    assert _cuda_launch.sort_ids(offsets, ids, 10).tolist() == [0, 1, 5, 5, 9, 2, 3]


def test_lists_that_are_none_are_seen_to_be_none():
    """The kernels notice a wrong list by its two offsets and by its first and last id. The other lists must keep their ids."""

    def given(offsets, ids):
        places, kept = _cuda_launch.sorted_lists(torch.tensor(offsets), torch.tensor(ids), 10)
        return places.tolist(), kept.tolist()

    # The third offset falls. The second list ends there, and the third one begins there.
    places, ids = given([0, 3, 1, 5, 7], [5, 1, 0, 9, 2, 8, 3])
    assert places == [0, 3, -1, 5, 7]
    assert ids[:3] == [0, 1, 5] and ids[5:] == [3, 8]
    places, ids = given([0, 2, 4, 2**60, -(2**63)], [5, 1, 9, 2, 8])
    assert places == [0, 2, 4, 2**60, -1]
    assert ids[:4] == [1, 5, 2, 9]
    # Ids that are no items go to an end of their own list.
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


# These words break streams, graph capture, the devices of other libraries, or the fp32 results.
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
    # No block waits for another one. Values that other blocks change are read once a tile, never in the condition of a loop.
    for path in files:
        assert not re.search(r"(while|for) \([^)]*(load_relaxed|atomic)", path.read_text()), path.name
