"""The native module behind its checked wrappers: exact order, exact bits, and no input that ends the process."""

import contextlib
import importlib
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lares_fast import _native, _random
from lares_fast._errors import InputError, NotBuiltError

ROOT = Path(__file__).parents[1]

BUILT, WHY_NOT = _native.available()
needs_native = pytest.mark.skipif(not BUILT, reason=WHY_NOT)


def order(scores, k, excluded=()):
    """The contract spelled out for one query: (score, id) pairs by score descending, then id ascending."""
    scores = np.where(np.isnan(scores), -np.inf, scores)
    ids = [i for i in range(len(scores)) if i not in set(excluded)]
    ids = sorted(ids, key=lambda i: (-scores[i], i))[:k]
    missing = k - len(ids)
    return [*scores[ids], *[-np.inf] * missing], [*ids, *[-1] * missing]


def oracle(query, items, k, bias=None, exclude=None):
    with np.errstate(invalid="ignore"):
        scores = query.numpy() @ items.numpy().T
        if bias is not None:
            scores = scores + bias.numpy()
    rows = []
    for b, row in enumerate(scores):
        offsets, ids = (None, None) if exclude is None else exclude
        rows.append(order(row, k, [] if offsets is None else ids[offsets[b] : offsets[b + 1]].tolist()))
    return (
        torch.tensor([row[0] for row in rows], dtype=torch.float32).reshape(-1, k),
        torch.tensor([row[1] for row in rows], dtype=torch.int64).reshape(-1, k),
    )


def same(got, wanted):
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=False)


def case(seed, batch, count, width, *, values=2, with_bias=True, longest=None):
    """Small integers: every sum is exact, and ties are massed. Exclusions are unsorted and repeat."""
    rng = np.random.default_rng(seed)
    query = torch.from_numpy(rng.integers(-values, values + 1, (batch, width)).astype(np.float32))
    items = torch.from_numpy(rng.integers(-values, values + 1, (count, width)).astype(np.float32))
    bias = torch.from_numpy(rng.integers(-3, 4, count).astype(np.float32)) if with_bias else None
    exclude = None
    if longest is not None:
        lists = [rng.integers(0, count, rng.integers(0, longest + 1)) for _ in range(batch)]
        offsets = np.cumsum([0, *map(len, lists)])
        exclude = torch.from_numpy(offsets), torch.from_numpy(np.concatenate([np.empty(0, np.int64), *lists]))
    return query, items, bias, exclude


@needs_native
@pytest.mark.parametrize(
    ("batch", "count", "width"), [(1, 1, 1), (3, 15, 4), (2, 16, 1), (5, 17, 8), (130, 700, 8), (3, 5000, 64)]
)
@pytest.mark.parametrize("longest", [None, 0, 30])
def test_topk_is_the_total_order(batch, count, width, longest):
    query, items, bias, exclude = case(count, batch, count, width, longest=longest, with_bias=longest is not None)
    for k in sorted({1, min(7, count), count}):
        same(_native.topk(query, items, k, bias=bias, exclude=exclude, threads=2), oracle(query, items, k, bias, exclude))


@needs_native
@settings(max_examples=60, deadline=None)
@given(st.data())
def test_topk_on_drawn_sizes(data):
    batch, count, width = (data.draw(st.integers(low, high)) for low, high in ((0, 9), (1, 80), (1, 9)))
    query, items, bias, exclude = case(
        data.draw(st.integers(0, 2**32)), batch, count, width,
        values=data.draw(st.sampled_from([0, 1, 50])), with_bias=data.draw(st.booleans()),
        longest=data.draw(st.sampled_from([None, 0, 3, 200])),
    )  # fmt: skip
    k = data.draw(st.integers(1, count + 2))
    threads = data.draw(st.integers(1, 3))
    same(_native.topk(query, items, k, bias=bias, exclude=exclude, threads=threads), oracle(query, items, k, bias, exclude))


@needs_native
def test_topk_ranks_nan_as_minus_infinity_and_zero_as_zero():
    nan, inf = float("nan"), float("inf")
    scores = [nan, -inf, 0.0, -0.0, inf, nan, inf, -1.0, 0.0]
    got = _native.topk(torch.ones(1, 1), torch.tensor(scores).unsqueeze(1), len(scores))
    assert got[1].tolist() == [[4, 6, 2, 3, 8, 7, 0, 1, 5]]
    assert got[0].tolist() == [[inf, inf, 0, 0, 0, -1, -inf, -inf, -inf]]
    got = _native.topk(torch.ones(1, 1), torch.zeros(9, 1), 4, bias=torch.tensor(scores))
    assert got[1].tolist() == [[4, 6, 2, 3]]
    assert _native.topk(torch.full((1, 1), nan), torch.ones(40, 1), 3)[1].tolist() == [[0, 1, 2]]


@needs_native
def test_topk_with_every_item_excluded_gives_none():
    query, items, _, _ = case(0, 2, 40, 4)
    exclude = torch.tensor([0, 80, 80]), torch.arange(40).flip(0).repeat(2)
    scores, ids = _native.topk(query, items, 5, exclude=exclude)
    assert ids[0].tolist() == [-1] * 5 and scores[0].tolist() == [-float("inf")] * 5
    same((scores[1:], ids[1:]), oracle(query[1:], items, 5))


@needs_native
def test_topk_of_ascending_scores():
    items = torch.arange(3000.0).unsqueeze(1)
    assert _native.topk(torch.ones(1, 1), items, 100)[1].tolist() == [list(range(2999, 2899, -1))]


@needs_native
def test_topk_of_an_empty_batch():
    scores, ids = _native.topk(
        torch.empty(0, 8), torch.ones(5, 8), 3, exclude=(torch.zeros(1, dtype=torch.int64), torch.empty(0, dtype=torch.int64))
    )
    assert scores.shape == ids.shape == (0, 3)


@needs_native
def test_topk_has_the_same_bits_for_every_split_of_the_work():
    torch.manual_seed(0)
    query, items, bias = torch.randn(150, 40), torch.randn(3001, 40), torch.randn(3001)
    whole = _native.topk(query, items, 20, bias=bias, threads=1)
    for threads in (2, 4, 999):
        same(_native.topk(query, items, 20, bias=bias, threads=threads), whole)
    for size in (1, 2, 7, 63):
        parts = [_native.topk(part, items, 20, bias=bias) for part in query.split(size)]
        same((torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])), whole)
    same(_native.topk(query, items, 5, bias=bias), tuple(part[:, :5] for part in whole))


@needs_native
def test_topk_scores_are_close_to_a_wider_sum():
    torch.manual_seed(0)
    query, items = torch.randn(9, 128), torch.randn(500, 128)
    scores, ids = _native.topk(query, items, 500)
    truth = (query.double() @ items.double().T).gather(1, ids)
    torch.testing.assert_close(scores.double(), truth, rtol=0, atol=1e-4)


@needs_native
def test_topk_takes_strided_tensors():
    query, items, bias, _ = case(3, 6, 50, 8)
    wide = torch.zeros(6, 16)
    wide[:, ::2] = query
    same(_native.topk(wide[:, ::2], items.T.contiguous().T, 9, bias=bias.expand(50)), oracle(query, items, 9, bias))


KEY = _random.root_key(7)


@needs_native
@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((2**32 - 1,) * 4, (2**32 - 1,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers(counter, key, words):
    assert _native.load().philox(*counter, *key) == words


@needs_native
@pytest.mark.parametrize("rows", [[], [0], [5, 2**32 - 1, 5, 17]])
@pytest.mark.parametrize(("length", "width"), [(1, 1), (3, 64), (50, 65), (7, 200)])
@pytest.mark.parametrize("threshold", [0, 6554, 65535])
def test_hidden_masks_are_the_reference_bits(rows, length, width, threshold):
    rows = torch.tensor(rows, dtype=torch.int64)
    arguments = {"site": 4, "step": 9, "layer": 3, "width": width}
    token_rows, positions = rows.repeat_interleave(length), torch.arange(length).repeat(len(rows))
    ours = _native.keep_hidden(KEY, threshold, **arguments, rows=token_rows, positions=positions)
    expected = _random.keep_hidden(KEY, threshold, **arguments, rows=rows, length=length)
    same([ours.view_as(expected)], [expected])


@needs_native
@pytest.mark.parametrize("rows", [[], [0], [5, 2**32 - 1, 5, 17]])
@pytest.mark.parametrize("width", [1, 64, 65, 200])
def test_uniforms_of_h0_are_the_reference_bits(rows, width):
    rows = torch.tensor(rows, dtype=torch.int64)
    arguments = (KEY, rows, rows.flip(0), width)
    same([_native.state_uniforms(*arguments)], [_random.state_uniforms(*arguments)])
    with pytest.raises(InputError):
        _native.state_uniforms(KEY, rows, rows[1:] if len(rows) else rows - 1, -1)


@needs_native
@pytest.mark.parametrize("rows", [[], [0], [5, 2**32 - 1, 17]])
@pytest.mark.parametrize(("heads", "length"), [(1, 1), (2, 16), (3, 50), (1, 19)])
def test_attention_masks_are_the_reference_bits(rows, heads, length):
    arguments = {"step": 65535, "layer": 1, "rows": torch.tensor(rows, dtype=torch.int64), "heads": heads, "length": length}
    same([_native.keep_attention(KEY, 20000, **arguments)], [_random.keep_attention(KEY, 20000, **arguments)])


def csr(offsets, ids):
    return torch.tensor(offsets), torch.tensor(ids, dtype=torch.int64)


@needs_native
@pytest.mark.parametrize(
    "change",
    [
        {"k": 0},
        {"k": -1},
        {"k": 2**63},
        {"threads": 0},
        {"query": torch.ones(2)},
        {"query": torch.ones(2, 5)},
        {"query": torch.ones(2, 4, dtype=torch.float64)},
        {"query": torch.ones(2, 4, device="meta")},
        {"query": torch.ones(2, 4).to_sparse()},
        {"query": [[1.0]]},
        {"items": torch.ones(6, 4, dtype=torch.bfloat16)},
        {"bias": torch.ones(5)},
        {"bias": torch.ones(6, 1)},
        {"exclude": csr([0, 1, 2], [0, 6])},
        {"exclude": csr([0, 1, 2], [-1, 0])},
        {"exclude": csr([0, 3, 2], [0, 1])},
        {"exclude": csr([1, 1, 2], [0, 1])},
        {"exclude": csr([-9, 1, 2], [0, 1])},
        {"exclude": csr([0, 1, 3], [0, 1])},
        {"exclude": csr([0, 1], [0])},
        {"exclude": (torch.tensor([0, 0, 0], dtype=torch.int32), torch.empty(0, dtype=torch.int64))},
    ],
    ids=str,
)
def test_topk_refuses(change):
    arguments = {"query": torch.ones(2, 4), "items": torch.ones(6, 4), "k": 2, **change}
    with pytest.raises((InputError, RuntimeError, TypeError, OverflowError)):
        _native.topk(**arguments)


@needs_native
@pytest.mark.parametrize(
    "change",
    [
        {"threshold": -1},
        {"threshold": 65537},
        {"step": 65536},
        {"layer": -1},
        {"site": 65536},
        {"rows": torch.tensor([-1])},
        {"rows": torch.tensor([2**32])},
        {"rows": torch.tensor([0.5])},
        {"positions": torch.tensor([-1])},
        {"positions": torch.tensor([2**32])},
        {"positions": torch.tensor([1, 2])},
        {"width": -1},
        {"width": 64 * 8192 + 1},
        {"key": (-1, 0)},
        {"key": (2**32, 0)},
    ],
    ids=str,
)
def test_hidden_mask_refuses(change):
    arguments = {
        "key": KEY,
        "threshold": 5,
        "site": 0,
        "step": 0,
        "layer": 0,
        "rows": torch.tensor([1]),
        "positions": torch.tensor([2]),
        "width": 3,
        **change,
    }
    with pytest.raises(InputError):
        _native.keep_hidden(**arguments)


@needs_native
@settings(max_examples=150, deadline=None)
@given(st.lists(st.one_of(st.integers(-3, 3), st.just(2**62)), min_size=5, max_size=5), st.booleans())
def test_the_module_itself_survives_bad_sizes(sizes, pointers):
    """A valid call stays within these buffers; every other one is refused, and no call ends the process."""
    room, ids = torch.zeros(9), torch.zeros(9, dtype=torch.int64)
    at, ids_at = (room.data_ptr(), ids.data_ptr()) if pointers else (0, 0)
    B, N, D, k, threads = sizes
    fits = min(B, N, D) >= 0 and threads >= 1 and (B == 0 or (pointers and max(B, N, D) <= 3))
    with contextlib.suppress(ValueError):
        _native.load().topk(at, at, 0, 0, 0, at, ids_at, [], B, N, D, k, threads)
        assert fits and k >= 1 and (B == 0 or k <= 3)
    with contextlib.suppress(ValueError):
        _native.load().target_rank(at, at, 0, ids_at, 0, 0, ids_at, ids_at, B, N, D, True, threads)
        assert fits and (B == 0 or N > 0)


@needs_native
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": torch.ones(2, 5)}, r"items must be a dense torch\.float32 \[any, 5\] on the CPU"),
        ({"query": torch.ones(2, 4, dtype=torch.float64)}, r"query must be a dense torch\.float32 \[any, any\] on the CPU"),
        ({"query": torch.ones(2, 4, device="meta")}, "query must be .* but got .* on meta"),
        ({"query": [[1.0]]}, "query must be a tensor, but got list"),
        ({"target": torch.tensor([0])}, r"target must be a dense torch\.int64 \[2\]"),
        ({"target": torch.tensor([0, 6])}, r"target_rank: target must be item ids in \[0, N\)"),
        ({"target": torch.tensor([0, -1])}, r"target_rank: target must be item ids in \[0, N\)"),
        ({"bias": torch.ones(5)}, r"bias must be a dense torch\.float32 \[6\]"),
        ({"exclude": csr([0, 1, 2], [0, 6])}, "target_rank: exclude ids must be item ids"),
        ({"exclude": csr([0, 3, 2], [0, 1])}, "target_rank: exclude offsets must not decrease"),
        ({"exclude": csr([1, 1, 2], [0, 1])}, "target_rank: exclude offsets must start with 0"),
        ({"exclude": csr([0, 1, 3], [0, 1])}, "exclude offsets must end with the number of ids, 2"),
        ({"threads": 0}, "threads must be at least 1, but got 0"),
    ],
    ids=str,
)
def test_target_rank_refuses(change, message):
    arguments = {"query": torch.ones(2, 4), "items": torch.ones(6, 4), "target": torch.tensor([0, 1]), **change}
    with pytest.raises(InputError, match=message):
        _native.target_rank(**arguments)


@needs_native
def test_what_does_not_fit_into_memory_is_an_error():
    huge = torch.zeros(1, 1).expand(2**50, 1)
    with pytest.raises(InputError, match=r"query \[1125899906842624, 1\] does not fit into memory"):
        _native.topk(huge, torch.ones(3, 1), 1)
    with pytest.raises(InputError, match=r"the result \[1048576, 1073741824\] does not fit into memory"):
        _native.topk(torch.ones(2**20, 1), torch.ones(3, 1), 2**30)


def on_all_ops(seed=0):
    """Answers of every catalog op on the same data, as one list of tensors."""
    query, items, bias, exclude = case(seed, 9, 70_000, 8, longest=20)
    target = torch.arange(9) * 7000
    return [
        *_native.topk(query, items, 20, bias=bias, exclude=exclude, threads=2),
        *_native.topk(query, items, 20, exclude=exclude, index=_native.build_index(items, threads=2), threads=2),
        *_native.target_rank(query, items, target, bias=bias, exclude=exclude, threads=2),
    ]


@needs_native
def test_several_python_threads_at_once_get_their_own_answers():
    expected = [on_all_ops(seed) for seed in range(4)]
    found = [None] * 4

    def work(seed):
        for _ in range(3):
            found[seed] = on_all_ops(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for got, wanted in zip(found, expected, strict=True):
        same(got, wanted)


FORK = """
import os, sys
sys.path.append(sys.argv[1])
from tests import test_native
before = test_native.on_all_ops()
child = os.fork()
if child == 0:
    test_native.same(test_native.on_all_ops(), before)
    os._exit(7)
test_native.same(test_native.on_all_ops(), before)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 7)
"""


@needs_native
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_works_after_a_fork():
    done = subprocess.run(
        [sys.executable, "-P", "-c", FORK, str(ROOT)], env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


@contextlib.contextmanager
def ticking():
    """A Python thread that notes the time and this process's number of threads, again and again."""
    ticks, stop = [], threading.Event()

    def tick():
        while not stop.wait(0.001):
            ticks.append((time.perf_counter(), len(os.listdir("/proc/self/task")) if os.path.isdir("/proc/self/task") else 0))

    thread = threading.Thread(target=tick)
    thread.start()
    try:
        yield ticks
    finally:
        stop.set()
        thread.join()


def zeros(query, dtype=torch.int64):
    return torch.zeros(len(query), dtype=dtype)


LONG_CALLS = {
    "topk": lambda query, items: _native.topk(query, items, 10),
    "build_index": lambda query, items: _native.build_index(items),
    "target_rank": lambda query, items: _native.target_rank(query, items, zeros(query)),
    "target_logprob": lambda query, items: _native.target_logprob(query, items, zeros(query)),
    "target_logprob_backward": lambda query, items: _native.target_logprob_backward(
        zeros(query, torch.float32), query, items, zeros(query), zeros(query, torch.float64)
    ),
}


@needs_native
@pytest.mark.parametrize("op", LONG_CALLS)
def test_other_python_threads_run_meanwhile(op):
    """The call holds no lock of Python's: a second thread goes on in the middle of it."""
    query, items = torch.randn(512, 64), torch.randn(300_000, 64)
    with ticking() as ticks:
        began = time.perf_counter()
        LONG_CALLS[op](query, items)
        took = time.perf_counter() - began
    assert any(began + 0.3 * took < at < began + 0.7 * took for at, _ in ticks)


@needs_native
@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="this system does not list a process's threads")
@pytest.mark.parametrize("op", ["topk", "target_rank", "target_logprob", "target_logprob_backward"])
def test_torch_decides_the_number_of_threads(op):
    query, items = torch.randn(512, 64), torch.randn(300_000, 64)
    torch.set_num_threads(1)
    LONG_CALLS[op](query[:1], items)
    seen = {}
    for threads in (1, 3):
        torch.set_num_threads(threads)
        try:
            with ticking() as ticks:
                before = len(os.listdir("/proc/self/task"))
                LONG_CALLS[op](query, items)
        finally:
            torch.set_num_threads(1)
        seen[threads] = max(count for _, count in ticks) - before
    assert seen == {1: 0, 3: 2}


def test_build_info_never_raises_and_names_its_reason():
    info = _native.build_info()
    assert info["native"] is BUILT
    assert bool(info["reason"]) is not BUILT
    assert info["cuda_reason"]


@needs_native
def test_build_info_of_a_native_build():
    info = _native.build_info()
    assert info["cuda_built"] is bool(info["cuda_archs"])
    assert {"version", "compiler", "flags", "build_type", "cpu_arch", "nvcc_version", "file"} <= set(info)


@pytest.fixture
def module_raises(monkeypatch):
    """Makes the import of ``_C`` raise what a test gives."""

    def install(error):
        real = importlib.import_module

        def import_module(name, package=None):
            if name == "lares_fast._C":
                raise error
            return real(name, package)

        monkeypatch.setattr(_native.importlib, "import_module", import_module)
        _native._attempt.cache_clear()

    yield install
    monkeypatch.undo()
    _native._attempt.cache_clear()


def test_a_file_that_does_not_load_is_said_in_the_systems_words(module_raises, monkeypatch, tmp_path):
    (tmp_path / "_C.so").touch()
    monkeypatch.setattr(_native, "__file__", str(tmp_path / "_native.py"))
    module_raises(ImportError("libgone.so.1: cannot open shared object file"))
    with pytest.raises(NotBuiltError, match=r"does not load \(libgone.so.1: cannot open.*pip install"):
        _native.load()


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({}, "bare sources: run pip install"),
        ({"_build.json": "not json"}, "bare sources"),
        (
            {"_build.json": '{"native": false, "reason": "LARES_FAST_BUILD=none when it was installed"}'},
            "without LARES_FAST_BUILD",
        ),
        ({"_build.json": '{"native": true, "reason": ""}'}, "no longer in"),
        ({"_C.cpython-39-x86_64-linux-gnu.so": ""}, "for another Python"),
    ],
)
def test_a_missing_module_is_explained(module_raises, monkeypatch, tmp_path, files, said):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(_native, "__file__", str(tmp_path / "_native.py"))
    module_raises(ModuleNotFoundError("No module named 'lares_fast._C'"))
    built, reason = _native.available()
    assert not built and said in reason
    info = _native.build_info()
    assert info["native"] is False and info["reason"] == reason and info["cuda_built"] is False
    with pytest.raises(NotBuiltError):
        _native.topk(torch.ones(1, 1), torch.ones(1, 1), 1)


def test_a_module_of_other_sources_is_refused(monkeypatch):
    _native._attempt.cache_clear()
    monkeypatch.setattr(_native, "ABI", -1)
    try:
        built, reason = _native.available()
        assert not built
        assert "other sources" in reason or not BUILT
    finally:
        monkeypatch.undo()
        _native._attempt.cache_clear()
